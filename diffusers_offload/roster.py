"""Who is under an engine: components come, are taken apart anew, are edited, and get their weights back."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from threading import RLock

import torch

from .component import Component, State, Unit
from .homes import Homes
from .recovery import let_go_of_tensors
from .stems import Stems
from .streams import Streams
from .tiers.mapped import DiskMemory
from .tiers.packedmemory import PackedMemory, RevealedMemory
from .transfers import Transfers, renewed


class Roster:
    """The components of an engine, and the ways in and out.

    Args:
        streams, transfers, stems, homes, lock: the engine's.
        clear: takes units out of the arena.
        withdraw: sends all that moves of a component to the host.
        forget: a component is here no longer.
    """

    def __init__(
        self,
        streams: Streams,
        transfers: Transfers,
        stems: Stems,
        homes: Homes,
        lock: RLock,
        clear: Callable[[Sequence[Unit]], None],
        withdraw: Callable[[Component], None],
        forget: Callable[[Component], None],
    ) -> None:
        self.components: list[Component] = []
        self.streams = streams
        self.homes = homes
        self.lock = lock
        self._transfers = transfers
        self._stems = stems
        self._clear = clear
        self._withdraw = withdraw
        self._forget = forget
        streams.tellers.add(self)

    def under_way(self) -> list[str]:
        """The units that are on their way to the device or in use there, and which of the two."""
        return [
            f"{component.name}.{unit.name} ({unit.state.value})"
            for component in self.components
            for unit in component.units
            if unit.state in (State.LOADING, State.IN_USE)
        ]

    def adopt(self, component: Component) -> Iterator[Unit]:
        """Move a component's units to where they stay; yields each unit once it is there."""
        # What was collected with its pipeline, and not given back, was dropped behind nobody's last use.
        self.streams.load.wait_stream(self.streams.current())
        self.components.append(component)
        yield from self._take_in(component, component.units)
        self._close_ring()  # weights of packed files may have been unpacked, to stay so

    def exchange(self, before: Component, after: Component) -> None:
        """Put `after` in the place of `before`, the same module taken apart anew; units in both stay put."""
        self._withdraw(before)
        self.streams.synchronize(f"copies of {before.name}, whose memory is about to go")
        self._transfers.packed.refuse_edits(before.streamed)
        staying = set(after.units)
        origin = {}
        usual = next((unit.weights.origin[0] for unit in before.units), None)  # also of what has come since
        for unit in before.units:
            if unit not in staying:
                pairs = zip(unit.weights.tensors, unit.weights.origin, strict=True)
                origin.update((id(tensor), where) for tensor, where in pairs)
                if isinstance(
                    unit.weights.host, DiskMemory
                ):  # they look at their file, and may go on doing so
                    continue
                # By way of the host: where they came from may have no room for all of them.
                home, unit.weights.origin = (
                    unit.weights.origin,
                    [torch.device("cpu")] * len(unit.weights.tensors),
                )
                unit.state = State.OFFLOADED
                try:
                    self._transfers.give_back(unit)
                finally:
                    unit.weights.origin = home
        self.streams.empty_cache()  # what comes may be of other sizes
        self.components[self.components.index(before)] = after
        if before.on_disk:
            self._transfers.disk.pass_on(before, after)
        for other in self.components:
            other.needs = [after if each is before else each for each in other.needs]
        fresh = [unit for unit in after.units if unit.component is not before]
        for unit in fresh:
            unit.weights = weights = renewed(
                unit.weights
            )  # laid out for the bytes that the tensors had before
            pairs = zip(weights.tensors, weights.origin, strict=True)
            weights.origin = [origin.get(id(tensor), usual or where) for tensor, where in pairs]
        for _ in self._take_in(after, fresh):
            pass
        for unit in after.units:
            unit.component = after
        self._forget(before)
        self.open_arena()

    def _take_in(self, component: Component, units: list[Unit]) -> Iterator[Unit]:
        for unit in units:
            unit.component = component
            unit.ready, unit.done = self.streams.event(), self.streams.event()
        residents = set(component.residents)
        for unit in units:
            if unit in residents:
                self._transfers.unveil(unit)
                self._transfers.settle(unit)
                yield unit
        moving = [unit for unit in units if unit not in residents]
        if component.on_disk:
            yield from self._transfers.disk.put(component, moving)
            return
        if component.packs:  # how much memory a unit takes is known when it is packed
            with closing(self._transfers.put_each(moving)) as there:
                yield from there
            return
        # Closed, or its threads would live as long as the error that a failure ends in.
        with closing(self._transfers.tier.prepare([unit.nbytes for unit in moving])) as memory:
            for unit, host in zip(moving, memory, strict=True):
                self._transfers.unveil(unit)
                unit.weights.move_to_host(host)
                yield unit

    def open_arena(self) -> None:
        """Give the streamed units of all components numbers, homes and an arena that holds them."""
        self.homes.open(self.components)
        if self._transfers.disk is not None:
            self._transfers.disk.assign(self.homes.units)

    def release(self, component: Component) -> None:
        """Give a component its weights back, on the devices they came from.

        If that fails half way, all of it is offloaded as before, so that it runs and may be released later.
        """
        if component not in self.components:
            return
        self._withdraw(component)
        self.streams.synchronize(f"copies of {component.name}, whose memory is about to go")
        self._transfers.packed.refuse_edits(component.streamed)
        try:
            for unit in component.units:
                self._transfers.give_back(unit)
        except BaseException:
            self._take_edits(component)
            raise
        for unit in component.units:
            unit.state = State.RESIDENT  # where it was: whoever still predicts it finds nothing to load
        # Whoever uses them next, on whatever stream, finds them there.
        self.streams.synchronize(f"the weights of {component.name} to be back")
        self.components.remove(component)
        self._forget(component)
        if component.on_disk:
            self._transfers.disk.release(component)
        if not any(other.streamed for other in self.components):
            self.homes.arena.buffer = None
        self._close_ring()
        self.streams.empty_cache()

    def _close_ring(self) -> None:
        if not any(other.packs or other.on_disk for other in self.components):
            self._transfers.packed.close()

    def pack(self, component: Component) -> None:
        """From now on what streams of a component is packed while it is not on the device."""
        self._withdraw(component)
        self.streams.synchronize(f"copies of {component.name}, whose memory is about to go")
        component.tier = "packed"
        try:
            self.homes.let_go()  # packing takes about as much, so a bound on the device's memory holds
            # Laid out for where the tensors look now.
            fresh = [renewed(unit.weights) for unit in component.streamed]
            with closing(self._transfers.packed.pack_each(fresh)) as all_packed:
                for unit, weights, packed in zip(component.streamed, fresh, all_packed, strict=True):
                    if packed is not None:
                        unit.weights = (
                            weights  # first: an interrupt in between finds tensors to be taken over
                        )
                        weights.move_to_host(packed, filled=True)
        except BaseException as error:
            let_go_of_tensors(error)  # what was being packed is in the arena's way
            raise
        finally:
            self._forget(component)  # what was measured was measured with more to copy
            self.homes.fit()

    def stream_again(self, unit: Unit) -> None:
        """Undo `make_resident`."""
        component = unit.component
        if component not in self.components or unit not in component.residents:
            return
        component.residents.remove(unit)
        component.streamed.append(unit)
        component.streamed.sort(key=lambda each: each.number)
        self._transfers.take_over(unit)
        unit.state = State.OFFLOADED
        self._forget(component)
        self.homes.fit()

    def make_resident(self, unit: Unit) -> None:
        """Keep a streamed unit on the device from now on."""
        component = unit.component
        if component not in self.components or unit not in component.streamed:
            return
        self._clear([unit])
        self._transfers.packed.refuse_edits([unit])
        self._transfers.reveal(unit)
        # It may have been loaded ahead, and its memory on the host goes.
        self.streams.wait_for(unit.ready, f"copies of {component.name}.{unit.name}, which has lost its hook")
        unit.weights = renewed(unit.weights)
        self._transfers.settle(unit)
        component.streamed.remove(unit)
        component.residents.append(unit)
        self._forget(component)  # what was measured was measured without it

    @contextmanager
    def edit(self, component: Component) -> Iterator[None]:
        """True weights on the host within; whatever was changed is taken over afterwards."""
        with self.lock:
            self._withdraw(component)
            self._transfers.packed.refuse_edits(component.streamed)
            for unit in component.streamed:
                self._transfers.reveal(unit)
            try:
                yield
            finally:  # whatever the editor managed to change before it failed is what counts
                if component in self.components:  # not given back meanwhile
                    self._take_edits(component)

    def _take_edits(self, component: Component) -> None:
        component.edited()
        for unit in [*component.stem, *component.streamed]:
            edited = component.on_disk and unit.weights.note_edits()
            host = unit.weights.host
            packs = component.packs and not isinstance(host, PackedMemory)
            revealed = packs or isinstance(host, RevealedMemory)
            if edited or revealed or not unit.weights.is_intact():
                self._transfers.take_over(unit)
        # Those that were replaced may be read still, and their memory goes.
        self.streams.load.wait_stream(self.streams.current())
        for unit in component.residents:
            unit.weights = renewed(unit.weights)
            self._transfers.settle(unit)
        self.homes.fit()
        if component.depth:
            self._stems.bring(component)

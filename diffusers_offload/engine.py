"""The engine: loads units before they are needed, binds them while they compute, lets them go.

Deciding is done elsewhere (`order`, `arena`, `planner`); this is the only place that touches streams.
What makes each step safe:

- a unit computes after its *ready* event (recorded on `load` behind its copy);
- a unit is overwritten after the *done* event of its last use (recorded on the stream that used it);
- device memory is allocated on `load` and dropped only once `load` waits for its last users, so that the
  allocator, which reuses memory in stream order, cannot hand it out too early.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from enum import Enum
from itertools import islice
from typing import Any

import torch

from . import arena
from .budget import DeviceBudget
from .order import Order
from .report import Counters
from .streams import Streams
from .tiers.pinned import PinnedTier
from .weights import Weights

_EMPTY_CACHE_FROM = 64 * 2**20  # bytes worth a cudaFree once a component has left


class State(Enum):
    """Where a unit is on its way. Only the engine changes it."""

    OFFLOADED = "offloaded"
    LOADING = "loading"  # its load is queued
    IN_USE = "in_use"  # its tensors are bound to the device
    READY = "ready"  # used and still in place: free to be used again, or overwritten
    RESIDENT = "resident"


_WAITING = (State.LOADING, State.READY)  # on the device, and not in use


class Unit:
    """What moves as a whole: its weights, its state and its two events."""

    def __init__(self, name: str, module: torch.nn.Module | None, weights: Weights) -> None:
        self.name = name
        self.module = module
        self.weights = weights
        self.state = State.OFFLOADED
        self.component: Component | None = None
        self.number = -1  # among the streamed units of the engine
        self.home = self.end = 0  # its bytes in the arena, from and up to
        self.slot: torch.Tensor | None = None  # the bytes of the arena at its home
        self.used = False  # since it was loaded
        self.stream: Any = None  # that the forward under way computes on
        self.keeps = False  # once loaded, stays until its component leaves
        self.borrows = False  # lies outside the arena, in a buffer of its own
        self.ready: Any = None
        self.done: Any = None

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes


class Component:
    """A module of the pipeline: its stem, which comes and goes as a whole, and its units."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name = name
        self.module = module
        self.stem: list[Unit] = []
        self.streamed: list[Unit] = []
        self.residents: list[Unit] = []
        self.present = False  # the stem is on the device
        self.needs: list[Component] = []  # components whose stems hold tensors of this one as well
        self.depth = 0  # forwards under way
        self.users: list[Any] = []  # streams that used the stem since it came
        self.first: int | None = None  # the unit that its forward began with last time
        self.trace: list[int] = []  # the units of the forward under way
        self.order: list[int] = []  # of its units, as the homes were assigned for it
        self.runs = 0  # forwards in this call
        self.surprise: list[int] | None = None  # the last order that the homes did not suit
        self.displaced: dict[Component, int] = {}  # how often who made the stem leave in this call

    @property
    def units(self) -> list[Unit]:
        return [*self.stem, *self.residents, *self.streamed]


class Engine:
    """Moves the units of some components through one arena on one device."""

    def __init__(self, streams: Streams, budget: DeviceBudget | None = None) -> None:
        self.streams = streams
        self.budget = budget
        self.device = streams.device
        self.tier = PinnedTier(streams)
        self.counters = Counters(streams=streams)
        self.components: list[Component] = []
        self.units: list[Unit] = []  # streamed ones, by number
        self.arena: torch.Tensor | None = None
        self.order = Order({})
        self._loaded: list[Unit] = []  # what lies in the arena, in the order it was loaded
        self._stack: list[Component] = []  # forwards under way, outermost first
        self._outside: Any = None  # what was current before the outermost forward
        self._alternating: set[frozenset[Component]] = set()

    # --- taking components in, and giving them back ---------------------------------------------------

    def adopt(self, component: Component) -> Iterator[Unit]:
        """Move a component's units to where they stay; yields each unit once it is there."""
        self.components.append(component)
        for unit in component.units:
            unit.component = component
            unit.ready, unit.done = self.streams.event(), self.streams.event()
        for unit in component.residents:
            self._settle(unit)
            yield unit
        moving = [*component.stem, *component.streamed]
        for unit, host in zip(moving, self.tier.prepare([unit.nbytes for unit in moving]), strict=True):
            unit.weights.move_to_host(host)
            yield unit

    def open_arena(self) -> None:
        """Allocate the arena for the streamed units of all components and give each unit its home."""
        self.units = [unit for component in self.components for unit in component.streamed]
        successors = {}
        for number, unit in enumerate(self.units):
            unit.number = number
        for component in self.components:
            numbers = [unit.number for unit in component.streamed]
            component.first = numbers[0] if numbers else None
            successors.update(zip(numbers, numbers[1:] + numbers[:1], strict=True))
        self.order = Order(successors)
        if not self.units:
            return
        capacity = max(arena.capacity_for([u.nbytes for u in c.streamed]) for c in self.components)
        self.arena = self._allocate(arena.BASE + capacity)
        for component in self.components:
            self._assign_homes(component, [unit.number for unit in component.streamed])

    def release_component(self, component: Component) -> None:
        """Give a component its weights back, on the devices they came from."""
        if component not in self.components:
            return
        self._withdraw(component)
        self.streams.synchronize()  # copies from memory that is about to go
        for unit in component.units:
            unit.weights.restore()
            unit.slot = None
            unit.state = State.RESIDENT  # where it was: whoever still predicts it finds nothing to load
        self.components.remove(component)
        if not any(other.streamed for other in self.components):
            self.arena = None
        self.streams.empty_cache()

    def make_resident(self, unit: Unit) -> None:
        """Keep a streamed unit on the device from now on."""
        component = unit.component
        if component not in self.components or unit not in component.streamed:
            return
        self._clear([unit])
        origin = unit.weights.origin
        unit.weights = Weights(unit.weights.tensors)
        self._settle(unit)
        unit.weights.origin = origin
        component.streamed.remove(unit)
        component.residents.append(unit)

    @contextmanager
    def edit(self, component: Component) -> Iterator[None]:
        """True weights on the host within; whatever was changed is taken over afterwards."""
        self._withdraw(component)
        try:
            yield
        finally:  # whatever the editor managed to change before it failed is what counts
            for unit in [*component.stem, *component.streamed]:
                if not unit.weights.is_intact():
                    self._take_over(unit)
            for unit in component.residents:
                unit.weights = self._renewed(unit.weights)
                self._settle(unit)
            self._refit_arena()
            if component.depth:
                self._bring(component)

    # --- the component's forward --------------------------------------------------------------------

    def enter(self, component: Component, shapes: tuple = ()) -> None:
        """A forward of `component` begins: order it behind the caller and bring its stem.

        Args:
            shapes: of what the forward is given; with a budget, its memory is expected to follow from them.
        """
        outermost = not self._stack
        if outermost:
            self._drop_stale([unit for unit in self.units if unit.state in _WAITING])
            caller = self.streams.current()
            self.streams.compute.wait_stream(caller)
            self._outside = (caller, self.streams.switch(self.streams.compute))
        self._stack.append(component)
        component.depth += 1
        try:
            self._bring(component)
            if self.budget is not None and outermost:
                others = [c for c in self.components if c is not component and self._kept_bytes(c)]
                own = self._standing_bytes(component) + self._kept_bytes(component)
                self.keep(component, set() if others else self.budget.begin(component, shapes, own))
            if component.depth == 1:
                component.trace = []
                if component.first is not None:
                    self.order.expect(component.first)
                    self.prefetch()
        except BaseException:
            self.leave(component)
            raise
        self.counters.forwards += component.depth == 1

    def leave(self, component: Component) -> None:
        """The forward of `component` is over, or failed: order the caller behind it."""
        if component not in self._stack:
            return
        while self._stack:
            left = self._stack.pop()
            left.depth -= 1
            if left is component:
                break
        if component.depth == 0 and component.trace:
            self._learn(component)
        if self.budget is not None and not self._stack:
            weights = self._weights_on_device() - self._kept_bytes(component)
            self.keep(component, self.budget.end(component, weights))
        if not self._stack:
            caller, before = self._outside
            caller.wait_stream(self.streams.compute)
            self.streams.restore(before)
            self._outside = None

    def touch(self, component: Component) -> None:
        """`component` is used without its forward (`vae.decode`): bring its stem to the caller's stream."""
        if not component.depth:
            self._bring(component)

    def keep(self, component: Component, kept: set[Unit]) -> None:
        """Of the units that stream, let these stay until the component leaves, and no others."""
        if kept == {unit for unit in component.streamed if unit.keeps}:
            return
        for unit in component.streamed:
            unit.keeps = unit in kept
            if unit.borrows and not unit.keeps:
                self._drop(unit)
        self._assign_homes(component, component.order)
        self.prefetch()

    def call_ended(self) -> None:
        """The pipeline's call is over: what came for it leaves."""
        self._send_away([c for c in self.components if c.present and not c.depth])
        # What was loaded ahead is dropped, too: before the next call, the user may edit weights in ways
        # that leave no trace (`weight.data.add_()`).
        for unit in self.units:
            if unit.state in _WAITING:
                self._drop(unit)
        for component in self.components:
            component.displaced.clear()
            component.runs = 0

    # --- the unit's forward ---------------------------------------------------------------------------

    def acquire(self, unit: Unit) -> None:
        """The forward of `unit` begins on the current stream: its weights are there, or come at once."""
        if unit.state is State.RESIDENT:
            return
        self.order.observe(unit.number)
        if unit.component.depth:
            unit.component.trace.append(unit.number)
        elif unit.state in _WAITING:
            self._drop_stale([unit])
        self.counters.uses += 1
        missed = unit.state is State.OFFLOADED
        stream = self.streams.current()
        if missed:
            self.counters.misses += 1
            self._load(unit, self._overwritten(unit), stream)
        if self.counters.timing:
            self.counters.arrive(unit, stream)
        stream.wait_event(unit.ready)
        unit.weights.bind()
        unit.state = State.IN_USE
        unit.stream = stream
        if missed:
            self.prefetch(stream)

    def release(self, unit: Unit) -> None:
        """The forward of `unit` is queued: its bytes are free behind it, and the next loads can go."""
        if unit.state is State.IN_USE:
            stream = unit.stream
            self._retire(unit, stream)
            self.prefetch(stream)

    def prefetch(self, current: Any = None) -> None:
        """Queue the loads of the units predicted next, as far as their bytes are free.

        `current` is the current stream, where the caller knows it: asking costs some microseconds.
        """
        ahead: set[int] = set()
        for number in islice(self.order.upcoming(), len(self.units)):
            if number in ahead:
                return
            unit = self.units[number]
            if unit.state is State.OFFLOADED:
                if unit.keeps and not unit.component.present:
                    return
                in_the_way = self._overwritten(unit)
                for other in in_the_way:
                    if other.state is State.IN_USE or other.number in ahead:
                        return
                self._load(unit, in_the_way, current)
            ahead.add(number)

    # --- loading and dropping units -------------------------------------------------------------------

    def _load(self, unit: Unit, in_the_way: list[Unit], current: Any = None) -> None:
        if not unit.weights.is_intact():
            self._take_over(unit)
        fits = unit.slot is not None and unit.slot.numel() == unit.nbytes
        unit.borrows = not fits or any(o.state is State.IN_USE for o in in_the_way)
        if not unit.borrows:
            for other in in_the_way:
                self._drop(other)
        slot = self._allocate(arena.BASE + unit.nbytes)[arena.BASE :] if unit.borrows else unit.slot
        unit.weights.place(slot)
        before = self.streams.switch(self.streams.load, current)
        try:
            self.counters.depart(unit, self.streams.load)
            self.tier.load(unit.weights.host, slot)
            unit.ready.record(self.streams.load)
            self.counters.loaded(unit, self.streams.load)
        finally:
            self.streams.restore(before)
        unit.state = State.LOADING
        unit.used = False
        if not unit.borrows:
            self._loaded.append(unit)

    def _overwritten(self, unit: Unit) -> list[Unit]:
        if unit.slot is None:
            return []
        start, end = unit.home, unit.end
        return [o for o in self._loaded if start < o.end and o.home < end and o is not unit]

    def _drop_stale(self, units: list[Unit]) -> None:
        """Drop those that were edited after their load was queued: the next load brings what counts."""
        for unit in units:
            if unit.weights.note_edits():
                self._drop(unit)

    def _drop(self, unit: Unit) -> None:
        """The bytes of `unit` are free for whatever `load` does next."""
        if unit.used:
            self.streams.load.wait_event(unit.done)
        unit.state = State.OFFLOADED
        if unit.borrows:
            unit.weights.place(None)
            unit.borrows = False
        else:
            self._loaded.remove(unit)

    def _retire(self, unit: Unit, stream: Any) -> None:
        """The unit's use is over: what it reads is the host's again, its bytes may be overwritten."""
        unit.done.record(stream)
        changed = unit.weights.unbind()
        unit.used = True
        unit.state = State.READY
        if changed:
            self._write_back(unit, changed)
        if unit.borrows and not (unit.keeps and unit.component.present):
            self._drop(unit)

    def _clear(self, units: list[Unit]) -> None:
        """Take units out of the arena, and their views with them."""
        for unit in units:
            if unit.state is State.IN_USE:
                self._retire(unit, unit.stream)
            if unit in self._loaded or unit.borrows:
                self._drop(unit)
            unit.weights.place(None)
            unit.slot = None

    def _write_back(self, unit: Unit, changed: list[int]) -> None:
        """Copy tensors that the unit wrote to (a buffer, say) to the host, where readers look for them.

        This waits for the device: the host copy is readable at any time, so it must be right at once.
        """
        evict = self.streams.evict
        evict.wait_stream(self.streams.current())
        before = self.streams.switch(evict)
        try:
            unit.weights.write_back(changed)
            self.counters.write_backs += len(changed)
            written = self.streams.event()
            written.record(evict)
        finally:
            self.streams.restore(before)
        written.synchronize()

    # --- stems ----------------------------------------------------------------------------------------

    def _bring(self, component: Component) -> None:
        """The stem of `component`, and those that it shares tensors with, are there for this stream."""
        coming = [component, *component.needs]
        if not all(c.present for c in coming):
            leaving = [c for c in self.components if c.present and not c.depth and c not in coming]
            self._send_away([c for c in leaving if not self._alternate(c, component)], component)
        stream = self.streams.current()
        for each in coming:
            if not each.present:
                each.present = True  # from here on, whatever happens, sending it away undoes what was done
                for unit in each.stem:
                    self._load_stem(unit)
            if stream not in each.users:
                for unit in each.stem:
                    stream.wait_event(unit.ready)
                each.users.append(stream)

    def _load_stem(self, unit: Unit) -> None:
        if not unit.weights.is_intact():
            self._take_over(unit)
        before = self.streams.switch(self.streams.load)
        try:
            buffer = self._allocate(arena.BASE + unit.nbytes)[arena.BASE :]
            self.counters.depart(unit, self.streams.load)
            self.tier.load(unit.weights.host, buffer)
            unit.ready.record(self.streams.load)
            self.counters.loaded(unit, self.streams.load)
        finally:
            self.streams.restore(before)
        unit.weights.place(buffer)
        unit.weights.bind()
        unit.state = State.IN_USE

    def _alternate(self, present: Component, coming: Component) -> bool:
        """Whether the two take turns within a step, so that sending one away would only bring it back."""
        pair = frozenset((present, coming))
        if present.displaced.get(coming, 0) >= 2 and coming.displaced.get(present, 0) >= 2:
            together = self._standing_bytes(coming) + sum(unit.nbytes for unit in present.stem)
            if self.budget is None or together <= self.budget.limit:
                self._alternating.add(pair)
        return pair in self._alternating

    def _send_away(self, components: list[Component], coming: Component | None = None) -> None:
        freed = 0
        for component in components:
            for stream in component.users:
                self.streams.load.wait_stream(stream)
            for unit in component.stem:
                if unit.state is not State.IN_USE:
                    continue
                changed = unit.weights.unbind()
                if changed:
                    self._write_back(unit, changed)
                unit.weights.place(None)
                unit.state = State.OFFLOADED
                freed += unit.nbytes
            for unit in component.streamed:
                if unit.keeps and unit.borrows:
                    self._drop(unit)
                    freed += unit.nbytes
            component.users.clear()
            component.present = False
            if coming is not None:
                component.displaced[coming] = component.displaced.get(coming, 0) + 1
        if freed >= _EMPTY_CACHE_FROM:
            self.streams.empty_cache()

    def _withdraw(self, component: Component) -> None:
        """Everything of `component` that moves is on the host afterwards."""
        if component.present:
            self._send_away([component])
        self._clear(component.streamed)

    # --- homes ----------------------------------------------------------------------------------------

    def _learn(self, component: Component) -> None:
        """Assign homes anew when the units ran in an order that the homes do not suit."""
        component.first = component.trace[0]
        order = list(dict.fromkeys(component.trace))
        if _is_subsequence(order, component.order):
            return
        # The first surprise counts at once; after that, an order that keeps changing is not worth following.
        seen_before, component.surprise = component.surprise in (None, order), order
        if not seen_before:
            return
        rest = [number for number in component.order if number not in set(order)]
        self._assign_homes(component, order + rest)
        self.prefetch()

    def _assign_homes(self, component: Component, order: list[int]) -> None:
        component.order = order
        self._clear([self.units[number] for number in order])
        units = [self.units[number] for number in order if not self.units[number].keeps]
        homes = arena.assign_homes([unit.nbytes for unit in units], self.arena.numel() - arena.BASE)
        for unit, home in zip(units, homes, strict=True):
            unit.home, unit.end = home, home + unit.nbytes
            unit.slot = self.arena[arena.BASE + home : arena.BASE + home + unit.nbytes]

    def _refit_arena(self) -> None:
        """After units changed their size: a new arena where the old one is too small, and new homes."""
        if not self.units:
            return
        needed = max(arena.capacity_for([u.nbytes for u in c.streamed]) for c in self.components)
        if needed != self.arena.numel() - arena.BASE:
            self._clear(self.units)
            self.arena = None
            self.arena = self._allocate(arena.BASE + needed)
        for component in self.components:
            self._assign_homes(component, component.order)

    # --- memory ---------------------------------------------------------------------------------------

    def _allocate(self, nbytes: int) -> torch.Tensor:
        before = self.streams.switch(self.streams.load)
        try:
            with torch.inference_mode(False):
                return torch.empty(nbytes, dtype=torch.uint8, device=self.device)
        finally:
            self.streams.restore(before)

    def _standing_bytes(self, component: Component) -> int:
        """Weights on the device while `component` runs, but for what it keeps by way of the budget."""
        residents = sum(unit.nbytes for each in self.components for unit in each.residents)
        arena_bytes = self.arena.numel() if self.arena is not None else 0
        return residents + arena_bytes + sum(unit.nbytes for unit in component.stem)

    def _kept_bytes(self, component: Component) -> int:
        return sum(unit.nbytes for unit in component.streamed if unit.keeps and unit.borrows)

    def _weights_on_device(self) -> int:
        own = [unit for c in self.components for unit in c.residents]
        own += [unit for c in self.components if c.present for unit in c.stem]
        own += [unit for unit in self.units if unit.borrows]
        return sum(unit.nbytes for unit in own) + (self.arena.numel() if self.arena is not None else 0)

    def _settle(self, unit: Unit) -> None:
        """Move a unit to the device, to stay."""
        if any(tensor.device != self.device for tensor in unit.weights.tensors):
            self.streams.load.wait_stream(self.streams.current())
            before = self.streams.switch(self.streams.load)
            try:
                unit.weights.move_to_device(self._allocate(arena.BASE + unit.nbytes)[arena.BASE :])
                unit.ready.record(self.streams.load)
            finally:
                self.streams.restore(before)
            unit.ready.synchronize()
        unit.state = State.RESIDENT

    def _take_over(self, unit: Unit) -> None:
        """Somebody gave the tensors other bytes (`tensor.data = ...`, `.to(dtype)`): these count now."""
        self.streams.synchronize()  # copies from the memory that they had
        unit.weights = self._renewed(unit.weights)
        unit.weights.move_to_host(self.tier.allocate(unit.weights.nbytes))

    def _renewed(self, weights: Weights) -> Weights:
        renewed = Weights(weights.tensors)
        renewed.origin = weights.origin
        return renewed


def _is_subsequence(part: list[int], whole: list[int]) -> bool:
    """Whether `part` runs in the order of the cycle `whole`, with units left out."""
    rest = iter(whole)
    return all(number in rest for number in part)

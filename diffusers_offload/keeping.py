"""Which streamed units stay on the device while their component runs: done here, decided by the budget."""

from __future__ import annotations

from collections.abc import Collection
from typing import TYPE_CHECKING, Any

from .component import Component, Unit
from .homes import Homes
from .loads import Loads
from .planning.budget import Choice, DeviceBudget, Reading
from .planning.spread import Spreads
from .recovery import is_out_of_memory
from .roster import Roster
from .streams import Streams

if TYPE_CHECKING:
    from .tiers.disk import DiskTier
    from .tiers.packed import PackedTier


class Keeping:
    """Lets units stay as a budget has chosen, and lets go of them when memory is short.

    Args:
        budget: decides; None where nobody has set a bound.
        disk: where weights are kept on disk, if any may be; `packed` unpacks them.
        loads: frees a unit's bytes, and queues what can be loaded next.
    """

    def __init__(
        self,
        budget: DeviceBudget | None,
        streams: Streams,
        roster: Roster,
        homes: Homes,
        disk: DiskTier | None,
        packed: PackedTier,
        loads: Loads,
    ) -> None:
        self.budget = budget
        self.spreads = Spreads(streams)
        self._streams = streams
        self._roster = roster
        self._homes = homes
        self._disk = disk
        self._packed = packed
        self._read = (0, 0.0)  # bytes and seconds when the forward under way began
        self._loads = loads

    def begin(self, component: Component, shapes: tuple) -> Any:
        """An outermost forward of `component` begins; returns the stopwatch that is to time it, if one is.

        Args:
            shapes: of what the forward is given.
        """
        if self.budget is None:
            return self.spreads.begin(component)
        self._contend(component)
        if self._disk is not None:
            self._read = self._disk.read_so_far
        if not component.streamed:
            self.follow(component, Choice())
            return self.budget.stopwatch
        self.follow(component, self.budget.choose(component, shapes, self._own_bytes(component)))
        self.budget.begin(component, self._own_bytes(component))
        return self.budget.stopwatch

    def end(self, component: Component, completed: bool) -> None:
        """That forward is over."""
        if self.budget is None:
            self.spreads.end(component, completed, self._homes.arena.capacity)
            return
        if not component.streamed:
            return
        if not completed:
            self.budget.abandon()
            return
        reading = self._reading(component)
        choice = self.budget.end(component, self.weights_on_device(), self._homes.extra, reading)
        try:
            self.follow(component, choice)
        except RuntimeError as error:  # the memory was promised by measurements alone
            if not is_out_of_memory(error):
                raise
            self.budget.tighten()
            self.follow(component, Choice())

    def follow(self, component: Component, choice: Choice) -> None:
        """Use the memory that `component` leaves as was chosen."""
        if choice.slack != self._homes.slack:
            self._homes.slack = choice.slack
            self._mark(component, choice.kept)
            self._homes.fit()
            self._streams.empty_cache()
        self.keep(component, choice.kept)

    def keep(self, component: Component, kept: Collection[Unit]) -> None:
        """Of the units that stream, let these stay until the component leaves, and no others."""
        if set(kept) == {unit for unit in component.streamed if unit.keeps}:
            return
        self._mark(component, kept)
        if component.homed:
            self._homes.assign(component, component.order)
        self._loads.prefetch()

    def keep_nothing(self) -> bool:
        """No streamed unit stays any longer; returns whether that changed anything."""
        keeping = [c for c in self._roster.components if any(unit.keeps for unit in c.streamed)]
        for component in keeping:
            self.keep(component, ())
        if keeping and self.budget is not None:
            self.budget.tighten()
        return bool(keeping)

    def weights_on_device(self) -> int:
        """Bytes of all weights that are on the device now, the whole arena included."""
        components = self._roster.components
        stems = sum(c.stem_bytes for c in components if c.present)
        own_buffers = sum(unit.nbytes for unit in self._homes.units if unit.borrows)
        residents = sum(c.resident_bytes for c in components)
        return stems + own_buffers + residents + self._homes.arena.capacity + self._packed.staging_bytes

    def standing_bytes(self, component: Component) -> int:
        """Weights on the device while `component` runs, but for what it keeps by way of the budget."""
        residents = sum(c.resident_bytes for c in self._roster.components)
        staging = self._packed.staging_bytes
        return residents + self._homes.arena.capacity + staging + component.stem_bytes

    def _own_bytes(self, component: Component) -> int:
        return self.standing_bytes(component) + component.kept_bytes

    def _reading(self, component: Component) -> Reading:
        """What the disk is read for, at the rate that it had in this forward."""
        if self._disk is None or not component.on_disk:
            return Reading()
        total, before = self._disk.read_so_far, self._read
        read, seconds = (now - then for now, then in zip(total, before, strict=True))
        if not seconds:
            read, seconds = total
        if not read:
            return Reading()
        per_byte = seconds / read
        passing = self._disk.reads(component.streamed)
        units = zip(component.streamed, passing, strict=True)
        times = (unit.weights.host.bytes.numel() * per_byte * reads for unit, reads in units)
        return Reading(tuple(times), self._disk.slots)

    def forget(self, component: Component) -> None:
        """The component is here no longer."""
        self.spreads.forget(component)
        if self.budget is not None:
            self.budget.forget(component)

    def _mark(self, component: Component, kept: Collection[Unit]) -> None:
        for unit in component.streamed:
            unit.keeps = unit in kept
            if unit.borrows and not unit.keeps:
                self._loads.drop(unit)

    def _contend(self, component: Component) -> None:
        """Components that alternate within a step and both keep units would only drop each other's."""
        for other in self._roster.components:
            if other is not component and other.kept_bytes:
                self.keep(other, ())
                other.contended = component.contended = True

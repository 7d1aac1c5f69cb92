"""Loads: which units come to the device before they are needed, where they are put, and what makes room for them."""

from __future__ import annotations

from itertools import islice
from typing import Any

from .component import State, Unit
from .homes import Homes
from .recovery import is_out_of_memory
from .streams import Streams
from .tiers.packedmemory import PackedMemory
from .transfers import Transfers

_READ_AHEAD = 16  # units, as far as there is room for them on the host


class Loads:
    """Loads units to their homes or to buffers of their own, and drops them.

    Args:
        streams: the device's streams.
        transfers: queues the copies.
        homes: where units lie, and the order in which they are used.
    """

    def __init__(self, streams: Streams, transfers: Transfers, homes: Homes) -> None:
        self._streams = streams
        self._transfers = transfers
        self._homes = homes
        self._afloat: list[Unit] = []  # floating units that were loaded and not used yet

    def bound(self, unit: Unit) -> None:
        """A loaded unit's use begins."""
        if unit.floats and unit.state is State.LOADING:
            self._afloat.remove(unit)

    def prefetch(self, current: Any = None) -> None:
        """Queue the loads of the units predicted next, as far as their bytes are free.

        `current` is the current stream, where the caller knows it: asking costs some microseconds.
        """
        if self._homes.lost:  # nothing would bound what is loaded
            return
        disk = self._transfers.disk
        if disk is not None:
            numbers = islice(self._homes.order.upcoming(), min(_READ_AHEAD, len(self._homes.units)))
            coming = (self._homes.units[number] for number in numbers)
            disk.expect(unit.weights.host if unit.state is State.OFFLOADED else None for unit in coming)
        ahead: set[int] = set()
        last = None
        for number in islice(self._homes.order.upcoming(), len(self._homes.units)):
            if number == last:  # layers that were joined are used one after the other
                continue
            if number in ahead:
                return
            last, unit = number, self._homes.units[number]
            if unit.state is State.OFFLOADED:
                if unit.keeps and not unit.component.present:
                    return
                if unit.floats and not unit.keeps and not self._may_float(unit, ahead):
                    return
                in_the_way = self._homes.arena.overwritten_by(unit)
                for other in in_the_way:
                    if other.state is State.IN_USE or other.number in ahead:
                        return
                if disk is not None and not disk.is_ready(unit.weights.host):
                    return
                if not self._ahead(unit, in_the_way, current):
                    return
            elif unit.floats and unit.state is State.IN_USE and ahead:
                return  # it leaves before it is used again
            ahead.add(number)

    def _ahead(self, unit: Unit, in_the_way: list[Unit], current: Any) -> bool:
        """Load a unit for later; if there is no memory for it now, its own forward will try again."""
        try:
            self.load(unit, in_the_way, current)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return False
        return True

    def _may_float(self, unit: Unit, ahead: set[int]) -> bool:
        """Whether another floating unit may be loaded; those that wait although they come later make room."""
        if self._homes.slots == 1:
            return False
        for _ in range(2):
            waiting = [each for each in self._afloat if not each.keeps]
            if not waiting or sum(each.nbytes for each in waiting) + unit.nbytes <= self._homes.may_wait:
                return True
            for each in waiting:
                if each.number not in ahead:
                    self.drop(each)
        return False

    def load(self, unit: Unit, in_the_way: list[Unit], current: Any = None) -> None:
        fits = not unit.floats and unit.slot is not None and unit.slot.numel() == unit.nbytes
        if not fits or any(other.state is State.IN_USE for other in in_the_way):
            self._transfers.load(unit, self._transfers.allocate(unit.nbytes), current)
            unit.borrows = True
            if unit.floats:
                self._afloat.append(unit)
            return
        for other in in_the_way:
            self.drop(other)
        self._transfers.load(unit, unit.slot, current)
        self._homes.arena.lying.append(unit)

    def drop(self, unit: Unit) -> None:
        """The bytes of `unit` are free for whatever `load` does next."""
        if unit.used:
            self._streams.load.wait_event(unit.done)
        elif isinstance(unit.weights.host, PackedMemory):  # it may still be unpacked, on another stream
            self._streams.load.wait_event(unit.ready)
        if unit.floats and unit.state is State.LOADING:
            self._afloat.remove(unit)
        unit.state = State.OFFLOADED
        if unit.borrows:
            unit.weights.place(None)
            unit.borrows = False
        else:
            self._homes.arena.lying.remove(unit)

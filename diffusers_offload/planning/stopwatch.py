"""Times one forward of a component by device events: what its units compute, and how fast copies run."""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

from .timeline import Work

if TYPE_CHECKING:
    from ..component import Unit
    from ..streams import Streams

_RATED_FROM = 4 * 2**20  # bytes of a copy that tells the bus's rate


class Stopwatch:
    """Events around the units of one forward; read once the device has done it.

    Args:
        streams: the device's streams.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._begin = self._event(streams.current())
        self._end: Any = None
        self._uses: list[tuple[Unit, Any, Any, Any]] = []  # (unit, arrives, starts, ends)
        self._open: dict[Unit, tuple[Any, Any]] = {}
        self._copies: list[tuple[int, Any, Any]] = []  # (bytes, begins, ends)

    def arrives(self, unit: Unit, stream: Any) -> None:
        """`stream` is about to wait for `unit`."""
        self._open[unit] = self._event(stream), None

    def starts(self, unit: Unit, stream: Any) -> None:
        """It has waited."""
        self._open[unit] = self._open[unit][0], self._event(stream)

    def ends(self, unit: Unit, stream: Any) -> None:
        """The forward of `unit` is queued on `stream`."""
        if unit in self._open:
            self._uses.append((unit, *self._open.pop(unit), self._event(stream)))

    def departs(self, stream: Any) -> Any:
        """A copy is about to be queued; returns what `copied` wants."""
        return self._event(stream)

    def copied(self, nbytes: int, began: Any, stream: Any) -> None:
        """The copy is queued."""
        self._copies.append((nbytes, began, self._event(stream)))

    def stop(self) -> None:
        """The forward is queued."""
        self._end = self._event(self._streams.current())

    def used(self, units: list[Unit]) -> bool:
        """Whether one of `units` ran."""
        return any(use[0] in units for use in self._uses)

    def read(self, units: list[Unit]) -> tuple[Work, float | None] | None:
        """(what `units` computed, bytes a second of the copies), None if none of them ran; waits for the device.

        Args:
            units: the component's, in the order of their numbers in the `Work`.
        """
        index = {unit: number for number, unit in enumerate(units)}
        uses = [use for use in self._uses if use[0] in index]  # not those of another component's blocks
        if self._end is None or not uses:
            return None
        self._streams.synchronize("the forward that was timed")
        compute = tuple(starts.elapsed_time(ends) / 1e3 for _, _, starts, ends in uses)
        gaps = [max(0.0, before[3].elapsed_time(after[1]) / 1e3) for before, after in pairwise(uses)]
        around = self._begin.elapsed_time(uses[0][1]) + uses[-1][3].elapsed_time(self._end)
        work = Work(
            sizes=tuple(unit.nbytes for unit in units),
            compute=compute,
            gaps=(*gaps, around / 1e3),
            order=tuple(index[unit] for unit, *_ in uses),
        )
        timed = [(n, began.elapsed_time(ended) / 1e3) for n, began, ended in self._copies if n >= _RATED_FROM]
        seconds = sum(each for _, each in timed)
        return work, sum(n for n, _ in timed) / seconds if seconds > 0 else None

    def _event(self, stream: Any) -> Any:
        event = self._streams.event(timing=True)
        event.record(stream)
        return event

"""Which unit comes next: learned from what ran, never assumed.

The prediction is what followed the last time the units ran like this. Where nothing has been seen yet,
the declared order serves as a guess, the last unit of a component being followed by its first. A wrong
prediction costs time, never correctness.
"""

from __future__ import annotations

from collections.abc import Iterator

_KEEP = 8192  # uses remembered; the older half is forgotten beyond
_SUFFIX = 8  # how many uses back two situations are compared
_CANDIDATES = 16  # how many earlier situations are compared


class Order:
    """Predicts the order in which units, known by number, are used.

    Args:
        successors: for each unit, the one declared after it (the first after the last).
    """

    def __init__(self, successors: dict[int, int]) -> None:
        self._successors = successors
        self._history: list[int] = []
        self._cursor: int | None = None  # where in the history the predicted next use stands
        self._guess: int | None = None  # the predicted next use where the history says nothing

    def observe(self, unit: int) -> None:
        """Unit `unit` is used now."""
        followed = self._cursor is not None and self._history[self._cursor] == unit
        self._history.append(unit)
        if followed:
            self._cursor += 1
        else:
            self._cursor = self._recall()
        self._guess = self._successors.get(unit)
        if len(self._history) > _KEEP:
            self._forget()

    def expect(self, unit: int) -> None:
        """A component begins whose first unit was `unit`: if that is no surprise, nothing changes."""
        if next(self.upcoming(), None) == unit:
            return
        self._guess = unit
        self._cursor = next(
            (at for at in range(len(self._history) - 1, -1, -1) if self._history[at] == unit), None
        )

    def upcoming(self) -> Iterator[int]:
        """The units predicted to be used next, without end, nearest first."""
        if self._cursor is not None:
            start, end = self._cursor, len(self._history)
            while True:
                yield from self._history[start:end]
        unit = self._guess
        while unit is not None:
            yield unit
            unit = self._successors.get(unit)

    def _recall(self) -> int | None:
        """Just behind the earlier situation most like this one; the latest of those equally alike."""
        history, last = self._history, len(self._history) - 1
        best, best_length, seen = None, 0, 0
        for at in range(last - 1, -1, -1):
            if history[at] != history[last]:
                continue
            length = 1
            while length < _SUFFIX and length <= at and history[at - length] == history[last - length]:
                length += 1
            if length > best_length:
                best, best_length = at + 1, length
            seen += 1
            if best_length == _SUFFIX or seen == _CANDIDATES:
                break
        return best

    def _forget(self) -> None:
        dropped = len(self._history) // 2
        del self._history[:dropped]
        if self._cursor is not None:
            self._cursor = self._cursor - dropped if self._cursor >= dropped else None

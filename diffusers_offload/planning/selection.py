"""Which units stay on the device, so that a cycle is as short as can be found. Pure functions.

An even spread lets what streams keep step with the bytes, not with the computing: where blocks differ in
how long they compute per byte, the load engine waits for free bytes here and is late there. So some choices
are played through (`timeline`), the even spread first, and the shortest cycle counts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import accumulate, combinations
from math import log2

from .planner import choose_kept, keep_pace
from .timeline import Copying, Work, place, simulate

_WORTH = 0.005  # of a step: what a choice must gain over the even spread, the least sensitive to wrong times
_BETTER = 0.0005  # of a step: what one must gain over another
_FEW = 10  # units, of which every choice is tried
_TRIALS = 1024  # choices played through at most ...
_USES = 20_000  # ... and uses in them, which bounds the time for long cycles


def choose_stay(work: Work, room: int, capacity: int, copying: Copying) -> frozenset[int]:
    """Which units of a cycle to keep on the device; the same ones each time.

    Args:
        room: bytes that may be kept; the units chosen never exceed it.
        capacity: bytes of the arena that the others take turns in; ignored where they have no homes there.
    """
    if sum(work.sizes) <= room:
        return frozenset(range(len(work.sizes)))
    trials = _Trials(work, room, capacity, copying)
    order = work.streamed()
    trials.play(order[at] for at in choose_kept([work.sizes[unit] for unit in order], room))
    even, even_step = trials.best, trials.step
    read = copying.read_in(work, ())
    for stay in _all(work, room) if len(order) <= _FEW else _spreads(work, room, read):
        if trials.over:
            break
        trials.play(stay)
    if len(order) > _FEW:
        _exchange(trials)
    return trials.best if trials.step < even_step * (1 - _WORTH) else even


class _Trials:
    """Choices played through, and the best of them."""

    def __init__(self, work: Work, room: int, capacity: int, copying: Copying) -> None:
        self.work = work
        self.room = room
        self.best: frozenset[int] = frozenset()
        self.step = float("inf")
        self._capacity = capacity
        self._copying = copying
        self._left = min(_TRIALS, max(1, _USES // max(1, len(work.order))))
        self._floor = max(work.seconds, self._least_copying(), self._least_reading())
        self._seen: set[frozenset[int]] = set()
        self._homes: dict[
            tuple[int, ...], list[int]
        ] = {}  # by the sizes that stream: many choices share them

    def _least_copying(self) -> float:
        # What the arena holds may be there still in the next cycle, the rest cannot.
        return (sum(self.work.sizes) - self.room - self._capacity) / self._copying.rate

    def _least_reading(self) -> float:
        reads = {unit: self._copying.reads[unit] for unit in self._copying.read_in(self.work, ())}
        if not reads:
            return 0.0
        spared = self.room * max(seconds / max(1, self.work.sizes[unit]) for unit, seconds in reads.items())
        return sum(reads.values()) - spared - self._copying.slots * max(reads.values())

    @property
    def over(self) -> bool:
        """Time is up, or there is next to nothing left to gain."""
        return self._left <= 0 or self.step <= self._floor * (1 + _BETTER)

    def play(self, units: Iterable[int]) -> bool:
        """Play a choice through, if it is a new one; whether it is the best so far."""
        stay = frozenset(units)
        if stay in self._seen:
            return False
        self._seen.add(stay)
        self._left -= 1
        homes = self._place(stay) if self._copying.lookahead is None else ()
        step = simulate(self.work, stay, homes, self._copying).step
        if step >= self.step * (1 - _BETTER):
            return False
        self.best, self.step = stay, step
        return True

    def _place(self, stay: Collection[int]) -> list[int]:
        sizes = tuple(self.work.sizes[unit] for unit in self.work.streamed(stay))
        if sizes not in self._homes:
            self._homes[sizes] = place(self.work, stay, self._capacity)
        return self._homes[sizes]


def _all(work: Work, room: int) -> Iterator[tuple[int, ...]]:
    """Every choice that fits, those of fewest units first."""
    order = work.streamed()
    for count in range(len(order)):
        for units in combinations(order, count):
            if sum(work.sizes[unit] for unit in units) <= room:
                yield units


def _spreads(work: Work, room: int, read: Collection[int]) -> Iterator[set[int]]:
    """Choices worth a trial, the likeliest first.

    Args:
        read: units that are read from disk unless they stay.
    """
    order, sizes, seconds = work.streamed(), work.sizes, _seconds(work)
    slowest = [unit for unit in order if unit in read]
    for phase in (0.0, 0.5) if slowest else ():
        spread = _spread(work, slowest, min(room, sum(sizes[unit] for unit in slowest)), sizes, phase)
        yield fill(work.sizes, room, spread, [*slowest, *order])
    for phase in (0.0, 0.5, 0.25, 0.75):
        for units in (order, order[::-1]):
            for pace in (sizes, seconds):
                yield fill(work.sizes, room, _spread(work, units, room, pace, phase), order)
    for units in (sorted(order, key=lambda unit: seconds[unit] / max(1, sizes[unit])), order, order[::-1]):
        yield fill(work.sizes, room, (), units)
    # Of one class of equal units more, of the others less than their share.
    for kind in _classes(work)[:4]:
        rest = [unit for unit in order if unit not in set(kind)]
        most = min(room, sum(sizes[unit] for unit in kind))
        for eighths in range(9) if rest else ():
            chosen = _spread(work, kind, most * eighths // 8, sizes)
            chosen |= _spread(work, rest, room - sum(sizes[unit] for unit in chosen), sizes)
            yield fill(work.sizes, room, chosen, order)


def _exchange(trials: _Trials) -> None:
    """Improve the best choice by one exchange after the other, until none helps or time is up."""
    order = trials.work.streamed()
    improved = True
    while improved:
        improved = False
        for at in range(len(order)):
            if trials.over:
                return
            near = [order[i] for i in sorted(range(len(order)), key=lambda i: abs(i - at))]
            for choice in _exchanges(trials.work, trials.room, trials.best, near):
                if trials.over:
                    return
                improved |= trials.play(choice)


def _exchanges(work: Work, room: int, stay: frozenset[int], near: Sequence[int]) -> Iterator[set[int]]:
    """`stay` with the first of `near` changed: it comes in place of its nearest, or it goes."""
    unit, *others = near
    if unit not in stay:
        yield fill(work.sizes, room, (), [unit, *(other for other in reversed(others) if other in stay)])
        return
    rest = stay - {unit}
    yield set(rest)
    for other in others[:4]:
        if other not in stay:
            yield fill(work.sizes, room, rest, [other, *others])


def _spread(
    work: Work, units: Sequence[int], room: int, pace: Sequence[float], phase: float = 0.0
) -> set[int]:
    """Of `units` in this order, those to keep so that the bytes of the others keep step with `pace`.

    Args:
        pace: of each unit of `work`, its share of the way: its seconds, or its bytes.
        phase: how much earlier a unit is kept, 0.0 to 1.0 of its bytes.
    """
    sizes = [work.sizes[unit] for unit in units]
    way = [pace[unit] for unit in units]
    slope = max(0, sum(sizes) - room) / (sum(way) or 1)
    targets = [
        min(room, passed - slope * gone + phase * size)
        for passed, gone, size in zip(accumulate(sizes), accumulate(way), sizes, strict=True)
    ]
    return {units[at] for at in keep_pace(sizes, targets)}


def fill(sizes: Sequence[int], room: int, stay: Iterable[int], more: Iterable[int]) -> set[int]:
    """`stay`, and of `more` what fits in beside them, the first first."""
    kept = set(stay)
    left = room - sum(sizes[unit] for unit in kept)
    for unit in more:
        if unit not in kept and sizes[unit] <= left:
            kept.add(unit)
            left -= sizes[unit]
    return kept


def _seconds(work: Work) -> list[float]:
    """Of each unit, what its uses compute in a cycle, and the gaps behind them."""
    seconds = [0.0] * len(work.sizes)
    for unit, compute, gap in zip(work.order, work.compute, work.gaps, strict=True):
        seconds[unit] += compute + gap
    return seconds


def _classes(work: Work) -> list[list[int]]:
    """The units by size, those within some percent together; the class of most bytes first."""
    classes: dict[int, list[int]] = {}
    for unit in work.streamed():
        classes.setdefault(round(16 * log2(max(1, work.sizes[unit]))), []).append(unit)
    return sorted(classes.values(), key=lambda units: -sum(work.sizes[unit] for unit in units))

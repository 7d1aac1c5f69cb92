"""Which units stay under an `offload_ratio`: evenly spread by bytes at first, by their times once those are known.

Blocks of one model differ in how long they compute per byte: FLUX's double blocks take a bus twice as long as its
single ones for the same computing. An even spread then waits in one half of the model and leaves the bus idle in the
other. So some forwards are timed, and if another choice of as many bytes is predicted to be clearly faster, it is taken
before the next call, once.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..arena import LOOKAHEAD, capacity_for
from .selection import choose_stay, fill
from .stopwatch import Stopwatch
from .timeline import Copying, Work, forecast

if TYPE_CHECKING:
    from torch import nn

    from ..component import Component, Unit
    from ..streams import Streams

_FORWARDS = 4  # timed at most; any part of one may be held up by whatever else the host does
_WORTH = 0.02  # of a step: what another choice must gain to be worth moving weights for
_LEEWAY = 0.01  # of the bytes: so much more may stream, where blocks do not add up to the share
_REPAIRS = 128  # choices tried at most where the best one has not the bytes that are asked for


@dataclass(frozen=True)
class Timed:
    """One forward of a component some of whose units stayed.

    Attributes:
        streamed: the units that were timed.
        work: what these computed; what the others did is in the gaps.
        rate: of the copies, bytes a second.
        capacity: bytes of the arena.
    """

    streamed: tuple[Unit, ...]
    work: Work
    rate: float
    capacity: int


class Spreads:
    """Times forwards of components some of whose units stay."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._count: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # of forwards that were timed
        self._watched: dict[Component, list[Watched]] = {}
        self._watch: Stopwatch | None = None

    def begin(self, component: Component) -> Stopwatch | None:
        """An outermost forward of `component` begins; returns the stopwatch that is to time it, if one is."""
        self._watch = None
        parted = component.shares and component.residents and component.streamed
        warm = component.runs > 0 and component.known  # the first forward of a call waits for more
        wanted = self._count.get(component.module, 0) < _FORWARDS and not component.on_disk
        if parted and warm and wanted and self._streams.asynchronous:
            self._watch = Stopwatch(self._streams)
        return self._watch

    def end(self, component: Component, completed: bool, capacity: int) -> None:
        """That forward is over.

        Args:
            capacity: bytes of the arena.
        """
        component.runs += completed
        watch, self._watch = self._watch, None
        if watch is None or not completed:
            return
        watch.stop()
        if not watch.used(component.streamed):  # another forward will tell
            return
        self._count[component.module] = self._count.get(component.module, 0) + 1
        # It is read later: to wait for the device now would let it wait for the host in the next forward.
        self._watched.setdefault(component, []).append(Watched(watch, tuple(component.streamed), capacity))

    def take(self, component: Component) -> list[Watched]:
        """The forwards of `component` that were timed, once: no others will be."""
        watched = self._watched.pop(component, [])
        if watched:
            self._count[component.module] = _FORWARDS
        return watched

    def forget(self, component: Component) -> None:
        """What was timed holds no longer; if nobody has taken it, other forwards will be."""
        if self._watched.pop(component, None) is not None:
            self._count.pop(component.module, None)


@dataclass(frozen=True)
class Watched:
    """A forward that was timed, what streamed in it, and the bytes of the arena."""

    watch: Stopwatch
    streamed: tuple[Unit, ...]
    capacity: int

    def read(self) -> Timed | None:
        """None if nothing was copied in it that tells the bus's rate; waits for the device."""
        work, rate = self.watch.read(list(self.streamed)) or (None, None)
        return Timed(self.streamed, work, rate, self.capacity) if rate is not None else None


def read(watched: Iterable[Watched]) -> Timed | None:
    """What forwards took that were timed, undisturbed; None if none of them tells. Waits for the device."""
    return undisturbed([timed for each in watched if (timed := each.read()) is not None])


def undisturbed(several: Sequence[Timed]) -> Timed | None:
    """One forward from several: of each part the shortest, for each may be held up by itself. None if there is none.

    The last one says which others are alike.
    """
    if not several:
        return None
    last = several[-1]
    alike = [each for each in several if _kind(each) == _kind(last)]
    compute, gaps = (
        tuple(map(min, zip(*(getattr(each.work, part) for each in alike), strict=True)))
        for part in ("compute", "gaps")
    )
    work = replace(last.work, compute=compute, gaps=gaps)
    return replace(last, work=work, rate=max(each.rate for each in alike))


def _kind(timed: Timed) -> tuple:
    return timed.streamed, timed.capacity, timed.work.sizes, timed.work.order


def better_residents(timed: Timed, units: Sequence[Unit], ratio: float) -> frozenset[int] | None:
    """Which of `units` had better stay, by index; None if the ones that do are as good, or nobody can tell.

    They take no more bytes than those that stay now, nor do the others need a larger arena. A hundredth of the bytes
    may stream besides the share.

    Args:
        units: those that stay and those that stream, in declared order.
        ratio: share of their bytes that may stream.
    """
    index = {unit: number for number, unit in enumerate(units)}
    if any(unit not in index for unit in timed.streamed):
        return None
    streaming = {index[unit] for unit in timed.streamed}
    floats, largest = timed.streamed[0].floats, max(unit.nbytes for unit in timed.streamed)
    # One that is larger than all that stream would need a larger arena: it stays, and its time is in the gaps.
    free = [number for number, unit in enumerate(units) if floats or unit.nbytes <= largest]
    sizes = tuple(units[number].nbytes for number in free)
    now = frozenset(at for at, number in enumerate(free) if number not in streaming)
    work = with_residents(timed.work, [free.index(index[unit]) for unit in timed.streamed], sizes)
    if work is None or not now:
        return None
    copying = Copying(timed.rate, lookahead=LOOKAHEAD if floats else None)

    def step(stay: Collection[int]) -> float:
        return forecast(work, stay, timed.capacity, copying).step

    def fits(stay: Collection[int]) -> bool:
        left = [size for at, size in enumerate(sizes) if at not in stay]
        return bool(left) and (floats or capacity_for(left) <= timed.capacity)

    room = _sum(sizes, now)
    may_stream = (ratio + _LEEWAY) * sum(unit.nbytes for unit in units)
    least = min(room, sum(sizes) - may_stream)  # weights may have come since
    found = choose_stay(work, room, timed.capacity, copying)
    choices = filter(fits, islice(_between(found, sizes, least, room), _REPAIRS))
    best = min(choices, key=step, default=now)
    if step(best) >= step(now) * (1 - _WORTH):
        return None
    larger = set(range(len(units))) - set(free)
    return frozenset(larger | {free[at] for at in best})


def _between(stay: frozenset[int], sizes: Sequence[int], least: float, room: int) -> Iterator[frozenset[int]]:
    """`stay`, or what is like it and has `least` to `room` bytes: with one unit less, and others in its place."""
    if least <= _sum(sizes, stay) <= room:
        yield stay
        return
    others = [at for at in range(len(sizes)) if at not in stay]
    for gone in (None, *sorted(stay)):
        rest = stay - {gone}
        near = sorted(others, key=lambda at, gone=gone: abs(at - (gone or 0)))
        for order in (near, sorted(near, key=lambda at: sizes[at])):
            chosen = frozenset(fill(sizes, room, rest, order))
            if _sum(sizes, chosen) >= least:
                yield chosen


def _sum(sizes: Sequence[int], units: Collection[int]) -> int:
    return sum(sizes[at] for at in units)


def with_residents(work: Work, numbers: Sequence[int], sizes: Sequence[int]) -> Work | None:
    """A cycle of all units, from one of which only those that streamed were timed.

    A unit that stayed is taken to compute as long as those of its size that streamed, out of the gap that it lies in.

    Args:
        numbers: of each unit of `work`, its number among all.
        sizes: bytes of all units, in the order of their use.

    Returns:
        None if they were not used once each, in that order.
    """
    order, compute, gaps = _merged(work)
    used = [numbers[unit] for unit in order]
    if used != sorted(set(numbers)):
        return None
    times: dict[int, list[float]] = {}
    for number, seconds in zip(used, compute, strict=True):
        times.setdefault(sizes[number], []).append(seconds)
    usual = {size: sum(each) / len(each) for size, each in times.items()}
    timed, count = dict(zip(used, compute, strict=True)), len(sizes)
    full = [timed.get(number, usual.get(sizes[number], 0.0)) for number in range(count)]
    left = [0.0] * count
    for at, number in enumerate(used):  # between this unit and the next that streamed, round the cycle
        between = (used[(at + 1) % len(used)] - number - 1) % count
        inside = [(number + 1 + i) % count for i in range(between)]
        guessed = sum(full[each] for each in inside)
        if guessed > gaps[at]:
            for each in inside:
                full[each] *= gaps[at] / guessed
        left[inside[-1] if inside else number] = max(0.0, gaps[at] - guessed)
    return Work(tuple(sizes), tuple(full), tuple(left))


def _merged(work: Work) -> tuple[list[int], list[float], list[float]]:
    """The uses of a cycle, those of one unit that follow each other as one: (units, their seconds, the gaps behind)."""
    order: list[int] = []
    compute: list[float] = []
    gaps: list[float] = []
    for unit, seconds, gap in zip(work.order, work.compute, work.gaps, strict=True):
        if order and order[-1] == unit:
            compute[-1] += gaps[-1] + seconds
            gaps[-1] = gap
        else:
            order.append(unit)
            compute.append(seconds)
            gaps.append(gap)
    return order, compute, gaps

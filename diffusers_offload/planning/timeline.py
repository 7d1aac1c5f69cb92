"""A cycle of computing, copying and reading, played through beforehand: how long it takes. Pure functions.

A cycle is one denoising step: the units compute one after the other, one load engine copies those that do not
stay on the device, in the order of their use, and one disk is read, in that order, for those that the host does
not hold. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from ..arena import assign_homes, overlap

LATENCY = 10e-6  # seconds that each copy takes besides its bytes
_CYCLES = 64  # played at most; nearly all settle within five
_SAME = 1e-6  # of a cycle: two cycles that differ by less are the same


@dataclass(frozen=True)
class Work:
    """One cycle of a component's units.

    Attributes:
        sizes: bytes of each unit.
        compute: seconds on the device of each use, from its start to its end.
        gaps: seconds on the device between each use's end and the next one's start when nothing waits; the
            last is up to the first use of the next cycle (the parent's own code, the sampler).
        order: the unit of each use; each unit once, in the order of `sizes`, if not given.
    """

    sizes: tuple[int, ...]
    compute: tuple[float, ...]
    gaps: tuple[float, ...]
    order: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        if self.order is None:
            object.__setattr__(self, "order", tuple(range(len(self.sizes))))
        if not len(self.order) == len(self.compute) == len(self.gaps):
            raise ValueError(
                f"{len(self.order)} uses, {len(self.compute)} compute times and {len(self.gaps)} gaps: "
                "each use needs one of each"
            )

    @property
    def seconds(self) -> float:
        """A cycle in which nothing waits."""
        return sum(self.compute) + sum(self.gaps)

    def streamed(self, stay: Collection[int] = ()) -> list[int]:
        """The units used that do not stay, in the order of their first use."""
        return [unit for unit in dict.fromkeys(self.order) if unit not in stay]


@dataclass(frozen=True)
class Copying:
    """How what does not stay gets to the device.

    Attributes:
        rate: bytes a second that the load engine copies.
        latency: seconds that each copy takes besides.
        lookahead: bytes that may be loaded or loading for later uses. For units that have no home but get
            a buffer for each use; one that is larger is loaded when no other waits.
        reads: seconds that the disk takes for each unit, 0 for those that the host holds; empty if it holds all.
        slots: host buffers that what is read passes through, one after the other.
    """

    rate: float
    latency: float = LATENCY
    lookahead: int | None = None
    reads: tuple[float, ...] = ()
    slots: int = 1

    def read_in(self, work: Work, stay: Collection[int]) -> set[int]:
        """The units that the disk is read for in each cycle: none if the slots hold them all."""
        units = {unit for unit in work.streamed(stay) if self.reads and self.reads[unit]}
        return units if len(units) > self.slots else set()


@dataclass(frozen=True)
class Forecast:
    """A cycle in steady state, in seconds.

    Attributes:
        step: from one cycle's start to the next one's.
        transfer: of it, the load engine is copying.
        reading: of it, the disk is read.
        stall: of it, computing waits for a copy.
        stalls: the same for each use.
    """

    step: float
    transfer: float
    reading: float
    stall: float
    stalls: tuple[float, ...]


def simulate(work: Work, stay: Collection[int], homes: Sequence[int], copying: Copying) -> Forecast:
    """How long a cycle takes once it repeats.

    Args:
        stay: units that are on the device always.
        homes: offset in the arena of each of `work.streamed(stay)`, as `arena.assign_homes` gives them;
            ignored where units have none (`copying.lookahead`).
    """
    if copying.lookahead is None:
        waits = _waits_in_arena(work, dict(zip(work.streamed(stay), homes, strict=True)))
    else:
        waits = _waits_for_buffers(work, stay, copying.lookahead)
    return _play(work, waits, copying.read_in(work, stay), copying)


def forecast(work: Work, stay: Collection[int], capacity: int, copying: Copying) -> Forecast:
    """The same in an arena of `capacity` bytes, which is ignored where units have no homes."""
    homes = place(work, stay, capacity) if copying.lookahead is None else ()
    return simulate(work, stay, homes, copying)


def place(work: Work, stay: Collection[int], capacity: int) -> list[int]:
    """Homes for `work.streamed(stay)` in an arena of `capacity` bytes."""
    return assign_homes([work.sizes[unit] for unit in work.streamed(stay)], capacity)


def _waits_in_arena(work: Work, homes: dict[int, int]) -> dict[int, tuple[int, int]]:
    """For each use that needs a copy, the uses whose (end, start) that copy waits for.

    That is the last use before whose bytes it overwrites. If the unit's own use is met first, its bytes
    are there still.
    """
    uses = [use for use, unit in enumerate(work.order) if unit in homes]
    waits = {}
    for at, use in enumerate(uses):
        unit = work.order[use]
        home, size = homes[unit], work.sizes[unit]
        for back in range(1, len(uses) + 1):
            before = uses[at - back]  # of the cycle before, where that is negative
            other = work.order[before]
            if other == unit:
                break
            if overlap(home, size, homes[other], work.sizes[other]):
                waits[use] = before, before
                break
    return waits


def _waits_for_buffers(work: Work, stay: Collection[int], lookahead: int) -> dict[int, tuple[int, int]]:
    """The same for units that get a buffer for each use.

    A copy waits for the end of its own unit's use before, and for the start of the use that makes room
    among the bytes waiting.
    """
    uses = [use for use, unit in enumerate(work.order) if unit not in stay]
    sizes = [work.sizes[work.order[use]] for use in uses]
    last_use = {work.order[use]: use for use in uses}  # of the cycle before, to begin with
    waits = {}
    for at, use in enumerate(uses):
        waiting, back = sizes[at], 1
        while back < len(uses) and waiting + sizes[at - back] <= lookahead:
            waiting += sizes[at - back]
            back += 1
        waits[use] = last_use[work.order[use]], uses[at - back]
        last_use[work.order[use]] = use
    return waits


def _play(work: Work, waits: dict[int, tuple[int, int]], read: Collection[int], copying: Copying) -> Forecast:
    """Play cycles until one is like one before.

    Args:
        waits: for each use that is copied for, the uses whose end and start that copy waits for.
        read: the units that are read from disk before they are copied.
    """
    count = len(work.order)
    if not waits:
        return Forecast(work.seconds, 0.0, 0.0, 0.0, (0.0,) * count)
    reading = [use for use in sorted(waits) if work.order[use] in read]
    # A slot is free for the next read when the use that had it before was copied.
    slots = min(copying.slots, len(reading))
    slot_of = {use: reading[at - slots] for at, use in enumerate(reading)}
    rows = []
    for use, unit in enumerate(work.order):
        copy = copying.latency + work.sizes[unit] / copying.rate if use in waits else None
        fetch = copying.reads[unit] if use in slot_of else None
        waiting = waits.get(use, (0, 0))
        rows.append((use, copy, fetch, slot_of.get(use, 0), *waiting, work.gaps[use - 1], work.compute[use]))
    transfer = sum(copy for _, copy, *_ in rows if copy is not None)
    disk = sum(fetch for _, _, fetch, *_ in rows if fetch is not None)
    # Overwritten in place: at an index not reached yet, the cycle before is still there to wait for.
    starts, ends, copied = [0.0] * count, [0.0] * count, [0.0] * count
    now = loaded = arrived = 0.0
    cycles: list[_Cycle] = []
    while True:
        stalls = [0.0] * count
        for use, copy, fetch, slot, end, start, gap, compute in rows:
            begin = now + gap
            if copy is not None:
                loaded = max(loaded, ends[end], starts[start])
                if fetch is not None:
                    arrived = max(arrived, copied[slot]) + fetch
                    loaded = max(loaded, arrived)
                loaded += copy
                copied[use] = loaded
                if loaded > begin:
                    stalls[use] = loaded - begin
                    begin = loaded
            starts[use] = begin
            ends[use] = now = begin + compute
        cycles.append(_Cycle(now, loaded - now, arrived - now if reading else 0.0, stalls))
        period = _period(cycles)
        if period or len(cycles) == _CYCLES:
            break
    # One that drifts on (the copies take a little longer than the computing) has its limits known anyway.
    period = period or _CYCLES // 2
    step = max((now - cycles[-1 - period].end) / period, work.seconds, transfer, disk)
    mean = tuple(sum(each) / period for each in zip(*(c.stalls for c in cycles[-period:]), strict=True))
    return Forecast(step, transfer, disk, step - work.seconds, mean)


@dataclass(frozen=True)
class _Cycle:
    """All that the next cycle depends on: how far copies and reads are ahead of the computing, and the waits."""

    end: float
    copies_ahead: float
    reads_ahead: float
    stalls: list[float]


def _period(cycles: list[_Cycle]) -> int:
    """How many cycles ago it was like in the last one, or 0."""
    last = cycles[-1]
    close = _SAME * last.end / len(cycles)
    for period, then in enumerate(reversed(cycles[:-1]), 1):
        if (
            abs(last.copies_ahead - then.copies_ahead) < close
            and abs(last.reads_ahead - then.reads_ahead) < close
            and all(abs(a - b) < close for a, b in zip(last.stalls, then.stalls, strict=True))
        ):
            return period
    return 0

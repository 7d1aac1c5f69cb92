"""A cycle of computing and copying, played through beforehand: how long it takes. Pure functions.

A cycle is one denoising step: the units compute one after the other, and one load engine copies those that
do not stay on the device, in the order of their use. Sizes are in bytes, times in seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from .arena import assign_homes, overlap

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
class Forecast:
    """A cycle in steady state, in seconds.

    Attributes:
        step: from one cycle's start to the next one's.
        transfer: of it, the load engine is copying.
        stall: of it, computing waits for a copy.
        stalls: the same for each use.
    """

    step: float
    transfer: float
    stall: float
    stalls: tuple[float, ...]


def simulate(
    work: Work,
    stay: Collection[int],
    homes: Sequence[int],
    rate: float,
    latency: float = LATENCY,
    lookahead: int | None = None,
) -> Forecast:
    """How long a cycle takes once it repeats.

    Args:
        stay: units that are on the device always.
        homes: offset in the arena of each of `work.streamed(stay)`, as `arena.assign_homes` gives them;
            ignored with `lookahead`.
        rate: bytes a second that the load engine copies.
        latency: seconds that each copy takes besides.
        lookahead: bytes that may be loaded or loading for later uses. For units that have no home but get
            a buffer for each use; one that is larger is loaded when no other waits.
    """
    if lookahead is None:
        waits = _waits_in_arena(work, dict(zip(work.streamed(stay), homes, strict=True)))
    else:
        waits = _waits_for_buffers(work, stay, lookahead)
    return _play(work, waits, rate, latency)


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


def _play(work: Work, waits: dict[int, tuple[int, int]], rate: float, latency: float) -> Forecast:
    """Play cycles until one is like one before."""
    count = len(work.order)
    if not waits:
        return Forecast(work.seconds, 0.0, 0.0, (0.0,) * count)
    rows = []
    for use, unit in enumerate(work.order):
        copy = latency + work.sizes[unit] / rate if use in waits else None
        rows.append((use, copy, *waits.get(use, (0, 0)), work.gaps[use - 1], work.compute[use]))
    transfer = sum(copy for _, copy, *_ in rows if copy is not None)
    # Overwritten in place: at an index not reached yet, the cycle before is still there to wait for.
    starts, ends = [0.0] * count, [0.0] * count
    now = loaded = 0.0
    cycles: list[tuple[float, float, list[float]]] = []  # all that the next cycle depends on
    while True:
        stalls = [0.0] * count
        for use, copy, end, start, gap, compute in rows:
            begin = now + gap
            if copy is not None:
                loaded = max(loaded, ends[end], starts[start]) + copy
                if loaded > begin:
                    stalls[use] = loaded - begin
                    begin = loaded
            starts[use] = begin
            ends[use] = now = begin + compute
        cycles.append((now, loaded - now, stalls))
        period = _period(cycles)
        if period or len(cycles) == _CYCLES:
            break
    # One that drifts on (the copies take a little longer than the computing) has its limits known anyway.
    period = period or _CYCLES // 2
    step = max((now - cycles[-1 - period][0]) / period, work.seconds, transfer)
    mean = tuple(sum(each) / period for each in zip(*(s for _, _, s in cycles[-period:]), strict=True))
    return Forecast(step, transfer, step - work.seconds, mean)


def _period(cycles: list[tuple[float, float, list[float]]]) -> int:
    """How many cycles ago it was like in the last one, or 0."""
    now, lead, stalls = cycles[-1]
    close = _SAME * now / len(cycles)
    for period, (_, lead_then, stalls_then) in enumerate(reversed(cycles[:-1]), 1):
        if abs(lead - lead_then) < close and all(
            abs(a - b) < close for a, b in zip(stalls, stalls_then, strict=True)
        ):
            return period
    return 0

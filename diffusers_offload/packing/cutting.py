"""Which bytes of a slab are coded and which are not, and where they are cut into pieces. No tensors here."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from ..slab import ALIGNMENT, Layout, align
from .formats import FORMATS, format_of
from .piece import BLOCK, LARGEST, SOURCE_ALIGNMENT, Piece

LEAST_SAVING = 32  # coding a tensor must save one in so many of its bytes: unpacking is not free


@dataclass(frozen=True)
class Run:
    """Bytes `start` to `stop` of a slab: elements of one format, or (None) bytes to be kept as they are."""

    start: int
    stop: int
    format: str | None

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def find_runs(layout: Layout, smallest: int) -> list[Run]:
    """One run for each region of `layout`, in the order of the slab.

    A region gets a format if it has at least `smallest` bytes and all tensors in it agree on one.

    Raises:
        ValueError: the regions do not lie side by side in the slab.
    """
    regions = sorted(layout.regions, key=lambda region: region.offset)
    starts = [region.offset for region in regions]
    found: list[set[str | None]] = [set() for _ in regions]
    for place in layout.placements:
        if 0 in place.shape:
            continue
        made = format_of(place.dtype)
        rank = bisect_right(starts, place.offset) - 1
        if rank >= 0:
            fits = made is not None and (place.offset - starts[rank]) % made.itemsize == 0
            found[rank].add(made.name if made is not None and fits else None)
    runs, end = [], 0
    for region, names in zip(regions, found, strict=True):
        stop = region.offset + region.nbytes
        if not end <= region.offset <= stop <= layout.nbytes:
            raise ValueError(f"a region at byte {region.offset} overlaps another or leaves the slab")
        name = names.pop() if len(names) == 1 and region.nbytes >= smallest else None
        if name is not None and (
            region.offset % FORMATS[name].itemsize or region.nbytes % FORMATS[name].itemsize
        ):
            name = None
        runs.append(Run(region.offset, stop, name))
        end = stop
    return [run for run in runs if run.nbytes]


def join(runs: Sequence[Run]) -> list[Run]:
    """`runs` with neighbours that are kept as they are made one, with the gap between them."""
    joined: list[Run] = []
    for run in runs:
        last = joined[-1] if joined else None
        if last and last.format is None and run.format is None and run.start - last.stop < ALIGNMENT:
            joined[-1] = replace(last, stop=run.stop)
        else:
            joined.append(run)
    return joined


def check_slot(slot_nbytes: int) -> None:
    """Raises ValueError unless pieces can have up to `slot_nbytes` packed bytes."""
    if not 64 * 1024 <= slot_nbytes <= LARGEST:
        raise ValueError(f"a slot of {slot_nbytes} bytes: it has to be 64 KiB to 128 MiB")


def cut_plain(run: Run, slot_nbytes: int) -> list[Piece]:
    """The pieces of a run that is kept as it is; their sources count from the run's first packed byte."""
    step = slot_nbytes - slot_nbytes % SOURCE_ALIGNMENT
    return [
        Piece(start, min(start + step, run.stop), start - run.start)
        for start in range(run.start, run.stop, step)
    ]


def cut_coded(
    run: Run, table: tuple[int, ...], rare: Sequence[int], exceptions: Sequence[int], slot_nbytes: int
) -> list[Piece]:
    """The pieces of a coded run: as few as slots allow, and of equal size, for a small one costs as much to start.

    Args:
        table: of its exponents.
        rare, exceptions: how many there are in each block.

    Returns:
        Pieces whose sources count from the run's first packed byte; none if coding saves too little.
    """
    made = FORMATS[run.format]
    elements = run.nbytes // made.itemsize
    sums = [0, *accumulate(rare)], [0, *accumulate(exceptions)]

    def piece(first: int, last: int, source: int) -> Piece:
        start = run.start + first * BLOCK * made.itemsize
        stop = run.start + min(last * BLOCK, elements) * made.itemsize
        counts = [before[last] - before[first] for before in sums]
        return Piece(start, stop, source, made.name, *counts, table)

    pieces: list[Piece] = []
    first, source = 0, 0
    while first < len(rare):
        ends = range(first + 1, len(rare) + 1)
        fitting = bisect_right(ends, slot_nbytes, key=lambda last, first=first: piece(first, last, 0).nbytes)
        slots = -(-piece(first, len(rare), 0).nbytes // slot_nbytes)
        last = first + max(min(fitting, -(-len(ends) // slots)), 1)
        pieces.append(piece(first, last, source))
        first, source = last, align(source + pieces[-1].nbytes, SOURCE_ALIGNMENT)
    return pieces if source <= run.nbytes - run.nbytes // LEAST_SAVING else []

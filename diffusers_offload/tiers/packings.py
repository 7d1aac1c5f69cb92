"""How a slab in a file is packed, as the file's header tells it. What does not fit is a ValueError."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..packing import Piece, from_json, packed_nbytes, to_json
from ..slab import ALIGNMENT, Region
from .strictjson import keys, sizes


@dataclass(frozen=True)
class Packing:
    """How a slab is packed.

    Attributes:
        pieces: what of the slab lies where among the packed bytes.
        digest: of the slab as it was, with zeros where no tensor lies.
    """

    pieces: tuple[Piece, ...]
    digest: str


def to_note(packing: Packing, nbytes: int) -> dict[str, Any]:
    """What the header says of a packed slab of `nbytes`; `from_note` is the way back."""
    return {"nbytes": nbytes, "digest": packing.digest, "packing": to_json(packing.pieces)}


def slab_nbytes(note: dict[str, Any], name: str) -> int:
    """Bytes of the slab of the part called `name`, as its note claims: nothing is allocated for a claim."""
    keys(note, "nbytes", "digest", "packing")
    return sizes([note["nbytes"]], name)[0]


def from_note(note: dict[str, Any], name: str, packed: int, regions: Sequence[Region]) -> Packing:
    """The packing that a note tells of, for `packed` bytes in the file.

    Args:
        regions: in which the slab's tensors lie; all of them must be filled.

    Raises:
        ValueError: it tells of something that does not lie there, or leaves out what has to.
    """
    nbytes = slab_nbytes(note, name)
    pieces = from_json(note["packing"], packed, nbytes)
    if not pieces or packed != packed_nbytes(pieces):
        raise ValueError(f"the pieces of part {name!r} are {packed_nbytes(pieces)} bytes long, not {packed}")
    ends = [(piece.start, piece.stop) for piece in pieces]
    between = zip([0, *(stop for _, stop in ends)], [*(start for start, _ in ends), nbytes], strict=True)
    # This bounds the slab, too: a few bytes in a file cannot ask for a slab that no memory holds.
    if any(start - stop >= ALIGNMENT for stop, start in between) or not _fills(ends, regions):
        raise ValueError(f"the pieces of part {name!r} leave something of it out")
    return Packing(pieces, note["digest"])


def _fills(ends: Sequence[tuple[int, int]], regions: Sequence[Region]) -> bool:
    """Whether each region lies in pieces that follow one another without a gap; both in the slab's order."""
    joined: list[tuple[int, int]] = []
    for start, stop in ends:
        if joined and joined[-1][1] == start:
            joined[-1] = (joined[-1][0], stop)
        else:
            joined.append((start, stop))
    rest = iter(joined)
    start, stop = next(rest, (0, 0))
    for region in regions:
        while stop <= region.offset and (following := next(rest, None)) is not None:
            start, stop = following
        if not start <= region.offset <= region.offset + region.nbytes <= stop:
            return False
    return True

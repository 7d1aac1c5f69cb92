"""A piece of a packed unit: which bytes of the slab it holds, and where its streams lie among the packed bytes.

Everything here is arithmetic over plain integers, in bytes where nothing else is said. Pieces that were read from
a file are hostile input: `from_json` refuses what points outside, with a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from ..slab import align
from ..tiers.strictjson import keys, mapping, sequence, sizes
from .formats import ENTRIES, FORMATS, Format

VERSION = 2
BLOCK = 4096  # elements that are decoded side by side; where their rare codes and exceptions begin is stored
SOURCE_ALIGNMENT = 256  # of a piece among the packed bytes
STREAM_ALIGNMENT = 128  # of a stream within its piece: one line of a GPU's cache
RARE_BITS = 3
PLACE_BITS = 12  # of an exception within its block
LOWER_BITS = 4  # of its exponent, that make the place 16 bits
UPPER_BITS = 4  # the others, which lie apart
LARGEST = 128 * 2**20  # packed bytes of a piece: positions in bits fit 32 bits


@dataclass(frozen=True)
class Streams:
    """Where the streams of a coded piece begin, counted from the piece's first packed byte, and what they hold.

    Attributes:
        starts: for each block, how many rare codes were stored before it; then, for each block, how many
            exceptions (int32, little endian).
        exceptions: 16 bits for each element whose exponent has no code: its place in its block in the lowest 12,
            the lowest 4 bits of its exponent above them.
        uppers: for each of these the other 4 bits of its exponent.
        rare: 3 bits for each element whose code is 3, filled up to whole groups of 8 in 3 bytes.
        codes: 2 bits for each element.
        rest: one stream for each of `Format.fields`.
        nbytes: of the whole piece.
    """

    starts: int
    exceptions: int
    uppers: int
    rare: int
    codes: int
    rest: tuple[int, ...]
    nbytes: int


def lay_out_streams(made: Format, elements: int, rare: int, exceptions: int) -> Streams:
    """Lay the streams of a piece out.

    Those in which a position depends on what is stored come first: a block that reads as much of them as any block
    may need then stays within the piece, and the kernel need not compare each position.
    """
    offset, offsets = 0, []
    blocks = -(-elements // BLOCK)
    fixed = (bits(elements, width) for width in (2, *made.fields))
    listed = (2 * exceptions, bits(exceptions, UPPER_BITS))
    for nbytes in (8 * blocks, *listed, bits(align(rare, 8), RARE_BITS), *fixed):
        offsets.append(offset)
        end = offset + nbytes
        offset = align(end, STREAM_ALIGNMENT)
    return Streams(*offsets[:5], tuple(offsets[5:]), align(end, 16))


def bits(count: int, width: int) -> int:
    """Bytes for `count` numbers of `width` bits each."""
    return -(-count * width // 8)


@dataclass(frozen=True)
class Piece:
    """Bytes `start` to `stop` of a slab, from bytes `source` to `source + nbytes` of the packed ones.

    Attributes:
        format: name of the elements' format; None if the bytes are stored as they are.
        rare, exceptions: how many elements have a rare code, and of how many the exponent has none.
        table: the exponents that have a code, the `COMMON` first, then the `RARE`.
    """

    start: int
    stop: int
    source: int
    format: str | None = None
    rare: int = 0
    exceptions: int = 0
    table: tuple[int, ...] = field(default=())

    @property
    def elements(self) -> int:
        """Elements of a coded piece; bytes of one that is not."""
        return (self.stop - self.start) // (FORMATS[self.format].itemsize if self.format else 1)

    @cached_property
    def streams(self) -> Streams:
        """Where the streams lie; only for a coded piece."""
        return lay_out_streams(FORMATS[self.format], self.elements, self.rare, self.exceptions)

    @property
    def nbytes(self) -> int:
        """Packed bytes."""
        return self.streams.nbytes if self.format else self.stop - self.start


def packed_nbytes(pieces: Sequence[Piece]) -> int:
    """Length of the packed bytes that `pieces` lie in."""
    return align(pieces[-1].source + pieces[-1].nbytes, SOURCE_ALIGNMENT) if pieces else 0


def batches(pieces: Sequence[Piece], slot_nbytes: int) -> list[tuple[int, int]]:
    """Which pieces to copy at once: ranges of them, each with packed bytes that fit a slot one behind the other.

    A device takes long to begin a copy, and a unit has many small tensors between the large ones.
    """
    found: list[tuple[int, int]] = []
    for rank, piece in enumerate(pieces):
        first = found[-1][0] if found else rank
        if found and piece.source + piece.nbytes - pieces[first].source <= slot_nbytes:
            found[-1] = (first, rank + 1)
        else:
            found.append((rank, rank + 1))
    return found


# --- metadata ---------------------------------------------------------------------------------------------


def to_json(pieces: Iterable[Piece]) -> dict[str, Any]:
    """`pieces` as what JSON knows; `from_json` is the way back."""
    return {"version": VERSION, "pieces": [_entry(piece) for piece in pieces]}


def _entry(piece: Piece) -> dict[str, Any]:
    entry: dict[str, Any] = {"slab": [piece.start, piece.stop], "source": piece.source}
    if piece.format is not None:
        entry |= {
            "format": piece.format,
            "rare": piece.rare,
            "exceptions": piece.exceptions,
            "table": list(piece.table),
        }
    return entry


def from_json(raw: object, packed: int, slab: int) -> tuple[Piece, ...]:
    """The pieces that `raw` (parsed JSON) describes.

    Args:
        packed, slab: how many bytes there are of either; no piece reaches outside.

    Raises:
        ValueError: it is no description, or one of something that does not lie there.
    """
    told = mapping(raw, "the description of packed bytes")
    keys(told, "version", "pieces")
    if type(told["version"]) is not int or told["version"] != VERSION:
        raise ValueError(
            f"its packing is version {told['version']!r}, this program reads {VERSION}; convert the weights anew"
        )
    pieces = tuple(_piece(mapping(entry, "a piece")) for entry in sequence(told["pieces"], "pieces"))
    check(pieces, packed, slab)
    return pieces


def _piece(entry: dict[str, Any]) -> Piece:
    coded = "format" in entry
    keys(entry, "slab", "source", *(("format", "rare", "exceptions", "table") if coded else ()))
    ends, (source,) = sizes(entry["slab"], "slab"), sizes([entry["source"]], "source")
    if len(ends) != 2:
        raise ValueError("a piece of a slab has a start and a stop")
    if not coded:
        return Piece(*ends, source)
    counts = sizes([entry["rare"], entry["exceptions"]], "rare and exceptions")
    table = sizes(entry["table"], "table")
    if not isinstance(entry["format"], str) or entry["format"] not in FORMATS:
        raise ValueError(f"a piece's format is {entry['format']!r}, which is not known here")
    return Piece(*ends, source, entry["format"], *counts, table)


def check(pieces: Sequence[Piece], packed: int, slab: int) -> None:
    """Refuse pieces that reach outside `packed` or `slab` bytes, overlap, or contradict themselves.

    Raises:
        ValueError: they do.
    """
    written = read = 0
    for piece in pieces:
        if not written <= piece.start < piece.stop <= slab:
            raise ValueError(f"a piece is to fill bytes {piece.start} to {piece.stop} of {slab}")
        if piece.source % SOURCE_ALIGNMENT or piece.source < read:
            raise ValueError(f"a piece starts at packed byte {piece.source}")
        if piece.format is not None:
            _check_coded(piece)
        if piece.nbytes > min(LARGEST, packed - piece.source):
            raise ValueError(f"a piece has {piece.nbytes} packed bytes from {piece.source}, of {packed}")
        written, read = piece.stop, piece.source + piece.nbytes


def _check_coded(piece: Piece) -> None:
    made = FORMATS[piece.format]
    if (piece.stop - piece.start) % made.itemsize or piece.start % made.itemsize:
        raise ValueError(f"a piece from byte {piece.start} to {piece.stop} is cut within an element")
    if min(piece.rare, piece.exceptions) < 0 or piece.rare + piece.exceptions > piece.elements:
        raise ValueError(
            f"{piece.rare} rare codes and {piece.exceptions} exceptions are too many for {piece.elements} elements"
        )
    if len(piece.table) != ENTRIES or not all(0 <= e < made.exponents for e in piece.table):
        raise ValueError(f"a table of exponents is {piece.table}")

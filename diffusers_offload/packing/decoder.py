"""Unpacks a coded piece on the CPU with torch operations: shifts, look-ups, a running sum.

Elements are taken four at a time. A byte of codes says which of the four escape, and what the others' exponents are;
with the next four rare codes, 12 bits, it says all. So four elements are one look-up in a table of 65,536 rows. The
exceptions are put right at the end. What the bytes say is not trusted: no position is taken from them without a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, lru_cache

import torch

from .formats import COMMON, ENTRIES, FORMATS, RARE, Format
from .piece import BLOCK, LOWER_BITS, PLACE_BITS, RARE_BITS, UPPER_BITS, Piece

_CHUNK = 64 * BLOCK  # elements at once on the CPU: scratch stays in its cache
_TABLES = 16  # tensors whose tables are kept, 0.5 to 1 MiB each
_SIGN = {1: 0x80, 2: -0x8000, 4: -0x80000000}  # the highest bit, by itemsize


def decode(piece: Piece, staged: torch.Tensor, out: torch.Tensor) -> None:
    """Write the elements of a coded piece.

    Args:
        staged: uint8, the piece's packed bytes.
        out: uint8, as long as what the piece holds.
    """
    made = FORMATS[piece.format]
    tables = _tables(piece.table, made, staged.device)
    out = out.view(made.integer)
    starts = _starts(piece, staged, _CHUNK // BLOCK)
    for rank, first in enumerate(range(0, len(out), _CHUNK)):
        rare = slice(starts[rank], max(starts[rank], starts[rank + 1]))
        _decode_chunk(piece, staged, out[first : first + _CHUNK], first, tables, rare)
    put_exceptions(piece, staged, out)


def _starts(piece: Piece, staged: torch.Tensor, every: int) -> list[int]:
    """For each chunk of `every` blocks, and the end, how many rare codes lie before it."""
    blocks = -(-piece.elements // BLOCK)
    if blocks <= every:
        return [0, piece.rare]
    at = piece.streams.starts
    stored = staged[at : at + 4 * blocks].view(torch.int32)[::every].tolist()
    return [*(min(max(start, 0), piece.rare) for start in stored), piece.rare]


def put_exceptions(piece: Piece, staged: torch.Tensor, out: torch.Tensor) -> None:
    """Write the exponents of the elements that are listed into `out`, which is right but for these.

    All sizes are known, so that a device is not waited for.
    """
    made, streams = FORMATS[piece.format], piece.streams
    blocks = -(-piece.elements // BLOCK)
    at = streams.starts + 4 * blocks
    starts = staged[at : at + 4 * blocks].view(torch.int32)
    for first in range(0, piece.exceptions, _CHUNK):
        last = min(first + _CHUNK, piece.exceptions)
        ranks = torch.arange(first, last, dtype=torch.int32, device=staged.device)
        entries = _read(staged, streams.exceptions, 16, first, last - first)
        upper = _read(staged, streams.uppers, UPPER_BITS, first, last - first).to(torch.int32)
        block = torch.searchsorted(starts, ranks, right=True).sub_(1).clamp_(min=0)
        index = block.mul_(BLOCK).add_(entries & (BLOCK - 1)).clamp_(max=len(out) - 1)
        exponents = ((entries >> PLACE_BITS) | (upper << LOWER_BITS)) & (made.exponents - 1)
        rest = out.index_select(0, index).bitwise_and_(_rest_bits(made))
        out.scatter_(0, index, rest.bitwise_or_(exponents.to(made.integer) << made.mantissa_bits))


def _rest_bits(made: Format) -> int:
    """The bits of an element that are sign or mantissa."""
    return (1 << made.mantissa_bits) - 1 | _SIGN[made.itemsize]


@dataclass(frozen=True)
class _Tables:
    """What stands for four elements, with exponents shifted to where an element has them.

    Attributes:
        common: (256,) by the byte of codes; 0 for escapes. (256, 4) if four elements fill more than 8 bytes.
        rare: the same for the escapes (65536,), by which of the four escape and the next four rare codes.
    """

    common: torch.Tensor
    rare: torch.Tensor


@lru_cache(_TABLES)
def _tables(table: tuple[int, ...], made: Format, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        bits = torch.tensor([*(exponent << made.mantissa_bits for exponent in table), 0]).to(made.integer)
        four = {1: torch.int32, 2: torch.int64}.get(made.itemsize)
        places = (_bytes_of_codes()[0], _fours().to(torch.int64))
        common, rare = (bits[each].view(four).view(-1) if four else bits[each] for each in places)
        return _Tables(common.to(device), rare.to(device))


@cache
def _bytes_of_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """For each byte of codes its four entries in a table, int64 (256, 4); and which escape: 4 bits, int32 (256,)."""
    codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, 2) & 3
    escapes = codes == COMMON
    return torch.where(escapes, ENTRIES, codes), (escapes << torch.arange(4)).sum(dim=1).to(torch.int32)


@cache
def _fours() -> torch.Tensor:
    """For each 4 bits (which escape) and 12 (rare codes) the escapes' entries in a table, uint8 (65536, 4).

    `ENTRIES` for the others.
    """
    rows = torch.arange(1 << 16)
    entries, rank = [], torch.zeros_like(rows)
    for place in range(4):
        escapes = rows >> (12 + place) & 1
        digit = rows >> (RARE_BITS * rank) & (RARE - 1)
        entries.append(torch.where(escapes == 1, COMMON + digit, ENTRIES))
        rank = rank + escapes
    return torch.stack(entries, dim=1).to(torch.uint8)


@lru_cache(_TABLES)
def _on(device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """On `device`, by the byte of codes: which escape (shifted to the row of `_fours`) and how many."""
    with torch.inference_mode(False):
        which = _bytes_of_codes()[1]
        count = sum(which >> place & 1 for place in range(4))
        return (which << 12).to(device), count.to(device)


def _decode_chunk(
    piece: Piece,
    staged: torch.Tensor,
    out: torch.Tensor,
    first: int,
    tables: _Tables,
    rare: slice,
) -> None:
    """Write `out`, whose first element is the piece's `first`; of the rare codes, this range belongs to it."""
    made, streams, count = FORMATS[piece.format], piece.streams, len(out)
    at = streams.codes + first // 4
    codes = staged[at : at + -(-count // 4)].to(torch.int32)
    elements = tables.common.index_select(0, codes)
    if rare.stop > rare.start:
        which, escapes = _on(staged.device)
        escapes = escapes.index_select(0, codes)
        before = torch.cumsum(escapes, 0, dtype=torch.int32).sub_(escapes)
        before.clamp_(max=rare.stop - rare.start)  # there is no more, if the codes are corrupt
        next_four = _next_fours(staged, streams.rare, rare).index_select(0, before)
        rows = which.index_select(0, codes).bitwise_or_(next_four)
        elements.bitwise_or_(tables.rare.index_select(0, rows))
    elements = elements.view(-1).view(made.integer)
    add_rest(made, streams.rest, staged, elements[:count], first, out)


def _next_fours(staged: torch.Tensor, offset: int, which: slice) -> torch.Tensor:
    """From each of these rare codes (and the end) on, the next four of the stream at `offset`: 12 bits, int32."""
    skipped = which.start % 8
    at = offset + which.start // 8 * RARE_BITS
    eights = -(-(skipped + which.stop - which.start) // 8)
    three = staged[at : at + eights * RARE_BITS].view(-1, RARE_BITS).to(torch.int32)
    words = torch.zeros(eights + 2, dtype=torch.int32, device=staged.device)
    words[:eights] = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
    # Codes 0 to 3 of a word need nothing of the next one, codes 4 to 7 its lower half.
    later = words[:-1] >> 12 | (words[1:] & 0xFFF) << 12
    halves = torch.stack([words[:-1], later], dim=1).unsqueeze(2)
    shifts = torch.arange(0, 4 * RARE_BITS, RARE_BITS, dtype=torch.int32, device=staged.device)
    fours = (halves >> shifts & 0xFFF).view(-1)
    return fours[skipped : skipped + which.stop - which.start + 1]


def add_rest(
    made: Format,
    offsets: Sequence[int],
    staged: torch.Tensor,
    bits: torch.Tensor,
    first: int,
    out: torch.Tensor,
) -> None:
    """Write `bits`, the exponents, with sign and mantissa added."""
    count, mantissa = len(out), (1 << made.mantissa_bits) - 1
    if made.fields == (8,):  # the sign is a byte's highest bit: widening the byte takes it to the top
        at = offsets[0] + first
        rest = staged[at : at + count].view(torch.int8).to(made.integer)
        torch.bitwise_or(rest.bitwise_and_(_rest_bits(made)), bits, out=out)
        return
    rest, place = torch.zeros_like(out), 0
    for offset, width in zip(offsets, made.fields, strict=True):
        rest |= _read(staged, offset, width, first, count).to(made.integer) << place
        place += width
    sign = (rest << made.exponent_bits).bitwise_and_(_SIGN[made.itemsize])
    torch.bitwise_or(rest.bitwise_and_(mantissa).bitwise_or_(sign), bits, out=out)


def _read(staged: torch.Tensor, offset: int, width: int, first: int, count: int) -> torch.Tensor:
    """Numbers `first` to `first + count` of a stream with `width` bits for each; `first` starts a byte."""
    at = offset + first * width // 8
    if width == 16:
        return staged[at : at + 2 * count].view(torch.int16).to(torch.int32) & 0xFFFF
    raw = staged[at : at + -(-count * width // 8)]
    if width == 8:
        return raw
    shifts = torch.arange(0, 8, width, dtype=torch.uint8, device=staged.device)
    return (raw.unsqueeze(1) >> shifts & ((1 << width) - 1)).view(-1)[:count]

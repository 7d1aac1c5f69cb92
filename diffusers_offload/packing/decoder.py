"""Unpacks a coded piece with torch operations that every device has: comparisons, shifts, look-ups, `nonzero`.

Four codes make a byte, so four exponents are looked up at once, shifted to where the element has them. The elements
that escape are found by `nonzero` on the CPU; as they are stored in the same order, nothing has to be searched for.
Other devices must not be waited for: there a running sum says which escape an element is.
What the bytes say is not trusted: no position is taken from them without a bound.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache

import torch

from .formats import COMMON, FORMATS, RARE, Format
from .piece import BLOCK, RARE_BITS, Piece

_CHUNK = 64 * BLOCK  # elements at once on the CPU: scratch stays in its cache
_ESCAPE = COMMON
_SPELLED = RARE
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
    if staged.device.type != "cpu":
        _decode_queued(piece, staged, out, tables)
        return
    starts = _starts(piece, staged, _CHUNK // BLOCK)
    for rank, first in enumerate(range(0, len(out), _CHUNK)):
        _decode_chunk(piece, staged, out[first : first + _CHUNK], first, tables, *starts[rank])


def _starts(piece: Piece, staged: torch.Tensor, every: int) -> list[tuple[int, int]]:
    """For each chunk of `every` blocks, the ranks of its first rare code and of its first spelled exponent."""
    blocks = -(-piece.elements // BLOCK)
    if blocks <= every:
        return [(0, 0)]
    at = piece.streams.starts
    both = staged[at : at + 8 * blocks].view(torch.int32).view(2, blocks)[:, ::every].tolist()
    return [
        (min(max(rare, 0), piece.rare), min(max(spelled, 0), piece.spelled))
        for rare, spelled in zip(*both, strict=True)
    ]


class _Tables:
    """What bytes of codes stand for, with exponents shifted to where an element has them.

    Attributes:
        common: (256,) of four elements' bits each, or (256, 4) if they fill more than 8 bytes.
        escapes: int32 (256,): four bytes, 1 for each code that is an escape.
        rare: one element's bits for each rare code.
    """

    def __init__(self, table: Sequence[int], made: Format, device: torch.device) -> None:
        codes, escapes = _bytes_of_codes()
        dtype = made.integer
        bits = [exponent << made.mantissa_bits for exponent in table]
        common = torch.tensor([*bits[:COMMON], 0], dtype=torch.int64)[codes]
        rare = torch.tensor([*bits[COMMON:], 0], dtype=torch.int64)
        four = {1: torch.int32, 2: torch.int64}.get(made.itemsize)
        common = common.to(dtype)
        self.common = (common.view(four).view(-1) if four else common).to(device)
        self.escapes = escapes.to(device)
        self.rare = rare.to(dtype).to(device)


@lru_cache(4096)  # of some KiB each; to put them on a device is to wait for it
def _tables(table: tuple[int, ...], made: Format, device: torch.device) -> _Tables:
    with torch.inference_mode(False):
        return _Tables(table, made, device)


@cache
def _bytes_of_codes() -> tuple[torch.Tensor, torch.Tensor]:
    """The four codes in each byte, int64 (256, 4); and which of them are escapes, as int32 (256,) of four bytes."""
    with torch.inference_mode(False):
        codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, 2) & 3
        return codes, (codes == _ESCAPE).to(torch.uint8).view(torch.int32).view(-1)


def _decode_chunk(
    piece: Piece,
    staged: torch.Tensor,
    out: torch.Tensor,
    first: int,
    tables: _Tables,
    rare: int,
    spelled: int,
) -> None:
    """Write `out`, whose first element is the piece's `first`, before which there were so many escapes."""
    made, streams, count = FORMATS[piece.format], piece.streams, len(out)
    at = streams.codes + first // 4
    codes = staged[at : at + -(-count // 4)].to(torch.int32)
    elements = tables.common.index_select(0, codes).view(-1).view(made.integer)
    escapes = tables.escapes.index_select(0, codes).view(torch.uint8)[:count]
    where = escapes.view(torch.bool).nonzero().view(-1)[: piece.rare - rare]
    if len(where):
        rare_codes = _rare_codes(staged, streams.rare, rare, len(where))
        bits = tables.rare.index_select(0, rare_codes)
        unnamed = (rare_codes == _SPELLED).nonzero().view(-1)[: piece.spelled - spelled]
        if len(unnamed):
            at = streams.spelled + spelled
            exponents = staged[at : at + len(unnamed)] & (made.exponents - 1)
            bits[unnamed] = exponents.to(made.integer) << made.mantissa_bits
        elements[where] = bits
    _add_rest(made, streams.rest, staged, elements[:count], first, out)


def _decode_queued(piece: Piece, staged: torch.Tensor, out: torch.Tensor, tables: _Tables) -> None:
    """Write `out` without waiting for the device, which `nonzero` does: each escape is told its rank instead."""
    made, streams, count = FORMATS[piece.format], piece.streams, len(out)
    codes = staged[streams.codes : streams.codes + -(-count // 4)].to(torch.int32)
    elements = tables.common.index_select(0, codes).view(-1).view(made.integer)[:count]
    if piece.rare:
        escapes = tables.escapes.index_select(0, codes).view(torch.uint8)[:count]
        rare_codes = _rare_codes(staged, streams.rare, 0, piece.rare)
        bits = tables.rare.index_select(0, rare_codes)
        if piece.spelled:
            unnamed = rare_codes == _SPELLED
            at = streams.spelled
            exponents = staged[at : at + piece.spelled] & (made.exponents - 1)
            spelled = exponents.to(made.integer) << made.mantissa_bits
            bits = torch.where(unnamed, spelled.index_select(0, _ranks(unnamed, piece.spelled)), bits)
        named = bits.index_select(0, _ranks(escapes, piece.rare))
        elements = torch.where(escapes.view(torch.bool), named, elements)
    _add_rest(made, streams.rest, staged, elements, 0, out)


def _ranks(flags: torch.Tensor, count: int) -> torch.Tensor:
    """For each flag that is set, how many are set before it, int32; for the others anything from 0 to `count` - 1."""
    return flags.cumsum(0, dtype=torch.int32).sub_(1).clamp_(0, count - 1)


def _rare_codes(staged: torch.Tensor, offset: int, first: int, count: int) -> torch.Tensor:
    """Rare codes `first` to `first + count` of the stream at `offset`, int32."""
    skipped = first % 8
    at = offset + first // 8 * RARE_BITS
    eights = -(-(skipped + count) // 8)
    three = staged[at : at + eights * RARE_BITS].view(-1, RARE_BITS).to(torch.int32)
    words = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
    shifts = torch.arange(0, 8 * RARE_BITS, RARE_BITS, dtype=torch.int32, device=staged.device)
    codes = words.unsqueeze(1) >> shifts & ((1 << RARE_BITS) - 1)
    return codes.view(-1)[skipped : skipped + count]


def _add_rest(
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
        torch.bitwise_or(rest.bitwise_and_(mantissa | _SIGN[made.itemsize]), bits, out=out)
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

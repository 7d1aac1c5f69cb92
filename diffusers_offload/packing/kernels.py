"""Unpacks a coded piece in one launch (Triton). Imported only where a device can run it.

A program decodes one block. It reads the streams whose place is known, then finds each escape's place by counting
the escapes before it in the block, from where the block's first one is stored. Every position that depends on
stored bytes is bounded before it is used, for the block or for the element: whatever the bytes are, nothing is
read or written outside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
import triton
import triton.language as tl

from .formats import COMMON, FORMATS
from .piece import BLOCK, Piece

_LONG = 1 << 62  # makes Triton take the number for one of 64 bits, whatever the exponents are
_WARPS = 8  # 16 elements for each thread


@triton.jit
def _numbers(source, offset, block, left, WIDTH: tl.constexpr, BLOCK: tl.constexpr, WHOLE: tl.constexpr):
    """The numbers of a block from the stream at `offset`, int32 (BLOCK,); `left` elements from it on exist.

    Numbers of less than 8 bits come from words of 32: a thread reads one for all of its elements. A stream is
    padded, so that its last word may be read whole.
    """
    if WIDTH >= 8:
        place = tl.arange(0, BLOCK)
        start = source + offset + block * (BLOCK * (WIDTH // 8))
        if WIDTH == 16:
            start = start.to(tl.pointer_type(tl.int16))
        numbers = tl.load(start + place) if WHOLE else tl.load(start + place, mask=place < left, other=0)
        return numbers.to(tl.int32) & ((1 << WIDTH) - 1)
    each: tl.constexpr = 32 // WIDTH
    row = tl.arange(0, BLOCK // each)
    start = (source + offset + block * (BLOCK // 8 * WIDTH)).to(tl.pointer_type(tl.int32))
    words = tl.load(start + row) if WHOLE else tl.load(start + row, mask=row * each < left, other=0)
    numbers = (words[:, None] >> (tl.arange(0, each) * WIDTH)[None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(numbers, [BLOCK])


@triton.jit
def _block(
    source,
    out,
    block,
    left,
    first_rare,
    first_spelled,
    rare,
    spelled,
    common_table,
    rare_table,
    rest0,
    rest1,
    rest2,
    codes_at,
    rare_at,
    spelled_at,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK: tl.constexpr,
    WHOLE: tl.constexpr,
):
    place = tl.arange(0, BLOCK)
    code = _numbers(source, codes_at, block, left, 2, BLOCK, WHOLE)

    # Ones and zeros are computed, not compared: predicates would be moved to registers and back. A whole block
    # reads for every element, escape or not, at the place of the last escape up to there.
    escapes = (code + 1) >> 2
    if not WHOLE:
        escapes = tl.where(place < left, escapes, 0)
    bit = tl.cumsum(escapes, 0) * 3 + (rare_at * 8 + first_rare * 3 - 3)
    at = (bit >> 3).to(tl.uint32)
    if WHOLE:
        low, high = tl.load(source + at), tl.load(source + at + 1)
    else:
        end = rare_at + (rare * 3 + 7) // 8
        low = tl.load(source + at, mask=(escapes > 0) & (at < end), other=0)
        high = tl.load(source + at + 1, mask=(escapes > 0) & (at + 1 < end), other=0)
    # By way of the highest bits: a right shift of a number known to be short is compiled to one of 16 bits.
    both = (low.to(tl.uint32) << 22) | (high.to(tl.uint32) << 30)
    digit = ((both << (~bit & 7).to(tl.uint32)) >> 29).to(tl.int32)

    spellings = (digit + escapes) >> 3
    at = (tl.cumsum(spellings, 0) + (spelled_at + first_spelled - 1)).to(tl.uint32)
    if WHOLE:
        byte = tl.load(source + at)
    else:
        byte = tl.load(source + at, mask=(spellings > 0) & (at < spelled_at + spelled), other=0)

    # The fourth common and the eighth rare exponent are zeros, for the next table to fill.
    common = (common_table >> (code * 8)) & 255
    named = (rare_table >> (digit * 8)).to(tl.int32) & 255
    exponent = common | (named & -escapes) | (byte.to(tl.int32) & -spellings)

    rest = _numbers(source, rest0, block, left, WIDTH0, BLOCK, WHOLE)
    if WIDTH1 > 0:
        rest |= _numbers(source, rest1, block, left, WIDTH1, BLOCK, WHOLE) << WIDTH0
    if WIDTH2 > 0:
        rest |= _numbers(source, rest2, block, left, WIDTH2, BLOCK, WHOLE) << (WIDTH0 + WIDTH1)
    sign = (rest << EXPONENT) & (-1 << (MANTISSA + EXPONENT))
    element = sign | ((exponent & ((1 << EXPONENT) - 1)) << MANTISSA) | (rest & ((1 << MANTISSA) - 1))
    element = element.to(out.dtype.element_ty)
    if WHOLE:
        tl.store(out + place, element)
    else:
        tl.store(out + place, element, mask=place < left)


@triton.jit(
    do_not_specialize=["elements", "blocks", "nbytes", "rare", "spelled", "common_table", "rare_table"]
)
def _unpack(
    source,
    out,
    elements,
    blocks,
    nbytes,
    rare,
    spelled,
    common_table,
    rare_table,
    rest0,
    rest1,
    rest2,
    codes_at,
    rare_at,
    spelled_at,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0)
    left = elements - block * BLOCK
    rare_table = rare_table.to(tl.int64) & 0xFFFFFFFFFFFFFF  # its highest byte only made it 64 bits wide
    starts = source.to(tl.pointer_type(tl.int32))
    first_rare = tl.minimum(tl.maximum(tl.load(starts + block), 0), rare)
    first_spelled = tl.minimum(tl.maximum(tl.load(starts + blocks + block), 0), spelled)
    inside = (spelled_at + first_spelled + BLOCK < nbytes) & (
        rare_at + (first_rare + BLOCK) * 3 // 8 + 1 < nbytes
    )
    out = out + block * BLOCK
    # fmt: off
    if (left >= BLOCK) & inside:
        _block(source, out, block, left, first_rare, first_spelled, rare, spelled,
               common_table, rare_table, rest0, rest1, rest2, codes_at, rare_at, spelled_at,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, True)
    else:
        _block(source, out, block, left, first_rare, first_spelled, rare, spelled,
               common_table, rare_table, rest0, rest1, rest2, codes_at, rare_at, spelled_at,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, False)
    # fmt: on


def launch(piece: Piece, staged: torch.Tensor, out: torch.Tensor) -> None:
    """Queue the kernel that writes the elements of a coded piece.

    Args:
        staged: uint8, the piece's packed bytes.
        out: uint8, as long as what the piece holds.
    """
    made, streams = FORMATS[piece.format], piece.streams
    rest = (*streams.rest, 0, 0)
    widths = (*made.fields, 0, 0)
    blocks = -(-piece.elements // BLOCK)
    with _on(staged.device):
        _unpack[(blocks,)](
            staged,
            out.view(made.integer),
            piece.elements,
            blocks,
            streams.nbytes,
            piece.rare,
            piece.spelled,
            _word(piece.table[:COMMON]),
            _word(piece.table[COMMON:]) | _LONG,
            *rest[:3],
            streams.codes,
            streams.rare,
            streams.spelled,
            made.exponent_bits,
            made.mantissa_bits,
            *widths[:3],
            BLOCK,
            num_warps=_WARPS,
        )


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device; its interpreter knows the CPU only."""
    return nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def _word(exponents: tuple[int, ...]) -> int:
    """Exponents as the bytes of a number, the first lowest."""
    return int.from_bytes(bytes(exponents), "little")

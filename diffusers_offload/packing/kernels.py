"""Unpacks a coded piece in one launch (Triton). Imported only where a device can run it.

A program decodes one block, each thread a pair of rows of 16 elements, whose codes are a word. It reads the streams
whose place is known, counts the escapes before each row to find where its rare codes begin, and works on the bytes of
four exponents at once. Exponents that are spelled out are few: they are written over the others at the end. Every
position that depends on stored bytes is bounded before it is used, for the block or for the element: whatever the
bytes are, nothing is read or written outside.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

from .formats import COMMON, FORMATS
from .piece import BLOCK, Piece

_WARPS = 4  # a pair of rows, 16 elements each, for each thread
_REGISTERS = 40  # of a thread: more blocks at a time hide more than spilling costs, a tenth on an H200
_REMEMBERED = 8192  # pieces, a KiB each: a launch keeps the host as busy as the device


@triton.jit
def _permute(low, high, selectors, ASSEMBLY: tl.constexpr):
    """For each of the four lowest nibbles (0 to 7) of `selectors` that byte of high:low, as four bytes (int32)."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "prmt.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, selectors],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    both = (tl.cast(low, tl.int64) & 0xFFFFFFFF) | (tl.cast(high, tl.int64) << 32)
    found = 0
    for place in tl.static_range(4):
        byte = (both >> (((selectors >> (4 * place)) & 7) * 8)) & 255
        found |= byte.to(tl.int32) << (8 * place)
    return found


@triton.jit
def _running(pairs):
    """Running sums over the four bytes of a word of how many of the bits 0, 2, ... 30 are set: each a byte."""
    fours = (pairs & 0x33333333) + ((pairs >> 2) & 0x33333333)
    return ((fours & 0x0F0F0F0F) + ((fours >> 4) & 0x0F0F0F0F)) * 0x01010101


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
def _bits_set(bits):
    """How many bits of each int32 are set."""
    bits -= (bits >> 1) & 0x55555555
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def _number(source, offset, place, wanted, WIDTH: tl.constexpr):
    """The number at each `place` of the stream at `offset`, int32, where it is wanted."""
    if WIDTH == 16:
        start = (source + offset).to(tl.pointer_type(tl.int16))
        return tl.load(start + place, mask=wanted, other=0).to(tl.int32) & 0xFFFF
    each: tl.constexpr = 8 // WIDTH
    byte = tl.load(source + offset + place // each, mask=wanted, other=0).to(tl.int32)
    return (byte >> (place % each * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def _element(exponent, rest, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """An element's bits, int32."""
    sign = (rest << EXPONENT) & (-1 << (MANTISSA + EXPONENT))
    return sign | ((exponent & ((1 << EXPONENT) - 1)) << MANTISSA) | (rest & ((1 << MANTISSA) - 1))


@triton.jit
def _spell_out(
    source,
    out,
    first,
    start,
    marks,
    at,
    most,
    nbytes,
    rest0,
    rest1,
    rest2,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    WHOLE: tl.constexpr,
):
    """Write the elements of a block whose exponents are spelled out, in each turn one of each row that has one."""
    turn = 0
    while turn < most:
        turn += 1
        wanted = marks != 0
        place = start + _bits_set((marks & -marks) - 1)
        marks &= marks - 1
        read = wanted if WHOLE else wanted & (at < nbytes)
        exponent = tl.load(source + at, mask=read, other=0).to(tl.int32)
        at += 1
        rest = _number(source, rest0, first + place, wanted, WIDTH0)
        if WIDTH1 > 0:
            rest |= _number(source, rest1, first + place, wanted, WIDTH1) << WIDTH0
        if WIDTH2 > 0:
            rest |= _number(source, rest2, first + place, wanted, WIDTH2) << (WIDTH0 + WIDTH1)
        element = _element(exponent, rest, EXPONENT, MANTISSA)
        tl.store(out + place, element.to(out.dtype.element_ty), mask=wanted)


@triton.jit
def _four(codes, running, window, common, rare_low, rare_high, GROUP: tl.constexpr, ASSEMBLY: tl.constexpr):
    """The exponents of four elements of each row, a byte each, and a bit for each that is spelled out."""
    code = (codes >> (8 * GROUP)) & 255
    code = (code | (code << 4)) & 0x0F0F
    code = (code | (code << 2)) & 0x3333
    escape = code & (code >> 1) & 0x1111

    # The rare codes move up by a nibble for each element, of which each escape takes three bits away.
    if GROUP > 0:
        window = window >> (((running >> (8 * GROUP - 8)) & 255) * 3).to(tl.uint64)
    rare = window.to(tl.int32)
    digit = rare & 7
    for place in tl.static_range(3):
        rare = tl.where((escape & (1 << (4 * place))) != 0, rare << 1, rare << 4)
        digit |= rare & (0x70 << (4 * place))
    spelled = digit & (digit >> 1) & (digit >> 2) & escape

    # The fourth common and the eighth rare exponent are zeros, for the other table to fill.
    exponents = _permute(common, 0, code, ASSEMBLY)
    exponents |= _permute(rare_low, rare_high, digit | (0x7777 - 7 * escape), ASSEMBLY)
    return exponents, ((spelled * 0x1248) >> 12) & 15


@triton.jit
def _row_of_words(start, row):
    """The four words of each of these rows."""
    words = tl.load(start + row[:, None] * 4 + tl.arange(0, 4)[None, :])
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _join_bytes(exponents, rest, ASSEMBLY: tl.constexpr):
    """Four elements of bf16 in two words, from the bytes of their exponents and of their rests."""
    upper = (rest & ~0x7F7F7F7F) | ((exponents >> 1) & 0x7F7F7F7F)
    lower = (rest & 0x7F7F7F7F) | ((exponents << 7) & ~0x7F7F7F7F)
    return _permute(lower, upper, 0x5140, ASSEMBLY), _permute(lower, upper, 0x7362, ASSEMBLY)


@triton.jit
def _in_order(w0, w1, w2, w3):
    """Four words of each row one behind the other: (rows, 2, 2)."""
    return tl.join(tl.join(w0, w2), tl.join(w1, w3))


@triton.jit
def _block(
    source,
    out,
    block,
    left,
    first_rare,
    first_spelled,
    nbytes,
    common,
    rare_low,
    rare_high,
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
    WORDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WHOLE: tl.constexpr,
):
    pair = tl.arange(0, BLOCK // 32)
    row = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    start = (source + codes_at + block * (BLOCK // 4)).to(tl.pointer_type(tl.int32))
    codes = tl.load(start + row) if WHOLE else tl.load(start + row, mask=row * 16 < left, other=0)

    # Where a row's rare codes begin, and the 48 bits that they may have.
    running = _running(codes & (codes >> 1) & 0x55555555)
    upper, lower = tl.split((running >> 24) & 255)
    before = tl.cumsum(upper + lower, 0) - lower + first_rare
    bit = tl.join(before - upper, before) * 3
    at = (bit >> 6) * 8 + rare_at
    start = source.to(tl.pointer_type(tl.uint64)) + (at >> 3)
    if WHOLE:
        low, high = tl.load(start), tl.load(start + 1)
    else:
        low = tl.load(start, mask=at + 8 <= nbytes, other=0)
        high = tl.load(start + 1, mask=at + 16 <= nbytes, other=0)
    skip = (bit & 63).to(tl.uint64)
    window = (low >> skip) | ((high << 1) << (63 - skip))

    # fmt: off
    e0, m0 = _four(codes, running, window, common, rare_low, rare_high, 0, ASSEMBLY)
    e1, m1 = _four(codes, running, window, common, rare_low, rare_high, 1, ASSEMBLY)
    e2, m2 = _four(codes, running, window, common, rare_low, rare_high, 2, ASSEMBLY)
    e3, m3 = _four(codes, running, window, common, rare_low, rare_high, 3, ASSEMBLY)
    # fmt: on

    place = tl.arange(0, BLOCK)
    if WORDS and WHOLE:
        start = (source + rest0 + block * BLOCK).to(tl.pointer_type(tl.int32))
        p0, p1, p2, p3 = _row_of_words(start, pair * 2)
        q0, q1, q2, q3 = _row_of_words(start, pair * 2 + 1)
        r0, r1, r2, r3 = tl.join(p0, q0), tl.join(p1, q1), tl.join(p2, q2), tl.join(p3, q3)
        a0, b0 = _join_bytes(e0, r0, ASSEMBLY)
        a1, b1 = _join_bytes(e1, r1, ASSEMBLY)
        a2, b2 = _join_bytes(e2, r2, ASSEMBLY)
        a3, b3 = _join_bytes(e3, r3, ASSEMBLY)
        words = tl.join(_in_order(a0, a1, a2, a3), _in_order(b0, b1, b2, b3))
        start = out.to(tl.pointer_type(tl.int32))
        tl.store(start + tl.arange(0, BLOCK // 2), tl.reshape(words, [BLOCK // 2]))
    else:
        words = tl.reshape(_in_order(e0, e1, e2, e3), [BLOCK // 4])
        exponent = tl.reshape((words[:, None] >> (8 * tl.arange(0, 4))[None, :]) & 255, [BLOCK])
        rest = _numbers(source, rest0, block, left, WIDTH0, BLOCK, WHOLE)
        if WIDTH1 > 0:
            rest |= _numbers(source, rest1, block, left, WIDTH1, BLOCK, WHOLE) << WIDTH0
        if WIDTH2 > 0:
            rest |= _numbers(source, rest2, block, left, WIDTH2, BLOCK, WHOLE) << (WIDTH0 + WIDTH1)
        element = _element(exponent, rest, EXPONENT, MANTISSA).to(out.dtype.element_ty)
        if WHOLE:
            tl.store(out + place, element)
        else:
            tl.store(out + place, element, mask=place < left)

    # The marks of a pair of rows: a bit for each element that is spelled out.
    marks = m0 | (m1 << 4) | (m2 << 8) | (m3 << 12)
    if not WHOLE:
        marks &= (1 << tl.minimum(tl.maximum(left - row * 16, 0), 16)) - 1
    upper, lower = tl.split(marks)
    marks = upper | (lower << 16)
    many = _bits_set(marks)
    at = tl.cumsum(many, 0) - many + (spelled_at + first_spelled)
    tl.debug_barrier()  # what has been written is written over
    # fmt: off
    _spell_out(source, out, block * BLOCK, pair * 32, marks, at, tl.max(many, 0), nbytes, rest0, rest1, rest2,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, WHOLE)
    # fmt: on


@triton.jit(
    do_not_specialize=["elements", "blocks", "nbytes", "rare", "spelled", "common", "rare_low", "rare_high"]
)
def _unpack(
    source,
    out,
    elements,
    blocks,
    nbytes,
    rare,
    spelled,
    common,
    rare_low,
    rare_high,
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
    WORDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
):
    block = tl.program_id(0)
    left = elements - block * BLOCK
    starts = source.to(tl.pointer_type(tl.int32))
    first_rare = tl.minimum(tl.maximum(tl.load(starts + block), 0), rare)
    first_spelled = tl.minimum(tl.maximum(tl.load(starts + blocks + block), 0), spelled)
    inside = (spelled_at + first_spelled + BLOCK < nbytes) & (
        rare_at + (first_rare + BLOCK) * 3 // 8 + 16 <= nbytes
    )
    out = out + block * BLOCK
    # fmt: off
    if (left >= BLOCK) & inside:
        _block(source, out, block, left, first_rare, first_spelled, nbytes,
               common, rare_low, rare_high, rest0, rest1, rest2, codes_at, rare_at, spelled_at,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, WORDS, ASSEMBLY, True)
    else:
        _block(source, out, block, left, first_rare, first_spelled, nbytes,
               common, rare_low, rare_high, rest0, rest1, rest2, codes_at, rare_at, spelled_at,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, WORDS, ASSEMBLY, False)
    # fmt: on


def launch(piece: Piece, staged: torch.Tensor, out: torch.Tensor) -> None:
    """Queue the kernel that writes the elements of a coded piece.

    Args:
        staged: uint8, the piece's packed bytes.
        out: uint8, as long as what the piece holds.
    """
    integer, blocks, given = _arguments(piece)
    nvidia = staged.device.type == "cuda" and torch.version.hip is None
    words = piece.format == "bf16" and out.data_ptr() % 16 == 0
    with _on(staged.device):
        _unpack[(blocks,)](
            *(staged, out.view(integer), *given, BLOCK, words, nvidia),
            num_warps=_WARPS,
            **({"maxnreg": _REGISTERS} if nvidia else {}),
        )


@lru_cache(_REMEMBERED)
def _arguments(piece: Piece) -> tuple[torch.dtype, int, tuple[int, ...]]:
    """The dtype of the elements, the number of blocks, and what the kernel is given of a piece."""
    made, streams = FORMATS[piece.format], piece.streams
    blocks = -(-piece.elements // BLOCK)
    counts = (piece.elements, blocks, streams.nbytes, piece.rare, piece.spelled)
    tables = piece.table[:COMMON], piece.table[COMMON : COMMON + 4], piece.table[COMMON + 4 :]
    rest, widths = (*streams.rest, 0, 0)[:3], (*made.fields, 0, 0)[:3]
    offsets = (*rest, streams.codes, streams.rare, streams.spelled)
    bits = (made.exponent_bits, made.mantissa_bits, *widths)
    return made.integer, blocks, (*counts, *map(_word, tables), *offsets, *bits)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device; its interpreter knows the CPU only."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def _word(exponents: tuple[int, ...]) -> int:
    """Up to four exponents as the bytes of a number of 32 bits, the first lowest, and zeros."""
    return int.from_bytes(bytes(exponents).ljust(4, b"\0"), "little", signed=True)

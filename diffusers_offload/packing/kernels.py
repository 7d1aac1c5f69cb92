"""Unpacks a coded piece in one launch (Triton). Imported only where a device can run it.

A program decodes one block, each thread a pair of rows of 16 elements, whose codes are a word. It asks for the streams
whose place is known, counts the escapes before each row to find where its rare codes begin, and decodes eight elements
at once: nibbles and bytes of words, put in place by permutations. Exceptions are few and say where they belong: when
the block is written, each thread puts one of them right. Every position that depends on stored bytes is bounded before
it is used, for the block or for the element: whatever the bytes are, nothing is read or written outside.
"""

from __future__ import annotations

import triton
import triton.language as tl

from .bitwise import bits_set, chosen, from_bit, nibbles, permute


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
def _number(source, offset, index, wanted, WIDTH: tl.constexpr):
    """The numbers at `index` of the stream at `offset`, int32, where they are `wanted`."""
    if WIDTH == 16:
        start = (source + offset).to(tl.pointer_type(tl.int16))
        return tl.load(start + index, mask=wanted, other=0).to(tl.int32) & 0xFFFF
    each: tl.constexpr = 8 // WIDTH
    number = tl.load(source + offset + index // each, mask=wanted, other=0).to(tl.int32)
    return (number >> (index % each * WIDTH)) & ((1 << WIDTH) - 1)


@triton.jit
def _element(exponent, rest, EXPONENT: tl.constexpr, MANTISSA: tl.constexpr):
    """An element's bits, int32."""
    sign = (rest << EXPONENT) & (-1 << (MANTISSA + EXPONENT))
    return sign | ((exponent & ((1 << EXPONENT) - 1)) << MANTISSA) | (rest & ((1 << MANTISSA) - 1))


@triton.jit
def _exceptions_of(source, block, blocks, exceptions, BLOCK: tl.constexpr):
    """Which exceptions are a block's: the first, and the one behind the last."""
    starts = source.to(tl.pointer_type(tl.int32)) + blocks + block
    first = tl.minimum(tl.maximum(tl.load(starts), 0), exceptions)
    last = tl.load(starts + 1, mask=block + 1 < blocks, other=exceptions)
    return first, tl.minimum(tl.minimum(last, exceptions), first + BLOCK)


@triton.jit
def _put_exceptions(
    source,
    out,
    block,
    left,
    first,
    last,
    rest0,
    rest1,
    rest2,
    exceptions_at,
    uppers_at,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """Write the elements that exceptions `first` to `last` name, one for each thread at a time."""
    while first < last:
        rank = first + tl.arange(0, THREADS)
        entry = _number(source, exceptions_at, rank, rank < last, 16)
        upper = _number(source, uppers_at, rank, rank < last, 4)
        place = entry & (BLOCK - 1)
        wanted = (rank < last) & (place < left)
        index = block * BLOCK + place
        rest = _number(source, rest0, index, wanted, WIDTH0)
        if WIDTH1 > 0:
            rest |= _number(source, rest1, index, wanted, WIDTH1) << WIDTH0
        if WIDTH2 > 0:
            rest |= _number(source, rest2, index, wanted, WIDTH2) << (WIDTH0 + WIDTH1)
        element = _element((entry // BLOCK) | (upper << 4), rest, EXPONENT, MANTISSA)
        tl.store(out + place, element.to(out.dtype.element_ty), mask=wanted)
        first += THREADS


@triton.jit
def _eight(even, odd, escaped, sums, bits, common, rare_low, rare_high, ASSEMBLY: tl.constexpr):
    """The exponents of eight elements of each row, a byte each: of the first four, of the other four.

    Args:
        even, odd: for each second element a nibble in the lowest 16 bits: its code, or if that is the escape 4 and
            its place among these four.
        escaped: a nibble for each even element: whether it is one.
        sums: for each pair of an even and an odd element, how many escapes they are.
        bits: the rare codes from the first of these elements on.
    """
    digits = nibbles(bits)
    first = permute(rare_low, rare_high, digits, ASSEMBLY)
    second = permute(rare_low, rare_high, digits >> 16, ASSEMBLY)

    # Of eight rare exponents, each element takes the one of as many as there are escapes before it.
    before = sums * 0x1110
    e = permute(common, permute(first, second, before, ASSEMBLY), even, ASSEMBLY)
    before += escaped
    o = permute(common, permute(first, second, before, ASSEMBLY), odd, ASSEMBLY)
    return permute(e, o, 0x5140, ASSEMBLY), permute(e, o, 0x7362, ASSEMBLY)


@triton.jit
def _row_of_words(start, row, wanted):
    """The four words of each of these rows."""
    words = tl.load(start + row[:, None] * 4 + tl.arange(0, 4)[None, :], mask=wanted, other=0)
    even, odd = tl.split(tl.reshape(words, [words.shape[0], 2, 2]))
    w0, w2 = tl.split(even)
    w1, w3 = tl.split(odd)
    return w0, w1, w2, w3


@triton.jit
def _join_bytes(exponents, rest, ASSEMBLY: tl.constexpr):
    """Four elements of bf16 in two words, from the bytes of their turned exponents and of their rests."""
    upper = chosen(0x7F7F7F7F, exponents, rest, ASSEMBLY)
    lower = chosen(0x7F7F7F7F, rest, exponents, ASSEMBLY)
    return permute(lower, upper, 0x5140, ASSEMBLY), permute(lower, upper, 0x7362, ASSEMBLY)


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
    row,
    codes,
    r0,
    r1,
    r2,
    r3,
    first_rare,
    nbytes,
    common,
    rare_low,
    rare_high,
    rest0,
    rest1,
    rest2,
    rare_at,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK: tl.constexpr,
    TURNED: tl.constexpr,
    WORDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    WHOLE: tl.constexpr,
):
    # Even and odd elements have their codes in nibbles; with those of both, an escape is known by its nibble.
    even, odd = codes & 0x33333333, (codes >> 2) & 0x33333333
    even_escapes, odd_escapes = even & (even >> 1) & 0x11111111, odd & (odd >> 1) & 0x11111111
    escapes = even_escapes + odd_escapes * 2
    even ^= (even_escapes * 15) & 0x45674567
    odd ^= (odd_escapes * 15) & 0x45674567
    sums = even_escapes + odd_escapes

    # Where a row's rare codes begin, and the 48 bits that they may have.
    upper, lower = tl.split(bits_set(escapes, ASSEMBLY))
    before = tl.cumsum(upper + lower, 0) - lower + first_rare
    bit = tl.join(before - upper, before) * 3
    word = (rare_at >> 2) + (bit >> 5)
    start = source.to(tl.pointer_type(tl.int32)) + word
    if WHOLE:
        w0, w1, w2 = tl.load(start), tl.load(start + 1), tl.load(start + 2)
    else:
        last = (nbytes >> 2) - word
        w0 = tl.load(start, mask=last > 0, other=0)
        w1 = tl.load(start + 1, mask=last > 1, other=0)
        w2 = tl.load(start + 2, mask=last > 2, other=0)
    low, high = from_bit(w0, w1, bit, ASSEMBLY), from_bit(w1, w2, bit, ASSEMBLY)
    middle = from_bit(low, high, bits_set(escapes & 0xFFFF, ASSEMBLY) * 3, ASSEMBLY)

    # fmt: off
    e0, e1 = _eight(even, odd, even_escapes, sums, low, common, rare_low, rare_high, ASSEMBLY)
    e2, e3 = _eight(even >> 16, odd >> 16, even_escapes >> 16, sums >> 16, middle,
                    common, rare_low, rare_high, ASSEMBLY)
    # fmt: on

    place = tl.arange(0, BLOCK)
    if WORDS and WHOLE:
        a0, b0 = _join_bytes(e0, r0, ASSEMBLY)
        a1, b1 = _join_bytes(e1, r1, ASSEMBLY)
        a2, b2 = _join_bytes(e2, r2, ASSEMBLY)
        a3, b3 = _join_bytes(e3, r3, ASSEMBLY)
        words = tl.join(_in_order(a0, a1, a2, a3), _in_order(b0, b1, b2, b3))
        start = out.to(tl.pointer_type(tl.int32))
        tl.store(start + tl.arange(0, BLOCK // 2), tl.reshape(words, [BLOCK // 2]))
    else:
        words = tl.reshape(_in_order(e0, e1, e2, e3), [BLOCK // 4])
        if TURNED:
            words = ((words << 1) & ~0x01010101) | ((words >> 7) & 0x01010101)
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


@triton.jit(
    do_not_specialize=[
        "elements",
        "blocks",
        "nbytes",
        "rare",
        "exceptions",
        "common",
        "rare_low",
        "rare_high",
    ]
)
def unpack_blocks(
    source,
    out,
    elements,
    blocks,
    nbytes,
    rare,
    exceptions,
    common,
    rare_low,
    rare_high,
    rest0,
    rest1,
    rest2,
    codes_at,
    rare_at,
    exceptions_at,
    uppers_at,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
    TURNED: tl.constexpr,
    WORDS: tl.constexpr,
    ASSEMBLY: tl.constexpr,
    TOGETHER: tl.constexpr,
):
    block = tl.program_id(0)
    left = elements - block * BLOCK
    pair = tl.arange(0, BLOCK // 32)
    row = pair[:, None] * 2 + tl.arange(0, 2)[None, :]
    # What lies at known places is asked for at once, before it is known where the rest is.
    start = (source + codes_at + block * (BLOCK // 4)).to(tl.pointer_type(tl.int32))
    codes = tl.load(start + row, mask=row * 16 < left, other=0)
    r0, r1, r2, r3 = codes, codes, codes, codes
    if WORDS:
        start = (source + rest0 + block * BLOCK).to(tl.pointer_type(tl.int32))
        p0, p1, p2, p3 = _row_of_words(start, pair * 2, left >= BLOCK)
        q0, q1, q2, q3 = _row_of_words(start, pair * 2 + 1, left >= BLOCK)
        r0, r1, r2, r3 = tl.join(p0, q0), tl.join(p1, q1), tl.join(p2, q2), tl.join(p3, q3)
    starts = source.to(tl.pointer_type(tl.int32)) + block
    first_rare = tl.minimum(tl.maximum(tl.load(starts), 0), rare)
    first, last = _exceptions_of(source, block, blocks, exceptions, BLOCK)
    inside = rare_at + (first_rare + BLOCK) * 3 // 8 + 16 <= nbytes
    out = out + block * BLOCK
    # fmt: off
    if (left >= BLOCK) & inside:
        _block(source, out, block, left, row, codes, r0, r1, r2, r3, first_rare, nbytes,
               common, rare_low, rare_high, rest0, rest1, rest2, rare_at,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, TURNED, WORDS, ASSEMBLY, True)
    else:
        _block(source, out, block, left, row, codes, r0, r1, r2, r3, first_rare, nbytes,
               common, rare_low, rare_high, rest0, rest1, rest2, rare_at,
               EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, TURNED, WORDS, ASSEMBLY, False)
    if TOGETHER:
        tl.debug_barrier()  # what other threads wrote to these places comes first
        _put_exceptions(source, out, block, left, first, last, rest0, rest1, rest2, exceptions_at, uppers_at,
                        EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, THREADS)
    # fmt: on


@triton.jit(do_not_specialize=["elements", "blocks", "exceptions"])
def amend_blocks(
    source,
    out,
    elements,
    blocks,
    exceptions,
    rest0,
    rest1,
    rest2,
    exceptions_at,
    uppers_at,
    EXPONENT: tl.constexpr,
    MANTISSA: tl.constexpr,
    WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr,
    WIDTH2: tl.constexpr,
    BLOCK: tl.constexpr,
    THREADS: tl.constexpr,
):
    """The exceptions alone, behind the other kernel."""
    block = tl.program_id(0)
    first, last = _exceptions_of(source, block, blocks, exceptions, BLOCK)
    # fmt: off
    _put_exceptions(source, out + block * BLOCK, block, elements - block * BLOCK, first, last,
                    rest0, rest1, rest2, exceptions_at, uppers_at,
                    EXPONENT, MANTISSA, WIDTH0, WIDTH1, WIDTH2, BLOCK, THREADS)
    # fmt: on

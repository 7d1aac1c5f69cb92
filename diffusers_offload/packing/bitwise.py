"""Bits and bytes of words of 32 bits, many at once, for the kernel that unpacks.

Some are one instruction of NVIDIA's, which no compiler finds by itself (`ASSEMBLY`). Other devices, and Triton's
interpreter, do the same in several.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def permute(low, high, selectors, ASSEMBLY: tl.constexpr):
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
def chosen(mask, one, other, ASSEMBLY: tl.constexpr):
    """The bits of `one` where `mask` has ones, those of `other` elsewhere (int32)."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "lop3.b32 $0, $1, $2, $3, 0xCA;",
            "=r,r,r,r",
            [mask, one, other],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    return (mask & one) | (~mask & other)


@triton.jit
def from_bit(low, high, bit, ASSEMBLY: tl.constexpr):
    """32 bits of the number high:low from its bit `bit` modulo 32 on (int32)."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "shf.r.wrap.b32 $0, $1, $2, $3;",
            "=r,r,r,r",
            [low, high, bit],
            dtype=tl.int32,
            is_pure=True,
            pack=1,
        )
    both = (tl.cast(low, tl.int64) & 0xFFFFFFFF) | (tl.cast(high, tl.int64) << 32)
    return (both >> (bit & 31)).to(tl.int32)


@triton.jit
def bits_set(bits, ASSEMBLY: tl.constexpr):
    """How many bits of each int32 are set."""
    if ASSEMBLY:
        return tl.inline_asm_elementwise(
            "popc.b32 $0, $1;", "=r,r", [bits], dtype=tl.int32, is_pure=True, pack=1
        )
    bits -= (bits >> 1) & 0x55555555
    bits = (bits & 0x33333333) + ((bits >> 2) & 0x33333333)
    return (((bits + (bits >> 4)) & 0x0F0F0F0F) * 0x01010101) >> 24


@triton.jit
def nibbles(bits):
    """The eight numbers of three bits in the lowest 24 of `bits`, a nibble each."""
    bits &= 0xFFFFFF
    bits += (bits & 0xFFF000) * 15
    bits += (bits & 0x0FC00FC0) * 3
    return bits + (bits & 0x38383838)

"""Unpacks as docs/packing.md says it, element by element, without a line of the package's own decoders."""

from __future__ import annotations

import struct

FORMATS = {"bf16": (8, 7), "fp16": (5, 10), "fp32": (8, 23), "e4m3": (4, 3), "e5m2": (5, 2)}
FIELDS = {"bf16": [8], "fp16": [8, 2, 1], "fp32": [16, 8], "e4m3": [4], "e5m2": [2, 1]}
BLOCK = 4096


def unpack(description: dict, packed: bytes, nbytes: int) -> bytes:
    """The slab (zeros where no piece lies) that `to_json` and the packed bytes describe."""
    slab = bytearray(nbytes)
    for piece in description["pieces"]:
        start, stop = piece["slab"]
        source = packed[piece["source"] :]
        slab[start:stop] = (
            _decode(piece, source, stop - start) if "format" in piece else source[: stop - start]
        )
    return bytes(slab)


def _up(nbytes: int) -> int:
    return (nbytes + 127) // 128 * 128


def _number(stream: bytes, index: int, width: int) -> int:
    bit = index * width
    window = int.from_bytes(stream[bit // 8 : bit // 8 + 4], "little")
    return (window >> (bit % 8)) & ((1 << width) - 1)


def _decode(piece: dict, source: bytes, nbytes: int) -> bytes:
    name = piece["format"]
    exponent_bits, mantissa_bits = FORMATS[name]
    itemsize = (1 + exponent_bits + mantissa_bits) // 8
    count = nbytes // itemsize
    rare_count, exception_count = piece["rare"], piece["exceptions"]
    table = piece["table"]

    blocks = (count + BLOCK - 1) // BLOCK
    starts = struct.unpack_from(f"<{2 * blocks}i", source)
    exceptions = _up(8 * blocks)
    uppers = exceptions + _up(2 * exception_count)
    rare = uppers + _up((exception_count + 1) // 2)
    codes = rare + _up((rare_count + 7) // 8 * 3)
    field = codes + _up((2 * count + 7) // 8)

    rest, shift = [0] * count, 0
    for width in FIELDS[name]:
        stream = source[field : field + (count * width + 7) // 8]
        for i in range(count):
            rest[i] |= _number(stream, i, width) << shift
        field, shift = _up(field + len(stream)), shift + width

    listed = {}
    for rank in range(exception_count):
        entry = _number(source[exceptions:], rank, 16)
        block = max(b for b in range(blocks) if starts[blocks + b] <= rank)
        listed[block * BLOCK + entry % 4096] = entry // 4096 + 16 * _number(source[uppers:], rank, 4)

    out = bytearray()
    for i in range(count):
        if i % BLOCK == 0:
            rare_rank = starts[i // BLOCK]
        code = _number(source[codes + i // 4 :][:1], i % 4, 2)
        if code < 3:
            exponent = table[code]
        else:
            exponent = table[3 + _number(source[rare : rare + (rare_count + 7) // 8 * 3], rare_rank, 3)]
            rare_rank += 1
        exponent = listed.get(i, exponent)
        sign, mantissa = rest[i] >> mantissa_bits, rest[i] & ((1 << mantissa_bits) - 1)
        element = (sign << (exponent_bits + mantissa_bits)) | (exponent << mantissa_bits) | mantissa
        out += element.to_bytes(itemsize, "little")
    return bytes(out)

"""The float formats whose exponents are worth coding, and the table of one tensor's exponents.

An element is a sign, an exponent and a mantissa, from the highest bit to the lowest. Sign and mantissa of weights
are as good as random and are kept as they are: the *rest*. Exponents crowd around the weights' scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

COMMON = 3  # exponents with a code of 2 bits; the fourth code says: look among the rare
RARE = 8  # exponents with a code of 3 bits
ENTRIES = COMMON + RARE
EXCEPTION = ENTRIES  # what `symbols` says of all other exponents: these elements are listed


@dataclass(frozen=True)
class Format:
    """How an element's bits are divided: one for the sign, then these.

    Attributes:
        name: as it is written in metadata.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return (1 + self.exponent_bits + self.mantissa_bits) // 8

    @property
    def integer(self) -> torch.dtype:
        """The dtype under which torch handles the bits of an element."""
        return {1: torch.uint8, 2: torch.int16, 4: torch.int32}[self.itemsize]

    @property
    def exponents(self) -> int:
        """How many exponents there are."""
        return 1 << self.exponent_bits

    @property
    def fields(self) -> tuple[int, ...]:
        """The widths in bits, of the streams that hold the rest, from its lowest bits to its highest.

        Each is a power of two, so that no element lies across a boundary: 11 bits are 8 + 2 + 1.
        """
        width = 1 + self.mantissa_bits
        return tuple(1 << bit for bit in reversed(range(5)) if width >> bit & 1)


FORMATS = {
    made.name: made
    for made in (
        Format("bf16", 8, 7),
        Format("fp16", 5, 10),
        Format("fp32", 8, 23),
        Format("e4m3", 4, 3),
        Format("e5m2", 5, 2),
    )
}
_BY_DTYPE = {
    "bfloat16": "bf16",
    "float16": "fp16",
    "complex32": "fp16",
    "float32": "fp32",
    "complex64": "fp32",
    "float8_e4m3fn": "e4m3",
    "float8_e4m3fnuz": "e4m3",
    "float8_e5m2": "e5m2",
    "float8_e5m2fnuz": "e5m2",
}


def format_of(dtype: torch.dtype) -> Format | None:
    """The format of the numbers in a tensor of `dtype`; None if it is kept as it is."""
    name = _BY_DTYPE.get(str(dtype).removeprefix("torch."))
    return FORMATS[name] if name else None


def choose_table(counts: Sequence[int]) -> tuple[int, ...]:
    """The `ENTRIES` most frequent exponents, most frequent first.

    Args:
        counts: how often each exponent was seen, the lowest first.
    """
    order = sorted(range(len(counts)), key=lambda exponent: (-counts[exponent], exponent))
    return tuple(order[:ENTRIES])


def symbols(table: Sequence[int], exponents: int) -> list[int]:
    """For each exponent its place in `table`, `EXCEPTION` if it has none."""
    places = [EXCEPTION] * exponents
    for place, exponent in enumerate(table):
        places[exponent] = place
    return places

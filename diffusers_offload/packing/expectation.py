"""How many bytes packed weights are going to take, before they have been looked at."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .formats import format_of
from .packer import SMALLEST

_CODE_BITS = (
    2.8  # of an exponent, where weights follow a normal distribution: most need a little less or more
)


def expected_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Packed bytes of `tensors`, which weights that were trained or drawn at random come close to."""
    return sum(map(_expected, tensors))


def _expected(tensor: torch.Tensor) -> int:
    nbytes, made = tensor.numel() * tensor.element_size(), format_of(tensor.dtype)
    if made is None or nbytes < SMALLEST:
        return nbytes
    bits = 1 + made.exponent_bits + made.mantissa_bits
    return int(nbytes * min(1.0, (bits - made.exponent_bits + _CODE_BITS) / bits))

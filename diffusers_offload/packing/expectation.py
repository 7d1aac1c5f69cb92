"""How many bytes packed weights are going to take, before they have been looked at."""

from __future__ import annotations

from collections.abc import Iterable

import torch

from .formats import format_of
from .packer import SMALLEST

_CODE_BITS = 3.3  # of an exponent: a little more than any of the distributions in docs/packing.md needs


def expected_nbytes(tensors: Iterable[torch.Tensor]) -> int:
    """Packed bytes of `tensors` at most, if they are distributed like weights; nobody has looked at them yet."""
    return sum(map(_expected, tensors))


def _expected(tensor: torch.Tensor) -> int:
    nbytes, made = tensor.numel() * tensor.element_size(), format_of(tensor.dtype)
    if made is None or nbytes < SMALLEST:
        return nbytes
    bits = 1 + made.exponent_bits + made.mantissa_bits
    return int(nbytes * min(1.0, (bits - made.exponent_bits + _CODE_BITS) / bits))

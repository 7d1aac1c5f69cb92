"""Pieces that are unpacked at once, and all that can be known of them before their bytes have come."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch

from .formats import FORMATS
from .piece import Piece

if TYPE_CHECKING:
    from .launching import Given

_VECTOR = 16  # bytes that the kernel reads at once


class Batch:
    """Pieces whose packed bytes lie one behind the other.

    A unit is unpacked in every step, and the host has as little time for that as the device: what does not change
    is worked out once.

    Args:
        pieces: in the order of the slab.

    Attributes:
        places: of each piece its first packed byte, counted from the first one's.

    Raises:
        ValueError: their packed bytes are in another order.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = tuple(pieces)
        first = self.pieces[0].source if self.pieces else 0
        self.places = tuple(piece.source - first for piece in self.pieces)
        if any(place < 0 for place in self.places):
            raise ValueError("pieces are in the order of their packed bytes")
        ends = (at + piece.nbytes for at, piece in zip(self.places, self.pieces, strict=True))
        self._needed = max(ends, default=0), max((piece.stop for piece in self.pieces), default=0)
        # What of their addresses depends on them: all else is where the first byte of either lies.
        coded = [(at, piece) for at, piece in zip(self.places, self.pieces, strict=True) if piece.format]
        self._sources = {at % _VECTOR for at, _ in coded}
        itemsizes = ((piece.start, FORMATS[piece.format].itemsize) for _, piece in coded)
        self._targets = {(start % itemsize, itemsize) for start, itemsize in itemsizes}

    @cached_property
    def given(self) -> tuple[Given | None, ...]:
        """What the kernel is given of each piece; None for those that are not coded. Only where there is Triton."""
        from .launching import given_of

        return tuple(given_of(piece) if piece.format else None for piece in self.pieces)

    def check(self, staged: torch.Tensor, destination: torch.Tensor) -> None:
        """Raise ValueError unless these can be their packed bytes and the slab."""
        for tensor, nbytes in zip((staged, destination), self._needed, strict=True):
            if tensor.dtype != torch.uint8 or tensor.dim() != 1 or not tensor.is_contiguous():
                raise ValueError("packed bytes and slabs are contiguous uint8 tensors with one dimension")
            if tensor.numel() < nbytes:
                raise ValueError(f"pieces need {nbytes} bytes where there are {tensor.numel()}")
        if staged.device != destination.device:
            raise ValueError(f"packed bytes are on {staged.device}, the slab on {destination.device}")
        source, target = staged.data_ptr(), destination.data_ptr()
        if any((source + at) % _VECTOR for at in self._sources) or any(
            (target + start) % itemsize for start, itemsize in self._targets
        ):
            raise ValueError("packed bytes or the slab are not aligned")

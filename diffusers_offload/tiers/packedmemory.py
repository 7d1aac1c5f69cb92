"""Host memory that is packed: what stands in for the tensors meanwhile, wherever the packed bytes lie."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch

from .. import slab
from ..packing import Batch, Piece
from ..slab import Layout, Placement
from .pinned import HostMemory


@dataclass(frozen=True, eq=False)
class PackedMemory(HostMemory):
    """A unit's packed bytes.

    Attributes:
        pieces: what of the slab lies where among the bytes.
        blank: stands in for the slab.
        batches: ranges of pieces that are copied at once.
    """

    pieces: tuple[Piece, ...]
    blank: torch.Tensor
    batches: tuple[tuple[int, int], ...]

    def views(self, layout: Layout) -> list[torch.Tensor]:
        """What the unit's tensors look at: NaN, but true values where the packed bytes hold them as they are."""
        plain = _joined(piece for piece in self.pieces if piece.format is None)
        found = slab.views(layout, self.blank)
        for index, place in enumerate(layout.placements):
            piece = _holding(plain, layout, place)
            if piece is not None:
                there = replace(place, offset=place.offset - piece.start + piece.source)
                (found[index],) = slab.views(Layout((there,), (), 0), self.bytes)
        return found

    @cached_property
    def copies(self) -> tuple[tuple[HostMemory, Batch], ...]:
        """What is copied at once, and the pieces that lie there."""
        batches = [self.pieces[first:last] for first, last in self.batches]
        ends = [(pieces[0].source, pieces[-1].source + pieces[-1].nbytes) for pieces in batches]
        packed = [HostMemory(self.bytes[start:stop], self.pinned) for start, stop in ends]
        return tuple(zip(packed, map(Batch, batches), strict=True))

    @cached_property
    def largest_batch(self) -> int:
        """Bytes of the longest copy."""
        return max((packed.bytes.numel() for packed, _ in self.copies), default=0)

    def checked(self) -> PackedMemory:
        """The same bytes, of which it is known that they are those that were packed."""
        return self

    def is_blank(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` looks at what stands in for its values."""
        return tensor.untyped_storage().data_ptr() == self.blank.untyped_storage().data_ptr()

    def was_written_to(self, private: Mapping[int, int]) -> bool:
        """Whether somebody wrote to what stands in.

        Args:
            private: what `traces.private_bytes` said.
        """
        start = self.blank.data_ptr()
        stop = start + self.blank.numel()
        return any(nbytes for at, nbytes in private.items() if start <= at < stop)


@dataclass(frozen=True, eq=False)
class RevealedMemory(HostMemory):
    """A slab that was unpacked for a while.

    Attributes:
        veil: where it is packed still; None if it is no longer.
    """

    veil: PackedMemory | None


def _joined(plain: Iterable[Piece]) -> list[Piece]:
    """Pieces that lie one behind the other, in the slab and among the packed bytes, as one."""
    joined: list[Piece] = []
    for piece in plain:
        last = joined[-1] if joined else None
        if last is not None and (last.stop, last.source + last.nbytes) == (piece.start, piece.source):
            joined[-1] = replace(last, stop=piece.stop)
        else:
            joined.append(piece)
    return joined


def _holding(plain: Sequence[Piece], layout: Layout, place: Placement) -> Piece | None:
    """The piece that holds all of the region in which a tensor lies, at an address that suits any dtype."""
    for region in layout.regions:
        start, stop = region.offset, region.offset + region.nbytes
        if start <= place.offset < stop:
            for piece in plain:
                if piece.start <= start and stop <= piece.stop and not (piece.source - piece.start) % 16:
                    return piece
    return None

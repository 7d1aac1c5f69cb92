"""A part on its way to a file: its slab, as it is or packed, and what digests and files take from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..slab import Layout
from . import digests, header
from .packings import Packing


@dataclass(frozen=True)
class Part:
    """What is to be written as a whole.

    Attributes:
        name: of the unit.
        layout: of its slab.
        names: of the tensors in the component, in the order of `layout.placements`.
        data: the slab: uint8, contiguous, on the CPU, at least `layout.nbytes` long; or the bytes of each of
            `layout.regions`, wherever they lie there; or the packed bytes.
        packing: how these are packed; None if the slab is written as it is.
    """

    name: str
    layout: Layout
    names: tuple[str, ...]
    data: torch.Tensor | Sequence[torch.Tensor]
    packing: Packing | None = None

    @property
    def nbytes(self) -> int:
        """Bytes that it takes in a file, without what fills its last page."""
        return self.layout.nbytes if self.packing is None else self.data.numel()


def digest_of(part: Part) -> str:
    """The digest of a part's bytes as they would be written, with zeros where no tensor lies."""
    return digests.of_slab(pieces_of(part))


def as_bytes(data: torch.Tensor) -> memoryview:
    """The bytes of `data` (uint8, contiguous, on the CPU) without a copy."""
    if data.dtype != torch.uint8 or data.device.type != "cpu" or data.dim() != 1 or not data.is_contiguous():
        raise ValueError("a slab is a contiguous uint8 tensor on the CPU with one dimension")
    return memoryview(data.detach().numpy())


def sources_of(part: Part) -> Sequence[torch.Tensor]:
    """The bytes of each region of a part that is not packed, where it has them."""
    if not isinstance(part.data, torch.Tensor):
        return part.data
    regions = part.layout.regions
    return [part.data[region.offset : region.offset + region.nbytes] for region in regions]


def pieces_of(part: Part) -> list[memoryview]:
    """What is written of a part, in the order of the file.

    What lies between the tensors of a slab that was used before is anything: zeros are written in its place,
    so that the same weights give the same bytes.
    """
    if part.packing is not None:
        return [as_bytes(part.data)]
    cuts = header.ranges(part.layout)
    if isinstance(part.data, torch.Tensor):
        raw = as_bytes(part.data)
        if len(raw) < part.layout.nbytes:
            raise ValueError(f"the slab of {part.name!r} is shorter than its layout")
        found = [raw[cut.start : cut.stop] for cut in cuts]
    else:
        found = _among_regions(part, cuts)
    return [
        memoryview(bytes(cut.stop - cut.start)) if cut.gap else view
        for cut, view in zip(cuts, found, strict=True)
    ]


def _among_regions(part: Part, cuts: Sequence[header.Range]) -> list[memoryview]:
    """The bytes of each of `cuts`; a gap has any."""
    pairs = sorted(zip(part.layout.regions, part.data, strict=True), key=lambda pair: pair[0].offset)
    if any(data.numel() != region.nbytes for region, data in pairs):
        raise ValueError(f"the regions of {part.name!r} are not as long as its layout says")
    found, rest = [], iter(pairs)
    for cut in cuts:
        if cut.gap:
            found.append(memoryview(b""))
            continue
        region, data = next(rest)  # both are in the order of the slab, and no region is cut in two
        found.append(as_bytes(data)[cut.start - region.offset : cut.stop - region.offset])
    return found

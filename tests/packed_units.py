"""Units to pack: tensors with every bit pattern, and the way there and back."""

from __future__ import annotations

import torch

from diffusers_offload.packing import Packed, unpack
from diffusers_offload.slab import Layout, gather, lay_out

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
UNTOUCHED = 0xA5
SLOT = 64 * 1024


def patterns(dtype: torch.dtype) -> torch.Tensor:
    """Every bit pattern of a dtype of up to 16 bits; of wider ones each with every sign and exponent."""
    if dtype.itemsize == 1:
        return torch.arange(256, dtype=torch.uint8).view(dtype)
    high = torch.arange(-(2**15), 2**15, dtype=torch.int16)
    if dtype.itemsize == 2:
        return high.view(dtype)
    return torch.stack([high.flip(0), high], dim=1).view(-1).view(dtype)


def weights(count: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Normally distributed numbers, a few of them much larger or smaller, zero, infinite or none."""
    numbers = torch.randn(count, generator=torch.Generator().manual_seed(seed)) * 0.02
    odd = numbers[::61]
    odd *= 2.0 ** (torch.arange(len(odd)) % 40 - 20)
    odd[::5] = torch.tensor([0.0, -0.0, float("nan"), float("inf"), -1e-40]).repeat(len(odd))[: len(odd[::5])]
    return numbers.to(dtype)


def slab_of(tensors: list[torch.Tensor], device: str = "cpu") -> tuple[torch.Tensor, Layout]:
    """The slab of `tensors`, with something in the gaps, and its layout."""
    layout = lay_out(tensors)
    slab = torch.full((layout.nbytes,), UNTOUCHED, dtype=torch.uint8, device=device)
    gather(layout, tensors, slab)
    return slab, layout


def unpacked(packed: Packed) -> torch.Tensor:
    """The slab again, `UNTOUCHED` where no piece lies; nothing around it was written."""
    room = torch.full((packed.nbytes_raw + 1024,), UNTOUCHED, dtype=torch.uint8, device=packed.bytes.device)
    destination = room[512 : 512 + packed.nbytes_raw]
    for piece in packed.pieces:
        unpack([piece], packed.bytes[piece.source : piece.source + piece.nbytes], destination)
    assert (room[:512] == UNTOUCHED).all() and (room[512 + packed.nbytes_raw :] == UNTOUCHED).all()
    return destination


def same_regions(layout: Layout, one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two slabs agree in every byte that belongs to a tensor."""
    ends = [(region.offset, region.offset + region.nbytes) for region in layout.regions]
    return all(torch.equal(one[start:stop], other[start:stop]) for start, stop in ends)

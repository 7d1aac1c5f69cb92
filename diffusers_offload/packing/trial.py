"""Tries the kernel on the device that is to use it: what it writes must equal what torch operations write."""

from __future__ import annotations

import torch

from ..slab import Layout, Placement, Region, Span
from .formats import FORMATS
from .launching import given_of, launch
from .packer import pack
from .piece import BLOCK
from .queued import decode_queued

_DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "e4m3": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
}
_SEED = 0


def agrees(device: torch.device, name: str) -> bool:
    """Whether kernel and torch operations unpack weights of the format called `name` alike on `device`.

    The weights have rare exponents and exceptions, whole blocks, and a last one that is not whole.
    """
    made = FORMATS[name]
    count = 3 * BLOCK + 1001
    generator = torch.Generator("cpu").manual_seed(_SEED)
    numbers = torch.randn(count, generator=generator, device="cpu")
    odd = numbers[::97]
    odd *= 2.0 ** (torch.arange(len(odd), device="cpu") % 24 - 12)
    slab = numbers.to(_DTYPES[name]).view(torch.uint8).to(device)
    place = Placement(0, _DTYPES[name], (count,), (1,))
    layout = Layout((place,), (Region(Span(0, 0, len(slab)), 0),), len(slab))
    packed = pack(slab, layout, 2**20, smallest=0)
    (piece,) = packed.pieces
    assert piece.format == made.name and piece.rare and piece.exceptions, (
        "the weights of the trial have to be coded"
    )
    ways = torch.zeros_like(slab), torch.zeros_like(slab)
    decode_queued(piece, packed.bytes, ways[0])
    launch(given_of(piece), packed.bytes, 0, ways[1])
    return torch.equal(slab, ways[0]) and torch.equal(slab, ways[1])

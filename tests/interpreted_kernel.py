"""Run with TRITON_INTERPRET=1: the kernel, interpreted on the CPU, against the torch operations and the original.

Every format: every bit pattern, lengths around a block's, weights; then corrupt bytes, with the memory that the
kernel reads and writes between guards. Triton's interpreter reads and writes real addresses, so what leaves the
piece is seen: a guard's page cannot be touched.
"""

from __future__ import annotations

import ctypes
import mmap
from dataclasses import replace

import torch
from packed_units import DTYPES, SLOT, patterns, slab_of, weights

from diffusers_offload.packing import cutting, launching, pack, trial
from diffusers_offload.packing.decoder import decode
from diffusers_offload.packing.formats import FORMATS
from diffusers_offload.packing.launching import given_of, launch
from diffusers_offload.packing.piece import BLOCK, Piece

PAGE = mmap.PAGESIZE
NO_ACCESS = 0


def fenced(nbytes: int, at_end: bool) -> torch.Tensor:
    """uint8 memory whose neighbour before (or, to 16 bytes, behind) is a page that kills whoever touches it."""
    pages = -(-nbytes // PAGE)
    whole = mmap.mmap(-1, (pages + 2) * PAGE)
    address = ctypes.addressof(ctypes.c_char.from_buffer(whole))
    libc = ctypes.CDLL(None, use_errno=True)
    for page in (0, pages + 1):
        assert libc.mprotect(ctypes.c_void_p(address + page * PAGE), PAGE, NO_ACCESS) == 0
    start = PAGE + (pages * PAGE - -(-nbytes // 16) * 16 if at_end else 0)
    KEPT.append(whole)
    return torch.frombuffer(whole, dtype=torch.uint8)[start : start + nbytes]


KEPT: list[mmap.mmap] = []


def launched(piece: Piece, packed: torch.Tensor, at_end: bool, shift: int = 0) -> torch.Tensor:
    """What the kernel writes, `shift` bytes behind an address that is a multiple of 16."""
    staged = fenced(piece.nbytes, at_end)
    staged.copy_(packed[piece.source : piece.source + piece.nbytes])
    out = fenced(piece.stop - piece.start + shift, at_end)[shift:]
    alone = replace(piece, start=0, stop=piece.stop - piece.start)
    launch(given_of(alone), staged, 0, out)
    return out


def check_format(name: str) -> None:
    dtype = DTYPES[name]
    assert trial.agrees(torch.device("cpu"), name)
    counts = (1, BLOCK - 1, BLOCK, 2 * BLOCK + 77)
    for numbers in (patterns(dtype), *(weights(count, dtype) for count in counts)):
        slab, layout = slab_of([numbers])
        packed = pack(slab, layout, SLOT, smallest=0)
        for piece in packed.pieces:
            assert piece.format == name
            out = launched(piece, packed.bytes, at_end=True)
            other = torch.empty_like(out)
            decode(piece, packed.bytes[piece.source : piece.source + piece.nbytes], other)
            assert torch.equal(out, slab[piece.start : piece.stop]) and torch.equal(out, other)
            assert torch.equal(out, launched(piece, packed.bytes, True, FORMATS[name].itemsize))
    # Constant tensors have no escapes: streams of no length, and short pieces, which corrupt codes read beyond.
    check_corrupt(weights(2 * BLOCK + 77, dtype))
    for count in (BLOCK, BLOCK - 1, 3):
        check_corrupt(torch.ones(count).to(dtype))


def check_corrupt(numbers: torch.Tensor) -> None:
    slab, layout = slab_of([numbers])
    packed = pack(slab, layout, SLOT, smallest=0)
    dice = torch.Generator().manual_seed(0)
    noises = [torch.full_like(packed.bytes, value) for value in (0, 255)]
    noises += [noises[1].clone() for _ in range(2)]  # escapes alone, starts far away or before the first
    noises[2][:128] = torch.tensor([255, 255, 255, 127] * 32)
    noises[3][:128] = torch.tensor([0, 0, 0, 128] * 32)
    noises += [torch.randint_like(packed.bytes, 256, generator=dice) for _ in range(2)]
    for noise in noises:
        for piece in packed.pieces:
            for at_end in (False, True):
                launched(piece, noise, at_end)


def check_exceptions_apart() -> None:
    """The way of devices whose barrier does not order memory: a kernel of its own."""
    launching._APART = ("cpu",)
    for name in FORMATS:
        assert trial.agrees(torch.device("cpu"), name)
    check_corrupt(weights(2 * BLOCK + 77, torch.bfloat16))


def main() -> None:
    cutting.LEAST_SAVING = -1e-9  # a tensor is coded even if that makes it longer
    for name in FORMATS:
        check_format(name)
    check_exceptions_apart()


if __name__ == "__main__":
    main()

"""Queues the kernels that unpack a coded piece, with as little as can be for the host to do. Imported only where there
is Triton.
"""

from __future__ import annotations

import re
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton

from .formats import COMMON, FORMATS
from .kernels import amend_blocks, unpack_blocks
from .piece import BLOCK, Piece

_WARPS = 4  # a pair of rows, 16 elements each, for each thread
_REGISTERS = 40  # of a thread: what counts is how many blocks a processor has at a time
_APART = ("xpu",)  # where a barrier need not order what is written to the device's memory


@dataclass(frozen=True)
class Given:
    """What the kernels are given of a coded piece.

    Attributes:
        format: name of the elements' format.
        start, stop: bytes of the slab.
        blocks: programs to run.
        of_all, of_exceptions: numbers for the one kernel, and for that of the exceptions alone.
        bits: widths, for both.
    """

    format: str
    start: int
    stop: int
    blocks: int
    of_all: tuple[int, ...]
    of_exceptions: tuple[int, ...]
    bits: tuple[int, ...]


def given_of(piece: Piece) -> Given:
    """What the kernels are given of a coded piece."""
    made, streams = FORMATS[piece.format], piece.streams
    blocks = -(-piece.elements // BLOCK)
    table = tuple(map(_turned, piece.table)) if piece.format == "bf16" else piece.table
    tables = map(_word, (table[:COMMON], table[COMMON : COMMON + 4], table[COMMON + 4 :]))
    rest, widths = (*streams.rest, 0, 0)[:3], (*made.fields, 0, 0)[:3]
    counts, listed = (piece.elements, blocks), (streams.exceptions, streams.uppers)
    of_all = (streams.nbytes, piece.rare, piece.exceptions, *tables, *rest, streams.codes, streams.rare)
    return Given(
        piece.format,
        piece.start,
        piece.stop,
        blocks,
        (*counts, *of_all, *listed),
        (*counts, piece.exceptions, *rest, *listed),
        (made.exponent_bits, made.mantissa_bits, *widths),
    )


def launch(given: Given, staged: torch.Tensor, at: int, destination: torch.Tensor) -> None:
    """Queue the kernel that writes the elements of a coded piece.

    Args:
        staged: uint8, with the piece's packed bytes from byte `at` on, whose address is a multiple of 16.
        destination: uint8, the slab.
    """
    device = staged.device
    with _on(device):
        if device.type == "cuda" and torch.version.hip is None:
            target = destination.data_ptr() + given.start
            kernel, constants = _compiled(given, staged, at, destination, target % 16 == 0)
            kernel[(given.blocks, 1, 1)](staged.data_ptr() + at, target, *given.of_all, *constants)
            return
        tensors, aligned = _tensors(given, staged, at, destination)
        together = device.type not in _APART
        constants = _constants(given, aligned, False, together)
        unpack_blocks[(given.blocks,)](*tensors, *given.of_all, *constants, num_warps=_WARPS)
        if not together and given.of_exceptions[2]:
            constants = (*given.bits, BLOCK, 32 * _WARPS)
            amend_blocks[(given.blocks,)](*tensors, *given.of_exceptions, *constants, num_warps=_WARPS)


def _tensors(
    given: Given, staged: torch.Tensor, at: int, destination: torch.Tensor
) -> tuple[tuple[torch.Tensor, torch.Tensor], bool]:
    """The kernels' first two arguments, and whether the second begins at a multiple of 16."""
    out = destination[given.start : given.stop].view(FORMATS[given.format].integer)
    return (staged[at:], out), out.data_ptr() % 16 == 0


def _constants(given: Given, aligned: bool, assembly: bool, together: bool) -> tuple[int | bool, ...]:
    """The arguments that the kernel is compiled for."""
    turned = given.format == "bf16"
    return (*given.bits, BLOCK, 32 * _WARPS, turned, turned and aligned, assembly, together)


_COMPILED: dict[tuple[int, str, bool], tuple[Any, tuple[int | bool, ...]]] = {}


def _compiled(
    given: Given, staged: torch.Tensor, at: int, destination: torch.Tensor, aligned: bool
) -> tuple[Any, tuple[int | bool, ...]]:
    """The kernel for such a piece on NVIDIA's devices, and its last arguments.

    Triton looks at each argument of each launch to find what it has compiled, for some 20 us. Here that follows from
    the format: streams begin at multiples of 128.
    """
    key = (staged.device.index, given.format, aligned)
    if key not in _COMPILED:
        tensors, _ = _tensors(given, staged, at, destination)
        constants = _constants(given, aligned, True, True)
        options = {"grid": (1,), "num_warps": _WARPS, "maxnreg": _REGISTERS}
        kernel = unpack_blocks.warmup(*tensors, *given.of_all, *constants, **options)
        # Up to 3.2 what is compiled takes no constants any more.
        made = kernel, constants if _takes_constants() else ()
        # Another thread's, if it was first: a kernel that nobody holds unloads its code.
        return _COMPILED.setdefault(key, made)
    return _COMPILED[key]


def _takes_constants() -> bool:
    major, minor = re.findall(r"\d+", triton.__version__)[:2]  # of "3.3.0rc1", too
    return (int(major), int(minor)) >= (3, 3)


def _on(device: torch.device) -> AbstractContextManager[None]:
    """Triton launches on the current device; its interpreter knows the CPU only."""
    if device.type == "cpu":
        return nullcontext()
    module = torch.get_device_module(device)
    return nullcontext() if module.current_device() == device.index else module.device(device)


def _turned(exponent: int) -> int:
    """The lowest bit of a byte as its highest: bf16 has it in another byte than the others."""
    return exponent >> 1 | (exponent & 1) << 7


def _word(exponents: tuple[int, ...]) -> int:
    """Up to four exponents as the bytes of a number of 32 bits, the first lowest, and zeros."""
    return int.from_bytes(bytes(exponents).ljust(4, b"\0"), "little", signed=True)

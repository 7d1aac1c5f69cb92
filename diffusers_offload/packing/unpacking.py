"""Unpacks pieces by the fastest way that its device has: the kernel if there is one that proved itself."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import cache

import torch

from ..log import logger
from .batch import Batch
from .decoder import decode
from .piece import Piece
from .queued import decode_queued

_KERNEL_DEVICES = ("cuda", "xpu")


def unpack(pieces: Sequence[Piece] | Batch, staged: torch.Tensor, destination: torch.Tensor) -> None:
    """Write what `pieces` hold of a slab to `destination`, queued on the current stream.

    With the kernel there is no allocation and no wait for the device, but for the first piece of a format,
    which compiles and tries it: `prepare` does that ahead of time.

    Args:
        pieces: that lie one behind the other, in the order of the slab. A `Batch` of them, if it is kept, spares the
            host most of the work from the second time on.
        staged: uint8, contiguous: their packed bytes from the first one's first on, at an address that is a
            multiple of 16 (128 is faster).
        destination: uint8, contiguous, on the same device: the slab.

    Raises:
        ValueError: the tensors are no such tensors, or the pieces do not fit them; nothing is queued then.
    """
    batch = pieces if isinstance(pieces, Batch) else Batch(pieces)
    batch.check(staged, destination)
    for rank, (piece, at) in enumerate(zip(batch.pieces, batch.places, strict=True)):
        if piece.format is None:
            out = destination[piece.start : piece.stop]
            out.copy_(staged[at : at + piece.nbytes], non_blocking=True)
        elif has_kernel(staged.device, piece.format):
            from .launching import launch

            launch(batch.given[rank], staged, at, destination)
        else:
            by_torch(piece, staged[at:], destination[piece.start : piece.stop])


def by_torch(piece: Piece, staged: torch.Tensor, out: torch.Tensor) -> None:
    """Write the elements of a coded piece to `out` (uint8, as many bytes) without the kernel."""
    (decode if staged.device.type == "cpu" else decode_queued)(piece, staged, out)


def prepare(device: torch.device, pieces: tuple[Piece, ...]) -> None:
    """Compile and try the kernels that `pieces` need on `device`; the host waits for it."""
    for name in {piece.format for piece in pieces if piece.format is not None}:
        has_kernel(device, name)


def unpacks_fast(device: torch.device) -> bool:
    """Whether unpacking may be left to a kernel there, so that it costs next to nothing."""
    return device.type in _KERNEL_DEVICES and importlib.util.find_spec("triton") is not None


@cache
def has_kernel(device: torch.device, name: str) -> bool:
    """Whether the kernel unpacks the format called `name` on `device`: found out by a trial, once for the process."""
    return device.type in _KERNEL_DEVICES and _passes(device, name)


def _passes(device: torch.device, name: str) -> bool:
    """Whether the kernel gives, bit by bit, what the torch operations give."""
    try:
        from .trial import agrees

        if agrees(device, name):
            return True
        reason = "its result differs"
    except torch.OutOfMemoryError:  # which says nothing of the kernel: it is tried again
        raise
    except Exception as error:  # no Triton, no C compiler for it, a device it does not know
        reason = f"{type(error).__name__}: {error}"
    logger.warning(
        "the kernel that unpacks %s cannot be used on %s (%s): torch operations do it, slower and with memory "
        "of their own",
        name,
        device,
        reason,
    )
    return False

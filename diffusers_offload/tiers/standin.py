"""What stands in on the host for packed weights: every byte is 0xFF, which is NaN in float formats (not in "fnuz").

It has the size of the weights and costs no memory: one small file that lives in memory is mapped again and again, side
by side. The mappings are private, so whoever writes there gets pages of his own, which the system counts (`traces`).
"""

from __future__ import annotations

import ctypes
import functools
import mmap
import os
import weakref
from typing import Any

import torch

from ..slab import align

_NBYTES = 16 * 2**20  # of the file: a process may have 65,530 mappings, which are enough for 1 TiB
_NOTHING, _READ_WRITE = 0, 3
_PRIVATE, _FIXED, _ANONYMOUS, _NORESERVE = 2, 0x10, 0x20, 0x4000  # Linux
_FAILED = ctypes.c_void_p(-1).value
_kept: dict[int, Any] = {}  # by the address of what stands in


def stand_in(nbytes: int) -> torch.Tensor:
    """uint8 (nbytes,), all 255; without memory of its own where the system is Linux."""
    with torch.inference_mode(False):
        if not nbytes:
            return torch.empty(0, dtype=torch.uint8)
        made = _mapped(nbytes) if hasattr(os, "memfd_create") else _filled(nbytes)
        return torch.frombuffer(made, dtype=torch.uint8)


def keep_with(blank: torch.Tensor, thing: Any) -> None:
    """Let `thing` live as long as anybody looks at `blank`, which stands in. It must not do so itself."""
    if blank.numel():
        _kept[blank.data_ptr()] = thing


def kept_with(tensor: torch.Tensor) -> Any:
    """What was kept with the `blank` that `tensor` looks at, or None."""
    return _kept.get(tensor.untyped_storage().data_ptr())


def _mapped(nbytes: int) -> ctypes.Array:
    length = align(nbytes, mmap.PAGESIZE)
    start = _map(None, length, _NOTHING, _PRIVATE | _ANONYMOUS | _NORESERVE, -1)
    found = _bytes(nbytes).from_address(start)
    weakref.finalize(found, _unmap, start, length).atexit = False
    for offset in range(0, length, _NBYTES):
        part = min(_NBYTES, length - offset)
        _map(start + offset, part, _READ_WRITE, _PRIVATE | _FIXED | _NORESERVE, _file())
    return found


def _filled(nbytes: int) -> ctypes.Array:
    found = _bytes(nbytes)()
    ctypes.memset(found, 255, nbytes)
    weakref.finalize(found, _kept.pop, ctypes.addressof(found), None).atexit = False
    return found


def _unmap(start: int, length: int) -> None:
    _kept.pop(start, None)
    _libc().munmap(start, length)


@functools.cache
def _bytes(nbytes: int) -> type[ctypes.Array]:
    return ctypes.c_uint8 * nbytes


def _map(at: int | None, length: int, protection: int, flags: int, file: int) -> int:
    found = _libc().mmap(at, length, protection, flags, file, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise MemoryError(f"no addresses for what stands in for packed weights: {os.strerror(number)}")
    return found


@functools.cache
def _libc() -> ctypes.CDLL:
    found = ctypes.CDLL(None, use_errno=True)
    found.mmap.restype = ctypes.c_void_p
    found.mmap.argtypes = (
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    )
    found.munmap.argtypes = (ctypes.c_void_p, ctypes.c_size_t)
    return found


@functools.cache
def _file() -> int:
    """Open for as long as the process lives."""
    file = os.memfd_create("diffusers_offload stand-in")
    block = b"\xff" * 2**20
    for _ in range(_NBYTES // len(block)):
        os.write(file, block)
    return file

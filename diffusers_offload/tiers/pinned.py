"""The pinned tier: units in ordinary host memory, registered with the device at its exact size.

torch's pinned allocator rounds a request up to a power of two, which can double the host memory; so
memory is mapped here and registered with `cudaHostRegister`. Where registering is refused, memory stays
pageable and travels through a small pinned staging buffer: slower, never wrong.
"""

from __future__ import annotations

import mmap
import sys
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import islice
from threading import Lock

import torch

from .. import slab
from ..log import logger
from ..slab import align
from ..streams import Streams

STAGING_BYTES = 16 * 2**20  # one piece on its way while the next is filled: 55 GB/s need >= 16 MiB a copy
STAGING_SHARE = 8  # of a bound on host memory, one part at most is for staging
_PREPARED_AHEAD = 2  # units whose memory is made ready while another moves in
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for every device of the process


class _Mapping(mmap.mmap):
    """Anonymous private memory that unregisters itself from the device before it is unmapped."""

    registered_at: int | None = None

    def __del__(self) -> None:
        if self.registered_at is not None and not sys.is_finalizing():
            torch.cuda.cudart().cudaHostUnregister(self.registered_at)


@dataclass(frozen=True)
class HostMemory:
    """Bytes on the host: `bytes` is a uint8 tensor; `pinned` tells whether copies from it run alone."""

    bytes: torch.Tensor
    pinned: bool

    def views(self, layout: slab.Layout) -> list[torch.Tensor]:
        """What a unit's tensors look at while they are not on the device."""
        return slab.views(layout, self.bytes)


class PinnedTier:
    """Allocates host memory for one device and copies from it.

    Args:
        streams: the device's streams; nothing is pinned for the CPU.
    """

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._pins = streams.asynchronous
        self._giving_up = Lock()
        self._staging: list[tuple[torch.Tensor, object]] = []
        self._piece: int | None = None  # bytes of each of the two staging buffers; None: `STAGING_BYTES`

    def bound_staging(self, limit: int) -> int:
        """Let staging be small where little host memory may be taken; returns the bytes that it takes of `limit`."""
        total = staging_bytes(limit, self._streams.asynchronous)
        if total // 2 != self._piece:
            self._piece, self._staging = (
                total // 2,
                [],
            )  # the old buffers: torch frees them behind their copies
        return total

    @property
    def staged_bytes(self) -> int:
        """Bytes of the staging buffers."""
        return sum(buffer.numel() for buffer, _ in self._staging)

    def allocate(self, nbytes: int) -> HostMemory:
        """Host memory of `nbytes`, pinned if the device allows it."""
        if self._pins and self._streams.device.type != "cuda":
            return self._allocate_by_torch(nbytes)
        mapping, memory = map_memory(nbytes)
        if self._pins:
            memory[:: mmap.PAGESIZE].zero_()  # on all cores; the driver would fetch page after page on one
        pinned = self._pins and self._register(mapping, memory)
        return HostMemory(memory, pinned)

    def prepare(self, sizes: Sequence[int]) -> Iterator[HostMemory]:
        """Host memory of each size in turn; while one is filled, the next are made ready.

        The system hands pages out and the device pins them at a few GB/s: without this, weights would wait
        for memory longer than they take to move.
        """
        if not self._pins:
            yield from map(self.allocate, sizes)
            return
        rest = iter(sizes)
        pending: deque[Callable[[], HostMemory]] = deque()
        with ThreadPoolExecutor(_PREPARED_AHEAD) as pool:
            pending.extend(self.begin(pool, size) for size in islice(rest, _PREPARED_AHEAD))
            while pending:
                memory = pending.popleft()()
                pending.extend(self.begin(pool, size) for size in islice(rest, 1))
                yield memory

    def begin(self, pool: ThreadPoolExecutor, nbytes: int) -> Callable[[], HostMemory]:
        """Host memory of `nbytes` as soon as it is asked for; it is made ready meanwhile if a thread can be had."""
        if not self._pins:
            return partial(self.allocate, nbytes)
        try:
            return pool.submit(self.allocate, nbytes).result
        except RuntimeError:  # "can't start new thread"
            return partial(self.allocate, nbytes)

    def load(self, source: HostMemory, destination: torch.Tensor) -> None:
        """Queue the copy of `source` to `destination` (uint8, same length) on the current stream."""
        if source.pinned or not self._streams.asynchronous:
            destination.copy_(source.bytes, non_blocking=True)
        else:
            self._load_staged(source.bytes, destination)

    def _allocate_by_torch(self, nbytes: int) -> HostMemory:
        # No other device lets ordinary memory be registered; its pinned allocator may round the size up.
        try:
            return HostMemory(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True), True)
        except RuntimeError as error:
            self._give_up(error)
            return HostMemory(map_memory(nbytes)[1], False)

    def _register(self, mapping: _Mapping, memory: torch.Tensor) -> bool:
        with torch.cuda.device(self._streams.device):
            error = torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), len(mapping), _PORTABLE)
            if int(error) == 0:
                mapping.registered_at = memory.data_ptr()
                return True
            try:  # CUDA keeps the error until somebody asks: let that be us, not the user's next kernel
                torch.zeros(1, device=self._streams.device)
            except RuntimeError:
                pass
        self._give_up(error)
        return False

    def _give_up(self, reason: object) -> None:
        """From now on memory stays pageable: said once, since every later request would fail as well."""
        with self._giving_up:
            first, self._pins = self._pins, False
        if not first:
            return
        logger.warning(
            "host memory could not be pinned (%s): copying through a staging buffer of %d MiB instead, which "
            "is slower. Raise the limit on locked memory, or close programs that pin memory.",
            reason,
            2 * STAGING_BYTES // 2**20,
        )

    def _load_staged(self, source: torch.Tensor, destination: torch.Tensor) -> None:
        size = self._piece or STAGING_BYTES
        if not self._staging:
            try:
                buffers = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
            except RuntimeError:  # not even this much: the driver's own staging, which blocks the host
                destination.copy_(source)
                return
            self._staging = [(buffer, self._streams.event()) for buffer in buffers]
        stream = self._streams.current()
        for turn, start in enumerate(range(0, source.numel(), size)):
            buffer, copied = self._staging[turn % 2]
            self._streams.wait_for(copied, "the copy out of a staging buffer")  # which is filled anew
            piece = source[start : start + size]
            staged = buffer[: piece.numel()]
            staged.copy_(piece)
            destination[start : start + piece.numel()].copy_(staged, non_blocking=True)
            copied.record(stream)


def staging_bytes(limit: int, asynchronous: bool) -> int:
    """What pageable memory is copied through on its way to the device, of `limit` bytes of host memory.

    Two buffers of a power of two, as torch's pinned allocator makes them anyway.
    """
    if not asynchronous:
        return 0
    most = max(mmap.PAGESIZE, min(STAGING_BYTES, limit // STAGING_SHARE // 2))
    return 2 * 2 ** (most.bit_length() - 1)


def map_memory(nbytes: int) -> tuple[_Mapping, torch.Tensor]:
    """`nbytes` of zeros that go back to the system when the tensor goes, which torch's own, from malloc, may not."""
    length = align(max(nbytes, 1), mmap.PAGESIZE)
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        mapping = _Mapping(-1, length, **private)
    except (OSError, MemoryError) as error:
        raise MemoryError(
            f"the host has no {length} bytes for weights that leave the device ({error}): max_host_memory, or "
            "components={...: 'resident'}, keeps more of them there"
        ) from error
    if hasattr(mmap, "MADV_HUGEPAGE"):
        try:  # 512 times fewer page faults while the weights move in
            mapping.madvise(mmap.MADV_HUGEPAGE)
        except OSError:
            pass
    with torch.inference_mode(False):
        return mapping, torch.frombuffer(mapping, dtype=torch.uint8)[:nbytes]

"""Memory of the simulated device: real bytes of this process, handed out as torch's caching allocators do.

What is freed goes back to the stream that it was allocated on, and is reused by that stream at once, in its
order, without waiting for anybody else: whoever drops memory too early meets the next owner's bytes. What was recorded
on other streams (`Tensor.record_stream`) comes back once the host knows that they have done what they had to do then.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

ROUND = 512  # bytes, as torch's allocators round
POISON = 0xFF  # in fresh memory: NaN in all floating dtypes


@dataclass(eq=False)
class Block:
    """Bytes on the device, or pinned on the host (`owner` None)."""

    address: int
    nbytes: int
    owner: int | None
    array: np.ndarray  # keeps the bytes
    users: set[Any] = field(default_factory=set)  # other streams that it was recorded on

    def fill(self) -> None:
        self.array[:] = POISON


def make_block(nbytes: int, owner: int | None) -> Block:
    size = max(ROUND, -(-nbytes // ROUND) * ROUND)
    array = np.empty(size + ROUND, np.uint8)
    offset = -array.ctypes.data % ROUND
    array = array[offset : offset + size]
    return Block(array.ctypes.data, size, owner, array)


class Memory:
    """The allocator.

    Args:
        total: bytes that the device has.
        wait: called before memory goes back to the system; the device is idle afterwards.
        gone: called with the address of a block that went.
        done: called with a block that others used; returns what tells, when called, that they have done so.

    Attributes:
        live: blocks that somebody holds, by address.
        requests: allocations so far; `fails_at`: numbers of those that are refused.
        grown: how often the device had to be asked for more.
    """

    def __init__(
        self,
        total: int,
        wait: Callable[[], None],
        gone: Callable[[int], None],
        done: Callable[[Block], Callable[[], bool]],
    ) -> None:
        self.total = total
        self.live: dict[int, Block] = {}
        self.requests = self.grown = 0
        self.fails_at: set[int] = set()
        self.allocated = self.reserved = self.peak_allocated = self.peak_reserved = 0
        self._pools: dict[tuple[int, int], list[Block]] = {}
        self._wait = wait
        self._gone = gone
        self._done = done
        self._waiting: list[tuple[Block, Callable[[], bool]]] = []

    def allocate(self, nbytes: int, stream: int) -> Block:
        """Bytes for work on `stream`.

        Raises:
            torch.OutOfMemoryError: the device has no more, or this request is one of `fails_at`.
        """
        number, self.requests = self.requests, self.requests + 1
        size = max(ROUND, -(-nbytes // ROUND) * ROUND)
        if number in self.fails_at:
            raise torch.OutOfMemoryError(f"NPU out of memory (simulated): request {number}, {size} bytes")
        self._waiting = [(each, done) for each, done in self._waiting if not (done() and self._back(each))]
        pool = self._pools.get((stream, size))
        block = pool.pop() if pool else self._grow(size, stream)
        self.live[block.address] = block
        self.allocated += block.nbytes
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        return block

    def free(self, block: Block) -> None:
        self.allocated -= block.nbytes
        self.live.pop(block.address)
        if block.users:
            self._waiting.append((block, self._done(block)))
            block.users = set()
        else:
            self._back(block)

    def _back(self, block: Block) -> bool:
        self._pools.setdefault((block.owner, block.nbytes), []).append(block)
        return True

    def empty_cache(self) -> None:
        """Give back what is free; waits for the device."""
        self._wait()
        for block, _ in self._waiting:
            self._back(block)
        self._waiting = []
        for pool in self._pools.values():
            for block in pool:
                self.reserved -= block.nbytes
                self._gone(block.address)
        self._pools.clear()

    def reset_peaks(self) -> None:
        self.peak_allocated, self.peak_reserved = self.allocated, self.reserved

    def _grow(self, size: int, stream: int) -> Block:
        if self.reserved + size > self.total:
            self.empty_cache()
        if self.reserved + size > self.total:
            raise torch.OutOfMemoryError(
                f"NPU out of memory (simulated). Tried to allocate {size} bytes; {self.reserved} are in use."
            )
        self.grown += 1
        self.reserved += size
        self.peak_reserved = max(self.peak_reserved, self.reserved)
        return make_block(size, stream)

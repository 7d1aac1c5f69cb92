"""Host memory of the disk tier: which unit lies in which buffer, what is read into it next, and what gives way.

Some buffers are kept (`cache`); the others are slots that the remaining units pass through.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import slab
from ..log import logger
from .cache import Cache, CachePolicy, share_out
from .header import PAGE
from .mapped import DiskMemory
from .pinned import HostMemory, PinnedTier
from .reader import Read, Reader, ReaderCounters

if TYPE_CHECKING:
    from ..streams import Streams

Key = tuple[Path, int]


def room_for(nbytes: int) -> int:
    """Bytes of a buffer that a unit of `nbytes` is read into."""
    return slab.align(nbytes, PAGE)


class Buffer:
    """Host memory that holds a unit, or is being filled with it."""

    def __init__(self, memory: HostMemory, kept: bool) -> None:
        self.memory = memory
        self.kept = kept  # counted by the cache, not one of the slots
        self.pinned = kept  # the cache must not evict it: it is read, or copied to the device
        self.read: Read  # that fills it
        self.when = 0  # the load that is expected to use it first
        self.copied: Any = (
            None  # the event behind the copy to the device that was queued last: of bytes as they are
        )
        self.used = False  # since it was read

    def is_ready(self) -> bool:
        """Whether its unit has arrived."""
        return self.read.settled and not self.read.failed

    def has_failed(self) -> bool:
        """Whether its unit will not arrive."""
        return self.read.settled and self.read.failed

    def is_free(self, now: int) -> bool:
        """Whether its unit was used, or did not come when it was due, and nobody reads from it or writes to it."""
        if not self.read.settled:
            return False
        return self.copied.query() if self.used else self.when < now


class Buffers:
    """The buffers of one device, and the threads that fill them.

    Args:
        workers: threads that read.
        pinned: allocates the buffers and copies from them.
    """

    def __init__(self, streams: Streams, pinned: PinnedTier, workers: int) -> None:
        self._streams = streams
        self._pinned = pinned
        self._workers = workers
        self._reader: Reader | None = None
        self._cache = Cache(0)
        self._lying: dict[Key, Buffer] = {}
        self._slots: list[HostMemory] = []  # that no unit lies in
        self._spare: list[HostMemory] = []  # of units that were evicted, for others of their size
        self._lost: list[Buffer] = []  # that a disk which does not answer may still write to
        self._count = 0  # loads so far

    def assign(self, sizes: Mapping[Key, int], limit: int, policy: CachePolicy) -> None:
        """These are the units that stream, in order, with the bytes that each takes; what the host holds goes.

        Args:
            limit: bytes of host memory for buffers and staging.

        Raises:
            ValueError: a unit is larger than that; they come past the host memory until this is mended.
        """
        self._quiet(self._lying.values())
        counters = self._cache.counters
        self._lying, self._slots, self._spare, self._cache = {}, [], [], Cache(0)
        self._cache.count_on(counters)
        if not sizes:
            self._close()
            return
        shares = share_out(limit, list(sizes.values()), staging=self._pinned.bound_staging(limit))
        self._cache = Cache(shares.capacity, policy, sizes)
        self._cache.count_on(counters)
        self._slots = [self._allocate(shares.slot_bytes) for _ in range(shares.slots)]
        if self._reader is not None:
            self._reader.close_files()  # some may have been deleted: open, they would still take room

    def _close(self) -> None:
        if self._reader is not None:
            self._reader.close(wait=not self._lost)
            self._reader = None

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers, and of what pageable memory is copied through."""
        self._lost = [buffer for buffer in self._lost if not buffer.read.settled]
        buffers = [buffer.memory for buffer in (*self._lying.values(), *self._lost)]
        held = sum(memory.bytes.numel() for memory in (*buffers, *self._slots, *self._spare))
        return held + self._pinned.staged_bytes

    @property
    def cache(self) -> Cache:
        return self._cache

    def reader_counters(self) -> ReaderCounters:
        return self._reader.counters if self._reader is not None else ReaderCounters()

    def passing(self, hosts: Iterable[DiskMemory]) -> frozenset[Key]:
        """Of these units, those that are read for every use, when they are used in a cycle."""
        sizes = {host.key: room_for(host.bytes.numel()) for host in hosts if self.knows(host)}
        return self._cache.passing(sizes)

    @property
    def slots(self) -> int:
        """How many units that pass through can be in host memory at once."""
        return len(self._slots) + sum(not buffer.kept for buffer in self._lying.values())

    def knows(self, host: DiskMemory) -> bool:
        """Whether the unit is one of those that were assigned."""
        return host.key in self._cache.sizes

    def rename(self, before: DiskMemory, now: DiskMemory) -> None:
        """A unit of the same size has another file from now on."""
        self._cache.rename(before.key, now.key)

    def expect(self, coming: Iterable[HostMemory | None]) -> None:
        """Read ahead: these are used next, in this order, as far as there is room.

        Args:
            coming: None stands for what need not be read.
        """
        if len(self._lying) == len(self._cache.sizes):
            return
        for distance, host in enumerate(coming):
            if not isinstance(host, DiskMemory):
                continue
            buffer, when = self._lying.get(host.key), self._count + distance
            if buffer is None:
                if self._fetch(host, when) is None:
                    return
            elif not buffer.used:
                buffer.when = when
                buffer.read.hurry(when)

    def is_ready(self, host: DiskMemory) -> bool:
        """Whether `fetch` would not wait for the disk."""
        buffer = self._lying.get(host.key)
        return buffer is not None and buffer.is_ready()

    def fetch(self, host: DiskMemory) -> HostMemory:
        """Where the host has a unit that is about to be copied; waits for the disk if it has not been read.

        Raises:
            DiskReadError: it cannot be read.
            TimeoutError: the disk does not answer.
        """
        buffer = self._lying.get(host.key)
        if buffer is not None and buffer.has_failed():  # when it was read ahead: by now the file may be back
            self._drop(host.key, self._lying.pop(host.key))
            buffer = None
        if buffer is None:
            buffer = self._fetch(host, self._count) or self._fetch_at_once(host)
        if buffer is None:  # a stem, which streams past the cache
            return host.lying_in(host)
        try:
            buffer.read.wait()
        except BaseException:
            if buffer.read.settled:
                self._drop(host.key, self._lying.pop(host.key))
            raise
        self._count += 1
        if buffer.used:
            self._cache.wanted(host.key)
        else:
            self._cache.missed()
        if buffer.kept and not buffer.pinned:  # until the copy is done
            self._cache.pin(host.key)
            buffer.pinned = True
        return host.lying_in(buffer.memory)

    def loaded(self, host: DiskMemory, stream: Any) -> None:
        """The copy out of what `fetch` gave is queued on `stream`."""
        buffer = self._lying.get(host.key)
        if buffer is not None:
            if buffer.copied is None:
                buffer.copied = self._streams.event()
            buffer.copied.record(stream)
            buffer.used = True

    def forget(self, host: DiskMemory) -> None:
        """What the host holds of a unit is of no use any more."""
        buffer = self._lying.pop(host.key, None)
        if buffer is not None:
            self._quiet([buffer])
            self._drop(host.key, buffer)

    # --- one unit's way -------------------------------------------------------------------------------

    def _fetch(self, host: DiskMemory, when: int) -> Buffer | None:
        """Begin to read a unit, to be used at the `when`-th load; None if there is no room for it now."""
        buffer = self._room(host)
        if buffer is not None:
            self._begin(host, buffer, when)
        return buffer

    def _fetch_at_once(self, host: DiskMemory) -> Buffer | None:
        """The same for a unit that is needed now, whatever was read for later."""
        through = [(key, buffer) for key, buffer in self._lying.items() if not buffer.kept]
        if host.key not in self._cache.sizes or not through:
            return None
        key, buffer = max(through, key=lambda pair: (pair[1].used, pair[1].when))
        if not buffer.read.settled:
            buffer.read.cancel()
        self._wait_for_copy(buffer)
        del self._lying[key]
        self._slots.append(buffer.memory)
        return self._fetch(host, self._count)

    def _begin(self, host: DiskMemory, buffer: Buffer, when: int) -> None:
        if self._reader is None:
            self._reader = Reader(self._workers)
        try:
            buffer.when, buffer.read = when, self._reader.request(host.stored, buffer.memory.bytes, when)
        except BaseException:
            self._drop(host.key, buffer)
            raise
        self._lying[host.key] = buffer

    def _room(self, host: DiskMemory) -> Buffer | None:
        size = room_for(host.bytes.numel())
        if host.key not in self._cache.sizes:
            return None
        for key, buffer in self._lying.items():
            if buffer.kept and buffer.pinned and buffer.is_free(self._count):
                buffer.pinned = False
                self._cache.unpin(key)
        evicted = self._cache.admit(host.key, size)
        if evicted is not None:
            for key in evicted:
                self._spare.append(self._lying.pop(key).memory)
            try:
                memory = self._kept_memory(size)
            except BaseException:
                self._cache.forget(host.key)
                raise
            self._cache.pin(host.key)
            return Buffer(memory, kept=True)
        if not self._slots:
            lying = self._lying.items()
            free = next((k for k, b in lying if not b.kept and b.is_free(self._count)), None)
            if free is None:
                return None
            self._slots.append(self._lying.pop(free).memory)
        return Buffer(self._slots.pop(), kept=False)

    def _kept_memory(self, size: int) -> HostMemory:
        """For a unit that the cache has admitted."""
        fitting = next((each for each in self._spare if each.bytes.numel() == size), None)
        self._spare = [each for each in self._spare if each is not fitting]
        room = self._cache.capacity - self._cache.nbytes  # what is kept and what is spare must not exceed it
        while sum(each.bytes.numel() for each in self._spare) > room:
            self._spare.pop()
        return fitting or self._allocate(size)

    def _allocate(self, nbytes: int) -> HostMemory:
        memory = self._pinned.allocate(nbytes)
        if memory.bytes.data_ptr() % PAGE:  # O_DIRECT wants a page's beginning
            memory = self._pinned.allocate(nbytes + PAGE)
            start = -memory.bytes.data_ptr() % PAGE
            memory = HostMemory(memory.bytes[start : start + nbytes], memory.pinned)
        return memory

    # --- letting go -----------------------------------------------------------------------------------

    def _quiet(self, buffers: Iterable[Buffer]) -> None:
        """Nobody reads from the buffers or writes to them afterwards, but for those that are lost.

        A disk that does not answer is waited for once. What it may still write to is held on to until it has: here,
        so that it is counted, and by the thread that reads, so that it stays whatever becomes of this.
        """
        buffers = list(buffers)
        reading = [buffer for buffer in buffers if not buffer.read.settled]
        for buffer in reading:
            buffer.read.cancel(wait=False)
        late = _unsettled(reading)
        if late:
            self._lost += late
            logger.warning(
                "the disk does not answer: %d bytes of host memory, which it may still write to, are given back "
                "when it does (%s)",
                sum(buffer.memory.bytes.numel() for buffer in late),
                late[0].read.source.path,
            )
        for buffer in buffers:
            self._wait_for_copy(buffer)

    def _wait_for_copy(self, buffer: Buffer) -> None:
        if buffer.copied is not None:
            self._streams.wait_for(buffer.copied, "the copy out of a buffer of the disk tier")

    def _drop(self, key: Key, buffer: Buffer) -> None:
        """The buffer's unit is no longer there."""
        if buffer.kept:
            if buffer.pinned:
                self._cache.unpin(key)
            self._cache.forget(key)
        if buffer not in self._lost:
            (self._spare if buffer.kept else self._slots).append(buffer.memory)
        elif not buffer.kept:
            self._slots.append(self._allocate(buffer.memory.bytes.numel()))


def _unsettled(buffers: Sequence[Buffer]) -> list[Buffer]:
    """Those that are still written to after the time that a disk is given, which is one for all."""
    for buffer in buffers:
        try:
            buffer.read.cancel()
        except TimeoutError:
            return [each for each in buffers if not each.read.settled]
    return []

"""The disk tier: weights in block files, of which the host holds as much as it may.

Between its uses a unit's tensors look at a private mapping of its file, so whoever reads them finds true values and
only the page cache pays. What goes to the device takes another way: worker threads read it, past the page cache,
into pinned buffers, ahead of its use (`reader`); some buffers are kept (`cache`), the others are slots that the
remaining units pass through.
"""

from __future__ import annotations

import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from .. import slab
from ..report import DiskReport
from . import blockfile
from .blockfile import Part
from .cache import Cache, share_out
from .header import PAGE
from .mapped import DiskMemory, MappedPart, map_file, mapped_already, names_in
from .pinned import HostMemory, PinnedTier, map_memory
from .reader import Read, Reader
from .store import Store, file_name, identity_of

if TYPE_CHECKING:
    from ..component import Component, Unit
    from ..policy import Storage
    from ..streams import Streams

_SHARE = 0.5  # of the host memory that is available, where nobody has set a bound


class _Buffer:
    """Host memory that holds a unit, or is being filled with it."""

    def __init__(self, memory: HostMemory, kept: bool) -> None:
        self.memory = memory
        self.kept = kept  # counted by the cache, not one of the slots
        self.pinned = kept  # the cache must not evict it: it is read, or copied to the device
        self.read: Read | None = None
        self.copied: Any = None  # the event behind the copy to the device that was queued last
        self.used = False  # since it was read

    def is_ready(self) -> bool:
        """Whether its unit has arrived."""
        return self.read is not None and self.read.settled and not self.read.failed

    def is_free(self) -> bool:
        """Whether its unit was used, and nobody reads from it or writes to it any longer."""
        return self.used and (self.read is None or self.read.settled) and self.copied.query()


class DiskTier:
    """Keeps components on disk, for one device.

    Args:
        storage: the folder, how many threads read, and what is kept.
        limit: bytes of host memory for buffers; None: half of what the machine has available.
        pinned: allocates the buffers and copies from them.
    """

    def __init__(self, streams: Streams, storage: Storage, limit: int | None, pinned: PinnedTier) -> None:
        self._streams = streams
        self._storage = storage
        self._limit = limit
        self._pinned = pinned
        self._reader: Reader | None = None
        self._stores: dict[Component, list[Store]] = defaultdict(list)
        self._cache = Cache(0)
        self._lying: dict[tuple[Path, int], _Buffer] = {}
        self._slots: list[HostMemory] = []  # that no unit lies in
        self._spare: list[HostMemory] = []  # of units that were evicted, for others of their size
        self._count = 0  # loads so far

    # --- what is on disk ------------------------------------------------------------------------------

    def put(self, component: Component, units: Sequence[Unit]) -> Iterator[Unit]:
        """Write the weights of `units` to files that do not hold them yet, and let the tensors look at these.

        Raises:
            StoreError: the folder cannot be used, or has no room; what was written is gone again.
        """
        names = names_in(component.module)
        blocks: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            mapped = mapped_already(component.module, unit.weights, names)
            if mapped is not None:
                self._hold(component, mapped)
                unit.weights.stay_on_host(mapped.memory)
                yield unit
            else:
                blocks[unit.block].append(unit)
        if not blocks:
            return
        # Weights are known by what they are, not by what they are called: so all are looked at before one is written.
        digests, prints = {}, []
        for block, members in blocks.items():
            parts = [_part(unit, names) for unit in members]
            digests[block] = [blockfile.digest_of(part) for part in parts]
            prints.append((block, blockfile.plan(file_name(block), parts, digests[block]).fingerprint))
        store = Store(self._storage.directory, component.name, identity_of(prints), rebuild=True)
        self._stores[component].append(store)
        was_empty = not store.blocks()
        try:
            for block, members in blocks.items():
                file = store.put(block, [_part(unit, names) for unit in members], digests[block])
                for unit, memory in zip(members, map_file(file), strict=True):
                    unit.weights.move_to_host(memory, filled=True)
                    yield unit
            store.commit(list(blocks))
        except BaseException:
            if was_empty and not store.complete:
                shutil.rmtree(store.folder, ignore_errors=True)
            raise

    def _hold(self, component: Component, part: MappedPart) -> None:
        """Keep others from changing the files that a model was built on, and have a place for edits."""
        stores = self._stores[component]
        if all(store.identity != part.identity for store in stores):
            stores.append(Store(part.root, part.component, part.identity))

    def edit(self, unit: Unit, before: DiskMemory) -> None:
        """Write a unit's weights, which are others than the model's now, to a file of this process's own.

        Args:
            before: where they were.
        """
        component, names = unit.component, names_in(unit.component.module)
        members = [u for u in component.units if u.block == unit.block]
        members = [u for u in members if u is unit or isinstance(u.weights.host, DiskMemory)]
        self._forget(before)
        for store in reversed(self._stores[component]):
            if unit.block in store.blocks():
                file = store.edit(unit.block, [_part(each, names) for each in members])
                order = [part.name for part in file.parts]
                unit.weights.move_to_host(map_file(file)[order.index(unit.name)], filled=True)
                self._cache.sizes[unit.weights.host.key] = room_for(unit.nbytes)
                return
        unit.weights.move_to_host(self._pinned.allocate(unit.nbytes))

    def release(self, component: Component) -> None:
        """The component is offloaded no longer. The model's files stay, edited ones go."""
        for store in self._stores.pop(component, ()):
            store.close()

    def _forget(self, host: DiskMemory) -> None:
        """What the host holds of a unit is of no use any more."""
        buffer = self._lying.pop(host.key, None)
        if buffer is not None:
            self._quiet(buffer)
            self._drop(host.key, buffer)

    # --- what the host holds --------------------------------------------------------------------------

    def assign(self, units: Iterable[Unit]) -> None:
        """These are the units that stream, in order; what the host holds of others goes."""
        hosts = [unit.weights.host for unit in units if isinstance(unit.weights.host, DiskMemory)]
        for buffer in self._lying.values():
            self._quiet(buffer)
        self._lying, self._slots, self._spare = {}, [], []
        sizes = {host.key: room_for(host.bytes.numel()) for host in hosts}
        shares = share_out(self.limit, list(sizes.values())) if sizes else None
        counters = self._cache.counters
        self._cache = Cache(shares.capacity if shares else 0, self._storage.cache_policy, sizes)
        self._cache.count_on(counters)
        if shares:
            self._slots = [self._allocate(shares.slot_bytes) for _ in range(shares.slots)]
        if not sizes and self._reader is not None:
            self._reader.close()
            self._reader = None

    @property
    def limit(self) -> int:
        """Bytes of host memory that buffers may take."""
        return self._limit if self._limit is not None else int(available_memory() * _SHARE)

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        buffers = [buffer.memory for buffer in self._lying.values()]
        return sum(memory.bytes.numel() for memory in (*buffers, *self._slots, *self._spare))

    def report(self, stored_bytes: int) -> DiskReport:
        """What was done so far, for `stored_bytes` of weights."""
        cache, reader = self._cache.counters, self._reader.counters if self._reader is not None else None
        return DiskReport(
            stored_bytes=stored_bytes,
            buffer_bytes=self.held_bytes,
            hits=cache.hits,
            misses=cache.misses,
            evictions=cache.evictions,
            bytes_read=reader.bytes_read if reader else 0,
            read_seconds=reader.seconds if reader else 0.0,
            retries=reader.retries if reader else 0,
        )

    def expect(self, coming: Iterable[HostMemory | None]) -> None:
        """Read ahead: these are used next, in this order, as far as there is room."""
        for distance, host in enumerate(coming):
            if not isinstance(host, DiskMemory):
                continue
            buffer = self._lying.get(host.key)
            if buffer is None:
                if self._fetch(host, self._count + distance) is None:
                    return
            elif buffer.read is not None and not buffer.read.settled:
                buffer.read.hurry(self._count + distance)

    def is_ready(self, host: HostMemory | None) -> bool:
        """Whether `load` would not wait for the disk."""
        if not isinstance(host, DiskMemory):
            return True
        buffer = self._lying.get(host.key)
        return buffer is not None and buffer.is_ready()

    def load(self, host: DiskMemory, destination: torch.Tensor) -> None:
        """Queue the copy of a unit to the device; waits for the disk if it has not been read.

        Raises:
            DiskReadError: it cannot be read.
            TimeoutError: the disk does not answer.
        """
        buffer = self._lying.get(host.key)
        if buffer is not None and buffer.used:
            self._cache.wanted(host.key)
        if buffer is None:
            buffer = self._fetch(host, self._count) or self._fetch_at_once(host)
        if buffer is None:  # a stem, which streams past the cache
            self._pinned.load(HostMemory(host.bytes, False), destination)
            return
        try:
            buffer.read.wait()
        except BaseException:
            if buffer.read.settled:
                self._drop(host.key, self._lying.pop(host.key))
            raise
        self._count += 1
        self._pinned.load(
            HostMemory(buffer.memory.bytes[: destination.numel()], buffer.memory.pinned), destination
        )

    def loaded(self, host: DiskMemory, ready: Any) -> None:
        """The copy is queued, and `ready` recorded behind it."""
        buffer = self._lying.get(host.key)
        if buffer is not None:
            buffer.used, buffer.copied = True, ready

    # --- buffers --------------------------------------------------------------------------------------

    def _fetch(self, host: DiskMemory, when: int) -> _Buffer | None:
        """Begin to read a unit, to be used at the `when`-th load; None if there is no room for it now."""
        buffer = self._room(host)
        if buffer is not None:
            self._cache.missed()
            self._begin(host, buffer, when)
        return buffer

    def _fetch_at_once(self, host: DiskMemory) -> _Buffer | None:
        """The same for a unit that is needed now, whatever was read for later."""
        through = [(key, buffer) for key, buffer in self._lying.items() if not buffer.kept]
        if host.key not in self._cache.sizes or not through:
            return None
        key, buffer = next((pair for pair in through if pair[1].used), through[-1])
        self._quiet(buffer)
        del self._lying[key]
        self._slots.append(buffer.memory)
        return self._fetch(host, self._count)

    def _begin(self, host: DiskMemory, buffer: _Buffer, when: int) -> None:
        if self._reader is None:
            self._reader = Reader(self._storage.workers)
        self._lying[host.key] = buffer
        buffer.read = self._reader.request(host.stored, buffer.memory.bytes, when)

    def _room(self, host: DiskMemory) -> _Buffer | None:
        size = room_for(host.bytes.numel())
        if host.key not in self._cache.sizes:
            return None
        for key, buffer in self._lying.items():
            if buffer.kept and buffer.pinned and buffer.is_free():
                buffer.pinned = False
                self._cache.unpin(key)
        evicted = self._cache.admit(host.key, size)
        if evicted is not None:
            for key in evicted:
                self._spare.append(self._lying.pop(key).memory)
            self._cache.pin(host.key)
            return _Buffer(self._kept_memory(size), kept=True)
        if not self._slots:
            free = next((k for k, b in self._lying.items() if not b.kept and b.is_free()), None)
            if free is None:
                return None
            self._slots.append(self._lying.pop(free).memory)
        return _Buffer(self._slots.pop(), kept=False)

    def _kept_memory(self, size: int) -> HostMemory:
        for memory in self._spare:
            if memory.bytes.numel() == size:
                self._spare.remove(memory)
                return memory
        self._spare.clear()  # of other sizes: what is kept and what is spare must not exceed the cache
        return self._allocate(size)

    def _allocate(self, nbytes: int) -> HostMemory:
        memory = self._pinned.allocate(nbytes + PAGE)  # O_DIRECT wants a page's beginning
        start = -memory.bytes.data_ptr() % PAGE
        return HostMemory(memory.bytes[start : start + nbytes], memory.pinned)

    def _quiet(self, buffer: _Buffer) -> None:
        """Nobody reads from the buffer or writes to it afterwards."""
        if buffer.read is not None and not buffer.read.settled:
            buffer.read.cancel()
        if buffer.copied is not None:
            self._streams.wait_for(buffer.copied, "the copy out of a buffer of the disk tier")

    def _drop(self, key: tuple[Path, int], buffer: _Buffer) -> None:
        """The buffer's unit is no longer there."""
        if buffer.kept:
            if buffer.pinned:
                self._cache.unpin(key)
            self._cache.forget(key)
            self._spare.append(buffer.memory)
        else:
            self._slots.append(buffer.memory)


# --- parts and sizes ------------------------------------------------------------------------------------


def _part(unit: Unit, names: Mapping[int, str]) -> Part:
    """A unit's weights as its file holds them."""
    weights = unit.weights
    data = map_memory(weights.nbytes)[1]
    slab.gather(weights.layout, weights.tensors, data)
    return Part(unit.name, weights.layout, tuple(names[id(tensor)] for tensor in weights.tensors), data)


def room_for(nbytes: int) -> int:
    """Bytes of a buffer that a unit of `nbytes` is read into."""
    return slab.align(nbytes, PAGE)


def available_memory() -> int:
    """Bytes of host memory that this process may still take, by the system's word and its control group's."""
    bounds = [os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")]
    try:
        with open("/proc/meminfo") as lines:
            bounds += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
        limit = Path("/sys/fs/cgroup/memory.max").read_text().strip()
        if limit != "max":
            bounds.append(int(limit) - int(Path("/sys/fs/cgroup/memory.current").read_text()))
    except (OSError, ValueError):
        pass  # not every system has these
    return max(0, min(bounds))

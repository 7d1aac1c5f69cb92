"""The disk tier: weights in block files, of which the host holds as much as it may.

Between its uses a unit's tensors look at a private mapping of its file, so whoever reads them finds true values and
only the page cache pays. What goes to the device takes another way: worker threads read it, past the page cache,
into pinned buffers, ahead of its use (`reader`); some buffers are kept (`cache`), the others are slots that the
remaining units pass through.
"""

from __future__ import annotations

import mmap
import os
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import slab
from ..report import DiskReport
from . import blockfile
from .blockfile import Part
from .cache import Cache, share_out
from .header import PAGE
from .mapped import DiskMemory, MappedPart, map_file, map_part, mapped_already, names_in
from .pinned import HostMemory, PinnedTier, map_memory
from .reader import Read, Reader, ReaderCounters
from .store import Store, file_name, identity_of
from .traces import private_bytes

if TYPE_CHECKING:
    from ..component import Component, Unit
    from ..policy import Storage
    from ..streams import Streams

_SHARE = 0.5  # of the host memory that is available, where nobody has set a bound
_PATIENCE = 600.0  # seconds for another process that writes the same


class _Buffer:
    """Host memory that holds a unit, or is being filled with it."""

    def __init__(self, memory: HostMemory, kept: bool) -> None:
        self.memory = memory
        self.kept = kept  # counted by the cache, not one of the slots
        self.pinned = kept  # the cache must not evict it: it is read, or copied to the device
        self.read: Read  # that fills it
        self.when = 0  # the load that is expected to use it first
        self.copied: Any = None  # the event behind the copy to the device that was queued last
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
        self._units: list[Unit] = []  # that stream
        self._outgrown = False  # one of them has another size than the buffers were made for
        self._count = 0  # loads so far

    # --- what is on disk ------------------------------------------------------------------------------

    def put(self, component: Component, units: Sequence[Unit]) -> Iterator[Unit]:
        """Write the weights of `units` to files that do not hold them yet, and let the tensors look at these.

        Raises:
            StoreError: the folder cannot be used, or has no room; what was written is gone again.
        """
        names = names_in(component.module)
        private = private_bytes()  # what somebody wrote to a mapping is in no file
        blocks: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            mapped = mapped_already(component.module, unit.weights, names)
            if mapped is not None and not private.get(mapped.memory.bytes.untyped_storage().data_ptr()):
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
        store = Store(self._storage.directory, component.name, identity_of(prints), True, _PATIENCE)
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

    def edit(self, unit: Unit, before: HostMemory | None) -> None:
        """Write a unit's weights, which are others than the model's now, to a file of this process's own.

        Args:
            before: where they were on the host.
        """
        if isinstance(before, DiskMemory):
            self._forget(before)
        stores = reversed(self._stores[unit.component])
        store = next((each for each in stores if unit.block in each.blocks()), None)
        if store is None:
            unit.weights.move_to_host(self._pinned.allocate(unit.nbytes))
            return
        host = map_part(store.edit(unit.block, _part(unit, names_in(unit.component.module))))
        unit.weights.move_to_host(host, filled=True)
        same = isinstance(before, DiskMemory) and room_for(before.bytes.numel()) == room_for(unit.nbytes)
        if same and before.key in self._cache.sizes:
            self._cache.rename(before.key, host.key)
        elif unit in self._units:
            self._outgrown = True

    def silently_edited(self, units: Iterable[Unit]) -> list[Unit]:
        """Units whose bytes were written to by others than us, which the tensors may not have counted."""
        private = private_bytes()
        return [
            unit
            for unit in units
            if isinstance(unit.weights.host, DiskMemory)
            and private.get(unit.weights.host.bytes.untyped_storage().data_ptr(), 0)
            > mmap.PAGESIZE * len(unit.weights.written_pages(mmap.PAGESIZE))
        ]

    def pass_on(self, before: Component, after: Component) -> None:
        """`after` is the same module taken apart anew: some of its units are where those of `before` were."""
        self._stores[after] = self._stores.pop(before, [])

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
        """These are the units that stream, in order; what the host holds goes.

        Raises:
            ValueError: one of them is larger than all of the host memory; they come past it until that is mended.
        """
        self._units = list(units)
        hosts = [unit.weights.host for unit in self._units if isinstance(unit.weights.host, DiskMemory)]
        for buffer in self._lying.values():
            self._quiet(buffer)
        counters = self._cache.counters
        self._lying, self._slots, self._spare, self._cache = {}, [], [], Cache(0)
        self._cache.count_on(counters)
        sizes = {host.key: room_for(host.bytes.numel()) for host in hosts}
        shares = share_out(self.limit, list(sizes.values())) if sizes else None
        self._outgrown = False
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

    def reads(self, units: Sequence[Unit]) -> list[bool]:
        """Whether each of these is read from disk for every use, when they are used in a cycle."""
        hosts = [unit.weights.host for unit in units]
        sizes = {
            host.key: room_for(host.bytes.numel())
            for host in hosts
            if isinstance(host, DiskMemory) and host.key in self._cache.sizes
        }
        passing = self._cache.passing(sizes)
        return [isinstance(host, DiskMemory) and host.key in passing for host in hosts]

    @property
    def slots(self) -> int:
        """How many units that pass through can be in host memory at once."""
        return len(self._slots) + sum(not buffer.kept for buffer in self._lying.values())

    @property
    def read_so_far(self) -> tuple[int, float]:
        """(bytes read, seconds in which at least one thread was reading)."""
        counters = self._reader.counters if self._reader is not None else ReaderCounters()
        return counters.bytes_read, counters.seconds

    def expect(self, coming: Iterable[HostMemory | None]) -> None:
        """Read ahead: these are used next, in this order, as far as there is room.

        Args:
            coming: None stands for what need not be read.
        """
        self._keep_up()
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

    def is_ready(self, host: HostMemory | None) -> bool:
        """Whether `load` would not wait for the disk."""
        if not isinstance(host, DiskMemory):
            return True
        buffer = self._lying.get(host.key)
        return buffer is not None and buffer.is_ready()

    def fetch(self, host: DiskMemory) -> HostMemory:
        """Where the host has a unit that is about to be copied; waits for the disk if it has not been read.

        Raises:
            DiskReadError: it cannot be read.
            TimeoutError: the disk does not answer.
        """
        self._keep_up()
        buffer = self._lying.get(host.key)
        if buffer is not None and buffer.has_failed():  # when it was read ahead: by now the file may be back
            self._drop(host.key, self._lying.pop(host.key))
            buffer = None
        if buffer is None:
            buffer = self._fetch(host, self._count) or self._fetch_at_once(host)
        if buffer is None:  # a stem, which streams past the cache
            return HostMemory(host.bytes, False)
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
        return HostMemory(buffer.memory.bytes[: host.bytes.numel()], buffer.memory.pinned)

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
            self._begin(host, buffer, when)
        return buffer

    def _fetch_at_once(self, host: DiskMemory) -> _Buffer | None:
        """The same for a unit that is needed now, whatever was read for later."""
        through = [(key, buffer) for key, buffer in self._lying.items() if not buffer.kept]
        if host.key not in self._cache.sizes or not through:
            return None
        key, buffer = max(through, key=lambda pair: (pair[1].used, pair[1].when))
        self._quiet(buffer)
        del self._lying[key]
        self._slots.append(buffer.memory)
        return self._fetch(host, self._count)

    def _begin(self, host: DiskMemory, buffer: _Buffer, when: int) -> None:
        if self._reader is None:
            self._reader = Reader(self._storage.workers)
        try:
            buffer.when, buffer.read = when, self._reader.request(host.stored, buffer.memory.bytes, when)
        except BaseException:
            self._drop(host.key, buffer)
            raise
        self._lying[host.key] = buffer

    def _room(self, host: DiskMemory) -> _Buffer | None:
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
            return _Buffer(memory, kept=True)
        if not self._slots:
            lying = self._lying.items()
            free = next((k for k, b in lying if not b.kept and b.is_free(self._count)), None)
            if free is None:
                return None
            self._slots.append(self._lying.pop(free).memory)
        return _Buffer(self._slots.pop(), kept=False)

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

    def _keep_up(self) -> None:
        """If a unit has been edited into another size, share the memory out anew."""
        if self._outgrown:
            self.assign(self._units)

    def _quiet(self, buffer: _Buffer) -> None:
        """Nobody reads from the buffer or writes to it afterwards."""
        if not buffer.read.settled:
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

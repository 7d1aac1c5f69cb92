"""The disk tier: weights in block files, of which the host holds as much as it may.

Between its uses a unit's tensors look at a private mapping of its file (`files`), so whoever reads them finds true
values and only the page cache pays; those of a packed unit look at what stands in for them, as in the packed tier.
What goes to the device takes another way: worker threads read it, past the page cache, into pinned memory, ahead of its
use (`buffers`).
"""

from __future__ import annotations

import mmap
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..log import logger
from ..packing import unpacks_fast
from ..report import DiskReport
from .buffers import Buffers, room_for
from .files import Files
from .mapped import DiskMemory
from .packed import PackedMemory, PackedTier, Packer
from .pinned import HostMemory, PinnedTier, map_memory

if TYPE_CHECKING:
    from ..component import Component, Unit
    from ..policy import Storage
    from ..streams import Streams

_SHARE = 0.5  # of the host memory that is available, where nobody has set a bound


class DiskTier:
    """Keeps components on disk, for one device.

    Args:
        storage: the folder, how many threads read, and what is kept.
        limit: bytes of host memory for buffers; None: half of what the machine has available.
        pinned: allocates the buffers and copies from them.
        packed: unpacks what is packed in a file.
    """

    def __init__(
        self,
        streams: Streams,
        storage: Storage,
        limit: int | None,
        pinned: PinnedTier,
        packed: PackedTier,
    ) -> None:
        self._policy = storage.cache_policy
        self._limit = limit
        self._directory = storage.directory
        self._packed = packed
        fast = unpacks_fast(streams.device)
        self.packs = fast if storage.packs is None else storage.packs  # what is written
        self._files = Files(
            storage.directory, Packer(streams, fast, pinned) if self.packs else None, packed.raw
        )
        self._buffers = Buffers(streams, pinned, storage.workers)
        self._units: list[Unit] = []  # that stream
        self._outgrown = False  # one of them has another size than the buffers were made for

    # --- what is on disk ------------------------------------------------------------------------------

    def put(self, component: Component, units: Sequence[Unit]) -> Iterator[Unit]:
        """Write the weights of `units` to files that do not hold them yet, and let the tensors look at these.

        Raises:
            StoreError: the folder cannot be used, or has no room; what was written is gone again.
        """
        return self._files.put(component, units)

    def edit(self, unit: Unit, before: HostMemory | None, packs: bool = True) -> None:
        """Write a unit's weights, which are others than the model's now, to a file of this process's own.

        Args:
            before: where they were on the host.
            packs: they may be packed; otherwise they are going to be written to where they lie.
        """
        on_disk = isinstance(before, DiskMemory)
        if on_disk and before.is_edited:  # that file is going to be another one
            self._buffers.forget(before)
        host = self._files.edit(unit, packs)
        if on_disk and host.key == before.key and not before.is_edited:  # nothing was edited
            return
        if on_disk:
            self._buffers.forget(before)
        if isinstance(host, PackedMemory):
            self._packed.expect(host)
        room = room_for(host.bytes.numel())
        same = on_disk and room_for(before.bytes.numel()) == room
        if same and self._buffers.knows(before):
            self._buffers.rename(before, host)
        elif unit in self._units:
            self._outgrown = True

    def silently_edited(self, units: Iterable[Unit]) -> list[Unit]:
        """Units whose bytes were written to by others than us, which the tensors may not have counted."""
        return self._files.silently_edited(units)

    def pass_on(self, before: Component, after: Component) -> None:
        """`after` is the same module taken apart anew: some of its units are where those of `before` were."""
        self._files.pass_on(before, after)

    def release(self, component: Component) -> None:
        """The component is offloaded no longer. The model's files stay, those of what it had become go."""
        self._files.release(component)

    def spare_memory(self, nbytes: int) -> torch.Tensor:
        """Zeros (uint8) for a slab that is unpacked for a while: a file without a name where memory is short.

        All of a component may be unpacked at once, and it is on disk because the host cannot hold it.
        """
        if nbytes > available_memory() * _SHARE:
            try:
                with tempfile.TemporaryFile(dir=self._directory) as file:
                    os.posix_fallocate(
                        file.fileno(), 0, nbytes
                    )  # a hole that cannot be filled kills the process
                    mapping = mmap.mmap(file.fileno(), nbytes)
                with torch.inference_mode(False):
                    return torch.frombuffer(mapping, dtype=torch.uint8)
            except OSError as error:
                logger.warning(
                    "%s has no room for what is unpacked for a while (%s): it takes host memory",
                    self._directory,
                    error,
                )
        return map_memory(nbytes)[1]

    # --- what the host holds --------------------------------------------------------------------------

    def assign(self, units: Iterable[Unit]) -> None:
        """These are the units that stream, in order; what the host holds goes.

        Raises:
            ValueError: one of them is larger than all of the host memory; they come past it until that is mended.
        """
        self._units, self._outgrown = list(units), False
        hosts = [unit.weights.host for unit in self._units if isinstance(unit.weights.host, DiskMemory)]
        for host in hosts:
            if isinstance(host, PackedMemory):
                self._packed.expect(host)
        sizes = {host.key: room_for(host.bytes.numel()) for host in hosts}
        self._buffers.assign(sizes, self.limit if sizes else 0, self._policy)

    @property
    def limit(self) -> int:
        """Bytes of host memory that buffers may take."""
        return self._limit if self._limit is not None else int(available_memory() * _SHARE)

    @property
    def held_bytes(self) -> int:
        """Bytes of all buffers."""
        return self._buffers.held_bytes

    def report(self, stored_bytes: int) -> DiskReport:
        """What was done so far, for `stored_bytes` of weights."""
        cache, reader = self._buffers.cache.counters, self._buffers.reader_counters()
        return DiskReport(
            stored_bytes=stored_bytes,
            buffer_bytes=self.held_bytes,
            hits=cache.hits,
            misses=cache.misses,
            evictions=cache.evictions,
            bytes_read=reader.bytes_read,
            read_seconds=reader.seconds,
            retries=reader.retries,
        )

    def reads(self, units: Sequence[Unit]) -> list[bool]:
        """Whether each of these is read from disk for every use, when they are used in a cycle."""
        hosts = [unit.weights.host for unit in units]
        passing = self._buffers.passing([host for host in hosts if isinstance(host, DiskMemory)])
        return [isinstance(host, DiskMemory) and host.key in passing for host in hosts]

    @property
    def slots(self) -> int:
        """How many units that pass through can be in host memory at once."""
        return self._buffers.slots

    @property
    def read_so_far(self) -> tuple[int, float]:
        """(bytes read, seconds in which at least one thread was reading)."""
        counters = self._buffers.reader_counters()
        return counters.bytes_read, counters.seconds

    def expect(self, coming: Iterable[HostMemory | None]) -> None:
        """Read ahead: these are used next, in this order, as far as there is room.

        Args:
            coming: None stands for what need not be read.
        """
        self._keep_up()
        self._buffers.expect(coming)

    def is_ready(self, host: HostMemory | None) -> bool:
        """Whether `fetch` would not wait for the disk."""
        return not isinstance(host, DiskMemory) or self._buffers.is_ready(host)

    def fetch(self, host: DiskMemory) -> HostMemory:
        """Where the host has a unit that is about to be copied; waits for the disk if it has not been read.

        Raises:
            DiskReadError: it cannot be read.
            TimeoutError: the disk does not answer.
        """
        self._keep_up()
        return self._buffers.fetch(host)

    def loaded(self, host: DiskMemory, stream: Any) -> None:
        """The copy out of what `fetch` gave is queued on `stream`."""
        self._buffers.loaded(host, stream)

    def _keep_up(self) -> None:
        """If a unit has been edited into another size, share the memory out anew."""
        if self._outgrown:
            self.assign(self._units)


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

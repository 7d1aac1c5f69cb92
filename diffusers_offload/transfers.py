"""Moves units between host and device: all copies are queued, and all device memory is allocated, here.

Device memory is allocated on the load stream, and whoever drops it first lets that stream wait for its last
users: the allocator reuses memory in the order of the stream, so it cannot hand it out too early.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import TYPE_CHECKING, Any

import torch

from .component import State, Unit
from .planning.stopwatch import Stopwatch
from .report import Counters
from .slab import ALIGNMENT, plain_tensors
from .streams import Streams
from .tiers.disk import DiskTier
from .tiers.mapped import DiskMemory, unveil
from .tiers.packed import PackedTier
from .tiers.packedmemory import PackedMemory, RevealedMemory
from .tiers.pinned import HostMemory, PinnedTier
from .weights import Weights

if TYPE_CHECKING:
    from .policy import Storage


class Transfers:
    """Copies for one device.

    Args:
        streams: the device's streams.
        counters: what is moved is counted there.
        storage: where weights are kept on disk, if any are.
        host_limit: bytes of host memory that these may take meanwhile.
    """

    def __init__(
        self,
        streams: Streams,
        counters: Counters,
        storage: Storage | None = None,
        host_limit: int | None = None,
    ) -> None:
        self.tier = PinnedTier(streams)
        self.packed = PackedTier(streams, self.tier, counters, self.allocate)
        self.disk = None
        if storage is not None:
            self.disk = DiskTier(streams, storage, host_limit, self.tier, self.packed)
        self._streams = streams
        self._counters = counters
        self.stopwatch: Stopwatch | None = None  # times what is loaded, while there is one

    def allocate(self, nbytes: int) -> torch.Tensor:
        """Device memory (uint8) that belongs to the load stream.

        It does not begin where its storage does: torch.compile specialises on the storage offsets 0 and 1.
        """
        before = self._streams.switch(self._streams.load)
        try:
            with plain_tensors():
                return torch.empty(ALIGNMENT + nbytes, dtype=torch.uint8, device=self._streams.device)[
                    ALIGNMENT:
                ]
        finally:
            self._streams.restore(before)

    def load(self, unit: Unit, buffer: torch.Tensor, current: Any = None) -> None:
        """Queue the copy of `unit` to `buffer` and record its *ready* behind it.

        Args:
            current: the current stream, where the caller knows it: asking costs some microseconds.
        """
        streams, counters = self._streams, self._counters
        before = streams.switch(streams.load, current)
        try:
            unit.weights.place(buffer)  # on this stream: to torch's sanitizer, making views is writing
            host = unit.weights.host
            on_disk = isinstance(host, DiskMemory)
            source = self.disk.fetch(host) if on_disk else host
            if counters.timing:
                counters.depart(streams.load)
            began = self.stopwatch.departs(streams.load) if self.stopwatch is not None else None
            try:
                behind = self._queue(source, buffer)
            finally:  # of what failed half way, too, copies may be under way
                if on_disk:
                    self.disk.loaded(host, streams.load)
            if on_disk and unit.weights.written_bytes:
                if behind is not streams.load:
                    streams.load.wait_stream(behind)
                    behind = streams.load
                unit.weights.renew_written()
            unit.ready.record(behind)
            counters.loaded(unit, source.bytes.numel(), behind)
            if began is not None:
                self.stopwatch.copied(unit.nbytes, began, behind)
        except BaseException:
            streams.load.wait_stream(streams.unpack)  # which may be writing to it
            unit.weights.place(None)  # nobody else would let go of the buffer
            raise
        finally:
            streams.restore(before)
        unit.state = State.LOADING
        unit.used = False

    def _queue(self, source: HostMemory, buffer: torch.Tensor) -> Any:
        """Queue what brings `source` to `buffer`; returns the stream on which that ends."""
        if isinstance(source, PackedMemory):
            return self.packed.load(source, buffer)
        self.tier.load(source, buffer)
        return self._streams.load

    def put_each(self, units: Sequence[Unit]) -> Iterator[Unit]:
        """Move units to host memory, packed where their component wants that and they gain by it; stems are not.

        Yields each unit once it is there.
        """

        def packing() -> Iterator[Weights]:
            for unit in units:
                if unit.component.packs and unit.modules:
                    self.unveil(unit)
                    yield unit.weights

        with closing(self.packed.pack_each(packing())) as all_packed:
            for unit in units:
                packed = next(all_packed) if unit.component.packs and unit.modules else None
                self.unveil(unit)
                if packed is not None:
                    unit.weights.move_to_host(packed, filled=True)
                else:
                    unit.weights.move_to_host(self.tier.allocate(unit.nbytes))
                yield unit

    def reveal(self, unit: Unit) -> None:
        """The host holds the unit's weights as they are: before they go elsewhere, or somebody edits them."""
        host = unit.weights.host
        if isinstance(host, PackedMemory):
            veil = host if isinstance(host, DiskMemory) else None
            data = self.disk.spare_memory(unit.nbytes) if veil is not None else None
            revealed = RevealedMemory(self.packed.raw(host, unit.nbytes, data), False, veil)
            unit.weights.reveal(revealed, host.blank)

    def unveil(self, unit: Unit) -> None:
        """Before a unit is taken in: its tensors may look at what stands in for them in a packed file."""
        if unveil(unit.weights.tensors, self.packed.raw):
            unit.weights = renewed(unit.weights)

    def write_back(self, unit: Unit, changed: Sequence[int], behind: Any) -> None:
        """Copy tensors that the unit wrote to (a buffer, say) to the host, where readers look for them.

        This waits for the device: the host copy is readable at any time, so it must be right at once.

        Args:
            behind: the stream whose work so far includes the writing.
        """
        host = unit.weights.host
        if isinstance(host, PackedMemory) and any(host.is_blank(unit.weights.tensors[i]) for i in changed):
            # For good: what is written to again and again is not worth packing.
            if unit.component.on_disk:
                with torch._C.DisableTorchFunction():  # who watches the forward must not take this for a use
                    self.reveal(unit)
                    unit.weights.lay_out_anew()
                    self.disk.edit(unit, host, packs=False)
            else:
                memory = self.tier.allocate(unit.nbytes)
                memory.bytes.copy_(self.packed.raw(host, unit.nbytes))
                unit.weights.reveal(memory, host.blank)
        streams = self._streams
        streams.evict.wait_stream(behind)
        before = streams.switch(streams.evict)
        try:
            unit.weights.write_back(changed)
            self._counters.write_backs += len(changed)
            written = streams.event()
            written.record(streams.evict)
        finally:
            streams.restore(before)
        streams.wait_for(written, f"what {_path(unit)} wrote to its weights")

    def settle(self, unit: Unit) -> None:
        """Move a unit to the device, to stay there; the host keeps nothing of it."""
        streams = self._streams
        if any(tensor.device != streams.device for tensor in unit.weights.tensors):
            buffer = self.allocate(unit.nbytes)
            streams.load.wait_stream(streams.current())
            before = streams.switch(streams.load)
            try:
                unit.weights.move_to_device(buffer)
                unit.ready.record(streams.load)
            finally:
                streams.restore(before)
            # Where the tensors were may be reused by anybody afterwards.
            streams.wait_for(unit.ready, f"{_path(unit)} to move to the device")
        unit.state = State.RESIDENT

    def give_back(self, unit: Unit) -> None:
        """The unit's tensors have memory of their own again, on the devices that they came from."""
        self.reveal(unit)
        if unit.weights.host is None:  # it was never taken in: that failed
            self.unveil(unit)
        leaving = [tensor.data for tensor in unit.weights.tensors]
        unit.weights.restore()
        # Copies within the device are under way, and the next unit may be unpacked to where this one was.
        self._streams.load.wait_stream(self._streams.current())
        del leaving

    def take_over(self, unit: Unit) -> None:
        """Somebody gave the tensors other bytes (`tensor.data = ...`, `.to(dtype)`): these count now."""
        self._streams.synchronize(f"copies of {_path(unit)}, whose weights were replaced")
        unit.component.edited()
        self.reveal(unit)
        before, unit.weights = unit.weights.host, renewed(unit.weights)
        if isinstance(before, RevealedMemory) and before.veil is not None:
            before = before.veil
        if unit.component.on_disk:
            self.disk.edit(unit, before)
        else:
            for _ in self.put_each([unit]):
                pass


def _path(unit: Unit) -> str:
    return f"{unit.component.name}.{unit.name}" if unit.component is not None else unit.name


def renewed(weights: Weights) -> Weights:
    """The same tensors laid out anew, as they are now; where they came from is remembered."""
    fresh = Weights(weights.tensors, weights.writers)
    fresh.origin, fresh.moved = weights.origin, weights.moved
    return fresh

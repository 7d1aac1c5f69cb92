"""The packed tier: units in host memory without loss, in some 70 % of their bytes, unpacked on the device.

A unit comes in batches through a ring of staging slots: while one batch is unpacked, on a stream of its own, the next
one is on the bus. The ring has the same size whatever the units have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

import torch

from .. import slab
from ..packing import Packed, Piece, batches, pack, packer, prepare, unpack
from ..recovery import is_out_of_memory
from ..report import Counters
from ..slab import Layout
from ..streams import Streams
from .packedmemory import PackedMemory
from .packings import Packing
from .parts import Part, gather
from .pinned import HostMemory, PinnedTier, map_memory
from .standin import stand_in
from .traces import private_bytes

if TYPE_CHECKING:
    from ..component import Unit
    from ..weights import Weights

_T = TypeVar("_T")

SLOT_BYTES = 24 * 2**20  # of a batch at most: large enough for the bus, small enough to begin unpacking early
SMALLEST = packer.SMALLEST  # bytes of a tensor that is coded
SLOTS = 3  # one on the bus, one that is unpacked, one between them
_WORTH = 0.95  # of the bytes: a unit that does not shrink to this stays as it is


class Packer:
    """Packs slabs where that is fast.

    Args:
        on_device: whether that is the device; it is the host otherwise, or if the device has no room for it now.
    """

    def __init__(self, streams: Streams, on_device: bool) -> None:
        self._streams = streams
        self._on_device = on_device and streams.asynchronous

    def pack(
        self,
        layout: Layout,
        fill: Callable[[torch.Tensor], None],
        keep: Callable[[Packed], _T],
        data: torch.Tensor | None = None,
    ) -> _T | None:
        """What `keep` makes of the packed slab; None if it does not shrink, and so had better stay as it is.

        Args:
            fill: copies the slab into a buffer.
            data: where the host has it already.
        """
        streams = self._streams
        if self._on_device:
            try:
                streams.load.wait_stream(streams.current())
                with _on(streams, streams.load), torch.inference_mode(False):
                    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=streams.device)
                    fill(buffer)
                    return _pack(buffer, layout, keep)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        if data is None:
            data = map_memory(layout.nbytes)[1]
            fill(data)
        return _pack(data, layout, keep)

    def pack_part(self, part: Part, digest: str) -> Part:
        """The part with its slab packed, or as it is if that does not shrink.

        Args:
            digest: of its slab.
        """

        def keep(packed: Packed) -> Part:
            data = packed.bytes
            if data.device.type != "cpu":
                data = map_memory(packed.bytes.numel())[1]
                data.copy_(packed.bytes)
            return replace(part, data=data, packing=Packing(packed.pieces, digest))

        data = part.data if isinstance(part.data, torch.Tensor) else None
        return self.pack(part.layout, partial(gather, part), keep, data) or part


def _pack(buffer: torch.Tensor, layout: Layout, keep: Callable[[Packed], _T]) -> _T | None:
    packed = pack(buffer, layout, SLOT_BYTES, SMALLEST)
    return keep(packed) if 0 < packed.bytes.numel() <= layout.nbytes * _WORTH else None


def unpack_all(pieces: Sequence[Piece], source: torch.Tensor, destination: torch.Tensor) -> None:
    """Unpack a whole slab from its packed bytes, on the host."""
    for piece in pieces:
        unpack(piece, source[piece.source :], destination)


class _Slot:
    """Device memory for one batch.

    Attributes:
        copied: recorded when its batch has arrived.
        unpacked: recorded when it may be overwritten.
    """

    def __init__(self, memory: torch.Tensor, copied: Any, unpacked: Any) -> None:
        self.memory = memory
        self.copied = copied
        self.unpacked = unpacked
        self.used = False


class PackedTier:
    """Packs units, and unpacks them on one device.

    Args:
        pinned: allocates host memory and copies from it.
        counters: what is unpacked is timed there.
        allocate: device memory of so many bytes, of the load stream.
    """

    def __init__(
        self,
        streams: Streams,
        pinned: PinnedTier,
        counters: Counters,
        allocate: Callable[[int], torch.Tensor],
    ) -> None:
        self._streams = streams
        self._pinned = pinned
        self._counters = counters
        self._allocate = allocate
        self._packer = Packer(streams, True)
        self._slot_bytes = 0
        self._ring: list[_Slot] = []
        self._turn = 0

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring on the device."""
        return sum(slot.memory.numel() for slot in self._ring)

    def pack(self, weights: Weights) -> PackedMemory | None:
        """Pack tensors from where they are; None if they do not shrink, and so had better stay as they are."""

        def keep(packed: Packed) -> PackedMemory:
            memory = self._pinned.allocate(packed.bytes.numel())
            memory.bytes.copy_(packed.bytes)
            ranges = tuple(batches(packed.pieces, SLOT_BYTES))
            return PackedMemory(memory.bytes, memory.pinned, packed.pieces, stand_in(weights.nbytes), ranges)

        fill = partial(slab.gather, weights.layout, weights.tensors)
        found = self._packer.pack(weights.layout, fill, keep)
        if found is not None:
            self.expect(found)
        return found

    def expect(self, memory: PackedMemory) -> None:
        """It is going to be loaded: the slots of the ring suit it when they are made."""
        usual = min(SLOT_BYTES, memory.bytes.numel())  # of units of any size, most have a batch of about this
        self._slot_bytes = max(self._slot_bytes, usual, memory.largest_batch)

    def load(self, source: PackedMemory, destination: torch.Tensor) -> Any:
        """Queue the copy of a unit and its unpacking; returns the stream on which it ends.

        To be called with the load stream current, which everything that `destination` must wait for is before.
        """
        streams = self._streams
        if not streams.asynchronous:
            unpack_all(source.pieces, source.bytes, destination)
            return streams.load
        self._open_ring(source)
        for first, last in source.batches:
            slot, self._turn = self._ring[self._turn], (self._turn + 1) % SLOTS
            start, stop = (
                source.pieces[first].source,
                source.pieces[last - 1].source + source.pieces[last - 1].nbytes,
            )
            if slot.used:
                streams.load.wait_event(slot.unpacked)
            slot.used = True
            self._pinned.load(
                HostMemory(source.bytes[start:stop], source.pinned), slot.memory[: stop - start]
            )
            slot.copied.record(streams.load)
            streams.unpack.wait_event(slot.copied)
            with _on(streams, streams.unpack, streams.load), self._counters.timed_unpacking(streams.unpack):
                for piece in source.pieces[first:last]:
                    unpack(piece, slot.memory[piece.source - start :], destination)
                slot.unpacked.record(streams.unpack)
        return streams.unpack

    def raw(self, source: PackedMemory, nbytes: int, data: torch.Tensor | None = None) -> torch.Tensor:
        """The slab that a unit was packed from, in host memory of its own (uint8); waits for the device.

        Args:
            data: this memory (uint8, `nbytes` zeros).

        Raises:
            StoreError: its file holds something else by now.
        """
        data = map_memory(nbytes)[1] if data is None else data
        self._unpack_to(source.checked(), data)
        for (
            piece
        ) in source.pieces:  # of these the tensors look at the packed bytes themselves, which may be edited
            if piece.format is None:
                data[piece.start : piece.stop].copy_(source.bytes[piece.source :][: piece.nbytes])
        return data

    def _unpack_to(self, source: PackedMemory, data: torch.Tensor) -> None:
        streams = self._streams
        if streams.asynchronous:
            try:
                with _on(streams, streams.load):
                    buffer = self._allocate(data.numel())
                    behind = self.load(source, buffer)
                    streams.load.wait_stream(behind)
                    data.copy_(buffer)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        unpack_all(source.pieces, source.bytes, data)

    def refuse_edits(self, unit: Unit) -> None:
        """Raise RuntimeError if what stands in for packed weights was written to: that is lost."""
        host = unit.weights.host
        if isinstance(host, PackedMemory) and any(map(host.is_blank, unit.weights.edited())):
            unit.weights.note_edits()
            self._refuse(unit, host)

    def refuse_silent_edits(self, units: Iterable[Unit]) -> None:
        """The same for writes that no tensor counted (`weight.data.add_()`)."""
        packed = [unit for unit in units if isinstance(unit.weights.host, PackedMemory)]
        private = private_bytes() if packed else {}
        for unit in packed:
            if unit.weights.host.was_written_to(private):
                self._refuse(unit, unit.weights.host)

    def _refuse(self, unit: Unit, host: PackedMemory) -> NoReturn:
        unit.weights.stay_on_host(replace(host, blank=stand_in(unit.nbytes)))
        name = unit.component.name
        raise RuntimeError(
            f"the weights of {name}.{unit.name} were written to while they were packed, when NaN stands in for them "
            "on the host: the edit is lost, the true weights are as they were. Repeat it within `with "
            "pipe.block_offload.suspended():` (fuse_lora, too), or give this component tier='pinned', or "
            "pack_on_disk=False if it is on disk"
        )

    def close(self) -> None:
        """Nothing is packed any longer, or under way: the ring goes."""
        self._ring, self._slot_bytes, self._turn = [], 0, 0

    def _open_ring(self, source: PackedMemory) -> None:
        self.expect(source)  # of a file, what is unpacked before anything is known to stream
        if self._ring and self._ring[0].memory.numel() >= self._slot_bytes:
            return
        for slot in self._ring:
            self._streams.load.wait_event(slot.unpacked)
        self._ring = []
        prepare(self._streams.device, source.pieces)
        memories = [self._allocate(self._slot_bytes) for _ in range(SLOTS)]
        self._ring = [_Slot(memory, self._streams.event(), self._streams.event()) for memory in memories]
        self._turn = 0


@contextmanager
def _on(streams: Streams, stream: Any, current: Any = None) -> Iterator[None]:
    before = streams.switch(stream, current)
    try:
        yield
    finally:
        streams.restore(before)

"""The packed tier: units in host memory without loss, in some 70 % of their bytes, unpacked on the device.

A unit comes in batches through a ring of staging slots: while one batch is unpacked, on a stream of its own, the next
one is on the bus. The ring has the same size whatever the units have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .. import slab
from ..component import State
from ..packing import Packed, Piece, batches, pack, packer, prepare, unpack
from ..recovery import is_out_of_memory
from ..report import Counters
from ..slab import Layout
from ..streams import Streams
from .packedmemory import PackedMemory
from .packings import Packing
from .parts import Part, sources_of
from .pinned import HostMemory, PinnedTier, map_memory
from .standin import stand_in
from .traces import private_bytes

if TYPE_CHECKING:
    from ..component import Unit
    from ..weights import Weights

SLOT_BYTES = 32 * 2**20  # of a batch at most: large enough for the bus, small enough to begin unpacking early
SMALLEST = packer.SMALLEST  # bytes of a tensor that is coded
SLOTS = 3  # one on the bus, one that is unpacked, one between them
_REMEDY = (
    "Repeat it within `with pipe.block_offload.suspended():` (fuse_lora and fuse_qkv_projections, too), or give this "
    "component tier='pinned', or pack_on_disk=False if it is on disk"
)
_OTHER_NAN = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # what stands in would be a number to these
_WORTH = 0.95  # of the bytes: a unit that does not shrink to this stays as it is


class Packer:
    """Packs slabs where that is fast.

    Args:
        on_device: whether that is the device; it is the host otherwise, or if the device has no room for it now.
        pinned: copies from the host to the device.
    """

    def __init__(self, streams: Streams, on_device: bool, pinned: PinnedTier | None = None) -> None:
        self._streams = streams
        self._on_device = on_device and streams.asynchronous
        self._pinned = pinned or PinnedTier(streams)

    def pack(
        self, layout: Layout, sources: Sequence[torch.Tensor], whole: torch.Tensor | None = None
    ) -> Packed | None:
        """The packed slab, where it was packed; None if it does not shrink, and so had better stay as it is.

        Args:
            sources: the bytes of each of the layout's regions (uint8), wherever they lie.
            whole: the slab, where the host has it in one piece already.
        """
        if any(place.dtype in _OTHER_NAN for place in layout.placements):
            return None
        streams = self._streams
        if self._on_device:
            try:
                streams.load.wait_stream(streams.current())
                with _on(streams, streams.load), torch.inference_mode(False):
                    buffer = torch.empty(layout.nbytes, dtype=torch.uint8, device=streams.device)
                    try:
                        self._gathered(layout, sources, buffer)
                    finally:  # the sources' memory may go, or be reused, as soon as this returns
                        copied = streams.event()
                        copied.record(streams.load)
                        streams.wait_for(copied, "weights that are packed")
                    return _pack(buffer, layout)
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        if whole is None:
            whole = self._gathered(layout, sources, map_memory(layout.nbytes)[1])
        return _pack(whole, layout)

    def pack_part(self, part: Part, digest: str) -> Part:
        """The part with its slab packed, or as it is if that does not shrink.

        Args:
            digest: of its slab.
        """
        whole = part.data if isinstance(part.data, torch.Tensor) else None
        packed = self.pack(part.layout, sources_of(part), whole)
        if packed is None:
            return part
        data = packed.bytes
        if data.device.type != "cpu":
            data = map_memory(packed.bytes.numel())[1]
            with _on(self._streams, self._streams.load):
                data.copy_(packed.bytes)
        return replace(part, data=data, packing=Packing(packed.pieces, digest))

    def _gathered(
        self, layout: Layout, sources: Sequence[torch.Tensor], buffer: torch.Tensor
    ) -> torch.Tensor:
        for region, source in zip(layout.regions, sources, strict=True):
            target = buffer[region.offset : region.offset + region.nbytes]
            if source.device.type == "cpu" and buffer.device.type != "cpu":
                # Through staging of ours if it is pageable: faster than the driver's own.
                self._pinned.load(HostMemory(source, source.is_pinned()), target)
            else:
                target.copy_(source)
        return buffer


def _pack(buffer: torch.Tensor, layout: Layout) -> Packed | None:
    packed = pack(buffer, layout, SLOT_BYTES, SMALLEST)
    return packed if 0 < packed.bytes.numel() <= layout.nbytes * _WORTH else None


def unpack_all(pieces: Sequence[Piece], source: torch.Tensor, destination: torch.Tensor) -> None:
    """Unpack a whole slab from its packed bytes, on the host."""
    unpack(pieces, source[pieces[0].source if pieces else 0 :], destination)


def ring_bytes(units: Iterable[int]) -> int:
    """Bytes of the ring on the device, for packed units of so many bytes."""
    return SLOTS * min(SLOT_BYTES, max(units, default=0))


def _lost_edit(unit: Unit, private: Mapping[int, int]) -> bool:
    """Whether what stands in for weights of the unit was written to, or read to replace some."""
    weights, host = unit.weights, unit.weights.host
    if host.was_written_to(private) or any(map(host.is_blank, weights.edited())):
        return True
    return any(_holds_nan(tensor) for tensor in weights.replaced() if not host.is_blank(tensor))


def _holds_nan(tensor: torch.Tensor) -> bool:
    if tensor.is_meta or not (tensor.is_floating_point() or tensor.is_complex()):
        return False
    values = tensor.detach()
    return bool((values.float() if values.element_size() == 1 else values).isnan().any())


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
        self._packer = Packer(streams, True, pinned)
        self._slot_bytes = 0
        self._ring: list[_Slot] = []
        self._turn = 0

    @property
    def staging_bytes(self) -> int:
        """Bytes of the ring on the device."""
        return sum(slot.memory.numel() for slot in self._ring)

    def pack(self, weights: Weights) -> PackedMemory | None:
        """Pack tensors from where they are; None if they do not shrink, and so had better stay as they are.

        This is done on the device, or on the host if the device has no room for them now.
        """
        (packed,) = self.pack_each([weights])
        return packed

    def pack_each(self, several: Iterable[Weights]) -> Iterator[PackedMemory | None]:
        """The same for several, one after the other; while one is packed, memory for the one before is made ready."""
        with ThreadPoolExecutor(1) as pool:
            before: Callable[[], PackedMemory | None] | None = None
            for weights in several:
                packed = self._pack(weights)
                memory = self._pinned.begin(pool, packed.bytes.numel()) if packed is not None else None
                if before is not None:
                    yield before()
                before = partial(self._keep, packed, weights.nbytes, memory)
            if before is not None:
                yield before()

    def _pack(self, weights: Weights) -> Packed | None:
        return self._packer.pack(weights.layout, slab.sources(weights.layout, weights.tensors))

    def _keep(
        self, packed: Packed | None, nbytes: int, memory: Callable[[], HostMemory] | None
    ) -> PackedMemory | None:
        if packed is None:
            return None
        host = memory()
        with _on(self._streams, self._streams.load):
            host.bytes.copy_(packed.bytes)
        ranges = tuple(batches(packed.pieces, SLOT_BYTES))
        found = PackedMemory(host.bytes, host.pinned, packed.pieces, stand_in(nbytes), ranges)
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
        for at in range(0, len(source.copies), SLOTS):  # by rings, so that streams are switched less often
            slots = self._ring[self._turn :] + self._ring[: self._turn]
            turns = list(zip(slots, source.copies[at : at + SLOTS], strict=False))
            self._turn = (self._turn + len(turns)) % SLOTS
            for slot, (packed, _) in turns:
                if slot.used:
                    streams.load.wait_event(slot.unpacked)
                slot.used = True
                self._pinned.load(packed, slot.memory[: packed.bytes.numel()])
                slot.copied.record(streams.load)
            with _on(streams, streams.unpack, streams.load):
                for slot, (_, batch) in turns:
                    streams.unpack.wait_event(slot.copied)
                    with self._counters.timed_unpacking(streams.unpack):
                        unpack(batch, slot.memory, destination)
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
        # Of what is not coded the tensors look at the packed bytes themselves, which may be edited.
        for piece in source.pieces:
            if piece.format is None:
                data[piece.start : piece.stop].copy_(source.bytes[piece.source :][: piece.nbytes])
        return data

    def _unpack_to(self, source: PackedMemory, data: torch.Tensor) -> None:
        streams = self._streams
        if streams.asynchronous:
            try:
                with _on(streams, streams.load):
                    buffer = self._allocate(data.numel())
                    try:
                        self.load(source, buffer)
                    finally:  # however far it came: the buffer goes
                        streams.load.wait_stream(streams.unpack)
                    data.copy_(buffer)
                return
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        unpack_all(source.pieces, source.bytes, data)

    def refuse_edits(self, units: Iterable[Unit], silent: bool = True) -> None:
        """Raise RuntimeError if what stands in for packed weights was written to, or new weights computed from it.

        That is lost: all of these units have their true weights again. To be called before anything else is done
        with the true weights, or nobody would hear of it.

        Args:
            silent: find writes that no tensor counted (`weight.data.add_()`), too. Takes milliseconds.
        """
        packed = [unit for unit in units if isinstance(unit.weights.host, PackedMemory)]
        private = private_bytes() if silent and packed else {}
        lost = [unit for unit in packed if unit.state is not State.IN_USE and _lost_edit(unit, private)]
        if not lost:
            return
        for unit in lost:
            unit.weights.stay_on_host(replace(unit.weights.host, blank=stand_in(unit.nbytes)))
        name = lost[0].component.name
        rest = len(lost) - 1
        more = f" and of {rest} more unit{'s' if rest > 1 else ''}" if rest else ""
        raise RuntimeError(
            f"the weights of {name}.{lost[0].name}{more} were edited while they were packed, when NaN stands in for "
            f"them on the host: the edit is lost, the true weights are as they were. {_REMEDY}"
        )

    def refuse_copies(self, names: Mapping[str, torch.Tensor]) -> None:
        """Raise RuntimeError if one of these new weights, by name, was computed from what stands in."""
        for name, tensor in names.items():
            if _holds_nan(tensor):
                raise RuntimeError(
                    f"{name} is new and holds NaN, which stands in on the host for weights that are packed: it was "
                    f"computed from these. {_REMEDY}"
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

"""The packed tier: units in host memory without loss, in some 70 % of their bytes, unpacked on the device.

A unit comes in batches through a ring of staging slots: while one batch is unpacked, on a stream of its own, the next
one is on the bus. The ring has the same size whatever the units have.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from .. import slab
from ..component import State
from ..packing import Packed, Piece, batches, pack, packer, prepare, unpack
from ..recovery import is_out_of_memory
from ..report import Counters
from ..slab import Layout, Placement
from ..streams import Streams
from .pinned import HostMemory, PinnedTier, map_memory
from .standin import stand_in
from .traces import private_bytes

if TYPE_CHECKING:
    from ..component import Unit
    from ..weights import Weights

SLOT_BYTES = 24 * 2**20  # of a batch at most: large enough for the bus, small enough to begin unpacking early
SMALLEST = packer.SMALLEST  # bytes of a tensor that is coded
SLOTS = 3  # one on the bus, one that is unpacked, one between them
_REMEDY = (
    "Repeat it within `with pipe.block_offload.suspended():` (fuse_lora and fuse_qkv_projections, too), or give this "
    "component tier='pinned'"
)
_OTHER_NAN = (torch.float8_e4m3fnuz, torch.float8_e5m2fnuz)  # what stands in would be a number to these
_WORTH = 0.95  # of the bytes: a unit that does not shrink to this stays as it is


@dataclass(frozen=True, eq=False)
class PackedMemory(HostMemory):
    """A unit's packed bytes.

    Attributes:
        pieces: what of the slab lies where among the bytes.
        blank: stands in for the slab.
        batches: ranges of pieces that are copied at once.
    """

    pieces: tuple[Piece, ...]
    blank: torch.Tensor
    batches: tuple[tuple[int, int], ...]

    def views(self, layout: Layout) -> list[torch.Tensor]:
        """What the unit's tensors look at: NaN, but true values where the packed bytes hold them as they are."""
        plain = _joined(piece for piece in self.pieces if piece.format is None)
        found = slab.views(layout, self.blank)
        for index, place in enumerate(layout.placements):
            piece = _holding(plain, layout, place)
            if piece is not None:
                there = replace(place, offset=place.offset - piece.start + piece.source)
                (found[index],) = slab.views(Layout((there,), (), 0), self.bytes)
        return found

    def is_blank(self, tensor: torch.Tensor) -> bool:
        """Whether `tensor` looks at what stands in for its values."""
        return tensor.untyped_storage().data_ptr() == self.blank.untyped_storage().data_ptr()

    def was_written_to(self, private: Mapping[int, int]) -> bool:
        """Whether somebody wrote to what stands in.

        Args:
            private: what `traces.private_bytes` said.
        """
        start = self.blank.data_ptr()
        stop = start + self.blank.numel()
        return any(nbytes for at, nbytes in private.items() if start <= at < stop)


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


def _joined(plain: Iterable[Piece]) -> list[Piece]:
    """Pieces that lie one behind the other, in the slab and among the packed bytes, as one."""
    joined: list[Piece] = []
    for piece in plain:
        last = joined[-1] if joined else None
        if last is not None and (last.stop, last.source + last.nbytes) == (piece.start, piece.source):
            joined[-1] = replace(last, stop=piece.stop)
        else:
            joined.append(piece)
    return joined


def _holding(plain: Sequence[Piece], layout: Layout, place: Placement) -> Piece | None:
    """The piece that holds all of the region in which a tensor lies, at an address that suits any dtype."""
    for region in layout.regions:
        start, stop = region.offset, region.offset + region.nbytes
        if start <= place.offset < stop:
            for piece in plain:
                if piece.start <= start and stop <= piece.stop and not (piece.source - piece.start) % 16:
                    return piece
    return None


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

    def pack_each(self, several: Sequence[Weights]) -> Iterator[PackedMemory | None]:
        """The same for several, one after the other; while one is packed, memory for the one before is made ready."""
        with ThreadPoolExecutor(1) as pool:
            before: Callable[[], PackedMemory | None] | None = None
            for weights in several:
                packed = self._pack(weights)
                keep = partial(self._keep, packed, weights.nbytes, self._begin(pool, packed, weights.nbytes))
                if before is not None:
                    yield before()
                before = keep
            if before is not None:
                yield before()

    def _pack(self, weights: Weights) -> Packed | None:
        if any(tensor.dtype in _OTHER_NAN for tensor in weights.tensors):
            return None
        try:
            self._streams.load.wait_stream(self._streams.current())
            with self._on(self._streams.load):
                return self._pack_in(weights, self._allocate(weights.nbytes))
        except RuntimeError as error:
            if not (self._streams.asynchronous and is_out_of_memory(error)):
                raise
        return self._pack_in(weights, map_memory(weights.nbytes)[1])

    def _pack_in(self, weights: Weights, buffer: torch.Tensor) -> Packed:
        regions = weights.layout.regions
        for region, source in zip(regions, slab.sources(weights.layout, weights.tensors), strict=True):
            target = buffer[region.offset : region.offset + region.nbytes]
            if source.device.type == "cpu" and self._streams.asynchronous:
                self._pinned.load(HostMemory(source, False), target)  # faster than the driver's own staging
            else:
                target.copy_(source)
        return pack(buffer, weights.layout, SLOT_BYTES, SMALLEST)

    def _begin(
        self, pool: ThreadPoolExecutor, packed: Packed | None, nbytes: int
    ) -> Callable[[], HostMemory] | None:
        if packed is None:
            return None
        size = packed.bytes.numel()
        return self._pinned.begin(pool, size) if size <= nbytes * _WORTH else None

    def _keep(
        self, packed: Packed | None, nbytes: int, memory: Callable[[], HostMemory] | None
    ) -> PackedMemory | None:
        if memory is None:
            return None
        host, size = memory(), packed.bytes.numel()
        with self._on(self._streams.load):
            host.bytes.copy_(packed.bytes)
        ranges = batches(packed.pieces, SLOT_BYTES)
        self._slot_bytes = max(self._slot_bytes, min(SLOT_BYTES, size))
        return PackedMemory(host.bytes, host.pinned, packed.pieces, stand_in(nbytes), tuple(ranges))

    def load(self, source: PackedMemory, destination: torch.Tensor) -> Any:
        """Queue the copy of a unit and its unpacking; returns the stream on which it ends.

        To be called with the load stream current, which everything that `destination` must wait for is before.
        """
        streams = self._streams
        if not streams.asynchronous:
            for piece in source.pieces:
                unpack(piece, source.bytes[piece.source :], destination)
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
            with self._on(streams.unpack, streams.load), self._counters.timed_unpacking(streams.unpack):
                for piece in source.pieces[first:last]:
                    unpack(piece, slot.memory[piece.source - start :], destination)
                slot.unpacked.record(streams.unpack)
        return streams.unpack

    def raw(self, source: PackedMemory, nbytes: int) -> torch.Tensor:
        """The slab that a unit was packed from, in host memory of its own (uint8); waits for the device."""
        data = map_memory(nbytes)[1]
        if self._streams.asynchronous:
            try:
                with self._on(self._streams.load):
                    buffer = self._allocate(nbytes)
                    try:
                        self.load(source, buffer)
                    finally:  # however far it came: the buffer goes
                        self._streams.load.wait_stream(self._streams.unpack)
                    data.copy_(buffer)
                return data
            except RuntimeError as error:
                if not is_out_of_memory(error):
                    raise
        for piece in source.pieces:
            unpack(piece, source.bytes[piece.source :], data)
        return data

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
    def _on(self, stream: Any, current: Any = None) -> Iterator[None]:
        before = self._streams.switch(stream, current)
        try:
            yield
        finally:
            self._streams.restore(before)

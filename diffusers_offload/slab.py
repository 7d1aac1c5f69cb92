"""A unit's tensors in one flat byte buffer: the layout, and the way there and back.

A *region* is a contiguous range of bytes of one source storage. Tensors whose ranges overlap share a
region, so tied tensors, slices of one storage (`full[::2]`) and expanded tensors are stored once and keep
their strides and their aliasing. Regions start at multiples of `ALIGNMENT` in the slab.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

ALIGNMENT = 256  # what the allocators of torch give: kernels choose their path by alignment
SMALL = 128 * 1024  # bytes; a device takes as long to begin a copy, or a kernel, as the bus for 300 KiB
_SOURCE_ALIGNMENT = 16  # a region keeps its tensors' alignment up to one vector load


def align(nbytes: int, to: int = ALIGNMENT) -> int:
    """`nbytes` rounded up to a multiple of `to`."""
    return -(-nbytes // to) * to


@dataclass(frozen=True)
class Span:
    """Bytes `start` (included) to `stop` (excluded) of the storage called `storage`."""

    storage: int
    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start


def overlap(a: Span, b: Span) -> bool:
    """Whether two spans share a byte."""
    return a.storage == b.storage and a.start < b.stop and b.start < a.stop


@dataclass(frozen=True)
class Region:
    """Where a range of a storage lies in the slab, in bytes."""

    span: Span
    offset: int

    @property
    def nbytes(self) -> int:
        return self.span.stop - self.span.start


@dataclass(frozen=True)
class Placement:
    """Where one tensor lies in the slab: `offset` in bytes, `stride` in elements."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    stride: tuple[int, ...]


@dataclass(frozen=True)
class Layout:
    """One `Placement` per tensor, in the order given, and the regions that hold them; `nbytes` in all."""

    placements: tuple[Placement, ...]
    regions: tuple[Region, ...]
    nbytes: int


def arrange(spans: Sequence[Span]) -> tuple[Region, ...]:
    """Merge the spans that overlap and lay the results out one behind the other, aligned.

    Small regions come first, so that they can be copied at once where the others are not copied but unpacked; among
    each, the order is that in which their first span was given.
    """
    merged: list[list[int | Span]] = []  # [rank of the first span given, union so far]
    order = sorted(range(len(spans)), key=lambda i: (spans[i].storage, spans[i].start, spans[i].stop))
    for rank in order:
        span = spans[rank]
        if span.start == span.stop:
            continue
        last = merged[-1][1] if merged else None
        if last is not None and last.storage == span.storage and span.start < last.stop:
            merged[-1] = [min(merged[-1][0], rank), Span(last.storage, last.start, max(last.stop, span.stop))]
        else:
            merged.append([rank, span])
    regions, offset = [], 0
    for _, span in sorted(merged, key=lambda pair: (pair[1].nbytes >= SMALL, pair[0])):
        regions.append(Region(span, offset))
        offset = align(offset + span.stop - span.start)
    return tuple(regions)


def span_of(tensor: torch.Tensor) -> Span:
    """The bytes of its storage that `tensor` reaches; its start is rounded down to keep its alignment."""
    storage = storage_of(tensor)
    size = tensor.element_size()
    start = tensor.storage_offset() * size
    if tensor.numel() == 0:
        return Span(storage, start, start)
    reach = 1 + sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return Span(storage, start - start % _SOURCE_ALIGNMENT, start + reach * size)


def storage_of(tensor: torch.Tensor) -> int:
    """A number that tells storages apart: the address of the bytes, or of the object where there are none.

    All tensors on the meta device have the address 0; those that are views of one another share the object.
    """
    storage = tensor.untyped_storage()
    return storage.data_ptr() or storage._cdata


def lay_out(tensors: Sequence[torch.Tensor]) -> Layout:
    """Lay tensors of any dtype and stride out in one slab."""
    regions = arrange([span_of(tensor) for tensor in tensors])
    placements = []
    for tensor in tensors:
        start = tensor.storage_offset() * tensor.element_size()
        home = _region_holding(span_of(tensor), regions)
        offset = home.offset + start - home.span.start if home else 0
        placements.append(Placement(offset, tensor.dtype, tuple(tensor.shape), tensor.stride()))
    nbytes = align(regions[-1].offset + regions[-1].nbytes) if regions else 0
    return Layout(tuple(placements), regions, nbytes)


def _region_holding(span: Span, regions: Sequence[Region]) -> Region | None:
    for region in regions:
        held = region.span
        if held.storage == span.storage and held.start <= span.start and span.stop <= held.stop:
            return region
    return None


def plain_tensors() -> AbstractContextManager[object]:
    """Tensors made within are plain ones even under `torch.inference_mode()`: they are used again outside.

    To leave that mode where it is not on takes time all the same, and this is done for each unit that is loaded.
    """
    return torch.inference_mode(False) if torch.is_inference_mode_enabled() else nullcontext()


def views(layout: Layout, buffer: torch.Tensor) -> list[torch.Tensor]:
    """The tensors of `layout` as views of `buffer` (uint8, at least `layout.nbytes` long)."""
    with plain_tensors():
        return [_view(place, buffer) for place in layout.placements]


def _view(place: Placement, buffer: torch.Tensor) -> torch.Tensor:
    if 0 in place.shape:
        return torch.empty_strided(place.shape, place.stride, dtype=place.dtype, device=buffer.device)
    typed = torch.empty(0, dtype=place.dtype, device=buffer.device)
    offset = (buffer.storage_offset() + place.offset) // place.dtype.itemsize
    return typed.set_(buffer.untyped_storage(), offset, place.shape, place.stride)


def gather(layout: Layout, tensors: Sequence[torch.Tensor], buffer: torch.Tensor) -> None:
    """Copy the regions that `tensors` lie in into `buffer`, which may be on another device."""
    for region, source in zip(layout.regions, sources(layout, tensors), strict=True):
        buffer[region.offset : region.offset + region.nbytes].copy_(source)


def sources(layout: Layout, tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The bytes of each region of `layout` (uint8), where `tensors` have them: nothing is copied."""
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage() for tensor in tensors}
    return [_bytes(storages[region.span.storage], region.span) for region in layout.regions]


def separate(tensors: Sequence[torch.Tensor], devices: Sequence[torch.device]) -> list[torch.Tensor]:
    """Copies of `tensors` on `devices`, each region in a storage of its own: what `gather` took apart.

    Aliasing and strides stay. Tensors that share a region must name the same device.
    """
    regions = arrange([span_of(tensor) for tensor in tensors])
    owned: dict[Region, torch.Tensor] = {}
    copies = []
    with plain_tensors():
        for tensor, device in zip(tensors, devices, strict=True):
            region = _region_holding(span_of(tensor), regions)
            if region is None:
                copies.append(
                    torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=device)
                )
                continue
            if region not in owned:
                owned[region] = _bytes(tensor.untyped_storage(), region.span).to(device, copy=True)
            offset = tensor.storage_offset() * tensor.element_size() - region.span.start
            place = Placement(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
            copies.append(_view(place, owned[region]))
    return copies


def _bytes(storage: torch.UntypedStorage, span: Span) -> torch.Tensor:
    with plain_tensors():
        raw = torch.empty(0, dtype=torch.uint8, device=storage.device)
        return raw.set_(storage, span.start, (span.stop - span.start,), (1,))


def why_not(tensor: torch.Tensor) -> str | None:
    """Why `tensor` cannot be laid out in a slab, or None if it can."""
    if tensor.is_meta:
        return "is on the meta device: load its weights first"
    if torch.utils._python_dispatch.is_traceable_wrapper_subclass(tensor):
        return f"is a {type(tensor).__name__}, which holds inner tensors: quantised weights are not supported"
    if getattr(tensor, "quant_state", None) is not None or hasattr(tensor, "SCB"):
        return (
            f"is a {type(tensor).__name__} with its state outside the tensor: bitsandbytes is not supported"
        )
    if tensor.layout is not torch.strided or tensor.is_quantized:
        return f"has the layout {tensor.layout}: only dense strided tensors are supported"
    if tensor.is_conj() or tensor.is_neg():
        return "is a lazily conjugated or negated view: call resolve_conj() / resolve_neg() on it first"
    return None

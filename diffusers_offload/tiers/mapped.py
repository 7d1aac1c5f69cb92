"""Tensors that look at block files: private mappings, which cost no memory that the system could not take back.

Tensors of a packed part look at what stands in for them, since nobody else could read the packed bytes. Whoever does
not take them as they are, a whole part at a time, has to ask for their true values first (`unveil`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .. import slab
from ..packing import batches
from . import blockfile, packed
from .blockfile import BlockFile, Stored, StoredPart, StoreError
from .packed import unpack_all
from .packedmemory import PackedMemory
from .pinned import HostMemory, map_memory
from .standin import keep_with, kept_with, stand_in
from .store import EDITED, Store

Unpacks = Callable[[PackedMemory, int], torch.Tensor]


@dataclass(frozen=True, eq=False)
class DiskMemory(HostMemory):
    """A unit's bytes in its file: `bytes` is a private mapping of them, never pinned."""

    stored: Stored

    @property
    def key(self) -> tuple[Path, int]:
        return self.stored.path, self.stored.offset

    def lying_in(self, memory: HostMemory) -> HostMemory:
        """What is read from the file, at the beginning of `memory`."""
        return HostMemory(memory.bytes[: self.bytes.numel()], memory.pinned)

    @property
    def is_edited(self) -> bool:
        """Whether the file holds what became of weights while they were offloaded."""
        return self.stored.path.name.startswith(EDITED)


@dataclass(frozen=True, eq=False)
class PackedDiskMemory(PackedMemory, DiskMemory):
    """A unit's packed bytes in its file."""

    def __post_init__(self) -> None:
        if self.blank.numel():
            hidden = replace(self, blank=self.blank[:0].clone())
            keep_with(self.blank, Veil(hidden, self.blank.data_ptr(), self.blank.numel()))

    def lying_in(self, memory: HostMemory) -> HostMemory:
        found = memory.bytes[: self.bytes.numel()]
        return PackedMemory(found, memory.pinned, self.pieces, self.blank, self.batches)

    def checked(self) -> PackedMemory:
        """The bytes that were written, wherever they are found.

        Raises:
            StoreError: nowhere.
        """
        memory = HostMemory(self.bytes, False)
        try:
            blockfile.check(self.stored, memory.bytes)
        except StoreError:  # somebody wrote to the mapping, or to the file
            memory = HostMemory(map_memory(self.bytes.numel())[1], False)
            blockfile.read(self.stored, memory.bytes)
        return self.lying_in(memory)


def map_part(part: StoredPart) -> DiskMemory:
    """A private mapping of a part's bytes: writing to it changes these bytes alone.

    It is nobody else's: of two pipelines with the same weights one may be edited.
    """
    stored = part.stored
    with blockfile.opened(stored.path) as handle:
        size = os.fstat(handle).st_size
    with torch.inference_mode(False):
        file = torch.from_file(str(stored.path), shared=False, size=size, dtype=torch.uint8)
        found = file[stored.offset : stored.offset + stored.nbytes]
        if part.packing is None:
            return DiskMemory(found, False, stored)
        pieces, blank = part.packing.pieces, stand_in(part.layout.nbytes)
        return PackedDiskMemory(
            found, False, stored, pieces, blank, tuple(batches(pieces, packed.SLOT_BYTES))
        )


def map_file(file: BlockFile) -> list[DiskMemory]:
    """The same for each part of a file.

    Raises:
        StoreError: the file is gone.
    """
    return [map_part(part) for part in file.parts]


# --- what stands in for packed weights ----------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Veil:
    """How to find the true values of tensors that look at what stands in for them.

    It is there for as long as they look there, also if taking their component in has failed and no unit has them.

    Attributes:
        memory: the packed part; its own `blank` is empty.
        start: address of what stands in, of `nbytes` bytes.
    """

    memory: PackedDiskMemory
    start: int
    nbytes: int


def veil_of(tensor: torch.Tensor) -> Veil | None:
    """The packed part of a file that `tensor` does not show; None if it has true values."""
    return kept_with(tensor)


def unpack_on_host(memory: PackedMemory, nbytes: int) -> torch.Tensor:
    """The slab (uint8) that a part was packed from, in host memory of its own; as `PackedTier.raw`.

    Raises:
        StoreError: its file holds something else by now.
    """
    data = map_memory(nbytes)[1]
    source = memory.checked()
    unpack_all(source.pieces, source.bytes, data)
    return data


def unveil(tensors: Iterable[torch.Tensor], raw: Unpacks = unpack_on_host) -> dict[int, torch.Tensor]:
    """Let tensors that look at what stands in for them look at their true values, in host memory.

    Args:
        raw: unpacks a slab.

    Returns:
        What they looked at, by the tensor's id, but for those that had true values.

    Raises:
        StoreError: a file holds something else by now.
    """
    slabs: dict[Veil, torch.Tensor] = {}
    before: dict[int, torch.Tensor] = {}
    for tensor in tensors:
        veil = veil_of(tensor)
        if veil is None:
            continue
        if veil not in slabs:
            slabs[veil] = raw(veil.memory, veil.nbytes)
        offset = tensor.data_ptr() - veil.start
        place = slab.Placement(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
        before[id(tensor)] = tensor.data
        (tensor.data,) = slab.views(slab.Layout((place,), (), 0), slabs[veil])
    return before


@contextmanager
def unveiled(tensors: Iterable[torch.Tensor], raw: Unpacks = unpack_on_host) -> Iterator[bool]:
    """The same for as long as this lasts; tells whether there was anything to do."""
    tensors = list(tensors)
    before = unveil(tensors, raw)
    try:
        yield bool(before)
    finally:
        for tensor in tensors:
            if id(tensor) in before:
                tensor.data = before[id(tensor)]


# --- models that were built on files ------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class MappedPart:
    """A part of a block file that a model was built on (`from_pretrained`).

    Attributes:
        root, component, identity: of the store that the file belongs to.
    """

    memory: DiskMemory
    layout: slab.Layout
    names: tuple[str, ...]
    root: Path
    component: str
    identity: str


_parts_of_models: WeakKeyDictionary[torch.nn.Module, dict[str, MappedPart]] = WeakKeyDictionary()


def build_on(module: torch.nn.Module, store: Store, offload_dir: Path, folder: str) -> None:
    """Let all weights of `module` look at the files of `store`, whatever they look at now.

    Args:
        offload_dir, folder: that the store was opened with.

    Raises:
        StoreError: they hold others than the module has; nothing has changed.
    """
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    tensors = dict(reversed(named))
    found: dict[str, MappedPart] = {}
    missing = {id(tensor): name for name, tensor in tensors.items()}
    for block in store.blocks():
        file = store.get(block)
        for part, memory in zip(file.parts, map_file(file), strict=True):
            for name, place in zip(part.names, part.layout.placements, strict=True):
                tensor = tensors.get(name)
                if tensor is None or (tensor.dtype, tuple(tensor.shape)) != (place.dtype, place.shape):
                    what = f"{type(module).__name__} has no {name!r} of {place.dtype} and {place.shape}"
                    raise StoreError(blockfile.unusable(file.path, what))
                missing.pop(id(tensor), None)
            found[part.names[0]] = MappedPart(
                memory, part.layout, part.names, offload_dir, folder, store.identity
            )
    if missing:
        raise StoreError(blockfile.unusable(store.folder, f"it has no {next(iter(missing.values()))!r}"))
    for part in found.values():
        for name, view in zip(part.names, part.memory.views(part.layout), strict=True):
            tensors[name].data = view
    _parts_of_models[module] = found


def mapped_already(module: torch.nn.Module, weights: Any, names: Mapping[int, str]) -> MappedPart | None:
    """The part of a block file that the tensors look at, if it has just their layout."""
    first = names.get(id(weights.tensors[0])) if weights.tensors else None
    found = _parts_of_models.get(module, {}).get(first)
    return found if found is not None and _looks_at(weights, found, names) else None


def _looks_at(weights: Any, part: MappedPart, names: Mapping[int, str]) -> bool:
    places = part.layout.placements
    return (
        tuple(names[id(tensor)] for tensor in weights.tensors) == part.names
        and weights.nbytes == part.layout.nbytes
        and weights.layout.placements == places
        and all(
            t.device.type == "cpu" and (not t.numel() or t.data_ptr() == view.data_ptr())
            for t, view in zip(weights.tensors, part.memory.views(part.layout), strict=True)
        )
    )


def names_in(module: torch.nn.Module) -> dict[int, str]:
    """The first name of each tensor in `module`, by the tensor's id."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {id(tensor): name for name, tensor in reversed(named)}

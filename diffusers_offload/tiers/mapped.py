"""Tensors that look at block files: private mappings, which cost no memory that the system could not take back."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

import torch

from .. import slab
from . import blockfile
from .blockfile import BlockFile, Stored, StoreError
from .pinned import HostMemory
from .store import EDITED, Store


@dataclass(frozen=True, eq=False)
class DiskMemory(HostMemory):
    """A unit's bytes in its file: `bytes` is a private mapping of them, never pinned."""

    stored: Stored

    @property
    def key(self) -> tuple[Path, int]:
        return self.stored.path, self.stored.offset

    @property
    def is_edited(self) -> bool:
        """Whether the file holds what became of weights while they were offloaded."""
        return self.stored.path.name.startswith(EDITED)


def map_part(stored: Stored) -> DiskMemory:
    """A private mapping of a part's bytes: writing to it changes these bytes alone.

    It is nobody else's: of two pipelines with the same weights one may be edited.
    """
    with blockfile.opened(stored.path) as handle:
        size = os.fstat(handle).st_size
    with torch.inference_mode(False):
        file = torch.from_file(str(stored.path), shared=False, size=size, dtype=torch.uint8)
        return DiskMemory(file[stored.offset : stored.offset + stored.nbytes], False, stored)


def map_file(file: BlockFile) -> list[DiskMemory]:
    """The same for each part of a file.

    Raises:
        StoreError: the file is gone.
    """
    return [map_part(part.stored) for part in file.parts]


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
        for name, view in zip(part.names, slab.views(part.layout, part.memory.bytes), strict=True):
            tensors[name].data = view
    _parts_of_models[module] = found


def mapped_already(module: torch.nn.Module, weights: Any, names: Mapping[int, str]) -> MappedPart | None:
    """The part of a block file that the tensors look at, if it has just their layout."""
    first = names.get(id(weights.tensors[0])) if weights.tensors else None
    found = _parts_of_models.get(module, {}).get(first)
    return found if found is not None and _looks_at(weights, found, names) else None


def _looks_at(weights: Any, part: MappedPart, names: Mapping[int, str]) -> bool:
    base = part.memory.bytes.data_ptr()
    places = part.layout.placements
    return (
        tuple(names[id(tensor)] for tensor in weights.tensors) == part.names
        and weights.nbytes == part.layout.nbytes
        and weights.layout.placements == places
        and all(
            t.device.type == "cpu" and (not t.numel() or t.data_ptr() == base + p.offset)
            for t, p in zip(weights.tensors, places, strict=True)
        )
    )


def names_in(module: torch.nn.Module) -> dict[int, str]:
    """The first name of each tensor in `module`, by the tensor's id."""
    named = (*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False))
    return {id(tensor): name for name, tensor in reversed(named)}

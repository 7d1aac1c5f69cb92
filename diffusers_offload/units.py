"""Finds what can be moved in any module: its blocks, and the stem that is left.

No class is known here. A block list is a `ModuleList` whose elements all have parameters and a forward of
their own, and are made of several parts; lists inside a block (a feed-forward's layers, experts) stay
with the block. A list of *stages* (a UNet's down blocks: few, large, made of block lists) is descended
into, so that units stay small beside the model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import slab

_STAGE_SHARE = 1 / 16  # of the component's bytes: from here on an element is worth splitting
_STAGE_COVERAGE = 0.5  # of the element's bytes that must lie in block lists of its own


@dataclass(frozen=True)
class Block:
    """A module that moves as a whole, under its name in the component, and its tensors."""

    name: str
    module: nn.Module
    tensors: tuple[torch.Tensor, ...]


@dataclass(frozen=True)
class Anatomy:
    """A component taken apart: its blocks in declared order, and the tensors that lie in none."""

    blocks: tuple[Block, ...]
    stem: tuple[torch.Tensor, ...]


def dissect(module: nn.Module, blocks: Sequence[nn.Module] | None = None) -> Anatomy:
    """Take `module` apart into blocks and stem.

    Tensors that more than one block holds, or a block and the stem, belong to the stem.

    Args:
        blocks: the blocks to use, modules within `module`; found by themselves if None.

    Raises:
        ValueError: one of `blocks` does not belong to `module`.
    """
    elements = list(_blocks(module)) if blocks is None else _named(module, blocks)
    holders: dict[object, int] = {}
    for index, (_, block) in enumerate(elements):
        for tensor in tensors_of(block):
            key = _identity(tensor)
            holders[key] = index if holders.get(key, index) == index else -1
    inside = {id(part) for _, block in elements for part in block.modules()}
    outside = [part for part in module.modules() if id(part) not in inside]
    for part in outside:
        for tensor in own_tensors(part):
            holders[_identity(tensor)] = -1
    found = []
    for name, block in elements:
        tensors = tuple(t for t in tensors_of(block) if holders[_identity(t)] != -1)
        if tensors:
            found.append(Block(name, block, tensors))
    stem = tuple(t for t in tensors_of(module) if holders[_identity(t)] == -1)
    return Anatomy(tuple(found), stem)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The distinct parameters and buffers of `module` and what it holds, in declared order."""
    return list({id(t): t for part in module.modules() for t in own_tensors(part)}.values())


def chunks(tensors: Sequence[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    """Split `tensors` into groups of about `limit` bytes; tensors that share a storage stay together."""
    groups: list[list[torch.Tensor]] = []
    group_of: dict[int, list[torch.Tensor]] = {}
    size = limit
    for tensor in tensors:
        storage = tensor.untyped_storage().data_ptr()
        if storage and storage in group_of:
            group_of[storage].append(tensor)
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        group_of[storage] = groups[-1]
        size += nbytes
    return groups


def own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers that `module` itself holds, not its children's."""
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same bytes seen the same way."""
    span = slab.span_of(tensor)
    return id(tensor) if span.start == span.stop else (span, tensor.dtype, tensor.stride())


def _named(module: nn.Module, blocks: Sequence[nn.Module]) -> list[tuple[str, nn.Module]]:
    names = {id(part): name for name, part in module.named_modules()}
    if any(id(block) not in names for block in blocks):
        raise ValueError("the blocks given do not belong to the model: pass a ModuleList of its own")
    return [(names[id(block)], block) for block in blocks]


def _blocks(module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    seen: set[int] = set()
    for name, block in _walk(module, "", _nbytes(module) * _STAGE_SHARE):
        if id(block) not in seen:
            seen.add(id(block))
            yield name, block


def _walk(module: nn.Module, prefix: str, large: float) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}{name}"
        if not _is_block_list(child):
            yield from _walk(child, f"{path}.", large)
            continue
        for number, element in child.named_children():
            if _nbytes(element) >= large and _is_stage(element):
                yield from _walk(element, f"{path}.{number}.", large)
            else:
                yield f"{path}.{number}", element


def _is_block_list(module: nn.Module) -> bool:
    if not isinstance(module, nn.ModuleList) or not len(module):
        return False
    elements = [element for element in module if element is not None]  # a UNet's mid block may hold None
    return (
        bool(elements)
        and all(_has_forward(element) and _nbytes(element) for element in elements)
        and any(_parts(element) > 1 for element in elements)
    )


def _is_stage(element: nn.Module) -> bool:
    held = sum(_nbytes(block) for _, block in _walk(element, "", float("inf")))
    return held > _STAGE_COVERAGE * _nbytes(element)


def _has_forward(module: nn.Module) -> bool:
    return getattr(type(module), "forward", None) is not nn.Module.forward and not isinstance(
        module, (nn.ModuleList, nn.ModuleDict)
    )


def _parts(module: nn.Module) -> int:
    """How many modules within hold parameters of their own."""
    return sum(1 for part in module.modules() if any(p is not None for p in part._parameters.values()))


def _nbytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())

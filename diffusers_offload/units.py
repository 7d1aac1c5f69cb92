"""Finds what can be moved in any module: blocks, their phases, single leaves, and the stem that is left.

No class is known here. A block list is a `ModuleList` whose elements all have parameters and a forward of
their own, and are made of several parts; lists inside a block (a feed-forward's layers, experts) stay
with the block. A list of *stages* (a UNet's down blocks: few, large, made of block lists) is descended
into, so that units stay small beside the model. A block's *phases* are its children: attentions,
feed-forwards, norms with their modulation. *Leaves* are the modules that hold weights and have no parts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from . import slab

FUSED = (
    nn.MultiheadAttention,
    nn.TransformerEncoderLayer,
)  # may run as one kernel, past their parts' forwards

_STAGE_SHARE = 1 / 16  # of the component's bytes: from here on an element is worth splitting
_STAGE_COVERAGE = 0.5  # of the element's bytes that must lie in block lists of its own
_COPY = 4 * 2**20  # bytes from which on a copy runs at the bus's rate: smaller neighbours travel together
_COPY_SHARE = 1 / 8  # of the largest part: a small model's neighbours stay apart
_TINY_SHARE = 1 / 1024  # of the largest part: below, what leaves the device is not worth the copy
_AT_HAND = 2**16  # bytes up to which a tensor that is read between forwards may stay


@dataclass(frozen=True)
class Part:
    """What moves as a whole.

    Attributes:
        name: its path in the component.
        modules: those whose forwards use the tensors.
        tensors: what moves.
        opener: the block that holds some of the tensors itself, so that they are in use from the beginning
            of its forward; None if there is none.
        block: the path of the block that it is a part of, or its own.
    """

    name: str
    modules: tuple[nn.Module, ...]
    tensors: tuple[torch.Tensor, ...]
    opener: nn.Module | None = None
    block: str = ""


@dataclass(frozen=True)
class Anatomy:
    """A component taken apart: its parts in declared order, and the tensors that lie in none.

    Attributes:
        reasons: for each tensor of the stem, why it is there.
    """

    parts: tuple[Part, ...]
    stem: tuple[torch.Tensor, ...]
    reasons: tuple[str, ...]


@dataclass(frozen=True)
class Findings:
    """What running a component taught about it, which its structure does not tell.

    Attributes:
        bypassed: modules whose weights are used without their forward, though by forwards within.
        strays: ids of tensors that are used outside the forward of the module that holds them.
    """

    bypassed: frozenset[nn.Module] = frozenset()
    strays: frozenset[int] = frozenset()


def dissect(
    module: nn.Module,
    granularity: str = "block",
    blocks: Sequence[nn.Module] | None = None,
    findings: Findings | None = None,
) -> Anatomy:
    """Take `module` apart into parts and stem.

    Tensors that more than one part holds, or a part and the stem, belong to the stem.

    Args:
        granularity: what a part is: "block", "phase" or "leaf".
        blocks: the blocks to use, modules within `module`; found by themselves if None.
        findings: what earlier forwards have shown.

    Raises:
        ValueError: one of `blocks` does not belong to `module`.
    """
    findings = findings or Findings()
    named = list(_blocks(module)) if blocks is None else _named(module, blocks)
    drafts = [draft for name, block in named for draft in _drafts(name, block, granularity, findings)]
    if granularity != "block":
        drafts = _join_small([*drafts, *_outer_leaves(module, named, granularity)])
    return _divide(module, [block for _, block in named], drafts, findings)


def tensors_of(module: nn.Module) -> list[torch.Tensor]:
    """The distinct parameters and buffers of `module` and what it holds, in declared order."""
    return list({id(t): t for part in module.modules() for t in own_tensors(part)}.values())


def own_tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    """The parameters and buffers that `module` itself holds, not its children's."""
    for held in (module._parameters, module._buffers):
        yield from (tensor for tensor in held.values() if tensor is not None)


def at_hand(module: nn.Module) -> list[torch.Tensor]:
    """Small tensors that are read between the module's forwards, and so had better stay on the device.

    Buffers (an autoencoder's statistics of its latents), and what the module itself holds (a prior's mean).
    Read on the host, they would be computed with there, by other kernels than the device has.
    """
    own = {id(tensor) for tensor in own_tensors(module)}
    buffers = {id(buffer) for buffer in module.buffers()}
    by_storage: dict[int, list[torch.Tensor]] = {}
    for tensor in tensors_of(module):
        by_storage.setdefault(slab.storage_of(tensor), []).append(tensor)
    return [
        tensor
        for group in by_storage.values()
        if all(id(tensor) in own or id(tensor) in buffers for tensor in group)
        and all(tensor.is_floating_point() for tensor in group)
        and group[0].untyped_storage().nbytes() <= _AT_HAND
        for tensor in group
    ]


def silent_writers(module: nn.Module) -> dict[int, nn.Module]:
    """For the id of a buffer, the module that writes to it in training mode by a kernel that does not count it."""
    return {
        id(buffer): part
        for part in module.modules()
        if getattr(part, "track_running_stats", False)
        for buffer in part._buffers.values()
        if buffer is not None
    }


def chunks(tensors: Sequence[torch.Tensor], limit: int) -> list[list[torch.Tensor]]:
    """Split `tensors` into groups of about `limit` bytes; tensors that share a storage stay together."""
    groups: list[list[torch.Tensor]] = []
    group_of: dict[int, list[torch.Tensor]] = {}
    size = limit
    for tensor in tensors:
        storage = slab.storage_of(tensor)
        if storage in group_of:
            group_of[storage].append(tensor)
            continue
        nbytes = tensor.numel() * tensor.element_size()
        if not groups or size + nbytes > limit:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        group_of[storage] = groups[-1]
        size += nbytes
    return groups


# --- who gets which tensor ------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """A part before it is known which of its tensors others hold as well."""

    name: str
    modules: tuple[nn.Module, ...]
    block: nn.Module | None  # that it lies in; only neighbours within one block are joined
    opener: nn.Module | None = None

    def tensors(self) -> list[torch.Tensor]:
        own = own_tensors(self.opener) if self.opener is not None else ()
        within = (t for module in self.modules for t in tensors_of(module))
        return list({id(t): t for t in (*own, *within)}.values())

    @property
    def nbytes(self) -> int:
        return sum(_nbytes(module) for module in self.modules)


def _divide(
    module: nn.Module, blocks: Sequence[nn.Module], drafts: Sequence[_Draft], findings: Findings
) -> Anatomy:
    why: dict[object, str] = {}
    holder: dict[object, int] = {}
    moving = {id(each) for draft in drafts for top in draft.modules for each in top.modules()}
    moving |= {id(draft.opener) for draft in drafts}
    in_blocks = {id(each) for block in blocks for each in block.modules()}
    for each in module.modules():
        if id(each) not in moving:
            reason = "too small, or held by several parts" if id(each) in in_blocks else "outside the blocks"
            why.update((_identity(tensor), reason) for tensor in own_tensors(each))
    for index, draft in enumerate(drafts):
        for tensor in draft.tensors():
            key = _identity(tensor)
            if id(tensor) in findings.strays:
                why[key] = "used outside the forward of its module"
            elif key in why or holder.setdefault(key, index) != index:
                why.setdefault(key, "shared")
    parts = []
    names = {id(each): name for name, each in module.named_modules()}
    for draft in drafts:
        tensors = tuple(t for t in draft.tensors() if _identity(t) not in why)
        if tensors:
            block = names[id(draft.block)] if draft.block is not None else draft.name
            parts.append(Part(draft.name, draft.modules, tensors, draft.opener, block))
    moving = {id(tensor) for part in parts for tensor in part.tensors}
    stem = tuple(t for t in tensors_of(module) if id(t) not in moving)
    return Anatomy(tuple(parts), stem, tuple(why[_identity(t)] for t in stem))


def _identity(tensor: torch.Tensor) -> object:
    """Equal for tensors that are the same bytes seen the same way."""
    span = slab.span_of(tensor)
    return id(tensor) if span.start == span.stop else (span, tensor.dtype, tensor.stride())


# --- blocks, phases, leaves -----------------------------------------------------------------------------


def _drafts(name: str, block: nn.Module, granularity: str, findings: Findings) -> list[_Draft]:
    if granularity == "block" and block not in findings.bypassed:
        return [_Draft(name, (block,), block)]
    if isinstance(block, FUSED) and block not in findings.bypassed:
        return [_Draft(name, (block,), block)]
    split = _leaves if granularity == "leaf" else _phases
    found = [_Draft(path, (part,), block) for path, part in split(block, name, findings.bypassed)]
    if not found:  # a block that is a single layer, or whose parts cannot be told apart
        return [_Draft(name, (block,), block)]
    if block not in findings.bypassed and any(True for _ in own_tensors(block)):
        found[0] = _Draft(found[0].name, found[0].modules, block, opener=block)
    return found


def _phases(
    block: nn.Module, prefix: str, bypassed: Collection[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    """The children of a block that hold weights, and in place of lists and stages what these hold."""
    for name, child in block.named_children():
        if not _nbytes(child):
            continue
        if child in bypassed or not _has_forward(child) or _is_stage(child):
            yield from _phases(child, f"{prefix}.{name}", bypassed)
        else:
            yield f"{prefix}.{name}", child


def _leaves(
    module: nn.Module, prefix: str, bypassed: Collection[nn.Module]
) -> Iterator[tuple[str, nn.Module]]:
    for name, child in module.named_children():
        path = f"{prefix}.{name}" if prefix else name
        if not _nbytes(child):
            continue
        if _has_forward(child) and _is_leaf(child) and child not in bypassed:
            yield path, child
        else:
            yield from _leaves(child, path, bypassed)


def _outer_leaves(
    module: nn.Module, blocks: Sequence[tuple[str, nn.Module]], granularity: str
) -> Iterator[_Draft]:
    """The leaves that lie in no block: embedders, projections.

    Beside phases, the one that holds the first parameter stays: who asks a module for its device looks there,
    and a text encoder's table of tokens is larger than its phases, which the arena is made for.
    """
    within = {id(part) for _, block in blocks for part in block.modules()}
    first = next(module.parameters(), None)
    for path, leaf in _leaves(module, "", ()):
        stays = granularity == "phase" and any(parameter is first for parameter in leaf.parameters())
        if id(leaf) not in within and not stays:
            yield _Draft(path, (leaf,), None)


def _is_leaf(module: nn.Module) -> bool:
    """Whether a module is better not taken apart.

    Torch's own compound layers (attention) use the weights of their parts without calling them, and so may
    whoever holds a good share of the weights itself.
    """
    if not any(_nbytes(child) for child in module.children()):
        return True
    if isinstance(module, (nn.Sequential, nn.ModuleList, nn.ModuleDict)):
        return False
    own = sum(p.numel() * p.element_size() for p in module._parameters.values() if p is not None)
    torchs_own = isinstance(module, FUSED) or type(module).__module__.startswith("torch.nn.")
    return torchs_own or own > _STAGE_COVERAGE * _nbytes(module)


def _join_small(drafts: Sequence[_Draft]) -> list[_Draft]:
    """Join neighbours in a block that are too small for a copy of their own; drop what is tiny."""
    largest = max((draft.nbytes for draft in drafts), default=0)
    enough, tiny = min(_COPY, largest * _COPY_SHARE), min(_COPY, largest * _TINY_SHARE)
    joined: list[_Draft] = []
    for draft in drafts:
        last = joined[-1] if joined else None
        if draft.nbytes <= tiny and draft.opener is None:
            continue
        if (
            last is not None
            and draft.block is not None
            and last.block is draft.block
            and min(last.nbytes, draft.nbytes) < enough
            and max(last.nbytes, draft.nbytes) < 2 * enough
        ):
            name = f"{last.name} + {draft.name.removeprefix(_common(last.name, draft.name))}"
            joined[-1] = _Draft(name, last.modules + draft.modules, draft.block, last.opener)
        else:
            joined.append(draft)
    return joined


def _common(a: str, b: str) -> str:
    """What two paths begin with, up to a dot."""
    parts = a.split(" + ")[0].split(".")[:-1]
    prefix = ".".join(parts) + "."
    return prefix if b.startswith(prefix) else ""


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

"""`enable_offload(model, blocks, min_reserved_blocks_count=2)` with MindIE-SD's meaning and checks."""

from __future__ import annotations

import torch
from torch import nn

from diffusers_offload.handle import OffloadHandle, held_policy
from diffusers_offload.policy import OffloadPolicy, Request
from diffusers_offload.quoting import quoted
from diffusers_offload.refusals import refuse_before
from diffusers_offload.streams import find_device
from diffusers_offload.target import Target
from diffusers_offload.units import dissect


def enable_offload(model: nn.Module, blocks: nn.ModuleList, min_reserved_blocks_count: int = 2) -> None:
    """Stream `blocks` of `model` through the device; the first ones stay there.

    Works in place. The model may be moved to the device before, or left on the host: what is needed comes
    to the accelerator by itself. A second call on the same model does nothing.

    Args:
        model: the model that the blocks belong to.
        blocks: its blocks, in order of use.
        min_reserved_blocks_count: how many of the first blocks stay on the device.

    Raises:
        TypeError: `model` is no module, `blocks` no `ModuleList` of modules, or the count no int.
        ValueError: there are no blocks, they are not the model's, one is the model itself, the count is negative or
            not less than their number, or the model is offloaded by other means or has weights that cannot be moved.
    """
    _check(model, blocks, min_reserved_blocks_count)
    if held_policy(model) is not None:
        return
    refuse_before(type(model).__name__, model)
    reserved = {id(block) for block in blocks[:min_reserved_blocks_count]}
    anatomy = dissect(model, blocks=list(blocks))
    residents = frozenset(i for i, part in enumerate(anatomy.parts) if id(part.modules[0]) in reserved)
    policy = OffloadPolicy("block")
    target = Target(type(model).__name__, model, policy, anatomy, residents, tuple(blocks))
    OffloadHandle([target], _device_of(model), Request(policy, {}))  # the hooks on the model keep it alive


def _device_of(model: nn.Module) -> torch.device:
    """Where the model has been moved to already, or this machine's accelerator."""
    devices = {tensor.device for tensor in model.parameters() if tensor.device.type not in ("cpu", "meta")}
    return find_device(devices.pop() if devices else None)


def _check(model: nn.Module, blocks: nn.ModuleList, count: int) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    if not isinstance(blocks, nn.ModuleList):
        raise TypeError(f"blocks must be a torch.nn.ModuleList, not {type(blocks).__name__}")
    for index, block in enumerate(blocks):
        if block is model:
            raise ValueError(f"blocks[{index}] is the model itself: pass a ModuleList that it holds")
        if not isinstance(block, nn.Module):
            raise TypeError(f"blocks[{index}] must be a torch.nn.Module, not {type(block).__name__}")
    if isinstance(count, bool) or not isinstance(count, int):
        raise TypeError(
            f"min_reserved_blocks_count must be an int, not {type(count).__name__} ({quoted(count)})"
        )
    if not len(blocks):
        raise ValueError("blocks must not be empty")
    if count < 0:
        raise ValueError(f"min_reserved_blocks_count must be >= 0, not {quoted(count)}")
    if count >= len(blocks):
        raise ValueError(
            f"min_reserved_blocks_count must be < len(blocks) = {len(blocks)}, not {quoted(count)}"
        )

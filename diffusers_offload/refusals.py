"""What block offload cannot be combined with, and why: each answer names the part and what is on it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Any

from accelerate.hooks import AlignDevicesHook, CpuOffload
from torch import nn

from . import hooks, slab

if TYPE_CHECKING:
    from .held import Held


def unmovable(name: str, module: nn.Module) -> str | None:
    """Why the weights of component `name` cannot be moved, or None if they can."""
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        reason = slab.why_not(tensor)
        if reason is not None:
            return f"{name}.{path} {reason}"
    return None


def by_accelerate(name: str, module: nn.Module) -> str | None:
    """Which part of component `name` accelerate moves, or None."""
    for path, part in module.named_modules():
        if any(isinstance(hook, (AlignDevicesHook, CpuOffload)) for hook in hooks.on(part)):
            return (
                f"{_join(name, path)} is offloaded by accelerate (enable_model_cpu_offload, "
                "enable_sequential_cpu_offload, cpu_offload or dispatch_model)"
            )
    return None


def by_groups(name: str, module: nn.Module) -> str | None:
    """Which part of component `name` Diffusers' group offloading moves, or None."""
    for path, part in module.named_modules():
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            return f"{_join(name, path)} is under Diffusers' group offloading"
    return None


def refuse_before(name: str, module: nn.Module, leaving: Collection[Held] = ()) -> None:
    """Raise ValueError if component `name` cannot be offloaded as it is.

    Args:
        leaving: what is going to get its weights back first.
    """
    device_map = getattr(module, "hf_device_map", None)
    if isinstance(device_map, Mapping) and len(set(map(str, device_map.values()))) > 1:
        raise ValueError(
            f"{name} is spread over devices (device_map={dict(device_map)}): load it without device_map"
        )
    if (other := by_accelerate(name, module)) is not None:
        raise ValueError(f"{other}: call pipe.remove_all_hooks() first")
    if any(
        type(hook).__name__ == "CustomOffloadHook" for hook in hooks.on(module)
    ):  # importing it takes seconds
        raise ValueError(
            f"{name} is offloaded by a ComponentsManager (enable_auto_cpu_offload): "
            "call its disable_auto_cpu_offload() first"
        )
    if (other := by_groups(name, module)) is not None:
        raise ValueError(f"{other}, which has no way back: load {name} anew")
    for path, part in module.named_modules():
        ours = [hook for hook in hooks.on(part) if isinstance(hook, hooks.EngineHook)]
        if any(not any(held.owns(hook) for held in leaving) for hook in ours):
            raise ValueError(
                f"{_join(name, path)} is offloaded block by block already: disable that handle first"
            )
    if (reason := unmovable(name, module)) is not None:
        raise ValueError(f"{reason}. Leave it out of the pipeline, or load it in a plain dtype.")


def refuse_since(name: str, module: nn.Module) -> None:
    """Raise RuntimeError if something was done to the offloaded component `name` that cannot go on with ours."""
    if (other := by_accelerate(name, module) or by_groups(name, module)) is not None:
        raise RuntimeError(
            f"{other}, put there while block offload was on: both would move the same weights. Call "
            "pipe.disable_block_offload() to leave it to the other"
        )
    if (reason := unmovable(name, module)) is not None:
        raise RuntimeError(
            f"{reason}. It was put there while block offload was on: call pipe.disable_block_offload(), or "
            "put a plain tensor in its place"
        )


def refuse_device_map(pipe: Any) -> None:
    """Raise ValueError if the pipeline is spread over devices."""
    mapped = getattr(pipe, "_is_pipeline_device_mapped", None)
    if mapped is not None and mapped():
        raise ValueError(
            f"the pipeline is spread over devices (device_map={pipe.hf_device_map}): "
            "call pipe.reset_device_map() first"
        )


def _join(name: str, path: str) -> str:
    return f"{name}.{path}" if path else name

"""The mixin: `enable_block_offload` and what goes with it, for pipelines and for single modules.

Every component that is a module gets a policy: its own, or that of the call. All is checked before
anything is moved.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from accelerate.hooks import AlignDevicesHook, CpuOffload, SequentialHook
from torch import nn

from . import planner, slab
from .handle import OffloadHandle, Target, held_policy, make_plan, why_not
from .hooks import EngineHook
from .log import logger
from .policy import OffloadPolicy, Request, parse_bytes, parse_request
from .streams import find_device
from .units import dissect

_HANDLE = "_block_offload_handle"


class BlockOffloadMixin:
    """The methods that `import diffusers_offload` gives every `DiffusionPipeline`."""

    def enable_block_offload(
        self,
        device: str | torch.device | None = None,
        offload_granularity: str = "block",
        offload_ratio: float | None = None,
        max_device_memory: int | str | None = None,
        components: Mapping[str, str | OffloadPolicy] | None = None,
    ) -> None:
        """Stream the weights of this pipeline to the device block by block while it computes.

        The output does not change by one bit. Called again, it replaces the first enablement.

        Args:
            device: where to compute: "cuda", "npu", "xpu" (with an index if you like) or "cpu"; found by
                itself if None.
            offload_granularity: policy of the components that `components` does not name: "block",
                "model" or "resident". Under "block", an autoencoder, and whatever has no blocks, comes
                and goes as a whole ("model").
            offload_ratio: share of the bytes of each component's blocks that streams, 0.0 to 1.0; the
                rest stays on the device. None is 1.0.
            max_device_memory: upper bound on the peak device memory, activations included, as "10GiB" or
                in bytes. The first forwards measure what activations take; what is left holds blocks of
                the component that runs. None: no more is kept than the policies say.
            components: per component a word as above, or an `OffloadPolicy`.

        Raises:
            ValueError: an argument is wrong, or the pipeline is offloaded by other means already.
            RuntimeError: the device is not there.
        """
        device = find_device(device)
        modules = {name: m for name, m in self.components.items() if isinstance(m, nn.Module)}
        request = parse_request(offload_granularity, offload_ratio, components, tuple(modules))
        limit = parse_bytes("max_device_memory", max_device_memory)
        _refuse_device_map(self)
        before = self.block_offload
        targets = plan_targets(modules, request, device, replacing=before)
        if limit is not None:
            planner.check_budget(make_plan(targets, device), limit)
        if before is not None:
            before.disable()
            # Sizes stay, but the storages behind the tensors are new: take the modules apart again.
            targets = plan_targets(modules, request, device)
        handle = OffloadHandle(targets, device, limit)
        setattr(self, _HANDLE, handle)
        _announce(handle)

    def disable_block_offload(self) -> None:
        """Undo `enable_block_offload`: weights return to the devices they came from, memory is freed."""
        handle = self.block_offload
        if handle is not None:
            handle.disable()
            setattr(self, _HANDLE, None)

    @property
    def block_offload(self) -> OffloadHandle | None:
        """The live handle, with `.plan`, `.report()` and `.disable()`; None while nothing is offloaded."""
        handle = self.__dict__.get(_HANDLE)
        return handle if handle is not None and handle.enabled else None

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also while all its weights are on the host."""
        handle = self.block_offload
        return handle.device if handle is not None else self._diffusers_device

    def maybe_free_model_hooks(self) -> None:
        """Diffusers calls this at the end of every pipeline call: what came for the call leaves, too."""
        self._diffusers_maybe_free_model_hooks()
        handle = self.block_offload
        if handle is not None:
            handle.call_ended()


def enable_block_offload(
    module: nn.Module,
    device: str | torch.device | None = None,
    offload_granularity: str = "block",
    offload_ratio: float | None = None,
    max_device_memory: int | str | None = None,
    name: str = "module",
) -> OffloadHandle:
    """Offload one module outside a pipeline.

    Args:
        module: any module; for "block" it needs a `ModuleList` of blocks somewhere.
        device, offload_granularity, offload_ratio, max_device_memory: as for a pipeline.
        name: what messages and the plan call it.

    Returns:
        The handle; `handle.disable()` undoes it.

    Raises:
        TypeError: `module` is no module.
        ValueError: an argument is wrong, or the module is offloaded already.
        RuntimeError: the device is not there.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
    device = find_device(device)
    policy = parse_request(offload_granularity, offload_ratio, None, (name,)).default
    if held_policy(module) is not None:
        raise ValueError(f"{name} is offloaded already: disable its handle first")
    targets = plan_targets({name: module}, Request(policy, {name: policy}), device)
    limit = parse_bytes("max_device_memory", max_device_memory)
    if limit is not None:
        planner.check_budget(make_plan(targets, device), limit)
    handle = OffloadHandle(targets, device, limit)
    _announce(handle)
    return handle


def plan_targets(
    modules: Mapping[str, nn.Module],
    request: Request,
    device: torch.device,
    replacing: OffloadHandle | None = None,
) -> list[Target]:
    """Route a policy to every component. Only looks; raises what is wrong with the request.

    Args:
        replacing: the handle that is going to be disabled first.
    """
    targets: list[Target] = []
    without_blocks: list[str] = []
    seen: set[int] = set()
    for name, module in modules.items():
        if id(module) in seen:  # one module under two names
            continue
        seen.add(id(module))
        held = held_policy(module)
        if held is not None and held[0] is not replacing:
            targets.append(_shared_target(name, module, held, request, device))
            continue
        _refuse_foreign_offload(name, module, ours=held is not None)
        reason = why_not(name, module)
        if reason is not None:
            raise ValueError(f"{reason}. Leave it out of the pipeline, or load it in a plain dtype.")
        target = make_target(name, module, request)
        if target.note and not _is_autoencoder(module):
            without_blocks.append(name)
        targets.append(target)
    if without_blocks and replacing is None:
        logger.warning(
            "%s: no blocks found, so each comes and goes as a whole (the policy 'model')",
            ", ".join(without_blocks),
        )
    return targets


def make_target(name: str, module: nn.Module, request: Request) -> Target:
    """Route its policy to one component that nobody offloads yet. Needs shapes and dtypes, no weights."""
    policy = request.policy_for(name)
    if not policy.streams:
        return Target(name, module, policy, dissect(module))
    anatomy = dissect(module, policy.granularity)
    by_name = name in request.by_name
    if not anatomy.parts and by_name:
        raise ValueError(
            f"{name} ({type(module).__name__}) has no blocks that could be streamed: use 'model' or 'resident'"
        )
    if not anatomy.parts or (_is_autoencoder(module) and not by_name):
        note = "an autoencoder, run in tiles" if anatomy.parts else "no blocks found"
        return Target(name, module, OffloadPolicy("model"), anatomy, note=note)
    sizes = [slab.lay_out(part.tensors).nbytes for part in anatomy.parts]
    return Target(name, module, policy, anatomy, frozenset(planner.choose_residents(sizes, policy.ratio)))


def _shared_target(
    name: str, module: nn.Module, held: tuple[OffloadHandle, Any], request: Request, device: torch.device
) -> Target:
    """A component that another pipeline offloads already keeps the policy it has there."""
    handle, plan = held
    if handle.device != device:
        raise ValueError(
            f"{name} is offloaded to {handle.device} by another pipeline: use device={str(handle.device)!r}, or "
            "disable the block offload of that pipeline first"
        )
    wanted = request.by_name.get(name)
    if wanted is not None and wanted != plan.policy:
        raise ValueError(
            f"components[{name!r}]={wanted} differs from the policy {plan.policy} that another pipeline gave this "
            "component: leave it out to share that, or disable the block offload of that pipeline first"
        )
    granularity = plan.policy.granularity if plan.policy.streams else "block"
    return Target(
        name, module, plan.policy, dissect(module, granularity), note="shared with another pipeline"
    )


def _is_autoencoder(module: nn.Module) -> bool:
    """Whether the module turns latents into pixels: tiled decoding would stream its blocks once per tile."""
    return callable(getattr(module, "encode", None)) or callable(getattr(module, "decode", None))


def _refuse_device_map(pipe: Any) -> None:
    mapped = getattr(pipe, "_is_pipeline_device_mapped", None)
    if mapped is not None and mapped():
        raise ValueError(
            f"the pipeline is spread over devices (device_map={pipe.hf_device_map}): "
            "call pipe.reset_device_map() first"
        )


def _refuse_foreign_offload(name: str, module: nn.Module, ours: bool) -> None:
    device_map = getattr(module, "hf_device_map", None)
    if isinstance(device_map, Mapping) and len(set(map(str, device_map.values()))) > 1:
        raise ValueError(
            f"{name} is spread over devices (device_map={dict(device_map)}): load it without device_map"
        )
    for path, part in module.named_modules():
        where = f"{name}.{path}" if path else name
        present = getattr(part, "_hf_hook", None)
        chained: Sequence[Any] = present.hooks if isinstance(present, SequentialHook) else (present,)
        if any(isinstance(hook, (AlignDevicesHook, CpuOffload)) for hook in chained):
            raise ValueError(
                f"{where} is offloaded by accelerate (enable_model_cpu_offload, enable_sequential_cpu_offload "
                "or cpu_offload): call pipe.remove_all_hooks() first"
            )
        if any(type(hook).__name__ == "CustomOffloadHook" for hook in chained):  # importing it takes seconds
            raise ValueError(
                f"{where} is offloaded by a ComponentsManager (enable_auto_cpu_offload): "
                "call its disable_auto_cpu_offload() first"
            )
        if not ours and any(isinstance(hook, EngineHook) for hook in chained):
            raise ValueError(f"{where} is offloaded block by block already: disable that handle first")
        registry = getattr(part, "_diffusers_hook", None)
        if registry is not None and registry.get_hook("group_offloading") is not None:
            raise ValueError(
                f"{where} is under Diffusers' group offloading, which has no way back: load {name} anew"
            )


def _announce(handle: OffloadHandle) -> None:
    plan = handle.plan
    logger.info("block offload enabled:\n%s", plan)

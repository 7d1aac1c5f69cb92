"""The mixin: `enable_block_offload` and what goes with it, for pipelines and for single modules.

Every component that is a module gets a policy: its own, or that of the call. All is checked before
anything is moved.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from . import guards
from .calls import engines_of, exclusively, guard_calls
from .fitting import bytes_on, fit, limits_for
from .handle import OffloadHandle, held_policy
from .held import find_held
from .lightx2v import OffloadConfig, takes_config
from .log import logger
from .policy import OffloadPolicy, Request, parse_bytes, parse_request, parse_storage
from .quoting import quoted
from .refusals import refuse_device_map
from .routing import follow, plan_targets
from .streams import find_device, open_streams
from .target import Target

_HANDLE = "_block_offload_handle"


class BlockOffloadMixin:
    """The methods that `import diffusers_offload` gives every `DiffusionPipeline`."""

    @takes_config
    def enable_block_offload(
        self,
        device: str | torch.device | None = None,
        offload_granularity: str = "block",
        offload_ratio: float | None = None,
        max_device_memory: int | str | None = None,
        max_host_memory: int | str | None = None,
        tier: str | None = None,
        offload_dir: str | os.PathLike | None = None,
        num_disk_workers: int = 2,
        cache_policy: str = "static",
        pack_on_disk: bool | None = None,
        components: Mapping[str, str | OffloadPolicy] | None = None,
        config: str | os.PathLike | Mapping[str, Any] | OffloadConfig | None = None,
        pair_passes: bool | None = None,
    ) -> None:
        """Stream the weights of this pipeline to the device block by block while it computes.

        The output does not change by one bit. Called again, it replaces the first enablement.

        Args:
            device: where to compute: "cuda", "npu", "xpu" (with an index if you like) or "cpu"; found by
                itself if None.
            offload_granularity: policy of the components that `components` does not name: "block",
                "phase", "leaf", "model" or "resident". Where it streams, an autoencoder, and whatever has no
                blocks, comes and goes as a whole ("model"). If memory is too small for it, smaller units are
                taken.
            offload_ratio: share of the bytes of each component's units that streams, 0.0 to 1.0; the
                rest stays on the device, from the second call on the units that make a step the shortest by
                what a forward took. None leaves it to the planner: on an accelerator everything stays
                if it fits, and otherwise what the forwards leave of the memory holds units. On the CPU
                everything streams.
            max_device_memory: upper bound on the peak device memory, activations included, as "10GiB" or
                in bytes. The first forwards with inputs of new shapes measure what activations take, and how
                long computing and copying do; what is left holds units of the component that runs, chosen so
                that a forward is predicted to be the shortest. None: what the device has free, where
                `offload_ratio` is None.
            max_host_memory: upper bound on the host memory that holds weights. What does not fit is packed where the
                device unpacks fast, goes to disk if `offload_dir` is given, and stays on the device otherwise. With
                weights on disk it bounds the buffers that they pass through and are kept in; None: half of what the
                machine has available.
            tier: where weights are while they are not on the device: "pinned" host memory, "packed" (host memory,
                without loss in some 70 % of the bytes; NaN stands in for the weights meanwhile), or "disk". None:
                pinned, unless `max_host_memory` is too little for it; what is seen to wait for the bus is packed
                before the next call of the pipeline.
            offload_dir: folder for weights on disk: a sub-folder per component, one .safetensors file per block.
                What is there from before is used again if it is the same, and kept when offloading is disabled.
            num_disk_workers: threads that read.
            cache_policy: what of the weights on disk host memory keeps: "static" (as much as fits, always the
                same: best where units follow one another in a cycle), "fifo" or "lru".
            pack_on_disk: whether weights are packed, without loss in some 70 % of the bytes, before they are written
                to `offload_dir`: the disk reads less, and host memory keeps more of them. NaN stands in for those
                that stream while they are not on the device. None: if the device unpacks fast. What is there from
                `diffusers-offload convert` or `from_pretrained` is used as it is.
            components: per component a word as above, or an `OffloadPolicy`.
            config: LightX2V's configuration: the path of its JSON file, a dict, or an `OffloadConfig`. It stands for
                the arguments above; those that are given as well win, `components` name by name.
            pair_passes: whether calls of a component that belong to one denoising step (guidance: the prompt, then
                the negative one) run together, unit by unit, so that the weights come once for both. None: where
                copying, not computing, is the limit; True: also where it is not; False: never. Once it is known
                which calls they are, that is rehearsed and compared to the bit. Needs memory for the activations of
                each.

        Raises:
            TypeError: `config` is of another type.
            ValueError: an argument is wrong, nothing fits, or the pipeline is offloaded by other means already.
            RuntimeError: the device is not there.
        """
        device = find_device(device)
        modules = self._offloadable_modules()
        storage = parse_storage(offload_dir, num_disk_workers, cache_policy, pack_on_disk)
        request = parse_request(
            offload_granularity, offload_ratio, components, tuple(modules), tier, storage, pair_passes
        )
        limit = parse_bytes("max_device_memory", max_device_memory)
        refuse_device_map(self)
        before = self.block_offload
        leaving = [h for h in before.holds.values() if h.owners == {before}] if before is not None else []
        ours = before.weights_on_device() if before is not None else bytes_on(device, modules.values())
        host_limit = parse_bytes("max_host_memory", max_host_memory)
        limits = limits_for(open_streams(device), limit, host_limit, request.decides, ours)

        def route(request: Request) -> list[Target]:
            return plan_targets(modules, request, device, leaving)

        fitting, targets = fit(route, request, limits, device)
        if before is not None:
            before.disable()
            leaving = []  # sizes stay, but the storages behind the tensors are new: take the modules apart again
            fitting, targets = fit(route, request, limits, device)
        handle = OffloadHandle(targets, device, fitting, limits)
        setattr(self, _HANDLE, handle)
        guard_calls(type(self))
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

    def _offloadable_modules(self) -> dict[str, nn.Module]:
        """The components that are modules, by name. `components` would refuse while one is being exchanged."""
        found = ((name, vars(self).get(name)) for name in self.config if not name.startswith("_"))
        return {name: module for name, module in found if isinstance(module, nn.Module)}

    # --- Diffusers' own methods, wrapped ---------------------------------------------------------------

    def __setattr__(self, name: str, value: Any) -> None:
        """A component that is exchanged is offloaded as its name was to be; the old one gets its weights back."""
        handle, before = self.block_offload, self.__dict__.get(name)
        modules = isinstance(before, nn.Module) or isinstance(value, nn.Module)
        if handle is None or before is value or not modules:
            self._diffusers___setattr__(name, value)
            return
        with exclusively(handle.engines):
            self._diffusers___setattr__(name, value)
            try:
                follow(handle, self._offloadable_modules())
            except BaseException:
                self._diffusers___setattr__(name, before)
                raise

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also while all its weights are on the host."""
        engines = engines_of(vars(self).values())
        return engines[0].device if engines else self._diffusers_device

    def maybe_free_model_hooks(self) -> None:
        """Diffusers calls this at the end of every pipeline call: what came for the call leaves, too."""
        self._diffusers_maybe_free_model_hooks()
        for engine in engines_of(vars(self).values()):
            engine.call_ended()

    def enable_group_offload(self, *args: Any, **kwargs: Any) -> None:
        """Refused while a component is offloaded block by block; otherwise Diffusers' own."""
        for name, module in self._offloadable_modules().items():
            if find_held(module) is not None:
                guards.refuse_group_offload(name)
        self._diffusers_enable_group_offload(*args, **kwargs)

    def __copy__(self) -> Any:
        """A pipeline that shares the components, as `from_pipe` makes one; the handle stays with this one."""
        other = object.__new__(type(self))
        other.__dict__.update({key: value for key, value in vars(self).items() if key != _HANDLE})
        return other

    def __reduce_ex__(self, protocol: Any) -> Any:
        if engines_of(vars(self).values()):
            guards.refuse_copy(f"the {type(self).__name__}")
        return object.__reduce_ex__(self, protocol)


def enable_block_offload(
    module: nn.Module,
    device: str | torch.device | None = None,
    offload_granularity: str = "block",
    offload_ratio: float | None = None,
    max_device_memory: int | str | None = None,
    max_host_memory: int | str | None = None,
    tier: str | None = None,
    offload_dir: str | os.PathLike | None = None,
    num_disk_workers: int = 2,
    cache_policy: str = "static",
    pack_on_disk: bool | None = None,
    name: str = "module",
    pair_passes: bool | None = None,
) -> OffloadHandle:
    """Offload one module outside a pipeline.

    Args:
        module: any module; for "block" and "phase" it needs a `ModuleList` of blocks somewhere.
        device, offload_granularity, offload_ratio, max_device_memory, max_host_memory, tier, offload_dir,
            num_disk_workers, cache_policy, pack_on_disk: as for a pipeline.
        name: what messages and the plan call it.
        pair_passes: as for a pipeline.

    Returns:
        The handle; `handle.disable()` undoes it.

    Raises:
        TypeError: `module` is no module, or `name` no string.
        ValueError: an argument is wrong, or the module is offloaded already.
        RuntimeError: the device is not there.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, not {type(module).__name__}")
    if not isinstance(name, str):
        raise TypeError(
            f"name={quoted(name)} is not a string; use what messages and the plan shall call the module"
        )
    device = find_device(device)
    storage = parse_storage(offload_dir, num_disk_workers, cache_policy, pack_on_disk)
    request = parse_request(offload_granularity, offload_ratio, None, (name,), tier, storage, pair_passes)
    if held_policy(module) is not None:
        raise ValueError(f"{name} is offloaded already: disable its handle first")
    limits = limits_for(
        open_streams(device),
        parse_bytes("max_device_memory", max_device_memory),
        parse_bytes("max_host_memory", max_host_memory),
        request.decides,
        bytes_on(device, [module]),
    )
    request, targets = fit(
        lambda request: plan_targets({name: module}, request, device, asked={name}), request, limits, device
    )
    handle = OffloadHandle(targets, device, request, limits)
    _announce(handle)
    return handle


def _announce(handle: OffloadHandle) -> None:
    plan = handle.plan
    logger.info("block offload enabled:\n%s", plan)

"""The mixins of Modular Diffusers' `ModularPipeline` and `ComponentsManager`.

Both come to have components, and lose them, after enabling. So what was asked for is remembered, and the
handle follows: what comes is offloaded, what goes gets its weights back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any
from weakref import WeakSet

import torch
from torch import nn

from .handle import OffloadHandle, held_policy
from .lightx2v import takes_config
from .log import logger
from .pipeline import _HANDLE, BlockOffloadMixin
from .policy import Request, parse_request, parse_storage
from .routing import check_exchange, follow

_SIGNATURE = inspect.signature(BlockOffloadMixin.enable_block_offload)


class Following:
    """Keeps a handle in step with the components that its owner has.

    Args:
        request: what the user asked for, by the names that the user gave.
        base_name: turns the name of a component into another one that the user may have called it by.
    """

    def __init__(self, handle: OffloadHandle, request: Request, base_name: Callable[[str], str]) -> None:
        self._handle = handle
        self._request = request
        self._base_name = base_name
        # What was given to the handle. Not what it holds: a hook that was taken off is not put on again.
        self._given = WeakSet(handle.components.values())

    def check(self, modules: Mapping[str, nn.Module]) -> None:
        """Raise ValueError if the owner could not have `modules`."""
        check_exchange(self._handle, *self._wanted(modules))

    def follow(self, modules: Mapping[str, nn.Module]) -> None:
        """The owner has `modules` now."""
        if follow(self._handle, *self._wanted(modules)):
            logger.info("block offload follows the components:\n%s", self._handle.plan)
        self._given = WeakSet(modules.values())

    def _wanted(self, modules: Mapping[str, nn.Module]) -> tuple[dict[str, nn.Module], Request]:
        held = set(self._handle.components.values())
        wanted = {name: m for name, m in modules.items() if m in held or m not in self._given}
        return wanted, narrowed(self._request, wanted, self._base_name)


def narrowed(request: Request, names: Iterable[str], base_name: Callable[[str], str]) -> Request:
    """The request as it concerns the components `names`, by their own names."""
    by_name = {}
    for name in names:
        called = name if name in request.by_name else base_name(name)
        if called in request.by_name:
            by_name[name] = request.by_name[called]
    return replace(request, by_name=by_name, decides=False)


class ModularOffloadMixin(BlockOffloadMixin):
    """The methods that `import diffusers_offload` gives every `ModularPipeline`."""

    @takes_config
    @wraps(BlockOffloadMixin.enable_block_offload)
    def enable_block_offload(self, *args: Any, **kwargs: Any) -> None:
        _enable(self, args, kwargs, lambda asked: _nameable(self), str)

    def _offloadable_modules(self) -> dict[str, nn.Module]:
        return _modules(self.components)

    def register_components(self, **components: Any) -> None:
        """Diffusers calls this for whatever is loaded, updated or unloaded: the handle follows."""
        handle, manager = self.block_offload, self._components_manager
        if handle is not None and handle.following is not None:
            handle.following.check(_modules({**self.components, **components}))
        if manager is not None:
            _check_adding(manager, components, self._collection)
        self._diffusers_register_components(**components)
        _follow(self)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the pipeline's blocks, as Diffusers documents it; what came for the call leaves afterwards."""
        _follow(self)  # a component may have been assigned past `update_components`
        try:
            return self._diffusers___call__(*args, **kwargs)
        finally:
            for handle in _handles(self):
                handle.call_ended()

    @property
    def device(self) -> torch.device:
        """Where the pipeline computes, also while all its weights are on the host."""
        return next((handle.device for handle in _handles(self)), None) or self._diffusers_device


class ManagerOffloadMixin(BlockOffloadMixin):
    """The methods that `import diffusers_offload` gives every `ComponentsManager`.

    All pipelines that the manager serves then compute on the handle's device and tell it of a call's end.
    """

    @takes_config
    @wraps(BlockOffloadMixin.enable_block_offload)
    def enable_block_offload(self, *args: Any, **kwargs: Any) -> None:
        if self._auto_offload_enabled:
            raise ValueError(
                "the ComponentsManager offloads its components already (enable_auto_cpu_offload): "
                "call disable_auto_cpu_offload() first"
            )
        _enable(self, args, kwargs, tuple, self._id_to_name)

    def _offloadable_modules(self) -> dict[str, nn.Module]:
        return _modules(self.components)

    def enable_auto_cpu_offload(self, *args: Any, **kwargs: Any) -> None:
        """Diffusers' own offloading, which would take ours off: refused while ours is on."""
        ours = [name for name, module in _modules(self.components).items() if held_policy(module) is not None]
        if self.block_offload is not None or ours:
            raise ValueError(
                f"block offload is on ({', '.join(ours) or 'for what this manager is given'}): call "
                "disable_block_offload() of this ComponentsManager, or of the pipeline that enabled it, first"
            )
        self._diffusers_enable_auto_cpu_offload(*args, **kwargs)

    def add(self, name: str, component: Any, collection: str | None = None) -> str:
        """Add a component, as Diffusers documents it; the handle takes it in."""
        _check_adding(self, {name: component}, collection)
        component_id = self._diffusers_add(name, component, collection)
        _follow(self)
        return component_id

    def remove(self, component_id: str | None = None) -> None:
        """Remove a component, as Diffusers documents it; the handle has let it go before."""
        _follow(self, without={component_id})
        self._diffusers_remove(component_id)


def _enable(
    owner: Any,
    args: tuple,
    kwargs: dict[str, Any],
    known: Callable[[Mapping[str, Any]], tuple[str, ...]],
    base_name: Callable[[str], str],
) -> None:
    """`enable_block_offload` of an owner, with policies also for components that come later."""
    given = _SIGNATURE.bind(owner, *args, **kwargs)
    given.apply_defaults()
    arguments = given.arguments
    asked = arguments["components"]
    names = known(asked) if isinstance(asked, Mapping) else ()
    storage = parse_storage(
        arguments["offload_dir"],
        arguments["num_disk_workers"],
        arguments["cache_policy"],
        arguments["pack_on_disk"],
    )
    request = parse_request(
        arguments["offload_granularity"],
        arguments["offload_ratio"],
        asked,
        names,
        arguments["tier"],
        storage,
        arguments["pair_passes"],
    )
    present = owner._offloadable_modules()
    arguments["components"] = narrowed(request, present, base_name).by_name
    BlockOffloadMixin.enable_block_offload(*given.args, **given.kwargs)
    handle = vars(owner)[_HANDLE]
    handle.following = Following(handle, request, base_name)
    waiting = set(request.by_name) - {*present, *map(base_name, present)}
    if waiting and present:
        logger.warning("policies of components that are not there yet: %s", ", ".join(sorted(waiting)))


def _modules(components: Mapping[str, Any]) -> dict[str, nn.Module]:
    return {name: module for name, module in components.items() if isinstance(module, nn.Module)}


def _nameable(pipe: Any) -> tuple[str, ...]:
    """The pipeline's components that are modules, or will be once they are loaded."""
    kinds = {name: spec.type_hint for name, spec in pipe._component_specs.items()}
    loadable = {n for n, kind in kinds.items() if not isinstance(kind, type) or issubclass(kind, nn.Module)}
    return tuple(
        name
        for name, component in pipe.components.items()
        if isinstance(component, nn.Module) or (component is None and name in loadable)
    )


def _handles(pipe: Any) -> list[OffloadHandle]:
    """The pipeline's own handle, and that of its manager."""
    owners = [pipe] if pipe._components_manager is None else [pipe, pipe._components_manager]
    return [owner.block_offload for owner in owners if owner.block_offload is not None]


def _follow(owner: Any, without: Iterable[str | None] = ()) -> None:
    handle = owner.block_offload
    if handle is not None and handle.following is not None:
        modules = owner._offloadable_modules()
        handle.following.follow({name: module for name, module in modules.items() if name not in without})


def _check_adding(manager: Any, components: Mapping[str, Any], collection: str | None) -> None:
    """Raise ValueError if the manager could not offload what it is about to be given."""
    coming = _modules(components)
    for name, module in coming.items():
        if manager._auto_offload_enabled and held_policy(module) is not None:
            raise ValueError(
                f"{name} is offloaded block by block, and the ComponentsManager offloads what it is given "
                "(enable_auto_cpu_offload): disable one of the two first"
            )
    handle = manager.block_offload
    if handle is None or handle.following is None:
        return
    modules = _modules(manager.components)
    for name, module in coming.items():
        for component_id in manager._lookup_ids(name=name, collection=collection) if collection else ():
            if sum(component_id in each for each in manager.collections.values()) == 1:
                modules.pop(component_id, None)  # it leaves when the new one of its name joins the collection
        modules[f"{name}_{id(module)}"] = module
    handle.following.check(modules)

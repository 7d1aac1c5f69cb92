"""Gives classes of Diffusers' and transformers' the members of the mixins, and takes them away again.

Diffusers imports its pipelines only when one is used, which takes a second; so the methods are added
when a class comes into being, and what they need is imported when one is called.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from dataclasses import dataclass
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_ADDED = ("enable_block_offload", "disable_block_offload", "block_offload", "_offloadable_modules")


@dataclass(frozen=True)
class _Place:
    """A class of Diffusers' or transformers', and what it is given.

    Attributes:
        mixin: where the members come from: a module of this package, and a class.
        wrapped: members that the class has as well; its own stay under `_diffusers_<name>`.
        added: members that it has not.
    """

    class_name: str
    mixin: tuple[str, str]
    wrapped: tuple[str, ...]
    added: tuple[str, ...] = _ADDED

    def is_given(self, owner: type) -> bool:
        """Whether the class has the members already."""
        return f"_diffusers_{self.wrapped[0]}" in vars(owner)


_PLACES = {
    "diffusers.pipelines.pipeline_utils": _Place(
        "DiffusionPipeline",
        ("pipeline", "BlockOffloadMixin"),
        ("__setattr__", "device", "maybe_free_model_hooks", "enable_group_offload"),
        (*_ADDED, "__copy__", "__reduce_ex__"),
    ),
    "diffusers.modular_pipelines.modular_pipeline": _Place(
        "ModularPipeline", ("modular", "ModularOffloadMixin"), ("__call__", "register_components", "device")
    ),
    "diffusers.modular_pipelines.components_manager": _Place(
        "ComponentsManager", ("modular", "ManagerOffloadMixin"), ("add", "remove", "enable_auto_cpu_offload")
    ),
    "diffusers.models.modeling_utils": _Place("ModelMixin", ("models", "HeldModelMixin"), ("device",), ()),
    "transformers.modeling_utils": _Place("ModuleUtilsMixin", ("models", "HeldModelMixin"), ("device",), ()),
}


def install() -> None:
    """Add the members to the classes, now or as soon as each is imported. Twice is once."""
    for name in _PLACES:
        if name in sys.modules:
            _add_methods(name)
    later = {name for name in _PLACES if name not in sys.modules}
    if later and not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported(later))


def uninstall() -> None:
    """Disable every live block offload and take the methods away; `install()` brings them back."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
    for name, place in _PLACES.items():
        owner = getattr(sys.modules.get(name), place.class_name, None)
        if owner is None or not place.is_given(owner):
            continue
        from .calls import unguard_calls
        from .handle import live_handles

        for handle in live_handles():
            handle.disable()
        unguard_calls()
        for member in place.wrapped:
            setattr(owner, member, vars(owner)[f"_diffusers_{member}"])
            delattr(owner, f"_diffusers_{member}")
        for member in place.added:
            delattr(owner, member)


def _add_methods(name: str) -> None:
    place = _PLACES[name]
    owner = getattr(sys.modules[name], place.class_name)
    if place.is_given(owner):
        return
    home, mixin_name = place.mixin
    mixin = getattr(importlib.import_module(f".{home}", __package__), mixin_name)
    for member in place.wrapped:
        setattr(owner, f"_diffusers_{member}", vars(owner)[member])
    for member in (*place.added, *place.wrapped):
        setattr(owner, member, inspect.getattr_static(mixin, member))


class _WhenImported(MetaPathFinder):
    """Finds the modules as usual and installs the methods once each has run."""

    def __init__(self, names: set[str]) -> None:
        self._names = names

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name not in self._names:
            return None
        self._names.discard(name)
        if not self._names:
            sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.loader is not None:
            spec.loader = _InstallingLoader(spec.loader)
        return spec


class _InstallingLoader(Loader):
    def __init__(self, loader: Loader) -> None:
        self._loader = loader

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        _add_methods(module.__name__)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._loader, name)

"""Gives `DiffusionPipeline` the methods of the mixin, and takes them away again.

Diffusers imports its pipelines only when one is used, which takes a second; so the methods are added
when the class comes into being, and what they need is imported when one is called.
"""

from __future__ import annotations

import importlib.util
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

_MODULE = "diffusers.pipelines.pipeline_utils"
_ADDED = ("enable_block_offload", "disable_block_offload", "block_offload", "__copy__", "__reduce_ex__")
_WRAPPED = (
    "__setattr__",
    "device",
    "maybe_free_model_hooks",
    "enable_group_offload",
)  # Diffusers' own stay under `_diffusers_<name>`


def install() -> None:
    """Add the methods to `DiffusionPipeline`, now or as soon as it is imported. Twice is once."""
    if _MODULE in sys.modules:
        _add_methods(sys.modules[_MODULE].DiffusionPipeline)
    elif not any(isinstance(finder, _WhenImported) for finder in sys.meta_path):
        sys.meta_path.insert(0, _WhenImported())


def uninstall() -> None:
    """Disable every live block offload and take the methods away; `install()` brings them back."""
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _WhenImported)]
    if _MODULE not in sys.modules:
        return
    pipeline_class = sys.modules[_MODULE].DiffusionPipeline
    if _ADDED[0] not in vars(pipeline_class):
        return
    from .calls import unguard_calls
    from .handle import live_handles

    for handle in live_handles():
        handle.disable()
    unguard_calls()
    for name in _WRAPPED:
        setattr(pipeline_class, name, vars(pipeline_class)[f"_diffusers_{name}"])
        delattr(pipeline_class, f"_diffusers_{name}")
    for name in _ADDED:
        delattr(pipeline_class, name)


def _add_methods(pipeline_class: type) -> None:
    if _ADDED[0] in vars(pipeline_class):
        return
    from .pipeline import BlockOffloadMixin

    for name in _WRAPPED:
        setattr(pipeline_class, f"_diffusers_{name}", vars(pipeline_class)[name])
    for name in (*_ADDED, *_WRAPPED):
        setattr(pipeline_class, name, vars(BlockOffloadMixin)[name])


class _WhenImported(MetaPathFinder):
    """Finds the module as usual and installs the methods once it has run."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != _MODULE:
            return None
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
        _add_methods(module.DiffusionPipeline)

    def __getattr__(self, name: str) -> Any:  # get_source and the like
        return getattr(self._loader, name)

"""A component that is held under an engine: its hooks, its guarded `to`, and the handles that want it there."""

from __future__ import annotations

from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import hooks
from .component import Component
from .engine import Engine
from .log import logger
from .units import own_tensors

if TYPE_CHECKING:
    from .handle import OffloadHandle

_SMALL = 64 * 2**20  # bytes of a component that `.to(device)` brings at once


class Held:
    """A component under an engine, the hooks that put it there, and the handles that want it there."""

    def __init__(self, module: nn.Module, component: Component, engine: Engine) -> None:
        self.module = module
        self.component = component
        self.engine = engine
        self.owners: set[OffloadHandle] = set()
        self._hooks: list[tuple[nn.Module, hooks.EngineHook]] = []
        self._former: list[OffloadHandle] = []  # who wanted it there when its hook was taken off

    def attach(self) -> None:
        """Put the hooks on: the component's own first, then those of its units and its stem."""
        self._add(self.module, hooks.ComponentHook(self.engine, self.component, self))
        self._attach_inside()

    def _attach_inside(self) -> None:
        stem = {id(tensor) for unit in self.component.stem for tensor in unit.weights.tensors}
        holders = [part for part in self.module.modules() if any(id(t) in stem for t in own_tensors(part))]
        for unit in self.component.streamed:
            self._add(unit.module, hooks.UnitHook(self.engine, unit, brings_stem=unit.module in holders))
        taken = {id(module) for module, _ in self._hooks}
        for part in holders:
            if id(part) not in taken:
                self._add(part, hooks.StemHook(self.engine, self.component))
        self.module.to = self._guarded_to()

    def release(self) -> None:
        """Take the component's own hook off, and with it everything else."""
        for module, hook in self._hooks[:1]:
            hooks.detach(module, hook)
        self.restore()  # for a component that never got its hook, because taking it in failed half way

    def restore(self) -> None:
        """The component's own hook is gone: take the others off, give the weights back."""
        self.engine.release_component(self.component)
        self.module.__dict__.pop("to", None)
        attached, self._hooks = self._hooks, []
        for module, hook in attached:
            if not isinstance(hook, hooks.ComponentHook):
                hooks.detach(module, hook)
        for handle in self.owners:
            handle.forget(self)
        self._former, self.owners = list(self.owners), set()

    def take_back(self, hook: hooks.ComponentHook) -> None:
        """The component's own hook is back, as when accelerate chains another one to it."""
        self.owners, self._former = set(self._former), []
        if not self.owners:
            return
        self.engine.readopt(self.component)
        self._hooks = [(self.module, hook)]
        self._attach_inside()
        for handle in self.owners:
            handle.remember(self)

    def _add(self, module: nn.Module, hook: hooks.EngineHook) -> None:
        hooks.attach(module, hook)
        self._hooks.append((module, hook))

    def _guarded_to(self) -> Any:
        """`module.to` that keeps the device ours and lets dtype and memory format through."""
        original, component = self.module.to, self.component

        @wraps(original)
        def to(*args: Any, **kwargs: Any) -> nn.Module:
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            if device is not None and device != self.engine.device:
                logger.warning(
                    "%s is offloaded block by block: .to(%r) leaves it where it is. "
                    "Call pipe.disable_block_offload() first to move it.",
                    component.name,
                    str(device),
                )
            elif device is not None and self.engine.streams.asynchronous:
                if component.stem_bytes <= _SMALL and not component.streamed:
                    self.engine.touch(component)  # a pipeline that is about to use it past its forward
                logger.warning(
                    "%s is offloaded block by block and comes to %s when it runs: .to(%r) changes nothing.",
                    component.name,
                    self.engine.device,
                    str(device),
                )
            changes = {}
            if dtype is not None:
                changes["dtype"] = dtype
            if memory_format is not None:
                changes["memory_format"] = memory_format
            if changes:
                with self.engine.edit(component):
                    original(**changes)
            return self.module

        return to


def find_held(module: nn.Module) -> Held | None:
    """What holds `module`, or None while it is not offloaded."""
    hook = hooks.find(module, hooks.ComponentHook)
    return hook.held if hook is not None else None

"""The hooks that tell the engine what runs: accelerate `ModelHook`s on components, stems and units."""

from __future__ import annotations

import functools
from typing import Any, Protocol, TypeVar

import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from torch import nn

from .component import Component, State, Unit
from .engine import Engine


class Holder(Protocol):
    """Whoever put a component under the engine, and can take it out again."""

    def restore(self) -> None: ...


class EngineHook(ModelHook):
    """A hook of ours: knows the engine, and hears of it when the forward raises.

    Attributes:
        execution_device: where the module computes; Diffusers reads it (`pipe._execution_device`).
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    @property
    def execution_device(self) -> torch.device:
        return self.engine.device

    def init_hook(self, module: nn.Module) -> nn.Module:
        """Wrap the forward that accelerate is about to call, so that a failure is heard of."""
        forward = module._old_forward

        @functools.wraps(forward)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            try:
                return forward(*args, **kwargs)
            except BaseException:
                self.failed(module)
                raise

        guarded.unguarded = forward
        guarded.guard = self
        module._old_forward = guarded
        return module

    def detach_hook(self, module: nn.Module) -> nn.Module:
        forward = module.__dict__.get("_old_forward")
        if getattr(forward, "guard", None) is self:
            module._old_forward = forward.unguarded
        return module

    def failed(self, module: nn.Module) -> None:
        """The module's forward raised; `post_forward` will not be called."""


class ComponentHook(EngineHook):
    """On a component's root: brings its stem, and brackets its forward with the compute stream."""

    def __init__(self, engine: Engine, component: Component, held: Holder) -> None:
        super().__init__(engine)
        self.component = component
        self.held = held

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        # `encode` and `decode` of a VAE call this without arguments and never call `post_forward`.
        if args or kwargs:
            self.engine.enter(self.component, _shapes(args, kwargs) if self.engine.budget else ())
        else:
            self.engine.touch(self.component)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.engine.leave(self.component)
        return output

    def failed(self, module: nn.Module) -> None:
        self.engine.leave(self.component)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Give the component its weights back, where they came from."""
        module = super().detach_hook(module)
        self.held.restore()
        return module


class StemHook(EngineHook):
    """On a module of the stem: when it is called on its own (`text_model.embeddings`), the stem comes."""

    def __init__(self, engine: Engine, component: Component) -> None:
        super().__init__(engine)
        self.component = component

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        self.engine.touch(self.component)
        return args, kwargs


class UnitHook(EngineHook):
    """On a streamed unit: its weights are there while it computes, and free behind it."""

    def __init__(self, engine: Engine, unit: Unit) -> None:
        super().__init__(engine)
        self.unit = unit

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        if torch.is_grad_enabled():
            self._refuse_gradients(args, kwargs)
        self.engine.acquire(self.unit)
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.engine.release(self.unit)
        return output

    def failed(self, module: nn.Module) -> None:
        self.engine.release(self.unit)

    def detach_hook(self, module: nn.Module) -> nn.Module:
        """Without its hook a unit can only work if it stays on the device."""
        self.engine.make_resident(self.unit)
        return super().detach_hook(module)

    def _refuse_gradients(self, args: tuple, kwargs: dict) -> None:
        if self.unit.state is State.RESIDENT:
            return
        given = (value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))
        if any(tensor.requires_grad for tensor in (*self.unit.weights.tensors, *given)):
            raise RuntimeError(
                f"gradients are enabled through the streamed block {self.unit.component.name}.{self.unit.name}, "
                "whose weights leave the device after its forward. Call it under torch.no_grad() or "
                "torch.inference_mode(), set requires_grad_(False), or disable the block offload to train."
            )


def _shapes(args: tuple, kwargs: dict) -> tuple:
    """The shapes of the tensors that a forward is given, in lists as well."""
    given = [*args, *kwargs.values()]
    tensors = [t for value in given for t in (value if isinstance(value, (list, tuple)) else (value,))]
    return tuple(t.shape for t in tensors if isinstance(t, torch.Tensor))


_Hook = TypeVar("_Hook", bound=EngineHook)


def attach(module: nn.Module, hook: EngineHook) -> None:
    """Add a hook behind those that are there already."""
    add_hook_to_module(module, hook, append=True)


def find(module: nn.Module, kind: type[_Hook]) -> _Hook | None:
    """The hook of class `kind` on `module`, alone or in a chain."""
    present = getattr(module, "_hf_hook", None)
    chained = present.hooks if isinstance(present, SequentialHook) else (present,)
    return next((hook for hook in chained if isinstance(hook, kind)), None)


def detach(module: nn.Module, hook: EngineHook) -> None:
    """Remove one hook and leave the others as they are; does nothing if it has gone already."""
    present = getattr(module, "_hf_hook", None)
    if present is hook:
        remove_hook_from_module(module)
    elif isinstance(present, SequentialHook) and hook in present.hooks:
        hook.detach_hook(module)
        rest = tuple(other for other in present.hooks if other is not hook)
        if len(rest) == 1:
            module._hf_hook = rest[0]
        else:
            present.hooks = rest

"""Whether the passes of a module may take turns at all: who else has a say in its forwards."""

from __future__ import annotations

from types import MethodType

import torch
from accelerate.hooks import SequentialHook
from torch import nn
from torch.nn.modules import module as modules

from ..engine import Engine

_GLOBAL = ("_global_forward_hooks", "_global_forward_pre_hooks")


def why_unsuitable(root: nn.Module) -> str | None:
    """Why forwards of `root` may not take turns, None if nothing speaks against it.

    Hooks of others may keep something from call to call, or change something for the time of a forward.
    """
    if root.training:  # layers of adapters often are, and do no harm
        return "it is in training mode"
    for name, part in root.named_modules():
        why = _why_not(part, part is root)
        if why is not None:
            return f"{name or 'it'} {why}"
    return None


def why_none_is_suitable() -> str | None:
    """What speaks against any module now."""
    if any(getattr(modules, name, None) for name in _GLOBAL):
        return "there are torch hooks for all modules"
    callback = getattr(torch._C._dynamo.eval_frame, "get_eval_frame_callback", lambda: None)()
    return "it runs under torch.compile" if callable(callback) else None


def _why_not(part: nn.Module, is_root: bool) -> str | None:
    if part._forward_hooks or part._forward_pre_hooks:
        return "has torch hooks"
    registry = part.__dict__.get("_diffusers_hook")
    if registry is not None and registry.hooks:
        return f"has hooks of Diffusers ({', '.join(registry.hooks)})"
    hook = part.__dict__.get("_hf_hook")
    for each in hook.hooks if isinstance(hook, SequentialHook) else (hook,) if hook is not None else ():
        if not isinstance(getattr(each, "engine", None), Engine):
            return f"has a hook that is not ours ({type(each).__name__})"
        if hasattr(each, "held") and not is_root:
            return "is offloaded by itself"
    if part._compiled_call_impl is not None or isinstance(part, torch.jit.ScriptModule):
        return "is compiled"
    if not _runs_its_own_forward(part):
        return "has a forward that was put in place of its own"
    if any(buffer is not None and buffer.is_inference() for buffer in part._buffers.values()):
        return "has buffers made in inference mode, whose changes nobody counts"
    return None


def _runs_its_own_forward(part: nn.Module) -> bool:
    """Whether nothing but our hooks lies between a call and the forward of the module's class."""
    forward = part.__dict__.get("forward")
    if forward is None or forward == MethodType(type(part).forward, part):
        return True  # accelerate leaves the method there when it takes a hook off
    if getattr(getattr(forward, "func", None), "__module__", "") != "accelerate.hooks":
        return False
    forward = part.__dict__.get("_old_forward")
    while hasattr(forward, "unguarded"):
        forward = forward.unguarded
    return getattr(forward, "__func__", None) is type(part).forward

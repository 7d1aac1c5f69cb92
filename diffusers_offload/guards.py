"""What an offloaded module refuses: to be copied or pickled, and to be moved by others.

Its weights are views of memory that is shared, and its hooks know the engine: a copy of that would be a copy of
everything, or wrong. The refusals lie in the instance, so they are met before anything is copied.
"""

from __future__ import annotations

import functools
from typing import Any, NoReturn

import torch
from torch import nn

_MOVES = ("cpu", "cuda", "npu", "xpu")
REMEDY = "Call pipe.disable_block_offload() (or handle.disable()) first"


def refuse_copies(module: nn.Module) -> None:
    """Let `copy.deepcopy` and `pickle` of `module` raise."""
    module.__dict__["__reduce_ex__"] = functools.partial(refuse_copy, type(module).__name__)


def allow_copies(module: nn.Module) -> None:
    """Undo `refuse_copies`."""
    module.__dict__.pop("__reduce_ex__", None)


def guard(module: nn.Module, name: str) -> None:
    """Let `enable_group_offload` of a component raise, and `cuda()` and its like do what `to` does."""
    if hasattr(module, "enable_group_offload"):
        module.__dict__["enable_group_offload"] = functools.partial(refuse_group_offload, name)
    for kind in _MOVES:
        if hasattr(module, kind):
            module.__dict__[kind] = functools.partial(_move, module, kind)


def unguard(module: nn.Module) -> None:
    """Undo `guard`."""
    for name in ("enable_group_offload", *_MOVES):
        module.__dict__.pop(name, None)


def refuse_copy(what: str, *_: Any) -> NoReturn:
    """Raise TypeError, as Python does for what cannot be pickled."""
    raise TypeError(
        f"cannot copy or pickle {what} while it is offloaded block by block. {REMEDY}; state_dict() and "
        "save_pretrained() work at any time."
    )


def refuse_group_offload(name: str, *_: Any, **__: Any) -> NoReturn:
    """Raise ValueError: Diffusers' group offloading would move the same weights."""
    raise ValueError(
        f"{name} is offloaded block by block, and group offloading would move the same weights. {REMEDY}."
    )


def _move(module: nn.Module, kind: str, device: int | str | torch.device | None = None) -> nn.Module:
    return module.to(
        kind if device is None else torch.device(kind, device) if isinstance(device, int) else device
    )

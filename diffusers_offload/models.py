"""The mixin of models, Diffusers' and transformers': while offloaded, one answers the device it computes on.

Pipelines make inputs where `text_encoder.device` says. That is the device of a model's first parameter: the
host, while its weights are there. Needs none of the package before something is offloaded.
"""

from __future__ import annotations

import sys

import torch
from torch import nn

# Who puts new weights into a model asks where the old ones lie: on the host, beside which the new ones go.
_LOADERS = ("diffusers.loaders.", "transformers.integrations.peft", "peft.")


class HeldModelMixin:
    """What `import diffusers_offload` gives models."""

    @property
    def device(self) -> torch.device:
        """Where the model computes, also while its weights are on the host."""
        if torch.compiler.is_compiling():  # within the forward, where the stem is on the device
            return self._diffusers_device
        asker = sys._getframe(1).f_globals.get("__name__") or ""
        found = None if asker.startswith(_LOADERS) else _execution_device(self)
        return self._diffusers_device if found is None else found


def _execution_device(module: nn.Module) -> torch.device | None:
    """Where `module` computes if it is offloaded, or a part of what is; else None."""
    hooks = sys.modules.get(f"{__package__}.hooks")
    if hooks is None:
        return None
    for part in module.modules():
        hook = hooks.find(part, hooks.EngineHook)
        if hook is not None:
            offloaded_within = part is not module and isinstance(hook, hooks.ComponentHook)
            return None if offloaded_within else hook.execution_device
        if any(parameter is not None for parameter in part._parameters.values()):
            return None  # the first parameter is as it ever was
    return None

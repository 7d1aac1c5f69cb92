"""What a forward is given: where it lies, and of what shapes it is."""

from __future__ import annotations

from typing import Any

import torch


def elsewhere(value: Any, device: torch.device) -> bool:
    """Whether a tensor in `value`, in lists and dictionaries as well, is not on `device`; scalars may be anywhere."""
    if isinstance(value, torch.Tensor):
        return value.device != device and value.dim() > 0
    if isinstance(value, (list, tuple)):
        return any(elsewhere(item, device) for item in value)
    return isinstance(value, dict) and any(elsewhere(item, device) for item in value.values())


def shapes_of(args: tuple, kwargs: dict) -> tuple:
    """The shapes of the tensors that a forward is given, in lists as well."""
    given = [*args, *kwargs.values()]
    tensors = [t for value in given for t in (value if isinstance(value, (list, tuple)) else (value,))]
    return tuple(t.shape for t in tensors if isinstance(t, torch.Tensor))

"""What a forward is given: where it lies, and of what shapes it is; and what it returns."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

_DEPTH = 4  # of an output: a distribution in a dataclass in a tuple


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


def tensors_of_output(value: Any, depth: int = _DEPTH) -> Iterator[torch.Tensor]:
    """The tensors that a forward returned: in containers, and as attributes of whatever else it is."""
    if isinstance(value, torch.Tensor):
        yield value
    elif depth and not isinstance(value, (str, bytes, int, float, type(None), torch.nn.Module)):
        if isinstance(value, Mapping):
            items = value.values()
        elif isinstance(value, (list, tuple)):
            items = value
        else:
            items = getattr(value, "__dict__", {}).values()
        for item in items:
            yield from tensors_of_output(item, depth - 1)

"""What a forward is given: where it lies, and of what shapes it is; and what it returns."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from types import BuiltinFunctionType, FunctionType, MethodType, ModuleType, NoneType
from typing import Any

import torch

_FUNCTIONS = (FunctionType, BuiltinFunctionType, MethodType)
_WITHOUT_TENSORS = (
    str,
    bytes,
    int,
    float,
    NoneType,
    type,
    ModuleType,
    torch.nn.Module,
    torch.dtype,
    *_FUNCTIONS,
)


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


def tensors_of_output(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a forward returned: in containers, and as attributes of whatever else it is."""
    seen: set[int] = set()
    left = [value]
    while left:
        each = left.pop()
        if isinstance(each, torch.Tensor):
            yield each
        elif id(each) not in seen and not isinstance(each, _WITHOUT_TENSORS):
            seen.add(id(each))
            left.extend(_parts(each))


def _parts(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    if isinstance(value, (list, tuple, set, frozenset, deque)):
        return value
    kinds = (vars(kind).get("__slots__", ()) for kind in type(value).__mro__)
    slots = (name for each in kinds for name in ((each,) if isinstance(each, str) else each))
    return [*getattr(value, "__dict__", {}).values(), *(getattr(value, name, None) for name in slots)]

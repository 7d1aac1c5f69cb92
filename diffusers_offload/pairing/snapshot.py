"""A module's state as Python has it, so that one can tell later whether anything has changed.

Attributes of all submodules, and of the plain objects among these (attention processors), with one level of what is
in dictionaries, lists and sets; how often tensors were written to. Comparing takes about a microsecond a submodule.
"""

from __future__ import annotations

import types
from collections.abc import Iterator
from operator import is_
from typing import Any

import torch
from accelerate.hooks import ModelHook, SequentialHook
from torch import nn

_LARGE = 1024  # items of a container that are not looked at one by one
_CONTAINERS = (dict, list, set)
_OPAQUE = (  # whose attributes say nothing, or are looked at otherwise
    nn.Module,
    torch.Tensor,
    ModelHook,
    SequentialHook,
    type,
    types.ModuleType,
    types.FunctionType,
    types.MethodType,
    types.BuiltinFunctionType,
)
_REGISTRY = "_diffusers_hook"


class Snapshot:
    """The state of `module`, now. It keeps what the attributes are alive."""

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        self._spaces: list[tuple[dict, dict]] = []  # attributes, and what they were
        self._filled: list[tuple[Any, tuple, Any]] = []  # containers, what was in them, and a copy
        self._empty: list[Any] = []  # containers
        self._tensors: list[torch.Tensor] = []
        seen: set[int] = set()
        for part in module.modules():
            self._add_space(vars(part), seen, plain=True)
        self._versions = [tensor._version for tensor in self._tensors]

    def matches(self) -> bool:
        """Whether nothing has changed since."""
        return self.change() is None

    def change(self) -> str | None:
        """What has changed, in a word or two; None if nothing has."""
        for space, before in self._spaces:
            if len(space) != len(before) or not all(map(is_, space.values(), before.values())):
                named = _changed(space, before)
                if named is not None:
                    return named
        if any(self._empty):
            return "what was empty"
        for container, items, _ in self._filled:
            if not _alike(tuple(_items(container)), items):
                return f"what is in a {type(container).__name__}"
        if [tensor._version for tensor in self._tensors] != self._versions:
            return "weights or buffers"
        return None

    def restore(self) -> bool:
        """Make it all as it was; returns whether that was possible: nobody can undo what was written to a tensor."""
        for space, before in self._spaces:
            if _changed(space, before) is not None:
                space.clear()
                space.update(before)
        for container, items, copy in self._filled:
            if not _alike(tuple(_items(container)), items):
                container.clear()
                (container.extend if isinstance(container, list) else container.update)(copy)
        for container in self._empty:
            container.clear()
        return self.matches()

    def _add_space(self, space: dict, seen: set[int], plain: bool) -> None:
        self._spaces.append((space, dict(space)))
        for value in space.values():
            self._add_value(value, seen, plain)

    def _add_value(self, value: Any, seen: set[int], plain: bool) -> None:
        if isinstance(value, _CONTAINERS):
            self._add_container(value, seen)
        elif isinstance(value, torch.Tensor):
            self._add_tensor(value, seen)
        elif plain and id(value) not in seen and not isinstance(value, _OPAQUE):
            attributes = getattr(value, "__dict__", None)
            if isinstance(attributes, dict):
                seen.add(id(value))
                if hasattr(value, "hooks") and hasattr(value, "register_hook"):  # Diffusers' registry
                    self._add_container(value.hooks, seen)
                else:
                    self._add_space(attributes, seen, plain=False)

    def _add_container(self, container: Any, seen: set[int]) -> None:
        if id(container) in seen:
            return
        seen.add(id(container))
        if not container:
            self._empty.append(container)
            return
        copy = (
            list(container)
            if isinstance(container, list)
            else dict(container)
            if isinstance(container, dict)
            else set(container)
        )
        self._filled.append((container, tuple(_items(container)), copy))
        if len(container) <= _LARGE:
            for item in container.values() if isinstance(container, dict) else container:
                if isinstance(item, torch.Tensor):
                    self._add_tensor(item, seen)

    def _add_tensor(self, tensor: torch.Tensor, seen: set[int]) -> None:
        if id(tensor) not in seen and not tensor.is_inference():
            seen.add(id(tensor))
            self._tensors.append(tensor)


def _items(container: Any) -> Iterator[Any]:
    if len(container) > _LARGE:
        yield len(container)
    elif isinstance(container, dict):
        yield from container.keys()
        yield from container.values()
    elif isinstance(container, set):
        yield from sorted(container, key=id)
    else:
        yield from container


def _changed(space: dict, before: dict) -> str | None:
    """The attribute that is another one now; a number that is computed anew is no other one."""
    for name in (*space, *before):
        if name not in space or name not in before or not _same(space[name], before[name]):
            return f"its attribute {name}"
    return None


def _alike(now: tuple, before: tuple) -> bool:
    return len(now) == len(before) and (all(map(is_, now, before)) or all(map(_same, now, before)))


def _same(now: Any, before: Any) -> bool:
    if now is before:
        return True
    plain = type(now) is type(before) and type(now) in (int, float, bool, str, torch.device, tuple)
    return plain and repr(now) == repr(before)

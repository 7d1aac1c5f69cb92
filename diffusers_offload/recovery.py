"""What can be done when a forward fails for a reason of ours: less memory than was thought, a weight missed.

The forward is then run again, from the same inputs and the same random state, with less on the device.
"""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from .component import Component


def is_out_of_memory(error: BaseException) -> bool:
    """Whether the device had no memory left."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and "out of memory" in str(error)
    )


def missed_a_weight(error: BaseException, component: Component, device: torch.device) -> bool:
    """Whether a weight may have been used on the host, in a forward that nobody watched.

    Other inputs may lead a model along other paths than those that its first forwards took.
    """
    return (
        isinstance(error, RuntimeError)
        and not component.watched
        and bool(component.streamed)
        and device.type != "cpu"
        and any(words in str(error) for words in ("same device", "should be the same", "is on cpu"))
    )


def remembers(module: nn.Module) -> bool:
    """Whether a hook of Diffusers' within keeps something from forward to forward (its caches do).

    Half a forward has changed it, so the forward cannot be run again.
    """
    registries = (getattr(part, "_diffusers_hook", None) for part in module.modules())
    return any(hook._is_stateful for each in registries if each is not None for hook in each.hooks.values())


class Inputs:
    """What a forward is given, so that it can be given again: some take items out of a list, or write to a tensor."""

    def __init__(self, args: tuple, kwargs: dict) -> None:
        self._copy = _containers((args, kwargs))
        self._versions = [tensor._version for tensor in _tensors(self._copy)]

    def again(self) -> tuple[tuple, dict]:
        """The same tensors in containers of their own."""
        return _containers(self._copy)

    def intact(self) -> bool:
        """Whether no tensor among them has been written to."""
        return self._versions == [tensor._version for tensor in _tensors(self._copy)]


def _containers(value: Any) -> Any:
    """`value` with its lists, tuples and dictionaries copied; what they hold is shared."""
    if type(value) in (list, tuple):
        return type(value)(_containers(item) for item in value)
    if type(value) is dict:
        return {key: _containers(item) for key, item in value.items()}
    return value


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    if isinstance(value, torch.Tensor) and not value.is_inference():
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _tensors(item)


def let_go_of_tensors(error: BaseException) -> None:
    """Free what the frames that the error went through hold: activations, which are in the way now."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__

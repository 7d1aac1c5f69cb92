"""Calls of pipelines: one thread at a time, and what came to the device for a call leaves at its end.

A pipeline's scheduler is one object with a state, so two calls at once would spoil each other, offloaded or not.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from .engine import Engine
from .held import find_held

_guarded: WeakKeyDictionary[type, tuple[Callable, Callable]] = WeakKeyDictionary()  # as it is, and was


def engines_of(modules: Iterable[object]) -> list[Engine]:
    """The engines that hold any of `modules`, in an order that is the same for every thread."""
    held = (find_held(module) for module in modules if isinstance(module, nn.Module))
    return sorted({each.engine for each in held if each is not None}, key=id)


@contextmanager
def exclusively(engines: Iterable[Engine]) -> Iterator[None]:
    """Other threads wait."""
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.lock)
        yield


@contextmanager
def calling(engines: Iterable[Engine]) -> Iterator[None]:
    """Other threads wait, and what came to the device within leaves at the end."""
    with ExitStack() as stack:
        for engine in engines:
            stack.enter_context(engine.call())
        yield


def guard_calls(pipeline_class: type) -> None:
    """Let the calls of offloaded pipelines of this class follow one another. Twice is once."""
    owner = next((c for c in pipeline_class.__mro__ if "__call__" in vars(c)), None)
    if owner is not None and owner not in _guarded:
        call = vars(owner)["__call__"]
        owner.__call__ = _guard(call)
        _guarded[owner] = (owner.__call__, call)


def unguard_calls() -> None:
    """Undo `guard_calls` for every class; leaves what others have put in its place since."""
    for owner, (guarded, call) in _guarded.items():
        if vars(owner)["__call__"] is guarded:
            owner.__call__ = call
    _guarded.clear()


def _guard(call: Callable) -> Callable:
    @functools.wraps(call)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        for held in self.block_offload.holds.values() if self.block_offload is not None else ():
            held.refuse_lost_hook()
        with calling(engines_of(vars(self).values())):
            return call(self, *args, **kwargs)

    vars(guarded).update(vars(call))  # who unwraps the call to get past `torch.no_grad` still does
    return guarded

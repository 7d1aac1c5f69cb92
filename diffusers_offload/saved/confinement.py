"""`confined`: what somebody's config may not do while a model is built from it.

The classes are those of installed libraries, the values are a stranger's. Within, nothing reaches the network,
nobody is asked anything (whether to run code from the Hub, say), and a model of endless size ends in an error.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

MOST_MODULES = 250_000  # of one component: more than the largest mixtures of experts have
LONGEST_BUILD = 30.0  # seconds for one component; those of the true sizes take a few
_REFUSED = {
    "socket.connect": "it would connect to another machine",
    "socket.getaddrinfo": "it would look up another machine",
    "builtins.input": "it would ask a question",
}

_confined = threading.local()


class ConfinedError(RuntimeError):
    """A config led to something that `confined` does not allow."""


@contextmanager
def confined() -> Iterator[None]:
    """Let this thread neither connect nor ask within, and build no more than a model's worth of modules.

    The time is limited in the main thread alone: signals reach no other.

    Raises:
        ConfinedError: it tried, from within.
    """
    _watch_audits()
    count = 0

    def registered(parent: nn.Module, name: str, child: nn.Module | None) -> None:
        nonlocal count
        count += 1
        if count > MOST_MODULES:
            raise ConfinedError(f"it has more than {MOST_MODULES} modules")

    hook = register_module_module_registration_hook(registered)
    _confined.active = True
    try:
        with _time_limit(LONGEST_BUILD):
            yield
    finally:
        _confined.active = False
        hook.remove()


@contextmanager
def _time_limit(seconds: float) -> Iterator[None]:
    def expired(number: int, frame: Any) -> None:
        raise ConfinedError(f"building it takes more than {seconds:.0f} s")

    if threading.current_thread() is not threading.main_thread() or signal.getitimer(signal.ITIMER_REAL)[0]:
        yield  # the only timer of the process is somebody else's
        return
    before = signal.signal(signal.SIGALRM, expired)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0.0)
        signal.signal(signal.SIGALRM, before)


def _watch_audits() -> None:
    """Install the audit hook, once: Python has no way to take one off. It does nothing unless confined."""
    global _watching
    if not _watching:
        _watching = True
        sys.addaudithook(_refuse)


_watching = False


def _refuse(event: str, arguments: tuple) -> None:
    if event in _REFUSED and getattr(_confined, "active", False):
        raise ConfinedError(_REFUSED[event])

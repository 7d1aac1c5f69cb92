"""Several forwards of one module, which take turns unit by unit, so that each unit is loaded once for all.

The first, the lead, runs where it was called; each follower runs in a `greenlet`. A unit stays in use from when
the lead begins it until the last follower has computed it. Only the lead makes way, behind a unit's forward and
before its release; a follower goes on as far as that unit and then waits for the lead to reach the next. One that
uses units that the lead does not, or in another order, waits until the lead has finished, and then brings them itself.

What torch keeps per thread (gradients on or off, autocast, function modes) does not change hands: where it is not
as it was when the forward began, the pass that runs goes on.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from greenlet import GreenletExit, getcurrent, greenlet

from ..component import State, Unit
from ..recovery import is_out_of_memory
from ..streams import Streams
from .circumstances import modes

_STUBBORN = 8  # times that a forward may swallow the exception that ends it


@dataclass
class Outcome:
    """What became of a follower.

    Attributes:
        result: what its forward returned, in a tuple; None if it failed.
        error: why it failed, in words.
        out_of_memory: the device had none left for it.
    """

    result: tuple | None = None
    error: str = ""
    out_of_memory: bool = False


class _Follower:
    def __init__(self, forward: Callable[[], Any]) -> None:
        self.outcome = Outcome()
        self.awaits: Unit | None = None  # the unit that it cannot go on without; None: it has work to do
        self.fatal: BaseException | None = None  # what is the user's, and not the forward's
        self._forward: Callable[[], Any] | None = forward
        self.greenlet = greenlet(self._run)
        self.greenlet.gr_context = contextvars.copy_context()

    def _run(self) -> None:
        try:
            self.outcome.result = (self._forward(),)
        except GreenletExit:
            pass
        except Exception as error:  # not kept: it knows the frames, which hold activations
            self.outcome.error = f"{type(error).__name__}: {error}"
            self.outcome.out_of_memory = is_out_of_memory(error)
        except BaseException as error:
            self.fatal = error
        finally:
            self._forward = None


class Passes:
    """One run of several forwards.

    Args:
        streams: the device's streams.
        followers: the forwards besides the lead's.
    """

    def __init__(self, streams: Streams, followers: Sequence[Callable[[], Any]]) -> None:
        self._streams = streams
        self._lead = getcurrent()
        self._followers = [_Follower(forward) for forward in followers]
        self._of = {each.greenlet: each for each in self._followers}
        self._at: Unit | None = None  # where the lead makes way
        self._over = self._ending = False
        self._modes = self._modes_now()

    def run(self, lead: Callable[[], Any]) -> tuple[Any, list[Outcome]]:
        """What `lead` returns, and what became of the followers, all of which are over.

        Raises: what `lead` does, and what interrupts a follower (`KeyboardInterrupt`).
        """
        try:
            output = lead()
            self._over = True
            for follower in self._followers:
                while not follower.greenlet.dead:
                    self._resume(follower)
            return output, [each.outcome for each in self._followers]
        finally:
            self._end()

    # --- called by the units' hooks ---------------------------------------------------------------------

    def before(self, unit: Unit) -> None:
        """A forward of `unit` is about to begin: a follower waits until the unit is there."""
        follower = self._of.get(getcurrent())
        while follower is not None:
            if self._ending:
                raise GreenletExit
            if unit is self._at or self._over or unit.state is State.RESIDENT or not self._may_switch():
                return
            follower.awaits = unit
            self._lead.switch()

    def make_way(self, unit: Unit) -> None:
        """The lead has computed `unit`, and has not released it: the followers do so now."""
        if getcurrent() is not self._lead or unit.state is State.RESIDENT or not self._may_switch():
            return
        self._at = unit
        try:
            for follower in self._followers:
                if not follower.greenlet.dead and follower.awaits in (None, unit):
                    self._resume(follower)
        finally:
            self._at = None

    def done(self) -> None:
        """A unit was released: a follower gives way to the lead, which releases it as well."""
        follower = self._of.get(getcurrent())
        if follower is not None and not self._over and not self._ending and self._may_switch():
            follower.awaits = None
            self._lead.switch()

    # ----------------------------------------------------------------------------------------------------

    def _resume(self, follower: _Follower) -> None:
        follower.awaits = None
        follower.greenlet.switch()
        if follower.fatal is not None:
            fatal, follower.fatal = follower.fatal, None
            raise fatal

    def _end(self) -> None:
        """Nobody is left half way."""
        self._ending = True
        for follower in self._followers:
            for _ in range(_STUBBORN):
                if follower.greenlet.dead:
                    break
                follower.greenlet.throw(GreenletExit)

    def _may_switch(self) -> bool:
        return self._modes_now() == self._modes

    def _modes_now(self) -> tuple:
        return (*modes(self._streams.device.type), self._streams.current())

"""The guidance passes of one component: when several are run for one load, and when that may be trusted.

A step's first call, the lead, and those that follow it in every step (`pairing`) are run together (`passes`). Before
results are handed out, the same is rehearsed: the passes run together, then each call runs on its own when it comes,
and every bit must be the same. That holds for arguments of this kind, and for the module as it is (`snapshot`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import torch

from ..component import Component, State
from ..log import logger
from .circumstances import circumstances
from .history import Call, Expected, History, Unpairable, same_results, share_memory, tensors_in
from .passes import Outcome, Passes
from .snapshot import Snapshot
from .suitability import why_none_is_suitable, why_unsuitable

if TYPE_CHECKING:
    from ..engine import Engine

_LOOKED_AT = 4  # calls at the beginning of a pipeline's call that are looked at closely
_KINDS = 256  # of calls that are remembered from call to call of the pipeline
_PATIENCE = 2  # results thrown away beyond those that were used, in one call of the pipeline


@dataclass
class Meeting:
    """What a call of the component has met with.

    Attributes:
        call: its arguments.
        followers: calls to run together with it.
        rehearsal: nothing of that is handed out.
        result: what it returns, in a tuple, having been computed before.
        expected: what it has to return, in a tuple: its part in a rehearsal.
        looked_at: its forward, run on its own, is going to be looked at closely.
        lost: what it is computed from is not as it was, so that it cannot be run again.
    """

    pairs: Pairs
    call: Call
    followers: list[Expected] = field(default_factory=list)
    rehearsal: bool = False
    result: tuple | None = None
    expected: _Pending | None = None
    looked_at: bool = False
    lost: bool = False
    _taken: bool = False

    @property
    def key(self) -> tuple:
        """What the calls that go together are like."""
        return (self.call.spec, *(each.spec for each in self.followers))

    def shapes(self, own: tuple) -> tuple | None:
        """What a budget is to know the forwards by, if they are to run together; None if they are not.

        Args:
            own: the shapes of the call's own inputs.
        """
        if not self.followers:
            return None
        together = (own, *(each.shapes for each in self.followers))
        if self.pairs.worth_it(own, together):
            return together
        self.followers = []
        return None

    def take_followers(self) -> bool:
        """Whether there are followers to run; True once."""
        taken, self._taken = self._taken, True
        return bool(self.followers) and not taken


@dataclass
class _Pending:
    """A follower that was computed, and whose call is still to come."""

    expected: Expected
    result: tuple
    modes: tuple
    key: tuple
    rehearsal: bool
    proves: bool = False  # it is the last of a rehearsal


class Pairs:
    """Runs the passes of `component` together where that is right, and worth it.

    Attributes:
        reason: why the latest calls that might have been paired were not; "" if they were, or there were none.
    """

    def __init__(self, engine: Engine, component: Component) -> None:
        self._engine = engine
        self._component = component
        self._history = History()
        self._pending: deque[_Pending] = deque()
        self._snapshot: Snapshot | None = None
        self._unsuitable: str | None = None  # why the module is, "" if it is not; None: nobody has looked
        self._looks: dict[
            tuple, str
        ] = {}  # what calls did besides computing, run on their own: "" for nothing
        self._wanted: set[tuple] = set()  # of the calls that would go together
        self._proven: set[tuple] = set()  # of calls that go together: rehearsed
        self._refused: dict[tuple, str] = {}  # of those that do not, and why
        self._balance = 0  # results used, less those thrown away, in this call of the pipeline
        self._seen = 0  # calls in this call of the pipeline
        self.reason = ""

    # --- before a forward -------------------------------------------------------------------------------

    def meet(self, args: tuple, kwargs: dict[str, Any]) -> Meeting | None:
        """The component is called; None if it is to be run on its own, and nothing is learned from it."""
        self._seen += 1
        if self._engine.pair_passes is False or not self._component.streamed:
            self.forget()
            return None
        if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
            why = "gradients are enabled" if torch.is_grad_enabled() else "under torch.inference_mode()"
            return self._not_paired(why)
        try:
            call = Call(args, kwargs)
        except Unpairable as error:
            return self._not_paired(str(error))
        meeting = Meeting(self, call)
        disappointed = bool(self._pending) and not self._claim(meeting)
        if disappointed:
            self.discard()
        followers = self._history.followers(call) if not self._pending and meeting.result is None else []
        self._history.add(call)
        if meeting.result is not None:
            return meeting
        unknown = call.spec in self._wanted and self._looks.get(call.spec) != ""
        new = disappointed or unknown or self._seen <= _LOOKED_AT
        meeting.looked_at = new or bool(followers or self._pending or meeting.expected)
        if meeting.looked_at:
            self._renew_snapshot()
        if followers and meeting.expected is None:
            meeting.followers = followers
            meeting.rehearsal = meeting.key not in self._proven
            self._wanted = {*meeting.key}
            why = self._why_not(meeting)
            self.reason = why or ""
            if why is not None:
                meeting.followers = []
        return meeting

    def _not_paired(self, why: str) -> None:
        if self._seen > _PATIENCE:  # it is called again and again
            self.reason = why
        self.forget()

    def _claim(self, meeting: Meeting) -> bool:
        """Whether the call is the follower that comes next; it is then given what there is for it."""
        pending = self._pending[0]
        if (
            pending.modes != circumstances(self._engine.device.type)
            or not pending.expected.is_met_by(meeting.call)
            or self._snapshot is None
            or not self._snapshot.matches()
            or not self._in_place()
            or self._component.module in self._engine.suspended
        ):
            return False
        self._pending.popleft()
        if pending.rehearsal:
            meeting.expected = pending
            return True
        engine = self._engine
        meeting.result = pending.result
        engine.counters.paired += 1
        engine.counters.forwards += 1
        self._balance += 1
        engine.streams.current().wait_stream(engine.streams.compute)  # it may be another than the lead's
        return True

    def _why_not(self, meeting: Meeting) -> str | None:
        """Why the calls are not run together now; "" says that the time has not come yet."""
        component = self._component
        if self._unsuitable is None:
            self._unsuitable = why_unsuitable(component.module) or ""
        why = self._unsuitable or why_none_is_suitable() or self._refused.get(meeting.key)
        if why:
            return why
        if -self._balance > _PATIENCE:
            return "calls that were foreseen did not come"
        if not self._in_place():
            return "weights were replaced in the course of a call"
        seen = [self._looks.get(spec) for spec in meeting.key]
        why = next(filter(None, seen), None)
        if why is None and (None in seen or not component.known or component.strays):
            return ""
        return why

    def worth_it(self, shapes: tuple, together: tuple) -> bool:
        """Whether forwards gain by running together, as far as the budget knows, and have the memory.

        Args:
            shapes: of the inputs of the first; `together` those of all.
        """
        budget, component = self._engine.budget, self._component
        if budget is None:
            return True
        weights = self._engine.keeping.standing_bytes(component)
        why = budget.why_not_together(component, shapes, together, weights)
        if why is not None and (self._engine.pair_passes is None or why.startswith("memory")):
            self.reason = why
            return False
        return True

    # --- the forwards together --------------------------------------------------------------------------

    def run(
        self,
        meeting: Meeting,
        lead: Callable[[], Any],
        forward: Callable,
        send: Callable[[tuple, dict], tuple[tuple, dict]],
    ) -> tuple | None:
        """Run the passes together; returns what the lead returned, in a tuple, or None if that cannot be used.

        Args:
            lead: the lead's forward.
            forward: is called with a follower's arguments.
            send: brings these to the device.

        Raises: what the lead does.
        """
        engine, inputs = self._engine, [meeting.call, *meeting.followers]
        try:
            given = [send(*expected.arguments()) for expected in meeting.followers]
        except Unpairable as error:
            self.reason = str(error)
            return None
        passes = Passes(engine.streams, [partial(forward, *args, **kwargs) for args, kwargs in given])
        engine.passes = passes
        try:
            output, outcomes = passes.run(lead)
        finally:
            engine.passes = None
        if not all(each.intact() for each in inputs):
            self.refuse(meeting, "its forward writes to its arguments")
            meeting.lost = True
            return None
        if engine.random_changed():
            self.refuse(meeting, "its forward draws random numbers")
            return None
        changed = self._snapshot.change()
        if changed is not None:
            self.refuse(meeting, f"its forward changes {changed}")
            meeting.lost = not self._snapshot.restore()
            return None
        self._keep(meeting, output, outcomes)
        return None if meeting.key in self._refused else (output,)

    def _keep(self, meeting: Meeting, output: Any, outcomes: list[Outcome]) -> None:
        """Keep the followers' results for their calls."""
        now = circumstances(self._engine.device.type)
        try:
            seen = list(tensors_in(output))
            for expected, outcome in zip(meeting.followers, outcomes, strict=True):
                if outcome.result is None:
                    self.refuse(meeting, f"a pass that ran together with another failed ({outcome.error})")
                    break
                made = list(tensors_in(outcome.result))
                if share_memory(made, seen):
                    self.refuse(meeting, "its results share memory")
                    break
                seen += made
                self._pending.append(_Pending(expected, outcome.result, now, meeting.key, meeting.rehearsal))
        except Unpairable as error:
            self.refuse(meeting, str(error))
        if meeting.key in self._refused:
            self._pending.clear()
        elif meeting.rehearsal:
            self._pending[-1].proves = True

    def refuse(self, meeting: Meeting, why: str) -> None:
        """Calls like these are not run together again while the module stays as it is."""
        if meeting.key not in self._refused:
            logger.info("%s: two passes are not run for one load: %s", self._component.name, why)
        self._refused[meeting.key] = self.reason = why
        self._balance -= 1
        self._proven.discard(meeting.key)
        self._pending.clear()

    # --- after a forward on its own ---------------------------------------------------------------------

    def ran(self, meeting: Meeting, output: Any, before: tuple, after: tuple) -> None:
        """A call ran on its own and returned `output`: see what speaks against pairing it.

        Args:
            before: its arguments, positional and by name, in containers that it was not given; `after` in those
                that it was.
        """
        if not meeting.looked_at:
            return
        self._looks[meeting.call.spec] = self._what_it_did(meeting.call, output, before, after)
        if meeting.expected is not None:
            self._compare(meeting.expected, output)

    def lead_proved(self, meeting: Meeting, together: Any, alone: Any) -> None:
        """In a rehearsal the lead returned `together` with the others, and `alone` on its own."""
        if meeting.key not in self._refused and not _same(together, alone):
            self.refuse(meeting, _DIFFERS)

    def _compare(self, pending: _Pending, output: Any) -> None:
        if not _same(pending.result[0], output):
            self._refused[pending.key] = self.reason = _DIFFERS
            logger.info("%s: two passes are not run for one load: %s", self._component.name, _DIFFERS)
            self._pending.clear()
        elif pending.proves and pending.key not in self._refused:
            self._proven.add(pending.key)

    def _what_it_did(self, call: Call, output: Any, before: tuple, after: tuple) -> str:
        """What a forward did besides computing, "" if nothing."""
        try:
            returned, given = list(tensors_in(output)), list(tensors_in(before))
            if not call.intact() or not _same_items(before, after):
                return "its forward writes to its arguments"
        except Unpairable as error:
            return str(error)
        if share_memory(returned, given):
            return "it returns what it is given"
        if self._engine.random_changed():
            return "its forward draws random numbers"
        changed = self._snapshot.change()
        return f"its forward changes {changed}" if changed is not None else ""

    # --- forgetting -------------------------------------------------------------------------------------

    def discard(self) -> None:
        """Throw away results that nobody has asked for."""
        self._engine.counters.discarded += sum(not each.rehearsal for each in self._pending)
        self._balance -= len(self._pending)
        self._pending.clear()

    def forget(self) -> None:
        """What is known of the calls so far is of no use for those to come."""
        self.discard()
        self._history.clear()

    def call_ended(self) -> None:
        """The pipeline's call is over: the next one has other prompts."""
        self.forget()
        self._balance = self._seen = 0
        if len(self._looks) > _KINDS:
            self._snapshot, self._looks = None, {}  # the rest goes with the snapshot

    def _renew_snapshot(self) -> None:
        if self._snapshot is None or not self._snapshot.matches():
            self._snapshot = Snapshot(self._component.module)
            self._unsuitable = None
            self._looks = {spec: why for spec, why in self._looks.items() if why}
            self._proven.clear()
            self._refused.clear()

    def _in_place(self) -> bool:
        """Whether the weights lie where they were put: `weight.data = ...` leaves no other trace."""
        return all(
            unit.weights.is_in_place(unit.state is State.RESIDENT or (self._component.present and stays))
            for stays, units in (
                (True, self._component.stem),
                (False, self._component.residents),
                (False, self._component.streamed),
            )
            for unit in units
        )


_DIFFERS = "a pass that ran together with another gave another result than on its own"


def _same_items(one: Any, other: Any) -> bool:
    if type(one) in (list, tuple) and type(other) is type(one):
        return len(one) == len(other) and all(map(_same_items, one, other))
    if type(one) is dict and type(other) is dict:
        return list(one) == list(other) and all(map(_same_items, one.values(), other.values()))
    return one is other


def _same(one: Any, other: Any) -> bool:
    try:
        return same_results(one, other)
    except Unpairable:
        return False

"""A bound on the device's peak memory: measure what a forward needs, keep units in what is left.

What a component's activations take is not known before it has run with inputs of these shapes, so its first
forward runs with nothing kept; the second is timed, and then the choice is made that is predicted to be the
fastest (`selection`). A forward with that choice in place is timed as well: a device that waits less may
compute more slowly. A component that runs once a call (a text encoder) gains nothing from keeping and is left
alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from ..arena import LOOKAHEAD, capacity_for
from ..report import Prediction
from .planner import choose_kept, estimate_activations
from .selection import choose_stay
from .stopwatch import Stopwatch
from .timeline import Copying, Forecast, Work, forecast

if TYPE_CHECKING:
    from ..component import Component, Unit
    from ..streams import Streams

_RESERVE = 0.025  # of the bound: the allocator rounds up, and fragments
_TIGHTEN = 0.8  # of the bound, once the device has run out of memory below it
_BETTER = 0.01  # of a step: what another choice must gain
_WORTH_PACKING = 0.1  # of a step: what waiting must take for packing to be worth its seconds
_WORTH_PAIRING = 0.03  # of a step: what waiting for copies must take
_EXTRA_SLOTS = 2  # units that the arena may hold besides two, where that is worth more than keeping them


@dataclass(frozen=True)
class Choice:
    """What to do with the memory that a component leaves.

    Attributes:
        kept: units to keep while the component is present.
        slack: bytes that the arena gets besides.
    """

    kept: frozenset[Unit] = frozenset()
    slack: int = 0


@dataclass(frozen=True)
class Reading:
    """What of a component the disk is read for in each forward.

    Attributes:
        seconds: that it takes for each streamed unit, 0 for those that the host holds; empty if it holds all.
        slots: units that can be on their way from disk to the device.
    """

    seconds: tuple[float, ...] = ()
    slots: int = 1


@dataclass
class _Known:
    """What was measured of a component's forward with inputs of some shapes."""

    need: int  # peak bytes, less what is kept, the arena's slack and others'
    work: Work | None = None
    rate: float | None = None
    reading: Reading = field(default_factory=Reading)
    choice: Choice = field(default_factory=Choice)
    room: int = -1  # that the choice was made for
    forecast: Forecast | None = None
    settled: bool = False  # a forward with the choice in place was timed

    def wants_timing(self, component: Component) -> bool:
        """Whether to time a forward of `component` that begins now."""
        if self.work is None:
            return True
        in_place = component.kept_bytes == sum(unit.nbytes for unit in self.choice.kept)
        return not self.settled and self.forecast is not None and in_place


class DeviceBudget:
    """Decides which streamed units a component may keep while it runs.

    The memory of a forward is taken to follow from the shapes of its inputs: with new ones, nothing is kept
    until it has been measured. Measuring resets the device's peak statistics.

    Args:
        limit: bytes on the device at most, activations included, and what the allocator holds besides.
        streams: the device's streams, which measure its memory.
    """

    def __init__(self, limit: int, streams: Streams) -> None:
        self.limit = limit
        self.seen = 0  # the highest peak so far, which measuring would otherwise lose
        self._streams = streams
        self._known: dict[tuple[Component, tuple], _Known] = {}
        self._shapes: dict[Component, tuple] = {}
        self._running: Component | None = None  # whose forward is measured
        self._others = 0  # bytes on the device that are neither weights of ours nor the forward's
        self._others_reserved = 0
        self.stopwatch: Stopwatch | None = None  # of the forward under way, if it is timed

    def choose(self, component: Component, shapes: tuple, weights: int) -> Choice:
        """What `component` may keep in the forward that begins with inputs of these shapes.

        Args:
            weights: bytes of its weights, and the arena's, on the device now; what else is there is others'.
        """
        streams = self._streams
        self._running = component
        self._shapes[component] = shapes
        self.seen = max(self.seen, streams.peak())
        self._others = max(0, streams.allocated() - weights)
        return self._choose(component)

    def begin(self, component: Component, weights: int) -> None:
        """That forward begins, with the choice in place: measure it.

        Args:
            weights: the same bytes now.
        """
        streams = self._streams
        known = self._known.get((component, self._shapes[component]))
        if known is None:
            streams.empty_cache()  # what lies there unused, such as what was kept before, would count as needed
            self._others_reserved = max(0, streams.reserved() - weights)
        streams.begin_peak()
        timed = streams.asynchronous and known is not None and bool(component.streamed)
        self.stopwatch = Stopwatch(streams) if timed and known.wants_timing(component) else None

    def end(self, component: Component, weights: int, slack: int, reading: Reading) -> Choice:
        """What `component` may keep from now on, its forward being over.

        Args:
            weights: bytes of weights that were on the device for it anyway.
            slack: bytes of the arena that it could do without.
            reading: what the disk is read for in each forward.
        """
        component.runs += 1
        if self._running is not component:  # it began under another budget, or under none
            return Choice()
        self._running = None
        key = component, self._shapes[component]
        known = self._known.get(key)
        kept = component.kept_bytes + slack
        need = max(self._streams.peak() - self._others, weights) - kept
        if known is None:
            need = max(need, self._streams.peak_reserved() - self._others_reserved - kept)
            known = self._known[key] = _Known(need)
        known.need = max(known.need, need)
        watch, self.stopwatch = self.stopwatch, None
        if watch is not None:
            watch.stop()
            read = watch.read(component.streamed)
            if read is not None:
                known.settled = known.work is not None
                known.work, rate = read
                known.rate = known.rate or rate  # the first: copies followed one another
                known.reading = reading
                known.room = -1
        return self._choose(component)

    def abandon(self) -> None:
        """The forward under way has failed: what it took says nothing."""
        self._running, self.stopwatch = None, None

    def why_not_together(
        self, component: Component, shapes: tuple, together: tuple, weights: int
    ) -> str | None:
        """Why several forwards had better run one by one; None if nothing is known against running them for one load.

        Args:
            shapes: of the inputs of one of them; `together` those of each.
            weights: bytes on the device for each of them, with nothing kept.
        """
        passes = len(together)
        one, all_ = self._known.get((component, shapes)), self._known.get((component, together))
        if one is not None:
            need = all_.need if all_ is not None else one.need + (passes - 1) * max(0, one.need - weights)
            if need + self._others > self.limit:
                return "memory for the activations of several passes is more than the bound leaves"
        if one is None or one.forecast is None:
            return None
        if one.forecast.stall < _WORTH_PAIRING * one.forecast.step:
            return "computing takes longer than copying, so nothing would be gained"
        if all_ is not None and all_.forecast is not None and all_.forecast.step > passes * one.forecast.step:
            return "one by one they are faster, with more of the weights kept"
        return None

    def exceeded_by(self, component: Component, shapes: tuple | None = None) -> bool:
        """Whether `component` was seen to need more than the bound, with nothing kept.

        Args:
            shapes: of its inputs; those that it had last if None.
        """
        known = self._known.get((component, self._shapes.get(component) if shapes is None else shapes))
        return known is not None and known.need + self._others > self.limit

    def may_be_exceeded_by(self, component: Component, shapes: tuple, weights: int) -> bool:
        """Whether that is to be feared of a forward that has not run yet."""
        if (component, shapes) in self._known:
            return False
        matrices = [t for unit in component.units for t in unit.weights.tensors if t.dim() > 1]
        return weights + estimate_activations(shapes, matrices) > self.limit

    def predict(self, component: Component) -> Prediction | None:
        """What its next forward is predicted to take, None if that is not known yet."""
        known = self._known.get((component, self._shapes.get(component)))
        if known is None or known.forecast is None:
            return None
        kept = sum(unit.nbytes for unit in known.choice.kept)
        return Prediction(
            seconds=known.forecast.step,
            peak_bytes=known.need + self._others + kept + known.choice.slack,
            kept_bytes=kept,
            streamed_bytes=sum(unit.nbytes for unit in component.streamed) - kept,
        )

    def is_bound_by_copies(self, component: Component) -> bool:
        """Whether a good part of its forward is known to be waiting for weights."""
        known = self._known.get((component, self._shapes.get(component)))
        forecast = known.forecast if known is not None and known.settled else None
        return forecast is not None and forecast.stall > _WORTH_PACKING * forecast.step

    def tighten(self) -> None:
        """The bound was too high: the device has less memory to give than was thought."""
        reached = self._streams.peak() or self.limit
        self.limit = int(min(self.limit, reached) * _TIGHTEN)

    def forget(self, component: Component) -> None:
        """The component is here no longer."""
        self._known = {key: known for key, known in self._known.items() if key[0] is not component}
        self._shapes.pop(component, None)

    def _choose(self, component: Component) -> Choice:
        known = self._known.get((component, self._shapes.get(component)))
        repeats = component.runs > 1 or any(unit.keeps for unit in component.streamed)
        if known is None or component.contended or not repeats:
            return Choice()
        if known.work is None and self._streams.asynchronous:  # to keep is to allocate, which would be timed
            return Choice()
        room = max(0, int(self.limit * (1 - _RESERVE)) - known.need - self._others)
        if not known.room * 0.98 <= room <= known.room * 1.02:  # what others have there may vary a little
            known.room = room
            known.choice, known.forecast = _best(component, room, known)
        return known.choice


def _best(component: Component, room: int, known: _Known) -> tuple[Choice, Forecast | None]:
    """The fastest use of `room` bytes: units to keep, or a larger arena; the choice before, if it is as good."""
    units, work = component.streamed, known.work
    sizes = [unit.nbytes for unit in units]
    if work is None or known.rate is None:
        return Choice(frozenset(units[i] for i in choose_kept(sizes, room))), None
    floats = bool(units) and units[0].floats
    lookahead = LOOKAHEAD if floats else None
    reading = known.reading
    copying = Copying(known.rate, lookahead=lookahead, reads=reading.seconds, slots=reading.slots)
    before = known.choice
    best: tuple[Choice, Forecast] | None = None
    if known.settled and sum(unit.nbytes for unit in before.kept) + before.slack <= room:
        best = before, _forecast(component, before, work, copying)
    base = capacity_for([unit.nbytes for unit in component.homed])
    for slots in range(1 if floats else _EXTRA_SLOTS + 1):
        slack = slots * max(sizes)
        if slack > room:
            break
        stay = choose_stay(work, room - slack, base + slack, copying)
        choice = Choice(frozenset(units[i] for i in stay), slack)
        found = _forecast(component, choice, work, copying)
        if best is None or found.step < best[1].step * (1 - _BETTER):  # a smaller arena, unless it costs
            best = choice, found
    return best


def _forecast(component: Component, choice: Choice, work: Work, copying: Copying) -> Forecast:
    stay = [i for i, unit in enumerate(component.streamed) if unit in choice.kept]
    capacity = capacity_for([unit.nbytes for unit in component.homed]) + choice.slack
    return forecast(work, stay, capacity, copying)

"""Forwards that are timed where nobody has set a bound on the device's memory.

Their times tell between two calls which units had better stay (`spread`), and whether weights had better be packed.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from ..arena import LOOKAHEAD
from ..packing import unpacks_fast
from .stopwatch import Stopwatch
from .timeline import Copying, Work

if TYPE_CHECKING:
    from torch import nn

    from ..component import Component, Unit
    from ..streams import Streams

WORTH_PACKING = 0.1  # of a step: what waiting must take for packing to be worth its seconds
_REPEATS = 3  # forwards of a call from which on it may be: what runs once or twice gains little
_FORWARDS = 2  # timed, of which the shorter counts: one may be held up by whatever else the host does


@dataclass(frozen=True)
class Timed:
    """A forward of a component.

    Attributes:
        streamed: the units that were timed.
        work: what these computed; what the others did is in the gaps.
        rate: of the copies, bytes a second.
        capacity: bytes of the arena.
        forwards: of the call so far.
    """

    streamed: tuple[Unit, ...]
    work: Work
    rate: float
    capacity: int
    forwards: int = 1

    @property
    def copying(self) -> Copying:
        """How what does not stay gets to the device."""
        return Copying(self.rate, lookahead=LOOKAHEAD if self.streamed[0].floats else None)

    @property
    def is_bound_by_copies(self) -> bool:
        """Whether a good part of each step is waiting, whichever units of as many bytes stay."""
        copies = sum(self.work.sizes) / self.rate
        return self.forwards >= _REPEATS and copies - self.work.seconds > WORTH_PACKING * copies


class Timings:
    """Times two forwards of components for which something is to be decided by that."""

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._count: WeakKeyDictionary[nn.Module, int] = WeakKeyDictionary()  # of forwards that were timed
        self._timed: dict[Component, Timed] = {}
        self._watch: Stopwatch | None = None

    def begin(self, component: Component) -> Stopwatch | None:
        """An outermost forward of `component` begins; returns the stopwatch that is to time it, if one is."""
        self._watch = None
        warm = component.runs > 0 and component.known  # the first forward of a call waits for more
        wanted = self._count.get(component.module, 0) < _FORWARDS and self._decides(component)
        if warm and wanted and self._streams.asynchronous:
            self._watch = Stopwatch(self._streams)
        return self._watch

    def _decides(self, component: Component) -> bool:
        """Whether anything depends on its times."""
        if not component.streamed or component.on_disk:
            return False
        parted = component.shares and bool(component.residents)
        return parted or (component.may_pack and unpacks_fast(self._streams.device))

    def end(self, component: Component, completed: bool, capacity: int) -> None:
        """That forward is over.

        Args:
            capacity: bytes of the arena.
        """
        component.runs += completed
        watch, self._watch = self._watch, None
        if watch is None or not completed:
            return
        watch.stop()
        read = watch.read(component.streamed)
        if read is None:  # it used none of them: another forward will tell
            return
        self._count[component.module] = self._count.get(component.module, 0) + 1
        work, rate = read
        if rate is None:
            return
        timed, before = Timed(tuple(component.streamed), work, rate, capacity), self._timed.get(component)
        shorter = timed if before is None or work.seconds < before.work.seconds else before
        self._timed[component] = replace(shorter, forwards=component.runs)

    def take(self, component: Component) -> Timed | None:
        """What was timed of `component`, once: nothing is timed any longer."""
        timed = self._timed.pop(component, None)
        if timed is not None:
            self._count[component.module] = _FORWARDS
        return timed

    def renew(self, component: Component) -> None:
        """Its weights come in another way from now on: time that."""
        self._timed.pop(component, None)
        self._count.pop(component.module, None)

    def forget(self, component: Component) -> None:
        """What was timed holds no longer; if nobody has taken it, other forwards will be."""
        if component in self._timed:
            self.renew(component)

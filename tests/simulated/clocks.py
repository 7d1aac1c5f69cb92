"""Who is ordered behind whom: vector clocks of the host and of streams, and a check of every access to memory.

Two accesses to the same bytes, one of which writes, must be ordered: by a stream's own order, by an event that
one stream recorded and the other waits for, or by the host, which launches after what it has waited for. The
check does not depend on when anything really ran, so one run finds every unordered pair that it contains.

Source: L. Lamport, "Time, clocks, and the ordering of events in a distributed system" (1978); the reduction to
(agent, tick) pairs is that of C. Flanagan and S. Freund, "FastTrack" (2009).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from dataclasses import dataclass

HOST = 0
_PACKAGE = "diffusers_offload"


class Clock:
    """What one agent knows of all: for each agent, how many of its steps come before."""

    def __init__(self, ticks: dict[int, int] | None = None) -> None:
        self.ticks = dict(ticks or {})

    def copy(self) -> Clock:
        return Clock(self.ticks)

    def join(self, other: Clock) -> None:
        for agent, tick in other.ticks.items():
            if tick > self.ticks.get(agent, 0):
                self.ticks[agent] = tick

    def knows(self, other: Clock) -> bool:
        """Whether all of `other` comes before."""
        return all(self.ticks.get(agent, 0) >= tick for agent, tick in other.ticks.items())

    def step(self, agent: int) -> int:
        self.ticks[agent] = tick = self.ticks.get(agent, 0) + 1
        return tick

    def is_behind(self, agent: int, tick: int) -> bool:
        """Whether that step of `agent` comes before."""
        return self.ticks.get(agent, 0) >= tick


@dataclass(frozen=True)
class Access:
    """Bytes `start` to `stop` (addresses) read or written by an agent in one of its steps."""

    start: int
    stop: int
    agent: int
    tick: int
    write: bool
    what: str
    line: str  # of the package, that was responsible

    def __str__(self) -> str:
        who = "the host" if self.agent == HOST else f"stream {self.agent}"
        return f"{'write' if self.write else 'read'} by {who} ({self.what}, {self.line})"


class Checker:
    """Remembers accesses and complains of pairs that nothing orders.

    Attributes:
        races: what was found, one line each.
        accesses: how many were looked at.
    """

    def __init__(self) -> None:
        self.races: list[str] = []
        self.accesses = 0
        self._history: dict[int, list[Access]] = {}  # by the address of the block of memory

    def look(
        self, block: int, span: tuple[int, int], agent: int, clock: Clock, write: bool, what: str
    ) -> None:
        """An access of `agent`, whose clock is at this step already."""
        self.accesses += 1
        start, stop = span
        new = Access(start, stop, agent, clock.ticks[agent], write, what, responsible())
        kept = []
        for old in self._history.get(block, ()):
            if old.stop <= start or old.start >= stop:
                kept.append(old)
                continue
            ordered = clock.is_behind(old.agent, old.tick)
            if (write or old.write) and not ordered:
                self.races.append(f"{new} is not ordered behind the {old}")
            covered = start <= old.start and old.stop <= stop
            if not (covered and ordered and (write or (old.agent == agent and not old.write))):
                kept.append(old)
        kept.append(new)
        self._history[block] = kept

    def forget(self, block: int) -> None:
        """The memory was given back to the system."""
        self._history.pop(block, None)


def responsible(skip: Iterable[str] = ()) -> str:
    """The innermost line of the package on the stack, as file:line, or that of whoever called torch."""
    frame = sys._getframe(2)
    outermost = "outside the package"
    while frame is not None:
        name = frame.f_code.co_filename
        if f"/{_PACKAGE}/" in name and not any(each in name for each in skip):
            return f"{name.rpartition('/')[2]}:{frame.f_lineno}"
        frame = frame.f_back
    return outermost

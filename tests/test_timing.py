"""Forwards that are timed where nobody has set a bound, and what they tell of packing."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from torch import nn

from diffusers_offload.component import Component
from diffusers_offload.planning import timing
from diffusers_offload.planning.timeline import Work
from diffusers_offload.planning.timing import Timed, Timings

MIB = 2**20
RATE = 50e9


@dataclass(eq=False)
class Unit:
    nbytes: int = MIB
    floats: bool = False


def watch_of(seconds, rate=RATE):
    """A stopwatch that will have read that a forward computed so long."""
    return SimpleNamespace(stop=lambda: None, read=lambda units: (Work((MIB,), (seconds,), (0.0,)), rate))


@pytest.fixture
def timings(monkeypatch):
    """Of a device that may be late; `timings.watches` are those that the next forwards get."""
    found = Timings(SimpleNamespace(asynchronous=True, device=None))
    found.watches = []
    monkeypatch.setattr(timing, "Stopwatch", lambda streams: found.watches.pop(0))
    monkeypatch.setattr(timing, "unpacks_fast", lambda device: True)
    return found


def component(may_pack=False, residents=1):
    made = Component("net", nn.Linear(1, 1))
    made.known, made.may_pack, made.shares = True, may_pack, residents > 0
    made.residents, made.streamed = [Unit() for _ in range(residents)], [Unit()]
    return made


def forward(timings, of, completed=True):
    """Whether it was timed."""
    watch = timings.begin(of)
    timings.end(of, completed, 4 * MIB)
    return watch is not None


def test_of_two_timed_forwards_the_shorter_counts(timings):
    """One that is timed may be held up by whatever else the host does."""
    timings.watches += [watch_of(0.3), watch_of(0.1)]
    net = component()
    assert [forward(timings, net) for _ in range(4)] == [False, True, True, False]  # the first waits for more
    timed = timings.take(net)
    assert timed.work.compute == (0.1,) and timed.forwards == 3
    assert not forward(timings, net) and timings.take(net) is None


def test_one_that_failed_does_not_count(timings):
    timings.watches += [watch_of(0.1), watch_of(0.2), watch_of(0.3)]
    net = component()
    assert not forward(timings, net)
    assert forward(timings, net, completed=False)
    assert [forward(timings, net) for _ in range(3)] == [True, True, False]
    assert timings.take(net).work.compute == (0.2,)


def test_what_was_timed_is_timed_anew_if_it_was_forgotten_before_anybody_used_it(timings):
    timings.watches += [watch_of(0.1) for _ in range(3)]
    net = component()
    net.runs = 1
    assert [forward(timings, net) for _ in range(3)] == [True, True, False]
    timings.forget(net)
    assert timings.take(net) is None
    assert forward(timings, net)
    assert timings.take(net) is not None
    timings.forget(net)
    assert not forward(timings, net)
    timings.renew(net)
    timings.watches.append(watch_of(0.1))
    assert forward(timings, net)


@pytest.mark.parametrize("may_pack", [True, False])
def test_where_nothing_is_to_be_decided_nothing_is_timed(may_pack, timings, monkeypatch):
    net = component(may_pack, residents=0)
    net.runs = 1
    timings.watches.append(watch_of(0.1))
    assert forward(timings, net) is may_pack
    monkeypatch.setattr(timing, "unpacks_fast", lambda device: False)
    assert not forward(timings, net)
    net.tier, net.shares, net.residents = "disk", True, [Unit()]
    assert not forward(timings, net)


@pytest.mark.parametrize(
    ("seconds", "forwards", "bound"),
    [(0.8, 3, True), (0.95, 3, False), (1.2, 3, False), (0.8, 2, False)],
    ids=["the bus takes longer", "hardly longer", "less long", "seldom"],
)
def test_what_is_bound_by_copies(seconds, forwards, bound):
    """Packing takes seconds, so it has to be worth a tenth of each step, and steps have to repeat."""
    units = (Unit(25 * 10**9), Unit(25 * 10**9))
    work = Work((25 * 10**9,) * 2, (seconds / 4,) * 2, (seconds / 4,) * 2)
    assert Timed(units, work, RATE, 10**9, forwards).is_bound_by_copies is bound

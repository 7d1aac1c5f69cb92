"""Which units stay under an `offload_ratio` once their times are known."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn

from diffusers_offload.arena import capacity_for
from diffusers_offload.component import Component
from diffusers_offload.planning import spread
from diffusers_offload.planning.planner import choose_residents
from diffusers_offload.planning.spread import Timed, better_residents, undisturbed, with_residents
from diffusers_offload.planning.timeline import Copying, Work, place, simulate

MIB = 2**20
RATE = 80e9
LEEWAY = 0.01


@dataclass(eq=False)
class Unit:
    nbytes: int
    floats: bool = False


def flux():
    return Work((648 * MIB,) * 19 + (270 * MIB,) * 38, (3.2e-3,) * 19 + (2.9e-3,) * 38, (2e-5,) * 57)


def timed_without(full, stay):
    """What timing the units that do not stay gives: the others compute in the gaps."""
    used = [number for number in range(len(full.sizes)) if number not in stay]
    gaps = []
    for at, number in enumerate(used):
        after = used[at + 1] if at + 1 < len(used) else used[0] + len(full.sizes)
        inside = [each % len(full.sizes) for each in range(number + 1, after)]
        gaps.append(full.gaps[number] + sum(full.compute[each] + full.gaps[each] for each in inside))
    sizes = tuple(full.sizes[number] for number in used)
    return used, Work(sizes, tuple(full.compute[number] for number in used), tuple(gaps))


def better(full, ratio, units):
    stay = choose_residents(full.sizes, ratio)
    used, work = timed_without(full, stay)
    capacity = capacity_for([full.sizes[number] for number in used])
    timed = Timed(tuple(units[number] for number in used), work, RATE, capacity)
    return better_residents(timed, units, ratio), stay, capacity


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_units_that_stayed_compute_like_those_of_their_size(ratio):
    full = flux()
    used, work = timed_without(full, choose_residents(full.sizes, ratio))
    found = with_residents(work, used, full.sizes)
    assert found.compute == pytest.approx(full.compute)
    assert sum(found.gaps) == pytest.approx(sum(full.gaps))


def test_units_of_a_size_that_nobody_timed_leave_their_gap_as_it_is():
    work = Work((10, 10), (1.0, 1.0), (3.0, 0.5))
    found = with_residents(work, [0, 2], (10, 77, 10))
    assert found.compute == (1.0, 0.0, 1.0)
    assert found.gaps == (0.0, 3.0, 0.5)


def test_two_passes_over_a_unit_are_one_use():
    work = Work((10, 20), (1.0, 1.0, 2.0, 2.0), (0.1, 0.2, 0.1, 0.3), (0, 0, 1, 1))
    found = with_residents(work, [0, 1], (10, 20))
    assert found.compute == pytest.approx((2.1, 4.1))
    assert found.gaps == pytest.approx((0.2, 0.3))


@pytest.mark.parametrize("order", [(1, 0), (0, 1, 0), (0,)])
def test_nothing_is_guessed_of_another_order(order):
    count = len(order)
    assert with_residents(Work((10, 20), (1.0,) * count, (0.1,) * count, order), [0, 1], (10, 20)) is None


@pytest.mark.parametrize("ratio", [0.5, 0.55, 0.6, 0.75])
def test_blocks_of_two_kinds_are_kept_by_what_they_compute(ratio):
    full = flux()
    units = [Unit(size) for size in full.sizes]
    found, stay, capacity = better(full, ratio, units)

    def step(staying):
        return simulate(full, staying, place(full, staying, capacity), Copying(RATE)).step

    total = sum(full.sizes)
    assert total - sum(full.sizes[number] for number in found) <= (ratio + LEEWAY) * total
    assert sum(full.sizes[number] for number in found) <= sum(full.sizes[number] for number in stay)
    floor = max(full.seconds, ratio * total / RATE)
    assert step(found) < floor * 1.03
    assert step(found) < step(stay) * 0.98


@settings(max_examples=150, deadline=None)
@given(
    kinds=st.lists(st.tuples(st.integers(1, 900), st.floats(1e-4, 2e-2)), min_size=1, max_size=3),
    picks=st.lists(st.integers(0, 2), min_size=4, max_size=30),
    ratio=st.floats(0.05, 0.95),
)
def test_no_choice_takes_more_memory_or_streams_much_more_than_was_asked_for(kinds, picks, ratio):
    blocks = [kinds[pick % len(kinds)] for pick in picks]
    full = Work(tuple(size * MIB for size, _ in blocks), tuple(s for _, s in blocks), (2e-5,) * len(blocks))
    stay = choose_residents(full.sizes, ratio)
    assume(0 < len(stay) < len(blocks))
    found, _, capacity = better(full, ratio, [Unit(size) for size in full.sizes])
    if found is None:
        return
    kept = sum(full.sizes[number] for number in found)
    assert kept <= sum(full.sizes[number] for number in stay)
    assert sum(full.sizes) - kept <= (ratio + LEEWAY) * sum(full.sizes) * (1 + 1e-12)
    streams = [size for number, size in enumerate(full.sizes) if number not in found]
    assert streams and capacity_for(streams) <= capacity


def test_equal_blocks_stay_as_they_are():
    full = Work((680 * MIB,) * 40, (11.5e-3,) * 40, (2e-5,) * 40)
    assert better(full, 0.5, [Unit(size) for size in full.sizes])[0] is None


def test_another_unit_among_the_timed_ones_proves_nothing():
    full = flux()
    units = [Unit(size) for size in full.sizes]
    used, work = timed_without(full, choose_residents(full.sizes, 0.5))
    timed = Timed((Unit(1), *(units[number] for number in used[1:])), work, RATE, 2**31)
    assert better_residents(timed, units, 0.5) is None


def watch_of(work, rate=RATE, used=True):
    return SimpleNamespace(stop=lambda: None, used=lambda units: used, read=lambda units: (work, rate))


def parted(*units):
    component = Component("net", nn.Linear(1, 1))
    component.shares, component.known = True, True
    component.residents, component.streamed = [Unit(MIB)], list(units)
    return component


def test_of_timed_forwards_each_part_counts_where_it_was_shortest(monkeypatch):
    """Any part of a forward that is timed may be held up by whatever else the host does."""
    times = [
        ((0.3, 0.1), (0.0, 0.2)),
        ((0.1, 0.2), (0.3, 0.1)),
        ((0.2, 0.2), (0.1, 0.3)),
        ((0.2, 0.3), (0.2, 0.2)),
    ]
    watches = [watch_of(Work((MIB, MIB), *each), RATE + at) for at, each in enumerate(times)]
    waiting = iter(watches)
    monkeypatch.setattr(spread, "Stopwatch", lambda streams: next(waiting))
    spreads = spread.Spreads(SimpleNamespace(asynchronous=True))
    component = parted(Unit(MIB), Unit(MIB))
    assert spreads.begin(component) is None  # the first forward of a call waits for more
    spreads.end(component, True, 4 * MIB)
    for watch in watches:
        assert spreads.begin(component) is watch
        spreads.end(component, True, 4 * MIB)
    assert spreads.begin(component) is None
    spreads.end(component, True, 4 * MIB)
    timed = spread.read(spreads.take(component))
    assert (timed.work.compute, timed.work.gaps, timed.rate) == ((0.1, 0.1), (0.0, 0.1), RATE + 3)
    assert spreads.begin(component) is None and spreads.take(component) == []


def test_nobody_waits_for_a_timed_forward_before_it_is_read(monkeypatch):
    """A host that waits for the device lets the device wait for it in the next forward."""
    waited = []
    watch = watch_of(Work((MIB,), (0.1,), (0.0,)))
    watch.read = lambda units: (waited.append(units), RATE)
    monkeypatch.setattr(spread, "Stopwatch", lambda streams: watch)
    spreads = spread.Spreads(SimpleNamespace(asynchronous=True))
    component = parted(Unit(MIB))
    component.runs = 1
    spreads.begin(component)
    spreads.end(component, True, 4 * MIB)
    (watched,) = spreads.take(component)
    assert not waited
    watched.read()
    assert waited == [component.streamed]


def test_a_forward_that_used_no_unit_is_not_counted(monkeypatch):
    watches = iter(
        [watch_of(None, None, used=False), *[watch_of(Work((MIB,), (0.1,), (0.0,)))] * spread._FORWARDS]
    )
    monkeypatch.setattr(spread, "Stopwatch", lambda streams: next(watches))
    spreads = spread.Spreads(SimpleNamespace(asynchronous=True))
    component = parted(Unit(MIB))
    component.runs = 1
    for _ in range(1 + spread._FORWARDS):
        assert spreads.begin(component) is not None
        spreads.end(component, True, 4 * MIB)
    assert spreads.begin(component) is None
    assert len(spreads.take(component)) == spread._FORWARDS


def test_forwards_that_differ_are_not_mixed():
    units = (Unit(MIB), Unit(MIB))
    slow, fast = (Work((MIB,) * 2, (each,) * 2, (0.0,) * 2) for each in (0.3, 0.1))
    turned = Work((MIB,) * 2, (0.1,) * 2, (0.0,) * 2, (1, 0))
    for other in (
        Timed(units[::-1], fast, RATE, MIB),
        Timed(units, fast, RATE, 2 * MIB),
        Timed(units, turned, RATE, MIB),
    ):
        assert undisturbed([other, Timed(units, slow, RATE, MIB)]).work == slow
    assert undisturbed([]) is None


def test_a_forward_that_copied_nothing_tells_nothing(monkeypatch):
    monkeypatch.setattr(spread, "Stopwatch", lambda streams: watch_of(Work((MIB,), (0.1,), (0.0,)), None))
    spreads = spread.Spreads(SimpleNamespace(asynchronous=True))
    component = parted(Unit(MIB))
    component.runs = 1
    assert spreads.begin(component) is not None
    spreads.end(component, True, 4 * MIB)
    assert spread.read(spreads.take(component)) is None


def test_what_was_timed_is_timed_anew_if_it_was_forgotten_before_anybody_used_it(monkeypatch):
    watch = watch_of(Work((MIB,), (0.1,), (0.0,)))
    monkeypatch.setattr(spread, "Stopwatch", lambda streams: watch)
    spreads = spread.Spreads(SimpleNamespace(asynchronous=True))
    component = parted(Unit(MIB))
    component.runs = 1
    for _ in range(2):
        for _ in range(spread._FORWARDS):
            assert spreads.begin(component) is watch
            spreads.end(component, True, 4 * MIB)
        assert spreads.begin(component) is None
        spreads.forget(component)
    assert spreads.begin(component) is watch
    spreads.end(component, True, 4 * MIB)
    assert spreads.take(component)
    spreads.forget(component)
    assert spreads.begin(component) is None

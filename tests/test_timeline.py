"""A cycle played through beforehand takes as long as it should, by formula and by an independent simulation."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_offload.arena import capacity_for
from diffusers_offload.planning.timeline import LATENCY, Copying, Work, place, simulate

RATE = 1e9
MB = 10**6  # a millisecond at RATE


def work_of(sizes, compute, gap=0.0, order=None):
    return Work(tuple(sizes), tuple(compute), (gap,) * len(compute), order)


def step_in_arena(work, stay=(), capacity=None, latency=0.0):
    capacity = capacity or capacity_for(work.sizes)
    return simulate(work, stay, place(work, stay, capacity), Copying(RATE, latency)).step


def test_nothing_waits_where_everything_stays():
    work = work_of([5 * MB] * 4, [0.001, 0.002, 0.003, 0.004], gap=0.0005)
    forecast = simulate(work, range(4), [], Copying(RATE))
    assert forecast.step == pytest.approx(0.012)
    assert forecast.transfer == forecast.stall == 0
    assert forecast.stalls == (0, 0, 0, 0)


@pytest.mark.parametrize("count", [20, 21, 57])
def test_a_cycle_bound_by_the_bus_takes_what_the_copies_take(count):
    work = work_of([10 * MB] * count, [1e-5] * count)
    forecast = simulate(work, (), place(work, (), 3 * capacity_for(work.sizes)), Copying(RATE))
    assert forecast.transfer == pytest.approx(count * (0.01 + LATENCY))
    assert forecast.step == pytest.approx(forecast.transfer)
    assert forecast.stall == pytest.approx(forecast.step - work.seconds)
    assert sum(forecast.stalls) == pytest.approx(forecast.stall)


@pytest.mark.parametrize("count", [4, 6, 20])
def test_a_cycle_bound_by_computing_takes_what_the_units_compute(count):
    work = work_of([10 * MB] * count, [0.02] * count, gap=0.001)
    forecast = simulate(work, (), place(work, (), capacity_for(work.sizes)), Copying(RATE))
    assert forecast.step == pytest.approx(count * 0.021)
    assert forecast.transfer == pytest.approx(count * (0.01 + LATENCY))
    assert forecast.stall == pytest.approx(0, abs=1e-9)


def test_a_unit_that_has_the_arena_to_itself_is_not_copied_again():
    work = work_of([10 * MB], [0.001], gap=0.002)
    assert simulate(work, (), [0], Copying(RATE)).transfer == 0
    assert simulate(work, (), [0], Copying(RATE)).step == pytest.approx(0.003)


def test_two_units_in_one_place_wait_for_each_other():
    work = work_of([10 * MB] * 2, [0.001] * 2)
    assert simulate(work, (), [0, 0], Copying(RATE, 0)).step == pytest.approx(0.022)
    assert simulate(work, (), [0, 10 * MB], Copying(RATE)).transfer == 0


@pytest.mark.parametrize("count", range(3, 12))
def test_an_odd_number_of_equal_units_in_two_slots_costs_a_bubble_a_cycle(count):
    work = work_of([256 * 4000] * count, [256 * 4000 / RATE] * count)
    slots = 256 * 4000 / RATE
    assert step_in_arena(work) == pytest.approx((count + count % 2) * slots)


def test_a_repeated_unit_is_copied_only_where_others_took_its_bytes():
    compute = [0.001] * 4
    again = work_of([4 * MB, 4 * MB], compute, order=(0, 0, 1, 1))
    assert simulate(again, (), [0, 0], Copying(RATE, 0)).transfer == pytest.approx(0.008)
    taken = work_of([4 * MB, 4 * MB], compute, order=(0, 1, 0, 1))
    assert simulate(taken, (), [0, 0], Copying(RATE, 0)).transfer == pytest.approx(0.016)
    assert simulate(taken, (), [0, 0], Copying(RATE, 0)).step == pytest.approx(0.020)
    assert simulate(taken, (1,), [0], Copying(RATE)).transfer == 0


def test_floating_units_are_copied_for_each_use():
    work = work_of([4 * MB, 4 * MB], [0.001] * 4, order=(0, 0, 1, 1))
    assert simulate(work, (), (), Copying(RATE, 0, 8 * MB)).transfer == pytest.approx(0.016)
    assert simulate(work, (0,), (), Copying(RATE, 0, 8 * MB)).transfer == pytest.approx(0.008)


def test_more_lookahead_hides_copies_behind_a_long_computation():
    work = work_of([10 * MB] * 5, [0.05, 0, 0, 0, 0])
    steps = [simulate(work, (), (), Copying(RATE, 0, slots * 10 * MB)).step for slots in range(5)]
    # Unit 0's own copy begins when the last of those before it is used, the others' while it computes.
    assert steps == pytest.approx([0.09, 0.09, 0.08, 0.07, 0.06])


def test_a_drift_too_slow_to_settle_is_known_by_its_limit():
    count = 40
    work = work_of([10 * MB] * count, [0.01] * (count // 2) + [0.009995] * (count // 2))
    arena = 16 * capacity_for(work.sizes)
    forecast = simulate(work, (), place(work, (), arena), Copying(RATE, 0))
    assert forecast.step == pytest.approx(max(forecast.transfer, work.seconds), rel=1e-3)


def test_a_work_that_lacks_times_is_refused():
    with pytest.raises(ValueError, match="3 uses, 2 compute times and 3 gaps"):
        Work((1, 2, 3), (0.1, 0.2), (0.0, 0.0, 0.0))


def test_homes_for_other_units_are_refused():
    with pytest.raises(ValueError, match="argument"):
        simulate(work_of([1, 2], [0.1, 0.1]), {0}, [0, 1], Copying(RATE))


def ticked(work, stay, homes, latency, lookahead, cycles, reads=(), slots=1):
    """The same machine tick by tick, a byte a tick, with the arena's bytes marked one by one.

    Returns:
        Mean ticks of the later `cycles` cycles.
    """
    count = len(work.order)
    owner = [None] * 64
    place_of = dict(zip(work.streamed(stay), homes, strict=False))
    started, ended, ready = set(), {}, {}
    copying, copied_at = None, 0  # the use that is being copied, and when that will be done
    reading, read_at, arrived = None, 0, set()  # the use that is being read for, and when that will be done
    to_read = to_copy = to_start = tick = 0
    last = 2 * cycles * count
    while to_start < last or last - 1 not in ended:
        moved = True
        while moved:
            moved = False
            if copying is not None and copied_at == tick:
                ready[copying], copying, moved = tick, None, True
            if to_start - 1 in started and to_start - 1 not in ended:  # one computes
                begun = ready["begin"]
                if begun + work.compute[(to_start - 1) % count] == tick:
                    ended[to_start - 1], moved = tick, True
            if reading is not None and read_at == tick:
                arrived.add(reading)
                reading, moved = None, True
            if reads and reading is None and to_read < last:
                unit = work.order[to_read % count]
                if unit in stay or not reads[unit]:
                    to_read, moved = to_read + 1, True
                elif sum(use not in ready for use in arrived) < slots:
                    reading, read_at, moved = to_read, tick + reads[unit], True
                    to_read += 1
            computing = to_start - 1 in started and to_start - 1 not in ended
            if not computing and to_start < last:
                free = (ended[to_start - 1] if to_start else 0) + work.gaps[to_start % count - 1]
                if work.order[to_start % count] in stay:
                    ready[to_start] = 0
                if free <= tick and to_start in ready:
                    started.add(to_start)
                    ready["begin"], to_start, moved = tick, to_start + 1, True
            if copying is None and to_copy < last:
                unit = work.order[to_copy % count]
                size = work.sizes[unit]
                span = range(place_of.get(unit, 0), place_of.get(unit, 0) + size)
                before = range(max(0, to_copy - 2 * count), to_copy)
                if unit in stay:
                    to_copy, moved = to_copy + 1, True
                elif lookahead is not None:
                    own = all(use in ended for use in before if work.order[use % count] == unit)
                    own &= not reads or to_copy in arrived or not reads[unit]
                    waiting = [
                        work.sizes[work.order[use % count]]
                        for use in before
                        if use not in started and work.order[use % count] not in stay
                    ]
                    if own and (not waiting or sum(waiting) + size <= lookahead):
                        copying, copied_at, moved = to_copy, tick + latency + size, True
                        to_copy += 1
                elif all(owner[byte] == unit for byte in span):
                    ready[to_copy], to_copy, moved = tick, to_copy + 1, True
                else:
                    others = [
                        use
                        for use in before
                        if (other := work.order[use % count]) not in stay
                        and other != unit
                        and set(span) & set(range(place_of[other], place_of[other] + work.sizes[other]))
                    ]
                    if all(use in ended for use in others):
                        for byte in span:
                            owner[byte] = unit
                        copying, copied_at, moved = to_copy, tick + latency + size, True
                        to_copy += 1
        tick += 1
    return (ended[last - 1] - ended[cycles * count - 1]) / cycles


@st.composite
def small_cases(draw):
    count = draw(st.integers(1, 5))
    sizes = draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    order = draw(st.permutations(range(count))) + draw(st.lists(st.integers(0, count - 1), max_size=2))
    uses = len(order)
    compute = draw(st.lists(st.integers(1, 6), min_size=uses, max_size=uses))
    gaps = draw(st.lists(st.integers(0, 2), min_size=uses, max_size=uses))
    stay = draw(st.sets(st.integers(0, count - 1), max_size=2))
    work = Work(tuple(sizes), tuple(compute), tuple(gaps), tuple(order))
    homes = [draw(st.integers(0, 8)) for _ in work.streamed(stay)]
    return work, stay, homes, draw(st.integers(0, 1))


@settings(max_examples=80, deadline=None)
@given(small_cases(), st.none() | st.integers(0, 20))
def test_a_cycle_takes_as_long_as_tick_by_tick(case, lookahead):
    work, stay, homes, latency = case
    forecast = simulate(work, stay, homes, Copying(1.0, latency, lookahead))
    assert forecast.step == pytest.approx(ticked(work, stay, homes, latency, lookahead, 60), rel=0.01)
    assert sum(forecast.stalls) == pytest.approx(forecast.stall, rel=0.02, abs=0.02 * forecast.step)


@settings(max_examples=60, deadline=None)
@given(small_cases(), st.integers(2, 5))
def test_a_faster_bus_is_never_slower(case, times):
    work, stay, homes, latency = case
    steps = [simulate(work, stay, homes, Copying(rate, latency)).step for rate in (1.0, 1.5, float(times))]
    assert all(faster <= slower * (1 + 1e-3) for slower, faster in pairwise(steps))


@settings(max_examples=80, deadline=None)
@given(small_cases(), st.integers(1, 12), st.integers(1, 3), st.data())
def test_a_cycle_that_reads_takes_as_long_as_tick_by_tick(case, lookahead, slots, data):
    work, stay, homes, latency = case
    count = len(work.sizes)
    reads = tuple(data.draw(st.lists(st.integers(0, 9), min_size=count, max_size=count)))
    copying = Copying(1.0, latency, lookahead, reads, slots)
    forecast = simulate(work, stay, homes, copying)
    if not copying.read_in(work, stay):
        reads = ()
    assert forecast.step == pytest.approx(
        ticked(work, stay, homes, latency, lookahead, 60, reads, slots), rel=0.01
    )
    assert forecast.reading == sum(reads[unit] for unit in work.order if reads and unit not in stay)


def test_a_cycle_bound_by_the_disk_takes_what_the_reads_take():
    work = work_of([10 * MB] * 20, [0.001] * 20)
    held = (0.0, 0.05) * 10
    forecast = simulate(
        work, (), place(work, (), capacity_for(work.sizes)), Copying(RATE, reads=held, slots=3)
    )
    assert forecast.reading == pytest.approx(0.5)
    assert forecast.step == pytest.approx(0.5)


def test_one_slot_lets_disk_and_bus_take_turns():
    work = work_of([10 * MB] * 20, [0.001] * 20)
    steps = [
        simulate(
            work,
            (),
            place(work, (), capacity_for(work.sizes)),
            Copying(RATE, 0, reads=(0.01,) * 20, slots=slots),
        ).step
        for slots in (1, 2)
    ]
    assert steps == pytest.approx([0.4, 0.2])


def test_what_the_slots_hold_is_not_read_again():
    work = work_of([10 * MB] * 4, [0.001] * 4)
    homes = place(work, (), capacity_for(work.sizes))
    for slots, reading in ((3, 2.0), (4, 0.0)):
        copying = Copying(RATE, reads=(0.5,) * 4, slots=slots)
        assert simulate(work, (), homes, copying).reading == pytest.approx(reading)

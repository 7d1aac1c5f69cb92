"""The order: learned from what ran; a surprise costs one miss, never more than that."""

from itertools import islice

from hypothesis import given
from hypothesis import strategies as st

from diffusers_offload.order import Order


def ahead(order, count):
    return list(islice(order.upcoming(), count))


def declared(count):
    return {unit: (unit + 1) % count for unit in range(count)}


def test_the_declared_order_is_the_first_guess_and_wraps_around():
    order = Order(declared(3))
    order.observe(0)
    assert ahead(order, 5) == [1, 2, 0, 1, 2]


def test_the_order_seen_replaces_the_declared_one():
    order = Order(declared(4))
    for unit in [2, 0, 3, 1, 2]:
        order.observe(unit)
    assert ahead(order, 4) == [0, 3, 1, 2]


def test_a_list_run_twice_in_a_forward_is_told_apart():
    order = Order(declared(4))
    cycle = [0, 1, 2, 0, 1, 2, 3]
    for unit in [*cycle, *cycle, 0, 1, 2]:
        order.observe(unit)
    assert ahead(order, 4) == [0, 1, 2, 3]
    for unit in [0, 1, 2]:
        order.observe(unit)
    assert ahead(order, 2) == [3, 0]


def test_two_components_that_alternate_are_followed():
    order = Order({0: 1, 1: 0, 2: 3, 3: 2})
    for unit in [0, 1, 2, 3, 0, 1, 2, 3, 0]:
        order.observe(unit)
    assert ahead(order, 5) == [1, 2, 3, 0, 1]


def test_a_component_that_begins_is_expected_where_it_began_before():
    order = Order({0: 1, 1: 0, 2: 3, 3: 2})
    for unit in [0, 1]:
        order.observe(unit)
    order.expect(2)
    assert ahead(order, 3) == [2, 3, 2]


def test_an_expectation_that_is_no_surprise_changes_nothing():
    order = Order(declared(3))
    for unit in [0, 2, 1, 0, 2, 1]:
        order.observe(unit)
    order.expect(0)
    assert ahead(order, 3) == [0, 2, 1]


@given(st.lists(st.integers(0, 4), min_size=1, max_size=12))
def test_any_cycle_is_known_after_two_rounds_and_some(cycle):
    order = Order(declared(5))
    for unit in cycle * 4:
        order.observe(unit)
    predicted = ahead(order, len(cycle))
    if len(cycle) <= 8:
        assert predicted == cycle


def test_memory_stays_bounded():
    order = Order(declared(7))
    for step in range(40_000):
        order.observe(step % 7)
    assert len(order._history) <= 8192
    assert ahead(order, 3) == [(40_000 + i) % 7 for i in range(3)]

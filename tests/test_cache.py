"""The host cache: never more than it may hold, never what is in use, and hits as theory has them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_offload.tiers.cache import Cache, choose_static, share_out

POLICIES = ("static", "fifo", "lru")
some_sizes = st.lists(st.integers(1, 1000), min_size=1, max_size=40)


def run(cache, sizes, cycles):
    """Use the units in a cycle, one at a time."""
    for key in list(sizes) * cycles:
        if not cache.wanted(key) and cache.admit(key, sizes[key]) is not None:
            cache.pin(key)
            cache.unpin(key)
    return cache.counters


@pytest.mark.parametrize("count", [4, 40, 57 * 4])
@pytest.mark.parametrize(
    ("policy", "rates"),
    [("static", (0.25, 0.5, 0.75, 1.0)), ("fifo", (0.0, 0.0, 0.0, 1.0)), ("lru", (0.0, 0.0, 0.0, 1.0))],
)
def test_a_cycle_of_equal_units_hits_as_theory_has_it(policy, rates, count):
    sizes = dict.fromkeys(range(count), 340_000_001)
    for quarters, rate in enumerate(rates, start=1):
        cache = Cache(sum(sizes.values()) * quarters // 4, policy, sizes)
        run(cache, sizes, 1)
        cache.reset()
        assert run(cache, sizes, 5).hit_rate == rate


def test_nothing_is_read_twice_when_everything_fits():
    for policy in POLICIES:
        sizes = {key: 100 + key for key in range(20)}
        counters = run(Cache(sum(sizes.values()), policy, sizes), sizes, 3)
        assert (counters.hits, counters.misses, counters.evictions) == (40, 20, 0)


def test_static_holds_the_same_units_always_and_evicts_none():
    sizes = dict.fromkeys(range(10), 100)
    cache = Cache(350, "static", sizes)
    run(cache, sizes, 1)
    held = set(cache)
    assert held == cache.chosen and len(held) == 3
    run(cache, sizes, 3)
    assert set(cache) == held and cache.counters.evictions == 0


def test_what_static_holds_is_spread_over_the_cycle():
    assert choose_static([10] * 12, 30) == {3, 7, 11}
    assert choose_static([10] * 12, 60) == {1, 3, 5, 7, 9, 11}


def test_room_that_is_left_is_used():
    assert choose_static([100, 1, 1, 100], 102) == {1, 2, 0} or choose_static([100, 1, 1, 100], 102) == {
        1,
        2,
        3,
    }


@given(some_sizes, st.integers(0, 50_000))
def test_static_fills_its_room(sizes, capacity):
    chosen = choose_static(sizes, capacity)
    left = capacity - sum(sizes[unit] for unit in chosen)
    assert left >= 0
    assert all(size > left for unit, size in enumerate(sizes) if unit not in chosen)


def test_fifo_drops_what_came_first_and_lru_what_was_used_the_longest_ago():
    for policy, dropped in (("fifo", "a"), ("lru", "b")):
        cache = Cache(2, policy)
        assert cache.admit("a", 1) == () and cache.admit("b", 1) == ()
        assert cache.wanted("a")
        assert cache.admit("c", 1) == (dropped,)


def test_a_large_unit_may_cost_several():
    cache = Cache(10, "lru")
    for key in "abcde":
        cache.admit(key, 2)
    assert cache.admit("f", 5) == ("a", "b", "c")
    assert cache.nbytes == 9 and list(cache) == ["d", "e", "f"]


def test_nothing_is_evicted_for_a_unit_that_cannot_be_kept():
    cache = Cache(10, "lru")
    for key in "ab":
        cache.admit(key, 5)
    cache.pin("b")
    assert cache.admit("c", 6) is None and cache.admit("d", 11) is None
    assert list(cache) == ["a", "b"] and cache.counters.evictions == 0
    cache.unpin("b")
    assert cache.admit("c", 6) == ("a", "b")


def test_pins_are_counted():
    cache = Cache(1, "fifo")
    cache.admit("a", 1)
    cache.pin("a")
    cache.pin("a")
    cache.unpin("a")
    assert cache.admit("b", 1) is None
    with pytest.raises(ValueError, match="pinned"):
        cache.forget("a")
    cache.unpin("a")
    assert cache.admit("b", 1) == ("a",)
    with pytest.raises(ValueError, match="not pinned"):
        cache.unpin("a")
    with pytest.raises(ValueError, match="not held"):
        cache.pin("a")


def test_what_is_forgotten_makes_room_and_is_no_eviction():
    cache = Cache(1, "fifo")
    cache.admit("a", 1)
    assert cache.forget("a") and not cache.forget("a")
    assert cache.admit("b", 1) == () and cache.nbytes == 1


def test_units_that_are_no_longer_chosen_give_way():
    cache = Cache(100, "static", {"a": 100})
    cache.admit("a", 100)
    cache.assign({"b": 50, "c": 50})
    assert "a" in cache
    cache.pin("a")
    assert cache.admit("b", 50) is None
    cache.unpin("a")
    assert cache.admit("b", 50) == ("a",)


@pytest.mark.parametrize("arguments", [(10, "mru"), (-1, "lru")])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"cache_policy='mru'|less than none"):
        Cache(*arguments)


def test_a_unit_is_held_with_one_size():
    cache = Cache(10, "lru")
    cache.admit("a", 5)
    assert cache.admit("a", 5) == ()
    with pytest.raises(ValueError, match="held with 5 bytes"):
        cache.admit("a", 6)


operations = st.lists(
    st.tuples(st.sampled_from(("use", "use", "use", "pin", "unpin", "forget")), st.integers(0, 11)),
    max_size=200,
)


@given(
    st.sampled_from(POLICIES),
    st.integers(0, 3000),
    st.lists(st.integers(0, 1000), min_size=12, max_size=12),
    operations,
)
def test_never_over_capacity_never_without_what_is_pinned(policy, capacity, sizes, todo):
    cache = Cache(capacity, policy, dict(enumerate(sizes)))
    held, pins, uses, evictions = set(), [], 0, 0
    for what, key in todo:
        if what == "use":
            uses += 1
            assert cache.wanted(key) == (key in held)
            evicted = cache.admit(key, sizes[key])
            if evicted is not None:
                assert not set(evicted) & set(pins)
                held = (held - set(evicted)) | {key}
                evictions += len(evicted)
        elif what == "pin" and key in held:
            cache.pin(key)
            pins.append(key)
        elif what == "unpin" and key in pins:
            cache.unpin(key)
            pins.remove(key)
        elif what == "forget" and key not in pins:
            assert cache.forget(key) == (key in held)
            held.discard(key)
        assert set(cache) == held >= set(pins) and len(cache) == len(held)
        assert cache.nbytes == sum(sizes[each] for each in held) <= capacity
        counters = cache.counters
        assert counters.hits + counters.misses == uses and counters.evictions == evictions


@given(some_sizes, st.integers(0, 50_000), st.integers(1, 5))
def test_slots_and_what_is_kept_share_the_limit(sizes, limit, slots):
    if limit < min(max(sizes), sum(sizes)):
        with pytest.raises(ValueError, match="max_host_memory"):
            share_out(limit, sizes, slots)
        return
    shares = share_out(limit, sizes, slots)
    assert shares.nbytes <= limit
    if sum(sizes) <= limit:
        assert shares.slots == 0 and shares.capacity == sum(sizes)
    else:
        assert 1 <= shares.slots <= slots and shares.slot_bytes == max(sizes)


def test_where_nothing_is_on_disk_nothing_is_shared_out():
    assert share_out(0, [], staging=4096).nbytes == 0

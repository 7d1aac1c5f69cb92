"""The arena's arithmetic: homes fit, neighbours do not collide, small units prefetch deeper."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from diffusers_offload.arena import assign_homes, capacity_for, overlap

MIB = 2**20
sizes = st.lists(st.integers(1, 100_000), min_size=1, max_size=40)


def distance_to_what_is_overwritten(lengths, homes):
    """For each unit, how many uses ago the nearest unit was that lies on its bytes."""
    count = len(lengths)
    found = []
    for unit in range(count):
        back = next(
            (
                d
                for d in range(1, count)
                if overlap(homes[unit], lengths[unit], homes[unit - d], lengths[unit - d])
            ),
            count,
        )
        found.append(back)
    return found


@given(sizes, st.integers(0, 300_000))
def test_homes_are_aligned_and_inside(lengths, extra):
    capacity = capacity_for(lengths) + extra // 256 * 256
    for home, length in zip(assign_homes(lengths, capacity), lengths, strict=True):
        assert home % 256 == 0
        assert 0 <= home <= capacity - length


@given(sizes)
def test_neighbours_never_collide_within_a_cycle(lengths):
    homes = assign_homes(lengths, capacity_for(lengths))
    for unit in range(1, len(lengths)):
        assert not overlap(homes[unit - 1], lengths[unit - 1], homes[unit], lengths[unit])


@pytest.mark.parametrize("count", [2, 4, 24, 40])
def test_an_even_cycle_of_equal_units_never_waits_for_its_neighbour(count):
    lengths = [680 * MIB] * count
    assert min(distance_to_what_is_overwritten(lengths, assign_homes(lengths, capacity_for(lengths)))) >= 2


def test_small_units_prefetch_deeper_than_large_ones():
    lengths = [680 * MIB] * 19 + [283 * MIB] * 38
    distances = distance_to_what_is_overwritten(lengths, assign_homes(lengths, capacity_for(lengths)))
    assert min(distances) >= 2
    assert sorted(distances[24:])[len(distances[24:]) // 2] >= 4


def test_everything_fits_when_there_is_room():
    lengths = [1000, 2000, 3000]
    homes = assign_homes(lengths, 10_000 // 256 * 256)
    assert distance_to_what_is_overwritten(lengths, homes) == [3, 3, 3]


def test_a_unit_larger_than_the_arena_is_refused():
    with pytest.raises(ValueError, match="does not fit"):
        assign_homes([1000], 512)

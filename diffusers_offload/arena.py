"""The arena: one device buffer in which the streamed units take turns, and the arithmetic of their homes.

Each unit has a *home*, an offset that stays the same from step to step, so that device addresses repeat.
Homes overlap: a unit may be loaded once every unit whose bytes it overwrites has been used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from .slab import align

if TYPE_CHECKING:
    import torch

    from .component import Unit


LOOKAHEAD = 48 * 2**20  # bytes of units outside the arena that may wait for their use; one may be of any size


class Arena:
    """The buffer, and which units lie in it.

    Attributes:
        buffer: uint8, on the device; None while nothing streams.
        lying: the units whose bytes are in the buffer or on their way there, in the order of their loads.
    """

    def __init__(self) -> None:
        self.buffer: torch.Tensor | None = None
        self.lying: list[Unit] = []

    @property
    def capacity(self) -> int:
        return self.buffer.numel() if self.buffer is not None else 0

    def assign(self, units: Sequence[Unit]) -> None:
        """Give `units`, in the order of a cycle, their homes; none of them may lie in the arena."""
        homes = assign_homes([unit.nbytes for unit in units], self.capacity)
        for unit, home in zip(units, homes, strict=True):
            unit.home, unit.end = home, home + unit.nbytes
            unit.slot = self.buffer[unit.home : unit.end]

    def overwritten_by(self, unit: Unit) -> list[Unit]:
        """The units whose bytes a load of `unit` to its home would overwrite."""
        if unit.slot is None:
            return []
        start, end = unit.home, unit.end
        return [other for other in self.lying if start < other.end and other.home < end and other is not unit]


def capacity_for(sizes: Sequence[int], slots: int = 2) -> int:
    """Bytes that any `slots` units fit in at once, whatever order they turn out to run in."""
    return sum(align(size) for size in sorted(sizes)[-slots:])


def overlap(a: int, a_size: int, b: int, b_size: int) -> bool:
    """Whether the byte ranges [a, a + a_size) and [b, b + b_size) share a byte."""
    return a < b + b_size and b < a + a_size


def assign_homes(sizes: Sequence[int], capacity: int) -> list[int]:
    """Give each unit of a cycle its offset in an arena of `capacity` bytes.

    The order is cyclic: the first unit follows the last. Each unit goes where the units it overwrites were
    used longest ago (and where those that it would overwrite at the start of the next cycle come last), so
    that as many units as fit are on their way at once. Any two neighbours that fit in together are
    disjoint, but for a last unit that has to fit in beside the first, too.

    Args:
        sizes: bytes of each unit, in order of use.
        capacity: bytes of the arena, at least `max(sizes)`.

    Returns:
        One offset per unit, each a multiple of 256.

    Raises:
        ValueError: a unit is larger than the arena.
    """
    sizes = [align(size) for size in sizes]
    if sizes and max(sizes) > capacity:
        raise ValueError(f"a unit of {max(sizes)} bytes does not fit in an arena of {capacity} bytes")
    homes: list[int] = []
    for unit, size in enumerate(sizes):
        following = sizes[unit + 1] if unit + 1 < len(sizes) else 0
        best = max(
            _candidates(size, sizes, homes, capacity),
            key=lambda offset: (*_merit(offset, unit, sizes, homes, capacity, following), -offset),
        )
        homes.append(best)
    return homes


def _candidates(size: int, sizes: Sequence[int], homes: Sequence[int], capacity: int) -> set[int]:
    """Flush with a wall or with a unit placed lately: the only offsets worth trying."""
    recent = range(max(0, len(homes) - 64), len(homes))
    offsets = {0, capacity - size}
    offsets.update(homes[unit] + sizes[unit] for unit in recent)
    offsets.update(homes[unit] - size for unit in recent)
    return {offset for offset in offsets if 0 <= offset <= capacity - size}


def _merit(
    offset: int, unit: int, sizes: Sequence[int], homes: Sequence[int], capacity: int, following: int
) -> tuple[bool, bool, int]:
    """(spares the unit before, leaves room for the one after, distance to the nearest unit overwritten)."""
    size = sizes[unit]
    room = following <= max(offset, capacity - offset - size)
    count = len(sizes)
    distance = count
    for back in range(1, unit + 1):
        if overlap(offset, size, homes[unit - back], sizes[unit - back]):
            distance = back
            break
    for ahead, home in enumerate(homes[: max(0, distance - (count - unit))]):
        if overlap(offset, size, home, sizes[ahead]):
            distance = count - unit + ahead
            break
    return distance > 1, room, distance

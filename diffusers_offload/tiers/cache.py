"""The host cache: which units' bytes stay in host memory when it cannot hold them all. Pure bookkeeping, no bytes.

Units are used in a cycle, step after step. A cache that is smaller than the cycle and drops what it has held longest
(`fifo`) or not used for longest (`lru`) drops each unit just before its next use: no hits at all. To hold the same
units always (`static`) hits as often as units fit, and nothing can hit more often in the long run (compare L. A.
Belady, A study of replacement algorithms for a virtual-storage computer, 1966). `fifo` and `lru` are for units that
are used in no steady order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from ..planning.planner import choose_kept
from ..report import size_text

CachePolicy = Literal["static", "fifo", "lru"]


@dataclass(frozen=True)
class CacheCounters:
    """What a cache has seen.

    Attributes:
        hits: uses of units that were held; `misses` uses of others.
        evictions: units that gave way to another one.
    """

    hits: int = 0
    misses: int = 0
    evictions: int = 0

    @property
    def hit_rate(self) -> float | None:
        """Share of the uses that hit, 0.0 to 1.0; None before the first."""
        uses = self.hits + self.misses
        return self.hits / uses if uses else None


class Cache:
    """Decides which units are kept. Not safe for threads: whoever asks holds the engine's lock.

    A use asks `wanted`; on a miss, `admit` says what has to go so that the unit can be kept, or that it is not
    kept and streams through a slot. Between `pin` and `unpin` (while a unit is read, or copied to the device) it
    is not evicted.

    Args:
        capacity: bytes that may be held.
        policy: `static` holds a fixed set of units; `fifo` drops first what came first; `lru` what was used
            the longest ago.
        sizes: bytes of each unit in order of use, from which `static` chooses; the other policies need none.
    """

    def __init__(
        self, capacity: int, policy: CachePolicy = "static", sizes: Mapping[Hashable, int] | None = None
    ) -> None:
        if policy not in get_args(CachePolicy):
            raise ValueError(f"cache_policy={policy!r} is unknown; use 'static', 'fifo' or 'lru'")
        if capacity < 0:
            raise ValueError(f"a cache of {capacity} bytes is less than none")
        self.capacity = capacity
        self.policy = policy
        self.nbytes = 0
        self._held: dict[Hashable, int] = {}  # key -> bytes, the first to go first
        self._pins: Counter[Hashable] = Counter()
        self._hits = self._misses = self._evictions = 0
        self.assign(sizes or {})

    def assign(self, sizes: Mapping[Hashable, int]) -> None:
        """From now on these are the units, in order of use; what is held and not chosen gives way when it must."""
        self.sizes = dict(sizes)
        keys = list(sizes)
        stay = choose_static([sizes[key] for key in keys], self.capacity) if self.policy == "static" else ()
        self.chosen = frozenset(keys[at] for at in stay)

    def passing(self, sizes: Mapping[Hashable, int]) -> frozenset[Hashable]:
        """Those that are never held when they are used, if these are used in a cycle, whatever is held now."""
        if self.policy == "static":
            return frozenset(sizes) - self.chosen
        return frozenset() if sum(sizes.values()) <= self.capacity else frozenset(sizes)

    def wanted(self, key: Hashable) -> bool:
        """A unit is used: whether it is held. Counted."""
        if key not in self._held:
            self._misses += 1
            return False
        self._hits += 1
        if self.policy == "lru":
            self._held[key] = self._held.pop(key)
        return True

    def missed(self) -> None:
        """A unit is used that was not held, though it is by now. Counted."""
        self._misses += 1

    def rename(self, key: Hashable, now: Hashable) -> None:
        """A unit that is not held, of the same size and place in the order, has another key from now on."""
        self.sizes = {now if each == key else each: nbytes for each, nbytes in self.sizes.items()}
        self.chosen = frozenset(now if each == key else each for each in self.chosen)

    def count_on(self, counters: CacheCounters) -> None:
        """Go on counting from where another cache was."""
        self._hits, self._misses, self._evictions = counters.hits, counters.misses, counters.evictions

    def admit(self, key: Hashable, nbytes: int) -> tuple[Hashable, ...] | None:
        """Hold a unit from now on, as far as that is possible.

        Returns:
            The units evicted for it, whose bytes the caller has to give up first; None if it is not kept.

        Raises:
            ValueError: it is held already, with another size.
        """
        if key in self._held:
            if self._held[key] != nbytes:
                raise ValueError(
                    f"{key!r} is held with {self._held[key]} bytes, not {nbytes}: forget it first"
                )
            return ()
        if self.policy == "static" and key not in self.chosen:
            return None
        evicted, room = [], self.capacity - self.nbytes
        victims = self._victims()
        while room < nbytes:
            victim = next(victims, None)
            if victim is None:
                return None
            evicted.append(victim)
            room += self._held[victim]
        for victim in evicted:
            self.nbytes -= self._held.pop(victim)
        self._evictions += len(evicted)
        self._held[key] = nbytes
        self.nbytes += nbytes
        return tuple(evicted)

    def pin(self, key: Hashable) -> None:
        """Do not evict a unit that is held, until `unpin` was called as often."""
        if key not in self._held:
            raise ValueError(f"{key!r} is not held, so it cannot be pinned")
        self._pins[key] += 1

    def unpin(self, key: Hashable) -> None:
        """Undo one `pin`."""
        if not self._pins[key]:
            raise ValueError(f"{key!r} is not pinned")
        self._pins[key] -= 1

    def forget(self, key: Hashable) -> bool:
        """A unit's bytes are gone or of no use (read failed, unit removed): whether it was held. No eviction."""
        if self._pins[key]:
            raise ValueError(f"{key!r} is pinned: somebody still uses its bytes")
        del self._pins[key]
        nbytes = self._held.pop(key, None)
        self.nbytes -= nbytes or 0
        return nbytes is not None

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def __iter__(self) -> Iterator[Hashable]:
        """The units held, the first to go first."""
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)

    @property
    def counters(self) -> CacheCounters:
        return CacheCounters(self._hits, self._misses, self._evictions)

    def reset(self) -> None:
        """Count from zero again."""
        self._hits = self._misses = self._evictions = 0

    def _victims(self) -> Iterator[Hashable]:
        return (key for key in self._held if not self._pins[key] and key not in self.chosen)


@dataclass(frozen=True)
class Shares:
    """How the host memory of the disk tier is divided, in bytes.

    Attributes:
        capacity: for units that are kept.
        slots: how many units can be on their way from disk to the device; each has `slot_bytes`.
    """

    capacity: int
    slots: int
    slot_bytes: int

    @property
    def nbytes(self) -> int:
        return self.capacity + self.slots * self.slot_bytes


def share_out(limit: int, sizes: Sequence[int], slots: int = 3, staging: int = 0) -> Shares:
    """Divide `limit` bytes of host memory among what is kept and the slots that the other units pass through.

    Args:
        limit: most bytes of host memory, for both together.
        sizes: host bytes of each unit, as allocated: rounded up to pages.
        slots: how many there should be: one is read into while others wait for or are copied to the device.
            There are fewer where memory is short, and none where everything is kept.
        staging: bytes of `limit` that are for something else.

    Raises:
        ValueError: not even one unit fits.
    """
    total, largest = sum(sizes), max(sizes, default=0)
    room = limit - staging
    if not sizes or total <= room:
        return Shares(total, 0, 0)
    slots = min(slots, room // largest)
    if slots < 1:
        least = largest * 8 // 7 + 1 if staging else largest  # it takes an eighth at most
        raise ValueError(
            f"max_host_memory={limit} is {size_text(largest - room)} less than the largest unit needs, which must "
            f"pass through host memory as a whole: give at least {size_text(least)}, better three times that, or let "
            "units be smaller (offload_granularity='phase' or 'leaf')"
        )
    return Shares(room - slots * largest, slots, largest)


def choose_static(sizes: Sequence[int], capacity: int) -> set[int]:
    """Which units to hold always within `capacity` bytes: as many bytes as are easily found, spread over the order.

    Spread evenly first, so that between two reads the disk has about the same time everywhere; what is left
    is filled with the largest units that fit.

    Args:
        sizes: bytes of each unit, in order of use.
    """
    chosen = choose_kept(sizes, capacity)
    room = capacity - sum(sizes[unit] for unit in chosen)
    for unit in sorted(range(len(sizes)), key=lambda unit: -sizes[unit]):
        if unit not in chosen and sizes[unit] <= room:
            chosen.add(unit)
            room -= sizes[unit]
    return chosen

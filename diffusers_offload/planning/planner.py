"""From sizes and policies to a plan: who is resident, who streams, how large the arena is. Pure functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import prod
from typing import TYPE_CHECKING

from .. import arena
from ..policy import OffloadPolicy
from ..report import size_text, table

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class UnitSize:
    """A unit by name, its bytes, and those of host memory that it takes while it is not on the device."""

    name: str
    nbytes: int
    held: int | None = None  # None: as many

    @property
    def host_bytes(self) -> int:
        return self.nbytes if self.held is None else self.held


@dataclass(frozen=True)
class ComponentPlan:
    """What becomes of one component; sizes in bytes.

    Attributes:
        streamed: units that take turns in the arena, in declared order.
        residents: units that stay on the device.
        stem_bytes: what comes when the component runs and leaves afterwards; all of it under "model".
        note: why the plan is not what the call asked for, or "".
    """

    name: str
    policy: OffloadPolicy
    streamed: tuple[UnitSize, ...]
    residents: tuple[UnitSize, ...]
    stem_bytes: int
    note: str = ""

    @property
    def streamed_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.streamed)

    @property
    def resident_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.residents)

    @property
    def arena_bytes(self) -> int:
        """Bytes in which any two of its units fit; leaves have no place in the arena."""
        return 0 if self._floats else arena.capacity_for([unit.nbytes for unit in self.streamed])

    @property
    def floating_bytes(self) -> int:
        """Most bytes of leaves on the device at once: one in use, and what is loaded ahead."""
        sizes = sorted(unit.nbytes for unit in self.streamed) if self._floats else []
        return sum(sizes[-1:]) + max(sum(sizes[-2:-1]), min(arena.LOOKAHEAD, sum(sizes[:-1])))

    @property
    def host_bytes(self) -> int:
        """Bytes of host memory, without the buffers of those on disk; estimated where weights are packed."""
        return 0 if self.on_disk else self.stem_bytes + sum(unit.host_bytes for unit in self.streamed)

    @property
    def on_disk(self) -> bool:
        """Whether what leaves the device is on disk."""
        return self.policy.tier == "disk"

    @property
    def _floats(self) -> bool:
        return self.policy.granularity == "leaf"


@dataclass(frozen=True)
class Plan:
    """What becomes of a pipeline: one plan per component, and the arena that they share."""

    device: str
    components: tuple[ComponentPlan, ...]
    staging_bytes: int = 0  # on the device, of what packed weights pass through

    @property
    def arena_bytes(self) -> int:
        """Bytes of the arena: what the most demanding component needs."""
        return max((component.arena_bytes for component in self.components), default=0)

    @property
    def device_bytes(self) -> int:
        """Most bytes of weights on the device at once, where no two components alternate."""
        running = max((c.stem_bytes + c.floating_bytes for c in self.components), default=0)
        resident = sum(component.resident_bytes for component in self.components)
        return self.arena_bytes + self.staging_bytes + running + resident

    @property
    def host_bytes(self) -> int:
        """Bytes of weights in host memory, without the buffers of those on disk."""
        return sum(component.host_bytes for component in self.components)

    @property
    def disk_bytes(self) -> int:
        """Bytes of weights on disk."""
        return sum(c.streamed_bytes + c.stem_bytes for c in self.components if c.on_disk)

    def __str__(self) -> str:
        header = ("component", "policy", "streams", "stays", "comes and goes")
        rows = [
            (
                component.name,
                component.policy.granularity,
                f"{len(component.streamed)} x, {size_text(component.streamed_bytes)}",
                f"{len(component.residents)} x, {size_text(component.resident_bytes)}",
                size_text(component.stem_bytes),
            )
            for component in self.components
        ]
        disk = f", on disk {size_text(self.disk_bytes)}" if self.disk_bytes else ""
        notes = "".join(f"\n{c.name}: {c.note}" for c in self.components if c.note)
        return (
            f"{table(header, rows)}\n"
            f"arena {size_text(self.arena_bytes)}; weights on {self.device} at most "
            f"{size_text(self.device_bytes)}, on the host {size_text(self.host_bytes)}{disk}{notes}"
        )


def choose_residents(sizes: Sequence[int], ratio: float) -> set[int]:
    """Which units stay so that at most `ratio` of the bytes stream, spread evenly by bytes over the order.

    Spreading keeps the transfers from bunching: between two streamed units lies about the same amount
    of computing everywhere (compare Bresenham's line). The units that stream never exceed `ratio`.

    Args:
        sizes: bytes of each unit, in order of use.
        ratio: share of the bytes that streams, 0.0 to 1.0.
    """
    return set(range(len(sizes))) - keep_pace(sizes, [ratio * passed for passed in accumulate(sizes)])


def choose_kept(sizes: Sequence[int], room: int) -> set[int]:
    """Which units to keep within `room` bytes, spread evenly by bytes over the order.

    Args:
        sizes: bytes of each unit, in order of use.
        room: bytes that may be kept; the units chosen never exceed it.
    """
    total = sum(sizes)
    if total <= room:
        return set(range(len(sizes)))
    share = max(0, room) / total if total else 0.0
    return keep_pace(sizes, [share * passed for passed in accumulate(sizes)])


def keep_pace(sizes: Sequence[int], targets: Sequence[float]) -> set[int]:
    """Units whose bytes, summed up over the order, follow `targets` as closely as they can from below.

    Args:
        sizes: bytes of each unit, in order of use.
        targets: for each unit, how many bytes at most are to be taken up to it and with it.
    """
    taken, units = 0, set()
    for unit, (size, target) in enumerate(zip(sizes, targets, strict=True)):
        if taken + size <= target * (1 + 1e-12):
            taken += size
            units.add(unit)
    return units


def check_budget(plan: Plan, limit: int, given: bool = True, others: int = 0) -> None:
    """Raise ValueError if the weights that must be on the device at once exceed `limit` bytes.

    Args:
        given: the user set the limit; otherwise it is what the device has.
        others: bytes of it that something else holds.
    """
    missing = plan.device_bytes + others - limit
    if missing <= 0:
        return
    parts = [f"{size_text(plan.arena_bytes)} for the arena (two units)"] if plan.arena_bytes else []
    if plan.staging_bytes:
        parts.append(f"{size_text(plan.staging_bytes)} that packed weights pass through")
    largest = max(plan.components, key=lambda component: component.stem_bytes + component.floating_bytes)
    if largest.stem_bytes:
        parts.append(f"{size_text(largest.stem_bytes)} for what of {largest.name} does not stream")
    if largest.floating_bytes:
        parts.append(
            f"{size_text(largest.floating_bytes)} for the layers of {largest.name} in use and on their way"
        )
    parts += [f"{size_text(c.resident_bytes)} that stay of {c.name}" for c in plan.components if c.residents]
    if others:
        parts.append(f"and {size_text(others)} are taken by others")
    bound = f"max_device_memory={limit}" if given else f"the {size_text(limit)} that {plan.device} has free"
    raise ValueError(
        f"{bound} is {size_text(missing)} too little for the weights alone: "
        f"they need {', '.join(parts)}. Give more, or let less be there at once: smaller units ('phase' or 'leaf') for "
        "that component, a larger offload_ratio, 'model' instead of 'resident'."
    )


def estimate_activations(shapes: Sequence[Sequence[int]], matrices: Sequence[torch.Tensor]) -> int:
    """Bytes that a forward's activations may take: a rough upper bound for transformers, before one has run.

    FLUX and Wan were seen to hold about 3.5 times what their widest layer takes in and gives out. Where latents
    are cut into patches, this counts each pixel as a token, and so too many.

    Args:
        shapes: of the tensors that the forward is given: (batch, tokens, channels) or (batch, channels, ...).
        matrices: the weights, of which the widest counts.
    """
    tokens = sum(
        shape[0] * shape[1] if len(shape) == 3 else prod(shape) // max(1, shape[1])
        for shape in shapes
        if len(shape) >= 3
    )
    widest = max(((t.shape[0] + t.shape[1]) * t.element_size() for t in matrices), default=0)
    return 4 * tokens * widest

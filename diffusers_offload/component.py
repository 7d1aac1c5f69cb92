"""Units and components as the engine sees them: plain state, changed by the engine and its transfers alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch

from .units import own_tensors
from .weights import Weights


class State(Enum):
    """Where a unit is on its way. The engine changes it, and `transfers` where a copy is queued."""

    OFFLOADED = "offloaded"
    LOADING = "loading"  # its load is queued
    IN_USE = "in_use"  # its tensors are bound to the device
    READY = "ready"  # used and still in place: free to be used again, or overwritten
    RESIDENT = "resident"


WAITING = (State.LOADING, State.READY)  # on the device, and not in use


class Unit:
    """What moves as a whole: its weights, its state and its two events.

    Args:
        name: its path in the component.
        modules: those whose forwards use the weights; none for a piece of the stem.
        weights: what moves.
        opener: the block from whose beginning some of the weights are used, or None.
        floats: it has no home in the arena but a buffer of its own each time it is loaded.
        block: the path of the block that it is a part of; its own name where it is none.
    """

    def __init__(
        self,
        name: str,
        modules: Sequence[torch.nn.Module],
        weights: Weights,
        opener: torch.nn.Module | None = None,
        floats: bool = False,
        block: str = "",
    ) -> None:
        self.name = name
        self.block = block or name
        self.modules = tuple(modules)
        self.opener = opener
        self.opened = frozenset(id(t) for t in own_tensors(opener)) if opener is not None else frozenset()
        self.weights = weights
        self.floats = floats
        self.state = State.OFFLOADED
        self.component: Component | None = None
        self.number = -1  # among the streamed units of the engine
        self.home = self.end = 0  # its bytes in the arena, from and up to
        self.slot: torch.Tensor | None = None  # the bytes of the arena at its home
        self.used = False  # since it was loaded
        self.depth = 0  # forwards of its modules under way
        self.clings = False  # in use until its component's forward ends: something else looks at its bytes
        self.stream: Any = None  # that the forward under way computes on
        self.keeps = False  # once loaded, stays until its component leaves
        self.borrows = False  # lies outside the arena, in a buffer of its own
        self.ready: Any = None
        self.done: Any = None

    @property
    def nbytes(self) -> int:
        return self.weights.nbytes


@dataclass(frozen=True)
class Stray:
    """A tensor that was used although no forward of its unit was under way.

    Attributes:
        within: the forward of a smaller module, which holds the tensor, was: that one may be a unit.
    """

    unit: Unit
    tensor: torch.Tensor
    within: bool


class Component:
    """A module of the pipeline: its stem, which comes and goes as a whole, and its units."""

    def __init__(self, name: str, module: torch.nn.Module) -> None:
        self.name = name
        self.module = module
        self.stem: list[Unit] = []
        self.streamed: list[Unit] = []
        self.residents: list[Unit] = []
        self.shares = False  # a share of its units stays, whichever they are
        self.tier = "pinned"  # where its weights are while they are not on the device
        self.present = False  # the stem is on the device
        self.needs: list[Component] = []  # components whose stems hold tensors of this one as well
        self.depth = 0  # forwards under way
        self.users: list[Any] = []  # streams that used the stem since it came
        self.first: int | None = None  # the unit that its forward began with last time
        self.trace: list[int] = []  # the units of the forward under way
        self.order: list[int] = []  # of its units, as the homes were assigned for it
        self.checked = False  # in this call: it holds the tensors that were taken in
        self.runs = 0  # forwards in this call
        self.contended = False  # it alternates with one that had better not keep units, either
        self.surprise: list[int] | None = None  # the last order that the homes did not suit
        self.watch: Any = None  # looks for weights used past their unit, while the forward is new
        self.watched = False  # the latest forward was looked at
        self.known = False  # a forward has run without finding one
        self.strays: list[Stray] = []  # found in the latest forward
        self.ran: set[Unit] = set()  # units whose own forward has run, while that is watched
        self.met: set[Unit] = set()  # units that have run in a forward that was watched and found nothing
        self.late: set[Unit] = set()  # in use past their forwards: released when another one is used
        self.pairs: Any = None  # the guidance passes that run for one load (`Pairs`), once it has been called

    def edited(self) -> None:
        """Its weights are others now: what was computed ahead for its calls is out of date."""
        if self.pairs is not None:
            self.pairs.discard()

    @property
    def on_disk(self) -> bool:
        """Whether its weights are on disk while they are not on the device."""
        return self.tier == "disk"

    @property
    def packs(self) -> bool:
        """Whether its units are packed while they are not on the device."""
        return self.tier == "packed"

    @property
    def units(self) -> list[Unit]:
        return [*self.stem, *self.residents, *self.streamed]

    @property
    def homed(self) -> list[Unit]:
        """The streamed units that take turns in the arena."""
        return [unit for unit in self.streamed if not unit.floats]

    @property
    def stem_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.stem)

    @property
    def resident_bytes(self) -> int:
        return sum(unit.nbytes for unit in self.residents)

    @property
    def kept_bytes(self) -> int:
        """Bytes on the device of streamed units that stay until the component leaves."""
        return sum(unit.nbytes for unit in self.streamed if unit.keeps and unit.borrows)

"""Where units lie: the arena's size, each unit's home in it, and the order that the homes suit."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from .arena import LOOKAHEAD, Arena, capacity_for
from .component import Component, State, Unit
from .order import Order


class Homes:
    """The arena of an engine, and who lives where.

    Args:
        allocate: device memory of so many bytes.
        clear: takes units out of the arena, so that their homes may change.

    Attributes:
        units: the streamed units of all components, by number.
        order: predicts which is used next.
        may_wait: bytes of floating units, which have no home, that may be loaded ahead.
        slack: bytes of the arena beyond what any `slots` units of one component need.
        lost: there was no memory for the arena, so units have no homes until `fit` finds some.
    """

    def __init__(
        self, allocate: Callable[[int], torch.Tensor], clear: Callable[[Sequence[Unit]], None]
    ) -> None:
        self.arena = Arena()
        self.order = Order({})
        self.units: list[Unit] = []
        self.may_wait = LOOKAHEAD
        self.slack = 0
        self.slots = 2
        self.lost = False
        self._components: Sequence[Component] = ()
        self._allocate = allocate
        self._clear = clear

    @property
    def extra(self) -> int:
        """Bytes of the slack that the arena has."""
        return self.slack if self.slots > 1 else 0

    def open(self, components: Sequence[Component]) -> None:
        """Give every streamed unit a number and a home; what was known of their order is forgotten."""
        self._components = list(components)
        self.units = [unit for component in components for unit in component.streamed]
        successors = {}
        for number, unit in enumerate(self.units):
            unit.number = number
        for component in components:
            numbers = [unit.number for unit in component.streamed]
            component.first = numbers[0] if numbers else None
            component.order = [unit.number for unit in component.homed]
            successors.update(zip(numbers, numbers[1:] + numbers[:1], strict=True))
        self.order = Order(successors)
        self.may_wait = min(LOOKAHEAD, max((unit.nbytes for unit in self.units if unit.floats), default=0))
        self.fit()

    def fit(self) -> None:
        """An arena of the size that the units need, and a home for each."""
        if not self.units:
            return
        sizes = [[unit.nbytes for unit in component.homed] for component in self._components]
        needed = max(capacity_for(each, self.slots) for each in sizes)
        needed += self.extra
        if needed != self.arena.capacity:
            self._clear([unit for unit in self.units if unit.state is not State.RESIDENT])
            self.arena.buffer = None
            self.lost = True
            try:
                self.arena.buffer = self._allocate(needed) if needed else None
                self.lost = False
            except RuntimeError:
                if self.extra:
                    self.slack = 0
                elif self.slots > 1:
                    self.slots = 1
                else:
                    raise
                self.fit()  # a smaller one, so that whatever comes next finds one
                raise
        for component in self._components:
            self.assign(component, component.order)

    def let_go(self) -> None:
        """The arena's memory is free until `fit`: whoever lies in it leaves."""
        self._clear([unit for unit in self.units if unit.state is not State.RESIDENT])
        self.arena.buffer = None

    def assign(self, component: Component, order: list[int]) -> None:
        """Give the component's units the homes that suit this order; those that stay need none."""
        component.order = order
        units = [self.units[number] for number in order]
        units = [unit for unit in units if unit.state is not State.RESIDENT]
        self._clear(units)
        if not self.lost:
            self.arena.assign([unit for unit in units if not unit.keeps])

    def learn(self, component: Component) -> bool:
        """A forward has run: assign homes anew if they do not suit its order; returns whether they changed."""
        component.first = component.trace[0]
        order = list(dict.fromkeys(n for n in component.trace if not self.units[n].floats))
        if _is_subsequence(order, component.order):
            return False
        # The first surprise counts at once; after that, an order that keeps changing is not worth following.
        seen_before, component.surprise = component.surprise in (None, order), order
        if not seen_before:
            return False
        self.assign(component, order + [number for number in component.order if number not in set(order)])
        return True


def _is_subsequence(part: list[int], whole: list[int]) -> bool:
    """Whether `part` runs in the order of the cycle `whole`, with units left out."""
    rest = iter(whole)
    return all(number in rest for number in part)

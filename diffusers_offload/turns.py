"""Which components take turns within a denoising step: a ControlNet and its transformer, say."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .component import Component

_ENOUGH = 2  # times that each made the other leave in one call: a single return is no alternation


class Turns:
    """Remembers who made whose stem leave, and so which stems had better stay."""

    def __init__(self) -> None:
        self._displaced: Counter[tuple[Component, Component]] = Counter()
        self._pairs: set[frozenset[Component]] = set()

    def displaced(self, leaving: Component, coming: Component) -> None:
        """The stem of `leaving` left because `coming` began."""
        self._displaced[leaving, coming] += 1
        if min(self._displaced[leaving, coming], self._displaced[coming, leaving]) >= _ENOUGH:
            self._pairs.add(frozenset((leaving, coming)))

    def alternate(self, one: Component, other: Component) -> bool:
        """Whether the two take turns, so that sending one away would only bring it back."""
        return frozenset((one, other)) in self._pairs

    def forget(self, component: Component) -> None:
        """The component is here no longer."""
        self._pairs = {pair for pair in self._pairs if component not in pair}
        for pair in [pair for pair in self._displaced if component in pair]:
            del self._displaced[pair]

    def call_ended(self) -> None:
        """Count anew; who has been found to alternate does so in the next call, too."""
        self._displaced.clear()

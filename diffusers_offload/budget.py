"""A bound on the device's peak memory: measure what a forward needs, keep blocks in what is left.

What a component's activations take is not known before it has run, so its first forwards run with nothing
kept. A component that runs once a call (a text encoder) gains nothing from keeping and is left alone.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from .planner import choose_kept

if TYPE_CHECKING:
    from .component import Component, Unit
    from .streams import Streams

_TIGHTEN = 0.8  # of the bound, once the device has run out of memory below it
_RESERVE = 0.01  # of the bound: kept buffers are rounded up by the allocator


class DeviceBudget:
    """Decides which streamed units a component may keep while it runs.

    The memory of a forward is taken to follow from the shapes of its inputs: with new ones, nothing is kept
    until it has been measured. Measuring resets the device's peak statistics.

    Args:
        limit: bytes that tensors on the device may take at most, activations included.
        streams: the device's streams, which measure its memory.
    """

    def __init__(self, limit: int, streams: Streams) -> None:
        self.limit = limit
        self._streams = streams
        self._needs: dict[tuple[Component, tuple], int] = {}  # peak bytes, less what is kept and others'
        self._others = 0
        self.seen = 0  # the highest peak so far, which measuring would otherwise lose
        self._shapes: dict[Component, tuple] = {}

    def begin(self, component: Component, shapes: tuple, weights: int) -> set[Unit]:
        """What `component` may keep in the forward that begins with inputs of these shapes.

        Args:
            weights: bytes of its weights, and the arena's, on the device now; what else is there is others'.
        """
        self._shapes[component] = shapes
        self._others = max(0, self._streams.allocated() - weights)
        self.seen = max(self.seen, self._streams.peak())
        self._streams.begin_peak()
        return self._choose(component)

    def end(self, component: Component, weights: int) -> set[Unit]:
        """What `component` may keep from now on, its forward being over.

        Args:
            weights: bytes of weights that were on the device for it anyway.
        """
        component.runs += 1
        if component not in self._shapes:  # another component keeps blocks while this one runs
            return set()
        key = component, self._shapes[component]
        need = max(self._streams.peak() - component.kept_bytes - self._others, weights)
        self._needs[key] = max(self._needs.get(key, 0), need)
        return self._choose(component)

    def tighten(self) -> None:
        """The bound was too high: the device has less memory to give than was thought."""
        self.limit = int(self.limit * _TIGHTEN)

    def forget(self, component: Component) -> None:
        """The component is here no longer."""
        self._needs = {key: need for key, need in self._needs.items() if key[0] is not component}
        self._shapes.pop(component, None)

    def _choose(self, component: Component) -> set[Unit]:
        need = self._needs.get((component, self._shapes.get(component)))
        repeats = component.runs > 1 or any(unit.keeps for unit in component.streamed)
        if need is None or not repeats:
            return set()
        sizes = [unit.nbytes for unit in component.streamed]
        chosen = choose_kept(sizes, int(self.limit * (1 - _RESERVE)) - need - self._others)
        return {component.streamed[i] for i in chosen}

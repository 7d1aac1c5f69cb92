"""What the first forwards teach: weights used past their unit, and views that outlive its use.

Such a unit is brought when it is used, and stays where that is needed; `Held` takes the component apart anew
before the next forward, with what was found (`Component.strays`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch

from .component import Component, State, Stray, Unit
from .units import own_tensors
from .watch import Watch, runs_within, watch_units


class Learning:
    """Watches forwards that may still do something new.

    Args:
        use: brings a unit and binds it, as if its forward began.
        finish: lets a unit go if nobody uses it any longer.
    """

    def __init__(self, use: Callable[[Unit], None], finish: Callable[[Unit], None]) -> None:
        self._use = use
        self._finish = finish
        self._watches: list[Watch] = []  # of the forwards under way that are watched, innermost last

    def begin(self, component: Component) -> None:
        """A forward of `component` begins."""
        component.strays.clear()
        component.ran.clear()
        if not component.known:
            self._watch(component)

    def meet(self, unit: Unit, opening: bool) -> None:
        """A use of `unit` begins; `opening`: not by its own forward."""
        component = unit.component
        if component.late and unit not in component.late:
            self._let_late_go(component)
        if component.watch is None and component.depth and unit not in component.met:
            component.known = False  # nobody has seen yet what it does
            self._watch(component)
        if self._watches and not opening:
            component.ran.add(unit)

    def part(self, unit: Unit) -> None:
        """A use of `unit` ends. Views that outlive it (it returned one, say) must not look at others' bytes."""
        if not self._watches:
            return
        for tensor in self._watches[-1].views_left(unit.weights.tensors):
            unit.component.strays.append(Stray(unit, tensor, within=False))
            self._cling(unit)

    def end(self, component: Component, completed: bool) -> None:
        """The component's forward is over: so are those of its units, and what was learned counts."""
        watch, component.watch = component.watch, None
        component.watched = watch is not None
        if watch is not None:
            watch.__exit__(None, None, None)
            self._watches.remove(watch)
            lent = [each for each in component.needs if not each.depth]
            component.known = completed and not any(each.strays for each in (component, *lent))
            component.checked = component.checked and component.known
            if component.known:
                component.met |= component.ran
        component.known = component.known and completed  # it may have failed for want of a weight: look again
        for each in (component, *(each for each in component.needs if not each.depth)):
            each.late.clear()
            for unit in each.streamed if watch is not None or not completed else ():
                unit.depth, unit.clings = 0, False
                self._finish(unit)

    def _watch(self, component: Component) -> None:
        units = [unit for each in (component, *component.needs) for unit in each.streamed]
        if units:
            component.watch = watch_units(units, self._use_past, self._cling)
            component.watch.__enter__()
            self._watches.append(component.watch)

    def _use_past(self, used: list[tuple[Unit, torch.Tensor]]) -> None:
        """Tensors are about to be used, by one call, although no forwards of their units are under way."""
        coming = {unit for unit, _ in used}
        for component in {unit.component for unit in coming}:
            self._let_late_go(component, coming)
        for unit in coming:
            unit.component.late.add(unit)
        for unit, tensor in used:
            parts = [part for module in unit.modules for part in module.modules() if part is not module]
            holders = [part for part in parts if any(t is tensor for t in own_tensors(part))]
            unit.component.strays.append(Stray(unit, tensor, within=runs_within(holders)))
            self._use(unit)

    def _let_late_go(self, component: Component, but: Collection[Unit] = ()) -> None:
        going = component.late.difference(but)
        component.late -= going
        for unit in going:
            self._finish(unit)

    def _cling(self, unit: Unit) -> None:
        """Something that outlives the unit's use looks at its bytes: they stay until the component's forward ends."""
        unit.clings = unit.state is State.IN_USE

"""A component that is held under an engine: its hooks, its guarded `to`, and the handles that want it there."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import hooks
from .component import Component, Unit
from .engine import Engine
from .log import logger
from .policy import OffloadPolicy
from .units import Anatomy, Findings, Part, chunks, dissect, own_tensors, tensors_of
from .weights import Weights

if TYPE_CHECKING:
    from .handle import OffloadHandle

_SMALL = 64 * 2**20  # bytes of a component that `.to(device)` brings at once


STEM_CHUNK = 256 * 2**20  # bytes moved at once, so that moving a large stem never doubles it


@dataclass(frozen=True)
class Target:
    """A component about to be offloaded, and how.

    Attributes:
        residents: which of the anatomy's parts stay on the device, by index.
        blocks: what was given as its blocks; None if they are found.
        findings: what running it has shown.
        note: why the policy is not what the call asked for, or "".
    """

    name: str
    module: nn.Module
    policy: OffloadPolicy
    anatomy: Anatomy
    residents: frozenset[int] = frozenset()
    blocks: tuple[nn.Module, ...] | None = None
    findings: Findings = field(default_factory=Findings)
    note: str = ""

    def renewed(self, component: Component | None = None) -> Target:
        """The same component with the tensors that it holds now, and with what its last forward taught.

        A unit that was passed over while its parts ran is taken apart; what was used besides stays in the stem.
        """
        strays = component.strays if component is not None else ()
        passed = [stray for stray in strays if stray.within and stray.unit not in component.ran]
        single = {id(stray.tensor) for stray in strays if stray not in passed}
        bypassed = {module for stray in passed for module in stray.unit.modules}
        findings = Findings(self.findings.bypassed | bypassed, self.findings.strays | single)
        granularity = self.policy.granularity if self.policy.streams else "block"
        anatomy = dissect(self.module, granularity, self.blocks, findings)
        staying = {id(module) for i in self.residents for module in self.anatomy.parts[i].modules}
        residents = frozenset(
            i for i, part in enumerate(anatomy.parts) if all(id(module) in staying for module in part.modules)
        )
        return replace(self, anatomy=anatomy, residents=residents, findings=findings)


def build_component(
    target: Target, owners: dict[int, Component], before: Component | None = None
) -> Component:
    """Build the component's units; tensors that an earlier component owns stay with that one.

    Args:
        owners: which component owns a tensor, by the tensor's id; added to.
        before: the component as it was: units of it that are still right are used again.
    """
    component = Component(target.name, target.module)
    everything = tensors_of(target.module)
    for tensor in everything:
        owner = owners.setdefault(id(tensor), component)
        if owner is not component and owner not in component.needs:
            component.needs.append(owner)
    earlier = _by_contents(before) if before is not None else {}

    def own(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor for tensor in tensors if owners[id(tensor)] is component]

    def unit(role: str, name: str, tensors: Sequence[torch.Tensor], part: Part | None = None) -> Unit:
        modules, opener = (part.modules, part.opener) if part is not None else ((), None)
        again = earlier.get((role, modules, opener, tuple(map(id, tensors))))
        if again is not None:
            again.name = name
            return again
        floats = target.policy.granularity == "leaf" and part is not None
        return Unit(name, modules, Weights(tensors), opener, floats)

    def pieces(role: str, tensors: Sequence[torch.Tensor]) -> list[Unit]:
        groups = chunks(own(tensors), STEM_CHUNK)
        return [unit(role, f"stem.{i}", group) for i, group in enumerate(groups)]

    if target.policy.granularity == "resident":
        component.residents = pieces("resident", everything)
    elif target.policy.granularity == "model":
        component.stem = pieces("stem", everything)
    else:
        component.stem = pieces("stem", target.anatomy.stem)
        for index, part in enumerate(target.anatomy.parts):
            tensors = own(part.tensors)
            stays = index in target.residents
            if tensors:
                units = component.residents if stays else component.streamed
                units.append(unit("resident" if stays else "streamed", part.name, tensors, part))
    return component


def _by_contents(component: Component) -> dict[tuple, Unit]:
    """The units of a component that lie where they were put, by role, modules and tensors."""
    roles = {"stem": component.stem, "resident": component.residents, "streamed": component.streamed}
    return {
        (role, unit.modules, unit.opener, tuple(map(id, unit.weights.tensors))): unit
        for role, units in roles.items()
        for unit in units
        if unit.weights.is_undisturbed()
    }


class Held:
    """A component under an engine, the hooks that put it there, and the handles that want it there."""

    def __init__(self, target: Target, component: Component, engine: Engine) -> None:
        self.target = target
        self.module = target.module
        self.component = component
        self.engine = engine
        self.owners: set[OffloadHandle] = set()
        self._hooks: list[tuple[nn.Module, hooks.EngineHook]] = []
        self._former: list[OffloadHandle] = []  # who wanted it there when its hook was taken off

    def attach(self) -> None:
        """Put the hooks on: the component's own first, then those of its units and its stem."""
        self._add(self.module, hooks.ComponentHook(self.engine, self.component, self))
        self._attach_inside()

    def _attach_inside(self) -> None:
        stem = {id(tensor) for unit in self.component.stem for tensor in unit.weights.tensors}
        holders = [part for part in self.module.modules() if any(id(t) in stem for t in own_tensors(part))]
        for unit in self.component.streamed:
            if unit.opener is not None:
                self._add(unit.opener, hooks.OpenerHook(self.engine, unit, unit.opener in holders))
            for module in unit.modules:
                self._add(module, hooks.UnitHook(self.engine, unit, module in holders))
        taken = {id(module) for module, _ in self._hooks}
        for part in holders:
            if id(part) not in taken:
                self._add(part, hooks.StemHook(self.engine, self.component))
        self.module.to = self._guarded_to()
        self._tensors = {id(tensor) for tensor in tensors_of(self.module)}

    def _detach_inside(self) -> None:
        self.module.__dict__.pop("to", None)
        inside, self._hooks = self._hooks[1:], self._hooks[:1]
        for module, hook in inside:
            hook.retired = True
            hooks.detach(module, hook)

    def check(self) -> None:
        """Take the component apart anew if it holds other tensors than before, or uses them in other places."""
        if {id(tensor) for tensor in tensors_of(self.module)} != self._tensors:
            logger.info("%s holds other weights than before: taking it apart anew", self.component.name)
            self._take_apart_anew()
        elif self.component.strays:
            count = len({stray.unit for stray in self.component.strays})
            logger.info(
                "%s: weights of %d units are used past their forwards: taking it apart anew",
                self.component.name,
                count,
            )
            self._take_apart_anew()
        self.component.checked = True

    def lose(self, other: Component) -> None:
        """Another component is offloaded no longer: what it held for this one is this one's from now on."""
        if other in self.component.needs:
            self._tensors, self.component.checked = set(), False

    def _take_apart_anew(self) -> None:
        before, others = self.component, [c for c in self.engine.components if c is not self.component]
        self._detach_inside()
        self.target = self.target.renewed(before)
        owners = {id(t): c for c in others for unit in c.units for t in unit.weights.tensors}
        self.component = build_component(self.target, owners, before)
        self.engine.exchange(before, self.component)
        self._adopt_hooks()

    def _take_in(self) -> None:
        """Come back under the engine, after the component's own hook had gone."""
        self.target = self.target.renewed()
        owners = {id(t): c for c in self.engine.components for unit in c.units for t in unit.weights.tensors}
        self.component = build_component(self.target, owners)
        for _ in self.engine.adopt(self.component):
            pass
        self.engine.open_arena()
        self._adopt_hooks()

    def _adopt_hooks(self) -> None:
        for _, hook in self._hooks[:1]:
            hook.component = self.component
        self._attach_inside()
        for handle in self.owners:
            handle.remember(self)

    def release(self) -> None:
        """Take the component's own hook off, and with it everything else."""
        for module, hook in self._hooks[:1]:
            hooks.detach(module, hook)
        self.restore()  # for a component that never got its hook, because taking it in failed half way

    def restore(self) -> None:
        """The component's own hook is gone: take the others off, give the weights back."""
        self.engine.release_component(self.component)
        self._detach_inside()
        self._hooks = []
        for handle in self.owners:
            handle.forget(self)
        self._former, self.owners = list(self.owners), set()

    def take_back(self, hook: hooks.ComponentHook) -> None:
        """The component's own hook is back, as when accelerate chains another one to it."""
        self.owners, self._former = set(self._former), []
        if self.owners:
            self._hooks = [(self.module, hook)]
            self._take_in()

    def _add(self, module: nn.Module, hook: hooks.EngineHook) -> None:
        hooks.attach(module, hook)
        self._hooks.append((module, hook))

    def _guarded_to(self) -> Any:
        """`module.to` that keeps the device ours and lets dtype and memory format through."""
        original = self.module.to

        @wraps(original)
        def to(*args: Any, **kwargs: Any) -> nn.Module:
            component = self.component
            device, dtype, _, memory_format = torch._C._nn._parse_to(*args, **kwargs)
            if device is not None and device != self.engine.device:
                logger.warning(
                    "%s is offloaded block by block: .to(%r) leaves it where it is. "
                    "Call pipe.disable_block_offload() first to move it.",
                    component.name,
                    str(device),
                )
            elif device is not None and self.engine.streams.asynchronous:
                if component.stem_bytes <= _SMALL and not component.streamed:
                    self.engine.touch(component)  # a pipeline that is about to use it past its forward
                logger.warning(
                    "%s is offloaded block by block and comes to %s when it runs: .to(%r) changes nothing.",
                    component.name,
                    self.engine.device,
                    str(device),
                )
            changes = {}
            if dtype is not None:
                changes["dtype"] = dtype
            if memory_format is not None:
                changes["memory_format"] = memory_format
            if changes:
                with self.engine.edit(component):
                    original(**changes)
            return self.module

        return to


def find_held(module: nn.Module) -> Held | None:
    """What holds `module`, or None while it is not offloaded."""
    hook = hooks.find(module, hooks.ComponentHook)
    return hook.held if hook is not None else None

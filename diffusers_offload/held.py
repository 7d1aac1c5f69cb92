"""A component that is held under an engine: its hooks, its guarded `to`, and the handles that want it there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import hooks, planner, refusals, slab
from .component import Component, Unit
from .engine import Engine
from .log import logger
from .policy import OffloadPolicy
from .units import Anatomy, chunks, dissect, own_tensors, tensors_of
from .weights import Weights

if TYPE_CHECKING:
    from .handle import OffloadHandle

_SMALL = 64 * 2**20  # bytes of a component that `.to(device)` brings at once


STEM_CHUNK = 256 * 2**20  # bytes moved at once, so that moving a large stem never doubles it


@dataclass(frozen=True)
class Target:
    """A component about to be offloaded, and how.

    Attributes:
        residents: which of the anatomy's blocks stay on the device, by index.
        note: why the policy is not what the call asked for, or "".
    """

    name: str
    module: nn.Module
    policy: OffloadPolicy
    anatomy: Anatomy
    residents: frozenset[int] = frozenset()
    note: str = ""

    def renewed(self) -> Target:
        """The same blocks with the tensors that they hold now; blocks anew, if one of them has gone."""
        modules = [block.module for block in self.anatomy.blocks]
        if not {id(each) for each in modules} <= {id(part) for part in self.module.modules()}:
            anatomy = dissect(self.module)
            return replace(self, anatomy=anatomy, residents=choose_residents(anatomy, self.policy))
        staying = {id(modules[i]) for i in self.residents}
        anatomy = dissect(self.module, modules)
        residents = frozenset(i for i, block in enumerate(anatomy.blocks) if id(block.module) in staying)
        return replace(self, anatomy=anatomy, residents=residents)


def choose_residents(anatomy: Anatomy, policy: OffloadPolicy) -> frozenset[int]:
    """Which blocks stay on the device under `policy`, by index."""
    if policy.granularity != "block":
        return frozenset()
    sizes = [slab.lay_out(block.tensors).nbytes for block in anatomy.blocks]
    return frozenset(planner.choose_residents(sizes, policy.ratio))


def owners_in(components: Iterable[Component]) -> dict[int, Component]:
    """Which component owns a tensor, by the tensor's id."""
    return {id(t): each for each in components for unit in each.units for t in unit.weights.tensors}


def build_component(target: Target, owners: dict[int, Component]) -> Component:
    """Build the component's units; tensors that an earlier component owns stay with that one.

    Args:
        owners: which component owns a tensor, by the tensor's id; added to.
    """
    component = Component(target.name, target.module)
    everything = tensors_of(target.module)
    for tensor in everything:
        owner = owners.setdefault(id(tensor), component)
        if owner is not component and owner not in component.needs:
            component.needs.append(owner)

    def own(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor for tensor in tensors if owners[id(tensor)] is component]

    def parts(tensors: Sequence[torch.Tensor]) -> list[Unit]:
        groups = chunks(own(tensors), STEM_CHUNK)
        return [Unit(f"stem.{i}", None, Weights(group)) for i, group in enumerate(groups)]

    if target.policy.granularity == "resident":
        component.residents = parts(everything)
    elif target.policy.granularity == "model":
        component.stem = parts(everything)
    else:
        component.stem = parts(target.anatomy.stem)
        for index, block in enumerate(target.anatomy.blocks):
            tensors = own(block.tensors)
            if tensors:
                unit = Unit(block.name, block.module, Weights(tensors))
                (component.residents if index in target.residents else component.streamed).append(unit)
    return component


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
            self._add(unit.module, hooks.UnitHook(self.engine, unit, brings_stem=unit.module in holders))
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
            hooks.detach(module, hook)

    def check(self) -> None:
        """See what others did to the component since the last call; raise if it cannot go on.

        It is taken apart anew if it holds other tensors than before (adapters, fused projections), or tensors of
        other shapes, or if some of its tensors were those of a component that is held no longer.
        """
        self.refuse_lost_hook()
        refusals.refuse_since(self.component.name, self.module)
        for module, hook in self._hooks[1:]:
            if hook not in hooks.on(module):  # a unit whose hook was replaced stays on the device
                hook.detach_hook(module)
        same = {id(tensor) for tensor in tensors_of(self.module)} == self._tensors
        same = same and all(unit.weights.keeps_layout() for unit in self.component.units)
        if not same or not set(self.component.needs) <= set(self.engine.components):
            logger.info("%s holds other weights than before: taking it apart anew", self.component.name)
            self.renew()
        self.component.checked = True

    def renew(self) -> None:
        """Take the component apart anew, with the tensors that it holds now."""
        weights = [unit.weights for unit in self.component.units]
        origin = {
            id(t): where for each in weights for t, where in zip(each.tensors, each.origin, strict=True)
        }
        for each in weights:  # by way of the host: where they came from may have no room for all of them
            each.origin = [torch.device("cpu")] * len(each.tensors)
        self.engine.release_component(self.component)
        self._detach_inside()
        self._take_in()
        for each in (unit.weights for unit in self.component.units):
            each.origin = [
                origin.get(id(t), where) for t, where in zip(each.tensors, each.origin, strict=True)
            ]

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """True weights in place within, for any kind of edit; afterwards what became of them is what runs."""
        engine = self.engine
        with engine.lock:
            if self.module in engine.suspended:  # the outermost takes the edits over
                yield
                return
            if engine.busy:
                raise RuntimeError(f"{self.component.name} cannot be edited in the middle of a forward")
            engine.suspended.add(self.module)
            try:
                with engine.edit(self.component):
                    yield
            finally:
                engine.suspended.discard(self.module)
                if self.component in engine.components:  # not given back meanwhile
                    self.component.checked = False
                    self.check()

    def _take_in(self) -> None:
        self.target = self.target.renewed()
        before, others = self.component, list(self.engine.components)
        self.component = build_component(self.target, owners_in(others))
        for other in others:
            other.needs = [self.component if each is before else each for each in other.needs]
        for _, hook in self._hooks[:1]:
            hook.component = self.component
        for _ in self.engine.adopt(self.component):
            pass
        self.engine.open_arena()
        self._attach_inside()
        for handle in self.owners:
            handle.remember(self)

    def refuse_lost_hook(self) -> None:
        """Raise RuntimeError if accelerate put a hook in place of the component's own, not beside it."""
        present = hooks.on(self.module)
        if self._hooks and self._hooks[0][1] not in present:
            raise RuntimeError(
                f"{self.component.name} got {[type(hook).__name__ for hook in present]} in place of block "
                "offload's hook, as by accelerate's dispatch_model or add_hook_to_module without append=True. Call "
                "pipe.disable_block_offload() to leave the component to that"
            )

    def owns(self, hook: hooks.EngineHook) -> bool:
        """Whether `hook` is one of those on this component."""
        return any(each is hook for _, each in self._hooks)

    def release(self) -> None:
        """Take the component's own hook off, and with it everything else."""
        for module, hook in self._hooks[:1]:
            hooks.detach(module, hook)
        self.restore()  # for a component that never got its hook, because taking it in failed half way

    def restore(self) -> None:
        """The component's own hook is gone: take the others off, give the weights back."""
        with self.engine.lock:
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
            with self.engine.lock:
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
                small = component.stem_bytes <= _SMALL and not component.streamed
                if small and self.module not in self.engine.suspended:
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

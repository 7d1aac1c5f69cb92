"""A component that is held under an engine: its hooks, its guarded `to`, and the handles that want it there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from . import hooks, recovery, refusals
from .component import Component
from .engine import Engine
from .log import logger
from .packing import unpacks_fast
from .planning import spread
from .statedicts import TrueStates
from .target import Target, build_component, owners_in
from .tiers.mapped import veil_of
from .tiers.packedmemory import PackedMemory
from .units import own_tensors, tensors_of

if TYPE_CHECKING:
    from .handle import OffloadHandle

# Methods of models (Diffusers', torch's) that work on the weights themselves.
_EDITORS = (
    "fuse_lora",
    "unfuse_lora",
    "load_lora_adapter",
    "fuse_qkv_projections",
    "unfuse_qkv_projections",
    "load_state_dict",
)
_SMALL = 64 * 2**20  # bytes of a component that `.to(device)` brings at once


class Held:
    """A component under an engine, the hooks that put it there, and the handles that want it there."""

    def __init__(self, target: Target, component: Component, engine: Engine) -> None:
        self.target = target
        self.module = target.module
        self.component = component
        self.engine = engine
        self.owners: set[OffloadHandle] = set()
        self._hooks: list[tuple[nn.Module, hooks.EngineHook]] = []
        self._states: TrueStates | None = None  # what its `state_dict()` holds
        self._shadowed: dict[str, Any] = {}  # methods of the module that ours stand in for
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
        self._shadowed = {"to": self._guarded_to()}
        may_be_packed = self._may_be_packed()
        if may_be_packed:
            self._shadowed |= self._suspending_editors()
        for name in hooks.entries(self.module):
            self._shadowed[name] = self._hooks[0][1].entry(self.module, getattr(self.module, name))
        self.module.__dict__.update(self._shadowed)
        self._tensors = {id(tensor) for tensor in tensors_of(self.module)}
        self._states = TrueStates(self.engine, self.component) if may_be_packed else None

    def _may_be_packed(self) -> bool:
        """Whether tensors look at what stands in for them, now or when they have been edited."""
        component, disk = self.component, self.engine.disk
        written = component.on_disk and disk.packs
        hosts = (unit.weights.host for unit in component.streamed)
        return component.packs or written or any(isinstance(host, PackedMemory) for host in hosts)

    def _detach_inside(self) -> None:
        if self._states is not None:
            self._states.detach()
            self._states = None
        for name in self._shadowed:
            self.module.__dict__.pop(name, None)
        self._shadowed = {}
        inside, self._hooks = self._hooks[1:], self._hooks[:1]
        for module, hook in inside:
            hook.retired = True
            hooks.detach(module, hook)

    def check(self, edited: bool = False) -> None:
        """See what others did to the component since the last call; raise if it cannot go on.

        It is taken apart anew if it holds other tensors than before (adapters, fused projections) or tensors of
        other shapes, or if it was seen to use weights in other places than their unit's forward.

        Args:
            edited: while it was suspended, so that its true weights were to be read.
        """
        self.engine.packed.refuse_edits(self.component.streamed)
        # What others own was watched, too, while this one ran it.
        for owner in [
            each for each in self.component.needs if each.strays and each in self.engine.components
        ]:
            find_held(owner.module).renew()
        self.refuse_lost_hook()
        refusals.refuse_since(self.component.name, self.module)
        for module, hook in self._hooks[1:]:
            if hook not in hooks.on(module):  # a unit whose hook was replaced stays on the device
                hook.detach_hook(module)
        same = {id(tensor) for tensor in tensors_of(self.module)} == self._tensors
        same = same and all(unit.weights.keeps_layout() for unit in self.component.units)
        if not same and not edited:
            self._refuse_copies()
        if not same or not set(self.component.needs) <= set(self.engine.components):
            logger.info("%s holds other weights than before: taking it apart anew", self.component.name)
            self.renew()
        elif self.component.strays:
            logger.info(
                "%s: weights of %d units are used past their forwards: taking it apart anew",
                self.component.name,
                len({stray.unit for stray in self.component.strays}),
            )
            self.renew()
        self.engine.notice_silent_edits(self.component)
        if self._gains_by_packing():
            self._pack()
        self._spread()
        self.component.checked = True

    def _refuse_copies(self) -> None:
        """Raise RuntimeError if it holds new weights that were computed from what stands in for packed ones.

        What looks at a packed file itself is not: it gets its true values when the component is taken apart anew.
        """
        hosts = (unit.weights.host for component in self.engine.components for unit in component.streamed)
        if any(isinstance(host, PackedMemory) for host in hosts):
            owned = owners_in(self.engine.components)
            named = (*self.module.named_parameters(), *self.module.named_buffers())
            new = {f"{self.component.name}.{path}": t for path, t in named if id(t) not in owned}
            self.engine.packed.refuse_copies({path: t for path, t in new.items() if veil_of(t) is None})

    def _gains_by_packing(self) -> bool:
        """Whether it waited for the bus, and less may be sent over it."""
        budget, device = self.engine.budget, self.engine.device
        may = self.target.may_pack and budget is not None and unpacks_fast(device)
        return may and budget.is_bound_by_copies(self.component)

    def _pack(self) -> None:
        logger.info("%s waits for the bus: its units are packed from now on", self.component.name)
        self.target = self.target.packed()
        if self._states is None:
            self._states = TrueStates(self.engine, self.component)
            editors = self._suspending_editors()
            self._shadowed |= editors
            self.module.__dict__.update(editors)
        try:
            self.engine.roster.pack(self.component)
        except (RuntimeError, MemoryError) as error:  # it would be faster, but goes on as it is
            logger.warning("%s: not all of it could be packed: %s", self.component.name, error)
        for handle in self.owners:
            handle.remember(self)

    def _spread(self) -> None:
        """Let others of its units stay, if a timed forward has shown that this is faster."""
        before = self.target
        watched = self.engine.keeping.spreads.take(self.component)
        if any(handle.limits.host is not None for handle in self.owners):  # the host may get more to hold
            return
        timed = spread.read(watched)
        better = before.respread(self.component, timed) if timed is not None else None
        if better is None:
            return
        logger.info("%s: by what they compute, others of its units had better stay", self.component.name)
        try:
            self.target = better
            self.renew()
        except (RuntimeError, MemoryError) as error:  # it would be faster, but goes on as it is
            logger.warning("%s: the units that stay could not be exchanged: %s", self.component.name, error)
            self.target = before
            self.renew()

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
                with engine.roster.edit(self.component):
                    yield
            finally:
                engine.suspended.discard(self.module)
                if self.component in engine.components:  # not given back meanwhile
                    self.component.checked = False
                    self.check(edited=True)

    def fit(self, shapes: tuple) -> None:
        """Before a forward with inputs of these shapes: take smaller units if the budget is too small for these."""
        budget, component, finer = self.engine.budget, self.component, self.target.finer()
        if finer is None or not component.streamed:
            return
        weights = self.engine.keeping.standing_bytes(component)
        feared = self.target.policy.granularity == "block" and budget.may_be_exceeded_by(
            component, shapes, weights
        )
        if feared or budget.exceeded_by(component, shapes):
            logger.info(
                "%s: the memory bound is small for these inputs, so it streams in units of a %s",
                component.name,
                finer.policy.granularity,
            )
            self.target = finer
            self.renew()

    def recover(self, error: BaseException) -> bool:
        """Whether the forward that ended with `error` can be run again: something has been done about it."""
        engine, name = self.engine, self.component.name
        if recovery.remembers(self.module):
            return False
        if recovery.missed_a_weight(error, self.component, engine.device):
            logger.info("%s: a weight was used past its unit for the first time; run again and watched", name)
        elif recovery.is_out_of_memory(error) and self._makes_room(error):
            engine.counters.shortages += 1
            logger.warning("%s: out of device memory; run again with less of the weights there", name)
        else:
            return False
        engine.restore_random()
        return True

    def _makes_room(self, error: BaseException) -> bool:
        recovery.let_go_of_tensors(error)
        try:
            return self._make_room()
        except (RuntimeError, MemoryError) as failure:  # the first error tells
            where = "the device" if recovery.is_out_of_memory(failure) else "the host"
            logger.warning("%s: room could not be made, %s has none left", self.component.name, where)
            return False

    def _make_room(self) -> bool:
        """Let go of what need not be on the device: kept blocks, then residents, then what is loaded ahead."""
        made = self.engine.drop_kept(self.component)
        if not made:
            for held in {held for handle in self.owners for held in handle.holds.values()}:
                made |= held.stream_residents()
        made = made or self.engine.shrink_arena()
        self.engine.streams.empty_cache()
        return made

    def stream_residents(self) -> bool:
        """What stays on the device streams from now on, as far as it can; returns whether that changed anything."""
        before = self.component.resident_bytes
        if not before or self.component.depth:
            return False
        self.target = self.target.streaming()
        self.renew()
        return self.component.resident_bytes < before

    def renew(self) -> None:
        """Take the component apart anew, with the tensors that it holds now and what was seen of their use."""
        before = self.component
        self._detach_inside()
        self.target = self.target.renewed(before)
        others = owners_in(component for component in self.engine.components if component is not before)
        after = build_component(self.target, others, before)
        try:
            self.engine.roster.exchange(before, after)
        except BaseException:
            self.component = after if after in self.engine.components else before
            self._tensors = set()  # so that the next forward takes it apart again
            self.component.checked = False
            for _, hook in self._hooks[:1]:
                hook.component = self.component
            raise
        self.component = after
        if before.pairs is not None:
            before.pairs.forget()
        self._adopt_hooks()

    def _take_in(self) -> None:
        """Come back under the engine, after the component's own hook had gone."""
        self.target = self.target.renewed()
        self.component = build_component(self.target, owners_in(self.engine.components))
        for _ in self.engine.roster.adopt(self.component):
            pass
        self.engine.roster.open_arena()
        self._adopt_hooks()

    def _adopt_hooks(self) -> None:
        for _, hook in self._hooks[:1]:
            hook.component = self.component
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
        """Give the weights back, take the component's own hook off, and with it everything else."""
        with self.engine.lock:
            self.engine.roster.release(self.component)  # what may fail comes first
        for module, hook in self._hooks[:1]:
            hooks.detach(module, hook)
        self.restore()  # for a component that never got its hook, because taking it in failed half way

    def restore(self) -> None:
        """The component's own hook is gone: take the others off, give the weights back."""
        with self.engine.lock:
            self.engine.roster.release(self.component)
            if self.component.pairs is not None:
                self.component.pairs.forget()
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

    def _suspending_editors(self) -> dict[str, Any]:
        """Methods of the module that read or write weights, by name: they find the true ones."""

        def suspending(editor: Any) -> Any:
            @wraps(editor)
            def edit(*args: Any, **kwargs: Any) -> Any:
                with self.suspended():
                    return editor(*args, **kwargs)

            return edit

        methods = {name: getattr(self.module, name, None) for name in _EDITORS}
        return {name: suspending(method) for name, method in methods.items() if callable(method)}

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
                with self.engine.roster.edit(component):
                    original(**changes)
            return self.module

        return to


def find_held(module: nn.Module) -> Held | None:
    """What holds `module`, or None while it is not offloaded."""
    hook = hooks.find(module, hooks.ComponentHook)
    return hook.held if hook is not None else None

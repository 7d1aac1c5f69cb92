"""The handle of one enablement: puts components under an engine, answers for them, takes them out again."""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import slab
from .budget import DeviceBudget
from .engine import Engine
from .held import STEM_CHUNK, Held, Target, build_component, find_held
from .planner import ComponentPlan, Plan, UnitSize
from .report import GIB, Report
from .streams import open_streams
from .units import chunks

_PROGRESS_FROM = GIB  # bytes from which on moving takes long enough to show a progress bar


class OffloadHandle:
    """A live block offload: `plan` says what was decided, `report()` what happened, `disable()` ends it.

    Several handles may share a component (pipelines made by `from_pipe`): it keeps the policy it has, and
    gets its weights back when the last of them is disabled.

    Attributes:
        plan: the `Plan`.
        device: where the components compute.
        max_device_memory: the bound in bytes, or None.
        following: what components get that its owner comes to have later (see `modular`); None if it has a
            fixed set of them.
    """

    def __init__(
        self, targets: Sequence[Target], device: torch.device, max_device_memory: int | None = None
    ) -> None:
        self.device = device
        self.max_device_memory = max_device_memory
        self.following: Any = None
        self.plan = make_plan(targets, device)
        self._targets = {target.name: target for target in targets}
        streams = open_streams(device)
        self._engine = Engine(
            streams, DeviceBudget(max_device_memory, streams) if max_device_memory else None
        )
        self._held: dict[str, Held] = {}
        try:
            self._take_in(targets)
            self._engine.open_arena()
        except BaseException:
            self.disable()
            raise
        _live.add(self)

    def __repr__(self) -> str:
        return f"OffloadHandle(device={str(self.device)!r}, components={list(self._held)})"

    @property
    def components(self) -> dict[str, nn.Module]:
        """The modules that this handle offloads, by name."""
        return {name: held.module for name, held in self._held.items()}

    @property
    def enabled(self) -> bool:
        return bool(self._held) or self.following is not None

    def report(self) -> Report:
        """What was moved so far, and what is held where; waits for the device if times were measured."""
        counters = self._engine.counters
        transfer, stall = counters.times()
        units = [unit for component in self._engine.components for unit in component.units]
        hosts = [unit.weights.host for unit in units if unit.weights.host is not None]
        budget = self._engine.budget
        return Report(
            forwards=counters.forwards,
            uses=counters.uses,
            misses=counters.misses,
            loads=counters.loads,
            bytes_loaded=counters.bytes_loaded,
            write_backs=counters.write_backs,
            transfer_ms=transfer,
            stall_ms=stall,
            host_bytes=sum(host.bytes.numel() for host in hosts),
            pinned_bytes=sum(host.bytes.numel() for host in hosts if host.pinned),
            peak_bytes=max(budget.seen if budget else 0, self._engine.streams.peak()),
            arena_bytes=self._engine.arena.capacity,
            resident_bytes=sum(c.resident_bytes + c.kept_bytes for c in self._engine.components),
        )

    def reset(self) -> None:
        """Count from zero again."""
        self._engine.counters.reset()

    @contextmanager
    def measured(self) -> Iterator[OffloadHandle]:
        """Within, copies and waits are timed by device events, so that the report knows what was hidden."""
        self._engine.counters.timing = True
        try:
            yield self
        finally:
            self._engine.counters.timing = False

    def call_ended(self) -> None:
        """A call of the pipeline is over: stems and whole components leave the device."""
        for engine in {held.engine for held in self._held.values()}:
            engine.call_ended()

    def disable(self) -> None:
        """Give every component its weights back, on the devices they came from, and free all memory."""
        self.following = None
        for name in list(self._held):
            self._let_go(name)
        self._engine.streams.synchronize()
        self._engine.streams.forget_workspaces()
        self._engine.streams.empty_cache()
        _live.discard(self)

    def forget(self, held: Held) -> None:
        """A component is offloaded no longer, its hook having been removed."""
        self._held = {name: each for name, each in self._held.items() if each is not held}

    def remember(self, held: Held) -> None:
        """A component that was forgotten is offloaded again."""
        self._held[held.target.name] = held
        self.replan(held.target)

    def replan(self, target: Target) -> None:
        """A component was taken apart anew."""
        self._targets[target.name] = target
        self.plan = make_plan(list(self._targets.values()), self.device)

    # --- components that come and go ------------------------------------------------------------------

    def plan_with(self, targets: Sequence[Target], without: Collection[str] = ()) -> Plan:
        """The plan if `targets` came and the components `without` went."""
        staying = [target for name, target in self._targets.items() if name not in without]
        return make_plan([*staying, *targets], self.device)

    def take_in(self, targets: Sequence[Target]) -> None:
        """Offload further components, under the same engine."""
        self.plan = self.plan_with(targets)
        self._targets.update({target.name: target for target in targets})
        try:
            self._take_in(targets)
            self._engine.open_arena()
        except BaseException:
            self.give_back([target.name for target in targets])
            raise

    def give_back(self, names: Collection[str]) -> None:
        """Offload some components no longer; those that another handle wants offloaded stay so."""
        for name in names:
            self._targets.pop(name, None)
            held = self._held.get(name)
            if held is not None:
                self._let_go(name)
                if not held.owners:
                    held.engine.open_arena()
                    for other in self._held.values():
                        other.lose(held.component)
        self.plan = self.plan_with([])

    def _let_go(self, name: str) -> None:
        held = self._held.pop(name)
        held.owners.discard(self)
        if not held.owners:
            held.release()

    # --- taking components in -------------------------------------------------------------------------

    def _take_in(self, targets: Sequence[Target]) -> None:
        coming = {target.name for target in targets}
        plans = [plan for plan in self.plan.components if plan.name in coming]
        moved = sum(plan.stem_bytes + plan.streamed_bytes + plan.resident_bytes for plan in plans)
        with tqdm(
            total=moved,
            unit="B",
            unit_scale=True,
            unit_divisor=1024,
            desc="Preparing block offload",
            disable=moved < _PROGRESS_FROM or None,
        ) as bar:
            others = self._engine.components
            owners = {id(t): each for each in others for unit in each.units for t in unit.weights.tensors}
            for target in targets:
                shared = find_held(target.module)
                if shared is not None:
                    shared.owners.add(self)
                    self._held[target.name] = shared
                    continue
                component = build_component(target, owners)
                held = Held(target, component, self._engine)
                held.owners.add(self)
                self._held[target.name] = held
                for unit in self._engine.adopt(component):
                    bar.update(unit.nbytes)
                held.attach()


_live: weakref.WeakSet[OffloadHandle] = weakref.WeakSet()


def live_handles() -> list[OffloadHandle]:
    """Every handle that is enabled now."""
    return list(_live)


def held_policy(module: nn.Module) -> tuple[OffloadHandle, ComponentPlan] | None:
    """The handle that offloads `module` already, and its plan for it."""
    held = find_held(module)
    for handle in held.owners if held is not None else ():
        for plan in handle.plan.components:
            if handle._held.get(plan.name) is held:
                return handle, plan
    return None


def make_plan(targets: Sequence[Target], device: torch.device) -> Plan:
    """What `targets` come to: sizes in bytes, one arena for all."""
    plans = []
    for target in targets:
        sizes = [UnitSize(b.name, slab.lay_out(b.tensors).nbytes) for b in target.anatomy.parts]
        stem = sum(slab.lay_out(group).nbytes for group in chunks(target.anatomy.stem, STEM_CHUNK))
        stays = target.policy.granularity == "resident"
        residents = [sizes[i] for i in sorted(target.residents)]
        if stays:
            residents = [UnitSize("stem", stem), *sizes]
        elif target.policy.granularity == "model":
            stem += sum(size.nbytes for size in sizes)
        plans.append(
            ComponentPlan(
                name=target.name,
                policy=target.policy,
                streamed=tuple(size for i, size in enumerate(sizes) if i not in target.residents)
                if target.policy.streams
                else (),
                residents=tuple(residents),
                stem_bytes=0 if stays else stem,
                note=target.note,
            )
        )
    return Plan(str(device), tuple(plans))


def why_not(name: str, module: nn.Module) -> str | None:
    """Why the weights of component `name` cannot be moved, or None if they can."""
    for path, tensor in (*module.named_parameters(), *module.named_buffers()):
        reason = slab.why_not(tensor)
        if reason is not None:
            return f"{name}.{path} {reason}"
    return None

"""The handle of one enablement: puts components under an engine, answers for them, takes them out again."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
from torch import nn
from tqdm.auto import tqdm

from . import guards
from .calls import calling, engines_of, exclusively
from .component import Unit
from .engine import Engine
from .fitting import NO_LIMITS, Limits
from .held import Held, find_held
from .planning.budget import DeviceBudget
from .planning.planner import ComponentPlan, Plan
from .policy import Request
from .report import GIB, PackedReport, Prediction, Report
from .streams import open_streams
from .target import Target, build_component, make_plan, owners_in
from .tiers.mapped import DiskMemory
from .tiers.packedmemory import PackedMemory

_PROGRESS_FROM = GIB  # bytes from which on moving takes long enough to show a progress bar


class OffloadHandle:
    """A live block offload: `plan` says what was decided, `report()` what happened, `disable()` ends it.

    Several handles may share a component (pipelines made by `from_pipe`): it keeps the policy it has, and
    gets its weights back when the last of them is disabled.

    Attributes:
        plan: the `Plan`.
        device: where the components compute.
        request: what the call asked for; components that come later follow it, too.
        limits: the bounds that it was made for.
        following: what components get that its owner comes to have later (see `modular`); None if it has a
            fixed set of them.
    """

    def __init__(
        self,
        targets: Sequence[Target],
        device: torch.device,
        request: Request,
        limits: Limits = NO_LIMITS,
    ) -> None:
        self.device = device
        self.request = request
        self.limits = limits
        self.following: Any = None
        self.plan = make_plan(targets, device)
        streams = open_streams(device)
        budget = DeviceBudget(limits.device, streams) if limits.device else None
        for_disk = limits.host - self.plan.host_bytes if limits.host is not None else None
        self._engine = Engine(streams, budget, request.storage, for_disk, request.pair_passes)
        self._held: dict[str, Held] = {}
        try:
            self.take_in(targets)
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
    def holds(self) -> dict[str, Held]:
        """What it holds, by name."""
        return dict(self._held)

    @property
    def engines(self) -> list[Engine]:
        """Those that move the components: its own, and those of handles that had a component first."""
        return engines_of(self.components.values())

    @property
    def enabled(self) -> bool:
        return bool(self._held) or self.following is not None

    def report(self) -> Report:
        """What was moved so far, and what is held where; waits for the device if times were measured."""
        counters = self._engine.counters
        transfer, stall = counters.times()
        units = [unit for component in self._engine.components for unit in component.units]
        hosts = [unit.weights.host for unit in units if unit.weights.host is not None]
        budget, disk = self._engine.budget, self._engine.disk
        buffers = disk.held_bytes if disk is not None else 0
        return Report(
            forwards=counters.forwards,
            uses=counters.uses,
            misses=counters.misses,
            loads=counters.loads,
            bytes_loaded=counters.bytes_loaded,
            write_backs=counters.write_backs,
            shortages=counters.shortages,
            paired=counters.paired,
            discarded=counters.discarded,
            unpaired={c.name: c.pairs.reason for c in self._engine.components if c.pairs and c.pairs.reason},
            transfer_ms=transfer,
            stall_ms=stall,
            host_bytes=sum(map(_host_bytes, units)) + buffers,
            pinned_bytes=sum(host.bytes.numel() for host in hosts if host.pinned),
            packed=self._packed(units),
            disk=disk.report(sum(h.bytes.numel() for h in hosts if isinstance(h, DiskMemory)))
            if disk
            else None,
            predictions=self.predictions(),
            peak_bytes=max(budget.seen if budget else 0, self._engine.streams.peak()),
            arena_bytes=self._engine.arena.capacity,
            resident_bytes=sum(c.resident_bytes + c.kept_bytes for c in self._engine.components),
        )

    def _packed(self, units: Sequence[Unit]) -> PackedReport | None:
        packed = [unit for unit in units if isinstance(unit.weights.host, PackedMemory)]
        if not packed:
            return None
        return PackedReport(
            raw_bytes=sum(unit.nbytes for unit in packed),
            packed_bytes=sum(unit.weights.host.bytes.numel() for unit in packed),
            unpack_ms=self._engine.counters.unpack_time(),
        )

    def predictions(self) -> dict[str, Prediction]:
        """What a forward of each component is predicted to take, where a budget has measured it."""
        budget = self._engine.budget
        found = {c.name: budget.predict(c) for c in self._engine.components} if budget is not None else {}
        return {name: prediction for name, prediction in found.items() if prediction is not None}

    def weights_on_device(self) -> int:
        """Bytes of weights that are on the device now, the arena included."""
        return self._engine.keeping.weights_on_device()

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

    @contextmanager
    def suspended(self) -> Iterator[OffloadHandle]:
        """Within, the true weights are in place and may be edited by any means; nothing can run.

        They lie on the host, those that stay on the device there. Afterwards whatever they have become counts:
        weights written to or replaced, adapters loaded or fused, modules exchanged.

        Raises:
            RuntimeError: a forward is under way; or, at the end, a weight has become one that cannot be moved.
        """
        with ExitStack() as stack:
            stack.enter_context(exclusively(self.engines))
            for held in self.holds.values():
                stack.enter_context(held.suspended())
            yield self

    @contextmanager
    def calling(self) -> Iterator[OffloadHandle]:
        """Within, this thread has the components to itself; at the end, what came to the device leaves.

        A call of a pipeline does this by itself. It is for those who call components one by one.
        """
        with calling(self.engines):
            yield self

    def call_ended(self) -> None:
        """A call of the pipeline is over: stems and whole components leave the device."""
        for engine in self.engines:
            engine.call_ended()

    def disable(self) -> None:
        """Give every component its weights back, on the devices they came from, and free all memory."""
        self.following = None
        self.let_go(list(self.holds.values()))
        self._engine.streams.forget_workspaces()
        self._engine.streams.empty_cache()
        _live.discard(self)

    def forget(self, held: Held) -> None:
        """A component is offloaded no longer, its hook having been removed."""
        self._held = {name: each for name, each in self._held.items() if each is not held}
        self._replan()

    def remember(self, held: Held) -> None:
        """A component that was forgotten is offloaded again, or was taken apart anew."""
        if held not in self._held.values():
            self._held[held.target.name] = held
        self._replan()

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        guards.refuse_copy("the handle of a pipeline")

    # --- taking components in, and letting them go -----------------------------------------------------

    def take_in(self, targets: Sequence[Target]) -> None:
        """Put components under the engine; if that fails half way, none of them is there."""
        plan = make_plan(targets, self.device)
        moved = sum(c.stem_bytes + c.streamed_bytes + c.resident_bytes for c in plan.components)
        with (
            self._engine.lock,
            tqdm(
                total=moved,
                unit="B",
                unit_scale=True,
                unit_divisor=1024,
                desc="Preparing block offload",
                disable=moved < _PROGRESS_FROM or None,
            ) as bar,
        ):
            try:
                for target in targets:
                    for unit in self._hold(target):
                        bar.update(unit.nbytes)
                self._engine.roster.open_arena()
            except BaseException:
                modules = [target.module for target in targets]
                self.let_go([held for held in self.holds.values() if held.module in modules])
                raise
        self._replan()

    def _hold(self, target: Target) -> Iterator[Unit]:
        held = find_held(target.module)
        shared = held is not None
        if held is None:
            component = build_component(target, owners_in(self._engine.components))
            held = Held(target, component, self._engine)
        held.owners.add(self)
        self._held[target.name] = held
        if not shared:
            yield from self._engine.roster.adopt(held.component)
            held.attach()

    def let_go(self, leaving: Sequence[Held]) -> None:
        """Give components their weights back, but for those that another handle still wants offloaded."""
        engines = engines_of(held.module for held in leaving)
        with exclusively(engines):
            for held in leaving:
                held.owners.discard(self)
                if not held.owners:
                    try:
                        held.release()
                    except BaseException:  # it is offloaded as before, and this handle can still end that
                        held.owners.add(self)
                        raise
                self._held = {name: each for name, each in self._held.items() if each is not held}
            gone = {held.component for held in leaving if not held.owners}
            for component in {c for held in leaving for c in held.engine.components}:
                if gone & set(component.needs):  # it has tensors of theirs, which nobody moves now
                    find_held(component.module).renew()
            for engine in engines:
                if not engine.busy:
                    engine.roster.open_arena()  # which forgets what has left

    def plan_with(self, coming: Sequence[Target], leaving: Sequence[Held]) -> Plan:
        """The plan after an exchange of components."""
        held = {name: each for name, each in self._held.items() if each not in leaving}
        staying = {name: replace(each.target, name=name) for name, each in held.items()}
        return make_plan(
            list({**staying, **{target.name: target for target in coming}}.values()), self.device
        )

    def _replan(self) -> None:
        if self._held:
            self.plan = self.plan_with((), ())


def _host_bytes(unit: Unit) -> int:
    """Of host memory that hold the unit's weights, apart from the disk tier's buffers."""
    host = unit.weights.host
    if isinstance(host, DiskMemory):
        return unit.weights.written_bytes
    return host.bytes.numel() if host is not None else 0


_live: weakref.WeakSet[OffloadHandle] = weakref.WeakSet()


def live_handles() -> list[OffloadHandle]:
    """Every handle that is enabled now."""
    return [handle for handle in _live if handle.enabled]


def held_policy(module: nn.Module) -> tuple[OffloadHandle, ComponentPlan] | None:
    """The handle that offloads `module` already, and its plan for it."""
    held = find_held(module)
    for handle in held.owners if held is not None else ():
        for plan in handle.plan.components:
            if handle._held.get(plan.name) is held:
                return handle, plan
    return None

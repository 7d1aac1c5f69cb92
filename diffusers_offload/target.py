"""A component about to be offloaded: how it was taken apart, and the units that come of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from . import slab
from .component import Component, State, Unit
from .packing import expected_nbytes, unpacks_fast
from .planning import planner
from .planning.planner import ComponentPlan, Plan, UnitSize
from .planning.spread import Timed, better_residents
from .policy import STREAMING, OffloadPolicy
from .tiers.mapped import veil_of
from .tiers.packed import ring_bytes
from .units import Anatomy, Findings, Part, at_hand, chunks, dissect, silent_writers, tensors_of
from .weights import Weights

STEM_CHUNK = 256 * 2**20  # bytes moved at once, so that moving a large stem never doubles it


@dataclass(frozen=True)
class Target:
    """A component about to be offloaded, and how.

    Attributes:
        residents: which of the anatomy's parts stay on the device, by index.
        blocks: what was given as its blocks; None if they are found.
        findings: what running it has shown.
        stays: the stem stays as well.
        flexible: its units may be made smaller where memory is short: the user did not name their size.
        may_pack: its units may be packed where that is faster: the user did not say where they are to be.
        packs_on_disk: whether its files are packed if it is on disk; None: if the device unpacks fast.
        note: why the policy is not what the call asked for, or "".
    """

    name: str
    module: nn.Module
    policy: OffloadPolicy
    anatomy: Anatomy
    residents: frozenset[int] = frozenset()
    blocks: tuple[nn.Module, ...] | None = None
    findings: Findings = field(default_factory=Findings)
    stays: bool = False
    flexible: bool = False
    may_pack: bool = False
    packs_on_disk: bool | None = None
    note: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all its weights."""
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors_of(self.module))

    @property
    def resident_entirely(self) -> bool:
        """Whether nothing of it moves, by its policy or because everything fits."""
        return self.stays or self.policy.granularity == "resident"

    def outside_parts(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """What no part moves: the tensors that stay on the device, and those that come and go as the stem."""
        tensors = self.anatomy.stem if self.policy.streams else tensors_of(self.module)
        staying = {id(tensor) for tensor in (tensors if self.resident_entirely else at_hand(self.module))}
        return [t for t in tensors if id(t) in staying], [t for t in tensors if id(t) not in staying]

    def resident(self) -> Target:
        """The same component with everything on the device, in units that may leave it if memory is short."""
        everything = frozenset(range(len(self.anatomy.parts) if self.policy.streams else 0))
        return replace(self, residents=everything, stays=True, note="everything fits, so nothing streams")

    def packed(self) -> Target:
        """The same component, its units packed while they are not on the device."""
        return replace(self, policy=replace(self.policy, tier="packed"), may_pack=False)

    def finer(self) -> Target | None:
        """The same component in smaller units; None if there are none, or the user wants these."""
        smaller = STREAMING[STREAMING.index(self.policy.granularity) + 1 :] if self.policy.streams else ()
        if not self.flexible or not smaller:
            return None
        return replace(self, policy=replace(self.policy, granularity=smaller[0]))

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
        stay = [module for i in self.residents for module in self.anatomy.parts[i].modules]
        staying = {id(part) for module in stay for part in module.modules()}
        residents = frozenset(
            i for i, part in enumerate(anatomy.parts) if all(id(module) in staying for module in part.modules)
        )
        return replace(self, anatomy=anatomy, residents=residents, findings=findings)

    def respread(self, component: Component, timed: Timed) -> Target | None:
        """The same component with other units that stay, if that is clearly faster by what was timed; None if not."""
        units = {unit.modules: unit for unit in (*component.residents, *component.streamed) if unit.modules}
        parts = [i for i, part in enumerate(self.anatomy.parts) if part.modules in units]
        ordered = [units[self.anatomy.parts[i].modules] for i in parts]
        staying = {i for i, unit in zip(parts, ordered, strict=True) if unit in component.residents}
        if staying != self.residents:  # some stay for other reasons
            return None
        stay = better_residents(timed, ordered, self.policy.ratio)
        if stay is None:
            return None
        return replace(self, residents=frozenset(parts[number] for number in stay))

    def streaming(self) -> Target:
        """The same component, with nothing that stays on the device."""
        policy = self.policy
        if not policy.streams:
            policy = replace(policy, granularity="block" if self.anatomy.parts else "model")
        policy = replace(policy, ratio=1.0) if policy.streams else policy
        return replace(self, policy=policy, residents=frozenset(), stays=False, note="")


def choose_residents(anatomy: Anatomy, policy: OffloadPolicy) -> frozenset[int]:
    """Which parts stay on the device under `policy`, by index."""
    if not policy.streams:
        return frozenset()
    sizes = [slab.lay_out(part.tensors).nbytes for part in anatomy.parts]
    return frozenset(planner.choose_residents(sizes, policy.ratio))


def owners_in(components: Iterable[Component]) -> dict[int, Component]:
    """Which component owns a tensor, by the tensor's id."""
    return {id(t): each for each in components for unit in each.units for t in unit.weights.tensors}


def build_component(
    target: Target, owners: dict[int, Component], before: Component | None = None
) -> Component:
    """Build the component's units; tensors that an earlier component owns stay with that one.

    Args:
        owners: which component owns a tensor, by the tensor's id; added to.
        before: the component as it was: units of it that are still right are used again.
    """
    component = Component(target.name, target.module)
    component.tier = target.policy.tier
    component.shares = target.policy.streams and 0 < target.policy.ratio < 1
    everything = tensors_of(target.module)
    for tensor in everything:
        owner = owners.setdefault(id(tensor), component)
        if owner is not component and owner not in component.needs:
            component.needs.append(owner)
    writers = silent_writers(target.module)
    earlier = _by_contents(before) if before is not None else {}

    def own(tensors: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        return [tensor for tensor in tensors if owners[id(tensor)] is component]

    def unit(role: str, name: str, tensors: Sequence[torch.Tensor], part: Part | None = None) -> Unit:
        modules, opener = (part.modules, part.opener) if part is not None else ((), None)
        block = part.block if part is not None else name
        floats = target.policy.granularity == "leaf" and part is not None
        again = earlier.get((role, modules, opener, floats, tuple(map(id, tensors))))
        if again is not None:
            again.name, again.block = name, block
            return again
        return Unit(name, modules, Weights(tensors, writers), opener, floats, block)

    def pieces(role: str, tensors: Sequence[torch.Tensor]) -> list[Unit]:
        groups = chunks(own(tensors), STEM_CHUNK)
        return [unit(role, f"stem.{i}", group) for i, group in enumerate(groups)]

    staying, moving = target.outside_parts()
    component.residents = pieces("resident", staying)
    component.stem = pieces("stem", moving)
    for index, part in enumerate(target.anatomy.parts if target.policy.streams else ()):
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
        (role, unit.modules, unit.opener, unit.floats, tuple(map(id, unit.weights.tensors))): unit
        for role, units in roles.items()
        for unit in units
        if unit.weights.is_undisturbed() and (unit.state is State.RESIDENT or unit.weights.host is not None)
    }


def make_plan(targets: Sequence[Target], device: torch.device) -> Plan:
    """What `targets` come to: sizes in bytes, one arena for all."""
    packing = [_packs(target, device) for target in targets]
    components = tuple(map(_component_plan, targets, packing))
    pairs = zip(components, packing, strict=True)
    packed = [unit.host_bytes for each, packs in pairs if packs for unit in each.streamed]
    return Plan(str(device), components, ring_bytes(packed) if device.type != "cpu" else 0)


def _packs(target: Target, device: torch.device) -> bool:
    """Whether what streams of it is packed while it is not on the device, in memory or on disk."""
    if not target.policy.streams or target.policy.tier != "disk":
        return target.policy.tier == "packed"
    wanted = target.packs_on_disk
    tensors = (tensor for part in target.anatomy.parts for tensor in part.tensors)
    written = unpacks_fast(device) if wanted is None else wanted
    return written or any(veil_of(tensor) is not None for tensor in tensors)


def _component_plan(target: Target, packs: bool) -> ComponentPlan:
    parts = target.anatomy.parts if target.policy.streams else ()
    sizes = [
        UnitSize(
            part.name, slab.lay_out(part.tensors).nbytes, expected_nbytes(part.tensors) if packs else None
        )
        for part in parts
    ]
    staying, moving = target.outside_parts()
    name = "stem" if target.policy.streams else "all weights"
    aside = [UnitSize(name, _bytes_in_chunks(staying))] if staying else []
    return ComponentPlan(
        name=target.name,
        policy=target.policy,
        streamed=tuple(size for i, size in enumerate(sizes) if i not in target.residents),
        residents=(*aside, *(sizes[i] for i in sorted(target.residents))),
        stem_bytes=_bytes_in_chunks(moving),
        note=target.note,
    )


def _bytes_in_chunks(tensors: Sequence[torch.Tensor]) -> int:
    return sum(slab.lay_out(group).nbytes for group in chunks(tensors, STEM_CHUNK))

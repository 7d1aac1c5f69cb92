"""What the finder finds in a pipeline, and what each granularity would make of it, as text and as data.

Only looks: shapes and dtypes are enough, so the modules may be on the meta device.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from . import slab
from .planning import planner
from .planning.planner import ComponentPlan, Plan, UnitSize
from .policy import STREAMING, Request, parse_request
from .report import size_text, table
from .routing import make_target
from .target import Target, make_plan
from .units import Part, dissect

_NAMES = 3  # examples of a group of tensors


@dataclass(frozen=True)
class Group:
    """Units that are alike but for numbers in their names: how many, and the bytes of one."""

    name: str
    count: int
    nbytes: int


@dataclass(frozen=True)
class Phases:
    """What the granularity "phase" makes of a block, which stands for all of its kind."""

    block: str
    class_name: str
    phases: tuple[UnitSize, ...]


@dataclass(frozen=True)
class Reason:
    """Tensors of a stem that are there for one reason.

    Attributes:
        nbytes: of their elements, without the gaps between them.
        names: a few of them, the largest first, with stars for numbers.
    """

    reason: str
    count: int
    nbytes: int
    names: tuple[str, ...]


@dataclass(frozen=True)
class ComponentInspection:
    """One component as the finder sees it.

    Attributes:
        dtype: of its weights, in words.
        units: what it was taken apart into, in declared order, also where its policy does not use them.
        groups: the same in short.
        phases: for a block of each kind; empty unless the units are blocks.
        reasons: why its stem is its stem; empty where the component moves or stays as a whole.
        plans: what becomes of it, by granularity: that which was asked for, and those that stream.
    """

    name: str
    class_name: str
    dtype: str
    granularity: str
    units: tuple[UnitSize, ...]
    groups: tuple[Group, ...]
    phases: tuple[Phases, ...]
    reasons: tuple[Reason, ...]
    plans: Mapping[str, ComponentPlan]

    @property
    def plan(self) -> ComponentPlan:
        """What becomes of it under the granularity that was asked for."""
        return self.plans[self.granularity]

    def __str__(self) -> str:
        plan = self.plan
        note = f" ({plan.note})" if plan.note else ""
        lines = [f"{self.name}: {self.class_name}, {self.dtype}", f"policy {plan.policy.granularity}{note}"]
        if plan.policy.streams:
            whole = size_text(sum(unit.nbytes for unit in self.units))
            lines.append(f"{len(self.units)} units, {whole}; in declared order, that of use is learned:")
        elif self.units:
            lines.append(f"moves as a whole; named in `components`, these {len(self.units)} could stream:")
        else:
            lines.append("moves as a whole")
        lines += _indented(_group_lines(self.groups))
        for each in self.phases:
            lines.append(f"phases of {each.block} ({each.class_name}):")
            names = [unit.name.removeprefix(f"{each.block}.") for unit in each.phases]
            sizes = [(name, size_text(unit.nbytes)) for name, unit in zip(names, each.phases, strict=True)]
            lines += _indented(_columns(sizes))
        if plan.policy.streams:
            lines.append(f"stem, {size_text(plan.stem_bytes)}, there while the component runs:")
            lines += _indented(_reason_lines(self.reasons))
        alone = {word: Plan("", (plan,)) for word, plan in self.plans.items()}
        lines += ["", *_comparison(alone).splitlines()]
        return "\n".join([lines[0], *_indented(lines[1:])])


@dataclass(frozen=True)
class Inspection:
    """A pipeline as the finder sees it.

    Attributes:
        granularity: that was asked for.
        plans: what becomes of the pipeline, by granularity: that which was asked for, and those that stream.
        missing: for each component that could not be looked at, why.
        limit: `max_device_memory` in bytes, or None.
    """

    title: str
    granularity: str
    components: tuple[ComponentInspection, ...]
    plans: Mapping[str, Plan]
    missing: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None

    @property
    def plan(self) -> Plan:
        return self.plans[self.granularity]

    def too_little(self) -> str | None:
        """Why the weights that must be on the device at once exceed the limit, or None if they do not."""
        if self.limit is None:
            return None
        try:
            planner.check_budget(self.plan, self.limit)
        except ValueError as error:
            return str(error)
        return None

    def __str__(self) -> str:
        parts = [f'{self.title}, granularity "{self.granularity}"', *map(str, self.components)]
        if self.missing:
            parts.append("\n".join(f"{name}: not looked at: {why}" for name, why in self.missing.items()))
        if self.components:
            parts.append(
                "The whole pipeline\n"
                + "\n".join(_indented(_comparison(self.plans, self.limit).splitlines()))
            )
            parts.append(
                "arena: any two units fit in; in flight: leaves, which have no arena, in use or on their way;\n"
                "device: most bytes of weights at once, activations come on top; host: what does not stay there."
            )
        return "\n\n".join(parts)

    def as_dict(self) -> dict[str, Any]:
        """The same as plain data, sizes in bytes; units in declared order."""
        return {
            "pipeline": self.title,
            "granularity": self.granularity,
            "max_device_memory": self.limit,
            "fits": None if self.limit is None else self.too_little() is None,
            "components": [
                {
                    "name": each.name,
                    "class": each.class_name,
                    "dtype": each.dtype,
                    "policy": each.plan.policy.granularity,
                    "note": each.plan.note,
                    "order": "declared",
                    "units": [asdict(unit) for unit in each.units],
                    "groups": [asdict(group) for group in each.groups],
                    "phases": [asdict(phases) for phases in each.phases],
                    "stem": {
                        "nbytes": each.plan.stem_bytes,
                        "reasons": [asdict(reason) for reason in each.reasons],
                    },
                    "granularities": {word: _numbers(Plan("", (plan,))) for word, plan in each.plans.items()},
                }
                for each in self.components
            ],
            "granularities": {word: _numbers(plan) for word, plan in self.plans.items()},
            "missing": dict(self.missing),
        }


def inspect(
    modules: Mapping[str, nn.Module],
    granularity: str = "block",
    title: str = "pipeline",
    dtypes: Mapping[str, str] | None = None,
    missing: Mapping[str, str] | None = None,
    limit: int | None = None,
) -> Inspection:
    """Look at what `pipe.enable_block_offload(offload_granularity=granularity)` would do.

    Args:
        modules: the pipeline's components, by name; on any device.
        granularity: policy of all of them.
        title, dtypes, missing, limit: as in `Inspection` and `ComponentInspection`.

    Raises:
        ValueError: an unknown granularity.
    """
    first = {id(module): name for name, module in reversed(modules.items())}
    modules = {name: module for name, module in modules.items() if first[id(module)] == name}
    words = dict.fromkeys((granularity, *STREAMING))
    requests = {word: parse_request(word, None, None, tuple(modules)) for word in words}
    targets = {word: _targets(modules, request) for word, request in requests.items()}
    plans = {word: make_plan(each, torch.device("cpu")) for word, each in targets.items()}
    components = []
    for index, target in enumerate(targets[granularity]):
        components.append(
            ComponentInspection(
                name=target.name,
                class_name=type(target.module).__name__,
                dtype=(dtypes or {}).get(target.name, _dtype_text(target.module)),
                granularity=granularity,
                units=tuple(_sizes(target.anatomy.parts)),
                groups=tuple(group_units(_sizes(target.anatomy.parts))),
                phases=tuple(_phases(target)) if target.policy.granularity == "block" else (),
                reasons=tuple(_reasons(target)) if target.policy.streams else (),
                plans={word: plan.components[index] for word, plan in plans.items()},
            )
        )
    return Inspection(title, granularity, tuple(components), plans, dict(missing or {}), limit)


def group_units(units: Iterable[UnitSize]) -> list[Group]:
    """Units of one size whose names differ in numbers only, together; in the order of their first.

    A number that is the same in all of them stays in the name, the others become stars.
    """
    alike: dict[tuple[str, int], list[str]] = {}
    for unit in units:
        alike.setdefault((_starred(unit.name), unit.nbytes), []).append(unit.name)
    return [Group(_common_name(names), len(names), nbytes) for (_, nbytes), names in alike.items()]


def _targets(modules: Mapping[str, nn.Module], request: Request) -> list[Target]:
    return [make_target(name, module, request, name in request.by_name) for name, module in modules.items()]


def _sizes(parts: Sequence[Part]) -> list[UnitSize]:
    return [UnitSize(part.name, slab.lay_out(part.tensors).nbytes) for part in parts]


def _phases(target: Target) -> list[Phases]:
    """The phases of one block of each kind: those of one class whose phases are alike are of one kind."""
    found = dissect(target.module, "phase").parts
    sizes = _sizes(found)
    home = {id(part.modules[0]): size for part, size in zip(found, sizes, strict=True)}
    kinds: dict[object, Phases] = {}
    for block in target.anatomy.parts:
        phases = tuple(
            home[id(module)] for top in block.modules for module in top.modules() if id(module) in home
        )
        alike = tuple((phase.name.removeprefix(block.name), phase.nbytes) for phase in phases)
        class_name = type(block.modules[0]).__name__
        kinds.setdefault((class_name, alike), Phases(block.name, class_name, phases))
    return list(kinds.values())


def _reasons(target: Target) -> list[Reason]:
    tensors = (*target.module.named_parameters(), *target.module.named_buffers())
    names = {id(tensor): name for name, tensor in reversed(tensors)}
    why = dict(zip(map(id, target.anatomy.stem), target.anatomy.reasons, strict=True))
    by_reason: dict[str, list[UnitSize]] = {}
    for tensor in target.outside_parts()[1]:
        reason = why[id(tensor)]
        size = UnitSize(names[id(tensor)], tensor.numel() * tensor.element_size())
        by_reason.setdefault(reason, []).append(size)
    reasons = []
    for reason, sizes in by_reason.items():
        groups = sorted(group_units(sizes), key=lambda group: -group.nbytes * group.count)
        total = sum(size.nbytes for size in sizes)
        reasons.append(Reason(reason, len(sizes), total, tuple(group.name for group in groups[:_NAMES])))
    return sorted(reasons, key=lambda reason: -reason.nbytes)


def _starred(name: str) -> str:
    return re.sub(r"(?<![^. ])\d+(?![^. ])", "*", name)


def _common_name(names: Sequence[str]) -> str:
    pieces = [re.split(r"([. ])", name) for name in names]
    return "".join(
        first if all(o == first for o in others) else "*" for first, *others in zip(*pieces, strict=True)
    )


def _dtype_text(module: nn.Module) -> str:
    sizes: dict[torch.dtype, int] = {}
    for parameter in module.parameters():
        sizes[parameter.dtype] = sizes.get(parameter.dtype, 0) + parameter.numel() * parameter.element_size()
    return str(max(sizes, key=sizes.__getitem__)).removeprefix("torch.") if sizes else "no weights"


# --- text -----------------------------------------------------------------------------------------------


def _numbers(plan: Plan) -> dict[str, int]:
    """What one granularity comes to, in bytes."""
    streamed = [unit.nbytes for component in plan.components for unit in component.streamed]
    return {
        "units": len(streamed),
        "largest_unit": max(streamed, default=0),
        "arena": plan.arena_bytes,
        "in_flight": max((component.floating_bytes for component in plan.components), default=0),
        "stem": max((component.stem_bytes for component in plan.components), default=0),
        "resident": sum(component.resident_bytes for component in plan.components),
        "device": plan.device_bytes,
        "host": plan.host_bytes,
    }


def _comparison(plans: Mapping[str, Plan], limit: int | None = None) -> str:
    header = (
        "granularity",
        "units",
        "largest",
        "arena",
        "in flight",
        "comes and goes",
        "stays",
        "device",
        "host",
    )
    rows = []
    for word, plan in plans.items():
        count, *sizes = _numbers(plan).values()
        row = (word, str(count), *map(size_text, sizes))
        if limit is not None:
            left = limit - plan.device_bytes
            row += (size_text(left) if left >= 0 else f"{size_text(-left)} too little",)
        rows.append(row)
    return table(header if limit is None else (*header, f"left of {size_text(limit)}"), rows)


def _group_lines(groups: Sequence[Group]) -> list[str]:
    rows = [(f"{g.count} x {g.name}", size_text(g.nbytes), size_text(g.nbytes * g.count)) for g in groups]
    return _columns(rows)


def _reason_lines(reasons: Sequence[Reason]) -> list[str]:
    rows = [(each.reason, size_text(each.nbytes), f"{each.count} tensors") for each in reasons]
    lines = []
    for line, each in zip(_columns(rows), reasons, strict=True):
        more = ", ..." if each.count > len(each.names) else ""
        lines.append(f"{line}: {', '.join(each.names)}{more}")
    return lines


def _columns(rows: Sequence[tuple[str, ...]]) -> list[str]:
    """Rows in aligned columns, without a header."""
    if not rows:
        return []
    first, _, *rest = table(rows[0], list(rows[1:])).splitlines()
    return [first, *rest]


def _indented(lines: Iterable[str]) -> list[str]:
    return [f"  {line}" if line else "" for line in lines]

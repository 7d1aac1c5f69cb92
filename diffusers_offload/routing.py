"""Which policy each component of a pipeline gets: when enabling, and when it is exchanged for another."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import nn

from . import refusals
from .fitting import check
from .handle import OffloadHandle, held_policy
from .held import Held, find_held
from .log import logger
from .policy import OffloadPolicy, Request
from .target import Target, choose_residents
from .units import dissect


def plan_targets(
    modules: Mapping[str, nn.Module],
    request: Request,
    device: torch.device,
    leaving: Collection[Held] = (),
    asked: Collection[str] = (),
) -> list[Target]:
    """Route a policy to every component. Only looks; raises what is wrong with the request.

    Args:
        leaving: what is going to get its weights back first.
        asked: components that the user named, though not in the request: that nothing of one streams is an error.
    """
    targets: list[Target] = []
    without_blocks: list[str] = []
    seen: set[int] = set()
    for name, module in modules.items():
        if id(module) in seen:  # one module under two names
            continue
        seen.add(id(module))
        held = held_policy(module)
        if held is not None and find_held(module) not in leaving:
            targets.append(_shared_target(name, module, held, request, device))
            continue
        refusals.refuse_before(name, module, leaving)
        target = make_target(name, module, request, name in asked or name in request.by_name)
        if target.note and not _is_autoencoder(module):
            without_blocks.append(name)
        targets.append(target)
    if without_blocks and not leaving:
        logger.warning(
            "%s: no blocks found, so each comes and goes as a whole (the policy 'model')",
            ", ".join(without_blocks),
        )
    return targets


def check_exchange(
    handle: OffloadHandle, modules: Mapping[str, nn.Module], request: Request | None = None
) -> None:
    """Raise what `follow` would raise; changes nothing."""
    leaving, coming = _changes(handle, modules)
    if (leaving or coming) and any(engine.busy for engine in handle.engines):
        raise RuntimeError(f"components cannot be exchanged in the middle of a forward: {', '.join(modules)}")
    targets = plan_targets(coming, request or handle.request, handle.device, leaving)
    if coming:
        check(handle.plan_with(targets, leaving), handle.limits)


def follow(handle: OffloadHandle, modules: Mapping[str, nn.Module], request: Request | None = None) -> bool:
    """Components were exchanged: take in what is new under the policy of its name, let go of what has left.

    Args:
        modules: the components that the pipeline has now, by name.
        request: what was asked for; what the handle remembers if None.

    Returns:
        Whether anything had changed.

    Raises:
        ValueError, RuntimeError: a new one cannot be offloaded, or a forward is under way. The handle is then as
            it was.
    """
    leaving, coming = _changes(handle, modules)
    if not leaving and not coming:
        return False
    check_exchange(handle, modules, request)
    handle.let_go(leaving)
    try:
        # Taken apart only now: what comes may be what went, under another name and with new storages.
        handle.take_in(plan_targets(coming, request or handle.request, handle.device))
    except BaseException:
        handle.take_in([each.target.renewed() for each in leaving])
        raise
    return True


def _changes(
    handle: OffloadHandle, modules: Mapping[str, nn.Module]
) -> tuple[list[Held], dict[str, nn.Module]]:
    """What leaves the handle and what comes to it."""
    stays = {name for name, held in handle.holds.items() if held.module in _layers(modules.get(name))}
    staying = [handle.holds[name].module for name in stays]
    leaving = [held for name, held in handle.holds.items() if name not in stays]
    coming = {n: m for n, m in modules.items() if not any(each in staying for each in _layers(m))}
    return leaving, coming


def _layers(module: nn.Module | None) -> tuple[nn.Module | None, ...]:
    """`module`, and what `torch.compile` wrapped it around."""
    return (module, getattr(module, "_orig_mod", module))


def make_target(name: str, module: nn.Module, request: Request, by_name: bool) -> Target:
    """How one component is offloaded under `request`; `by_name`: the user named it."""
    policy = request.policy_for(name)
    if not policy.streams:
        return Target(name, module, policy, dissect(module))
    anatomy = dissect(module, policy.granularity)
    if not anatomy.parts and by_name:
        raise ValueError(
            f"{name} ({type(module).__name__}) has no blocks that could be streamed: use 'model' or 'resident'"
        )
    if not anatomy.parts or (_is_autoencoder(module) and not by_name):
        note = "an autoencoder, run in tiles" if anatomy.parts else "no blocks found"
        return Target(name, module, OffloadPolicy("model", tier=policy.tier), anatomy, note=note)
    return Target(
        name,
        module,
        policy,
        anatomy,
        choose_residents(anatomy, policy),
        flexible=name not in request.by_name,
        may_pack=name not in request.by_name and request.tier is None and policy.tier == "pinned",
        packs_on_disk=request.storage.packs if request.storage is not None else None,
    )


def _shared_target(
    name: str, module: nn.Module, held: tuple[OffloadHandle, Any], request: Request, device: torch.device
) -> Target:
    """A component that another pipeline offloads already keeps the policy it has there."""
    handle, plan = held
    if handle.device != device:
        raise ValueError(
            f"{name} is offloaded to {handle.device} by another pipeline: use device={str(handle.device)!r}, or "
            "disable the block offload of that pipeline first"
        )
    wanted = request.by_name.get(name)
    if wanted is not None and wanted != plan.policy:
        raise ValueError(
            f"components[{name!r}]={wanted} differs from the policy {plan.policy} that another pipeline gave this "
            "component: leave it out to share that, or disable the block offload of that pipeline first"
        )
    granularity = plan.policy.granularity if plan.policy.streams else "block"
    return Target(
        name,
        module,
        plan.policy,
        dissect(module, granularity),
        packs_on_disk=find_held(module).target.packs_on_disk,
        note="shared with another pipeline",
    )


def _is_autoencoder(module: nn.Module) -> bool:
    """Whether the module turns latents into pixels: tiled decoding would stream its blocks once per tile."""
    return callable(getattr(module, "encode", None)) or callable(getattr(module, "decode", None))

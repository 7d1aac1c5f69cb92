"""What of a pipeline fits where: whether anything streams, in how small units, and what the host can hold."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from .packing import unpacks_fast
from .planning import planner
from .planning.planner import Plan
from .policy import STREAMING, Request
from .report import size_text
from .streams import Streams
from .target import Target, make_plan
from .tiers.buffers import room_for
from .tiers.cache import share_out
from .tiers.pinned import staging_bytes
from .units import tensors_of

_ACTIVATIONS_SHARE = 0.2  # of the device, left to what computing needs where everything is to stay ...
_ACTIVATIONS_AT_MOST = 4 * 2**30  # ... and bytes of it that are enough


@dataclass(frozen=True)
class Limits:
    """Bytes that may be used; None where nobody has set a bound.

    Attributes:
        device: on the device, activations included.
        given: the user set it; otherwise it is what the device has.
        host: of weights on the host.
        others: of the device, what holds no weights of the modules in question.
    """

    device: int | None = None
    given: bool = True
    host: int | None = None
    others: int = 0


NO_LIMITS = Limits()


def limits_for(
    streams: Streams,
    device_memory: int | None,
    host_memory: int | None,
    decides: bool,
    leaving: int,
) -> Limits:
    """The bounds of one call, as things are now.

    Args:
        device_memory, host_memory: those that the user set.
        decides: the user left it to us what streams: an accelerator's free memory is a bound then.
        leaving: bytes on the device that are the modules' own now, and are going to make room.
    """
    given = device_memory is not None or not decides or not streams.asynchronous
    others = max(0, streams.allocated() - leaving)
    return Limits(device_memory if given else streams.available(), given, host_memory, others)


def bytes_on(device: torch.device, modules: Iterable[nn.Module]) -> int:
    """Bytes of the modules' weights that are on `device`."""
    tensors = {id(t): t for module in modules for t in tensors_of(module) if t.device == device}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def fit(
    route: Callable[[Request], list[Target]], request: Request, limits: Limits, device: torch.device
) -> tuple[Request, list[Target]]:
    """The targets that fit, and the request that they follow: everything resident, or else units small enough.

    Args:
        route: gives every component its target under a request.

    Raises:
        ValueError: nothing fits; the message says how much is missing and what would help.
    """
    request, targets = _fit_host(route, request, limits.host, device)
    if limits.device is None:
        return request, targets
    if device.type != "cpu" and request.decides and _all_fits(targets, limits.device - limits.others):
        named = request.by_name
        return request, [each if each.name in named else each.resident() for each in targets]
    refused: ValueError | None = None
    for granularity in _finer(request):
        finer = replace(request, default=replace(request.default, granularity=granularity))
        found = targets if finer == request else route(finer)
        try:
            check(make_plan(found, device), limits)
        except ValueError as error:
            refused = error
        else:
            return finer, found
    raise refused


def check(plan: Plan, limits: Limits) -> None:
    """Raise ValueError if the weights that must be on the device at once do not fit there."""
    if limits.device is not None:
        planner.check_budget(plan, limits.device, limits.given, limits.others)


def _fit_host(
    route: Callable[[Request], list[Target]], request: Request, limit: int | None, device: torch.device
) -> tuple[Request, list[Target]]:
    """Stream no more than the host may hold: what does not fit is packed, goes to disk, or stays on the device."""
    targets = route(request)
    plan = make_plan(targets, device)
    if limit is None:
        return request, targets
    for tier in _other_tiers(request, device):
        if plan.host_bytes <= limit:
            break
        request = replace(request, default=replace(request.default, tier=tier))
        targets = route(request)
        plan = make_plan(targets, device)
    if plan.host_bytes <= limit:
        through = [unit.nbytes for c in plan.components if c.on_disk for unit in c.streamed]
        room = limit - plan.host_bytes
        share_out(room, list(map(room_for, through)), staging=staging_bytes(room, device.type != "cpu"))
        return request, targets
    free = [c for c in plan.components if c.policy == request.default and c.policy.streams and not c.on_disk]
    streamed = sum(unit.host_bytes for component in free for unit in component.streamed)
    room = limit - (plan.host_bytes - streamed)
    if not request.decides or room < 0 or not streamed:
        raise ValueError(
            f"max_host_memory={limit} is {size_text(plan.host_bytes - limit)} too little for what leaves the device. "
            "Give more, or an offload_dir for what does not fit, or let more stay on the device: a smaller "
            "offload_ratio, 'resident' for some components"
        )
    request = replace(
        request, default=replace(request.default, ratio=request.default.ratio * room / streamed)
    )
    return request, route(request)


def _other_tiers(request: Request, device: torch.device) -> list[str]:
    """Where weights may go that pinned memory has no room for, if that is left to us; the fastest first."""
    if request.tier is not None or request.default.tier != "pinned":
        return []
    packed = ["packed"] if unpacks_fast(device) else []
    return [*packed, *(["disk"] if request.storage is not None else [])]


def _all_fits(targets: Sequence[Target], limit: int) -> bool:
    """Whether all weights may stay on the device beside what computing needs."""
    weights = sum(target.nbytes for target in targets)
    return weights + min(_ACTIVATIONS_AT_MOST, int(limit * _ACTIVATIONS_SHARE)) <= limit


def _finer(request: Request) -> Sequence[str]:
    granularity = request.default.granularity
    return STREAMING[STREAMING.index(granularity) :] if request.default.streams else (granularity,)

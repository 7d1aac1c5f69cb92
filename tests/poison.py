"""Makes reading a weight that is not loaded visible on any device: it reads as NaN.

On the CPU a weight that was not loaded lies on the host and can be computed with, and bytes that were used
stay where they were until others come. `poisoned` takes both away, also from kernels that no watch sees
(torch's attention layers take a path of their own under a watch).
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest import mock

import torch
from torch import nn

import diffusers_offload
from diffusers_offload import slab
from diffusers_offload.component import State
from diffusers_offload.engine import Engine
from diffusers_offload.handle import OffloadHandle
from diffusers_offload.loads import Loads
from diffusers_offload.watch import watch_units
from diffusers_offload.weights import Weights

POISON = 0xFF  # in every byte: NaN in all floating dtypes, an index out of range in all integers


@contextmanager
def poisoned(handle: OffloadHandle, but: Iterable[str] = ()) -> Iterator[None]:
    """Within, weights read as NaN but while they are loaded, and a unit leaves as soon as it was used.

    What the forwards write to weights is kept. Enter it once nothing is taken apart anew any longer; the
    weights must not be edited within.

    Args:
        but: names of weights that may be read at any time, "vae.bn.running_mean".
    """
    engines = {held.engine for held in handle._held.values()}
    units = [unit for engine in engines for c in engine.components for unit in c.units]
    spared = set()
    for name, module in handle.components.items():
        named = (*module.named_parameters(), *module.named_buffers())
        spared |= {id(tensor) for path, tensor in named if f"{name}.{path}" in but}
    true_views = {}
    for engine in engines:
        engine.call_ended()
        for component in engine.components:
            component.checked = True
    for unit in units:
        weights = unit.weights
        if weights.host is None:
            continue
        assert unit.state is State.OFFLOADED
        true_views[id(weights)] = weights._host_views
        bad = slab.views(weights.layout, torch.full_like(weights.host.bytes, POISON))
        pairs = zip(weights.tensors, weights._host_views, bad, strict=True)
        _show(weights, [good if id(tensor) in spared else view for tensor, good, view in pairs])

    def write_back(weights: Weights, changed) -> None:
        for i in changed:
            true_views[id(weights)][i].copy_(weights._device_views[i], non_blocking=True)

    retire, drop = Engine._retire, Loads.drop

    def retire_and_drop(engine: Engine, unit, stream) -> None:
        retire(engine, unit, stream)
        if unit.state is State.READY and not unit.keeps:
            engine.loads.drop(unit)

    def drop_and_overwrite(loads: Loads, unit) -> None:
        buffer, streams = unit.weights._place, loads._streams
        drop(loads, unit)
        before = streams.switch(streams.load)
        try:
            buffer.fill_(POISON)
        finally:
            streams.restore(before)

    try:
        with (
            mock.patch.object(Weights, "write_back", write_back),
            mock.patch.object(Engine, "_retire", retire_and_drop),
            mock.patch.object(Loads, "drop", drop_and_overwrite),
        ):
            yield
            for engine in engines:
                engine.call_ended()
    finally:
        for unit in units:
            if id(unit.weights) in true_views:
                _show(unit.weights, true_views[id(unit.weights)])


def _show(weights: Weights, views: list[torch.Tensor]) -> None:
    """Let the unloaded tensors point at `views`."""
    weights._host_views = views
    weights._point_at(views)
    weights._host_addresses = [tensor.data_ptr() for tensor in weights.tensors]


@contextmanager
def no_weight_used_while_offloaded(handle: OffloadHandle) -> Iterator[None]:
    """`helpers.no_weight_used_while_offloaded` for whatever a handle offloads."""
    components = [held.component for held in handle._held.values()]
    names = {
        id(t): n for c in components for n, t in (*c.module.named_parameters(), *c.module.named_buffers())
    }
    units = [unit for component in components for unit in component.units]
    used: set[str] = set()
    with watch_units(units, lambda found: used.update(names.get(id(tensor), "?") for _, tensor in found)):
        yield
    assert not used, f"used while offloaded: {sorted(used)}"


def check(
    module: nn.Module,
    steps: Sequence[Callable[[nn.Module, str], Any]],
    granularity: str,
    ratio: float = 1.0,
    device: str = "cpu",
    poison: bool = True,
    resident: nn.Module | None = None,
) -> None:
    """The module, offloaded, gives the same as resident in each of `steps`, then in all of them again.

    Args:
        steps: functions of the module and of its device, each of which runs it once or more.
        resident: the same module once more, where it cannot be copied.
        poison: whether the second round may be `poisoned`.
    """
    module = module.eval().requires_grad_(False)
    resident = (resident or copy.deepcopy(module)).eval().requires_grad_(False).to(device)
    expected = [_flat(step(resident, device)) for step in (*steps, *steps)]
    handle = diffusers_offload.enable_block_offload(
        module, device=device, offload_granularity=granularity, offload_ratio=ratio
    )
    try:
        for number, (step, wanted) in enumerate(zip(steps, expected, strict=False)):
            _assert_equal(_flat(step(module, device)), wanted, f"step {number}")
        again = list(enumerate(zip(steps, expected[len(steps) :], strict=True)))
        with poisoned(handle) if poison else nullcontext():
            for number, (step, wanted) in again:
                looks_on = poison and number % 2 == 0
                with no_weight_used_while_offloaded(handle) if looks_on else nullcontext():
                    found = _flat(step(module, device))
                _assert_equal(found, wanted, f"step {number}, what is not loaded being NaN")
    finally:
        handle.disable()
    for (name, a), b in zip(module.state_dict().items(), resident.state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b.cpu()), f"{name} is not what it is in the resident model"


def _flat(result: Any) -> list[torch.Tensor]:
    """The tensors in what a forward gave, copied."""
    if isinstance(result, torch.Tensor):
        return [result.clone()]
    if isinstance(result, dict):
        result = list(result.values())
    if hasattr(result, "__dataclass_fields__"):
        result = list(vars(result).values())
    return [tensor for each in result for tensor in _flat(each)]


def _assert_equal(found: list, expected: list, where: str) -> None:
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert b.isfinite().all()
        assert torch.equal(a, b), f"{where}: {(a != b).sum()} of {a.numel()} values differ"

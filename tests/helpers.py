"""Real pipelines with small random weights, and a run of them as one tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch

from diffusers_offload.demo import pipelines as zoo
from diffusers_offload.watch import watch_units


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return zoo.build(name, dtype=dtype).to(device)


def run(pipe, name: str, seed: int = 0, **changes) -> torch.Tensor:
    """One call of the pipeline with fixed noise; its images or frames."""
    kwargs = {**zoo.call_kwargs(name), **changes}
    result = pipe(**kwargs, generator=torch.Generator("cpu").manual_seed(seed))
    return zoo.output(result).cpu()


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in module.state_dict().items()}


@contextmanager
def no_weight_used_while_offloaded(pipe, but: Iterable[str] = ()) -> Iterator[None]:
    """Fails if a torch call uses a weight whose unit is not on the device, `but` for those named.

    On the CPU such a weight can be computed with, since it lies on the host; on an accelerator it cannot.
    """
    held = pipe.block_offload._held.values()
    names = {
        id(t): f"{name}.{path}"
        for name, module in pipe.block_offload.components.items()
        for path, t in (*module.named_parameters(), *module.named_buffers())
    }
    units = [unit for each in held for unit in each.component.units]
    used: set[str] = set()
    with watch_units(units, lambda found: used.update(names.get(id(tensor), "?") for _, tensor in found)):
        yield
    used -= set(but)
    assert not used, f"used while offloaded: {sorted(used)}"


@contextmanager
def warnings_of_ours() -> Iterator[list[logging.LogRecord]]:
    """What the package warns of within; Diffusers' loggers do not propagate to where pytest listens."""
    records: list[logging.LogRecord] = []
    handler = logging.Handler(logging.WARNING)
    handler.emit = records.append
    logger = logging.getLogger("diffusers.block_offload")
    logger.addHandler(handler)
    try:
        yield records
    finally:
        logger.removeHandler(handler)

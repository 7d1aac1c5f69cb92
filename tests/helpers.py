"""Real pipelines with small random weights, and a run of them as one tensor."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from diffusers_offload.demo import pipelines as zoo


def build(name: str, dtype: torch.dtype = torch.float32, device: str = "cpu"):
    return zoo.build(name, dtype=dtype).to(device)


def run(pipe, name: str, seed: int = 0, **changes) -> torch.Tensor:
    """One call of the pipeline with fixed noise; its images or frames."""
    kwargs = {**zoo.call_kwargs(name), **changes}
    result = pipe(**kwargs, generator=torch.Generator("cpu").manual_seed(seed))
    return zoo.output(result).cpu()


def weights_of(module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}


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

"""Making one model: constructed directly in its place and dtype, then filled with seeded random weights."""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from tqdm.auto import tqdm

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

# Of weight matrices: a bit below 1, so that attention logits stay away from saturation.
GAIN = 0.8
_PROGRESS_FROM = 10**9  # parameters from which on filling them takes long enough to show a progress bar


@dataclass(frozen=True)
class Recipe:
    """How to build one pipeline and how to call it; `denoiser` and `call` are keyed by size.

    `control` names the argument that takes the control image, where there is one.
    """

    build: Callable[[Maker, dict[str, Any]], DiffusionPipeline]
    denoiser: dict[str, dict[str, Any]]
    call: dict[str, dict[str, Any]]
    control: str | None = None


@dataclass(frozen=True)
class Maker:
    """Makes the models of one pipeline, all of one size, dtype, device and seed."""

    size: str
    dtype: torch.dtype
    device: torch.device
    seed: int

    def __call__(self, role: str, cls: type[nn.Module], *args: Any, **config: Any) -> Any:
        """Return `cls(*args, **config)` in eval mode; its weights follow from the seed and `role` alone."""
        with torch.device(self.device), default_dtype(self.dtype):
            model = cls(*args, **config)
        cast_as_loaded(model, self.dtype)
        if self.device.type != "meta":
            randomise(model, self.seed + zlib.crc32(role.encode()))
        return model.eval()


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new float tensors have `dtype` inside the block."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def cast_as_loaded(model: nn.Module, dtype: torch.dtype) -> None:
    """Give `model` the dtypes it would have after `from_pretrained(torch_dtype=dtype)`, in place."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    from_transformers = hasattr(model, "_keep_in_fp32_modules_strict")
    if from_transformers:
        # Transformers leaves buffers as constructed, and applies the (non-strict) list to float16 only.
        kept = kept if dtype == torch.float16 else set()
        kept |= set(model._keep_in_fp32_modules_strict or ())
    elif not kept:
        # Diffusers casts the buffers too, but only of models that keep nothing in float32. Its own `to` would
        # warn about models with an empty list.
        nn.Module.to(model, dtype)
    for name, parameter in model.named_parameters():
        if kept.intersection(name.split(".")):
            parameter.data = parameter.data.float()


@torch.no_grad()
def randomise(model: nn.Module, seed: int) -> None:
    """Fill every parameter with its own random numbers, of a scale that keeps activations near 1.

    Buffers stay. The numbers are drawn in float32 on each parameter's device, so a bfloat16 model is the
    rounded float32 model, and a model on another kind of device is another model.
    """
    generators: dict[torch.device, torch.Generator] = {}
    small = sum(parameter.numel() for parameter in model.parameters()) < _PROGRESS_FROM
    parameters = tqdm(
        list(model.named_parameters()), desc=type(model).__name__, disable=small or None, leave=False
    )
    for name, parameter in parameters:
        device = parameter.device
        generator = generators.setdefault(device, torch.Generator(device).manual_seed(seed))
        noise = torch.randn(parameter.shape, generator=generator, device=device, dtype=torch.float32)
        per_channel = parameter.ndim < 2 or parameter[0].numel() == 1
        if per_channel and name.endswith("bias"):
            parameter.copy_(noise.mul_(0.02))
        elif per_channel:
            # Norm weights: around 1, or around 0 where the model itself adds the 1.
            parameter.copy_(noise.mul_(0.1).add_(parameter))
        else:
            parameter.copy_(noise.mul_(GAIN / math.sqrt(parameter[0].numel())))

"""Real Diffusers pipelines with random weights: `build` one, call it with `call_kwargs`, read `output`.

    pipe = build("flux")
    result = pipe(**call_kwargs("flux"), generator=torch.Generator("cpu").manual_seed(0))
    save_preview(result, "flux.png")

Sizes: "tiny" runs in about a second on a CPU, with at least three blocks in each list of blocks. "full" has
the published denoiser at its true size, with text encoders of the true width but few layers, and a small
autoencoder.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from .image import IMAGE
from .maker import Maker, Recipe
from .result import output, save_preview
from .video import VIDEO

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline
    from PIL.Image import Image

__all__ = ["PIPELINES", "build", "call_kwargs", "output", "save_preview"]

PIPELINES: dict[str, Recipe] = {**IMAGE, **VIDEO}
PROMPT = "a red fox in the snow"


def build(
    name: str,
    size: str = "tiny",
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
    seed: int = 0,
    **denoiser: Any,
) -> DiffusionPipeline:
    """Return the pipeline `name` of PIPELINES in eval mode, its weights following from `seed`.

    The dtypes are those of `from_pretrained(torch_dtype=dtype)`: some weights stay float32. Every model is
    made on `device`, without a copy elsewhere; on "meta" it has shapes only. `denoiser` replaces entries of
    the denoiser's config, for example `num_layers=4`. Raises KeyError for an unknown name or size.
    """
    recipe = PIPELINES[name]
    config = {**recipe.denoiser[size], **denoiser}
    pipe = recipe.build(Maker(size, dtype, torch.device(device), seed), config)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def call_kwargs(name: str, size: str = "tiny") -> dict[str, Any]:
    """Return arguments for a short run of pipeline `name`; the caller adds a generator.

    Raises KeyError for an unknown name or size.
    """
    recipe = PIPELINES[name]
    kwargs = {"prompt": PROMPT, "output_type": "pt", **recipe.call[size]}
    if recipe.control:
        kwargs[recipe.control] = control_image(kwargs["height"], kwargs["width"])
    return kwargs


def control_image(height: int, width: int) -> Image:
    """A picture of colour ramps, in pixels."""
    from PIL import Image

    down, across = torch.linspace(0, 255, height)[:, None], torch.linspace(0, 255, width)[None]
    ramps = torch.stack(torch.broadcast_tensors(down, across, (down + across) / 2), dim=-1)
    return Image.fromarray(ramps.to(torch.uint8).numpy())

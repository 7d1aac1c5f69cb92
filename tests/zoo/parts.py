"""What the builders share: the entry of the table, and components that the demo does not have."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.vaes import kl_vae

if TYPE_CHECKING:
    import diffusers
    import transformers

PROMPT = {"prompt": "a red fox in the snow", "negative_prompt": "a grey wall"}
SIZE = {"height": 48, "width": 64}
STEPS = {"num_inference_steps": 2, "output_type": "pt"}
IMAGE = {**PROMPT, **SIZE, **STEPS}
VIDEO = {**PROMPT, "height": 32, "width": 48, "num_frames": 9, **STEPS}
NO_CHECKER = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}


@dataclass(frozen=True)
class Entry:
    """How to build one pipeline, and its arguments, or a function that makes them.

    Attributes:
        reads: weights that the pipeline itself looks at, outside any model: at their values, which it moves,
            or at where they lie.
    """

    build: Callable[[Maker], diffusers.DiffusionPipeline]
    call: dict[str, Any] | Callable[[], dict[str, Any]]
    reads: tuple[str, ...] = ()


def flow_vae(make: Maker, latent_channels: int, **config: Any) -> diffusers.AutoencoderKL:
    """The image autoencoder without the 1x1 convolutions around the latents."""
    return kl_vae(make, latent_channels, use_quant_conv=False, use_post_quant_conv=False, **config)


def vae_8x(make: Maker, latent_channels: int, **config: Any) -> diffusers.AutoencoderKL:
    """An image autoencoder of 8x smaller latents, for pipelines that take that for granted."""
    from diffusers import AutoencoderKL

    return make(
        "vae",
        AutoencoderKL,
        latent_channels=latent_channels,
        block_out_channels=(16, 16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        norm_num_groups=8,
        **config,
    )


def vision(make: Maker, role: str = "image_encoder", size: int = 32, projection: int | None = 32) -> Any:
    """CLIP's picture tower for pictures of `size` pixels; with the pooled output projected, if so wide."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=4,
        num_attention_heads=4,
        image_size=size,
        patch_size=size // 4,
        projection_dim=projection or 32,
    )
    return make(role, CLIPVisionModelWithProjection if projection else CLIPVisionModel, config)


def image_processor() -> transformers.CLIPImageProcessor:
    """What turns a picture into the input of `vision`."""
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(crop_size=32, size={"shortest_edge": 32})


def picture(height: int = 48, width: int = 64) -> Any:
    """A picture of colour ramps."""
    from diffusers_offload.demo.pipelines import control_image

    return control_image(height, width)


def mask(height: int = 48, width: int = 64) -> Any:
    """A picture whose right half is white."""
    from PIL import Image

    page = Image.new("L", (width, height), 0)
    page.paste(255, (width // 2, 0, width, height))
    return page

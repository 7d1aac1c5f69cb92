"""Pipelines with a second model beside the denoiser, or a picture beside the prompt."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_offload.demo.image import (
    FLUX_DENOISER,
    SD3_DENOISER,
    SDXL_DENOISER,
    flux_parts,
    sd3,
    sdxl_parts,
)
from diffusers_offload.demo.maker import Maker, randomise
from diffusers_offload.demo.text import layers, special_ids
from diffusers_offload.demo.tokenizers import qwen_tokenizer

from .image import CHAT, HEADS, Z_IMAGE, z_image_parts
from .parts import IMAGE, NO_CHECKER, PROMPT, SIZE, STEPS, Entry, mask, picture
from .unets import sd_parts

EMBEDDING = {"conditioning_embedding_out_channels": (8, 16, 16)}  # of the control image, 4x smaller


def z_image_controlnet(make: Maker) -> Any:
    """The controlnet has the transformer's refiners as its own, and runs its layers twice a forward."""
    from diffusers import ZImageControlNetModel, ZImageControlNetPipeline

    parts = z_image_parts(make)
    controlnet = make(
        "controlnet",
        ZImageControlNetModel,
        **Z_IMAGE,
        control_layers_places=[0, 1, 3],
        control_refiner_layers_places=[0, 1, 2],
        control_in_dim=16,
        add_control_noise_refiner="control_layers",
    )
    controlnet = ZImageControlNetModel.from_transformer(controlnet, parts["transformer"])
    return ZImageControlNetPipeline(**parts, controlnet=controlnet)


def controlnet_union(make: Maker) -> Any:
    """Torch's own attention, which uses the weights of its projection without calling it."""
    from diffusers import ControlNetUnionModel, StableDiffusionXLControlNetUnionPipeline

    parts, shape = sdxl_parts(make, SDXL_DENOISER["tiny"])
    shape = {key: value for key, value in shape.items() if key not in ("up_block_types", "sample_size")}
    trans = {"num_trans_channel": 16, "num_trans_head": 2, "num_trans_layer": 3, "num_proj_channel": 16}
    controlnet = make("controlnet", ControlNetUnionModel, **EMBEDDING, **trans, **shape)
    return StableDiffusionXLControlNetUnionPipeline(**parts, controlnet=controlnet, add_watermarker=False)


def controlnet_xs(make: Maker) -> Any:
    """A model made of the weights of two, whose layers run in turns; one of the two stays, unused."""
    from diffusers import ControlNetXSAdapter, StableDiffusionControlNetXSPipeline

    parts = sd_parts(make, layers_per_block=2)
    unet = parts["unet"].config
    adapter = make(
        "controlnet",
        ControlNetXSAdapter,
        **EMBEDDING,
        block_out_channels=(8, 16, 16),
        base_block_out_channels=unet.block_out_channels,
        down_block_types=unet.down_block_types,
        cross_attention_dim=unet.cross_attention_dim,
        num_attention_heads=2,
        max_norm_num_groups=4,
        upcast_attention=False,
        use_linear_projection=False,
    )
    pipe = StableDiffusionControlNetXSPipeline(**parts, controlnet=adapter, **NO_CHECKER)
    randomise(adapter, make.seed + 1)  # its weights were copied, and no two may be equal
    return pipe


def sd_two_controlnets(make: Maker) -> Any:
    """Two controlnets in a list that is a model itself."""
    from diffusers import ControlNetModel, StableDiffusionControlNetPipeline

    parts = sd_parts(make)
    config = parts["unet"].config
    names = ("block_out_channels", "down_block_types", "layers_per_block", "norm_num_groups")
    names += ("cross_attention_dim", "attention_head_dim")
    shape = {name: config[name] for name in names}
    both = [make(f"controlnet_{i}", ControlNetModel, **EMBEDDING, **shape) for i in range(2)]
    return StableDiffusionControlNetPipeline(**parts, controlnet=both, **NO_CHECKER)


def flux_two_controlnets(make: Maker) -> Any:
    """Two controlnets of Flux, each with two lists of blocks and two of outputs."""
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    parts, shape = flux_parts(make, FLUX_DENOISER["tiny"])
    both = [make(f"controlnet_{i}", FluxControlNetModel, **shape) for i in range(2)]
    return FluxControlNetPipeline(**parts, controlnet=both)


def sd3_controlnet(make: Maker) -> Any:
    """Blocks of one stream only, each with an output of its own."""
    from diffusers import SD3ControlNetModel, StableDiffusion3ControlNetPipeline

    # Each of three controlnet blocks serves two of the transformer's, whose last takes none.
    parts = sd3(make, {**SD3_DENOISER["tiny"], "num_layers": 6}).components
    config = parts["transformer"].config
    names = ("num_attention_heads", "attention_head_dim", "joint_attention_dim", "caption_projection_dim")
    names += ("pooled_projection_dim", "in_channels", "out_channels", "sample_size", "pos_embed_max_size")
    shape = {name: config[name] for name in names}
    parts = {name: part for name, part in parts.items() if name not in ("image_encoder", "feature_extractor")}
    controlnet = make("controlnet", SD3ControlNetModel, **shape, num_layers=3, qk_norm="rms_norm")
    return StableDiffusion3ControlNetPipeline(**parts, controlnet=controlnet)


def flux_kontext(make: Maker) -> Any:
    """The picture's latents lie beside the noise; the autoencoder encodes first."""
    from diffusers import FluxKontextPipeline

    parts, _ = flux_parts(make, FLUX_DENOISER["tiny"])
    return FluxKontextPipeline(**parts)


def flux_fill(make: Maker) -> Any:
    """Mask and masked picture are channels of the input."""
    from diffusers import FluxFillPipeline

    # Packed 2x2: the noise and the picture, of 4 channels each, and a mask of 4x4 pixels a latent.
    parts, _ = flux_parts(make, {**FLUX_DENOISER["tiny"], "in_channels": 16})
    from diffusers import FluxTransformer2DModel

    config = {k: v for k, v in parts["transformer"].config.items() if not k.startswith("_")}
    config |= {"in_channels": 16 + 16 + 64, "out_channels": 16}
    return FluxFillPipeline(**{**parts, "transformer": make("transformer", FluxTransformer2DModel, **config)})


def flux2_klein(make: Maker) -> Any:
    """The pipeline reads running statistics of the autoencoder before it decodes; one modulation for all blocks."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Flux2KleinPipeline,
        Flux2Transformer2DModel,
    )
    from transformers import Qwen3Config, Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    shape = layers(make, "qwen", 4)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    config = Qwen3Config(**shape, **special_ids(tokenizer), head_dim=head, tie_word_embeddings=True)
    transformer = make(
        "transformer",
        Flux2Transformer2DModel,
        **HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=3 * shape["hidden_size"],
        timestep_guidance_channels=16,
        axes_dims_rope=(4, 4, 4, 4),
        guidance_embeds=False,
    )
    return Flux2KleinPipeline(
        tokenizer=tokenizer,
        text_encoder=make("text_encoder", Qwen3ForCausalLM, config),
        transformer=transformer,
        vae=flux2_vae(make),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    )


def flux2_vae(make: Maker) -> Any:
    """An autoencoder with running statistics, which are not those that it starts with."""
    from diffusers import AutoencoderKLFlux2

    vae = make(
        "vae",
        AutoencoderKLFlux2,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    generator = torch.Generator().manual_seed(make.seed)
    vae.bn.running_mean.normal_(generator=generator)
    vae.bn.running_var.uniform_(0.5, 2, generator=generator)
    return vae


def control(**call: Any) -> Any:
    return lambda: {**IMAGE, "control_image": picture(), **call}


FLUX_CALL = {"prompt": PROMPT["prompt"], **SIZE, **STEPS, "max_sequence_length": 32}

CONTROL = {
    "z-image-controlnet": Entry(z_image_controlnet, control(guidance_scale=3.0, max_sequence_length=64)),
    "controlnet-union": Entry(
        controlnet_union, lambda: {**IMAGE, "control_image": [picture(), picture()], "control_mode": [0, 3]}
    ),
    "controlnet-xs": Entry(controlnet_xs, lambda: {**IMAGE, "image": picture()}),
    "sd-two-controlnets": Entry(
        sd_two_controlnets, lambda: {**IMAGE, "image": [picture()] * 2, "guess_mode": False}
    ),
    "flux-two-controlnets": Entry(
        flux_two_controlnets,
        lambda: {
            **FLUX_CALL,
            "control_image": [picture()] * 2,
            "controlnet_conditioning_scale": [0.7, 0.4],
            "control_mode": [None, None],
        },
    ),
    "sd3-controlnet": Entry(sd3_controlnet, control(max_sequence_length=32)),
    "flux-kontext": Entry(
        flux_kontext,
        lambda: {**FLUX_CALL, "image": picture(), "max_area": 48 * 64, "_auto_resize": False},
    ),
    "flux-fill": Entry(flux_fill, lambda: {**FLUX_CALL, "image": picture(), "mask_image": mask()}),
    "flux2-klein": Entry(
        flux2_klein,
        lambda: {
            **FLUX_CALL,
            "image": picture(64, 64),
            "text_encoder_out_layers": (1, 2, 3),
            "guidance_scale": 4.0,
        },
    ),
}

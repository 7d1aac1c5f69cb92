"""Pipelines around a UNet: stages of different sizes, run down, middle and up."""

from __future__ import annotations

from typing import Any

import torch

from diffusers_offload.demo.image import SDXL_DENOISER, sdxl_parts
from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import clip
from diffusers_offload.demo.vaes import kl_vae

from .parts import IMAGE, NO_CHECKER, PROMPT, STEPS, VIDEO, Entry, image_processor, mask, picture, vision

CHANNELS = {"block_out_channels": (16, 32, 48), "norm_num_groups": 8, "layers_per_block": 3}


def sd_parts(make: Maker, **config: Any) -> dict[str, Any]:
    """The components of Stable Diffusion 1 and 2, by name."""
    from diffusers import DDIMScheduler, UNet2DConditionModel

    tokenizer, text_encoder = clip(make, "text_encoder")
    shape = {
        **CHANNELS,
        **stages("{}2D", "{}2D"),
        "attention_head_dim": 8,
        "cross_attention_dim": text_encoder.config.hidden_size,
        "sample_size": 16,
    }
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "unet": make("unet", UNet2DConditionModel, **{**shape, **config}),
        "vae": kl_vae(make, 4),
        "scheduler": DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1),
    }


def stages(down: str, up: str) -> dict[str, tuple[str, ...]]:
    """Three stages each way, of which the outermost two have attention to the text."""
    cross, plain = ("CrossAttnDownBlock", "DownBlock"), ("UpBlock", "CrossAttnUpBlock")
    return {
        "down_block_types": (down.format(cross[0]), down.format(cross[0]), down.format(cross[1])),
        "up_block_types": (up.format(plain[0]), up.format(plain[1]), up.format(plain[1])),
    }


def sd(make: Maker) -> Any:
    from diffusers import StableDiffusionPipeline

    return StableDiffusionPipeline(**sd_parts(make), **NO_CHECKER)


def sd_inpaint(make: Maker) -> Any:
    """The UNet takes mask and masked picture too; the autoencoder encodes before it decodes."""
    from diffusers import StableDiffusionInpaintPipeline

    return StableDiffusionInpaintPipeline(**sd_parts(make, in_channels=9), **NO_CHECKER)


def sdxl_ip_adapter(make: Maker) -> Any:
    """Loading the adapter replaces attention processors by ones that hold weights."""
    from diffusers import StableDiffusionXLPipeline

    parts, _ = sdxl_parts(make, SDXL_DENOISER["tiny"])
    pipe = StableDiffusionXLPipeline(
        **parts, image_encoder=vision(make), feature_extractor=image_processor(), add_watermarker=False
    )
    pipe.load_ip_adapter(ip_adapter_weights(pipe, make.seed), subfolder=None, weight_name=None)
    pipe.set_ip_adapter_scale(0.7)
    return pipe


def ip_adapter_weights(pipe: Any, seed: int) -> dict[str, dict[str, torch.Tensor]]:
    """A state dict as the hub's file has it, for the UNet and image encoder of `pipe`."""
    generator = torch.Generator().manual_seed(seed)
    dtype, tokens = pipe.unet.dtype, 4
    wide, cross = pipe.image_encoder.config.projection_dim, pipe.unet.config.cross_attention_dim

    def draw(*shape: int) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator) / shape[-1] ** 0.5).to(dtype)

    adapter: dict[str, torch.Tensor] = {}
    cross_attentions = [name for name in pipe.unet.attn_processors if name.endswith("attn2.processor")]
    for number, name in enumerate(cross_attentions):
        inner = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
        for way in ("k", "v"):
            adapter[f"{2 * number + 1}.to_{way}_ip.weight"] = draw(inner, cross)
    project = {
        "proj.weight": draw(tokens * cross, wide),
        "proj.bias": draw(tokens * cross),
        "norm.weight": 1 + 0.1 * draw(cross),
        "norm.bias": 0.1 * draw(cross),
    }
    return {"image_proj": project, "ip_adapter": adapter}


def svd(make: Maker) -> Any:
    """Spatial and temporal transformers in pairs; the pipeline inspects the decoder's signature."""
    from diffusers import (
        AutoencoderKLTemporalDecoder,
        EulerDiscreteScheduler,
        StableVideoDiffusionPipeline,
        UNetSpatioTemporalConditionModel,
    )

    unet = make(
        "unet",
        UNetSpatioTemporalConditionModel,
        **stages("{}SpatioTemporal", "{}SpatioTemporal"),
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        cross_attention_dim=32,
        num_attention_heads=(2, 2, 4),
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=24,
        sample_size=16,
    )
    vae = make(
        "vae",
        AutoencoderKLTemporalDecoder,
        down_block_types=("DownEncoderBlock2D",) * 3,
        block_out_channels=(32, 32, 64),
        layers_per_block=2,
        force_upcast=False,
    )
    scheduler = EulerDiscreteScheduler(
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        sigma_max=700.0,
        sigma_min=0.002,
        timestep_spacing="leading",
        timestep_type="continuous",
        use_karras_sigmas=True,
    )
    return StableVideoDiffusionPipeline(
        unet=unet,
        vae=vae,
        image_encoder=vision(make, size=224),  # the pipeline resizes to 224 pixels itself
        feature_extractor=image_processor(),
        scheduler=scheduler,
    )


def animatediff(make: Maker) -> Any:
    """Motion modules between the layers of an image UNet."""
    from diffusers import AnimateDiffPipeline, UNetMotionModel

    parts = sd_parts(make)
    unet = make(
        "unet",
        UNetMotionModel,
        **CHANNELS,
        **stages("{}Motion", "{}Motion"),
        num_attention_heads=2,
        motion_num_attention_heads=2,
        cross_attention_dim=parts["text_encoder"].config.hidden_size,
        sample_size=16,
    )
    return AnimateDiffPipeline(**{**parts, "unet": unet}, motion_adapter=None)


def text_to_video(make: Maker) -> Any:
    """Convolutions and transformers over time beside those over the picture, in lists of their own."""
    from diffusers import TextToVideoSDPipeline, UNet3DConditionModel

    parts = sd_parts(make)
    unet = make(
        "unet",
        UNet3DConditionModel,
        **{**CHANNELS, "layers_per_block": 2},
        **stages("{}3D", "{}3D"),
        attention_head_dim=8,
        cross_attention_dim=parts["text_encoder"].config.hidden_size,
        sample_size=16,
    )
    return TextToVideoSDPipeline(**{**parts, "unet": unet})


def ddpm(make: Maker) -> Any:
    """Nothing but an unconditional UNet."""
    from diffusers import DDPMPipeline, DDPMScheduler, UNet2DModel

    unet = make(
        "unet",
        UNet2DModel,
        **CHANNELS,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        sample_size=32,
    )
    return DDPMPipeline(unet=unet, scheduler=DDPMScheduler())


def cascade_prior(make: Maker) -> Any:
    """Stages are lists of lists whose own forward is never called; layers are told apart by their class."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadePriorPipeline

    tokenizer, text_encoder = clip(make, "text_encoder", "clip-g", projection=True)
    width = text_encoder.config.hidden_size
    prior = cascade_unet(
        make,
        "prior",
        clip_image_in_channels=32,
        clip_text_in_channels=width,
        clip_text_pooled_in_channels=width,
    )
    return StableCascadePriorPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        image_encoder=vision(make),
        feature_extractor=image_processor(),
        prior=prior,
        scheduler=DDPMWuerstchenScheduler(),
        resolution_multiple=8.0,
    )


def cascade_decoder(make: Maker) -> Any:
    """As the prior, with layers repeated through mappers, and a quantising autoencoder."""
    from diffusers import DDPMWuerstchenScheduler, StableCascadeDecoderPipeline
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    tokenizer, text_encoder = clip(make, "text_encoder", "clip-g", projection=True)
    decoder = cascade_unet(
        make,
        "decoder",
        in_channels=4,
        out_channels=4,
        patch_size=2,
        clip_text_pooled_in_channels=text_encoder.config.hidden_size,
        effnet_in_channels=16,
        pixel_mapper_in_channels=3,
        down_blocks_repeat_mappers=(1, 2),
        up_blocks_repeat_mappers=(2, 1),
        timestep_conditioning_type=("sca",),
    )
    return StableCascadeDecoderPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        decoder=decoder,
        vqgan=make(
            "vqgan", PaellaVQModel, bottleneck_blocks=3, embed_dim=16, num_vq_embeddings=32, scale_factor=0.02
        ),
        scheduler=DDPMWuerstchenScheduler(),
        latent_dim_scale=8,
    )


def cascade_unet(make: Maker, role: str, **config: Any) -> Any:
    from diffusers.models import StableCascadeUNet

    shape = {
        "timestep_ratio_embedding_dim": 16,
        "conditioning_dim": 32,
        "block_out_channels": (32, 32),
        "num_attention_heads": (2, 2),
        "down_num_layers_per_block": (3, 4),
        "up_num_layers_per_block": (4, 3),
    }
    return make(role, StableCascadeUNet, **{**shape, **config})


def cascade_embeddings() -> dict[str, Any]:
    """What the decoder takes from the prior."""
    embeddings = torch.randn(1, 16, 4, 4, generator=torch.Generator().manual_seed(7))
    return {**PROMPT, **STEPS, "image_embeddings": embeddings, "guidance_scale": 2.0}


def inpaint_call() -> dict[str, Any]:
    return {**IMAGE, "image": picture(), "mask_image": mask(), "strength": 1.0}


def svd_call() -> dict[str, Any]:
    frames = {"height": 32, "width": 48, "num_frames": 4, "decode_chunk_size": 2}
    return {"image": picture(32, 48), **frames, **STEPS}


UNETS = {
    "sd": Entry(sd, {**IMAGE, "guidance_scale": 5.0}),
    "sd-inpaint": Entry(sd_inpaint, inpaint_call),
    "sdxl-ip-adapter": Entry(
        sdxl_ip_adapter, lambda: {**IMAGE, "guidance_scale": 5.0, "ip_adapter_image": picture()}
    ),
    "svd": Entry(svd, svd_call),
    "animatediff": Entry(animatediff, {**VIDEO, "num_frames": 4}),
    "text-to-video": Entry(text_to_video, {**VIDEO, "num_frames": 4}),
    "ddpm": Entry(ddpm, {"num_inference_steps": 2, "output_type": "np"}),
    "cascade-prior": Entry(
        cascade_prior, lambda: {**PROMPT, "images": [picture()], "height": 64, "width": 64, **STEPS}
    ),
    "cascade-decoder": Entry(cascade_decoder, cascade_embeddings),
}

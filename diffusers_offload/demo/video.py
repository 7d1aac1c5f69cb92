"""Recipes of the pipelines that make videos."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .maker import Maker, Recipe
from .text import clip, llama, t5
from .vaes import cogvideox_vae, hunyuan_vae, ltx_vae, wan_vae

if TYPE_CHECKING:
    import diffusers

Config = dict[str, Any]

TINY = {"height": 32, "width": 48, "num_frames": 9, "num_inference_steps": 2}
FULL = {"height": 480, "width": 832, "num_frames": 17, "num_inference_steps": 4}
NEGATIVE = {"negative_prompt": "a grey wall"}
HEADS = {"num_attention_heads": 3, "attention_head_dim": 16}


def wan(make: Maker, config: Config) -> diffusers.WanPipeline:
    from diffusers import WanPipeline

    parts, _ = wan_parts(make, config)
    return WanPipeline(**parts)


def wan22(make: Maker, config: Config) -> diffusers.WanPipeline:
    from diffusers import WanPipeline, WanTransformer3DModel

    parts, shape = wan_parts(make, config)
    expert = make("transformer_2", WanTransformer3DModel, **shape)
    # Wan 2.2's own boundary: the shifted schedule crosses it after the first of two to four steps.
    return WanPipeline(**parts, transformer_2=expert, boundary_ratio=0.875)


def wan_parts(make: Maker, config: Config) -> tuple[dict[str, Any], Config]:
    """The components of Wan 2.1, by name, and the transformer's whole config."""
    from diffusers import UniPCMultistepScheduler, WanTransformer3DModel

    tokenizer, text_encoder = t5(make, "text_encoder", "umt5")
    shape = {"text_dim": text_encoder.config.d_model, **config}
    scheduler = UniPCMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": make("transformer", WanTransformer3DModel, **shape),
        "vae": wan_vae(make),
        "scheduler": scheduler,
    }
    return parts, shape


def cogvideox(make: Maker, config: Config) -> diffusers.CogVideoXPipeline:
    from diffusers import CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        CogVideoXTransformer3DModel,
        text_embed_dim=text_encoder.config.d_model,
        use_rotary_positional_embeddings=True,
        **config,
    )
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=1.0,
        timestep_spacing="trailing",
    )
    return CogVideoXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=cogvideox_vae(make, config["in_channels"]),
        scheduler=scheduler,
    )


def ltx(make: Maker, config: Config) -> diffusers.LTXPipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        LTXVideoTransformer3DModel,
        cross_attention_dim=config["num_attention_heads"] * config["attention_head_dim"],
        caption_channels=text_encoder.config.d_model,
        **config,
    )
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=1024,
        base_shift=0.95,
        max_image_seq_len=4096,
        max_shift=2.05,
        shift_terminal=0.1,
        use_dynamic_shifting=True,
    )
    return LTXPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=ltx_vae(make, config["in_channels"]),
        scheduler=scheduler,
    )


def hunyuanvideo(make: Maker, config: Config) -> diffusers.HunyuanVideoPipeline:
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )

    tokenizer, text_encoder = llama(make, "text_encoder")
    tokenizer_2, text_encoder_2 = clip(make, "text_encoder_2")
    transformer = make(
        "transformer",
        HunyuanVideoTransformer3DModel,
        text_embed_dim=text_encoder.config.hidden_size,
        pooled_projection_dim=text_encoder_2.config.hidden_size,
        **config,
    )
    return HunyuanVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        transformer=transformer,
        vae=hunyuan_vae(make, config["in_channels"]),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


WAN_DENOISER = {
    "tiny": {
        "num_layers": 4,
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "ffn_dim": 96,
        "freq_dim": 32,
        "rope_max_seq_len": 32,
    },
    "full": {
        "num_layers": 40,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "freq_dim": 256,
    },
}
WAN_CALL = {
    "tiny": {**TINY, **NEGATIVE, "guidance_scale": 5.0, "max_sequence_length": 32},
    "full": {**FULL, **NEGATIVE, "guidance_scale": 5.0},
}

# The full one is CogVideoX 5B.
COGVIDEOX_DENOISER = {
    "tiny": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "time_embed_dim": 16,
        "sample_width": 6,
        "sample_height": 4,
        "sample_frames": 9,
    },
    "full": {"in_channels": 16, "num_attention_heads": 48, "attention_head_dim": 64, "num_layers": 42},
}
COGVIDEOX_CALL = {
    "tiny": {**TINY, **NEGATIVE, "guidance_scale": 6.0, "max_sequence_length": 32},
    "full": {**FULL, **NEGATIVE, "width": 720, "guidance_scale": 6.0},
}

LTX_DENOISER = {
    "tiny": {**HEADS, "in_channels": 8, "out_channels": 8, "num_layers": 4},
    "full": {"in_channels": 128, "num_attention_heads": 32, "attention_head_dim": 64, "num_layers": 28},
}
# Latents are 32 times smaller, so the tiny video is larger than the others.
LTX_CALL = {
    "tiny": {**TINY, **NEGATIVE, "height": 64, "width": 96, "guidance_scale": 3.0, "max_sequence_length": 32},
    "full": {**FULL, **NEGATIVE, "guidance_scale": 3.0},
}

HUNYUAN_DENOISER = {
    "tiny": {
        **HEADS,
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 3,
        "num_single_layers": 4,
        "num_refiner_layers": 3,
        "rope_axes_dim": (4, 6, 6),
    },
    "full": {"in_channels": 16, "num_layers": 20, "num_single_layers": 40},
}
HUNYUAN_CALL = {
    "tiny": {**TINY, "guidance_scale": 6.0, "max_sequence_length": 32},
    "full": {**FULL, "guidance_scale": 6.0},
}

VIDEO = {
    "wan": Recipe(wan, WAN_DENOISER, WAN_CALL),
    "wan22": Recipe(wan22, WAN_DENOISER, WAN_CALL),
    "cogvideox": Recipe(cogvideox, COGVIDEOX_DENOISER, COGVIDEOX_CALL),
    "ltx": Recipe(ltx, LTX_DENOISER, LTX_CALL),
    "hunyuanvideo": Recipe(hunyuanvideo, HUNYUAN_DENOISER, HUNYUAN_CALL),
}

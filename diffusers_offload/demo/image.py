"""Recipes of the pipelines that make images."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .maker import Maker, Recipe
from .text import clip, gemma, qwen, t5
from .vaes import dc_vae, kl_vae, qwen_vae

if TYPE_CHECKING:
    import diffusers

Config = dict[str, Any]

TINY = {"height": 48, "width": 64, "num_inference_steps": 2}
FULL = {"height": 1024, "width": 1024, "num_inference_steps": 4}
NEGATIVE = {"negative_prompt": "a grey wall"}

# The rotary axes must add up to the head dimension.
TINY_JOINT = {"attention_head_dim": 16, "num_attention_heads": 3, "axes_dims_rope": (4, 6, 6)}
FULL_JOINT = {"attention_head_dim": 128, "num_attention_heads": 24, "axes_dims_rope": (16, 56, 56)}


def flux(make: Maker, config: Config) -> diffusers.FluxPipeline:
    from diffusers import FluxPipeline

    parts, _ = flux_parts(make, config)
    return FluxPipeline(**parts)


def flux_controlnet(make: Maker, config: Config) -> diffusers.FluxControlNetPipeline:
    from diffusers import FluxControlNetModel, FluxControlNetPipeline

    parts, shape = flux_parts(make, config)
    # Each controlnet block serves equally many transformer blocks in a row, rounded up: of 3 single blocks
    # for the transformer's 4, the last would serve none.
    double, single = {"tiny": (3, 4), "full": (5, 10)}[make.size]
    shape = {**shape, "num_layers": double, "num_single_layers": single}
    return FluxControlNetPipeline(**parts, controlnet=make("controlnet", FluxControlNetModel, **shape))


def flux_parts(make: Maker, config: Config) -> tuple[dict[str, Any], Config]:
    """The components of Flux, by name, and the transformer's whole config."""
    from diffusers import FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel

    tokenizer, text_encoder = clip(make, "text_encoder")
    tokenizer_2, text_encoder_2 = t5(make, "text_encoder_2")
    shape = {
        "joint_attention_dim": text_encoder_2.config.d_model,
        "pooled_projection_dim": text_encoder.config.hidden_size,
        "guidance_embeds": True,
        **config,
    }
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
        "transformer": make("transformer", FluxTransformer2DModel, **shape),
        "vae": flow_vae(make, shape["in_channels"] // 4, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True),
    }
    return parts, shape


def sd3(make: Maker, config: Config) -> diffusers.StableDiffusion3Pipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline

    tokenizer, text_encoder = clip(make, "text_encoder", projection=True)
    tokenizer_2, text_encoder_2 = clip(make, "text_encoder_2", "clip-g", projection=True)
    tokenizer_3, text_encoder_3 = t5(make, "text_encoder_3")
    pooled = text_encoder.config.projection_dim + text_encoder_2.config.projection_dim
    transformer = make(
        "transformer",
        SD3Transformer2DModel,
        joint_attention_dim=text_encoder_3.config.d_model,
        pooled_projection_dim=pooled,
        qk_norm="rms_norm",
        **config,
    )
    return StableDiffusion3Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        tokenizer_3=tokenizer_3,
        text_encoder_3=text_encoder_3,
        transformer=transformer,
        vae=flow_vae(make, config["in_channels"], scaling_factor=1.5305, shift_factor=0.0609),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def flow_vae(make: Maker, latent_channels: int, **config: Any) -> diffusers.AutoencoderKL:
    """The autoencoder without the 1x1 convolutions around the latents."""
    return kl_vae(make, latent_channels, use_quant_conv=False, use_post_quant_conv=False, **config)


def sdxl(make: Maker, config: Config) -> diffusers.StableDiffusionXLPipeline:
    from diffusers import StableDiffusionXLPipeline

    parts, _ = sdxl_parts(make, config)
    return StableDiffusionXLPipeline(**parts, add_watermarker=False)


def sdxl_controlnet(make: Maker, config: Config) -> diffusers.StableDiffusionXLControlNetPipeline:
    from diffusers import ControlNetModel, StableDiffusionXLControlNetPipeline

    parts, shape = sdxl_parts(make, config)
    # One entry more than halvings: the control image shrinks as the autoencoder shrinks images.
    embedding = {"tiny": (8, 16, 16), "full": (16, 32, 96, 256)}[make.size]
    shape = {key: value for key, value in shape.items() if key not in ("up_block_types", "sample_size")}
    controlnet = make("controlnet", ControlNetModel, conditioning_embedding_out_channels=embedding, **shape)
    return StableDiffusionXLControlNetPipeline(**parts, controlnet=controlnet, add_watermarker=False)


def sdxl_parts(make: Maker, config: Config) -> tuple[dict[str, Any], Config]:
    """The components of SDXL, by name, and the UNet's whole config."""
    from diffusers import EulerDiscreteScheduler, UNet2DConditionModel

    tokenizer, text_encoder = clip(make, "text_encoder")
    tokenizer_2, text_encoder_2 = clip(make, "text_encoder_2", "clip-g", projection=True)
    shape = {
        "in_channels": 4,
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        "layers_per_block": 2,
        "use_linear_projection": True,
        "cross_attention_dim": text_encoder.config.hidden_size + text_encoder_2.config.hidden_size,
        "addition_embed_type": "text_time",
        # The pooled text beside six numbers: original size, crop and target size.
        "projection_class_embeddings_input_dim": text_encoder_2.config.projection_dim
        + 6 * config["addition_time_embed_dim"],
        **config,
    }
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        steps_offset=1,
        timestep_spacing="leading",
    )
    parts = {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "tokenizer_2": tokenizer_2,
        "text_encoder_2": text_encoder_2,
        "unet": make("unet", UNet2DConditionModel, **shape),
        "vae": kl_vae(make, shape["in_channels"], scaling_factor=0.13025),
        "scheduler": scheduler,
    }
    return parts, shape


def qwenimage(make: Maker, config: Config) -> diffusers.QwenImagePipeline:
    from diffusers import FlowMatchEulerDiscreteScheduler, QwenImagePipeline, QwenImageTransformer2DModel

    tokenizer, text_encoder = qwen(make, "text_encoder")
    width = text_encoder.config.text_config.hidden_size
    scheduler = FlowMatchEulerDiscreteScheduler(
        base_image_seq_len=256,
        base_shift=0.5,
        max_image_seq_len=8192,
        max_shift=0.9,
        shift_terminal=0.02,
        use_dynamic_shifting=True,
    )
    return QwenImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=make("transformer", QwenImageTransformer2DModel, joint_attention_dim=width, **config),
        vae=qwen_vae(make),
        scheduler=scheduler,
    )


def pixart(make: Maker, config: Config) -> diffusers.PixArtSigmaPipeline:
    from diffusers import DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        PixArtTransformer2DModel,
        cross_attention_dim=config["num_attention_heads"] * config["attention_head_dim"],
        caption_channels=text_encoder.config.d_model,
        use_additional_conditions=False,
        **config,
    )
    return PixArtSigmaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=kl_vae(make, transformer.config.in_channels, scaling_factor=0.13025),
        scheduler=DPMSolverMultistepScheduler(),
    )


def sana(make: Maker, config: Config) -> diffusers.SanaPipeline:
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline, SanaTransformer2DModel

    tokenizer, text_encoder = gemma(make, "text_encoder")
    width = text_encoder.config.hidden_size
    scheduler = DPMSolverMultistepScheduler(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0
    )
    return SanaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=make("transformer", SanaTransformer2DModel, caption_channels=width, **config),
        vae=dc_vae(make, config["in_channels"]),
        scheduler=scheduler,
    )


FLUX_DENOISER = {
    "tiny": {"in_channels": 16, "num_layers": 3, "num_single_layers": 4, **TINY_JOINT},
    "full": {"in_channels": 64, "num_layers": 19, "num_single_layers": 38, **FULL_JOINT},
}
FLUX_CALL = {
    "tiny": {**TINY, "guidance_scale": 3.5, "max_sequence_length": 32},
    "full": {**FULL, "guidance_scale": 3.5},
}

SDXL_DENOISER = {
    "tiny": {
        "block_out_channels": (16, 32, 48),
        "transformer_layers_per_block": (1, 3, 4),
        "attention_head_dim": (1, 2, 3),
        "addition_time_embed_dim": 8,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    "full": {
        "block_out_channels": (320, 640, 1280),
        "transformer_layers_per_block": (1, 2, 10),
        "attention_head_dim": (5, 10, 20),
        "addition_time_embed_dim": 256,
        "norm_num_groups": 32,
        "sample_size": 128,
    },
}
SDXL_CALL = {
    "tiny": {**TINY, **NEGATIVE, "guidance_scale": 5.0},
    "full": {**FULL, **NEGATIVE, "guidance_scale": 5.0},
}

# Stable Diffusion 3.5: the full one is the large, whose blocks are all of one kind; in the tiny one the first
# block has a second attention, as in the medium.
SD3_DENOISER = {
    "tiny": {
        "in_channels": 4,
        "out_channels": 4,
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "caption_projection_dim": 48,
        "sample_size": 16,
        "pos_embed_max_size": 24,
        "dual_attention_layers": (0,),
    },
    "full": {
        "in_channels": 16,
        "out_channels": 16,
        "num_layers": 38,
        "num_attention_heads": 38,
        "attention_head_dim": 64,
        "caption_projection_dim": 2432,
        "sample_size": 128,
        "pos_embed_max_size": 192,
    },
}
SD3_CALL = {
    "tiny": {**TINY, **NEGATIVE, "guidance_scale": 7.0, "max_sequence_length": 32},
    "full": {**FULL, **NEGATIVE, "guidance_scale": 7.0},
}

QWEN_DENOISER = {
    "tiny": {"num_layers": 4, **TINY_JOINT},
    "full": {"num_layers": 60, **FULL_JOINT},
}
QWEN_CALL = {
    "tiny": {**TINY, **NEGATIVE, "true_cfg_scale": 4.0},
    "full": {**FULL, **NEGATIVE, "true_cfg_scale": 4.0},
}

PIXART_DENOISER = {
    "tiny": {
        "num_layers": 4,
        "num_attention_heads": 3,
        "attention_head_dim": 16,
        "norm_num_groups": 8,
        "sample_size": 16,
    },
    "full": {
        "num_layers": 28,
        "num_attention_heads": 16,
        "attention_head_dim": 72,
        "sample_size": 128,
        "interpolation_scale": 2,
    },
}
# Cleaning captions needs packages beyond Diffusers' own, and the resolution bins begin at 256 pixels.
PIXART_CALL = {
    "tiny": {
        **TINY,
        **NEGATIVE,
        "guidance_scale": 4.5,
        "max_sequence_length": 32,
        "clean_caption": False,
        "use_resolution_binning": False,
    },
    "full": {**FULL, **NEGATIVE, "guidance_scale": 4.5, "clean_caption": False},
}

SANA_DENOISER = {
    "tiny": {
        "in_channels": 8,
        "out_channels": 8,
        "num_layers": 4,
        "num_attention_heads": 6,
        "attention_head_dim": 8,
        "num_cross_attention_heads": 3,
        "cross_attention_head_dim": 16,
        "cross_attention_dim": 48,
        "sample_size": 16,
    },
    "full": {"in_channels": 32, "num_layers": 20},
}
# The sides must be multiples of 32, and the resolution bins begin at 512 pixels.
SANA_CALL = {
    "tiny": {
        **TINY,
        "height": 32,
        **NEGATIVE,
        "guidance_scale": 4.5,
        "max_sequence_length": 32,
        "use_resolution_binning": False,
    },
    "full": {**FULL, **NEGATIVE, "guidance_scale": 4.5},
}

IMAGE = {
    "flux": Recipe(flux, FLUX_DENOISER, FLUX_CALL),
    "sd3": Recipe(sd3, SD3_DENOISER, SD3_CALL),
    "sdxl": Recipe(sdxl, SDXL_DENOISER, SDXL_CALL),
    "qwenimage": Recipe(qwenimage, QWEN_DENOISER, QWEN_CALL),
    "pixart": Recipe(pixart, PIXART_DENOISER, PIXART_CALL),
    "sana": Recipe(sana, SANA_DENOISER, SANA_CALL),
    "flux-controlnet": Recipe(flux_controlnet, FLUX_DENOISER, FLUX_CALL, control="control_image"),
    "sdxl-controlnet": Recipe(sdxl_controlnet, SDXL_DENOISER, SDXL_CALL, control="image"),
}

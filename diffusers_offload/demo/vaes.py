"""Autoencoders: always small, with as many latent channels as the denoiser works on."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .maker import Maker

if TYPE_CHECKING:
    import diffusers


def kl_vae(make: Maker, latent_channels: int, **config: Any) -> diffusers.AutoencoderKL:
    """The image autoencoder of Stable Diffusion and Flux; tiny 4x, full 8x smaller latents."""
    from diffusers import AutoencoderKL

    channels = {"tiny": (16, 16, 32), "full": (32, 32, 64, 64)}[make.size]
    return make(
        "vae",
        AutoencoderKL,
        latent_channels=latent_channels,
        block_out_channels=channels,
        down_block_types=("DownEncoderBlock2D",) * len(channels),
        up_block_types=("UpDecoderBlock2D",) * len(channels),
        layers_per_block=2,
        norm_num_groups=8,
        **config,
    )


def wan_vae(make: Maker) -> diffusers.AutoencoderKLWan:
    """8x8 smaller latents of 16 channels, one for every 4 frames after the first."""
    from diffusers import AutoencoderKLWan

    return make("vae", AutoencoderKLWan, base_dim=8, num_res_blocks=1)


def qwen_vae(make: Maker) -> diffusers.AutoencoderKLQwenImage:
    """8x8 smaller latents of 16 channels."""
    from diffusers import AutoencoderKLQwenImage

    return make("vae", AutoencoderKLQwenImage, base_dim=8, num_res_blocks=1)


def cogvideox_vae(make: Maker, latent_channels: int) -> diffusers.AutoencoderKLCogVideoX:
    """8x8 smaller latents, one for every 4 frames after the first."""
    from diffusers import AutoencoderKLCogVideoX

    return make(
        "vae",
        AutoencoderKLCogVideoX,
        latent_channels=latent_channels,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
        scaling_factor=0.7,
    )


def ltx_vae(make: Maker, latent_channels: int) -> diffusers.AutoencoderKLLTXVideo:
    """32x32 smaller latents, one for every 8 frames after the first."""
    from diffusers import AutoencoderKLLTXVideo

    channels, repeats = (8, 16, 16, 16), (1, 1, 1, 1, 1)
    return make(
        "vae",
        AutoencoderKLLTXVideo,
        latent_channels=latent_channels,
        block_out_channels=channels,
        decoder_block_out_channels=channels,
        layers_per_block=repeats,
        decoder_layers_per_block=repeats,
    )


def hunyuan_vae(make: Maker, latent_channels: int) -> diffusers.AutoencoderKLHunyuanVideo:
    """8x8 smaller latents, one for every 4 frames after the first."""
    from diffusers import AutoencoderKLHunyuanVideo

    return make(
        "vae",
        AutoencoderKLHunyuanVideo,
        latent_channels=latent_channels,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        norm_num_groups=4,
    )


def dc_vae(make: Maker, latent_channels: int) -> diffusers.AutoencoderDC:
    """The deep-compression autoencoder of Sana; tiny 4x, full 32x smaller latents."""
    from diffusers import AutoencoderDC

    stages = {"tiny": 3, "full": 6}[make.size]
    channels = (latent_channels,) * stages
    types = ("ResBlock",) * (stages - 2) + ("EfficientViTBlock",) * 2
    scales = ((),) * (stages - 2) + ((5,),) * 2
    config: dict[str, Any] = {}
    for side in ("encoder", "decoder"):
        config[f"{side}_block_types"] = types
        config[f"{side}_block_out_channels"] = channels
        config[f"{side}_layers_per_block"] = (1,) * stages
        config[f"{side}_qkv_multiscales"] = scales
    return make(
        "vae",
        AutoencoderDC,
        latent_channels=latent_channels,
        attention_head_dim=8,
        scaling_factor=0.41407,
        **config,
    )

"""Transformers that make videos, and the autoencoders of theirs that the demo does not have."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch

from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import clip, gemma, layers, qwen, special_ids, t5
from diffusers_offload.demo.tokenizers import qwen_tokenizer
from diffusers_offload.demo.vaes import cogvideox_vae, hunyuan_vae, kl_vae, wan_vae
from diffusers_offload.demo.video import WAN_DENOISER, wan_parts

from .image import CHAT, HEADS, PLAIN
from .parts import VIDEO, Entry, image_processor, picture, vision


def without_ftfy(pipeline: Any) -> Any:
    """The class `pipeline`, whose module calls a package that it imports only where it is installed."""
    module = sys.modules[pipeline.__module__]
    if not hasattr(module, "ftfy"):
        module.ftfy = SimpleNamespace(fix_text=str)
    return pipeline


def latte(make: Maker) -> Any:
    """Two lists of blocks, spatial and temporal, run in turns."""
    from diffusers import DDIMScheduler, LattePipeline, LatteTransformer3DModel

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        LatteTransformer3DModel,
        **HEADS,
        in_channels=4,
        out_channels=8,
        num_layers=4,
        cross_attention_dim=48,
        attention_bias=True,
        sample_size=8,
        patch_size=2,
        activation_fn="gelu-approximate",
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_single",
        norm_elementwise_affine=False,
        caption_channels=text_encoder.config.d_model,
        video_length=4,
    )
    return LattePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=kl_vae(make, 4),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def allegro(make: Maker) -> Any:
    """An autoencoder that tiles always, so that its stages run many times a call."""
    from diffusers import (
        AllegroPipeline,
        AllegroTransformer3DModel,
        AutoencoderKLAllegro,
        EulerAncestralDiscreteScheduler,
    )

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        AllegroTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=24,
        num_layers=4,
        cross_attention_dim=48,
        sample_width=8,
        sample_height=8,
        sample_frames=8,
        caption_channels=text_encoder.config.d_model,
    )
    vae = make(
        "vae",
        AutoencoderKLAllegro,
        block_out_channels=(8, 8, 8, 8),
        layers_per_block=1,
        norm_num_groups=2,
        sample_size=64,
    )
    vae.kernel, vae.stride = (8, 32, 32), (4, 16, 16)  # of tiles; the pixels left are where they overlap
    vae.tile_overlap_t, vae.tile_overlap_h, vae.tile_overlap_w = 4, 16, 16
    vae.enable_tiling()
    return AllegroPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=EulerAncestralDiscreteScheduler(),
    )


def mochi(make: Maker) -> Any:
    """The last block is of another size: its context ends there."""
    from diffusers import (
        AutoencoderKLMochi,
        FlowMatchEulerDiscreteScheduler,
        MochiPipeline,
        MochiTransformer3DModel,
    )

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        MochiTransformer3DModel,
        **HEADS,
        num_layers=4,
        pooled_projection_dim=24,
        text_embed_dim=text_encoder.config.d_model,
        time_embed_dim=16,
        max_sequence_length=32,
    )
    vae = make(
        "vae",
        AutoencoderKLMochi,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    return MochiPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, invert_sigmas=True),
    )


def wan_vace(make: Maker) -> Any:
    """The control blocks run before the others, and their first is larger."""
    from diffusers import WanVACEPipeline, WanVACETransformer3DModel

    parts, shape = wan_parts(make, {**WAN_DENOISER["tiny"], "in_channels": 16})
    config = {**shape, "vace_layers": [0, 1, 3], "vace_in_channels": 96}
    return without_ftfy(WanVACEPipeline)(
        **{**parts, "transformer": make("transformer", WanVACETransformer3DModel, **config)}
    )


def wan_image_to_video(make: Maker) -> Any:
    """A picture tower whose inner state is used, and attention to it in every block."""
    from diffusers import WanImageToVideoPipeline

    extra = {"in_channels": 36, "out_channels": 16, "image_dim": 32, "added_kv_proj_dim": 48}
    parts, _ = wan_parts(make, {**WAN_DENOISER["tiny"], **extra})
    return without_ftfy(WanImageToVideoPipeline)(
        **parts, image_encoder=vision(make, projection=None), image_processor=image_processor()
    )


def wan_animate(make: Maker) -> Any:
    """Blocks and face adapters in turns; a motion encoder that runs many times a forward."""
    from diffusers import WanAnimatePipeline, WanAnimateTransformer3DModel

    parts, shape = wan_parts(make, WAN_DENOISER["tiny"])
    config = {
        **shape,
        "num_layers": 6,
        "image_dim": 32,
        "motion_encoder_channel_sizes": {"4": 8, "8": 8, "16": 8, "32": 8},
        "motion_encoder_size": 32,
        "motion_style_dim": 8,
        "motion_dim": 4,
        "motion_encoder_dim": 16,
        "face_encoder_hidden_dim": 16,
        "face_encoder_num_heads": 2,
        "inject_face_latents_blocks": 2,
    }
    transformer = make("transformer", WanAnimateTransformer3DModel, **config)
    return without_ftfy(WanAnimatePipeline)(
        **{**parts, "transformer": transformer},
        image_encoder=vision(make, projection=None),
        image_processor=image_processor(),
    )


def skyreels(make: Maker) -> Any:
    """A relative of Wan, with a table of frame rates."""
    from diffusers import SkyReelsV2Pipeline, SkyReelsV2Transformer3DModel, UniPCMultistepScheduler

    parts, shape = wan_parts(make, WAN_DENOISER["tiny"])
    parts["transformer"] = make("transformer", SkyReelsV2Transformer3DModel, **shape)
    parts["scheduler"] = UniPCMultistepScheduler(flow_shift=8.0, use_flow_sigmas=True)
    return without_ftfy(SkyReelsV2Pipeline)(**parts)


def sana_video(make: Maker) -> Any:
    """Linear attention, with parameters of the block beside its parts."""
    from diffusers import FlowMatchEulerDiscreteScheduler, SanaVideoPipeline, SanaVideoTransformer3DModel

    tokenizer, text_encoder = gemma(make, "text_encoder")
    transformer = make(
        "transformer",
        SanaVideoTransformer3DModel,
        num_attention_heads=2,
        attention_head_dim=12,
        num_layers=4,
        num_cross_attention_heads=2,
        cross_attention_head_dim=12,
        cross_attention_dim=24,
        caption_channels=text_encoder.config.hidden_size,
        sample_size=8,
        rope_max_seq_len=32,
    )
    return SanaVideoPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=wan_vae(make),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=8.0),
    )


def easyanimate(make: Maker) -> Any:
    """Two streams whose last block is smaller; the pipeline asks the text encoder for its device."""
    from diffusers import (
        AutoencoderKLMagvit,
        EasyAnimatePipeline,
        EasyAnimateTransformer3DModel,
        FlowMatchEulerDiscreteScheduler,
    )
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    shape = layers(make, "qwen", 4)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    sections = [head // 8, 3 * head // 16, 3 * head // 16]
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
    config = Qwen2VLConfig(
        text_config={**shape, **special_ids(tokenizer), "rope_parameters": rope},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": shape["hidden_size"]},
        tie_word_embeddings=False,
    )
    transformer = make(
        "transformer",
        EasyAnimateTransformer3DModel,
        **HEADS,
        in_channels=16,
        out_channels=16,
        patch_size=2,
        sample_width=6,
        sample_height=4,
        num_layers=4,
        mmdit_layers=3,
        time_embed_dim=16,
        add_norm_text_encoder=True,
        text_embed_dim=shape["hidden_size"],
    )
    vae = make(
        "vae", AutoencoderKLMagvit, block_out_channels=[8, 8, 8, 16], layers_per_block=1, norm_num_groups=4
    )
    return EasyAnimatePipeline(
        tokenizer=tokenizer,
        text_encoder=make("text_encoder", Qwen2VLForConditionalGeneration, config),
        transformer=transformer,
        vae=vae,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def consisid(make: Maker) -> Any:
    """Lists of pairs whose members are called past the pair; adapters between the blocks."""
    from diffusers import CogVideoXDPMScheduler, ConsisIDTransformer3DModel
    from diffusers.pipelines.consisid.pipeline_consisid import ConsisIDPipeline

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        ConsisIDTransformer3DModel,
        **HEADS,
        in_channels=8,
        out_channels=4,
        time_embed_dim=16,
        text_embed_dim=text_encoder.config.d_model,
        num_layers=6,
        sample_width=6,
        sample_height=4,
        sample_frames=9,
        max_text_seq_length=32,
        use_rotary_positional_embeddings=True,
        is_train_face=True,
        cross_attn_interval=2,
        cross_attn_dim_head=8,
        cross_attn_num_heads=2,
        LFE_id_dim=16,
        LFE_vit_dim=16,
        LFE_depth=10,
        LFE_dim_head=8,
        LFE_num_heads=2,
        LFE_num_id_token=2,
        LFE_num_querie=4,
        LFE_output_dim=32,
        LFE_ff_mult=1,
        LFE_num_scale=5,
    )
    return ConsisIDPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=cogvideox_vae(make, 4),
        scheduler=CogVideoXDPMScheduler(prediction_type="v_prediction", timestep_spacing="trailing"),
    )


def consisid_call() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(5)
    faces = {
        "id_vit_hidden": [torch.randn(1, 4, 16, generator=generator) for _ in range(5)],
        "id_cond": torch.randn(1, 16, generator=generator),
    }
    return {**VIDEO, "image": picture(32, 48), **faces, "max_sequence_length": 32}


def kandinsky5(make: Maker) -> Any:
    """Blocks for the text before blocks for the video; the prompt's template is cut off its encoding."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Kandinsky5T2VPipeline, Kandinsky5Transformer3DModel

    tokenizer, text_encoder = qwen(make, "text_encoder")
    tokenizer_2, text_encoder_2 = clip(make, "text_encoder_2")
    transformer = make(
        "transformer",
        Kandinsky5Transformer3DModel,
        in_visual_dim=4,
        out_visual_dim=4,
        in_text_dim=text_encoder.config.text_config.hidden_size,
        in_text_dim2=text_encoder_2.config.hidden_size,
        time_dim=16,
        model_dim=32,
        ff_dim=64,
        num_text_blocks=3,
        num_visual_blocks=4,
        axes_dims=(4, 6, 6),
    )
    return Kandinsky5T2VPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        transformer=transformer,
        vae=hunyuan_vae(make, 4),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=5.0),
    )


def animate_call() -> dict[str, Any]:
    poses, faces = [picture(32, 48)] * 9, [picture(32, 32)] * 9
    call = {key: value for key, value in VIDEO.items() if key != "num_frames"}
    call |= {"image": picture(32, 48), "pose_video": poses, "face_video": faces, "max_sequence_length": 32}
    return {**call, "segment_frame_length": 9, "guidance_scale": 2.0}


SANA_CALL = {key: value for key, value in VIDEO.items() if key != "num_frames"}
LATTE_CALL = {**SANA_CALL, "height": 32, "width": 32}
TEXT = {"max_sequence_length": 32}

VIDEOS = {
    "latte": Entry(latte, {**LATTE_CALL, **PLAIN, "video_length": 4, "decode_chunk_size": 2}),
    "allegro": Entry(allegro, {**VIDEO, **PLAIN, **TEXT, "num_frames": 8}),
    "mochi": Entry(mochi, {**VIDEO, **TEXT, "num_frames": 7}),
    "wan-vace": Entry(wan_vace, lambda: {**VIDEO, **TEXT, "reference_images": [picture(32, 48)]}),
    "wan-image-to-video": Entry(wan_image_to_video, lambda: {**VIDEO, **TEXT, "image": picture(32, 48)}),
    "wan-animate": Entry(wan_animate, animate_call),
    "skyreels": Entry(skyreels, {**VIDEO, **TEXT}),
    "sana-video": Entry(
        sana_video, {**SANA_CALL, **TEXT, "width": 64, "frames": 9, "use_resolution_binning": False}
    ),
    "easyanimate": Entry(easyanimate, VIDEO, reads=("text_encoder.model.visual.patch_embed.proj.weight",)),
    "consisid": Entry(consisid, consisid_call),
    "kandinsky5": Entry(kandinsky5, {**VIDEO, **TEXT}),
}

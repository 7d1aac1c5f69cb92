"""Pipelines and models that run parts of a model past the forward of the whole."""

from __future__ import annotations

from typing import Any

from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import clip, qwen, special_ids
from diffusers_offload.demo.tokenizers import qwen_tokenizer
from diffusers_offload.demo.vaes import hunyuan_vae

from .control import flux2_vae
from .image import CHAT
from .parts import PROMPT, SIZE, STEPS, VIDEO, Entry, picture


def ideogram4(make: Maker) -> Any:
    """The pipeline walks the text encoder's layers itself; two transformers take turns; a head lies unused."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Ideogram4Pipeline,
        Ideogram4PromptEnhancerHead,
        Ideogram4Transformer2DModel,
    )
    from diffusers.pipelines.ideogram4.pipeline_ideogram4 import QWEN3_VL_ACTIVATION_LAYERS as TAPPED
    from transformers import Qwen3VLConfig, Qwen3VLModel

    tokenizer = qwen_tokenizer()
    tokenizer.chat_template = CHAT
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "num_key_value_heads": 1}
    text = {**shape, **special_ids(tokenizer), "num_hidden_layers": max(TAPPED) + 1, "head_dim": 16}
    seen = {"hidden_size": 16, "intermediate_size": 24, "depth": 2, "num_heads": 2, "out_hidden_size": 16}
    text_encoder = make("text_encoder", Qwen3VLModel, Qwen3VLConfig(text_config=text, vision_config=seen))
    config = {
        "in_channels": 16,
        "num_layers": 4,
        "attention_head_dim": 16,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "adaln_dim": 16,
        "llm_features_dim": len(TAPPED) * shape["hidden_size"],
        "rope_theta": 10_000,
        "mrope_section": (4, 2, 2),
    }
    roles = ("transformer", "unconditional_transformer")
    return Ideogram4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        **{role: make(role, Ideogram4Transformer2DModel, **config) for role in roles},
        prompt_enhancer_head=make(
            "prompt_enhancer_head",
            Ideogram4PromptEnhancerHead,
            hidden_size=shape["hidden_size"],
            vocab_size=len(tokenizer),
        ),
        vae=flux2_vae(make),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def kandinsky6(make: Maker) -> Any:
    """A block for video and one for sound within a block that calls their parts, never themselves."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        Kandinsky6TI2VAPipeline,
        Kandinsky6Transformer3DModel,
        MMAudioVAE,
        MMAudioVocoder,
    )

    tokenizer, text_encoder = qwen(make, "text_encoder")
    tokenizer_2, text_encoder_2 = clip(make, "text_encoder_2")
    transformer = make(
        "transformer",
        Kandinsky6Transformer3DModel,
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
        in_audio_dim=4,
        out_audio_dim=4,
        visual_token_type_num_embeddings=2,
    )
    audio_vae = make(
        "audio_vae",
        MMAudioVAE,
        mel_bins=8,
        latent_channels=4,
        hidden_channels=8,
        channel_multipliers=(1, 2),
        layers_per_block=2,
        sample_rate=64,
        n_fft=16,
        hop_length=4,
    )
    vocoder = make(
        "vocoder",
        MMAudioVocoder,
        num_mels=8,
        upsample_initial_channel=16,
        upsample_rates=(2, 2),
        upsample_kernel_sizes=(4, 4),
        resblock_kernel_sizes=(3,),
        resblock_dilation_sizes=((1, 3),),
    )
    return Kandinsky6TI2VAPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        transformer=transformer,
        vae=hunyuan_vae(make, 4),
        audio_vae=audio_vae,
        vocoder=vocoder,
        scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )


IDEOGRAM_CALL = {
    "prompt": PROMPT["prompt"],
    **SIZE,
    **STEPS,
    "guidance_scale": 4.0,
    "guidance_schedule": None,
    "max_sequence_length": 64,
}

BYPASS = {
    "ideogram4": Entry(
        ideogram4,
        IDEOGRAM_CALL,
        reads=("text_encoder.visual.patch_embed.proj.weight",),
    ),
    "kandinsky6": Entry(kandinsky6, lambda: {**VIDEO, "image": picture(32, 48), "max_sequence_length": 32}),
}

"""Pipelines that make sound."""

from __future__ import annotations

from typing import Any

from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import t5

from .parts import PROMPT, Entry


def stable_audio(make: Maker) -> Any:
    """Convolutions with weight norm, whose weights are computed from two others."""
    from diffusers import (
        AutoencoderOobleck,
        EDMDPMSolverMultistepScheduler,
        StableAudioDiTModel,
        StableAudioPipeline,
        StableAudioProjectionModel,
    )

    tokenizer, text_encoder = t5(make, "text_encoder")
    tokenizer.model_max_length = 32
    width = text_encoder.config.d_model
    transformer = make(
        "transformer",
        StableAudioDiTModel,
        sample_size=32,
        in_channels=8,
        out_channels=8,
        num_layers=4,
        attention_head_dim=16,
        num_attention_heads=4,
        num_key_value_attention_heads=2,
        cross_attention_dim=32,
        cross_attention_input_dim=32,
        time_proj_dim=16,
        global_states_input_dim=64,
    )
    vae = make(
        "vae",
        AutoencoderOobleck,
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2, 2, 4],
        channel_multiples=[1, 2, 2, 2],
        decoder_channels=8,
        decoder_input_channels=8,
        audio_channels=2,
        sampling_rate=64,
    )
    projection = make(
        "projection_model",
        StableAudioProjectionModel,
        text_encoder_dim=width,
        conditioning_dim=32,
        min_value=0,
        max_value=32,
    )
    return StableAudioPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        projection_model=projection,
        transformer=transformer,
        vae=vae,
        scheduler=EDMDPMSolverMultistepScheduler(solver_order=2, prediction_type="v_prediction"),
    )


SOUND = {
    "stable-audio": Entry(stable_audio, {**PROMPT, "num_inference_steps": 2, "audio_end_in_s": 6.0}),
}

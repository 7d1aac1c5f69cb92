"""Pipelines that make sound, alone or with a video."""

from __future__ import annotations

from typing import Any

from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import layers, special_ids, t5
from diffusers_offload.demo.tokenizers import byte_alphabet, gemma_tokenizer, numbered

from .parts import PROMPT, STEPS, VIDEO, Entry


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


def audioldm2(make: Maker) -> Any:
    """A text encoder of which one method runs, not its forward; a language model run token by token with a cache."""
    from diffusers import (
        AudioLDM2Pipeline,
        AudioLDM2ProjectionModel,
        AudioLDM2UNet2DConditionModel,
        AutoencoderKL,
        DDIMScheduler,
    )
    from transformers import GPT2Config, GPT2LMHeadModel, SpeechT5HifiGan, SpeechT5HifiGanConfig

    tokenizer, text_encoder = clap(make, "text_encoder")
    tokenizer_2, text_encoder_2 = t5(make, "text_encoder_2")
    shape = {"n_embd": 32, "n_head": 2, "n_layer": 4, "n_positions": 128, "vocab_size": 64}
    language_model = make("language_model", GPT2LMHeadModel, GPT2Config(**shape))
    language_model.config.max_new_tokens = 3
    unet = make(
        "unet",
        AudioLDM2UNet2DConditionModel,
        block_out_channels=(16, 32, 48),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=2,
        norm_num_groups=8,
        # In each layer attention to itself, to the generated states and to T5's.
        cross_attention_dim=((None, 32, 80), (None, 32, 80), (None, 32, 80)),
    )
    vae = make(
        "vae",
        AutoencoderKL,
        in_channels=1,
        out_channels=1,
        block_out_channels=(16, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        layers_per_block=2,
        latent_channels=4,
        norm_num_groups=8,
    )
    projection = make(
        "projection_model",
        AudioLDM2ProjectionModel,
        text_encoder_dim=text_encoder.config.projection_dim,
        text_encoder_1_dim=text_encoder_2.config.d_model,
        langauge_model_dim=shape["n_embd"],
    )
    vocoder = SpeechT5HifiGanConfig(
        model_in_dim=8,
        upsample_initial_channel=16,
        upsample_rates=[2, 2],
        upsample_kernel_sizes=[4, 4],
        resblock_kernel_sizes=[3, 7],
        resblock_dilation_sizes=[[1, 3], [1, 3]],
        normalize_before=False,
    )
    return AudioLDM2Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        feature_extractor=None,
        language_model=language_model,
        projection_model=projection,
        unet=unet,
        vae=vae,
        vocoder=make("vocoder", SpeechT5HifiGan, vocoder),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False),
    )


def clap(make: Maker, role: str) -> Any:
    """CLAP, whose tower for sound the pipeline does not run."""
    from transformers import ClapConfig, ClapModel, RobertaTokenizer

    tokens = RobertaTokenizer(
        numbered(["<s>", "<pad>", "</s>", "<unk>", "<mask>", *byte_alphabet()]),
        merges=[],
        model_max_length=64,
    )
    text = {**layers(make, "clip-l", 3), **special_ids(tokens), "max_position_embeddings": 80}
    sound = {
        "spec_size": 64,
        "window_size": 4,
        "num_mel_bins": 64,
        "depths": [2, 2],
        "num_attention_heads": [2, 2],
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "patch_embeds_hidden_size": 16,
        "patch_size": 4,
        "patch_stride": [4, 4],
    }
    config = ClapConfig(text_config=text, audio_config=sound, projection_dim=24)
    return tokens, make(role, ClapModel, config)


def ltx2(make: Maker) -> Any:
    """Two streams, video and sound, in one block; connectors, a second autoencoder and a vocoder beside them."""
    from diffusers import (
        AutoencoderKLLTX2Audio,
        AutoencoderKLLTX2Video,
        FlowMatchEulerDiscreteScheduler,
        LTX2Pipeline,
        LTX2VideoTransformer3DModel,
    )
    from diffusers.pipelines.ltx2 import LTX2TextConnectors
    from diffusers.pipelines.ltx2.vocoder import LTX2Vocoder

    tokenizer, text_encoder = gemma3(make, "text_encoder")
    text = text_encoder.config.text_config
    transformer = make(
        "transformer",
        LTX2VideoTransformer3DModel,
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        audio_in_channels=4,
        audio_out_channels=4,
        audio_num_attention_heads=2,
        audio_attention_head_dim=8,
        audio_cross_attention_dim=16,
        num_layers=4,
        caption_channels=text.hidden_size,
        rope_double_precision=False,
        rope_type="split",
    )
    connector = {
        "num_attention_heads": 2,
        "attention_head_dim": 24,
        "num_layers": 3,
        "num_learnable_registers": None,
    }
    connectors = make(
        "connectors",
        LTX2TextConnectors,
        caption_channels=text.hidden_size,
        text_proj_in_factor=text.num_hidden_layers + 1,
        **{
            f"{side}_connector_{key}": value
            for side in ("video", "audio")
            for key, value in connector.items()
        },
        connector_rope_base_seq_len=32,
        rope_theta=10000.0,
        rope_double_precision=False,
        causal_temporal_positioning=False,
        rope_type="split",
    )
    vae = make(
        "vae",
        AutoencoderKLLTX2Video,
        latent_channels=4,
        block_out_channels=(8,),
        decoder_block_out_channels=(8,),
        layers_per_block=(2,),
        decoder_layers_per_block=(2, 2),
        spatio_temporal_scaling=(True,),
        decoder_spatio_temporal_scaling=(True,),
        decoder_inject_noise=(False, False),
        downsample_type=("spatial",),
        upsample_residual=(False,),
        upsample_factor=(1,),
        patch_size=1,
        decoder_causal=False,
    )
    audio_vae = make(
        "audio_vae",
        AutoencoderKLLTX2Audio,
        base_channels=4,
        ch_mult=(1, 2),
        num_res_blocks=2,
        resolution=32,
        latent_channels=2,
        mel_bins=8,
    )
    vocoder = make(
        "vocoder",
        LTX2Vocoder,
        in_channels=16,
        hidden_channels=32,
        out_channels=2,
        upsample_kernel_sizes=[4, 4],
        upsample_factors=[2, 2],
        resnet_kernel_sizes=[3],
        resnet_dilations=[[1, 3, 5]],
        output_sampling_rate=16000,
    )
    return LTX2Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        connectors=connectors,
        transformer=transformer,
        vae=vae,
        audio_vae=audio_vae,
        vocoder=vocoder,
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def gemma3(make: Maker, role: str) -> Any:
    """Gemma 3 with its vision tower, which text alone does not run, and a head tied to the embedding."""
    from transformers import Gemma3Config, Gemma3ForConditionalGeneration

    tokens = gemma_tokenizer()
    shape = layers(make, "gemma", 4)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    text = {
        **shape,
        **special_ids(tokens),
        "head_dim": head,
        "query_pre_attn_scalar": head,
        "sliding_window": 16,
    }
    picture = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = Gemma3Config(text_config=text, vision_config={**picture, "image_size": 28, "patch_size": 14})
    return tokens, make(role, Gemma3ForConditionalGeneration, config)


LTX2_CALL = {
    **VIDEO,
    "height": 32,
    "width": 32,
    "num_frames": 5,
    "frame_rate": 25.0,
    "max_sequence_length": 32,
    "spatio_temporal_guidance_blocks": [1],  # which leave their attention out in one of the passes
}

SOUND = {
    "stable-audio": Entry(stable_audio, {**PROMPT, "num_inference_steps": 2, "audio_end_in_s": 6.0}),
    "audioldm2": Entry(audioldm2, {**PROMPT, **STEPS, "audio_length_in_s": 0.016}),
    "ltx2": Entry(ltx2, LTX2_CALL),
}

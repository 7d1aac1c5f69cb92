"""Transformers that make images."""

from __future__ import annotations

from typing import Any

from diffusers_offload.demo.image import pixart
from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import clip, gemma, layers, special_ids, t5
from diffusers_offload.demo.tokenizers import llama_tokenizer, numbered, printable, qwen_tokenizer
from diffusers_offload.demo.vaes import kl_vae

from .parts import IMAGE, NO_CHECKER, STEPS, Entry, flow_vae, vae_8x

HEADS = {"num_attention_heads": 3, "attention_head_dim": 16}
CHAT = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"


def dit(make: Maker) -> Any:
    """After its blocks the model uses the embedder within the first of them."""
    from diffusers import DDIMScheduler, DiTPipeline, DiTTransformer2DModel

    shape = {**HEADS, "in_channels": 4, "out_channels": 8, "num_layers": 4, "sample_size": 12}
    return DiTPipeline(
        transformer=make("transformer", DiTTransformer2DModel, **shape),
        vae=kl_vae(make, 4),
        scheduler=DDIMScheduler(clip_sample=False),
    )


def hunyuan_dit(make: Maker) -> Any:
    """Skips from the first half of the blocks to the second; a pooler that uses weights of its parts directly."""
    from diffusers import DDPMScheduler, HunyuanDiT2DModel, HunyuanDiTPipeline

    tokenizer, text_encoder = bert(make, "text_encoder")
    tokenizer_2, text_encoder_2 = t5(make, "text_encoder_2")
    transformer = make(
        "transformer",
        HunyuanDiT2DModel,
        **HEADS,
        in_channels=4,
        patch_size=2,
        sample_size=16,
        hidden_size=48,
        num_layers=6,
        cross_attention_dim=text_encoder.config.hidden_size,
        cross_attention_dim_t5=text_encoder_2.config.d_model,
        pooled_projection_dim=24,
        text_len=77,
        text_len_t5=256,
    )
    return HunyuanDiTPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        transformer=transformer,
        vae=vae_8x(make, 4, scaling_factor=0.13025),
        scheduler=DDPMScheduler(beta_schedule="scaled_linear", prediction_type="v_prediction"),
        **NO_CHECKER,
    )


def bert(make: Maker, role: str) -> Any:
    """BERT with its pooler, which the pipeline does not use."""
    from transformers import BertConfig, BertModel, BertTokenizer

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *printable(), *("##" + x for x in printable())]
    tokens = BertTokenizer(numbered(words), do_lower_case=False, model_max_length=77)
    shape = layers(make, "clip-l", 3)
    return tokens, make(role, BertModel, BertConfig(**shape, vocab_size=len(tokens), pad_token_id=0))


def pixart_alpha(make: Maker) -> Any:
    """As the demo's PixArt, with embeddings of the size, which is added to every block's modulation."""
    from diffusers import PixArtAlphaPipeline, PixArtTransformer2DModel

    parts = pixart(make, {**HEADS, "num_layers": 4, "norm_num_groups": 8, "sample_size": 16}).components
    # The pipeline gives the size to a model of this sample size alone.
    config = {**parts["transformer"].config, "use_additional_conditions": True, "sample_size": 128}
    config = {key: value for key, value in config.items() if not key.startswith("_")}
    return PixArtAlphaPipeline(
        **{**parts, "transformer": make("transformer", PixArtTransformer2DModel, **config)}
    )


def z_image(make: Maker) -> Any:
    """Refiners before the layers; layers in dictionaries by patch size; pad tokens are bare parameters."""
    from diffusers import ZImagePipeline

    return ZImagePipeline(**z_image_parts(make))


def z_image_parts(make: Maker) -> dict[str, Any]:
    """The components of Z-Image, by name."""
    from diffusers import FlowMatchEulerDiscreteScheduler, ZImageTransformer2DModel

    tokenizer, text_encoder = qwen3(make, "text_encoder")
    transformer = make(
        "transformer",
        ZImageTransformer2DModel,
        **Z_IMAGE,
        in_channels=16,
        n_layers=4,
        cap_feat_dim=text_encoder.config.hidden_size,
        axes_dims=[8, 4, 4],
        axes_lens=[256, 32, 32],
    )
    return {
        "tokenizer": tokenizer,
        "text_encoder": text_encoder,
        "transformer": transformer,
        "vae": flow_vae(make, 16, scaling_factor=0.3611, shift_factor=0.1159),
        "scheduler": FlowMatchEulerDiscreteScheduler(shift=3.0),
    }


Z_IMAGE = {"dim": 32, "n_heads": 2, "n_kv_heads": 2, "n_refiner_layers": 3}


def qwen3(make: Maker, role: str) -> Any:
    """Qwen 3 without its head."""
    from transformers import Qwen3Config, Qwen3Model

    tokens = qwen_tokenizer()
    tokens.chat_template = CHAT
    shape = layers(make, "qwen", 4)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    return tokens, make(role, Qwen3Model, Qwen3Config(**shape, **special_ids(tokens), head_dim=head))


def aura_flow(make: Maker) -> Any:
    """Few joint blocks, more single ones; learned register tokens."""
    from diffusers import AuraFlowPipeline, AuraFlowTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer, text_encoder = t5(make, "text_encoder", "umt5")
    transformer = make(
        "transformer",
        AuraFlowTransformer2DModel,
        **HEADS,
        sample_size=16,
        num_mmdit_layers=3,
        num_single_dit_layers=4,
        joint_attention_dim=text_encoder.config.d_model,
        caption_projection_dim=48,
        pos_embed_max_size=256,
    )
    return AuraFlowPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=kl_vae(make, 4, scaling_factor=0.13025),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=1.73),
    )


def lumina(make: Maker) -> Any:
    """Attention to the text gated by a parameter of the block itself."""
    from diffusers import FlowMatchEulerDiscreteScheduler, LuminaNextDiT2DModel, LuminaPipeline

    tokenizer, text_encoder = gemma(make, "text_encoder")
    transformer = make(
        "transformer",
        LuminaNextDiT2DModel,
        sample_size=16,
        hidden_size=48,
        num_layers=4,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        cross_attention_dim=text_encoder.config.hidden_size,
    )
    return LuminaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=kl_vae(make, 4, scaling_factor=0.13025),
        scheduler=FlowMatchEulerDiscreteScheduler(),
    )


def lumina2(make: Maker) -> Any:
    """The list declared second, that refines the text, runs first."""
    from diffusers import FlowMatchEulerDiscreteScheduler, Lumina2Pipeline, Lumina2Transformer2DModel

    tokenizer, text_encoder = gemma(make, "text_encoder")
    transformer = make(
        "transformer",
        Lumina2Transformer2DModel,
        sample_size=16,
        in_channels=4,
        hidden_size=48,
        num_layers=4,
        num_refiner_layers=3,
        num_attention_heads=3,
        num_kv_heads=1,
        multiple_of=16,
        axes_dim_rope=(8, 4, 4),
        axes_lens=(300, 32, 32),
        cap_feat_dim=text_encoder.config.hidden_size,
    )
    return Lumina2Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=flow_vae(make, 4, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=6.0),
    )


def chroma(make: Maker) -> Any:
    """Modulations of all blocks come from one small network, with a list of norms beside that of its layers."""
    from diffusers import ChromaPipeline, ChromaTransformer2DModel, FlowMatchEulerDiscreteScheduler

    tokenizer, text_encoder = t5(make, "text_encoder")
    transformer = make(
        "transformer",
        ChromaTransformer2DModel,
        **HEADS,
        in_channels=16,
        num_layers=3,
        num_single_layers=4,
        joint_attention_dim=text_encoder.config.d_model,
        axes_dims_rope=(4, 6, 6),
        approximator_num_channels=16,
        approximator_hidden_dim=32,
        approximator_layers=3,
    )
    return ChromaPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=flow_vae(make, 4, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )


def hidream(make: Maker) -> Any:
    """Four text encoders; experts chosen by the data; lists of wrappers around the blocks."""
    from diffusers import (
        FlowMatchEulerDiscreteScheduler,
        HiDreamImagePipeline,
        HiDreamImageTransformer2DModel,
    )
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, text_encoder = clip(make, "text_encoder", projection=True)
    tokenizer_2, text_encoder_2 = clip(make, "text_encoder_2", "clip-g", projection=True)
    tokenizer_3, text_encoder_3 = t5(make, "text_encoder_3")
    tokenizer_4 = llama_tokenizer()
    # One width for T5 and Llama: a projection takes the one it is given first.
    shape = {**layers(make, "t5", 4), **special_ids(tokenizer_4), "tie_word_embeddings": True}
    text_encoder_4 = make("text_encoder_4", LlamaForCausalLM, LlamaConfig(**shape))
    transformer = make(
        "transformer",
        HiDreamImageTransformer2DModel,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=3,
        num_single_layers=4,
        **HEADS,
        caption_channels=[text_encoder_3.config.d_model, text_encoder_4.config.hidden_size],
        text_emb_dim=text_encoder.config.projection_dim + text_encoder_2.config.projection_dim,
        axes_dims_rope=(4, 6, 6),
        max_resolution=(16, 16),
        llama_layers=[0, 1, 2, 3, 3, 3, 3],
    )
    pipe = HiDreamImagePipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        tokenizer_2=tokenizer_2,
        text_encoder_2=text_encoder_2,
        tokenizer_3=tokenizer_3,
        text_encoder_3=text_encoder_3,
        tokenizer_4=tokenizer_4,
        text_encoder_4=text_encoder_4,
        transformer=transformer,
        vae=flow_vae(make, 4, scaling_factor=0.3611, shift_factor=0.1159),
        scheduler=FlowMatchEulerDiscreteScheduler(shift=3.0),
    )
    pipe.default_sample_size = 12  # every picture is scaled to about this many latents a side
    return pipe


def cogview4(make: Maker) -> Any:
    """One stream for text and picture, after a text encoder of GLM's kind."""
    from diffusers import CogView4Pipeline, CogView4Transformer2DModel, FlowMatchEulerDiscreteScheduler
    from transformers import GlmConfig, GlmModel

    tokenizer = llama_tokenizer()
    shape = layers(make, "llama", 4)
    head = shape["hidden_size"] // shape["num_attention_heads"]
    text_encoder = make("text_encoder", GlmModel, GlmConfig(**shape, **special_ids(tokenizer), head_dim=head))
    transformer = make(
        "transformer",
        CogView4Transformer2DModel,
        **HEADS,
        in_channels=4,
        out_channels=4,
        num_layers=4,
        text_embed_dim=text_encoder.config.hidden_size,
        time_embed_dim=16,
        condition_dim=8,
        pos_embed_max_size=16,
        sample_size=16,
        rope_axes_dim=(8, 8),
    )
    return CogView4Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vae=flow_vae(make, 4, scaling_factor=0.18215),
        scheduler=FlowMatchEulerDiscreteScheduler(
            base_shift=0.25, max_shift=0.75, base_image_seq_len=256, use_dynamic_shifting=True
        ),
    )


def amused(make: Maker) -> Any:
    """Tokens in place of latents: the output is chosen, not computed; convolutions around the layers."""
    from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel

    tokenizer, text_encoder = clip(make, "text_encoder", "clip-g", projection=True)
    width = text_encoder.config.hidden_size
    transformer = make(
        "transformer",
        UVit2DModel,
        hidden_size=32,
        cond_embed_dim=width,
        micro_cond_encode_dim=8,
        micro_cond_embed_dim=40,
        encoder_hidden_size=width,
        vocab_size=65,
        codebook_size=64,
        in_channels=16,
        block_out_channels=16,
        num_res_blocks=3,
        downsample=True,
        upsample=True,
        block_num_heads=2,
        num_hidden_layers=4,
        num_attention_heads=2,
        intermediate_size=48,
    )
    vqvae = make(
        "vqvae",
        VQModel,
        block_out_channels=(16, 16, 32),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=16,
        layers_per_block=2,
        norm_num_groups=8,
        num_vq_embeddings=64,
        mid_block_add_attention=False,
        lookup_from_codebook=True,
    )
    return AmusedPipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        transformer=transformer,
        vqvae=vqvae,
        scheduler=AmusedScheduler(mask_token_id=64),
    )


PLAIN = {"clean_caption": False}

IMAGES = {
    "dit": Entry(dit, {"class_labels": [207], "guidance_scale": 4.0, **STEPS}),
    "hunyuan-dit": Entry(hunyuan_dit, {**IMAGE, "use_resolution_binning": False}),
    "pixart-alpha": Entry(
        pixart_alpha, {**IMAGE, **PLAIN, "max_sequence_length": 32, "use_resolution_binning": False}
    ),
    "z-image": Entry(z_image, {**IMAGE, "guidance_scale": 3.0, "max_sequence_length": 64}),
    "aura-flow": Entry(aura_flow, {**IMAGE, "max_sequence_length": 32}),
    "lumina": Entry(lumina, {**IMAGE, **PLAIN, "max_sequence_length": 32}),
    "lumina2": Entry(lumina2, {**IMAGE, "max_sequence_length": 32}),
    "chroma": Entry(chroma, {**IMAGE, "max_sequence_length": 32}),
    "hidream": Entry(hidream, {**IMAGE, "max_sequence_length": 32}),
    "cogview4": Entry(cogview4, {**IMAGE, "max_sequence_length": 32}),
    "amused": Entry(amused, IMAGE),
}

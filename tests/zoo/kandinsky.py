"""Kandinsky: a prior that makes an image embedding, a UNet that takes it, a quantising decoder; and its successors."""

from __future__ import annotations

from typing import Any

from diffusers_offload.demo.maker import Maker
from diffusers_offload.demo.text import clip, t5

from .parts import PROMPT, SIZE, STEPS, Entry, image_processor, vision


def prior_parts(make: Maker) -> dict[str, Any]:
    """The components of the prior, by name."""
    from diffusers import PriorTransformer, UnCLIPScheduler

    tokenizer, text_encoder = clip(make, "text_encoder", "clip-g", projection=True)
    width = text_encoder.config.hidden_size
    prior = make(
        "prior",
        PriorTransformer,
        num_layers=4,
        num_attention_heads=2,
        attention_head_dim=16,
        embedding_dim=width,
        num_embeddings=77,
        additional_embeddings=4,
    )
    return {
        "prior": prior,
        "image_encoder": vision(make, projection=width),
        "text_encoder": text_encoder,
        "tokenizer": tokenizer,
        "scheduler": UnCLIPScheduler(
            variance_type="fixed_small_log", prediction_type="sample", clip_sample_range=5.0
        ),
        "image_processor": image_processor(),
    }


def decoder_parts(make: Maker) -> dict[str, Any]:
    """The components of the decoder, by name."""
    from diffusers import DDPMScheduler, UNet2DConditionModel, VQModel

    unet = make(
        "unet",
        UNet2DConditionModel,
        in_channels=4,
        out_channels=8,
        addition_embed_type="image",
        down_block_types=(
            "ResnetDownsampleBlock2D",
            "SimpleCrossAttnDownBlock2D",
            "SimpleCrossAttnDownBlock2D",
        ),
        up_block_types=("SimpleCrossAttnUpBlock2D", "SimpleCrossAttnUpBlock2D", "ResnetUpsampleBlock2D"),
        mid_block_type="UNetMidBlock2DSimpleCrossAttn",
        block_out_channels=(16, 32, 48),
        layers_per_block=3,
        encoder_hid_dim=40,
        encoder_hid_dim_type="image_proj",
        cross_attention_dim=32,
        attention_head_dim=8,
        norm_num_groups=8,
        resnet_time_scale_shift="scale_shift",
    )
    movq = make(
        "movq",
        VQModel,
        block_out_channels=(32, 32, 32, 32),
        down_block_types=("DownEncoderBlock2D",) * 3 + ("AttnDownEncoderBlock2D",),
        up_block_types=("AttnUpDecoderBlock2D",) + ("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        latent_channels=4,
        vq_embed_dim=4,
        num_vq_embeddings=32,
        norm_num_groups=8,
        norm_type="spatial",
    )
    return {"unet": unet, "movq": movq, "scheduler": DDPMScheduler(beta_schedule="linear", clip_sample=False)}


def prior(make: Maker) -> Any:
    """After the last step a method of the model runs that is not its forward."""
    from diffusers import KandinskyV22PriorPipeline

    return KandinskyV22PriorPipeline(**prior_parts(make))


def combined(make: Maker) -> Any:
    """Two pipelines within one, with the same components."""
    from diffusers import KandinskyV22CombinedPipeline

    first = {f"prior_{name}": part for name, part in prior_parts(make).items()}
    return KandinskyV22CombinedPipeline(**first, **decoder_parts(make))


def kandinsky3(make: Maker) -> Any:
    """A UNet of its own make, whose attention and residual blocks lie in pairs."""
    from diffusers import DDPMScheduler, Kandinsky3Pipeline, Kandinsky3UNet

    tokenizer, text_encoder = t5(make, "text_encoder")
    unet = make(
        "unet",
        Kandinsky3UNet,
        time_embedding_dim=16,
        groups=4,
        attention_head_dim=8,
        layers_per_block=3,
        block_out_channels=(16, 32, 48),
        cross_attention_dim=16,
        encoder_hid_dim=text_encoder.config.d_model,
    )
    movq = decoder_parts(make)["movq"]
    return Kandinsky3Pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder,
        unet=unet,
        movq=movq,
        scheduler=DDPMScheduler(beta_schedule="squaredcos_cap_v2", clip_sample=True),
    )


# Without a negative prompt the picture tower runs, on nothing.
BARE = {"prompt": PROMPT["prompt"], **STEPS}
SQUARE = {**SIZE, "height": 64}

KANDINSKY = {
    "kandinsky-prior": Entry(prior, BARE),
    "kandinsky-combined": Entry(combined, {**BARE, **SQUARE, "prior_num_inference_steps": 2}),
    "kandinsky3": Entry(kandinsky3, {**PROMPT, **STEPS, **SQUARE}),
}

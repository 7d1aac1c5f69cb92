"""Which component is a T5, a CLIP, an autoencoder: by its class, whatever the pipeline calls it."""

import diffusers
import pytest
import torch
import transformers
from helpers import build
from torch import nn

from diffusers_offload.roles import role_of


@pytest.mark.parametrize(
    ("kind", "role"),
    [
        (transformers.T5EncoderModel, "t5"),
        (transformers.UMT5EncoderModel, "t5"),
        (transformers.LlamaModel, "t5"),
        (transformers.Qwen2_5_VLForConditionalGeneration, "t5"),
        (transformers.CLIPTextModel, "clip"),
        (transformers.CLIPTextModelWithProjection, "clip"),
        (transformers.CLIPVisionModelWithProjection, "clip"),
        (transformers.SiglipVisionModel, "clip"),
        (transformers.SiglipModel, "clip"),
        (transformers.SpeechT5HifiGan, None),
        (diffusers.AutoencoderKL, "vae"),
        (diffusers.AutoencoderKLWan, "vae"),
        (diffusers.AutoencoderTiny, "vae"),
        (diffusers.VQModel, "vae"),
        (diffusers.FluxTransformer2DModel, None),
        (diffusers.UNet2DConditionModel, None),
        (diffusers.FluxControlNetModel, None),
    ],
)
def test_a_role_is_found_by_what_a_component_is(kind, role):
    assert role_of("whatever", kind) == role
    assert role_of("vae" if role else "transformer", kind) == role


def test_a_name_tells_where_nothing_else_does():
    names = {"text_encoder_2": "t5", "image_encoder": "clip", "vae": "vae", "transformer": None, "text": None}
    assert {name: role_of(name, nn.Linear(2, 2)) for name in names} == names


def test_a_compiled_component_keeps_its_role():
    flux = build("flux")
    assert role_of("x", torch.compile(flux.text_encoder)) == "clip"
    assert role_of("x", torch.compile(flux.vae)) == "vae"

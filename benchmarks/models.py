"""The models and inputs of each case: FLUX.1 and Wan 14B, with the same random weights in every process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module

import torch
from torch import nn

SEED = 0
STD = 0.02


FAMILIES = {  # where the class of a family's model is
    "flux": ("diffusers.models.transformers.transformer_flux", "FluxTransformer2DModel"),
    "wan": ("diffusers.models.transformers.transformer_wan", "WanTransformer3DModel"),
}


@dataclass(frozen=True)
class Case:
    """One table of results.

    Attributes:
        family: "flux" or "wan": cases of one family run on the same model.
        image: tokens of the latents; FLUX: (height, width), Wan: (frames, height, width) after patching.
        text: text tokens.
        forwards: how many are timed. Some seconds of them, where that can be: a device at its limit of power
            takes its first second to settle its clock.
    """

    family: str
    image: tuple[int, ...]
    text: int
    forwards: int

    @property
    def tokens(self) -> int:
        count = 1
        for side in self.image:
            count *= side
        return count


_FULL_CASES = {
    "flux-4096": Case("flux", (64, 64), 512, 24),
    "flux-1024": Case("flux", (32, 32), 512, 24),
    "wan-7800": Case("wan", (5, 30, 52), 512, 10),
    "wan-32760": Case("wan", (21, 30, 52), 512, 3),
}
CASES = {
    "full": _FULL_CASES,
    "quarter": _FULL_CASES,
    "tiny": {
        "flux-4096": Case("flux", (8, 8), 16, 3),
        "flux-1024": Case("flux", (4, 4), 16, 3),
        "wan-7800": Case("wan", (2, 4, 6), 16, 3),
        "wan-32760": Case("wan", (3, 6, 6), 16, 3),
    },
}

_FULL = {
    "flux": {"guidance_embeds": True},
    "wan": {
        "num_layers": 40,
        "num_attention_heads": 40,
        "attention_head_dim": 128,
        "ffn_dim": 13824,
        "text_dim": 4096,
        "in_channels": 16,
        "out_channels": 16,
        "patch_size": (1, 2, 2),
    },
}
CONFIGS = {
    "full": _FULL,
    "quarter": {
        "flux": _FULL["flux"] | {"num_layers": 5, "num_single_layers": 10},
        "wan": _FULL["wan"] | {"num_layers": 10},
    },
    "tiny": {
        "flux": {
            "guidance_embeds": True,
            "num_layers": 3,
            "num_single_layers": 5,
            "attention_head_dim": 16,
            "num_attention_heads": 4,
            "joint_attention_dim": 32,
            "pooled_projection_dim": 24,
            "axes_dims_rope": (4, 6, 6),
        },
        "wan": {
            "num_layers": 6,
            "num_attention_heads": 4,
            "attention_head_dim": 24,
            "ffn_dim": 192,
            "text_dim": 32,
            "in_channels": 16,
            "out_channels": 16,
            "patch_size": (1, 2, 2),
            "freq_dim": 32,
        },
    },
}


def build(family: str, size: str, device: torch.device) -> nn.Module:
    """The model in bf16, made on `device`; what its class keeps in fp32 is fp32, as after `from_pretrained`.

    Buffers (the tables of rotary embeddings) are those that the constructor made: only parameters are filled.
    """
    module, name = FAMILIES[family]
    model_class = getattr(import_module(module), name)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            model = model_class(**CONFIGS[size][family]).eval()
    finally:
        torch.set_default_dtype(before)
    kept = set(model_class._keep_in_fp32_modules or ())
    generator = torch.Generator(device).manual_seed(SEED)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if kept & set(name.split(".")):
                parameter.data = parameter.data.float()
            if parameter.ndim == 1 and name.endswith("weight"):  # of a norm
                parameter.fill_(1.0)
            else:
                parameter.normal_(0.0, STD, generator=generator)
    return model


def forward_of(model: nn.Module, case: Case, size: str, device: torch.device) -> Callable[[], torch.Tensor]:
    """A call of `model` with the inputs of `case`, which are drawn on the host: the same on every device."""
    make = {"flux": _flux_inputs, "wan": _wan_inputs}[case.family]
    inputs = {name: tensor.to(device) for name, tensor in make(case, size).items()}
    call = partial(model, **inputs, return_dict=False)
    return lambda: call()[0]


def _flux_inputs(case: Case, size: str) -> dict[str, torch.Tensor]:
    draw = _drawer()
    config = CONFIGS[size]["flux"]
    height, width = case.image
    image_ids = torch.zeros(height, width, 3)
    image_ids[..., 1] = torch.arange(height)[:, None]
    image_ids[..., 2] = torch.arange(width)[None, :]
    return {
        "hidden_states": draw(1, case.tokens, 64),
        "encoder_hidden_states": draw(1, case.text, config.get("joint_attention_dim", 4096)),
        "pooled_projections": draw(1, config.get("pooled_projection_dim", 768)),
        "timestep": torch.tensor([0.5], dtype=torch.bfloat16),
        "guidance": torch.tensor([3.5]),
        "img_ids": image_ids.flatten(0, 1).bfloat16(),
        "txt_ids": torch.zeros(case.text, 3, dtype=torch.bfloat16),
    }


def _wan_inputs(case: Case, size: str) -> dict[str, torch.Tensor]:
    draw = _drawer()
    config = CONFIGS[size]["wan"]
    patch = config["patch_size"]
    latents = [side * p for side, p in zip(case.image, patch, strict=True)]
    return {
        "hidden_states": draw(1, config["in_channels"], *latents),
        "encoder_hidden_states": draw(1, case.text, config["text_dim"]),
        "timestep": torch.tensor([500.0]),
    }


def _drawer() -> Callable[..., torch.Tensor]:
    generator = torch.Generator("cpu").manual_seed(SEED)
    return lambda *shape: torch.randn(*shape, generator=generator).bfloat16()

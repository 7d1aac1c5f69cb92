"""Weights that come, change and go after enabling: LoRA adapters, fused projections."""

from itertools import pairwise

import pytest
import torch
from helpers import build, run

peft = pytest.importorskip("peft")


def lora() -> dict:
    return {
        "r": 4,
        "lora_alpha": 8,
        "init_lora_weights": False,
        "target_modules": ["to_q", "to_k", "proj_mlp", "x_embedder"],
    }


def add_adapter(pipe, name: str, seed: int) -> None:
    pipe.transformer.add_adapter(peft.LoraConfig(**lora()), adapter_name=name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in sorted(pipe.transformer.named_parameters()):
        if f"lora_A.{name}" in key or f"lora_B.{name}" in key:
            values = torch.randn(parameter.shape, generator=generator) * 0.2
            parameter.data.copy_(values)


def journey(pipe):
    """The pictures along the way of two adapters."""
    yield run(pipe, "flux")
    add_adapter(pipe, "one", 1)
    yield run(pipe, "flux")
    add_adapter(pipe, "two", 2)
    yield run(pipe, "flux")
    pipe.transformer.set_adapters(["one", "two"], [0.3, 0.9])
    yield run(pipe, "flux")
    pipe.transformer.disable_lora()
    yield run(pipe, "flux")
    pipe.transformer.enable_lora()
    pipe.transformer.fuse_lora(adapter_names=["two"])
    yield run(pipe, "flux")
    pipe.transformer.unfuse_lora()
    yield run(pipe, "flux")
    pipe.transformer.delete_adapters("one")
    yield run(pipe, "flux")
    pipe.transformer.unload_lora()
    yield run(pipe, "flux")


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_adapters_after_enabling_equal_the_resident_run(ratio, device):
    expected = list(journey(build("flux", device=device)))
    assert sum(torch.equal(a, b) for a, b in pairwise(expected)) <= 2
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=ratio)
    held = pipe.block_offload._held["transformer"]
    for step, (found, right) in enumerate(zip(journey(pipe), expected, strict=True)):
        assert torch.equal(found, right), step
        owned = {id(t) for unit in held.component.units for t in unit.weights.tensors}
        assert {id(p) for p in pipe.transformer.parameters()} <= owned
    assert pipe.block_offload.report().uses
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected[-1])


def test_adapters_before_enabling_equal_the_resident_run(device):
    pipe = build("flux", device=device)
    add_adapter(pipe, "one", 1)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux"), expected)


def test_fused_projections(device):
    def pictures(pipe):
        yield run(pipe, "flux")
        pipe.transformer.fuse_qkv_projections()
        yield run(pipe, "flux")
        pipe.transformer.unfuse_qkv_projections()
        yield run(pipe, "flux")

    expected = list(pictures(build("flux", device=device)))
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(pictures(pipe), expected, strict=True))


def test_a_component_whose_tensors_another_one_uses_is_taken_apart_anew(device):
    """As with the ControlNet of Z-Image, which runs modules of its transformer."""

    class Using(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.embed, self.own = model.x_embedder, torch.nn.Linear(model.x_embedder.out_features, 3)

        @property
        def device(self):
            return self.own.weight.device

        def forward(self, x):
            return self.own(self.embed(x))

    def pictures(pipe, using):
        x = torch.randn(1, 4, pipe.transformer.config.in_channels, generator=torch.Generator().manual_seed(0))
        yield using(x.to(device))
        yield run(pipe, "flux")
        add_adapter(pipe, "one", 1)
        yield run(pipe, "flux")
        yield using(x.to(device))

    def made(device="cpu"):
        pipe = build("flux", device=device)
        torch.manual_seed(0)
        using = Using(pipe.transformer.requires_grad_(False)).requires_grad_(False).to(device)
        pipe.register_modules(image_encoder=using, feature_extractor=None)
        return pipe, using

    pipe, using = made(device)
    expected = list(pictures(pipe, using))
    pipe, using = made()
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(pictures(pipe, using), expected, strict=True))
    held = pipe.block_offload._held
    assert held["image_encoder"].component.needs == [held["transformer"].component]

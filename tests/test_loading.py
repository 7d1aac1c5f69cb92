"""Adapters that Diffusers loads into an offloaded pipeline: LoRA through the pipeline, IP-Adapters."""

from contextlib import contextmanager
from itertools import pairwise

import pytest
import torch
from helpers import build, run

peft = pytest.importorskip("peft")


def lora(pipe, seed: int) -> dict[str, torch.Tensor]:
    """A LoRA in Diffusers' format for a FLUX transformer."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, module in pipe.transformer.named_modules():
        if name.endswith(("to_q", "to_k", "proj_mlp", "x_embedder")):
            for part, shape in (("A", (4, module.in_features)), ("B", (module.out_features, 4))):
                values = torch.randn(shape, generator=generator) * 0.2
                weights[f"transformer.{name}.lora_{part}.weight"] = values
    return weights


@contextmanager
def on_the_host(pipe, device):
    """Fusing multiplies matrices, whose last bits depend on the device: resident weights go where ours are."""
    if pipe.block_offload is None:
        pipe.to("cpu")
    yield
    if pipe.block_offload is None:
        pipe.to(device)


def journey(pipe, adapters, device):
    """The pictures along the way of two LoRAs."""
    yield run(pipe, "flux")
    pipe.load_lora_weights(dict(adapters[0]), adapter_name="one")
    yield run(pipe, "flux")
    pipe.load_lora_weights(dict(adapters[1]), adapter_name="two")
    pipe.set_adapters(["one", "two"], [0.3, 0.8])
    yield run(pipe, "flux")
    with on_the_host(pipe, device):
        pipe.fuse_lora(adapter_names=["two"])
    yield run(pipe, "flux")
    with on_the_host(pipe, device):
        pipe.unfuse_lora()
    pipe.delete_adapters("one")
    yield run(pipe, "flux")
    pipe.unload_lora_weights()
    yield run(pipe, "flux")


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_loras_loaded_by_the_pipeline(ratio, device):
    pipe = build("flux", device=device)
    adapters = [lora(pipe, seed) for seed in (1, 2)]
    expected = list(journey(pipe, adapters, device))
    assert not any(torch.equal(a, b) for a, b in pairwise(expected[:4]))
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=ratio)
    for step, (found, right) in enumerate(zip(journey(pipe, adapters, device), expected, strict=True)):
        assert torch.equal(found, right), step


@pytest.mark.parametrize("how", ["suspended", "between steps"])
def test_a_lora_loaded_and_fused_while_suspended(how, device):
    def change(pipe):
        pipe.load_lora_weights(dict(adapter), adapter_name="one")
        pipe.fuse_lora(lora_scale=0.7)
        pipe.unload_lora_weights()

    def between_steps(pipe, step, timestep, values):
        if step == 0 and pipe.block_offload is not None:
            with pipe.block_offload.suspended():
                change(pipe)
        elif step == 0:
            with on_the_host(pipe, device):
                change(pipe)
        return values

    def picture(pipe):
        if how == "between steps":
            return run(pipe, "flux", callback_on_step_end=between_steps)
        if pipe.block_offload is not None:
            with pipe.block_offload.suspended():
                change(pipe)
        else:
            with on_the_host(pipe, device):
                change(pipe)
        return run(pipe, "flux")

    pipe = build("flux", device=device)
    adapter, plain = lora(pipe, 1), run(pipe, "flux")
    expected, afterwards = picture(pipe), run(pipe, "flux")
    assert not torch.equal(plain, expected)
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux"), plain)
    assert torch.equal(picture(pipe), expected)
    assert torch.equal(run(pipe, "flux"), afterwards)


def ip_adapter(pipe, folder):
    """Files of an IP-Adapter for a small SDXL, and of the image encoder that goes with it."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    torch.manual_seed(11)
    encoder = CLIPVisionModelWithProjection(
        CLIPVisionConfig(
            hidden_size=32,
            intermediate_size=37,
            num_hidden_layers=3,
            num_attention_heads=4,
            image_size=224,
            patch_size=32,
            projection_dim=32,
        )
    )
    encoder.save_pretrained(folder / "models" / "image_encoder")
    attention = {}
    number = 1
    for name in pipe.unet.attn_processors:
        if name.endswith("attn2.processor"):
            width = pipe.unet.get_submodule(name.removesuffix(".processor")).to_k.out_features
            cross = pipe.unet.config.cross_attention_dim
            attention[f"{number}.to_k_ip.weight"] = torch.randn(width, cross) * 0.2
            attention[f"{number}.to_v_ip.weight"] = torch.randn(width, cross) * 0.2
            number += 2
    cross = pipe.unet.config.cross_attention_dim
    projection = {
        "proj.weight": torch.randn(4 * cross, 32) * 0.2,
        "proj.bias": torch.randn(4 * cross) * 0.2,
        "norm.weight": torch.ones(cross),
        "norm.bias": torch.zeros(cross),
    }
    torch.save({"image_proj": projection, "ip_adapter": attention}, folder / "models" / "adapter.bin")


@pytest.mark.parametrize("when", ["before", "after", "after a call"])
def test_an_ip_adapter_and_its_image_encoder(when, device, tmp_path):
    from transformers import CLIPImageProcessorPil

    def load(pipe):
        pipe.register_modules(feature_extractor=CLIPImageProcessorPil())
        pipe.load_ip_adapter(str(tmp_path), "models", "adapter.bin")
        pipe.set_ip_adapter_scale(0.8)

    pipe = build("sdxl", device=device)
    ip_adapter(pipe, tmp_path)
    values = torch.randint(0, 255, (64, 64, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    from PIL import Image

    picture = {"ip_adapter_image": Image.fromarray(values.numpy())}
    plain = run(pipe, "sdxl")
    load(pipe)
    expected = run(pipe, "sdxl", **picture)
    pipe.unload_ip_adapter()
    assert torch.equal(run(pipe, "sdxl"), plain)
    assert not torch.equal(plain, expected)

    pipe = build("sdxl")
    if when == "before":
        load(pipe)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    if when == "after a call":
        assert torch.equal(run(pipe, "sdxl"), plain)
    if when != "before":
        load(pipe)
    assert "image_encoder" in pipe.block_offload.components
    for _ in range(2):
        assert torch.equal(run(pipe, "sdxl", **picture), expected)
    pipe.unload_ip_adapter()
    assert "image_encoder" not in pipe.block_offload.components
    assert torch.equal(run(pipe, "sdxl"), plain)

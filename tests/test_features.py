"""What else Diffusers offers goes with it, switched on before or after enabling: equal to the bit."""

from contextlib import nullcontext
from functools import cache
from itertools import pairwise

import pytest
import torch
from diffusers import FasterCacheConfig, FirstBlockCacheConfig, PyramidAttentionBroadcastConfig
from helpers import build, no_weight_used_while_offloaded, run

from diffusers_offload.demo import pipelines as zoo

STEPS = {"num_inference_steps": 6}  # in fewer, a cache has nothing to skip


def first_block_cache(pipe):
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.6))


def pyramid_attention_broadcast(pipe):
    pipe.transformer.enable_cache(
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: pipe.current_timestep,
        )
    )


def faster_cache(pipe):
    pipe.transformer.enable_cache(
        FasterCacheConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(-1, 1000),
            unconditional_batch_skip_range=2,
            unconditional_batch_timestep_skip_range=(-1, 1000),
            attention_weight_callback=lambda _: 0.5,
            current_timestep_callback=lambda: pipe.current_timestep,
            is_guidance_distilled=True,
        )
    )


def tiling(pipe):
    pipe.vae.enable_tiling()
    pipe.vae.tile_sample_min_size = pipe.vae.tile_sample_min_size // 2 or 1
    pipe.vae.tile_latent_min_size = max(pipe.vae.tile_latent_min_size // 2, 2)


def slicing(pipe):
    pipe.vae.enable_slicing()


def fused(pipe):
    pipe.transformer.fuse_qkv_projections()


def processors(pipe):
    from diffusers.models.transformers.transformer_flux import FluxAttnProcessor

    class Halving(FluxAttnProcessor):
        def __call__(self, *args, **kwargs):
            out = super().__call__(*args, **kwargs)
            return tuple(each / 2 for each in out) if isinstance(out, tuple) else out / 2

    pipe.transformer.set_attn_processor(Halving())


def layerwise_casting(pipe):
    pipe.transformer.enable_layerwise_casting(torch.float8_e4m3fn, torch.float32)


def sdxl_fused(pipe):
    pipe.fuse_qkv_projections()


def freeu(pipe):
    pipe.enable_freeu(s1=0.9, s2=0.2, b1=1.2, b2=1.4)


def attention_slicing(pipe):
    pipe.enable_attention_slicing(1)


FEATURES = [
    ("flux", first_block_cache),
    ("flux", pyramid_attention_broadcast),
    ("flux", faster_cache),
    ("wan", first_block_cache),
    ("wan22", first_block_cache),
    ("flux", tiling),
    ("flux", slicing),
    ("flux", fused),
    ("flux", processors),
    ("flux", layerwise_casting),
    ("wan", layerwise_casting),
    ("sdxl", sdxl_fused),
    ("sdxl", freeu),
    ("sdxl", attention_slicing),
    ("sdxl", tiling),
]
SAME = (slicing, attention_slicing, fused, sdxl_fused)


@cache  # three tests one after the other ask for the same
def resident(name, feature, device):
    """A pipeline's output without the feature, with it, and with it from another seed; and what it was called with."""
    changes = {} if name == "sdxl" else STEPS
    if feature is slicing:
        changes = {**changes, "num_images_per_prompt": 2}
    pipe = build(name, device=device)
    plain = run(pipe, name, **changes)
    feature(pipe)
    expected, again = run(pipe, name, **changes), run(pipe, name, seed=1, **changes)
    assert feature in SAME or not torch.equal(plain, expected)
    return plain, expected, again, changes


@pytest.mark.parametrize(("when", "ratio"), [("before", 1.0), ("after", 0.5), ("after a call", 1.0)])
@pytest.mark.parametrize(("name", "feature"), FEATURES, ids=[f"{n}-{f.__name__}" for n, f in FEATURES])
def test_a_feature_of_diffusers(name, feature, when, ratio, device):
    plain, expected, again, changes = resident(name, feature, device)
    pipe = build(name)
    if when == "before":
        feature(pipe)
    pipe.enable_block_offload(device=device, offload_ratio=ratio)
    if when == "after a call":
        assert torch.equal(run(pipe, name, **changes), plain)
    if when != "before":
        feature(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe, name, **changes), expected)
        # Casting replaces the stem's weights in each forward: as it leaves, the engine itself looks at them.
        with nullcontext() if feature is layerwise_casting else no_weight_used_while_offloaded(pipe):
            assert torch.equal(run(pipe, name, seed=1, **changes), again)
    assert pipe.block_offload.report().uses
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), name, **changes), expected)


@pytest.mark.parametrize("feature", [first_block_cache, pyramid_attention_broadcast, faster_cache])
def test_a_cache_may_be_switched_off_again(feature, device):
    pipe = build("flux", device=device)
    plain = run(pipe, "flux", **STEPS)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    for _ in range(2):
        feature(pipe)
        run(pipe, "flux", **STEPS)
        pipe.transformer.disable_cache()
        assert torch.equal(run(pipe, "flux", **STEPS), plain)


def test_two_controlnets(device):
    from diffusers import MultiControlNetModel

    def made(where):
        pipe, other = build("sdxl-controlnet", device=where), zoo.build("sdxl-controlnet", seed=5)
        pipe.controlnet = MultiControlNetModel([pipe.controlnet, other.controlnet.to(where)])
        return pipe

    image = zoo.call_kwargs("sdxl-controlnet")["image"]
    changes = {"image": [image, image.rotate(90)], "controlnet_conditioning_scale": [0.7, 0.4]}
    expected = run(made(device), "sdxl-controlnet", **changes)
    for arguments in ({}, {"offload_ratio": 0.5}, {"components": {"controlnet": "model"}}):
        pipe = made("cpu")
        pipe.enable_block_offload(device=device, **arguments)
        for _ in range(2):
            assert torch.equal(run(pipe, "sdxl-controlnet", **changes), expected)
        pipe.disable_block_offload()


def test_a_second_controlnet_put_in_afterwards(device):
    from diffusers import MultiControlNetModel

    def pictures(pipe):
        yield run(pipe, "sdxl-controlnet")
        other = zoo.build("sdxl-controlnet", seed=5).controlnet.to("cpu" if pipe.block_offload else device)
        pipe.controlnet = MultiControlNetModel([pipe.controlnet, other])
        image = zoo.call_kwargs("sdxl-controlnet")["image"]
        both = {"image": [image, image.rotate(90)], "controlnet_conditioning_scale": [0.7, 0.4]}
        yield run(pipe, "sdxl-controlnet", **both)
        yield run(pipe, "sdxl-controlnet", seed=1, **both)

    expected = list(pictures(build("sdxl-controlnet", device=device)))
    assert not any(torch.equal(a, b) for a, b in pairwise(expected))
    pipe = build("sdxl-controlnet")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(pictures(pipe), expected, strict=True))

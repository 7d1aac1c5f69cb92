"""The output of an offloaded pipeline equals that of the resident one, to the bit."""

import pytest
import torch
from helpers import build, no_weight_used_while_offloaded, run

NAMES = [
    "flux",
    "sd3",
    "wan",
    "wan22",
    "sdxl",
    "qwenimage",
    "cogvideox",
    "ltx",
    "pixart",
    "sana",
    "hunyuanvideo",
    "flux-controlnet",
    "sdxl-controlnet",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_offloaded_equals_resident(name, dtype, device):
    pipe = build(name, dtype, device)
    expected, other = run(pipe, name), run(pipe, name, seed=1)
    assert not torch.equal(expected, other)
    pipe.to("cpu")

    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert any(component.streamed for component in pipe.block_offload.plan.components)
    assert torch.equal(run(pipe, name), expected)
    with no_weight_used_while_offloaded(pipe):
        assert torch.equal(run(pipe, name, seed=1), other)
    assert pipe.block_offload.report().uses > 0
    pipe.disable_block_offload()

    pipe.enable_block_offload(device=device, offload_ratio=0.5)
    assert torch.equal(run(pipe, name), expected)
    pipe.disable_block_offload()

    assert torch.equal(run(pipe.to(device), name), expected)


@pytest.mark.parametrize("word", ["resident", "model"])
def test_whole_components_equal_resident_too(word, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0, offload_granularity=word)
    assert torch.equal(run(pipe, "flux"), expected)


@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.77, 1.0])
def test_any_ratio_equals_resident_and_streams_no_more_than_asked(ratio, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=ratio)
    assert torch.equal(run(pipe, "flux"), expected)
    for plan in pipe.block_offload.plan.components:
        blocks = plan.streamed_bytes + plan.resident_bytes
        assert plan.streamed_bytes <= ratio * blocks


def test_policies_per_component_mix(device):
    from diffusers_offload import OffloadPolicy

    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(
        device=device,
        offload_ratio=1.0,
        components={
            "vae": "block",
            "text_encoder": "resident",
            "transformer": OffloadPolicy("block", ratio=0.5),
        },
    )
    with no_weight_used_while_offloaded(pipe):
        assert torch.equal(run(pipe, "flux"), expected)
    plans = {plan.name: plan for plan in pipe.block_offload.plan.components}
    assert plans["vae"].streamed
    assert plans["text_encoder"].stem_bytes == 0
    assert plans["transformer"].residents


def test_no_misses_once_the_order_is_known(device):
    for name in ("flux", "sdxl"):
        pipe = build(name, device="cpu")
        pipe.enable_block_offload(device=device, offload_ratio=1.0)
        for _ in range(2):
            run(pipe, name)
        pipe.block_offload.reset()
        run(pipe, name)
        assert pipe.block_offload.report().misses == 0


@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl-controlnet"])
def test_the_arena_serves_every_component_and_does_not_grow(name, device):
    pipe = build(name)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    arena = pipe.block_offload.report().arena_bytes
    largest = max(sum(sorted(u.nbytes for u in c.streamed)[-2:]) for c in pipe.block_offload.plan.components)
    run(pipe, name)
    run(pipe, name)
    assert pipe.block_offload.report().arena_bytes == arena == largest


def test_a_device_generator_gives_the_same_noise(device):
    pipe = build("flux", device=device)

    def image():
        from diffusers_offload.demo import pipelines as zoo

        generator = torch.Generator(device).manual_seed(3)
        return zoo.output(pipe(**zoo.call_kwargs("flux"), generator=generator)).cpu()

    expected = image()
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(image(), expected)


def test_the_first_thing_called_may_be_the_vae(device):
    pipe = build("flux", device=device)
    picture = torch.rand(1, 3, 64, 64, device=device)
    with torch.no_grad():
        latents = pipe.vae.encode(picture).latent_dist.mode()
        expected = pipe.vae.decode(latents).sample
    for order in ("encode first", "decode first"):
        pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
        with torch.no_grad():
            if order == "encode first":
                assert torch.equal(pipe.vae.encode(picture).latent_dist.mode(), latents)
            assert torch.equal(pipe.vae.decode(latents).sample, expected)
        pipe.disable_block_offload()


def test_tiled_decoding_needs_no_warm_up(device):
    pipe = build("flux", device=device)
    pipe.vae.enable_tiling()
    pipe.vae.tile_latent_min_size, pipe.vae.tile_sample_min_size = 4, 16
    channels = pipe.vae.config.latent_channels
    latents = torch.randn(1, channels, 10, 10, generator=torch.Generator().manual_seed(0)).to(device)
    with torch.no_grad():
        expected = pipe.vae.decode(latents).sample
        pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0, components={"vae": "block"})
        assert torch.equal(pipe.vae.decode(latents).sample, expected)


def test_encode_prompt_called_on_its_own(device):
    pipe = build("flux", device=device)
    with torch.no_grad():
        expected = pipe.encode_prompt("a fox", None)
        pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
        found = pipe.encode_prompt("a fox", None)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_any_part_may_be_called_on_its_own(device):
    pipe = build("flux", device=device)
    encoder = pipe.text_encoder_2
    ids = torch.arange(5, device=device)[None]
    hidden = torch.randn(1, 5, encoder.config.d_model, generator=torch.Generator().manual_seed(0)).to(device)

    def parts():
        with torch.no_grad():
            yield encoder.get_input_embeddings()(ids)
            yield encoder.encoder.final_layer_norm(hidden)
            yield encoder.encoder.block[1](hidden)[0]
            yield encoder.encoder.block[0](hidden)[0]
            yield encoder(ids)[0]

    expected = list(parts())
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    assert all(torch.equal(a, b) for a, b in zip(parts(), expected, strict=True))


def test_latents_upcast_the_vae_in_mid_call(device):
    pipe = build("flux", torch.bfloat16, device)
    z = torch.randn(1, pipe.vae.config.latent_channels, 8, 8, generator=torch.Generator().manual_seed(0)).to(
        device
    )

    def there_and_back():
        with torch.no_grad():
            low = pipe.vae.decode(z.bfloat16()).sample
            pipe.vae.to(dtype=torch.float32)
            high = pipe.vae.decode(z).sample
            pipe.vae.to(dtype=torch.bfloat16)
            return low, high, pipe.vae.decode(z.bfloat16()).sample

    expected = there_and_back()
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    found = there_and_back()
    assert found[1].dtype == torch.float32
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))

"""Guidance passes of real pipelines, run for one load of the weights: as resident, to the bit."""

from itertools import pairwise

import pytest
import torch
import zoo
from helpers import build, run
from zoo.parts import PROMPT

from diffusers_offload.demo import pipelines as demo

pytestmark = pytest.mark.usefixtures("nobody_is_left_half_way")
STEPS = 6
ISOLATED = {  # three passes: plain, with blocks perturbed, and with picture and sound apart
    "guidance_scale": 1.0,
    "audio_guidance_scale": 1.0,
    "stg_scale": 1.0,
    "modality_scale": 2.0,
    "spatio_temporal_guidance_blocks": [1],
}
CASES = {
    "wan": ("wan", {}, 2),
    "wan22": ("wan22", {}, 2),
    "qwenimage": ("qwenimage", {}, 2),
    "hunyuanvideo": ("hunyuanvideo", {**PROMPT, "true_cfg_scale": 3.0}, 2),
    "kandinsky5": ("kandinsky5", {}, 2),
    "ltx2": ("ltx2", ISOLATED, 3),
}
EMBEDS = ["latents", "prompt_embeds", "negative_prompt_embeds"]


def built(name, device="cpu"):
    return build(name, device=device) if name in demo.PIPELINES else zoo.build(name, device=device)


def called(pipe, name, steps=STEPS, **changes):
    changes["num_inference_steps"] = steps
    if name in demo.PIPELINES:
        return run(pipe, name, **changes)
    kwargs = {**zoo.call_kwargs(name, pipe.device.type), **changes}
    return zoo.output(pipe(**kwargs, generator=torch.Generator().manual_seed(0)))


def enabled(pipe, device="cpu", **arguments):
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0, **arguments)
    return pipe.block_offload


def bytes_per_step(pipe, name, **changes):
    """What each step but the first loads, and what the pipeline makes."""
    seen = []

    def see(pipe, step, timestep, values):
        seen.append(pipe.block_offload.report().bytes_loaded)
        return values

    made = called(pipe, name, callback_on_step_end=see, **changes)
    return [after - before for before, after in pairwise(seen)], made


@pytest.mark.parametrize("case", CASES)
def test_a_step_loads_its_weights_once(case, device):
    name, changes, passes = CASES[case]
    pipe = built(name, device)
    expected = called(pipe, name, **changes)
    enabled(pipe, device, pair_passes=False)
    alone, made = bytes_per_step(pipe, name, **changes)
    assert torch.equal(made, expected)
    pipe.disable_block_offload()
    handle = enabled(pipe, device)
    for _ in range(2):  # in the second call all is known, but for the prompts
        handle.reset()
        paired, made = bytes_per_step(pipe, name, **changes)
        assert torch.equal(made, expected)
    report = handle.report()
    assert report.discarded == 0
    assert not report.unpaired
    if name == "wan22":  # its second transformer begins in the midst, with a step of its own
        assert report.paired == STEPS - 2
        assert [each <= 0.52 * other for each, other in zip(paired, alone, strict=True)].count(False) == 1
    else:
        assert report.paired == (STEPS - 1) * (passes - 1)
        assert all(each <= 1.04 / passes * other for each, other in zip(paired, alone, strict=True))


@pytest.mark.parametrize("granularity", ["phase", "leaf"])
@pytest.mark.parametrize("case", ["wan", "qwenimage", "ltx2"])
def test_smaller_units(case, granularity, device):
    name, changes, passes = CASES[case]
    pipe = built(name, device)
    expected = called(pipe, name, **changes)
    handle = enabled(pipe, device, offload_granularity=granularity)
    assert torch.equal(called(pipe, name, **changes), expected)
    assert handle.report().paired == (STEPS - (3 if case == "ltx2" else 2)) * (passes - 1)


def test_from_disk(tmp_path):
    pipe = built("wan")
    expected = called(pipe, "wan")
    enabled(pipe, tier="disk", offload_dir=tmp_path, max_host_memory="1MiB", components={"vae": "resident"})
    assert torch.equal(called(pipe, "wan"), expected)
    assert pipe.block_offload.report().paired == STEPS - 2


def test_a_share_of_the_blocks():
    pipe = built("qwenimage")
    expected = called(pipe, "qwenimage")
    pipe.enable_block_offload(device="cpu", offload_ratio=0.5)
    assert torch.equal(called(pipe, "qwenimage"), expected)
    assert pipe.block_offload.report().paired == STEPS - 2


# --- callbacks --------------------------------------------------------------------------------------------


def swaps_a_prompt(pipe, step, timestep, values):
    return {"negative_prompt_embeds": values["negative_prompt_embeds"] * 1.5} if step == 3 else {}


def edits_a_prompt(pipe, step, timestep, values):
    values["negative_prompt_embeds"].mul_(1.5)
    return {}


def ends_the_guidance(pipe, step, timestep, values):
    if step == 3:
        pipe._guidance_scale = 1.0
    return {}


def edits_latents(pipe, step, timestep, values):
    return {"latents": values["latents"] * 1.1}


def calls_the_transformer(pipe, step, timestep, values):
    latents = values["latents"]
    time = timestep.expand(latents.shape[0])
    pipe.transformer(latents, time, values["prompt_embeds"])
    return {}


CALLBACKS = {
    "swaps a prompt": (swaps_a_prompt, 3, 1),
    "edits a prompt": (edits_a_prompt, 4, 0),
    "ends the guidance": (ends_the_guidance, 2, 1),
    "edits latents": (edits_latents, 4, 0),
}


@pytest.mark.parametrize(("callback", "paired", "discarded"), CALLBACKS.values(), ids=CALLBACKS)
def test_callbacks(callback, paired, discarded, device):
    pipe = built("wan", device)
    changes = {"callback_on_step_end": callback, "callback_on_step_end_tensor_inputs": EMBEDS}
    expected = called(pipe, "wan", **changes)
    assert not torch.equal(expected, called(pipe, "wan"))
    handle = enabled(pipe, device)
    assert torch.equal(called(pipe, "wan", **changes), expected)
    assert (handle.report().paired, handle.report().discarded) == (paired, discarded)


def test_a_callback_that_calls_the_transformer_itself():
    pipe = built("wan")
    changes = {"callback_on_step_end": calls_the_transformer, "callback_on_step_end_tensor_inputs": EMBEDS}
    expected = called(pipe, "wan", **changes)
    enabled(pipe)
    assert torch.equal(called(pipe, "wan", **changes), expected)


# --- adapters ---------------------------------------------------------------------------------------------


def with_adapters(name="qwenimage"):
    from peft import LoraConfig

    pipe = built(name)
    torch.manual_seed(0)
    for adapter in ("one", "two"):
        pipe.transformer.add_adapter(
            LoraConfig(r=2, init_lora_weights=False, target_modules=["to_q", "to_v"]), adapter_name=adapter
        )
    return pipe


def selects(pipe, step, timestep, values):
    pipe.transformer.set_adapters(["two"] if step % 2 else ["one"], weights=[0.5 + step])
    return values


def turns_off(pipe, step, timestep, values):
    if step == 3:
        pipe.transformer.disable_adapters()
    return values


@pytest.mark.parametrize("callback", [selects, turns_off, None])
def test_adapters_that_change_between_steps(callback):
    changes = {"callback_on_step_end": callback} if callback else {}
    expected = called(with_adapters(), "qwenimage", **changes)
    pipe = with_adapters()
    handle = enabled(pipe)
    assert torch.equal(called(pipe, "qwenimage", **changes), expected)
    assert bool(handle.report().paired) == (callback is not selects)


def test_an_adapters_scale():
    """peft multiplies each layer's scale when a forward begins and divides it when it ends."""
    changes = {"attention_kwargs": {"scale": 0.5}}
    expected = called(with_adapters(), "qwenimage", **changes)
    assert not torch.equal(expected, called(with_adapters(), "qwenimage"))
    pipe = with_adapters()
    handle = enabled(pipe)
    assert torch.equal(called(pipe, "qwenimage", **changes), expected)
    report = handle.report()
    assert report.paired == 0
    assert "result" in report.unpaired["transformer"]


# --- caches -----------------------------------------------------------------------------------------------


def caches():
    from diffusers import FirstBlockCacheConfig, PyramidAttentionBroadcastConfig

    return [
        FirstBlockCacheConfig(threshold=0.5),
        PyramidAttentionBroadcastConfig(
            spatial_attention_block_skip_range=2,
            spatial_attention_timestep_skip_range=(0, 1000),
            current_timestep_callback=lambda: 500,
        ),
    ]


@pytest.mark.parametrize("number", [0, 1])
def test_caches_are_left_alone(number):
    pipe = built("wan")
    pipe.transformer.enable_cache(caches()[number])
    expected = called(pipe, "wan")
    pipe = built("wan")
    pipe.transformer.enable_cache(caches()[number])
    handle = enabled(pipe)
    assert torch.equal(called(pipe, "wan"), expected)
    report = handle.report()
    assert report.paired == 0
    assert "Diffusers" in report.unpaired["transformer"]


def test_a_cache_that_comes_between_calls():
    pipe = built("wan")
    handle = enabled(pipe)
    called(pipe, "wan")
    assert handle.report().paired
    handle.reset()
    pipe.transformer.enable_cache(caches()[0])
    called(pipe, "wan")
    assert handle.report().paired == 0
    pipe.transformer.disable_cache()
    called(pipe, "wan")
    assert handle.report().paired


# --- what else runs ---------------------------------------------------------------------------------------


def test_pipelines_that_share_a_transformer():
    from diffusers import WanPipeline

    pipe = built("wan")
    expected = called(pipe, "wan"), called(pipe, "wan", prompt="a grey wolf")
    enabled(pipe)
    other = WanPipeline.from_pipe(pipe)
    other.set_progress_bar_config(disable=True)
    for _ in range(2):
        assert torch.equal(called(pipe, "wan"), expected[0])
        assert torch.equal(called(other, "wan", prompt="a grey wolf"), expected[1])


def test_an_interrupted_call_and_the_next():
    pipe = built("wan")
    expected = called(pipe, "wan")
    handle = enabled(pipe)

    def stops(pipe, step, timestep, values):
        if step == 3:
            raise KeyboardInterrupt
        return values

    with pytest.raises(KeyboardInterrupt):
        called(pipe, "wan", callback_on_step_end=stops)
    assert torch.equal(called(pipe, "wan"), expected)
    pipe.disable_block_offload()
    assert torch.equal(called(pipe, "wan"), expected)
    del handle


def test_an_edit_within_suspended():
    pipe = built("wan")
    handle = enabled(pipe)
    called(pipe, "wan")
    with handle.suspended():
        pipe.transformer.blocks[0].ffn.net[2].weight.data.mul_(1.5)
    made = called(pipe, "wan")
    pipe.disable_block_offload()
    assert torch.equal(made, called(pipe, "wan"))


# --- where it can be asked for ----------------------------------------------------------------------------


def test_from_pretrained(tmp_path):
    import diffusers_offload

    pipe = built("wan")
    expected = called(pipe, "wan")
    pipe.save_pretrained(tmp_path / "saved")
    for number, pair_passes in enumerate((None, False)):
        other = diffusers_offload.from_pretrained(
            tmp_path / "saved", offload_dir=tmp_path / "blocks", device="cpu", pair_passes=pair_passes
        )
        other.set_progress_bar_config(disable=True)
        assert torch.equal(called(other, "wan"), expected)
        assert other.block_offload.report().paired == (0 if number else STEPS - 2)
    with pytest.raises(ValueError, match="pair_passes="):
        diffusers_offload.from_pretrained(
            tmp_path / "saved", offload_dir=tmp_path / "blocks", device="cpu", pair_passes="no"
        )


def test_modular_managers():
    from diffusers import ComponentsManager

    manager = ComponentsManager()
    pipe = built("wan")
    manager.add("transformer", pipe.transformer)
    manager.enable_block_offload(device="cpu", offload_ratio=1.0, pair_passes=False)
    assert manager.block_offload.engines[0].pair_passes is False
    manager.disable_block_offload()
    with pytest.raises(ValueError, match="pair_passes="):
        manager.enable_block_offload(device="cpu", pair_passes=2)

"""What is done between the steps of a call: it works as it does resident."""

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from helpers import build, run, weights_of


def edits_latents(pipe, step, timestep, values):
    return {"latents": values["latents"] * 1.1 + step}


def interrupts(pipe, step, timestep, values):
    pipe._interrupt = step == 1
    return values


def changes_the_guidance(pipe, step, timestep, values):
    pipe._guidance_scale = 2.0
    return {"prompt_embeds": values["prompt_embeds"] * 1.5}


CALLBACKS = {
    "edits latents": {"callback_on_step_end": edits_latents},
    "interrupts": {"callback_on_step_end": interrupts},
    "changes the prompt": {
        "callback_on_step_end": changes_the_guidance,
        "callback_on_step_end_tensor_inputs": ["latents", "prompt_embeds"],
    },
}


@pytest.mark.parametrize("callback", CALLBACKS.values(), ids=CALLBACKS)
@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_a_callback(name, callback, device):
    changes = {"num_inference_steps": 4}
    pipe = build(name, device=device)
    plain, expected = run(pipe, name, **changes), run(pipe, name, **changes, **callback)
    assert not torch.equal(plain, expected)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    for _ in range(2):
        assert torch.equal(run(pipe, name, **changes, **callback), expected)
        assert torch.equal(run(pipe, name, **changes), plain)


def test_a_callback_reads_true_weights(device):
    pipe = build("flux")
    right = weights_of(pipe.transformer)
    seen = []

    def read(pipe, step, timestep, values):
        found = pipe.transformer.state_dict()
        seen.append(all(torch.equal(found[key].cpu(), value) for key, value in right.items()))
        return values

    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    for _ in range(2):
        run(pipe, "flux", callback_on_step_end=read)
    assert seen
    assert all(seen)


def test_a_callback_that_disables_and_enables(device):
    def toggle(pipe, step, timestep, values):
        if pipe.block_offload is None:
            pipe.enable_block_offload(device=device, offload_ratio=0.5)
        elif device == "cpu":
            pipe.disable_block_offload()
        else:
            pipe.enable_block_offload(device=device, offload_ratio=1.0)
        return values

    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    for _ in range(2):
        assert torch.equal(run(pipe, "flux", callback_on_step_end=toggle), expected)


@pytest.mark.parametrize("when", ["between calls", "in a call"])
def test_another_scheduler(when, device):
    def other(pipe):
        return FlowMatchEulerDiscreteScheduler.from_config(
            pipe.scheduler.config, use_dynamic_shifting=False, shift=5.0
        )

    def pictures(pipe):
        yield run(pipe, "flux")
        first = pipe.scheduler
        if when == "between calls":
            pipe.scheduler = other(pipe)
            yield run(pipe, "flux")
        else:

            def swap(pipe, step, timestep, values):
                if step == 0:
                    fresh = FlowMatchEulerDiscreteScheduler.from_config(pipe.scheduler.config)
                    fresh.__dict__.update(vars(pipe.scheduler))
                    fresh.sigmas = fresh.sigmas * 0.9
                    pipe.scheduler = fresh
                return values

            yield run(pipe, "flux", callback_on_step_end=swap)
        pipe.scheduler = first
        yield run(pipe, "flux")

    expected = list(pictures(build("flux", device=device)))
    assert torch.equal(expected[0], expected[2])
    assert not torch.equal(expected[0], expected[1])
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    handle = pipe.block_offload
    assert all(torch.equal(a, b) for a, b in zip(pictures(pipe), expected, strict=True))
    assert pipe.block_offload is handle


def test_the_progress_bar_may_be_configured(capsys):
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    pipe.set_progress_bar_config(disable=False, desc="painting")
    assert torch.equal(run(pipe, "flux"), expected)
    assert "painting" in capsys.readouterr().err

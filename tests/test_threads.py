"""Threads: calls of one pipeline follow one another, two pipelines run side by side, and nothing is ever wrong."""

import inspect
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from helpers import build, run

import diffusers_offload

SEEDS = range(4)


def in_threads(*jobs):
    """The results of `jobs`, which begin at the same moment, each in a thread of its own."""
    together = threading.Barrier(len(jobs))

    def begin(job):
        together.wait()
        return job()

    with ThreadPoolExecutor(len(jobs)) as pool:
        return [each.result(timeout=300) for each in [pool.submit(begin, job) for job in jobs]]


def test_calls_of_one_pipeline_follow_one_another(device):
    pipe = build("flux", device=device)
    expected = [run(pipe, "flux", seed=seed) for seed in SEEDS]
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    found = in_threads(*(lambda seed=seed: run(pipe, "flux", seed=seed) for seed in SEEDS))
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert pipe.block_offload.report().forwards


def test_pipelines_that_share_their_components_follow_one_another(device):
    from diffusers import FluxPipeline

    pipe = build("flux", device=device)
    expected = [run(pipe, "flux", seed=seed) for seed in SEEDS]
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    others = [pipe, FluxPipeline.from_pipe(pipe, torch_dtype=torch.float32), FluxPipeline(**pipe.components)]
    others[1].enable_block_offload(device=device, offload_ratio=1.0)
    for other in others:
        other.set_progress_bar_config(disable=True)
    jobs = [lambda s=s: run(others[s % len(others)], "flux", seed=s) for s in SEEDS]
    assert all(torch.equal(a, b) for a, b in zip(in_threads(*jobs), expected, strict=True))


def test_two_pipelines_run_side_by_side(device):
    names = ["flux", "wan", "flux", "wan"]
    pipes = [build(name, device=device) for name in names]
    expected = [[run(pipe, name, seed=s) for s in range(3)] for pipe, name in zip(pipes, names, strict=True)]
    for pipe in pipes:
        pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    jobs = [
        lambda pipe=pipe, name=name: [run(pipe, name, seed=s) for s in range(3)]
        for pipe, name in zip(pipes, names, strict=True)
    ]
    for found, right in zip(in_threads(*jobs), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))


def test_forwards_of_one_module_from_many_threads(device):
    model = build("wan", device=device).transformer.requires_grad_(False)

    def job(seed):
        generator = torch.Generator().manual_seed(seed)
        inputs = {
            "hidden_states": torch.randn(1, model.config.in_channels, 3, 8, 8, generator=generator).to(
                device
            ),
            "timestep": torch.tensor([seed], device=device),
            "encoder_hidden_states": torch.randn(1, 7, model.config.text_dim, generator=generator).to(device),
        }
        with torch.no_grad():
            return [model(**inputs).sample.cpu() for _ in range(4)]

    expected = [job(seed) for seed in SEEDS]
    handle = diffusers_offload.enable_block_offload(model.to("cpu"), device=device, offload_ratio=1.0)
    for found, right in zip(in_threads(*(lambda s=s: job(s) for s in SEEDS)), expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert not handle._engine.busy


def test_a_block_and_a_layer_called_from_another_thread_wait_their_turn(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    layer = pipe.transformer.x_embedder
    x = torch.randn(1, 4, layer.in_features, device=device)
    block = pipe.text_encoder_2.encoder.block[1]
    y = torch.randn(1, 4, pipe.text_encoder_2.config.d_model, device=device)

    def alone():
        with torch.no_grad():
            return [each for _ in range(20) for each in (block(y)[0], layer(x))]

    right = alone()
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)

    def held():
        with pipe.block_offload.calling():
            return alone()

    found, *pictures = in_threads(held, lambda: run(pipe, "flux"), lambda: run(pipe, "flux"))
    assert all(torch.equal(a, b) for a, b in zip(found, right, strict=True))
    assert all(torch.equal(picture, expected) for picture in pictures)
    found, again, picture = in_threads(alone, alone, lambda: run(pipe, "flux"))
    assert all(torch.equal(a, b) for a, b in zip(found + again, right + right, strict=True))
    assert torch.equal(picture, expected)


def test_whoever_changes_something_waits_for_the_call_under_way():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    begun, waited = threading.Event(), []

    def wait(pipe, step, timestep, values):
        begun.set()
        waited.append(changed.wait(0.3))
        return values

    changed = threading.Event()

    def change(how):
        begun.wait()
        how()
        changed.set()

    def suspended():
        with pipe.block_offload.suspended():
            pass

    def enabled():
        pipe.enable_block_offload(device="cpu", offload_ratio=0.5)

    def exchanged():
        pipe.vae = None
        pipe.vae = vae

    vae = pipe.vae
    for how in (
        suspended,
        exchanged,
        enabled,
        lambda: pipe.vae.to(torch.float32),
        pipe.disable_block_offload,
    ):
        for each in (begun, changed, waited):
            each.clear()
        found, _ = in_threads(
            lambda: run(pipe, "flux", callback_on_step_end=wait), lambda how=how: change(how)
        )
        assert torch.equal(found, expected)
        assert not any(waited)
        assert changed.is_set()


@pytest.mark.parametrize("error", [KeyError, KeyboardInterrupt])
def test_a_call_that_fails_lets_the_others_pass(error, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)

    def fail(*_):
        raise error

    for part in (pipe.transformer.norm_out, pipe.text_encoder_2.encoder.block[1], pipe.vae.decoder):
        hook = part.register_forward_pre_hook(fail)
        with pytest.raises(error):
            run(pipe, "flux")
        hook.remove()
        assert torch.equal(*in_threads(lambda: run(pipe, "flux"), lambda: expected))
    with pytest.raises(error):
        run(pipe, "flux", callback_on_step_end=fail)
    assert not any(component.present for component in pipe.block_offload._engine.components)
    assert torch.equal(*in_threads(lambda: run(pipe, "flux"), lambda: expected))


@pytest.mark.parametrize("place", ["", "transformer_blocks.1"])
def test_a_hook_that_fails_before_the_forward_lets_the_others_pass(place, device):
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Failing(ModelHook):
        fails = True

        def pre_forward(self, module, *args, **kwargs):
            if self.fails:
                raise KeyError("in a hook")
            return args, kwargs

    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    hook = Failing()
    add_hook_to_module(pipe.transformer.get_submodule(place), hook, append=True)
    with pytest.raises(KeyError):
        run(pipe, "flux")
    hook.fails = False
    assert not pipe.block_offload._engine.busy
    assert torch.equal(*in_threads(lambda: run(pipe, "flux"), lambda: expected))


def test_the_call_keeps_its_signature_and_gets_its_old_self_back():
    from diffusers import FluxPipeline

    diffusers_offload.uninstall()
    diffusers_offload.install()
    call = vars(FluxPipeline)["__call__"]
    pipe = build("flux")
    assert vars(FluxPipeline)["__call__"] is call
    pipe.enable_block_offload(device="cpu")
    guarded = vars(FluxPipeline)["__call__"]
    assert guarded is not call
    pipe.enable_block_offload(device="cpu")
    assert vars(FluxPipeline)["__call__"] is guarded
    assert guarded.__wrapped__ is call.__wrapped__  # how one gets past torch.no_grad
    assert inspect.signature(FluxPipeline.__call__) == inspect.signature(call)
    assert FluxPipeline.__call__.__doc__ == call.__doc__
    diffusers_offload.uninstall()
    try:
        assert vars(FluxPipeline)["__call__"] is call
    finally:
        diffusers_offload.install()


def test_a_call_within_a_call():
    pipe = build("flux")
    expected = run(pipe, "flux")
    other = build("wan")
    video = run(other, "wan")
    pipe.enable_block_offload(device="cpu")
    other.enable_block_offload(device="cpu")
    inner = []

    def preview(pipe, step, timestep, values):
        inner.append(run(other, "wan"))
        return values

    assert torch.equal(run(pipe, "flux", callback_on_step_end=preview), expected)
    assert all(torch.equal(each, video) for each in inner)

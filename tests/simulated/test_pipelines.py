"""Real pipelines on the simulated device: equal to the bit, and nothing races."""

import pytest
import torch
from guidance import Loop, Net, offload
from helpers import build, run

from diffusers_offload.tiers import packed

from .device import THE

CASES = [
    ("flux", "block", 1.0),
    ("flux", "phase", 1.0),
    ("flux", "leaf", 1.0),
    ("flux", "block", 0.5),
    ("flux-controlnet", "block", 1.0),
    ("sdxl-controlnet", "phase", 1.0),
    ("wan22", "leaf", 1.0),
    ("qwenimage", "block", 0.5),
]


@pytest.mark.parametrize(("name", "granularity", "ratio"), CASES)
def test_nothing_races(name, granularity, ratio):
    pipe = build(name, device="npu")
    expected = run(pipe, name)
    with THE.checked() as checker:
        pipe.to("cpu").enable_block_offload(
            device="npu", offload_granularity=granularity, offload_ratio=ratio, components={"vae": "model"}
        )
        for _ in range(2):
            assert torch.equal(run(pipe, name), expected)
        pipe.disable_block_offload()
    assert checker.accesses > 1000
    assert not checker.races, "\n".join(checker.races[:5])


@pytest.mark.parametrize("granularity", ["block", "phase", "leaf"])
def test_packed_weights(granularity, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)
    pipe = build("flux", torch.bfloat16, device="npu")
    expected = run(pipe, "flux")
    with THE.checked() as checker:
        pipe.to("cpu").enable_block_offload(
            device="npu", offload_granularity=granularity, offload_ratio=1.0, tier="packed"
        )
        for _ in range(2):
            assert torch.equal(run(pipe, "flux"), expected)
        assert pipe.block_offload.report().packed is not None
        pipe.disable_block_offload()
    assert not checker.races, "\n".join(checker.races[:5])


def test_memory_that_is_kept_within_a_bound():
    pipe = build("wan22", device="npu")
    expected = run(pipe, "wan22", num_inference_steps=4)
    pipe.to("cpu")
    with THE.checked() as checker:
        pipe.enable_block_offload(device="npu", max_device_memory="6MiB")
        for _ in range(2):
            assert torch.equal(run(pipe, "wan22", num_inference_steps=4), expected)
        pipe.disable_block_offload()
    assert not checker.races, "\n".join(checker.races[:5])


@pytest.mark.parametrize(("name", "granularity"), [("wan", "block"), ("qwenimage", "phase"), ("wan", "leaf")])
def test_passes_that_take_turns(name, granularity):
    pipe = build(name, device="npu")
    expected = run(pipe, name, num_inference_steps=5)
    with THE.checked() as checker:
        pipe.to("cpu").enable_block_offload(
            device="npu", offload_granularity=granularity, offload_ratio=1.0, components={"vae": "model"}
        )
        for _ in range(2):
            assert torch.equal(run(pipe, name, num_inference_steps=5), expected)
        assert pipe.block_offload.report().paired == 3 + 4
        pipe.disable_block_offload()
    assert not checker.races, "\n".join(checker.races[:5])


@pytest.mark.parametrize("pair_passes", [None, True, False])
def test_passes_that_take_turns_within_a_bound(pair_passes):
    pipe = build("wan22", device="npu")
    expected = run(pipe, "wan22", num_inference_steps=8)
    pipe.to("cpu")
    with THE.checked() as checker:
        pipe.enable_block_offload(device="npu", max_device_memory="5MiB", pair_passes=pair_passes)
        for _ in range(2):
            assert torch.equal(run(pipe, "wan22", num_inference_steps=8), expected)
        report = pipe.block_offload.report()
        pipe.disable_block_offload()
    assert bool(report.paired) == (pair_passes is not False)
    assert not checker.races, "\n".join(checker.races[:5])


@pytest.mark.parametrize("waits", [True, False])
def test_a_result_is_asked_for_on_another_stream(waits, monkeypatch):
    """It was ordered behind the stream of the call with which it was computed."""
    net = Net()
    handle = offload(net, device="npu")
    other = torch.npu.Stream()

    class OnTwoStreams(Loop):
        def call(self, net, time, number):
            if number == 0:
                other.wait_stream(torch.npu.current_stream())  # it sees the arguments
                return super().call(net, time, number)
            pending = handle.engines[0].components[0].pairs._pending
            if not waits and pending and not pending[0].rehearsal:
                monkeypatch.setattr(type(other), "wait_stream", lambda *_: None)
            with torch.npu.stream(other):
                result = super().call(net, time, number) * 1.0
            monkeypatch.undo()
            torch.npu.current_stream().wait_stream(other)
            return result

    loop = OnTwoStreams()
    loop.latents = loop.latents.to("npu")
    loop.prompts = [prompt.to("npu") for prompt in loop.prompts]
    with torch.no_grad(), THE.checked() as checker, handle.calling():
        steps = [torch.tensor([step / 10], device="npu") for step in range(5)]
        for time in steps:
            one, two = (loop.call(net, time, number) for number in (0, 1))
            loop.latents = one - two
    assert handle.report().paired == 3
    assert bool(checker.races) != waits

"""Real pipelines on the simulated device: equal to the bit, and nothing races."""

import pytest
import torch
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

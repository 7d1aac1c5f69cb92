"""What a step takes it gives back: memory, threads and files stay as they are, however long it runs."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from helpers import run

from diffusers_offload.demo import pipelines as zoo
from diffusers_offload.demo.memory import device_bytes, host_bytes

GRANULARITIES = ("block", "phase", "leaf")
STEPS = 50
WARM_UP = 10  # steps until allocators and caches have what they need
SIZES = {  # units of about a megabyte: 50 that were not given back would be far more than one per cent
    "flux": {"num_layers": 2, "num_single_layers": 2, "num_attention_heads": 12},
    "sdxl": {"block_out_channels": (16, 64, 128), "transformer_layers_per_block": (1, 1, 2)},
}


@dataclass(frozen=True)
class Usage:
    """What this process holds: bytes on the host and on the device, bytes of live tensors, threads, open files."""

    host: int
    device: int
    tensors: int
    threads: int
    files: int


def usage(device: str) -> Usage:
    gc.collect()
    if device != "cpu":
        torch.accelerator.synchronize()
    return Usage(
        host=host_bytes(),
        device=device_bytes(torch.device(device)) or 0,
        tensors=tensor_bytes(),
        threads=len(list(Path("/proc/self/task").iterdir())),
        files=len(os.listdir("/proc/self/fd")),
    )


def tensor_bytes() -> int:
    """Bytes of all storages that a tensor known to Python looks at."""
    storages = {}
    for each in gc.get_objects():
        if type(each) in (torch.Tensor, torch.nn.Parameter) and each.layout is torch.strided:
            storage = each.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def assert_steady(samples: list[Usage]) -> None:
    first = samples[0]
    for sample in samples:
        assert sample.host == pytest.approx(first.host, rel=0.01)
        assert sample.device == pytest.approx(first.device, rel=0.01)
        assert sample.tensors == pytest.approx(first.tensors, rel=0.01)
        assert (sample.threads, sample.files) == (first.threads, first.files)


def build(name: str):
    pipe = zoo.build(name, **SIZES[name])
    for component in ("text_encoder", "text_encoder_2"):
        getattr(pipe, component).requires_grad_(False)
    return pipe


@pytest.fixture(autouse=True)
def only_what_is_new():
    """Collecting and looking through what is there before takes longer than the tests."""
    gc.collect()
    gc.freeze()


linux_only = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files as Linux shows them")


@linux_only
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", SIZES)
def test_fifty_steps_take_what_one_takes(name, granularity, device):
    pipe = build(name)
    pipe.enable_block_offload(device=device, offload_granularity=granularity)
    run(pipe, name)
    samples: list[Usage] = []

    def look(pipe, step, timestep, values):
        if step >= WARM_UP and step % 10 == 9:
            samples.append(usage(device))
        return values

    run(pipe, name, num_inference_steps=STEPS, callback_on_step_end=look, output_type="latent")
    assert len(samples) == 4
    assert_steady(samples)


@linux_only
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_calls_and_enablements_leave_nothing_behind(granularity, device):
    pipe = build("flux")
    samples = []
    for cycle in range(7):
        pipe.enable_block_offload(device=device, offload_granularity=granularity)
        run(pipe, "flux", num_inference_steps=1)
        run(pipe, "flux", num_inference_steps=1)
        pipe.disable_block_offload()
        if cycle >= 3:
            samples.append(usage(device))
    assert_steady(samples)


@linux_only
def test_a_policy_for_another_leaves_nothing_behind(device):
    pipe = build("flux")
    samples = []
    for cycle in range(20):
        granularity = (*GRANULARITIES, "model")[cycle % 4]
        pipe.enable_block_offload(device=device, offload_granularity=granularity)
        run(pipe, "flux", num_inference_steps=1)
        if granularity == "model" and cycle >= 8:
            samples.append(usage(device))
    assert_steady(samples)

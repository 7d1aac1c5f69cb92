"""The rule of `test_equality`, for pipelines chosen for how differently they are built."""

import pytest
import torch
import zoo
from helpers import no_weight_used_while_offloaded
from poison import poisoned

GRANULARITIES = ("block", "phase", "leaf")


def run(pipe, name: str, device: str, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)  # some pipelines draw a sample of the autoencoder's without the generator
    kwargs = zoo.call_kwargs(name, device)
    return zoo.output(pipe(**kwargs, generator=torch.Generator("cpu").manual_seed(seed)))


@pytest.mark.parametrize("name", zoo.PIPELINES)
def test_offloaded_equals_resident(name, device):
    pipe = zoo.build(name, device=device)
    expected = run(pipe, name, device)
    assert expected.isfinite().all()
    assert not torch.equal(expected, run(pipe, name, device, seed=1)), (
        "an output that never changes proves nothing"
    )
    for granularity in GRANULARITIES:
        offloaded_equals(pipe.to("cpu"), name, granularity, device, expected)
        assert torch.equal(run(pipe.to(device), name, device), expected), granularity


def offloaded_equals(pipe, name: str, granularity: str, device: str, expected: torch.Tensor) -> None:
    reads = zoo.PIPELINES[name].reads
    pipe.enable_block_offload(device=device, offload_ratio=1.0, offload_granularity=granularity)
    assert any(len(component.streamed) >= 2 for component in pipe.block_offload.plan.components), granularity
    assert torch.equal(run(pipe, name, device), expected), granularity
    with no_weight_used_while_offloaded(pipe, but=reads):
        assert torch.equal(run(pipe, name, device), expected), granularity
    with poisoned(pipe.block_offload, but=reads):
        assert torch.equal(run(pipe, name, device), expected), granularity
    pipe.disable_block_offload()

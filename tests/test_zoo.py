"""The rule of `test_equality`, for pipelines chosen for how differently they are built."""

import pytest
import torch
import zoo
from helpers import no_weight_used_while_offloaded

GRANULARITIES = ("block", "phase", "leaf")


def run(pipe, name: str, seed: int = 0) -> torch.Tensor:
    torch.manual_seed(seed)  # some pipelines draw a sample of the autoencoder's without the generator
    return zoo.output(pipe(**zoo.call_kwargs(name), generator=torch.Generator("cpu").manual_seed(seed)))


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", zoo.PIPELINES)
def test_offloaded_equals_resident(name, granularity, device):
    pipe = zoo.build(name, device=device)
    expected = run(pipe, name)
    assert expected.isfinite().all()
    assert not torch.equal(expected, run(pipe, name, seed=1)), "an output that never changes proves nothing"
    pipe.to("cpu")

    pipe.enable_block_offload(device=device, offload_granularity=granularity)
    assert any(len(component.streamed) >= 2 for component in pipe.block_offload.plan.components)
    assert torch.equal(run(pipe, name), expected)
    with no_weight_used_while_offloaded(pipe, but=zoo.PIPELINES[name].reads):
        assert torch.equal(run(pipe, name), expected)

    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), name), expected)

"""Host memory: pinned at its exact size; where that is refused, slower but right."""

import pytest
import torch
from helpers import build, run, warnings_of_ours

from diffusers_offload.streams import find_device, open_streams
from diffusers_offload.tiers import pinned
from diffusers_offload.tiers.pinned import PinnedTier


def test_the_cpu_pins_nothing():
    memory = PinnedTier(open_streams(torch.device("cpu"))).allocate(1000)
    assert memory.bytes.numel() == 1000
    assert not memory.pinned


@pytest.mark.gpu
def test_memory_is_pinned_at_its_exact_size():
    tier = PinnedTier(open_streams(find_device("cuda")))
    sizes = [5 * 2**20 + 1, 3, 2**20]
    for size, memory in zip(sizes, tier.prepare(sizes), strict=True):
        assert memory.pinned
        assert memory.bytes.is_pinned()
        assert memory.bytes.numel() == size
        assert memory.bytes.untyped_storage().nbytes() < size + 4096


class Refusing:
    """cudart that refuses to register, as it does when the limit on locked memory is reached."""

    def __init__(self, real):
        self.real = real

    def cudaHostRegister(self, *_):
        return 2  # cudaErrorMemoryAllocation

    def cudaHostUnregister(self, *_):
        raise AssertionError("nothing was registered")


@pytest.mark.gpu
@pytest.mark.parametrize("staging", ["there", "refused as well"])
def test_refused_pinning_gives_one_warning_and_right_results(staging, monkeypatch):
    pipe = build("flux", device="cuda")
    expected = run(pipe, "flux")
    pipe.to("cpu")
    monkeypatch.setattr(torch.cuda, "cudart", lambda real=torch.cuda.cudart: Refusing(real()))
    monkeypatch.setattr(pinned, "STAGING_BYTES", 4096)  # many pieces, many turns
    if staging != "there":
        empty = torch.empty

        def refuse(*args, pin_memory=False, **kwargs):
            if pin_memory:
                raise RuntimeError("no pinned memory left")
            return empty(*args, **kwargs)

        monkeypatch.setattr(torch, "empty", refuse)
    with warnings_of_ours() as records:
        pipe.enable_block_offload(device="cuda", offload_ratio=1.0)
        for _ in range(2):
            assert torch.equal(run(pipe, "flux"), expected)
    assert len([r for r in records if "could not be pinned" in r.getMessage()]) == 1
    assert pipe.block_offload.report().pinned_bytes == 0
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to("cuda"), "flux"), expected)

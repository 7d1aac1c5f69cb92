"""Each stream in turn is made late on a real device: a wait that is missing would show as other numbers.

The simulated device (tests/simulated) finds missing waits by order alone; this is the cross-check on hardware.
"""

import odd_nets
import pytest
import torch
from helpers import build, run

import diffusers_offload
from diffusers_offload.tiers import packed
from diffusers_offload.transfers import Transfers

pytestmark = pytest.mark.gpu
CYCLES = 2_000_000  # about a millisecond; a block of these models computes some tens of microseconds
GRANULARITIES = ("block", "phase", "leaf")


def late(method):
    """`method`, its work behind a pause of the stream that it is queued on."""

    def slow(self, *arguments):
        before = self._streams.switch(
            self._streams.load if method.__name__ == "load" else self._streams.evict
        )
        torch.cuda._sleep(CYCLES)
        self._streams.restore(before)
        return method(self, *arguments)

    return slow


def pause(*_):
    torch.cuda._sleep(CYCLES)


def computes_late(modules):
    for module in modules:
        module.register_forward_pre_hook(pause)
        module.register_forward_hook(pause)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stream", ["load", "compute", "caller"])
@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_a_pipeline_with_one_late_stream(name, stream, granularity, monkeypatch):
    pipe = build(name, device="cuda")
    expected = run(pipe, name)
    pipe.to("cpu").enable_block_offload(device="cuda", offload_ratio=1.0, offload_granularity=granularity)
    arguments = {}
    if stream == "load":
        monkeypatch.setattr(Transfers, "load", late(Transfers.load))
    elif stream == "compute":
        held = pipe.block_offload._held.values()
        computes_late([m for each in held for unit in each.component.streamed for m in unit.modules])
    else:
        arguments["callback_on_step_end"] = lambda pipe, step, timestep, given: pause() or given
    for _ in range(2):
        assert torch.equal(run(pipe, name, **arguments), expected)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("stream", ["load", "unpack", "compute"])
def test_packed_weights_with_one_late_stream(stream, granularity, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)
    pipe = build("wan22", torch.bfloat16, "cuda")
    expected = run(pipe, "wan22")
    pipe.to("cpu").enable_block_offload(
        device="cuda", offload_ratio=1.0, offload_granularity=granularity, tier="packed"
    )
    assert pipe.block_offload.report().packed is not None
    unpack = packed.unpack
    if stream == "load":
        monkeypatch.setattr(Transfers, "load", late(Transfers.load))
    elif stream == "unpack":  # queued with its stream current
        monkeypatch.setattr(packed, "unpack", lambda *given: pause() or unpack(*given))
    else:
        held = pipe.block_offload._held.values()
        computes_late([m for each in held for unit in each.component.streamed for m in unit.modules])
    for _ in range(2):
        assert torch.equal(run(pipe, "wan22"), expected)


@pytest.mark.parametrize("late_one", ["load", "write_back", "compute"])
def test_buffers_that_are_written_back(late_one, monkeypatch):
    def net():
        torch.manual_seed(0)
        return odd_nets.Net(*(odd_nets.Counts() for _ in range(5))).eval().requires_grad_(False)

    x = torch.randn(2, 3, odd_nets.WIDTH, device="cuda")
    resident, streamed = net().cuda(), net()
    expected = [resident(x * step) for step in range(1, 5)]
    diffusers_offload.enable_block_offload(streamed, device="cuda", offload_ratio=1.0)
    if late_one == "compute":
        computes_late(streamed.blocks)
    else:
        monkeypatch.setattr(Transfers, late_one, late(getattr(Transfers, late_one)))
    for step, right in enumerate(expected, 1):
        assert torch.equal(streamed(x * step), right)
    for name, tensor in streamed.state_dict().items():
        assert torch.equal(tensor.cpu(), resident.state_dict()[name].cpu()), name

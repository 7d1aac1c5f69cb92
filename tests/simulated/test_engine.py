"""The engine on the simulated device: late work in any order, steady memory, forecasts that hold."""

import gc

import odd_nets
import pytest
import torch
from helpers import build, run
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import diffusers_offload
from diffusers_offload import held
from diffusers_offload.streams import DeviceStreams
from diffusers_offload.tiers import packed

from .device import THE

DEVICE = "npu"
GRANULARITIES = ("block", "phase", "leaf")


def net_of(kind):
    torch.manual_seed(0)
    return odd_nets.Net(*(kind() for _ in range(5))).eval().requires_grad_(False)


def steps_of(net, count=3):
    x = torch.randn(2, 3, odd_nets.WIDTH, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return [net(x * step).cpu() for step in range(1, count + 1)]


def test_streams_are_used_in_a_fixed_order_before_anybody_needs_them():
    """CUDA gives each its place in the hardware's queues then, and some places are slow beside each other."""
    with THE.checked() as checker:
        streams = DeviceStreams(torch.device(DEVICE, 0))
    assert not checker.races, checker.races[:3]
    done = [stream.time for stream in (streams.load, streams.unpack, streams.compute, streams.evict)]
    assert 0 < done[0] < done[1] < done[2] < done[3]
    assert all(stream.query() for stream in (streams.load, streams.unpack, streams.compute, streams.evict))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32),
    granularity=st.sampled_from(GRANULARITIES),
    ratio=st.sampled_from([1.0, 0.5]),
    kind=st.sampled_from([odd_nets.Plain, odd_nets.Counts]),
)
def test_work_may_be_late_in_any_order(seed, granularity, ratio, kind):
    resident = net_of(kind).to(DEVICE)
    expected = steps_of(resident)
    net = net_of(kind)
    with THE.delayed(seed):
        handle = diffusers_offload.enable_block_offload(
            net, device=DEVICE, offload_granularity=granularity, offload_ratio=ratio
        )
        found = steps_of(net)
        handle.disable()
    assert THE.schedule.postponed
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    for a, b in zip(net.state_dict().values(), resident.state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_a_pipeline_whose_work_is_late(name, seed):
    pipe = build(name)
    expected = run(pipe.to(DEVICE), name)
    pipe.to("cpu").enable_block_offload(
        device=DEVICE, offload_ratio=1.0, offload_granularity=GRANULARITIES[seed]
    )
    with THE.delayed(seed):
        assert torch.equal(run(pipe, name), expected)
    pipe.disable_block_offload()


@pytest.mark.parametrize("packs", [False, True], ids=["raw", "packed"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("memory", [None, "1100KiB"])
def test_weights_on_disk(memory, granularity, packs, tmp_path, monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)
    pipe = build("flux")
    expected = run(pipe.to(DEVICE), "flux")
    with THE.checked() as checker:
        pipe.to("cpu").enable_block_offload(
            device=DEVICE,
            offload_ratio=1.0,
            offload_granularity=granularity,
            tier="disk",
            offload_dir=tmp_path,
            max_host_memory=memory,
            pack_on_disk=packs,
        )
        for _ in range(2):
            assert torch.equal(run(pipe, "flux"), expected)
        assert (pipe.block_offload.report().packed is not None) == packs
        pipe.disable_block_offload()
    assert not checker.races, checker.races[:3]


def test_no_ring_stays_where_nothing_is_packed_any_longer(tmp_path, monkeypatch):
    """A folder with packed files, whose weights are to lie in host memory as they are."""
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)
    pipe = build("flux", torch.bfloat16)
    pipe.save_pretrained(tmp_path / "saved")
    place = diffusers_offload.convert(tmp_path / "saved", tmp_path / "packed", torch.bfloat16, packed=True)
    pipe = diffusers_offload.from_pretrained(place, device=DEVICE, tier="pinned", offload_ratio=1.0)
    assert pipe.block_offload._engine.packed.staging_bytes == 0
    pipe.disable_block_offload()


@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_calls_take_no_more_memory_than_the_first_ones(granularity):
    pipe = build("flux")
    pipe.enable_block_offload(device=DEVICE, offload_ratio=1.0, offload_granularity=granularity)
    for _ in range(2):
        run(pipe, "flux")
    torch.npu.empty_cache()
    run(pipe, "flux")
    allocated, grown = THE.memory.allocated, THE.memory.grown
    for _ in range(3):
        run(pipe, "flux")
        assert (THE.memory.allocated, THE.memory.grown) == (allocated, grown)
    pipe.disable_block_offload()


def test_everything_is_given_back():
    gc.collect()
    before, pinned = THE.memory.allocated, len(THE.pinned)
    pipe = build("wan22")
    pipe.enable_block_offload(device=DEVICE, offload_ratio=0.5)
    run(pipe, "wan22")
    assert THE.memory.allocated > before and len(THE.pinned) > pinned
    pipe.disable_block_offload()
    del pipe  # its scheduler remembers what came out
    gc.collect()
    assert (THE.memory.allocated, len(THE.pinned)) == (before, pinned)


def large_net(count):
    """`count` blocks of 16 MiB, and what goes in."""
    blocks = (nn.Sequential(nn.Linear(1024, 2048), nn.GELU(), nn.Linear(2048, 1024)) for _ in range(count))
    net = odd_nets.Net(*blocks)
    net.embed, net.out = nn.Linear(8, 1024), nn.Linear(1024, 8)
    return net.eval().requires_grad_(False), torch.randn(64, 8).to(DEVICE)


def needs(net, x):
    """(bytes on the device besides, bytes of activations, bytes of weights) of a resident forward."""
    weights = sum(p.numel() * p.element_size() for p in net.parameters())
    net.to(DEVICE)(x)
    torch.npu.reset_peak_memory_stats()
    before = THE.memory.allocated - weights
    net(x)
    activations = THE.memory.peak_allocated - THE.memory.allocated
    net.to("cpu")
    torch.npu.empty_cache()
    return before, activations, weights


@pytest.mark.parametrize("share", [0.3, 0.6, 0.9])
def test_what_is_predicted_comes_true(share):
    """The peak to the byte but for rounding, and the step's seconds on the simulated clock."""
    net, x = large_net(12)
    before, activations, weights = needs(net, x)
    limit = before + activations + int(weights * share)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, max_device_memory=limit)
    for _ in range(6):
        net(x)
    engine = handle._engine
    prediction = engine.budget.predict(engine.components[0])
    assert prediction.kept_bytes
    torch.npu.synchronize()
    torch.npu.reset_peak_memory_stats()
    begin = engine.streams.compute.time
    for _ in range(4):
        net(x)
    step = (engine.streams.compute.time - begin) / 4
    assert THE.memory.peak_allocated <= limit
    assert THE.memory.peak_allocated == pytest.approx(prediction.peak_bytes, rel=0.02)
    assert step == pytest.approx(prediction.seconds, rel=0.05)
    handle.disable()


@pytest.mark.parametrize("rows", [32, 96])
def test_new_inputs_are_planned_for_as_if_they_were_the_first(rows):
    """What was kept for others before them, and lies in the allocator's cache, is no need of theirs."""
    net, x = large_net(12)
    before, activations, weights = needs(net, x)
    limit = before + activations + int(weights * 0.6)
    other = torch.randn(rows, 8).to(DEVICE)
    kept = []
    for inputs in ((other,), (x, other)):
        handle = diffusers_offload.enable_block_offload(net, device=DEVICE, max_device_memory=limit)
        for one in inputs:
            for _ in range(4):
                net(one)
        (component,) = handle._engine.components
        kept.append(component.kept_bytes)
        handle.disable()
    assert kept[0] > weights // 4
    assert kept[0] == kept[1]


def test_what_waits_for_the_bus_is_packed_before_the_next_call(monkeypatch):
    net, x = large_net(6)
    before, activations, weights = needs(net, x)
    expected = net.to(DEVICE)(x).cpu()
    net.to("cpu")
    values = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    monkeypatch.setattr(held, "unpacks_fast", lambda device: True)
    limit = before + activations + weights // 2
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, max_device_memory=limit)
    with handle.calling():
        for _ in range(4):
            assert torch.equal(net(x).cpu(), expected)
    before = handle.report()
    assert before.packed is None
    with handle.calling():
        for _ in range(4):
            assert torch.equal(net(x).cpu(), expected)
    after = handle.report()
    assert after.packed is not None and after.host_bytes < 0.9 * before.host_bytes
    assert handle.predictions()  # measured anew
    assert all(torch.equal(tensor, values[name]) for name, tensor in net.state_dict().items())
    handle.disable()
    assert all(torch.equal(tensor, values[name]) for name, tensor in net.state_dict().items())


def test_packing_takes_the_memory_of_the_arena(monkeypatch):
    """A bound on the device's memory holds while weights are packed, too."""
    net, x = large_net(6)
    before, activations, weights = needs(net, x)
    monkeypatch.setattr(held, "unpacks_fast", lambda device: True)
    monkeypatch.setattr(packed.packer, "_CHUNK", 64 * packed.packer.BLOCK)
    limit = before + activations + weights * 3 // 5
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, max_device_memory=limit)
    roster, peaks = handle._engine.roster, []
    pack = roster.pack

    def watched(component):
        torch.npu.reset_peak_memory_stats()
        pack(component)
        peaks.append(THE.memory.peak_allocated)

    monkeypatch.setattr(roster, "pack", watched)
    for _ in range(2):
        with handle.calling():
            for _ in range(4):
                net(x)
    assert peaks and peaks[0] <= limit
    handle.disable()


def test_what_stays_is_what_the_disk_would_be_read_for(tmp_path):
    """Where host memory holds half of the blocks, those that stay on the device are of the other half."""
    net, x = large_net(16)
    before, activations, weights = needs(net, x)
    expected = net.to(DEVICE)(x).cpu()
    net.to("cpu")
    handle = diffusers_offload.enable_block_offload(
        net,
        device=DEVICE,
        tier="disk",
        offload_dir=tmp_path,
        max_host_memory=weights // 2,
        max_device_memory=before + activations + weights * 2 // 5,
    )
    engine = handle._engine
    (component,) = engine.components
    for _ in range(6):
        assert torch.equal(net(x).cpu(), expected)
    read = {
        unit
        for unit, reads in zip(component.streamed, engine.disk.reads(component.streamed), strict=True)
        if reads
    }
    kept = {unit for unit in component.streamed if unit.keeps}
    assert 8 <= len(read) < 16 and kept and kept < read
    left = sum(unit.nbytes for unit in read - kept)
    read_before, _ = engine.disk.read_so_far
    for _ in range(4):
        net(x)
    read_since = engine.disk.read_so_far[0] - read_before
    assert read_since == pytest.approx(4 * left, rel=0.1)
    handle.disable()

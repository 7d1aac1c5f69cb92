"""Weights on disk where much goes wrong or changes: small nets whose blocks are of equal size."""

import copy
import gc
import os
import threading

import pytest
import torch
from odd_nets import STEPS, Counts, Net, Plain

import diffusers_offload
from diffusers_offload.streams import InlineEvent
from diffusers_offload.tiers.buffers import Buffers, room_for
from diffusers_offload.tiers.mapped import DiskMemory
from diffusers_offload.tiers.reader import DiskReadError
from diffusers_offload.tiers.traces import private_bytes

POLICIES = ("static", "fifo", "lru")
ROOM = 8192  # of a block, as allocated


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def net_of(count=12, kind=Plain):
    torch.manual_seed(0)
    return Net(*(kind() for _ in range(count))).eval()


def on_disk(net, folder, device="cpu", **arguments):
    arguments = {"offload_ratio": 1.0, **arguments}
    return diffusers_offload.enable_block_offload(net, device, tier="disk", offload_dir=folder, **arguments)


def outputs(net, device="cpu"):
    return [step(net, device).cpu() for step in STEPS]


def same(found, expected):
    return all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def same_weights(net, other):
    return same([t.cpu() for t in net.state_dict().values()], [t.cpu() for t in other.state_dict().values()])


def unit_of(handle, number):
    return handle._held["module"].component.streamed[number]


# --- the cache ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [0.25, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("policy", POLICIES)
def test_hit_rates_are_those_of_theory(policy, share, tmp_path):
    net, count = net_of(16), 16
    rooms = {room_for(sum(t.nbytes for t in block.state_dict().values())) for block in net.blocks}
    assert rooms == {ROOM}
    kept = int(share * count)
    handle = on_disk(
        net, tmp_path, cache_policy=policy, max_host_memory=(kept if kept == count else kept + 3) * ROOM
    )
    outputs(net)
    before = handle.report()
    outputs(net)
    after = handle.report()
    hits, misses = after.disk.hits - before.disk.hits, after.disk.misses - before.disk.misses
    assert hits + misses == after.loads - before.loads  # each load is one of both
    theory = share if policy == "static" or share == 1.0 else 0.0
    assert hits / (hits + misses) == pytest.approx(theory, abs=0.05)  # it may begin and end within the cycle
    assert (share == 1.0) == (after.disk.bytes_read == before.disk.bytes_read)
    handle.disable()


@pytest.mark.parametrize("granularity", ["block", "leaf"])
@pytest.mark.parametrize("policy", POLICIES)
def test_host_memory_is_never_exceeded(policy, granularity, tmp_path, monkeypatch):
    """Counted where it is allocated, page by page; units have several sizes."""
    for rooms in (2, 3, 5, 9):
        net = Net(*(Counts() if i % 3 else Plain() for i in range(8))).eval()
        limit = rooms * ROOM
        handle = on_disk(
            net, tmp_path, max_host_memory=limit, cache_policy=policy, offload_granularity=granularity
        )
        tier, most = handle._engine.disk._buffers, []

        def room(host, tier=tier, most=most):
            buffer = Buffers._room(tier, host)
            held = [buffer.memory] if buffer is not None else []
            held += [each.memory for each in tier._lying.values()] + tier._slots + tier._spare
            most.append(sum(memory.bytes.untyped_storage().nbytes() for memory in held))
            return buffer

        monkeypatch.setattr(tier, "_room", room)
        for _ in range(2):
            outputs(net)
        assert max(most) <= limit
        report = handle.report()
        written = sum(unit.weights.written_bytes for unit in handle._held["module"].component.units)
        assert report.host_bytes == tier.held_bytes + written
        handle.disable()


@pytest.mark.parametrize("policy", ["fifo", "lru"])
def test_what_is_on_its_way_to_the_device_is_not_overwritten(policy, tmp_path, monkeypatch):
    """A unit that hits is copied again: until that is done, it does not give way."""
    net = net_of()
    handle = on_disk(net, tmp_path, max_host_memory=5 * ROOM, cache_policy=policy)
    outputs(net)
    handle.call_ended()
    tier, hosts = handle._engine.disk._buffers, [unit.weights.host for unit in handle._engine.units]
    for buffer in tier._lying.values():
        buffer.read.wait()
        buffer.used, buffer.copied = True, InlineEvent()
    tier._room(hosts[0])  # finds that all copies are done
    held = [host for host in hosts if host.key in tier._cache and host.key in tier._lying]
    monkeypatch.setattr(InlineEvent, "query", lambda self: False)
    for host in held:
        tier.fetch(host)
        tier.loaded(host, InlineEvent())
    for host in hosts:
        if host.key not in tier._lying:
            tier._fetch(host, 0)
    assert held and all(host.key in tier._lying for host in held)
    handle.disable()


def test_slots_are_free_again_for_units_that_did_not_come(tmp_path):
    """Read ahead for a scene that changed: what was read waits no longer than until it is due."""
    first, second = net_of(), net_of()
    both = torch.nn.ModuleDict({"first": first, "second": second})
    handle = on_disk(both, tmp_path, max_host_memory=3 * ROOM)
    with handle.calling():
        outputs(first)
        for _ in range(2):
            outputs(second)
        tier = handle._engine.disk._buffers
        lying = [unit for unit in handle._engine.units if unit.weights.host.key in tier._lying]
        assert len(lying) == 3 and all(unit.name.startswith("second") for unit in lying)


# --- what weights become ------------------------------------------------------------------------------------


@pytest.mark.parametrize("rooms", [None, 3])
@pytest.mark.parametrize("granularity", ["block", "leaf"])
def test_what_blocks_write_to_their_buffers_stays(granularity, rooms, tmp_path, device):
    net, twin = net_of(6, Counts), net_of(6, Counts).to(device)
    handle = on_disk(
        net,
        tmp_path,
        device,
        offload_granularity=granularity,
        max_host_memory=rooms and rooms * ROOM,
    )
    for _ in range(2):
        assert same(outputs(net, device), outputs(twin, device))
    net.blocks[1].a.weight.mul_(2), twin.blocks[1].a.weight.mul_(2)
    assert same(outputs(net, device), outputs(twin, device))
    assert same_weights(net, twin)
    handle.disable()
    assert same(outputs(net.to(device), device), outputs(twin, device))


def test_weights_that_grow_out_of_their_buffers(tmp_path, device):
    net = net_of().bfloat16()
    twin = copy.deepcopy(net).to(device)
    handle = on_disk(net, tmp_path, device, max_host_memory=5 * ROOM)
    net.float(), twin.float()
    STEPS[0](net, device)
    net.to(torch.float64), twin.to(torch.float64)
    x = torch.randn(2, 3, net.embed.in_features, dtype=torch.float64, device=device)
    assert torch.equal(net(x), twin(x))
    report = handle.report()
    assert report.host_bytes <= 5 * ROOM and report.disk.misses
    handle.disable()


def test_weights_that_no_longer_fit_are_an_error_that_can_be_mended(tmp_path):
    net = net_of()
    twin = copy.deepcopy(net)
    handle = on_disk(net, tmp_path, max_host_memory=ROOM)
    outputs(net)
    net.double()
    with pytest.raises(ValueError, match="max_host_memory"):
        net(torch.ones(1, 3, net.embed.in_features, dtype=torch.float64))
    net.float()
    assert same(outputs(net), outputs(twin))
    handle.disable()


@pytest.mark.parametrize("again", [False, True])
def test_parts_of_a_block_are_edited_one_by_one(again, tmp_path):
    net, twin = net_of(4), net_of(4)
    handle = on_disk(net, tmp_path, offload_granularity="leaf", max_host_memory=4 * ROOM)
    expected = outputs(twin)
    for part in ("a", "b", "c", *("b", "a") * again):
        for each in (net, twin):
            layer = getattr(each.blocks[1], part)
            layer.weight.mul_(-1)
            layer.bias.data = layer.bias.data.clone()
        expected = outputs(twin)
        assert same(outputs(net), expected) and same_weights(net, twin)
    handle.disable()
    assert same(outputs(net), expected)
    assert not list(tmp_path.rglob("edited-*"))


@pytest.mark.skipif(not private_bytes(), reason="the system does not tell")
def test_edits_without_a_trace_count_from_the_next_call_on(tmp_path, device):
    net = net_of(6)
    net.blocks[0] = Counts()  # which writes to pages of its own mapping, and need not be written anew
    twin = copy.deepcopy(net).to(device)
    handle = on_disk(net, tmp_path, device)
    assert same(outputs(net, device), outputs(twin, device))
    for number in (2, 3, 2):
        handle.call_ended()
        for each in (net, twin):
            each.blocks[number].b.weight.data.add_(1)
            each.embed.weight.data.add_(1)
        assert same(outputs(net, device), outputs(twin, device))
    assert sum(1 for _ in tmp_path.rglob("edited-*")) == 2
    assert same_weights(net, twin)
    handle.disable()


def test_two_models_with_the_same_weights_are_edited_apart(tmp_path):
    """They lie in the same files."""
    nets, twin = [net_of(4, Counts), net_of(4, Counts)], net_of(4, Counts)
    handles = [on_disk(net, tmp_path) for net in nets]
    assert len(list(tmp_path.iterdir())) == 1
    nets[0].blocks[0].a.weight.mul_(2)
    outputs(nets[0])
    assert same_weights(nets[1], twin)
    assert same(outputs(nets[1]), outputs(twin)) and same_weights(nets[1], twin)
    for handle in handles:
        handle.disable()


@pytest.mark.parametrize("rooms", [None, 3])
def test_a_component_taken_apart_anew_lets_go_of_everything(rooms, tmp_path):
    net, twin = net_of(), net_of()
    handle = on_disk(net, tmp_path, max_host_memory=rooms and rooms * ROOM)
    outputs(net)
    for each in (net, twin):
        each.blocks[2].a = torch.nn.Sequential(each.blocks[2].a, torch.nn.Identity())
        each.blocks[2].c = torch.nn.Linear(each.blocks[2].c.in_features, each.blocks[2].c.out_features)
        each.blocks[2].c.load_state_dict(twin.blocks[1].c.state_dict())
    handle.call_ended()
    assert same(outputs(net), outputs(twin))
    for each in (net, twin):
        each.blocks[0].a.weight.mul_(2)  # which has stayed where it was
    assert same(outputs(net), outputs(twin))
    assert isinstance(unit_of(handle, 0).weights.host, DiskMemory)
    handle.disable()
    assert same(outputs(net), outputs(twin))
    assert not list(tmp_path.rglob("edited-*")) and not open_in(tmp_path)


# --- what goes wrong ----------------------------------------------------------------------------------------


def open_in(folder):
    """Files in `folder` that this process has open."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        try:
            found.append(os.readlink(f"/proc/self/fd/{number}"))
        except OSError:
            pass
    return [path for path in found if path.startswith(str(folder))]


def test_what_failed_when_it_was_read_ahead_is_read_again(tmp_path):
    net = net_of()
    handle = on_disk(net, tmp_path, max_host_memory=4 * ROOM)
    expected = outputs(net)
    tier, hosts = handle._engine.disk._buffers, [unit.weights.host for unit in handle._engine.units]
    handle.call_ended()  # nothing is on the device
    paths = [host.stored.path for host in hosts]
    for path in paths:
        path.rename(path.with_suffix(".away"))
    for host in hosts:
        tier.forget(host)
    tier.expect(hosts)
    ahead = list(tier._lying.values())
    assert ahead
    for buffer in ahead:
        with pytest.raises(DiskReadError):
            buffer.read.wait()
    with pytest.raises(DiskReadError, match=paths[0].name):  # in the forward that needs it
        outputs(net)
    for path in paths:
        path.with_suffix(".away").rename(path)
    assert same(outputs(net), expected)
    handle.disable()


@pytest.mark.parametrize("policy", POLICIES)
def test_no_buffer_is_lost_on_errors(policy, tmp_path):
    net = net_of()
    handle = on_disk(net, tmp_path, max_host_memory=6 * ROOM, cache_policy=policy)
    expected = outputs(net)
    tier = handle._engine.disk._buffers
    for number in (0, 3, 7, 11) * 2:
        path = unit_of(handle, number).weights.host.stored.path
        path.rename(path.with_suffix(".away"))
        tier.forget(unit_of(handle, number).weights.host)
        with pytest.raises(DiskReadError, match=path.name):
            outputs(net)
        path.with_suffix(".away").rename(path)
        assert same(outputs(net), expected)
        assert tier.held_bytes == 6 * ROOM
        assert tier._cache.nbytes == sum(b.memory.bytes.numel() for b in tier._lying.values() if b.kept)
    handle.disable()


@pytest.mark.parametrize("end", ["disabled", "dropped", "failed"])
def test_threads_and_files_end_with_the_offload(end, tmp_path):
    gc.collect()
    threads = set(threading.enumerate())
    net = net_of()
    handle = on_disk(net, tmp_path, max_host_memory=4 * ROOM)
    outputs(net)
    assert open_in(tmp_path)
    if end == "failed":
        next(tmp_path.rglob("manifest.json")).write_text("{")
        other = net_of()
        with pytest.raises(
            OSError, match=str(tmp_path)
        ):  # while the first one reads, nothing is written anew
            on_disk(other, tmp_path)
        assert same(outputs(other), outputs(net))
        del other
    if end != "dropped":
        handle.disable()
    del net, handle
    gc.collect()
    for thread in set(threading.enumerate()) - threads:
        thread.join(5)
    assert set(threading.enumerate()) <= threads and not open_in(tmp_path)

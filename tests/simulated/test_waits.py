"""Every wait that the engine performs is needed: each is left out in turn, and the checker complains.

`pytest tests/simulated/test_waits.py -s` prints the list.
"""

import gc
from collections import Counter
from contextlib import contextmanager
from functools import reduce
from tempfile import TemporaryDirectory

import odd_nets
import pytest
import torch
from accelerate.hooks import remove_hook_from_module
from diffusers import DiffusionPipeline
from helpers import build, run

import diffusers_offload
from diffusers_offload import slab
from diffusers_offload.streams import open_streams
from diffusers_offload.tiers import packed, pinned

from .device import THE

DEVICE = "npu"


class Even(odd_nets.Plain):
    """As large as what of a `Net` lies in no block."""

    def __init__(self):
        torch.nn.Module.__init__(self)
        self.a, self.b = (torch.nn.Linear(odd_nets.WIDTH, odd_nets.WIDTH) for _ in range(2))

    def forward(self, x):
        return torch.tanh(x + self.b(self.a(x)))


def small(kind=odd_nets.Plain, count=5):
    torch.manual_seed(0)
    return odd_nets.Net(*(kind() for _ in range(count))).eval().requires_grad_(False)


def streamed(kind=odd_nets.Plain, **arguments):
    net = small(kind)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, **{"offload_ratio": 1.0, **arguments})
    x = torch.randn(2, 3, odd_nets.WIDTH)
    for _ in range(3):
        net(x.to(DEVICE) * 2).sum().cpu()
    return net, handle


def blocks():
    streamed()[1].disable()


def leaves():
    streamed(offload_granularity="leaf")[1].disable()


def writes_to_buffers():
    streamed(odd_nets.Counts)[1].disable()


def partly_on_the_device(*nets):
    for net in nets:
        for block in net.blocks:
            block.c.to(DEVICE)
    for net in nets:
        for block in net.blocks:
            block.c.weight.mul_(2)


def moved_from_the_device():
    net = small()
    partly_on_the_device(net)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=0.0)
    others = [torch.empty(2 * odd_nets.WIDTH**2, device=DEVICE) for _ in net.blocks]  # where the weights were
    handle.disable()
    del others


def moved_back_to_the_device(monkeypatch):
    """The weights are there for whoever uses them next, on whatever stream."""
    monkeypatch.setattr(torch.npu, "empty_cache", lambda: None)  # which waits for the device, or does nothing
    net = small()
    partly_on_the_device(net)
    diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=0.0).disable()
    with torch.npu.stream(torch.npu.Stream()):
        for block in net.blocks:
            block.c.weight.mul_(2)


def moved_back_while_others_are_unpacked(monkeypatch):
    """A packed unit comes to where a resident lay that is still being copied to where it came from."""
    net = wide_blocks(4, monkeypatch)
    for block in net.blocks:
        block[1].to(DEVICE)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=0.5, tier="packed")
    assert all(isinstance(unit.weights.host, packed.PackedMemory) for unit in handle._engine.units)
    handle.disable()


def residents_replaced():
    """A stem comes to where weights lay of which others were computed."""
    net = small(Even)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=0.5)
    with handle.suspended():
        for parameter in net.blocks.parameters():
            if parameter.device.type == DEVICE:
                parameter.data = parameter.data * 2
    net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE))
    handle.disable()


def moved_when_its_hook_was_lost():
    """Units that have been loaded ahead, of which all tensors or one are on the device, computed there just now."""
    net, handle = streamed()
    net.blocks[1].a.weight.data = torch.randn(odd_nets.WIDTH, odd_nets.WIDTH, device=DEVICE) * 2
    for parameter in net.blocks[0].parameters():
        parameter.data = torch.randn(parameter.shape, device=DEVICE) * 2
    for block in net.blocks[:2]:
        remove_hook_from_module(block)
    handle.disable()


def left_behind():
    """A stem comes to where a model lay that has been used and is gone, although nobody gave its weights back."""
    x = torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE)
    net = small(Even)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE)
    assert not handle._engine.units
    net(x)
    del net, handle
    gc.collect()
    net = small(Even)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=1.0)
    net(x)
    handle.disable()


def edited_between_forwards():
    net, handle = streamed()
    net.blocks[2].a.weight.data = torch.randn_like(net.blocks[2].a.weight)
    net.embed.weight.data = torch.randn_like(net.embed.weight)
    net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE))
    with handle.suspended():
        net.blocks[0].a.weight.add_(1)
    handle.disable()


def exchanged():
    pipe = build("wan")
    pipe.enable_block_offload(device=DEVICE, offload_ratio=1.0)
    run(pipe, "wan", num_inference_steps=1)
    pipe.transformer = build("wan").transformer
    run(pipe, "wan", num_inference_steps=1)
    pipe.disable_block_offload()


def unpinned(monkeypatch):
    monkeypatch.setattr(pinned, "STAGING_BYTES", 1024)
    monkeypatch.setattr(THE, "refuses_to_pin", lambda nbytes: nbytes != 1024)
    streamed()[1].disable()


class Pair(DiffusionPipeline):
    def __init__(self, first, second):
        super().__init__()
        self.register_modules(first=first, second=second)

    def __call__(self, x):
        return self.second(self.first(x))


def on_disk():
    """Slots that are used in turn, and a unit whose weights are edited."""
    with TemporaryDirectory() as folder:
        net = small(count=8)
        handle = diffusers_offload.enable_block_offload(
            net, device=DEVICE, offload_ratio=1.0, tier="disk", offload_dir=folder, max_host_memory=5 * 8192
        )
        for _ in range(3):
            net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE)).sum().cpu()
        net.blocks[2].a.weight.mul_(2)
        for _ in range(2):
            net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE))
        for order in ((5, 1, 6, 0, 3), (0, 4, 2, 7), (7, 1, 5, 6)):  # what comes is not what was read
            net.run = lambda x, step, order=order: reduce(lambda x, i: net.blocks[i](x), order, x)
            net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE))
        handle.disable()


def wide_blocks(count, monkeypatch):
    """Blocks that shrink, of several batches each."""
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)
    monkeypatch.setattr(packed.packer, "_CHUNK", 4096)
    return small(lambda: torch.nn.Sequential(torch.nn.Linear(16, 4000), torch.nn.Linear(4000, 16)), count)


def packed_blocks(monkeypatch):
    """More batches than the ring has slots; units that are loaded and not used."""
    net = wide_blocks(6, monkeypatch)
    for block in net.blocks[1::2]:  # these do not shrink, and are copied to where the others were unpacked to
        weight = block[0].weight
        weight.copy_(torch.randint(0, 0x7F000000, weight.shape, dtype=torch.int32).view(torch.float32))
        block[1].weight.copy_(weight.T)
    net.blocks[2].to(DEVICE)
    net.blocks[2][0].weight.mul_(2)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=1.0, tier="packed")
    assert {isinstance(unit.weights.host, packed.PackedMemory) for unit in handle._engine.units} == {
        True,
        False,
    }
    for _ in range(3):
        net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE)).sum().cpu()
    for order in ((5, 1, 0, 3), (0, 4, 2)):
        net.run = lambda x, step, order=order: reduce(lambda x, i: net.blocks[i](x), order, x)
        net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE))
    net.state_dict()
    handle.disable()


def packed_by_itself(monkeypatch):
    """As what is written to files may be."""
    (block,) = wide_blocks(1, monkeypatch).to(DEVICE).blocks
    for parameter in block.parameters():
        parameter.mul_(2)
    layout = slab.lay_out(list(block.parameters()))
    packer = packed.Packer(open_streams(torch.device(DEVICE, 0)), True)
    assert packer.pack(layout, slab.sources(layout, list(block.parameters()))) is not None


def too_small_to_be_packed():
    """Weights that were looked at in vain, and leave the device."""
    net = small().to(DEVICE)
    handle = diffusers_offload.enable_block_offload(net, device=DEVICE, offload_ratio=1.0, tier="packed")
    others = [torch.empty(odd_nets.WIDTH**2, device=DEVICE) for _ in net.blocks]  # where the weights were
    handle.disable()
    del others


def pinned_and_looked_at_again():
    """Weights that are not coded, whose pinned memory goes once an edit has given them other bytes."""
    net, handle = streamed(tier="packed")
    with handle.suspended():
        for block in net.blocks:
            weight = next(block.parameters())
            weight.data = weight.data * 2
    net(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE))
    handle.disable()


def packed_leaves(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    streamed(offload_granularity="leaf", tier="packed")[1].disable()


def two_stems():
    """The second component's stem comes to where the first one's was."""
    pipe = Pair(small(), small())
    pipe.enable_block_offload(device=DEVICE, offload_ratio=1.0)
    for _ in range(2):
        pipe(torch.randn(2, 3, odd_nets.WIDTH, device=DEVICE)).sum().cpu()
    pipe.disable_block_offload()


WORK = [
    blocks,
    leaves,
    writes_to_buffers,
    moved_from_the_device,
    moved_back_to_the_device,
    moved_back_while_others_are_unpacked,
    residents_replaced,
    moved_when_its_hook_was_lost,
    left_behind,
    edited_between_forwards,
    unpinned,
    on_disk,
    packed_blocks,
    packed_leaves,
    packed_by_itself,
    too_small_to_be_packed,
    pinned_and_looked_at_again,
    two_stems,
    exchanged,
]


def races_of(work, monkeypatch):
    with THE.checked() as checker:
        work(monkeypatch) if work.__code__.co_argcount else work()
    return checker.races


@contextmanager
def dropping(monkeypatch, decide):
    with monkeypatch.context() as patch:
        patch.setattr(THE, "drops", decide)
        yield patch


def waits_of(work, monkeypatch):
    """The waits that some work performs: (what, line of the package), and how often."""
    found = Counter()

    def note(what, line):
        found[what, line] += 1
        return False

    with dropping(monkeypatch, note) as patch:
        races_of(work, patch)
    return {site: count for site, count in found.items() if site[1] != "outside the package"}


@pytest.mark.parametrize("work", WORK, ids=lambda work: work.__name__)
def test_nothing_races(work, monkeypatch):
    assert not races_of(work, monkeypatch)


def test_no_wait_can_be_left_out_unnoticed(monkeypatch):
    performed = {work: waits_of(work, monkeypatch) for work in WORK}
    sites = sorted({site for sites in performed.values() for site in sites})
    unnoticed = []
    for site in sites:
        for work in (work for work in WORK if site in performed[work]):
            with dropping(monkeypatch, lambda what, line: (what, line) == site) as patch:  # noqa: B023
                try:
                    caught = races_of(work, patch)
                except Exception as error:  # wrong numbers may break what computes with them
                    caught = [repr(error)]
            if caught:
                print(f"{site[0]:12} {site[1]:18} {work.__name__}: {caught[0]}")
                break
        else:
            unnoticed.append(site)
    print(f"{len(sites)} waits, {len(sites) - len(unnoticed)} caught when left out")
    assert len(sites) >= 12
    assert not unnoticed

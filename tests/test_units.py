"""How a module is taken apart: blocks, their phases, single leaves, and why the rest is in the stem."""

import pytest
import torch
from torch import nn

from diffusers_offload.units import Findings, at_hand, dissect, tensors_of


class Attention(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)

    def forward(self, x):
        return self.q(x) + self.k(x)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.table = nn.Parameter(torch.randn(6, width))
        self.attention = Attention(width)
        self.norm = nn.LayerNorm(width)
        self.layers = nn.ModuleList([nn.Linear(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x):
        x = self.attention(x + self.table[0])
        for layer in self.layers:
            x = layer(x)
        return self.norm(x)


class Net(nn.Module):
    def __init__(self, width=64, blocks=3):
        super().__init__()
        self.embed = nn.Linear(width, width)
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.out = nn.Linear(width, width)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.out(x)


def names_of(anatomy):
    return [part.name for part in anatomy.parts]


def stem_of(net, anatomy):
    names = {id(t): name for name, t in (*net.named_parameters(), *net.named_buffers())}
    return {names[id(t)]: why for t, why in zip(anatomy.stem, anatomy.reasons, strict=True)}


@pytest.mark.parametrize("granularity", ["block", "phase", "leaf"])
def test_every_tensor_is_in_one_place(granularity):
    net = Net()
    anatomy = dissect(net, granularity)
    placed = [id(t) for part in anatomy.parts for t in part.tensors] + [id(t) for t in anatomy.stem]
    assert sorted(placed) == sorted(id(t) for t in tensors_of(net))


def test_blocks():
    net = Net()
    anatomy = dissect(net)
    assert names_of(anatomy) == ["blocks.0", "blocks.1", "blocks.2"]
    assert set(stem_of(net, anatomy)) == {"embed.weight", "embed.bias", "out.weight", "out.bias"}


def test_what_a_block_holds_itself_travels_with_its_first_phase():
    net = Net()
    parts = {part.name: part for part in dissect(net, "phase").parts}
    first = parts["blocks.1.attention"]
    assert first.opener is net.blocks[1]
    assert any(tensor is net.blocks[1].table for tensor in first.tensors)
    assert parts["blocks.1.layers.2"].opener is None


def test_the_first_parameter_stays_beside_phases_and_leaves_with_the_leaves():
    net = Net()
    phases, leaves = dissect(net, "phase"), dissect(net, "leaf")
    assert "embed" not in names_of(phases)
    assert "out" in names_of(phases)
    assert "embed" in names_of(leaves)
    assert stem_of(net, phases)["embed.weight"] == "outside the blocks"


def test_small_neighbours_travel_together_and_tiny_ones_stay():
    class Small(nn.Module):
        def __init__(self):
            super().__init__()
            self.big = nn.Linear(256, 256, bias=False)
            self.a, self.b = nn.Linear(64, 64, bias=False), nn.Linear(64, 64, bias=False)
            self.tiny = nn.LayerNorm(16, bias=False)

        def forward(self, x):
            return x

    net = nn.Module()
    net.blocks = nn.ModuleList(Small() for _ in range(3))
    anatomy = dissect(net, "phase")
    assert names_of(anatomy)[:2] == ["blocks.0.big", "blocks.0.a + b"]
    joined = anatomy.parts[1]
    assert joined.modules == (net.blocks[0].a, net.blocks[0].b)
    assert stem_of(net, anatomy)["blocks.0.tiny.weight"].startswith("too small")


def test_what_running_has_shown_counts():
    net = Net()
    stray = net.blocks[0].layers[2].weight
    passed = dissect(net, findings=Findings(frozenset({net.blocks[1]}), frozenset({id(stray)})))
    assert "blocks.1" not in names_of(passed)
    assert "blocks.1.attention" in names_of(passed)
    assert stem_of(net, passed)["blocks.0.layers.2.weight"] == "used outside the forward of its module"


def test_torchs_own_attention_is_a_leaf():
    class Attends(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.out = nn.MultiheadAttention(32, 2, batch_first=True), nn.Linear(32, 32)

        def forward(self, x):
            return self.out(self.attention(x, x, x)[0])

    net = nn.Module()
    net.blocks = nn.ModuleList(Attends() for _ in range(3))
    assert names_of(dissect(net, "leaf"))[:2] == ["blocks.0.attention", "blocks.0.out"]


def test_blocks_that_are_none_of_the_models_are_refused():
    with pytest.raises(ValueError, match="do not belong"):
        dissect(Net(), blocks=[Block(8)])


def test_what_is_read_between_forwards_is_at_hand():
    net = Net()
    net.register_buffer("latents_mean", torch.randn(4))
    net.scale = nn.Parameter(torch.randn(4))
    net.statistics = nn.BatchNorm2d(4)
    net.register_buffer("large", torch.randn(2**17))
    found = {id(tensor) for tensor in at_hand(net)}
    names = {name for name, t in (*net.named_parameters(), *net.named_buffers()) if id(t) in found}
    assert names == {"latents_mean", "scale", "statistics.running_mean", "statistics.running_var"}


def test_what_is_cut_from_a_blocks_weight_goes_with_the_block():
    net = Net()
    net.register_buffer("view", net.blocks[0].table[0].detach())
    assert not any(tensor is net.view for tensor in at_hand(net))

"""Weights that are used past their block's forward are found in the first forward, and stay in the stem."""

import pytest
import torch
from torch import nn

import diffusers_offload
from diffusers_offload.component import State


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        return torch.tanh(self.b(self.a(self.embed(x))))

    def past_forward(self, x):
        return self.a(x)


class Net(nn.Module):
    """Uses block 0's embedder after the loop, a weight of block 1 by hand, and block 3 past its forward."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(5))

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        x = self.blocks[0].embed(x)
        x = x @ self.blocks[1].b.weight.T
        x = self.blocks[3].past_forward(x)
        return torch.cat([x, self.blocks[4].a.bias[None]])


def test_strays_move_to_the_stem_and_nothing_else_does(device):
    torch.manual_seed(0)
    net = Net().to(device).requires_grad_(False)
    x = torch.randn(2, 8, device=device)
    expected = net(x)
    net.to("cpu")
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0)
    for _ in range(4):
        assert torch.equal(net(x), expected)
    component = handle._engine.components[0]
    stem = {id(t) for unit in component.stem for t in unit.weights.tensors}
    names = {name for name, p in net.named_parameters() if id(p) in stem}
    assert names == {
        "blocks.0.embed.weight",
        "blocks.0.embed.bias",
        "blocks.1.b.weight",
        "blocks.3.a.weight",
        "blocks.3.a.bias",
        "blocks.4.a.bias",
    }
    assert component.known
    handle.reset()
    net(x)
    assert handle.report().misses == 0
    handle.disable()
    assert torch.equal(net.to(device)(x), expected)


def test_looking_at_a_weight_is_no_use(device):
    class Curious(Net):
        def forward(self, x):
            dtype = self.blocks[2].a.weight.dtype
            assert self.blocks[4].b.weight.shape[0] == 8
            for block in self.blocks:
                x = block(x.to(dtype))
            return x

    net = Curious().requires_grad_(False)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0)
    net(torch.randn(2, 8, device=device))
    assert not handle._engine.components[0].stem
    assert handle._engine.components[0].known


def test_an_exception_while_watching_ends_the_watch(device):
    net = Net().requires_grad_(False)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0)
    with pytest.raises(RuntimeError):
        net(torch.randn(2, 9, device=device))
    assert torch.overrides._get_current_function_mode() is None
    x = torch.randn(2, 8, device=device)
    found = net(x)
    assert not handle._engine.components[0].known  # the forward that failed had not shown everything
    assert torch.equal(net(x), found)
    assert handle._engine.components[0].known
    handle.disable()
    assert torch.equal(net.to(device)(x), found)


def test_dit_reads_the_embedder_of_its_first_block(device):
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    model = (
        DiTTransformer2DModel(
            num_attention_heads=2,
            attention_head_dim=8,
            in_channels=4,
            num_layers=3,
            sample_size=8,
            num_embeds_ada_norm=10,
        )
        .eval()
        .requires_grad_(False)
        .to(device)
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 8, 8, device=device),
        "timestep": torch.tensor([3], device=device),
        "class_labels": torch.tensor([1], device=device),
    }
    expected = model(**inputs).sample
    model.to("cpu")
    handle = diffusers_offload.enable_block_offload(model, device=device, offload_ratio=1.0)
    for _ in range(3):
        assert torch.equal(model(**inputs).sample, expected)
    stem = {id(t) for unit in handle._engine.components[0].stem for t in unit.weights.tensors}
    names = {name for name, p in model.named_parameters() if id(p) in stem}
    assert {name for name in names if "transformer_blocks" in name} == {
        f"transformer_blocks.0.norm1.emb.{layer}.{kind}"
        for layer in ("timestep_embedder.linear_1", "timestep_embedder.linear_2")
        for kind in ("weight", "bias")
    } | {"transformer_blocks.0.norm1.emb.class_embedder.embedding_table.weight"}


class Moody(Net):
    """Runs some of its blocks, uses a weight by hand, or fails, as it is told."""

    def forward(self, x, count=4, stray=False, fails=False):
        for block in list(self.blocks)[:count]:
            x = block(x)
        if fails:
            raise ValueError("as told")
        return x @ self.blocks[1].b.weight.T if stray else x


def test_after_a_failure_the_next_forward_is_watched_again(device):
    net = Moody().requires_grad_(False)
    x = torch.randn(2, 8, device=device)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0)
    component = handle._engine.components[0]
    net(x)
    assert component.known
    with pytest.raises(ValueError, match="as told"):
        net(x, fails=True)
    assert not component.known  # it may have failed for want of a weight
    found = net(x, stray=True)
    assert torch.equal(net(x, stray=True), found)
    assert len(handle._engine.components[0].stem) == 1


def test_a_block_that_runs_for_the_first_time_is_watched(device):
    class Late(Block):
        def forward(self, x):
            return super().forward(x) @ self.others[0].a.weight

    net = Moody().requires_grad_(False)
    late = Late().requires_grad_(False)
    late.others = (net.blocks[0],)  # a tuple: not a child
    net.blocks[3] = late
    x = torch.randn(2, 8, device=device)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0)
    net(x, count=3)
    assert handle._engine.components[0].known
    found = net(x)
    assert handle._engine.components[0].strays
    assert torch.equal(net(x), found)
    assert [t is net.blocks[0].a.weight for u in handle._engine.components[0].stem for t in u.weights.tensors]
    assert torch.overrides._get_current_function_mode() is None


class Elsewhere(torch.overrides.TorchFunctionMode):
    """Below a watch: fails for a call that is given a weight which is not where its units are when in use."""

    def __init__(self, units):
        super().__init__()
        self._unit_of = {id(tensor): unit for unit in units for tensor in unit.weights.tensors}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.cat:
            for tensor in args[0]:
                assert self._unit_of[id(tensor)].state is State.IN_USE
        return func(*args, **(kwargs or {}))


def test_weights_of_several_units_used_by_one_call(device):
    class Pooled(Net):
        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x[0, 0] * torch.cat([self.blocks[i].a.bias for i in (2, 0, 3)])

    torch.manual_seed(0)
    net = Pooled().to(device).requires_grad_(False)
    x = torch.randn(2, 8, device=device)
    expected = net(x)
    handle = diffusers_offload.enable_block_offload(net.to("cpu"), device=device, offload_ratio=1.0)
    with Elsewhere(handle._engine.components[0].units):
        assert torch.equal(net(x), expected)
    assert {(stray.unit.name, stray.within) for stray in handle._engine.components[0].strays} == {
        (f"blocks.{i}", False) for i in (0, 2, 3)
    }
    for _ in range(2):
        assert torch.equal(net(x), expected)

"""MindIE-SD's call: its checks, its meaning, its tests."""

import pytest
import torch
from torch import nn

from diffusers_offload.handle import held_policy
from integrations.mindie_sd import enable_offload


class Block(nn.Module):
    def __init__(self, sliced):
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.register_buffer("scale", torch.rand(8))
        if sliced:
            full = torch.randn(16, 8)
            self.first.weight = nn.Parameter(full[::2])
            self.second.weight = nn.Parameter(full[1::2])

    def forward(self, x):
        return torch.tanh(self.second(self.first(x)) * self.scale)


class Model(nn.Module):
    def __init__(self, sliced=False, count=4):
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block(sliced) for _ in range(count))
        self.head = nn.Linear(8, 3)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x)


@pytest.mark.parametrize("moved", ["before", "after", "not at all"])
@pytest.mark.parametrize("sliced", [False, True])
@pytest.mark.parametrize("reserved", [0, 2, 3])
def test_equals_the_plain_model(sliced, reserved, moved, device):
    torch.manual_seed(0)
    model = Model(sliced).eval().requires_grad_(False)
    strides = [p.stride() for p in model.parameters()]
    keys = list(model.state_dict())
    x = torch.randn(2, 8, device=device)
    expected = model.to(device)(x)
    assert [p.stride() for p in model.parameters()] == strides or device != "cpu"
    if moved != "before":
        model.to("cpu")
    if moved != "before" and device == "cpu" and torch.cuda.is_available():
        pytest.skip("this machine's accelerator would be taken")
    assert enable_offload(model, model.blocks, reserved) is None
    if moved == "after":
        model.to(device)
    for _ in range(3):
        assert torch.equal(model(x), expected)
    assert list(model.state_dict()) == keys
    handle, plan = held_policy(model)
    assert [unit.name for unit in plan.residents] == [f"blocks.{i}" for i in range(reserved)]
    assert [unit.name for unit in plan.streamed] == [f"blocks.{i}" for i in range(reserved, 4)]
    handle.disable()


def test_the_default_keeps_two_and_a_second_call_does_nothing():
    model = Model()
    enable_offload(model, model.blocks)
    handle, plan = held_policy(model)
    enable_offload(model, model.blocks, 3)
    assert held_policy(model) == (handle, plan)
    assert len(plan.residents) == 2


@pytest.mark.parametrize(
    ("model", "blocks", "count", "error"),
    [
        ("no module", nn.ModuleList([Block(False)]), 0, TypeError),
        (Model(), [Block(False)], 0, TypeError),
        (Model(), Model().blocks, 1.0, TypeError),
        (Model(), Model().blocks, "2", TypeError),
        (Model(), Model().blocks, True, TypeError),
        (Model(), nn.ModuleList(), 0, ValueError),
        (Model(), Model().blocks, -1, ValueError),
        (Model(), Model().blocks, 4, ValueError),
    ],
)
def test_its_checks(model, blocks, count, error):
    with pytest.raises(error):
        enable_offload(model, blocks, count)

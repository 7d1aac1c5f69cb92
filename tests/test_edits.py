"""What is written to weights while they are offloaded counts, on whichever side it is written."""

import pytest
import torch
from helpers import build, run

import diffusers_offload


@pytest.mark.parametrize("how", ["in place", "by data", "replaced"])
@pytest.mark.parametrize("index", [0, 1, -1])
def test_weights_edited_while_offloaded_count_from_the_next_forward_on(index, how, device):
    def edit(block):
        weight = block.attn.to_q.weight
        with torch.no_grad():
            if how == "in place":
                weight.mul_(1.5)
            elif how == "by data":
                weight.data = weight.data * 1.5
            else:
                weight.data = (weight.data.double() * 1.5).to(weight.dtype)

    pipe = build("flux", device=device)
    before = run(pipe, "flux")
    edit(pipe.transformer.transformer_blocks[index])
    expected = run(pipe, "flux")
    assert not torch.equal(before, expected)

    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux"), before)
    edit(pipe.transformer.transformer_blocks[index])
    assert torch.equal(run(pipe, "flux"), expected)
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


@pytest.mark.edits_while_loading
def test_weights_edited_between_two_steps_count_in_the_second(device):
    def edit(pipe, step, timestep, values):
        if step == 0:
            with torch.no_grad():
                pipe.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.5)
        return values

    pipe = build("flux", device=device)
    before, expected = run(pipe, "flux"), run(pipe, "flux", callback_on_step_end=edit)
    assert not torch.equal(before, expected)
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux", callback_on_step_end=edit), expected)


def test_a_stem_edited_while_it_is_on_the_device_counts(device):
    pipe = build("wan", device=device)
    model = pipe.transformer.requires_grad_(False)
    inputs = {
        "hidden_states": torch.randn(1, model.config.in_channels, 3, 8, 8, device=device),
        "timestep": torch.tensor([5], device=device),
        "encoder_hidden_states": torch.randn(1, 7, model.config.text_dim, device=device),
    }

    def edit():
        model.proj_out.weight.data = model.proj_out.weight.data * 2

    plain = model(**inputs).sample
    edit()
    expected = model(**inputs).sample
    model.proj_out.weight.data = model.proj_out.weight.data / 2
    handle = diffusers_offload.enable_block_offload(model, device=device, offload_ratio=1.0)
    assert torch.equal(model(**inputs).sample, plain)
    edit()
    assert torch.equal(model(**inputs).sample, expected)
    handle.call_ended()
    assert torch.equal(model(**inputs).sample, expected)
    handle.disable()
    assert torch.equal(model.to(device)(**inputs).sample, expected)


def test_a_buffer_written_in_a_forward_is_written_back(device):
    class Block(torch.nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.a, self.b = torch.nn.Linear(8, 8), torch.nn.Linear(8, 8)
            self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

        def forward(self, x):
            self.seen += 1
            return self.b(self.a(x))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList(Block(i) for i in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    net = Net()
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0)
    with torch.no_grad():
        for _ in range(3):
            net(torch.ones(1, 8, device=device))
    assert [int(block.seen) for block in net.blocks] == [3, 3, 3, 3]
    assert handle.report().write_backs == 12
    handle.disable()
    assert [int(block.seen) for block in net.blocks] == [3, 3, 3, 3]

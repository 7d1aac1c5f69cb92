"""Hooks of others survive ours, and ours come off cleanly by whatever means."""

import pytest
import torch
from accelerate.hooks import ModelHook, SequentialHook, add_hook_to_module, remove_hook_from_module
from helpers import build, run


def modules_of(pipe):
    return {name: c for name, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


def test_remove_all_hooks_leaves_a_working_pipeline(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    pipe.remove_all_hooks()
    assert pipe.block_offload is None
    assert not any(hasattr(part, "_hf_hook") for m in modules_of(pipe).values() for part in m.modules())
    assert torch.equal(run(pipe.to(device), "flux"), expected)


@pytest.mark.parametrize("recurse", [True, False])
def test_accelerates_own_removal_restores_a_component(recurse, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    remove_hook_from_module(pipe.transformer, recurse=recurse)
    pipe.transformer.to(device)
    assert not any(hasattr(part, "_hf_hook") for part in pipe.transformer.modules())
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_block_whose_hook_is_removed_stays_on_the_device(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    remove_hook_from_module(pipe.transformer.transformer_blocks[1], recurse=True)
    assert next(pipe.transformer.transformer_blocks[1].parameters()).device.type == device
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert next(pipe.transformer.transformer_blocks[1].parameters()).device.type == "cpu"


def test_a_block_whose_hook_is_replaced_stays_on_the_device(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    block, foreign = pipe.transformer.transformer_blocks[1], Counting()
    add_hook_to_module(block, foreign)
    streamed = len(pipe.block_offload._held["transformer"].component.streamed)
    assert torch.equal(run(pipe, "flux"), expected)
    assert foreign.calls
    assert len(pipe.block_offload._held["transformer"].component.streamed) == streamed - 1
    pipe.disable_block_offload()
    assert block._hf_hook is foreign
    assert torch.equal(run(pipe.to(device), "flux"), expected)


def test_a_component_whose_hook_is_replaced_is_named():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    add_hook_to_module(pipe.vae, Counting())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"vae.*Counting.*disable_block_offload"):
            run(pipe, "flux")
    pipe.disable_block_offload()
    assert isinstance(pipe.vae._hf_hook, Counting)
    assert torch.equal(run(pipe, "flux"), expected)


class Counting(ModelHook):
    def __init__(self):
        self.calls = 0

    def pre_forward(self, module, *args, **kwargs):
        self.calls += 1
        return args, kwargs


@pytest.mark.parametrize("place", ["", "transformer_blocks.1"])
def test_foreign_hooks_survive(place):
    pipe = build("flux")
    part = pipe.transformer.get_submodule(place)
    foreign = Counting()
    add_hook_to_module(part, foreign)
    expected = run(pipe, "flux")
    once = foreign.calls
    pipe.enable_block_offload(device="cpu")
    assert isinstance(part._hf_hook, SequentialHook)
    assert torch.equal(run(pipe, "flux"), expected)
    assert foreign.calls == 2 * once
    pipe.disable_block_offload()
    assert part._hf_hook is foreign
    assert torch.equal(run(pipe, "flux"), expected)
    assert foreign.calls == 3 * once
    remove_hook_from_module(part)
    assert torch.equal(run(pipe, "flux"), expected)


@pytest.mark.parametrize("place", ["", "transformer_blocks.1"])
def test_foreign_hooks_may_be_chained_to_ours(place, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux"), expected)
    part, foreign = pipe.transformer.get_submodule(place), Counting()
    add_hook_to_module(part, foreign, append=True)
    assert "transformer" in pipe.block_offload.components
    pipe.block_offload.reset()
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), expected)
    report = pipe.block_offload.report()
    assert foreign.calls
    assert report.uses == 2 * 23  # all of them still stream
    pipe.disable_block_offload()
    assert part._hf_hook is foreign
    assert torch.equal(run(pipe.to(device), "flux"), expected)


@pytest.mark.parametrize("place", ["", "transformer_blocks.1"])
@pytest.mark.parametrize("when", ["before", "after"])
def test_diffusers_own_hooks_survive(place, when):
    from diffusers.hooks import HookRegistry
    from diffusers.hooks import ModelHook as DiffusersHook

    class Doubling(DiffusersHook):
        calls = 0

        def pre_forward(self, module, *args, **kwargs):
            Doubling.calls += 1
            return args, kwargs

    pipe = build("flux")
    expected = run(pipe, "flux")
    part = pipe.transformer.get_submodule(place)
    if when == "after":
        pipe.enable_block_offload(device="cpu")
    HookRegistry.check_if_exists_or_initialize(part).register_hook(Doubling(), "doubling")
    if when == "before":
        pipe.enable_block_offload(device="cpu")
    assert torch.equal(run(pipe, "flux"), expected)
    once, Doubling.calls = Doubling.calls, 0
    pipe.disable_block_offload()
    assert torch.equal(run(pipe, "flux"), expected)
    assert Doubling.calls == once > 0
    part._diffusers_hook.remove_hook("doubling")
    assert torch.equal(run(pipe, "flux"), expected)
    assert Doubling.calls == once


def test_a_component_with_a_block_whose_hook_is_gone_is_taken_apart_anew(device):
    from accelerate.hooks import remove_hook_from_module

    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    remove_hook_from_module(pipe.transformer.transformer_blocks[1])
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.transformer.register_buffer("more", torch.zeros(3))  # new tensors: the component is looked at again
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected)

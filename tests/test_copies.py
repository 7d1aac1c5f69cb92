"""Offloaded modules are neither copied nor pickled; the refusal comes before anything is copied."""

import copy
import pickle

import pytest
import torch
from helpers import build, run

from diffusers_offload.handle import live_handles

PARTS = {
    "pipeline": lambda pipe: pipe,
    "component": lambda pipe: pipe.transformer,
    "blocks": lambda pipe: pipe.transformer.transformer_blocks,
    "block": lambda pipe: pipe.transformer.single_transformer_blocks[1],
    "stem": lambda pipe: pipe.transformer.x_embedder,
    "resident": lambda pipe: pipe.text_encoder,
    "hook": lambda pipe: pipe.transformer._hf_hook,
    "unit's hook": lambda pipe: pipe.transformer.transformer_blocks[0]._hf_hook,
    "handle": lambda pipe: pipe.block_offload,
    "a list": lambda pipe: [pipe.vae, "and more"],
}


@pytest.fixture(scope="module")
def pipe():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu", components={"text_encoder": "resident"})
    return pipe


@pytest.mark.parametrize("copies", [copy.deepcopy, pickle.dumps], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("part", PARTS.values(), ids=PARTS)
def test_copying_what_is_offloaded_is_refused_at_once(pipe, part, copies, monkeypatch):
    def copied(*_):
        raise AssertionError("a weight was copied")

    monkeypatch.setattr(torch.Tensor, "__deepcopy__", copied)
    monkeypatch.setattr(torch.Tensor, "__reduce_ex__", copied)
    with pytest.raises(TypeError, match=r"offloaded block by block.*disable_block_offload"):
        copies(part(pipe))


def test_torch_save_of_a_component_is_refused_and_of_its_weights_is_not(pipe, tmp_path):
    with pytest.raises(TypeError, match="disable_block_offload"):
        torch.save(pipe.transformer, tmp_path / "model.pt")
    torch.save(pipe.transformer.state_dict(), tmp_path / "weights.pt")
    found = torch.load(tmp_path / "weights.pt")
    assert all(torch.equal(found[key], value) for key, value in pipe.transformer.state_dict().items())


@pytest.mark.parametrize("copies", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
@pytest.mark.parametrize("how", ["disabled", "hooks removed"])
def test_afterwards_both_work(copies, how):
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    if how == "disabled":
        pipe.disable_block_offload()
    else:
        pipe.remove_all_hooks()
    assert not any("__reduce_ex__" in vars(m) for m in pipe.transformer.modules())
    transformer = copies(pipe.transformer)
    pipe.transformer = transformer
    assert torch.equal(run(pipe, "flux"), expected)
    if how == "disabled" and copies is copy.deepcopy:
        assert torch.equal(run(copies(pipe), "flux"), expected)


def test_a_component_that_never_was_offloaded_may_be_copied(pipe):
    copy.deepcopy(pipe.scheduler)
    copy.deepcopy(pipe.transformer.config)
    copy.deepcopy(dict(pipe.config))
    copy.deepcopy(build("flux"))


def test_a_shallow_copy_shares_the_components_and_has_no_handle():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    other = copy.copy(pipe)
    assert other.block_offload is None
    assert other.transformer is pipe.transformer
    assert other.device == pipe.device
    assert torch.equal(run(other, "flux"), expected)
    other.disable_block_offload()
    assert pipe.block_offload is not None
    other.enable_block_offload(device="cpu")
    pipe.disable_block_offload()
    assert other.block_offload is not None
    assert torch.equal(run(other, "flux"), expected)
    other.disable_block_offload()
    assert not hasattr(pipe.transformer, "_hf_hook")
    assert pipe.block_offload is None
    assert not [handle for handle in live_handles() if pipe.transformer in handle.components.values()]

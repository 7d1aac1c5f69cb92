"""A pipeline that was streamed to disk is, to the bit, the one that Diffusers loads; and it is never in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import zoo
from diffusers import DiffusionPipeline
from helpers import build, run, warnings_of_ours
from safetensors.torch import load_file, save_file

import diffusers_offload
from diffusers_offload.saved import sources

LARGE = Path(__file__).parent / "large_flux.py"
ODD = ("kandinsky-combined", "lumina2", "hidream", "ltx2", "sd-two-controlnets", "amused", "kandinsky5")


def saved(name: str, folder: Path, **options):
    """A saved pipeline's folder, and its class."""
    pipe = zoo.build(name) if name in zoo.PIPELINES else build(name)
    pipe.save_pretrained(folder, **options)
    return folder, type(pipe)


def tensors(module) -> dict[str, torch.Tensor]:
    both = (module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    return {name: tensor for each in both for name, tensor in each}


def ties(module) -> list[list[str]]:
    groups: dict[int, list[str]] = {}
    for name, tensor in tensors(module).items():
        groups.setdefault(id(tensor), []).append(name)
    return sorted(groups.values())


def config_of(module) -> dict:
    config = getattr(module, "config", {})
    return dict(config if isinstance(config, dict) else config.to_dict())


def assert_the_same(pipe, expected) -> None:
    """Same classes, weights, buffers, dtypes, ties, modes and configs."""
    assert type(pipe) is type(expected) and pipe.components.keys() == expected.components.keys()
    for name, right in expected.components.items():
        found = getattr(pipe, name)
        assert type(found) is type(right), name
        if not isinstance(right, torch.nn.Module):
            continue
        mine, theirs = tensors(found), tensors(right)
        assert list(mine) == list(theirs)
        for key, tensor in theirs.items():
            other = mine[key]
            assert type(other) is type(tensor) and other.requires_grad == tensor.requires_grad
            assert (other.dtype, other.shape, other.device) == (tensor.dtype, tensor.shape, tensor.device)
            assert torch.equal(other, tensor), f"{name}.{key}"
        assert ties(found) == ties(right)
        assert [m.training for m in found.modules()] == [m.training for m in right.modules()]
        configs = [config_of(each) for each in (found, right)]
        for config in configs:
            config.pop("_name_or_path", None)
        assert configs[0] == configs[1]


def streamed(folder: Path, root: Path, **arguments):
    return diffusers_offload.from_pretrained(folder, offload_dir=root, device="cpu", **arguments)


def quiet(pipe):
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("flux", torch.float32),
        ("flux", torch.float16),
        ("flux", torch.bfloat16),
        ("wan22", torch.bfloat16),
        ("sdxl-controlnet", torch.float16),
    ],
)
def test_is_what_diffusers_loads(name, dtype, tmp_path):
    folder, cls = saved(name, tmp_path / "source", max_shard_size="300KB")
    right = quiet(cls.from_pretrained(folder, torch_dtype=dtype))
    for _ in range(2):  # written, and found
        pipe = quiet(streamed(folder, tmp_path / "files", torch_dtype=dtype, pipeline_class=cls))
        assert_the_same(pipe, right)
        if dtype != torch.float16:  # not every kernel of the CPU has it
            assert torch.equal(run(pipe, name), run(right, name))
        pipe.disable_block_offload()
        assert_the_same(pipe, right)


@pytest.mark.parametrize("name", ODD)
def test_unusual_pipelines(name, tmp_path):
    folder, cls = saved(name, tmp_path / "source")
    right = cls.from_pretrained(folder, torch_dtype=torch.bfloat16)
    pipe = streamed(folder, tmp_path / "files", torch_dtype=torch.bfloat16, pipeline_class=cls)
    assert_the_same(pipe, right)


@pytest.mark.parametrize("granularity", ["phase", "leaf", "model", "resident"])
def test_other_granularities(granularity, tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    expected = run(quiet(DiffusionPipeline.from_pretrained(folder)), "flux")
    pipe = quiet(streamed(folder, tmp_path / "files", offload_granularity=granularity))
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_variant_and_a_dtype_for_each(tmp_path):
    folder, _ = saved("flux", tmp_path / "source", variant="fp16")
    dtypes = {"transformer": torch.bfloat16, "vae": torch.float32, "default": torch.float16}
    right = DiffusionPipeline.from_pretrained(folder, torch_dtype=dtypes, variant="fp16")
    assert_the_same(streamed(folder, tmp_path / "files", torch_dtype=dtypes, variant="fp16"), right)


def test_components_of_the_users_own(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    vae = build("flux").vae
    before = {name: tensor.clone() for name, tensor in tensors(vae).items()}
    pipe = streamed(folder, tmp_path / "files", vae=vae, text_encoder=None)
    assert pipe.vae is vae and pipe.text_encoder is None
    assert all(torch.equal(tensor, before[name]) for name, tensor in tensors(vae).items())


def test_an_unchanged_source_is_not_read_again(tmp_path, monkeypatch):
    folder, _ = saved("flux", tmp_path / "source")
    root = tmp_path / "files"
    right = streamed(folder, root, torch_dtype=torch.bfloat16)
    monkeypatch.setattr("diffusers_offload.saved.settling._part", lambda *_: pytest.fail("read again"))
    pipe = streamed(folder, root, torch_dtype=torch.bfloat16)
    assert_the_same(pipe, right)
    assert not (root / "unfinished").exists()


def test_a_source_with_other_weights_is_read_again(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    streamed(folder, tmp_path / "files")
    build("flux")
    file = next(iter(sources.checkpoints(folder / "transformer")))
    weights = load_file(file)
    weights["proj_out.weight"] *= 2
    save_file(weights, file, metadata={"format": "pt"})
    pipe = streamed(folder, tmp_path / "files")
    assert_the_same(pipe, DiffusionPipeline.from_pretrained(folder))
    assert len(list((tmp_path / "files").glob("transformer-*"))) == 2


def test_a_copy_of_the_source_is_the_same_model(tmp_path):
    import shutil

    folder, _ = saved("flux", tmp_path / "source")
    streamed(folder, tmp_path / "files").disable_block_offload()
    shutil.copytree(folder, tmp_path / "copy")
    streamed(tmp_path / "copy", tmp_path / "files")
    assert len(list((tmp_path / "files").glob("transformer-*"))) == 1


def test_a_damaged_store_is_written_anew(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    right = DiffusionPipeline.from_pretrained(folder)
    streamed(folder, tmp_path / "files").disable_block_offload()
    file = next((tmp_path / "files").glob("transformer-*/transformer_blocks.1-*"))
    with file.open("r+b") as stream:
        stream.truncate(5000)
    with warnings_of_ours() as warnings:
        pipe = streamed(folder, tmp_path / "files")
    assert_the_same(pipe, right)
    assert any(file.name in each.getMessage() for each in warnings)


def test_edits_go_to_the_disk_and_not_into_the_models_files(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    with torch.no_grad():
        right = quiet(DiffusionPipeline.from_pretrained(folder))
        right.transformer.transformer_blocks[1].attn.to_q.weight.mul_(2)
        expected = run(right, "flux")
        pipe = quiet(streamed(folder, tmp_path / "files"))
        with pipe.block_offload.suspended():
            pipe.transformer.transformer_blocks[1].attn.to_q.weight.mul_(2)
        assert list((tmp_path / "files").rglob("edited-*"))
        assert torch.equal(run(pipe, "flux"), expected)
        pipe.disable_block_offload()
        assert torch.equal(run(pipe, "flux"), expected)
    assert_the_same(streamed(folder, tmp_path / "files"), DiffusionPipeline.from_pretrained(folder))


# --- what cannot be loaded --------------------------------------------------------------------------------


def edit_transformer(folder: Path, edit) -> None:
    (file,) = sources.checkpoints(folder / "transformer")
    weights = load_file(file)
    edit(weights)
    save_file(weights, file, metadata={"format": "pt"})


def test_a_missing_tensor(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    edit_transformer(folder, lambda weights: weights.pop("proj_out.weight"))
    with pytest.raises(ValueError, match=r"transformer.*proj_out\.weight"):
        streamed(folder, tmp_path / "files")


def test_a_tensor_too_many(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    edit_transformer(folder, lambda weights: weights.update(extra=torch.ones(3)))
    assert_the_same(streamed(folder, tmp_path / "files"), DiffusionPipeline.from_pretrained(folder))


def test_a_tensor_of_another_shape(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    edit_transformer(folder, lambda w: w.update({"proj_out.weight": torch.ones(3, 3)}))
    with pytest.raises(ValueError, match=r"proj_out\.weight expected shape"):
        streamed(folder, tmp_path / "files")


def test_pickled_weights(tmp_path):
    folder, _ = saved("flux", tmp_path / "source", safe_serialization=False)
    for file in (folder / "text_encoder").glob("*.safetensors"):
        file.unlink()
    with pytest.raises(ValueError, match=r"transformer.*\.bin.*save_pretrained"):
        streamed(folder, tmp_path / "files", text_encoder=None, text_encoder_2=None)


def test_quantised_weights(tmp_path):
    folder, _ = saved("flux", tmp_path / "source")
    config = json.loads((folder / "transformer/config.json").read_text())
    config["quantization_config"] = {"quant_method": "bitsandbytes"}
    (folder / "transformer/config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"transformer is quantised .*bitsandbytes"):
        streamed(folder, tmp_path / "files")


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"offload_dir": None}, "offload_dir"),
        ({"device_map": "balanced"}, "device_map"),
        ({"use_safetensors": False}, "use_safetensors"),
        ({"low_cpu_mem_usage": False}, "low_cpu_mem_usage"),
        ({"cache_policy": "best"}, "cache_policy"),
        ({"offload_granularity": "pieces"}, "offload_granularity"),
    ],
)
def test_wrong_arguments(arguments, name, tmp_path):
    folder, _ = saved("wan", tmp_path / "source")
    with pytest.raises(ValueError, match=name):
        diffusers_offload.from_pretrained(folder, **{"offload_dir": tmp_path / "files", **arguments})
    assert not list((tmp_path / "files").glob("*"))


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell")
def test_the_model_is_never_in_memory(tmp_path):
    def large(*arguments: object) -> str:
        command = [sys.executable, LARGE, *map(str, arguments)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout

    large("make", tmp_path / "source", 0.5, 5)
    right = json.loads(large("resident", tmp_path / "source").splitlines()[-1])
    for _ in range(2):  # written, and found
        told = json.loads(
            large("streamed", tmp_path / "source", tmp_path / "files", "100MB").splitlines()[-1]
        )
        assert told["digest"] == right["digest"]
        grown = told["anonymous_peak"] - told["anonymous_before"]
        assert told["anonymous_peak_loading"] - told["anonymous_before"] < told["model"] * 0.25, told
        assert grown < told["model"] * 0.6 < right["anonymous_peak"] - right["anonymous_before"], told

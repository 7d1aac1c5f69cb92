"""What `plan` shows is what enabling the loaded pipeline does, and it takes no weights to show it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import zoo
from diffusers import DiffusionPipeline
from helpers import build

from diffusers_offload.inspection import group_units, inspect
from diffusers_offload.planning.planner import UnitSize
from diffusers_offload.saved.skeleton import NoPipelineError, demo_skeleton, open_skeleton
from diffusers_offload.units import dissect

GRANULARITIES = ("block", "phase", "leaf")
DEMO = ("flux", "sdxl", "wan", "pixart", "hunyuanvideo")
ZOO = ("ideogram4", "stable-audio", "kandinsky6")


def save(name: str, folder: Path, dtype: torch.dtype) -> None:
    pipe = build(name, dtype) if name in DEMO else zoo.build(name, dtype)
    pipe.save_pretrained(folder)


def remove_weights(folder: Path) -> None:
    files = list(folder.glob("*/*.safetensors"))
    assert files
    for file in files:
        file.unlink()


def plans_of(pipe, granularity: str) -> dict:
    pipe.enable_block_offload(device="cpu", offload_granularity=granularity)
    plan = pipe.block_offload.plan
    pipe.disable_block_offload()
    return {component.name: component for component in plan.components}


def assert_plans_equal(modules: dict, pipe) -> None:
    inspections = {granularity: inspect(modules, granularity) for granularity in GRANULARITIES}
    for granularity, inspection in inspections.items():
        expected = plans_of(pipe, granularity)
        assert {each.name: each for each in inspection.plan.components} == expected
        assert {each.name: each.plan for each in inspection.components} == expected
        for other in GRANULARITIES:
            assert inspection.plans[other] == inspections[other].plan


@pytest.mark.parametrize("name", [*DEMO, *ZOO])
def test_without_a_weight_file_the_plan_is_that_of_the_loaded_pipeline(name, tmp_path):
    save(name, tmp_path, torch.float32)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    remove_weights(tmp_path)
    found = open_skeleton(str(tmp_path), torch.bfloat16)
    assert not found.missing
    assert all(module.device.type == "meta" for module in found.modules.values())
    assert_plans_equal(found.modules, pipe)


@pytest.mark.parametrize("name", ["flux", "sdxl", "wan"])
def test_the_stored_weights_tell_the_dtype(name, tmp_path):
    save(name, tmp_path, torch.bfloat16)
    pipe = DiffusionPipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    found = open_skeleton(str(tmp_path))
    assert set(found.dtypes.values()) == {"bfloat16, as stored"}
    assert_plans_equal(found.modules, pipe)


def test_without_weights_and_dtype_the_config_tells(tmp_path):
    save("flux", tmp_path, torch.bfloat16)
    remove_weights(tmp_path)
    dtypes = open_skeleton(str(tmp_path)).dtypes
    assert dtypes["text_encoder_2"] == "bfloat16, as its config says"
    assert dtypes["transformer"] == "float32, a guess, for nothing says"


def test_a_variant_or_a_damaged_file_does_not_decide_the_dtype(tmp_path):
    save("flux", tmp_path, torch.float32)
    weights = tmp_path / "transformer" / "diffusion_pytorch_model.safetensors"
    header = b'{"x": {"dtype": "F16", "shape": [999999999], "data_offsets": [0, 1999999998]}}'
    weights.with_suffix(".fp16.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (tmp_path / "vae" / weights.name).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    dtypes = open_skeleton(str(tmp_path)).dtypes
    assert dtypes["transformer"] == "float32, as stored"
    assert dtypes["vae"] == "float32, a guess, for nothing says"


def test_one_component_is_enough(tmp_path):
    build("flux").transformer.save_pretrained(tmp_path / "transformer")
    (component,) = inspect(open_skeleton(str(tmp_path / "transformer")).modules).components
    assert (component.name, component.class_name) == ("transformer", "FluxTransformer2DModel")
    build("flux").text_encoder_2.save_pretrained(tmp_path / "t5")
    (component,) = inspect(open_skeleton(str(tmp_path / "t5")).modules).components
    assert (component.name, component.class_name) == ("t5", "T5EncoderModel")


def test_what_cannot_be_built_is_said_and_the_rest_goes_on(tmp_path):
    save("flux", tmp_path, torch.float32)
    config = tmp_path / "transformer" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "num_layers": "many"}))
    config = tmp_path / "vae" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "quantization_config": {"bits": 4}}))
    (tmp_path / "text_encoder" / "config.json").unlink()
    index = tmp_path / "model_index.json"
    entries = {**json.loads(index.read_text()), "text_encoder_2": ["transformers", "T6EncoderModel"]}
    index.write_text(json.dumps({**entries, "image_encoder": ["somebodys_code", "Model"]}))
    found = open_skeleton(str(tmp_path))
    assert not found.modules
    assert "FluxTransformer2DModel cannot be built" in found.missing["transformer"]
    assert found.missing["vae"] == "quantised weights are not supported"
    assert found.missing["text_encoder"] == "there is no text_encoder/config.json"
    assert found.missing["text_encoder_2"] == "there is no class T6EncoderModel in transformers"
    text = str(inspect(found.modules, missing=found.missing))
    assert "vae: not looked at: quantised weights are not supported" in text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "neither a model_index.json"),
        ({"model_index.json": "{"}, "cannot be read"),
        ({"model_index.json": "[]"}, "no JSON object"),
        ({"config.json": "{}"}, "names no class"),
        ({"modular_model_index.json": "{}"}, "modular pipeline"),
    ],
)
def test_a_directory_that_is_no_pipeline_is_refused(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    with pytest.raises(NoPipelineError, match=message):
        open_skeleton(str(tmp_path))


def test_an_id_on_the_hub_fetches_configs_alone(tmp_path, monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, allow_patterns):
        assert repo == "somebody/flux"
        assert set(allow_patterns) == {"model_index.json", "config.json", "*/config.json"}
        return str(tmp_path)

    save("flux", tmp_path, torch.float32)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert "transformer" in open_skeleton("somebody/flux").modules


def test_an_id_that_the_hub_does_not_give_is_refused(monkeypatch):
    import huggingface_hub

    def snapshot_download(repo, allow_patterns):
        raise OSError("no network here\nand more")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    with pytest.raises(
        NoPipelineError, match=r"no directory here, and the Hub does not give it: no network here$"
    ):
        open_skeleton("somebody/nothing")


def test_flux_at_its_true_size_in_seconds():
    found = demo_skeleton("flux", "full").only(["transformer"])
    (component,) = inspect(found.modules).components
    mib = [(group.count, group.name, round(group.nbytes / 2**20)) for group in component.groups]
    assert mib == [(19, "transformer_blocks.*", 648), (38, "single_transformer_blocks.*", 270)]
    double, single = component.phases
    assert [phase.name for phase in double.phases][-1] == "transformer_blocks.0.ff_context"
    assert (double.class_name, single.class_name) == ("FluxTransformerBlock", "FluxSingleTransformerBlock")
    (reason,) = component.reasons
    assert reason.reason == "outside the blocks"
    assert "context_embedder.weight" in reason.names


def test_phases_of_a_block_are_those_that_the_granularity_streams():
    modules = demo_skeleton("wan", "tiny").modules
    blocks = {each.name: each for each in inspect(modules, "block").components}
    for each in inspect(modules, "phase").components:
        streamed = {unit.name: unit for unit in each.plan.streamed}
        for phases in blocks[each.name].phases:
            assert phases.phases
            assert all(streamed[phase.name] == phase for phase in phases.phases)


def test_every_byte_of_a_stem_has_a_reason():
    for granularity in GRANULARITIES:
        for each in inspect(demo_skeleton("sdxl", "tiny").modules, granularity).components:
            count = len(each.reasons) and sum(reason.count for reason in each.reasons)
            gaps = 256 * (count + 1)
            if each.plan.policy.streams:
                assert 0 <= each.plan.stem_bytes - sum(reason.nbytes for reason in each.reasons) <= gaps


def test_tensors_on_the_meta_device_are_told_apart():
    with torch.device("meta"):
        blocks = [torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)) for _ in range(3)]
        model = torch.nn.Module()
        model.blocks = torch.nn.ModuleList(blocks)
        assert len(dissect(model).parts) == 3 and not dissect(model).stem
        blocks[2][1].weight = blocks[0][1].weight
        anatomy = dissect(model)
    assert [len(part.tensors) for part in anatomy.parts] == [3, 4, 3]
    assert anatomy.reasons == ("shared",)
    with torch.device("meta"):  # views of one tensor
        blocks[1][0].weight = torch.nn.Parameter(blocks[0][0].weight.data)
    assert [len(part.tensors) for part in dissect(model).parts] == [2, 3, 3]


def test_units_are_grouped_by_size_and_name():
    names = ["a.0.x.1", "a.0.x.2", "b.0", "a.3.x.1", "c.1 + d", "c.2 + d"]
    units = [UnitSize(name, 8) for name in names] + [UnitSize("a.0.x.3", 16)]
    groups = [(group.name, group.count, group.nbytes) for group in group_units(units)]
    assert groups == [("a.*.x.*", 3, 8), ("b.0", 1, 8), ("c.* + d", 2, 8), ("a.0.x.3", 1, 16)]


def test_a_module_under_two_names_counts_once():
    vae = demo_skeleton("flux", "tiny").modules["vae"]
    assert [each.name for each in inspect({"vae": vae, "movq": vae}).components] == ["vae"]

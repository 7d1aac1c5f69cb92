"""The Hugging Face example runs on a saved pipeline, without a network."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline
from PIL import Image

EXAMPLES = Path(__file__).parent.parent / "integrations" / "huggingface_examples"
CALL = {"num_inference_steps": 2, "guidance_scale": 3.5, "height": 48, "width": 64}


def script(name: str) -> ModuleType:
    """The script `name` as a module."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("checkpoint")
    make = script("make_tiny_checkpoint")
    make.main(make.parse_args(["--output_dir", str(folder), "--torch_dtype", "float32"]))
    return folder


@pytest.mark.parametrize("flags", [[], ["--offload_granularity", "block", "--offload_ratio", "0.5"]])
def test_image_is_that_of_the_resident_pipeline(
    checkpoint: Path, flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    example = script("text_to_image")
    options = [text for key, value in CALL.items() for text in (f"--{key}", str(value))]
    args = example.parse_args(
        [
            *("--pretrained_model_name_or_path", str(checkpoint), "--prompt", "a red fox", "--seed", "3"),
            *("--torch_dtype", "float32", "--device", "cpu", "--output", str(tmp_path / "fox.png")),
            *options,
            *flags,
        ]
    )
    example.main(args)
    printed = capsys.readouterr().out
    assert "peak device memory" in printed
    assert "moved to the device" in printed

    pipe = DiffusionPipeline.from_pretrained(checkpoint, torch_dtype=torch.float32)
    expected = pipe("a red fox", generator=torch.Generator("cpu").manual_seed(3), **CALL).images[0]
    with Image.open(tmp_path / "fox.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (48, 64, 3)
    assert pixels.std() > 5
    assert np.array_equal(pixels, np.asarray(expected))


def test_max_device_memory_is_passed_only_when_given(checkpoint: Path, monkeypatch: pytest.MonkeyPatch):
    class Stop(Exception):
        pass

    def enable(pipe, **kwargs):
        seen.append(kwargs)
        raise Stop

    seen: list[dict[str, object]] = []
    from diffusers import FluxPipeline

    monkeypatch.setattr(FluxPipeline, "enable_block_offload", enable, raising=False)
    example = script("text_to_image")
    needed = ["--pretrained_model_name_or_path", str(checkpoint), "--prompt", "a red fox"]
    for flags in ([], ["--max_device_memory", "10GiB"]):
        with pytest.raises(Stop):
            example.main(example.parse_args([*needed, *flags]))
    assert "max_device_memory" not in seen[0]
    assert seen[1]["max_device_memory"] == "10GiB"

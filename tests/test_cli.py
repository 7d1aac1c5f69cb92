"""The demo compares two runs, says what it found, and fails when they differ."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_offload.cli import main
from diffusers_offload.demo import show
from diffusers_offload.demo.memory import MemorySampler, Sample
from diffusers_offload.demo.plot import plot_memory

DEMO = ["demo", "--pipeline", "flux", "--size", "tiny", "--device", "cpu"]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch):
    """The command sets what is not set: let that end with the test."""
    from diffusers_offload import cli

    for name, value in cli.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)


def colours(path: Path) -> int:
    """How many colours a picture has."""
    from PIL import Image

    with Image.open(path) as picture:
        assert picture.format == "PNG"
        return len(picture.convert("RGB").getcolors(maxcolors=2**24))


def cell(text: str, label: str) -> list[str]:
    """The cells of the table's row `label`."""
    (line,) = [line for line in text.splitlines() if line.startswith(label)]
    return line.removeprefix(label).split()


def test_demo_finds_equality_and_writes_both_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    folder = tmp_path / "new" / "folder"
    before = torch.are_deterministic_algorithms_enabled()
    assert main([*DEMO, "--output-dir", str(folder)]) == 0
    assert torch.are_deterministic_algorithms_enabled() == before
    printed = capsys.readouterr().out
    assert cell(printed, "equal to the bit") == ["-", "yes"]
    assert cell(printed, "misses") == ["-", "0"]
    assert cell(printed, "share of the transfer hidden") == ["-", "n/a"]
    assert cell(printed, "moved in the call")[1] != "0"
    assert "transformer" in printed  # the plan
    for name in ("flux.png", "flux-memory.png"):
        assert str(folder / name) in printed
        assert colours(folder / name) > 20


def test_demo_of_a_pipeline_without_step_callback(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    demo = ["demo", "--pipeline", "pixart", "--device", "cpu", "--steps", "1", "--dtype", "bfloat16"]
    assert main([*demo, "--offload-ratio", "0.5", "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert cell(printed, "equal to the bit") == ["-", "yes"]
    assert "divided by the steps" in printed


def test_demo_fails_when_the_offloaded_output_differs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    from diffusers import FluxPipeline

    def enable_and_damage(pipe, **kwargs):
        enable(pipe, **kwargs)
        with torch.no_grad():
            pipe.transformer.x_embedder.weight.mul_(1.01)

    enable = FluxPipeline.enable_block_offload
    monkeypatch.setattr(FluxPipeline, "enable_block_offload", enable_and_damage, raising=False)
    assert main([*DEMO, "--output-dir", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert cell(captured.out, "equal to the bit") == ["-", "NO"]
    assert "differs from the resident one in" in captured.err


def test_demo_says_when_there_is_nothing_to_compare_with(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def measure(pipe, kwargs, device, handle=None):
        if handle is None:
            raise torch.OutOfMemoryError("Tried to allocate 20.00 GiB. GPU 0 has less.")
        return real(pipe, kwargs, device, handle)

    real = show.measure
    monkeypatch.setattr(show, "measure", measure)
    assert main([*DEMO, "--output-dir", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert cell(printed, "equal to the bit") == ["-", "not", "compared"]
    assert "does not fit into the memory of cpu: Tried to allocate 20.00 GiB." in printed
    assert (tmp_path / "flux.png").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--pipeline", "nothing"], "hunyuanvideo"),
        (["--offload-ratio", "1.5"], "0.0-1.0"),
        (["--steps", "0"], "less than 1"),
        (["--device", "cuda:99"], "cuda"),
    ],
)
def test_wrong_arguments_are_refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as exit:
        main(["demo", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err


def test_the_command_starts_without_torch():
    program = "import sys; from diffusers_offload import cli; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_zero_and_minus_zero_are_different_bits():
    assert not show.same_bits(torch.tensor([0.0]), torch.tensor([-0.0]))
    assert not show.same_bits(torch.tensor([float("nan")]), torch.tensor([float("nan")]))
    assert show.same_bits(torch.tensor([0.5]), torch.tensor([0.5]))


def test_sampler_sees_memory_grow():
    with MemorySampler(torch.device("cpu"), interval=0.001) as memory:
        held = torch.ones(2**26, dtype=torch.uint8)
    assert memory.samples[-1].host - memory.samples[0].host > held.nbytes / 2
    assert [s.seconds for s in memory.samples] == sorted(s.seconds for s in memory.samples)
    assert all(sample.device is None for sample in memory.samples)


def test_plot_has_a_second_panel_for_an_accelerator(tmp_path: Path):
    from PIL import Image

    sizes = {}
    for name, device in (("cpu", None), ("cuda", 2**30)):
        runs = {
            run: [Sample(0.0, device, 2**31), Sample(1.0, device, 2**31)] for run in ("resident", "offloaded")
        }
        plot_memory(runs, tmp_path / f"{name}.png", title=name, arena_bytes=2**20)
        with Image.open(tmp_path / f"{name}.png") as picture:
            sizes[name] = picture.size
    assert sizes["cuda"][0] == 2 * sizes["cpu"][0]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from helpers import build

    folder = tmp_path_factory.mktemp("saved")
    build("flux").save_pretrained(folder)
    return folder


def test_plan_shows_units_phases_stem_and_what_each_granularity_needs(
    saved: Path, capsys: pytest.CaptureFixture[str]
):
    assert main(["plan", str(saved), "--component", "transformer"]) == 0
    printed = capsys.readouterr().out
    assert "FluxTransformer2DModel, float32, as stored" in printed
    for expected in (
        "x transformer_blocks.*",
        "phases of transformer_blocks.0 (FluxTransformerBlock)",
        "that of use is learned",
        "stem, ",
        "outside the blocks",
        "norm_out.linear.weight",
    ):
        assert expected in printed
    for granularity in ("block", "phase", "leaf"):
        assert sum(line.split()[:1] == [granularity] for line in printed.splitlines()) == 2
    assert "text_encoder" not in printed


def test_plan_as_data(saved: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(saved), "--json", "--granularity", "phase", "--dtype", "bfloat16"]) == 0
    data = json.loads(capsys.readouterr().out)
    assert (data["pipeline"], data["granularity"], data["missing"]) == ("FluxPipeline", "phase", {})
    found = {each["name"]: each for each in data["components"]}
    assert set(found) == {"vae", "text_encoder", "text_encoder_2", "transformer"}
    transformer = found["transformer"]
    sizes = [unit["nbytes"] for unit in transformer["units"]]
    assert sizes and transformer["granularities"]["phase"]["largest_unit"] == max(sizes)
    assert transformer["granularities"]["phase"]["units"] == len(sizes)
    assert transformer["stem"]["reasons"][0]["names"]
    assert 0 < data["granularities"]["phase"]["device"] < data["granularities"]["block"]["device"]


def test_plan_says_what_a_bound_leaves(saved: Path, capsys: pytest.CaptureFixture[str]):
    assert main(["plan", str(saved), "--max-device-memory", "1GiB"]) == 0
    assert "left of 1.00 GiB" in capsys.readouterr().out
    assert main(["plan", str(saved), "--max-device-memory", "1000"]) == 1
    captured = capsys.readouterr()
    assert "too little" in captured.out
    assert captured.err.startswith("max_device_memory=1000 is")


def test_plan_of_a_pipeline_of_the_demo(capsys: pytest.CaptureFixture[str]):
    assert main(["plan", "--pipeline", "wan", "--size", "tiny", "--granularity", "model"]) == 0
    printed = capsys.readouterr().out
    assert "could stream" in printed and "WanTransformer3DModel" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "either a path or a --pipeline"),
        (["x", "--pipeline", "flux"], "either a path or a --pipeline"),
        (["./nowhere"], "./nowhere is not there"),
        ([__file__], "is a file"),
        (["."], "is no pipeline"),
        (
            ["--pipeline", "flux", "--size", "tiny", "--component", "nothing"],
            "there are 'vae', 'text_encoder'",
        ),
        (["--pipeline", "flux", "--max-device-memory", "much"], "--max-device-memory='much' is not a size"),
    ],
)
def test_plan_of_what_is_no_pipeline_is_refused(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch
):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as exit:
        main(["plan", *arguments])
    assert exit.value.code == 2
    assert message in capsys.readouterr().err

"""The programs of benchmarks/ that need no accelerator: plots, tables put together, what peers' rows rest on."""

from __future__ import annotations

import importlib
import itertools
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

GIB = 2**30
BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
STEPS = {  # row: (peak GiB, step ms)
    "resident": (22.66, 174.0),
    "ours": (1.88, 428.0),
    "ours-phase": (0.78, 429.5),
    "ours-leaf": (0.58, 448.0),
    "ours-half": (12.96, 224.0),
    "packed": (1.98, 306.0),
    "packed-half": (13.1, 182.0),
    "diffusers-block": (1.76, 502.0),
    "diffusers-leaf": (0.58, 497.0),
    "diffusers-mm": (0.6, 520.0),
    "cache-dit": (1.9, 510.0),
    "mmgp": (1.8, 515.0),
    "dfloat11": (1.7, 505.0),
}


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Imports a program by its name; none is left behind, since their names are everybody's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    before = set(sys.modules)
    yield importlib.import_module
    for name in set(sys.modules) - before:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.fixture
def plots(programs: Any) -> ModuleType:
    pytest.importorskip("matplotlib")
    return programs("plots")


def table(steps: dict[str, tuple[float, float]], **failed: str) -> dict[str, Any]:
    rows = [
        {
            "row": row,
            "wanted": ["flux-4096"],
            "environment": {"device": "a device", "torch": "2.11.0"},
            "cases": {"flux-4096": {"step_ms": step, "peak_allocated": int(peak * GIB)}},
        }
        for row, (peak, step) in steps.items()
    ]
    rows += [{"row": row, "wanted": ["flux-4096"], "cases": {}, "error": why} for row, why in failed.items()]
    return {"command": "a command", "size": "full", "start": "device", "seconds": 1.0, "rows": rows}


def test_plot_of_a_table_names_every_row_that_has_a_result(plots: ModuleType, tmp_path: Path):
    plots.memory_and_time(table(STEPS, absent="not there"), "flux-4096", tmp_path / "plot")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    drawn = (tmp_path / "plot.svg").read_text()
    for row in STEPS:
        assert f"<!-- {plots.label_of(row)} -->" in drawn
    assert "absent" not in drawn


def test_labels_of_a_plot_cover_neither_each_other_nor_another_point(plots: ModuleType, tmp_path: Path):
    figure = plots.memory_and_time(table(STEPS), "flux-4096", tmp_path / "plot")
    axes, renderer = figure.axes[0], figure._get_renderer()
    boxes = [plots._text_box(text, renderer) for text in axes.texts]
    assert len(boxes) == len(STEPS)
    assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))


def test_plot_is_the_same_file_from_the_same_numbers(plots: ModuleType, tmp_path: Path):
    for name in ("one", "two"):
        plots.memory_and_time(table(STEPS), "flux-4096", tmp_path / name)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()


def test_table_without_memory_of_a_device_has_no_plot(plots: ModuleType, tmp_path: Path):
    results = table(STEPS)
    for row in results["rows"]:
        row["cases"]["flux-4096"]["peak_allocated"] = None
    assert plots.memory_and_time(results, "flux-4096", tmp_path / "plot") is None
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("rate", [55.4, None])
def test_plot_of_a_curve_has_both_tiers(plots: ModuleType, tmp_path: Path, rate: float | None):
    points = [
        {"tier": tier, "ratio": n / 10, "step_ms": 174 + n * 25 * share, "bytes_per_step": n * 2.2e9 * share}
        for tier, share in (("pinned", 1.0), ("packed", 0.69))
        for n in range(11)
    ]
    results = {"case": "flux-4096", "resident_ms": 174.0, "rate_gbs": rate, "points": points}
    (tmp_path / "curve.json").write_text(json.dumps(results | {"environment": {"device": "a device"}}))
    plots.curve(json.loads((tmp_path / "curve.json").read_text()), tmp_path / "curve")
    drawn = (tmp_path / "curve.svg").read_text()
    assert all(f"<!-- {text} -->" in drawn for text in ("pinned", "packed", "resident"))


def test_parts_put_together_keep_the_row_that_has_a_result(programs: Any):
    together = programs("side_by_side").together
    first, second = (
        table({"ours": (1.0, 400.0)}, mmgp="not there"),
        table({"ours": (2.0, 500.0), "mmgp": (1.8, 800.0)}),
    )
    found = {row["row"]: row for row in together([first, second])["rows"]}
    assert found["ours"] is first["rows"][0]
    assert found["mmgp"] is second["rows"][1]


def test_every_row_of_the_parts_is_known_and_states_its_settings(programs: Any):
    parts, rows = programs("side_by_side").PARTS, programs("rows").ROWS
    for row in itertools.chain(*parts.values()):
        assert row == "resident" or rows[row].settings


def test_row_of_a_package_that_is_not_there_says_so(
    programs: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(sys.modules, "mmgp", None)
    programs("rows").run_row("mmgp", ["flux-1024"], "tiny", torch.device("cpu"), "device", None)
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert "mmgp" in result["error"]
    rendered = programs("tables").render(
        {
            "command": "",
            "size": "tiny",
            "start": "device",
            "seconds": 0.0,
            "rows": [result | {"wanted": ["flux-1024"]}],
        }
    )
    assert f"| mmgp | {result['error']} |" in rendered
    assert f"- mmgp: {result['settings']}" in rendered


def test_samples_that_are_thinned_out_keep_the_peak(programs: Any):
    series = [(n / 10, n if n != 777 else 10_000) for n in range(1000)]
    thinned = programs("enabling").thinned(series)
    assert len(thinned) <= 200
    assert (77.7, 10_000) in thinned


@pytest.mark.parametrize("chunk", [997, 2**25])
@pytest.mark.parametrize("count", [1, 700, 40_000])
def test_dfloat11_writer_packs_codes_as_its_format_says(programs: Any, chunk: int, count: int):
    writer = programs("dfloat11_writer")
    writer.CHUNK = chunk
    codes = {n: (n + 1, 2 ** (n + 1) - 2) for n in range(21)}  # 0, 10, 110 ...
    codes[21] = (32, 2**32 - 2**11)  # the longest that there may be
    draw = torch.Generator().manual_seed(count)
    symbols = torch.rand(count, generator=draw).log2().neg().long().clamp(max=20)
    symbols[count // 2] = 21
    counts = torch.bincount(symbols, minlength=256).tolist()
    encoded, gaps, positions = writer.encode(symbols.to(torch.uint8), codes, (21, 2**21 - 1), counts)
    bits, starts = "", []
    for symbol in symbols.tolist():
        starts.append(len(bits))
        bits += format(codes[symbol][1], f"0{codes[symbol][0]}b")
    if len(bits) % 8:
        starts.append(len(bits))
        bits += "1" * (-len(bits) % 8)
    assert bytes(encoded.tolist()) == int(bits, 2).to_bytes(len(bits) // 8, "big")
    first = {start // 64: start % 64 for start in reversed(starts)}
    threads = -(-encoded.numel() // (8 * 512)) * 512
    offsets = "".join(format(first.get(thread, 0), "05b") for thread in range(threads))
    assert bytes(gaps.tolist()) == int(offsets, 2).to_bytes(len(offsets) // 8, "big")
    blocks = {start // (64 * 512): number for number, start in reversed(list(enumerate(starts)))}
    assert positions.tolist() == [*(blocks[block] for block in sorted(blocks)), count]

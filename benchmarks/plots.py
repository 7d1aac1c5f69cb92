"""Plots of the benchmarks, from their JSON: PNG and SVG, light, told apart by shape as well as colour.

python benchmarks/plots.py table benchmarks/results/side-by-side-flux.json --case flux-4096 --out flux-4096
python benchmarks/plots.py curve benchmarks/results/curve-flux.json --out curve-flux
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter, NullLocator
from matplotlib.transforms import Bbox

matplotlib.use("Agg")

GIB = 2**30
INK, GREY = "#222222", "#8a8a8a"
SIZE = (8.0, 4.8)  # inches; a README shows 800 pixels or so


@dataclass(frozen=True)
class Kind:
    """How the rows of one origin are drawn; the colours are Okabe and Ito's."""

    name: str
    colour: str
    marker: str


RESIDENT = Kind("resident", "#555555", "s")
PINNED = Kind("diffusers_offload, pinned", "#0072B2", "o")
PACKED = Kind("diffusers_offload, packed", "#D55E00", "D")
PLANNED = Kind("diffusers_offload, planned", "#E69F00", "P")
DIFFUSERS = Kind("Diffusers", "#009E73", "^")
OTHERS = Kind("other packages", "#CC79A7", "v")
KINDS = (PINNED, PACKED, PLANNED, DIFFUSERS, OTHERS, RESIDENT)


def kind_of(row: str) -> Kind:
    if row == "resident":
        return RESIDENT
    if row.startswith("packed"):
        return PACKED
    if row == "ours-planned":
        return PLANNED
    if row.startswith("ours"):
        return PINNED
    own = row == "accelerate" or row.startswith(("diffusers-block", "diffusers-leaf", "diffusers-disk"))
    return DIFFUSERS if own else OTHERS


def label_of(row: str) -> str:
    """What stands beside a point: the granularity alone where the colour tells the rest."""
    short = {"ours": "block", "packed": "block"}
    parts = row.split("-", 1)
    if parts[0] in short:
        return "block, half stays" if parts[1:] == ["half"] else parts[1] if parts[1:] else short[row]
    if row.endswith("-half"):
        return f"{row[: -len('-half')]}, half stays"
    return row.removeprefix("diffusers-") if kind_of(row) is DIFFUSERS else row


def memory_and_time(results: dict[str, Any], case: str, out: Path) -> Figure | None:
    """Step time against peak memory of the device: what lies further down and to the left is better."""
    points = []
    for row in results["rows"]:
        measured = row.get("cases", {}).get(case, {})
        if measured.get("step_ms") and measured.get("peak_allocated"):
            points.append((row["row"], measured["peak_allocated"] / GIB, measured["step_ms"]))
    if not points:  # on a CPU there is no memory of the device
        return None
    figure, axes = _axes(f"{case}: step time against device memory", _about(results))
    for kind in KINDS:
        mine = [(x, y) for row, x, y in points if kind_of(row) is kind]
        if mine:
            axes.scatter(
                *zip(*mine, strict=True), s=46, c=kind.colour, marker=kind.marker, label=kind.name, zorder=3
            )
    resident = next((y for row, _, y in points if row == "resident"), None)
    if resident is not None:
        axes.axhline(resident, color=GREY, linewidth=1, linestyle=(0, (4, 3)), zorder=1)
    _log_axis(axes.xaxis, [x for _, x, _ in points], axes.set_xlim)
    _log_axis(axes.yaxis, [y for _, _, y in points], axes.set_ylim)
    axes.set_xlabel("peak device memory, GiB (log)")
    axes.set_ylabel("step, ms (log)")
    axes.legend(
        loc="upper center",
        bbox_to_anchor=(0.5, -0.14),
        ncols=-(-len(KINDS) // 2),
        fontsize=8,
        frameon=False,
        handletextpad=0.2,
    )
    _label(axes, [(x, y, label_of(row), kind_of(row).colour) for row, x, y in points], resident)
    _save(figure, out)
    return figure


def curve(results: dict[str, Any], out: Path) -> Figure:
    """Step time over `offload_ratio`, and the least that it could be."""
    figure, axes = _axes(f"{results['case']}: step time over offload_ratio", _about(results))
    resident, rate = results["resident_ms"], results["rate_gbs"]
    axes.axhline(resident, color=GREY, linewidth=1, linestyle=(0, (1, 2)), zorder=1)
    top = max(point["step_ms"] for point in results["points"])
    axes.set_ylim(0, top * 1.14)
    axes.set_xlim(-0.02, 1.02)
    axes.text(0, resident - top * 0.02, "resident", color=GREY, fontsize=9, va="top")
    for tier, kind in (("pinned", PINNED), ("packed", PACKED)):
        points = sorted((p for p in results["points"] if p["tier"] == tier), key=lambda p: p["ratio"])
        if not points:
            continue
        ratios = [point["ratio"] for point in points]
        steps = [point["step_ms"] for point in points]
        least = [
            max(resident, point["bytes_per_step"] / rate / 1e6) if rate else resident for point in points
        ]
        axes.plot(ratios, least, color=kind.colour, linewidth=1.2, linestyle="--", zorder=2)
        axes.plot(
            ratios, steps, color=kind.colour, marker=kind.marker, markersize=5.5, linewidth=1.4, zorder=3
        )
        axes.annotate(
            tier, (ratios[-1], steps[-1]), (8, 0), textcoords="offset points", color=kind.colour, va="center"
        )
    axes.set_xlabel("offload_ratio: share of the blocks' bytes that streams")
    axes.set_ylabel("step, ms")
    axes.xaxis.set_major_locator(FixedLocator([n / 10 for n in range(11)]))
    note = "dashed: max(resident, bytes of a step / measured rate" + (
        f" of {rate:.1f} GB/s)" if rate else ")"
    )
    axes.text(0.01, 0.97, note, transform=axes.transAxes, fontsize=9, color=GREY, va="top")
    _save(figure, out)
    return figure


def _about(results: dict[str, Any]) -> str:
    environment = next((row["environment"] for row in results.get("rows", ()) if "environment" in row), None)
    environment = environment or results.get("environment", {})
    return ", ".join(
        [environment.get("device", ""), *(f"{k} {v}" for k, v in environment.items() if k == "torch")]
    )


def _axes(title: str, about: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=SIZE, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", fontsize=12, color=INK)
    axes.set_title(about, loc="right", fontsize=9, color=GREY)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e8e8e8", linewidth=0.8, zorder=0)
    axes.tick_params(colors=INK, labelsize=9, length=3)
    return figure, axes


def _log_axis(axis: Any, values: list[float], limit: Any) -> None:
    """From a little below the least to a little above the largest, with ticks at 1, 2 and 5 of each decade."""
    low, high = min(values) / 1.25, max(values) * 1.35
    ticks = [base * 10.0**power for power in range(-3, 6) for base in (1, 2, 5)]
    (axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale)("log")
    limit(low, high)
    axis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())


def _label(axes: Axes, points: list[tuple[float, float, str, str]], line: float | None) -> None:
    """A label beside each point, where it covers no other: near if it can be, else with a line to it.

    Args:
        line: the height at which a line crosses the plot, which is to be left free as well.
    """
    figure = axes.figure
    figure.draw_without_rendering()
    renderer = (
        figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else figure._get_renderer()
    )
    frame = axes.get_window_extent(renderer)
    pixels = [axes.transData.transform((x, y)) for x, y, *_ in points]
    taken = [Bbox.from_extents(x - 5, y - 5, x + 5, y + 5) for x, y in pixels]
    if line is not None:
        height = axes.transData.transform((points[0][0], line))[1]
        free = [Bbox.from_extents(frame.x0, height - 2, frame.x1, height + 2)]
    else:
        free = []
    near = [(8, 0, "left"), (-8, 0, "right"), (0, 11, "center"), (0, -11, "center")]
    far = [
        (dx, dy, "left" if dx > 0 else "right") for dy in (14, -14, 26, -26, 40, -40, 54) for dx in (14, -14)
    ]
    for index, (x, y, text, colour) in enumerate(points):
        places = [*near, *far]
        for number, (dx, dy, side) in enumerate(places):
            tied = number >= len(near)
            note = axes.annotate(
                text,
                (x, y),
                (dx, dy),
                textcoords="offset points",
                ha=side,
                va="center",
                fontsize=8.5,
                color=INK,
                arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 0.7, "shrinkB": 4}
                if tied
                else None,
            )
            box = _text_box(note, renderer)
            others = [*free, *taken[:index], *taken[index + 1 :]]
            inside = frame.x0 <= box.x0 and box.x1 <= frame.x1 and frame.y0 <= box.y0 and box.y1 <= frame.y1
            last = number == len(places) - 1
            if last or (inside and not any(box.overlaps(other) for other in others)):
                taken.append(box)
                break
            note.remove()


def _text_box(note: Any, renderer: Any) -> Bbox:
    """Of the words alone, without the line to the point."""
    note.update_positions(renderer)
    return matplotlib.text.Text.get_window_extent(note, renderer)


def _save(figure: Figure, out: Path) -> None:
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(f"{out}.png", dpi=150)
    with matplotlib.rc_context({"svg.hashsalt": "diffusers_offload"}):  # the same file from the same numbers
        figure.savefig(f"{out}.svg", metadata={"Date": None})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("plot", choices=("table", "curve"))
    parser.add_argument("json", type=Path)
    parser.add_argument("--case", help="of a table; else the first")
    parser.add_argument("--out", type=Path, required=True, help="writes OUT.png and OUT.svg")
    arguments = parser.parse_args()
    results = json.loads(arguments.json.read_text())
    if arguments.plot == "curve":
        curve(results, arguments.out)
    else:
        case = arguments.case or results["rows"][0]["wanted"][0]
        memory_and_time(results, case, arguments.out)


if __name__ == "__main__":
    main()

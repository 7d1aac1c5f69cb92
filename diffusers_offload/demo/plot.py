"""The plot of memory over time. Needs matplotlib, which the extra `plot` brings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from .memory import Sample

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = {"resident": "tab:gray", "offloaded": "tab:blue"}


def plot_memory(
    runs: Mapping[str, Sequence[Sample]], path: str | Path, title: str, arena_bytes: int | None = None
) -> None:
    """Write a PNG with the device's memory on the left and the host's on the right, one line per run.

    Where the device is the CPU there is only the host's.

    Args:
        runs: samples by the run's name.
        arena_bytes: where given, a line at the arena's size beside the memory that it lies in.

    Raises:
        ImportError: matplotlib is not installed.
    """
    from matplotlib.figure import Figure

    on_device = any(sample.device is not None for samples in runs.values() for sample in samples)
    panels = {"device memory": "device", "host memory": "host"} if on_device else {"host memory": "host"}
    # No pyplot: it would open a display, and keep the figure alive.
    figure = Figure(figsize=(5.5 * len(panels), 4), layout="constrained")
    figure.suptitle(title)
    for axes, (label, kind) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True
    ):
        _draw(axes, runs, kind, label, arena_bytes if kind == next(iter(panels.values())) else None)
    figure.savefig(path, format="png", dpi=120)


def _draw(
    axes: Axes, runs: Mapping[str, Sequence[Sample]], kind: str, label: str, arena_bytes: int | None
) -> None:
    top = max(getattr(sample, kind) or 0 for samples in runs.values() for sample in samples)
    scale, unit = (2**30, "GiB") if top >= 2**30 else (2**20, "MiB")
    for name, samples in runs.items():
        axes.plot(
            [sample.seconds for sample in samples],
            [(getattr(sample, kind) or 0) / scale for sample in samples],
            label=name,
            color=COLOURS.get(name),
        )
    if arena_bytes:
        size = (
            f"{arena_bytes / scale:.2f} {unit}"
            if arena_bytes >= scale / 100
            else f"{arena_bytes / 2**10:.0f} KiB"
        )
        axes.axhline(arena_bytes / scale, label=f"arena, {size}", color="tab:orange", linestyle="--")
    axes.set(xlabel="seconds", ylabel=f"{label}, {unit}")
    axes.set_ylim(bottom=0)
    axes.legend()

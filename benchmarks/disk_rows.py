"""The rows whose weights are on disk: how they are enabled, what they read, and what a bare reader would need."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter, sleep
from typing import Any

import disk_reader
import measure
import torch
from torch import nn

from diffusers_offload.tiers.blockfile import Stored
from diffusers_offload.tiers.pinned import STAGING_BYTES

WORKERS = 2  # threads that read, of ours and of the bare reader
SLOTS = 3  # units that may be on their way at a time


def ours(share: float, packs: bool | None = None) -> Callable[[nn.Module, torch.device, Path], Any]:
    """Block offload from disk, with host memory for this share of the weights and the units on their way.

    Args:
        packs: whether the files are packed; None leaves it to the package.
    """

    def enable(model: nn.Module, device: torch.device, folder: Path) -> Any:
        diffusers_offload = import_module("diffusers_offload")
        through = SLOTS * (largest_block(model) + disk_reader.PAGE) + 2 * STAGING_BYTES
        weights = sum(parameter.nbytes for parameter in model.parameters())
        return diffusers_offload.enable_block_offload(
            model,
            device=device,
            offload_ratio=1.0,
            tier="disk",
            offload_dir=folder,
            num_disk_workers=WORKERS,
            max_host_memory=through + int(share * weights),
            pack_on_disk=packs,
        )

    return enable


def diffusers(model: nn.Module, device: torch.device, folder: Path) -> None:
    streams = {"use_stream": True, "record_stream": True} if device.type != "cpu" else {}
    model.enable_group_offload(
        onload_device=device,
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
        offload_to_disk_path=str(folder),
        **streams,
    )


def largest_block(model: nn.Module) -> int:
    """Bytes of the largest module in a list of blocks, as a unit takes them."""
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    return max(sum(t.nbytes + 512 for t in block.state_dict().values()) for each in lists for block in each)


def files_in(folder: Path) -> list[Stored]:
    """All weights' files, each as one unit."""
    return [Stored(file, 0, file.stat().st_size, "") for file in sorted(folder.rglob("*.safetensors"))]


def drop_cache(folder: Path) -> None:
    """The page cache holds nothing of the files, if they have reached the disk."""
    disk_reader.drop_cache(files_in(folder))


def bare_rate(folder: Path) -> float:
    """Bytes per second that threads read from the cold files past the page cache into slots, and do nothing else."""
    units = files_in(folder)
    ring = [disk_reader.memory(max(unit.nbytes for unit in units)) for _ in range(SLOTS)]
    drop_cache(folder)
    begin = perf_counter()
    disk_reader.read_bare(units, WORKERS, lambda _, unit: ring[unit % SLOTS])
    return sum(unit.nbytes for unit in units) / (perf_counter() - begin)


def cold_times(step: Callable[[], Any], count: int, device: torch.device, folder: Path) -> list[float]:
    """Milliseconds of each step, before which the page cache was emptied of the files."""
    times = []
    for _ in range(count):
        drop_cache(folder)
        times += measure.step_times(step, 1, device)[0]
    return times


def settled(handle: Any) -> Any:
    """Our report of the disk once nothing more is read ahead: as much of the next step as there are slots for."""
    before, now = None, handle.report().disk
    while before is None or now.bytes_read > before.bytes_read:
        sleep(0.5)
        before, now = now, handle.report().disk
    return now


def told(folder: Path, before: Any, after: Any, steps_ms: list[float], rates: list[float]) -> dict[str, Any]:
    """What was read in a step, and how long a bare reader would have needed for that.

    Args:
        before, after: our reports of the disk, around the steps; None where a step reads every file once.
        rates: of the bare reader, in bytes per second.
    """
    nbytes = sum(unit.nbytes for unit in files_in(folder))
    known: dict[str, Any] = {"files_bytes": nbytes}
    if after is not None:
        nbytes, seconds = after.bytes_read - before.bytes_read, after.read_seconds - before.read_seconds
        known |= {"hits": after.hits - before.hits, "misses": after.misses - before.misses}
        known |= {"buffer_bytes": after.buffer_bytes, "read_rate": nbytes / seconds if seconds else None}
        nbytes /= len(steps_ms)
    step_s, bare = median(steps_ms) / 1e3, median(rates)
    known |= {"bytes_per_step": nbytes, "bare_rates": rates, "step_rate": nbytes / step_s}
    known["step_to_bare"] = step_s * bare / nbytes if nbytes else None
    return known

"""The rows of a table, one way of running the model each, and the measuring of one row in this process."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any

import disk_rows
import measure
import peers
import torch
from models import CASES, FAMILIES, build, forward_of
from torch import nn

Enable = Callable[..., Any]


@dataclass(frozen=True)
class Row:
    """One way of running the model.

    Attributes:
        enable: sets it up; what it returns is the handle of `ours`, `peers.Enabled` of a peer, or None.
        offloads: the weights leave the device; False for the row that the others are compared with.
        needs_streams: cannot run on the CPU.
        from_host: wants the weights on the host before `enable`.
        packages: imported ahead, so that neither its time nor its memory count to `enable`.
        on_disk: `enable` is told a folder as well, where it puts the weights.
        cold: the page cache is emptied of that folder before each timed forward.
        warm_ups, at_most: forwards before the timed ones, and the limit of those.
        plans: measures in the first forwards of each case, and settles then: it warms up for each, in calls.
        settings: what is asked for, as the table says it.
    """

    enable: Enable
    offloads: bool = True
    needs_streams: bool = False
    from_host: bool = False
    packages: tuple[str, ...] = ()
    on_disk: bool = False
    cold: bool = False
    warm_ups: int = 2
    at_most: int = 100
    plans: bool = False
    settings: str = ""


def _resident(model: nn.Module, device: torch.device) -> None:
    model.to(device)


def _group_offload(**kind: Any) -> Enable:
    def enable(model: nn.Module, device: torch.device) -> None:
        model.enable_group_offload(
            onload_device=device,
            offload_device=torch.device("cpu"),
            **{"use_stream": True, "record_stream": True, **kind},
        )

    return enable


def _accelerate(model: nn.Module, device: torch.device) -> None:
    accelerate = import_module("accelerate")
    accelerate.cpu_offload(model, execution_device=device)


_GROUPS = {"needs_streams": True, "packages": ("diffusers.hooks",)}
_STREAMS = "use_stream=True, record_stream=True"
_OURS = {"packages": ("diffusers_offload.pipeline",)}


def ours(ratio: float, granularity: str = "block", tier: str = "pinned") -> Row:
    """A row of this package: this share of the units' bytes streams, from this tier."""

    def enable(model: nn.Module, device: torch.device) -> Any:
        diffusers_offload = import_module("diffusers_offload")
        return diffusers_offload.enable_block_offload(
            model, device=device, offload_granularity=granularity, offload_ratio=ratio, tier=tier
        )

    settings = f"offload_granularity={granularity!r}, offload_ratio={ratio:g}, tier={tier!r}"
    return Row(enable, plans=0 < ratio < 1, settings=settings, **_OURS)


def planned(share: float, beside: int) -> Row:
    """A row of this package that is told of device memory for this share of the weights, and `beside` bytes."""

    def enable(model: nn.Module, device: torch.device) -> Any:
        diffusers_offload = import_module("diffusers_offload")
        weights = sum(parameter.nbytes for parameter in model.parameters())
        bound = int(share * weights) + beside
        return diffusers_offload.enable_block_offload(model, device=device, max_device_memory=bound)

    settings = f"max_device_memory={share:g} of the weights and {beside / 2**30:g} GiB"
    return Row(enable, needs_streams=True, warm_ups=4, plans=True, settings=settings, **_OURS)


def _peer(peer: peers.Peer) -> Row:
    return Row(
        peer.enable,
        needs_streams=peer.needs_streams,
        from_host=peer.from_host,
        packages=peer.packages,
        settings=peer.settings,
    )


_CALLS = 3  # of a pipeline, in which a row that plans settles
_DISK = {"from_host": True, "at_most": 3}  # what is on disk passed through the host on its way there
ROWS = {
    "resident": Row(_resident, offloads=False),
    "diffusers-block": Row(
        _group_offload(offload_type="block_level", num_blocks_per_group=1),
        settings=f"block_level, num_blocks_per_group=1, {_STREAMS}",
        **_GROUPS,
    ),
    "diffusers-block-waits": Row(
        _group_offload(offload_type="block_level", num_blocks_per_group=1, record_stream=False),
        settings="block_level, num_blocks_per_group=1, use_stream=True",
        **_GROUPS,
    ),
    "diffusers-leaf": Row(
        _group_offload(offload_type="leaf_level"), settings=f"leaf_level, {_STREAMS}", **_GROUPS
    ),
    "accelerate": Row(_accelerate, from_host=True, packages=("accelerate",), warm_ups=1, at_most=2),
    "ours": ours(1.0),
    "ours-half": ours(0.5),
    "ours-planned": planned(0.5, 2 * 2**30),
    "ours-phase": ours(1.0, "phase"),
    "ours-leaf": ours(1.0, "leaf"),
    "packed": ours(1.0, tier="packed"),
    "packed-half": ours(0.5, tier="packed"),
    "packed-phase": ours(1.0, "phase", "packed"),
    "packed-leaf": ours(1.0, "leaf", "packed"),
    "ours-disk": Row(disk_rows.ours(0.0), on_disk=True, **_DISK, **_OURS),
    "ours-disk-half": Row(disk_rows.ours(0.5), on_disk=True, **_DISK, **_OURS),
    "ours-disk-raw": Row(disk_rows.ours(0.0, False), on_disk=True, **_DISK, **_OURS),
    "ours-disk-raw-half": Row(disk_rows.ours(0.5, False), on_disk=True, **_DISK, **_OURS),
    "diffusers-disk-warm": Row(disk_rows.diffusers, on_disk=True, **_DISK, packages=("diffusers.hooks",)),
    "diffusers-disk-cold": Row(
        disk_rows.diffusers, on_disk=True, cold=True, **_DISK, packages=("diffusers.hooks",)
    ),
    **{name: _peer(peer) for name, peer in peers.PEERS.items()},
}


def run_row(
    name: str, cases: Sequence[str], size: str, device: torch.device, start: str, offload_dir: str | None
) -> None:
    """Measure one row on cases of one family; prints all that is known as a line of JSON after each case.

    Args:
        offload_dir: on the disk to be measured; what is written there is deleted.
    """
    if ROWS[name].on_disk:
        with TemporaryDirectory(dir=offload_dir, prefix=f"{name}-") as folder:
            _run_row(name, cases, size, device, start, Path(folder))
    else:
        _run_row(name, cases, size, device, start, None)


def _run_row(
    name: str, cases: Sequence[str], size: str, device: torch.device, start: str, folder: Path | None
) -> None:
    row = ROWS[name]
    result: dict[str, Any] = {"row": name, "start": start, "settings": row.settings, "cases": {}}
    try:
        measure.start_up(device)
        result["environment"] = _environment(device)
        result["h2d"] = [measure.h2d_rates(device)]
        model, handle, result["setup"] = _set_up(
            row, CASES[size][cases[0]].family, size, device, start, folder
        )
    except Exception as error:
        result["error"] = _told(error)
        print(json.dumps(result), flush=True)
        return
    for number, case_name in enumerate(cases):
        try:
            measured = _measure_case(row, model, handle, case_name, size, device, number == 0, folder)
            measure.settle(device)
            result["cases"][case_name] = measured | _host_memory(result["setup"])
        except Exception as error:
            result["cases"][case_name] = {"error": _told(error)}
        print(json.dumps(result), flush=True)
    result["h2d"].append(measure.h2d_rates(device))
    print(json.dumps(result), flush=True)


def _set_up(
    row: Row, family: str, size: str, device: torch.device, start: str, folder: Path | None
) -> tuple[nn.Module, Any, dict[str, Any]]:
    """Build the model on the device, move it to where the row starts from, and enable the row."""
    for package in (FAMILIES[family][0], *row.packages):
        import_module(package)
    measure.settle(device)
    setup: dict[str, Any] = {
        "baseline_rss": measure.host_rss(),
        "baseline_available": measure.host_available(),
        "high_water_reset": measure.reset_host_high_water(),
    }
    begin = perf_counter()
    with torch.no_grad():
        model = build(family, size, device)
    measure.synchronize(device)
    setup["build_s"] = perf_counter() - begin
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    setup["weights_bytes"] = sum(t.numel() * t.element_size() for t in tensors)
    del tensors
    with measure.host_peak() as host_peak:
        begin = perf_counter()
        if row.offloads and (row.from_host or start == "host"):
            model.to("cpu")
            measure.settle(device)
        setup["to_host_s"] = perf_counter() - begin
        before = measure.reset_device_peaks(device)
        begin = perf_counter()
        handle = row.enable(model, device, folder) if row.on_disk else row.enable(model, device)
        measure.synchronize(device)
        setup["enable_s"] = perf_counter() - begin
    if isinstance(handle, peers.Enabled):
        setup["enable_s"] -= handle.prepared_s
        setup |= {"prepared_s": handle.prepared_s, "moved_bytes": handle.moved_bytes, "found": handle.found}
        handle = None
    setup["enable_peak_rss"] = host_peak[0]
    peak, _ = measure.device_peaks(device)
    setup["enable_device_growth"] = None if peak is None else peak - before
    measure.settle(device)
    return model, handle, setup


def _measure_case(
    row: Row,
    model: nn.Module,
    handle: Any,
    name: str,
    size: str,
    device: torch.device,
    first: bool,
    folder: Path | None,
) -> dict[str, Any]:
    case = CASES[size][name]
    output = None
    with torch.no_grad():
        forward = forward_of(model, case, size, device)

        def step() -> None:
            nonlocal output
            output = forward()

        step()
        hashes = [measure.digest(output)]
        for _ in range(_CALLS if row.plans else 0):
            with handle.calling():  # what was measured in one call counts in the next
                for _ in range(row.warm_ups):
                    step()
        for _ in range(1 if row.plans else row.warm_ups - 1 if first else 0):
            step()  # what leaves at the end of a call is back
        measure.reset_device_peaks(device)
        if handle is not None:
            handle.reset()
        count, rates, disk = min(case.forwards, row.at_most), [], None
        if row.on_disk:
            rates = [disk_rows.bare_rate(folder)]
            disk = disk_rows.settled(handle) if handle is not None else None
            if not row.cold and handle is None:
                step()  # the page cache is warm again
        if row.cold:
            times = disk_rows.cold_times(step, count, device, folder)
            wall = sum(times) / count
        else:
            times, wall = measure.step_times(step, count, device)
        now = disk_rows.settled(handle) if handle is not None and row.on_disk else None
        allocated, reserved = measure.device_peaks(device)
        hashes.append(measure.digest(output))
        result = {
            "tokens": case.tokens + case.text,
            "step_ms": median(times),
            "steps_ms": times,
            "step_wall_ms": wall,
            "peak_allocated": allocated,
            "peak_reserved": reserved,
            "hashes": hashes,
        }
        if row.on_disk:
            rates.append(disk_rows.bare_rate(folder))
            result["disk"] = disk_rows.told(folder, disk, now, times, rates)
        if handle is not None:
            result["ours"] = _of_ours(handle, forward, allocated, device)
    return result


def _of_ours(
    handle: Any, forward: Callable[[], Any], allocated: int | None, device: torch.device
) -> dict[str, Any]:
    """What only our handle knows: read after the timed forwards, then from two more."""
    report = handle.report()
    stem = sum(component.stem_bytes for component in handle.plan.components)
    parts = {"arena": report.arena_bytes, "stem": stem, "resident": report.resident_bytes}
    if allocated is not None:
        parts["activations"] = allocated - sum(parts.values())
    known = {
        "misses": report.misses,
        "write_backs": report.write_backs,
        "bytes_per_step": report.bytes_loaded / report.forwards,
        "device_parts": parts,
        "host_bytes": report.host_bytes,
        "pinned_bytes": report.pinned_bytes,
    }
    handle.reset()
    with handle.measured():
        forward()
        measured = handle.report()
    known |= {"transfer_ms": measured.transfer_ms, "stall_ms": measured.stall_ms, "hidden": measured.hidden}
    if measured.packed is not None:
        known["packed"] = asdict(measured.packed)
    known["hook_us"] = measure.hook_microseconds(forward, device)
    return known


def _host_memory(setup: dict[str, Any]) -> dict[str, int]:
    """Steady state and peak of the host, in bytes; the peak is the kernel's where it lets itself be reset."""
    peak = setup["enable_peak_rss"]
    if setup["high_water_reset"]:
        peak = max(peak, measure.host_high_water())
    return {
        "rss": measure.host_rss(),
        "peak_rss": peak,
        "available_drop": setup["baseline_available"] - measure.host_available(),
    }


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name} | {package: version(package) for package in ("torch", "diffusers", "accelerate")}


def _told(error: Exception) -> str:
    traceback.print_exc()
    return f"{type(error).__name__}: {error}".splitlines()[0][:160]

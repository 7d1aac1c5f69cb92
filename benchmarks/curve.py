"""Step time over `offload_ratio`, for pinned and for packed weights, beside the least that it could be. See README.md.

python benchmarks/curve.py --case flux-4096 --out benchmarks/results/curve-flux
python benchmarks/curve.py --case flux-4096 --size tiny --device cpu --out /tmp/curve

One model, whose weights lie on the device between the enablements. Writes OUT.json, OUT.md and a plot.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import measure
import torch
from models import CASES, build, forward_of
from tables import floor_ms

import diffusers_offload

GIB = 2**30
_CALLS, _FORWARDS = 2, 3  # in which a share that stays settles
HEADER = (
    "tier",
    "offload_ratio",
    "step ms",
    "/ least",
    "GiB a step",
    "peak GiB",
    "host GiB",
    "enable s",
    "exact",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--case", default="flux-4096", choices=tuple(CASES["full"]))
    parser.add_argument("--tiers", default="pinned,packed", help="with commas between")
    parser.add_argument(
        "--ratios", default="1,0.9,0.8,0.7,0.6,0.5,0.4,0.3,0.2,0.1,0", help="with commas between"
    )
    parser.add_argument("--granularity", default="block", choices=("block", "phase", "leaf"))
    parser.add_argument("--forwards", type=int, default=5, help="timed ones for each point")
    parser.add_argument("--size", default="full", choices=sorted(CASES), help="tiny: a test of this program")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", required=True, help="writes OUT.json, OUT.md, OUT.png and OUT.svg")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    case = CASES[arguments.size][arguments.case]
    begin = perf_counter()
    measure.start_up(device)
    with torch.no_grad():
        model = build(case.family, arguments.size, device)
        forward = forward_of(model, case, arguments.size, device)
        expected = measure.digest(forward())
        times, _ = measure.step_times(forward, arguments.forwards, device)
        results: dict[str, Any] = {
            "command": shlex.join(["python", "benchmarks/curve.py", *sys.argv[1:]]),
            "case": arguments.case,
            "environment": _environment(device),
            "rate_gbs": max(measure.h2d_rates(device).values(), default=None),
            "resident_ms": median(times),
            "points": [],
        }
        for tier in arguments.tiers.split(","):
            for ratio in map(float, arguments.ratios.split(",")):
                point = {"tier": tier, "ratio": ratio, "granularity": arguments.granularity}
                point |= _point(model, forward, point, arguments.forwards, device)
                point["exact"] = set(point.pop("hashes")) == {expected}
                results["points"].append(point)
                results["seconds"] = perf_counter() - begin
                print(_line(_cells(results, point)), file=sys.stderr, flush=True)
                _write(results, arguments.out)
    if find_spec("matplotlib") is not None:
        import plots

        plots.curve(results, Path(arguments.out))
    print(Path(f"{arguments.out}.md").read_text())


def _point(
    model: torch.nn.Module,
    forward: Callable[[], Any],
    point: dict[str, Any],
    count: int,
    device: torch.device,
) -> dict[str, Any]:
    measure.settle(device)
    begin = perf_counter()
    handle = diffusers_offload.enable_block_offload(
        model,
        device=device,
        offload_granularity=point["granularity"],
        offload_ratio=point["ratio"],
        tier=point["tier"],
    )
    measure.synchronize(device)
    seconds = perf_counter() - begin
    try:
        hashes = [measure.digest(forward())]
        for _ in range(_CALLS if 0 < point["ratio"] < 1 else 0):
            with handle.calling():  # what was timed in one call counts in the next
                for _ in range(_FORWARDS):
                    forward()
        forward()  # the order is known by now, and what leaves at the end of a call is back
        handle.reset()
        measure.settle(device)
        measure.reset_device_peaks(device)
        times, _ = measure.step_times(forward, count, device)
        peak, _ = measure.device_peaks(device)
        report = handle.report()
        hashes.append(measure.digest(forward()))
    finally:
        handle.disable()
    return {
        "step_ms": median(times),
        "steps_ms": times,
        "bytes_per_step": report.bytes_loaded / report.forwards,
        "misses": report.misses,
        "peak_allocated": peak,
        "host_bytes": report.host_bytes,
        "enable_s": seconds,
        "hashes": hashes,
    }


def _environment(device: torch.device) -> dict[str, str]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {"device": name} | {package: version(package) for package in ("torch", "diffusers")}


def _cells(results: dict[str, Any], point: dict[str, Any]) -> list[str]:
    least = floor_ms(point["bytes_per_step"], results["rate_gbs"], results["resident_ms"])
    peak = point["peak_allocated"]
    return [
        point["tier"],
        f"{point['ratio']:.2f}",
        f"{point['step_ms']:.1f}",
        f"{point['step_ms'] / least:.3f}",
        f"{point['bytes_per_step'] / GIB:.2f}",
        f"{peak / GIB:.2f}" if peak is not None else "n/a",
        f"{point['host_bytes'] / GIB:.2f}",
        f"{point['enable_s']:.1f}",
        str(point["exact"]),
    ]


def _write(results: dict[str, Any], out: str) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(results, indent=1) + "\n")
    about = f"{results['environment']['device']}, torch {results['environment']['torch']}; {results['case']}"
    rate = f", best H2D {results['rate_gbs']:.1f} GB/s" if results["rate_gbs"] else ""
    lines = [
        f"`{results['command']}`",
        "",
        f"{about}: resident {results['resident_ms']:.1f} ms{rate}; {results['seconds']:.0f} s in all.",
        "",
        _line(HEADER),
        _line(["---"] * len(HEADER)),
        *(_line(_cells(results, point)) for point in results["points"]),
    ]
    Path(f"{out}.md").write_text("\n".join(lines) + "\n")


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

"""How long enabling takes, and what it takes of host memory meanwhile: pinned and packed. See README.md.

python benchmarks/enabling.py --family flux --out benchmarks/results/enabling-flux
python benchmarks/enabling.py --family flux --size tiny --device cpu --out /tmp/enabling

Every run is a process of its own: it builds the model on the device (or moves it to the host first, with `host`),
enables, and samples its resident set every 5 ms meanwhile. The baseline is taken before the model is built.
"""

from __future__ import annotations

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import measure
import torch
from models import FAMILIES, build

GIB = 2**30
EVERY = 0.005  # seconds
HEADER = (
    "tier",
    "weights on the",
    "run",
    "enable s",
    "GB/s",
    "packed to",
    "host after",
    "host peak",
    "RAM taken",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--family", default="flux", choices=tuple(FAMILIES))
    parser.add_argument("--tiers", default="pinned,packed", help="with commas between")
    parser.add_argument("--starts", default="device,host", help="where the weights lie at first")
    parser.add_argument(
        "--repeats", type=int, default=2, help="the first may be the first to touch the memory"
    )
    parser.add_argument("--ratio", type=float, default=1.0)
    parser.add_argument(
        "--size", default="full", choices=("full", "tiny"), help="tiny: a test of this program"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", help="writes OUT.json and OUT.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # the process of one run: tier,start
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(_one(arguments, *arguments.one.split(","))))
        return
    runs = []
    for tier in arguments.tiers.split(","):
        for start in arguments.starts.split(","):
            for number in range(arguments.repeats):
                run = {"tier": tier, "start": start, "number": number + 1}
                run |= _in_its_own_process(tier, start)
                runs.append(run)
                print(_line(_cells(run)), file=sys.stderr, flush=True)
                text = _table(runs)
                if arguments.out:
                    Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
                    Path(f"{arguments.out}.json").write_text(json.dumps(runs, indent=1) + "\n")
                    Path(f"{arguments.out}.md").write_text(text)
    print(text)


def _in_its_own_process(tier: str, start: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, __file__, *sys.argv[1:], "--one", f"{tier},{start}"],
        stdout=subprocess.PIPE,
        timeout=300,
    )
    if done.returncode:
        return {"error": f"its process ended with {done.returncode}"}
    return json.loads(done.stdout.decode().splitlines()[-1])


def _one(arguments: argparse.Namespace, tier: str, start: str) -> dict[str, Any]:
    diffusers_offload = import_module("diffusers_offload")
    for module in (FAMILIES[arguments.family][0], "diffusers_offload.pipeline"):
        import_module(module)  # what they take is part of the baseline
    device = torch.device(arguments.device)
    measure.start_up(device)
    measure.settle(device)
    baseline, available = measure.host_rss(), measure.host_available()
    with torch.no_grad():
        model = build(arguments.family, arguments.size, device)
    tensors = {id(t): t for t in (*model.parameters(), *model.buffers())}.values()
    weights = sum(t.nbytes for t in tensors)
    del tensors
    if start == "host":
        model.to("cpu")
    measure.settle(device)
    reset = measure.reset_host_high_water()
    before = measure.reset_device_peaks(device)
    with samples() as series:
        begin = perf_counter()
        handle = diffusers_offload.enable_block_offload(
            model, device=device, offload_ratio=arguments.ratio, tier=tier
        )
        measure.synchronize(device)
        seconds = perf_counter() - begin
    peak = max(rss for _, rss in series)
    if reset:
        peak = max(peak, measure.host_high_water())
    device_peak, _ = measure.device_peaks(device)
    report = handle.report()
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
        "torch": version("torch"),
        "weights_bytes": weights,
        "enable_s": seconds,
        "packed_bytes": report.packed.packed_bytes if report.packed is not None else None,
        "raw_bytes": report.packed.raw_bytes if report.packed is not None else None,
        "host_bytes": report.host_bytes,
        "baseline_rss": baseline,
        "rss": measure.host_rss(),
        "peak_rss": peak,
        "available_drop": available - measure.host_available(),
        "device_growth": None if before is None else device_peak - before,
        "series": thinned(series),
    }


@contextmanager
def samples() -> Iterator[list[tuple[float, int]]]:
    """(seconds, bytes of this process in host memory), again and again until the block is left."""
    begin = perf_counter()
    found = [(0.0, measure.host_rss())]
    with measure.repeatedly(lambda: found.append((perf_counter() - begin, measure.host_rss())), EVERY):
        yield found


def thinned(series: list[tuple[float, int]], most: int = 200) -> list[tuple[float, int]]:
    """About so many samples, the largest of each stretch among them."""
    stretch = -(-len(series) // most)
    return [max(series[n : n + stretch], key=lambda each: each[1]) for n in range(0, len(series), stretch)]


def _cells(run: dict[str, Any]) -> list[str]:
    name = [run["tier"], run["start"], str(run["number"])]
    if "error" in run:
        return [*name, run["error"], *[""] * (len(HEADER) - 4)]
    weights = run["weights_bytes"]

    def share(nbytes: int) -> str:
        return f"{nbytes / GIB:.2f} GiB ({nbytes / weights:.3f}x)"

    return [
        *name,
        f"{run['enable_s']:.2f}",
        f"{weights / run['enable_s'] / 1e9:.1f}",
        f"{run['packed_bytes'] / run['raw_bytes']:.1%}" if run["raw_bytes"] else "n/a",
        share(run["rss"] - run["baseline_rss"]),
        share(run["peak_rss"] - run["baseline_rss"]),
        share(run["available_drop"]),
    ]


def _table(runs: list[dict[str, Any]]) -> str:
    first = next((run for run in runs if "error" not in run), {})
    about = f"{first.get('device', '?')}, torch {first.get('torch', '?')}"
    lines = [
        f"`{shlex.join(['python', 'benchmarks/enabling.py', *sys.argv[1:]])}`",
        "",
        f"{about}; weights {first.get('weights_bytes', 0) / GIB:.2f} GiB; host memory beyond the process' own, and as "
        "a multiple of the weights.",
        "",
        _line(HEADER),
        _line(["---"] * len(HEADER)),
        *(_line(_cells(run)) for run in runs),
    ]
    return "\n".join(lines) + "\n"


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

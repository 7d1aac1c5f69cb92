"""What the planner makes of cards of several sizes, against the best that a sweep of offload ratios finds.

python benchmarks/cards.py --family flux --out benchmarks/results/cards-flux

One model, its weights on the host; `set_per_process_memory_fraction` plays the card. For each card and case
the planner measures and chooses; then the same forward runs with evenly spread units kept, for each ratio of
which the units fit in what the planner had. Peaks are what the allocator reserved at most.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch
from measure import GIB, reset_device_peaks, step_times
from models import CASES, Case, build, forward_of

import diffusers_offload
from diffusers_offload.planning.budget import Choice, DeviceBudget
from diffusers_offload.planning.planner import choose_kept
from diffusers_offload.policy import OffloadPolicy

CARDS = (4, 8, 12, 16, 24)  # GB, as cards are sold: 10**9 bytes
PLANNED = {
    "flux": {"1024 px": Case("flux", (64, 64), 512, 4), "2048 px": Case("flux", (128, 128), 512, 3)},
    "wan": {"7,800 tokens": CASES["full"]["wan-7800"]},
}
HEADER = (
    *("card", "case", "units", "kept", "predicted ms", "measured ms", "off by"),
    *("best of sweep", "against it", "peak reserved", "bound"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--family", choices=tuple(PLANNED), required=True)
    parser.add_argument("--cards", default=",".join(map(str, CARDS)), help="GB, with commas between")
    parser.add_argument("--out", required=True, help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    device = torch.device("cuda", 0)
    total = torch.cuda.get_device_properties(device).total_memory
    with torch.no_grad():
        model = build(arguments.family, "full", device)
        handle = diffusers_offload.enable_block_offload(model, device=device, offload_ratio=1.0)
        gc.collect()
        torch.cuda.empty_cache()
        rows = []
        for size in map(float, arguments.cards.split(",")):
            for name, case in PLANNED[arguments.family].items():
                torch.cuda.set_per_process_memory_fraction(size * 1e9 / total)
                row = {"card_gb": size, "case": name} | _one(model, handle, case, device)
                rows.append(row)
                print(_line(_cells(row)), file=sys.stderr, flush=True)
                _write(arguments.out, rows)
    print(Path(f"{arguments.out}.md").read_text())


def _one(model: torch.nn.Module, handle: Any, case: Case, device: torch.device) -> dict[str, Any]:
    forward = forward_of(model, case, "full", device)
    engine = handle._engine
    held = next(iter(handle.holds.values()))
    if held.target.policy.granularity != "block":  # the card before had too little memory for blocks
        held.target = replace(held.target, policy=OffloadPolicy("block"))
        held.renew()
    held.target = replace(held.target, flexible=True)
    limit = engine.streams.available()
    engine.keeping.budget = DeviceBudget(limit, engine.streams)
    engine.keeping.follow(held.component, Choice())
    gc.collect()
    torch.cuda.empty_cache()
    reset_device_peaks(device)
    try:
        begin = perf_counter()
        for _ in range(6):
            forward()
        torch.cuda.synchronize()
        settled = perf_counter() - begin
        milliseconds, _ = step_times(forward, case.forwards, device)
    except torch.OutOfMemoryError as error:
        return {"error": str(error).splitlines()[0][:100]}
    component = held.component
    prediction = engine.budget.predict(component)
    report = handle.report()
    result = {
        "limit": limit,
        "granularity": held.target.policy.granularity,
        "kept": component.kept_bytes,
        "slack": engine.homes.slack,
        "predicted_ms": prediction.seconds * 1e3 if prediction is not None else None,
        "predicted_peak": prediction.peak_bytes if prediction is not None else None,
        "measured_ms": median(milliseconds),
        "steps_ms": milliseconds,
        "settling_s": settled,
        "shortages": report.shortages,
        "peak_reserved": torch.cuda.max_memory_reserved(device),
        "sweep": [],
    }
    room = component.kept_bytes + engine.homes.slack
    total = sum(unit.nbytes for unit in component.streamed)
    engine.keeping.follow(component, Choice())
    engine.keeping.budget = None
    ratios = sorted({1.0, *(r / 20 for r in range(20) if total * (1 - r / 20) <= room * 1.02)})[:3]
    for ratio in {max(0.0, 1 - room / total), *ratios}:
        kept = choose_kept([unit.nbytes for unit in component.streamed], int(total * (1 - ratio)))
        engine.keeping.follow(component, Choice(frozenset(component.streamed[i] for i in kept)))
        handle.reset()
        for _ in range(2):
            forward()
        milliseconds, _ = step_times(forward, max(2, case.forwards - 1), device)
        if handle.report().shortages:  # it did not fit, and ran with less
            continue
        result["sweep"].append({"ratio": ratio, "step_ms": median(milliseconds)})
    handle.reset()
    return result


def _cells(row: dict[str, Any]) -> list[str]:
    if "error" in row:
        return [f"{row['card_gb']:g} GB", row["case"], row["error"], *[""] * (len(HEADER) - 3)]
    best = min((each["step_ms"] for each in row["sweep"]), default=None)
    predicted, measured = row["predicted_ms"], row["measured_ms"]
    return [
        f"{row['card_gb']:g} GB",
        row["case"],
        row["granularity"],
        f"{row['kept'] / GIB:.2f} GiB + {row['slack'] / GIB:.2f} of arena",
        f"{predicted:.1f}" if predicted else "n/a",
        f"{measured:.1f}",
        f"{predicted / measured - 1:+.1%}" if predicted else "n/a",
        f"{best:.1f}" if best else "n/a",
        f"{measured / best - 1:+.1%}" if best else "n/a",
        f"{row['peak_reserved'] / GIB:.2f} GiB",
        f"{row['limit'] / GIB:.2f} GiB" + (f", {row['shortages']} shortages" if row["shortages"] else ""),
    ]


def _write(out: str, rows: list[dict[str, Any]]) -> None:
    Path(out).parent.mkdir(parents=True, exist_ok=True)
    Path(f"{out}.json").write_text(json.dumps(rows, indent=1) + "\n")
    command = " ".join(["python benchmarks/cards.py", *sys.argv[1:]])
    machine = f"{torch.cuda.get_device_name()}, torch {torch.__version__}"
    head = [f"`{command}`", "", machine, "", _line(HEADER), _line(["---"] * len(HEADER))]
    lines = [*head, *(_line(_cells(row)) for row in rows)]
    Path(f"{out}.md").write_text("\n".join(lines) + "\n")


def _line(cells: Any) -> str:
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()

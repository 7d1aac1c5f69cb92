"""A transformer's forward under each way of offloading it: time, memory, exactness. See README.md.

python benchmarks/transformer_forward.py --case flux-4096
python benchmarks/transformer_forward.py --case all --out benchmarks/results/transformer_forward
python benchmarks/transformer_forward.py --case flux-4096,wan-7800 --rows resident,ours --size tiny
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from models import CASES
from rows import ROWS, run_row
from tables import render

HERE = Path(__file__).resolve().parent


def main() -> None:
    arguments = _parse()
    if arguments.row:
        device = torch.device(arguments.device)
        run_row(arguments.row, arguments.case, arguments.size, device, arguments.start, arguments.offload_dir)
        return
    command = shlex.join(["python", "benchmarks/transformer_forward.py", *sys.argv[1:]])
    results = measure_rows(arguments.case, arguments.rows, arguments, Path(arguments.out), command)
    print(render(results))


def measure_rows(
    chosen: Sequence[str], rows: Sequence[str], arguments: argparse.Namespace, out: Path, command: str
) -> dict[str, Any]:
    """Every row on every case, each in its own process; OUT.json and OUT.md are written after each.

    Args:
        chosen: cases.
        arguments: `size`, `start`, `device`, `offload_dir` and `timeout`, as `add_options` parses them.
        command: as the table shows it.
    """
    out = out.with_suffix("") if out.suffix in (".json", ".md") else out
    out.parent.mkdir(parents=True, exist_ok=True)
    begin = perf_counter()
    results: dict[str, Any] = {
        "command": command,
        "size": arguments.size,
        "start": arguments.start,
        "seconds": 0.0,
        "rows": [],
    }
    families: dict[str, list[str]] = {}
    for case in chosen:
        families.setdefault(CASES[arguments.size][case].family, []).append(case)
    for cases in families.values():
        for row in rows:
            print(f"[{perf_counter() - begin:5.0f} s] {row}: {', '.join(cases)}", file=sys.stderr, flush=True)
            if ROWS[row].needs_streams and torch.device(arguments.device).type == "cpu":
                result = {"row": row, "settings": ROWS[row].settings, "cases": {}}
                result["error"] = "skipped: needs device streams"
            else:
                result = _in_its_own_process(row, cases, arguments)
            results["rows"].append(result | {"wanted": cases})
            _tell(results["rows"][-1])
            results["seconds"] = perf_counter() - begin
            write(results, out)
    return results


def write(results: dict[str, Any], out: Path) -> None:
    Path(f"{out}.json").write_text(json.dumps(results, indent=1) + "\n")
    Path(f"{out}.md").write_text(render(results))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument(
        "--case", default="all", type=names(CASES["full"]), help="cases with commas between, or all"
    )
    parser.add_argument("--rows", default="all", type=names(ROWS), help="rows with commas between, or all")
    add_options(parser)
    parser.add_argument(
        "--out", default=str(HERE / "results" / "transformer_forward"), help="writes OUT.json and OUT.md"
    )
    parser.add_argument("--row", choices=tuple(ROWS), help=argparse.SUPPRESS)  # the process of one row
    return parser.parse_args()


def add_options(parser: argparse.ArgumentParser) -> None:
    """What every program that runs rows asks for."""
    parser.add_argument(
        "--size",
        default="full",
        choices=sorted(CASES),
        help="quarter: of the blocks; tiny: a test of this program",
    )
    parser.add_argument(
        "--start",
        default="device",
        choices=("device", "host"),
        help="where the weights lie before offloading is enabled; host: as after from_pretrained (slower)",
    )
    parser.add_argument(
        "--offload-dir",
        help="folder on the disk that the rows with weights on disk measure; else a temporary one",
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--timeout", type=float, default=300, help="seconds for one row's process")


def names(known: Sequence[str]) -> Any:
    """A parser of names with commas between, or "all"."""

    def parse(text: str) -> list[str]:
        chosen = list(known) if text == "all" else text.split(",")
        for name in chosen:
            if name not in known:
                raise argparse.ArgumentTypeError(f"{name!r} is none of {', '.join(known)}, all")
        return chosen

    return parse


def _in_its_own_process(row: str, cases: Sequence[str], arguments: argparse.Namespace) -> dict[str, Any]:
    """What the row's process printed last; its progress and its errors go to stderr."""
    command = [sys.executable, __file__, "--row", row, "--case", ",".join(cases)]
    for option in ("size", "start", "device"):
        command += [f"--{option}", getattr(arguments, option)]
    if arguments.offload_dir is not None:
        command += ["--offload-dir", arguments.offload_dir]
    path = os.pathsep.join(filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")]))
    environment = {"DIFFUSERS_VERBOSITY": "error"} | os.environ | {"PYTHONPATH": path}
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, env=environment, timeout=arguments.timeout)
        printed, how = done.stdout, f"its process ended with {done.returncode}"
    except subprocess.TimeoutExpired as expired:
        printed, how = expired.stdout or b"", f"stopped after {arguments.timeout:.0f} s"
    result: dict[str, Any] = {"row": row, "settings": ROWS[row].settings, "cases": {}}
    for line in printed.decode().splitlines():
        try:
            found = json.loads(line)
        except ValueError:
            continue
        if isinstance(found, dict) and found.get("row") == row:  # packages print, too
            result = found
    if "error" not in result:
        for case in cases:
            result["cases"].setdefault(case, {"error": how})
    return result


def _tell(result: dict[str, Any]) -> None:
    """One line per case on stderr."""
    for case in result["wanted"]:
        measured = result["cases"].get(case) or {"error": result.get("error")}
        said = measured.get("error") or f"{measured['step_ms']:.1f} ms, median of {len(measured['steps_ms'])}"
        print(f"          {case}: {said}", file=sys.stderr, flush=True)
    rates = [rate for rates in result.get("h2d", ()) for rate in rates.values()]
    if rates:
        print(f"          H2D {min(rates):.1f} to {max(rates):.1f} GB/s", file=sys.stderr, flush=True)


if __name__ == "__main__":
    main()

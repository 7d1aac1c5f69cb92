"""This package beside the others that stream weights: one table and one plot a case. See README.md.

python benchmarks/side_by_side.py --out benchmarks/results/side-by-side
python benchmarks/side_by_side.py --models flux --parts ours --out benchmarks/results/side-by-side
python benchmarks/side_by_side.py --parts none --out benchmarks/results/side-by-side

Runs in parts, each with a resident row of its own: OUT-flux-ours.json and so on. What parts there are is put together
after each: OUT-flux.json, OUT-flux.md, and a plot of step time against peak memory for each case.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from models import CASES
from transformer_forward import HERE, add_options, measure_rows, names, write

PARTS = {
    "ours": (
        *("resident", "ours", "ours-phase", "ours-leaf", "ours-half", "ours-planned"),
        *("packed", "packed-phase", "packed-leaf", "packed-half"),
    ),
    "diffusers": (
        *("resident", "diffusers-block", "diffusers-block-waits", "diffusers-leaf"),
        *("diffusers-mm", "diffusers-mm-half"),
    ),
    "peers": ("resident", "cache-dit", "cache-dit-window", "mmgp", "dfloat11"),
}
MODELS = ("flux", "wan")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--models", default="all", type=names(MODELS), help="with commas between, or all")
    parser.add_argument(
        "--parts",
        default="all",
        type=lambda text: [] if text == "none" else names(tuple(PARTS))(text),
        help="with commas between, or all; none: only put together what is there",
    )
    parser.add_argument("--rows", help="only these of the parts' rows, with commas between")
    parser.add_argument("--no-plots", action="store_true", help="tables alone")
    add_options(parser)
    parser.add_argument("--out", default=str(HERE / "results" / "side-by-side"), help="how all files begin")
    arguments = parser.parse_args()
    for model in arguments.models:
        cases = [name for name, case in CASES[arguments.size].items() if case.family == model]
        for part in arguments.parts:
            rows = [row for row in PARTS[part] if not arguments.rows or row in arguments.rows.split(",")]
            command = shlex.join(["python", "benchmarks/side_by_side.py", *sys.argv[1:]])
            measure_rows(cases, rows, arguments, Path(f"{arguments.out}-{model}-{part}"), command)
            combine(arguments.out, model, not arguments.no_plots)
        if not arguments.parts:
            combine(arguments.out, model, not arguments.no_plots)
        print(Path(f"{arguments.out}-{model}.md").read_text())


def combine(out: str, model: str, plotted: bool = True) -> None:
    """One table and its plots from the parts that there are."""
    files = [Path(f"{out}-{model}-{part}.json") for part in PARTS]
    results = together([json.loads(file.read_text()) for file in files if file.exists()])
    write(results, Path(f"{out}-{model}"))
    if not plotted or find_spec("matplotlib") is None:
        print("no plots" + ("" if not plotted else ": matplotlib is not there"), file=sys.stderr)
        return
    import plots

    for case in dict.fromkeys(case for row in results["rows"] for case in row["wanted"]):
        plots.memory_and_time(results, case, Path(f"{out}-{model}-{case}"))


def together(parts: list[dict[str, Any]]) -> dict[str, Any]:
    """The parts' rows in one, of those that are there more than once the first that has a result."""
    if not parts:
        raise SystemExit("no part has been measured yet")
    rows: dict[str, dict[str, Any]] = {}
    for row in (row for part in parts for row in part["rows"]):
        before = rows.get(row["row"])
        if before is None or (_failed(before) and not _failed(row)):
            rows[row["row"]] = row
    commands = dict.fromkeys(part["command"] for part in parts)
    return {
        "command": "`, `".join(commands),
        "size": parts[0]["size"],
        "start": parts[0]["start"],
        "seconds": sum(part["seconds"] for part in parts),
        "rows": list(rows.values()),
    }


def _failed(row: dict[str, Any]) -> bool:
    return not any("step_ms" in case for case in row.get("cases", {}).values())


if __name__ == "__main__":
    main()

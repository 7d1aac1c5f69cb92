"""From the rows' results to Markdown: one table a case, and a line on each row of ours."""

from __future__ import annotations

from statistics import median
from typing import Any

GIB = 2**30
NONE = "n/a"
HEADER = (
    "row",
    "step ms",
    "/ floor",
    "/ all weights",
    "H2D GB/s",
    "device GiB, peak (reserved)",
    "enable: device, s",
    "host GiB (of weights)",
    "host peak",
    "exact",
)


def render(results: dict[str, Any]) -> str:
    """All tables, as short as they can be: the end of a log may be all that is kept."""
    rows = results["rows"]
    environment = next((row["environment"] for row in rows if "environment" in row), {})
    about = ", ".join(
        [environment.get("device", "?"), *(f"{k} {v}" for k, v in environment.items() if k != "device")]
    )
    parts = [
        f"`{results['command']}`\n",
        f"{about}; size {results['size']}, weights start on the {results['start']}; "
        f"{results['seconds']:.0f} s in all.\n",
    ]
    cases = list(dict.fromkeys(case for row in rows for case in row["wanted"]))
    for case in cases:
        parts.append(_table(case, [row for row in rows if case in row["wanted"]]))
    return "\n".join(parts)


def floor_ms(moved_bytes: float, rate: float | None, resident_ms: float | None) -> float | None:
    """The least a step can take: computing all of it, or moving these bytes, whichever is longer."""
    transfer = moved_bytes / rate / 1e6 if rate else None
    known = [value for value in (transfer, resident_ms) if value is not None]
    return max(known) if known else None


def _table(case: str, rows: list[dict[str, Any]]) -> str:
    rate = max((_best_rate(row) or 0.0 for row in rows), default=0.0) or None
    reference = next((row for row in rows if row["row"] == "resident"), {})
    resident = reference.get("cases", {}).get(case, {})
    first = next((row for row in rows if "step_ms" in row.get("cases", {}).get(case, {})), None)
    title = f"### {case}"
    if first is not None:
        weights = first["setup"]["weights_bytes"]
        title += f": weights {_gib(weights)} GiB, {first['cases'][case]['tokens']} tokens"
        transfer = floor_ms(weights, rate, None)
        if transfer:
            title += f"; best H2D {rate:.1f} GB/s, so all weights take {transfer:.0f} ms"
    lines = [title, "", _line(HEADER), _line(["---"] * len(HEADER))]
    notes = []
    for row in rows:
        measured = row.get("cases", {}).get(case) or {"error": row.get("error", "no result")}
        if "error" in measured:
            lines.append(_line([row["row"], measured["error"].replace("|", "/"), *[""] * (len(HEADER) - 2)]))
            continue
        lines.append(_line(_cells(row, measured, resident, rate)))
        notes += _notes(row, measured)
    notes += [note for row in rows for note in _settings(row)]
    return "\n".join([*lines, "", *notes, ""])


def _cells(
    row: dict[str, Any], measured: dict[str, Any], resident: dict[str, Any], rate: float | None
) -> list[str]:
    setup = row["setup"]
    weights = setup["weights_bytes"]
    moved = moved_bytes(row, measured)
    everything = floor_ms(weights, rate, None) if moved else None
    floor = floor_ms(moved, rate, resident.get("step_ms"))
    best = _best_rate(row)
    exact = NONE
    if "hashes" in resident:
        exact = str(set(measured["hashes"]) == {resident["hashes"][0]})

    def host(nbytes: int) -> str:
        return f"{_gib(nbytes)} ({(nbytes - setup['baseline_rss']) / weights:.2f}x)"

    growth = setup["enable_device_growth"]
    return [
        row["row"],
        f"{measured['step_ms']:.1f}",
        f"{measured['step_ms'] / floor:.3f}" if floor else NONE,
        f"{measured['step_ms'] / everything:.3f}" if everything else NONE,
        f"{best:.1f}" if best else NONE,
        f"{_gib(measured['peak_allocated'])} ({_gib(measured['peak_reserved'])})",
        f"{'' if growth is None else '+'}{_gib(growth)}, {setup['enable_s']:.1f}",
        host(measured["rss"]),
        host(measured["peak_rss"]),
        exact,
    ]


def moved_bytes(row: dict[str, Any], measured: dict[str, Any]) -> float:
    """That cross the bus in a step: as counted, as the row tells of itself, or all weights."""
    if row["row"] == "resident":
        return 0
    if "ours" in measured:
        return measured["ours"]["bytes_per_step"]
    return row["setup"].get("moved_bytes", row["setup"]["weights_bytes"])


def _settings(row: dict[str, Any]) -> list[str]:
    """What was asked for, and what a peer tells of itself."""
    told = [row["settings"]] if row.get("settings") else []
    setup = row.get("setup", {})
    if "found" in setup:
        told += [setup["found"], f"{_gib(setup['moved_bytes'])} GiB a step"]
    if setup.get("prepared_s"):
        told.append(f"{setup['prepared_s']:.0f} s of preparing are not in the seconds of enabling")
    return [f"- {row['row']}: {'; '.join(told)}"] if told else []


def _notes(row: dict[str, Any], measured: dict[str, Any]) -> list[str]:
    notes = []
    ours = measured.get("ours")
    if ours is not None:
        parts = " + ".join(f"{name} {_gib(nbytes)}" for name, nbytes in ours["device_parts"].items())
        hidden = f"{ours['hidden']:.1%}" if ours["hidden"] is not None else NONE
        hooks = f"{median(ours['hook_us']):.0f} us" if ours["hook_us"] else NONE
        notes.append(
            f"- {row['row']}: {ours['misses']} misses after warm-up, "
            + f"{_gib(ours['bytes_per_step'])} GiB a step, {hidden} of the transfer hidden, "
            + f"host {hooks} per pair of hooks; device GiB: {parts}; "
            + f"host GiB: {_gib(ours['host_bytes'])} ({_gib(ours['pinned_bytes'])} pinned)"
        )
        packed = ours.get("packed")
        if packed is not None and packed["raw_bytes"]:
            notes[-1] += f"; packed to {packed['packed_bytes'] / packed['raw_bytes']:.1%}"
            notes[-1] += f", unpacking {packed['unpack_ms']:.0f} ms a step" if packed["unpack_ms"] else ""
    disk = measured.get("disk")
    if disk is not None:
        bare = median(disk["bare_rates"]) / 1e9
        rate = disk.get("read_rate")
        share = disk["step_to_bare"]
        notes.append(
            f"- {row['row']}: {disk['bytes_per_step'] / 1e9:.2f} GB of {disk['files_bytes'] / 1e9:.2f} read a step, "
            + f"{disk['step_rate'] / 1e9:.2f} GB/s over the step"
            + (f", {rate / 1e9:.2f} while reading ({rate / 1e9 / bare:.3f} of bare)" if rate else "")
            + f"; bare O_DIRECT {bare:.2f}; step / (bytes / bare) "
            + (f"{share:.3f}" if share else NONE)
            + (f"; {disk['hits']} hits, {disk['misses']} misses" if "hits" in disk else "")
        )
    weights = row["setup"]["weights_bytes"]
    grown = measured["rss"] - row["setup"]["baseline_rss"]
    if measured["available_drop"] - grown > 0.1 * weights > 64 * 2**20:
        notes.append(
            f"- {row['row']}: its process grew by {_gib(grown)} GiB, but the system's available memory "
            f"fell by {_gib(measured['available_drop'])} GiB: pinned memory that its size does not show"
        )
    return notes


def _best_rate(row: dict[str, Any]) -> float | None:
    return max((rate for rates in row.get("h2d", ()) for rate in rates.values()), default=None)


def _line(cells: list[str] | tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"


def _gib(nbytes: float | None) -> str:
    if nbytes is None:
        return NONE
    return f"{nbytes / GIB:.2f}" if abs(nbytes) >= GIB / 10 else f"{nbytes / GIB:.3f}"

"""Steps of two guidance passes, resident, streamed one by one, and streamed together: time, bytes, exactness.

python benchmarks/guidance_passes.py --case wan-7800
python benchmarks/guidance_passes.py --case flux-1024,wan-7800 --steps 12
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from measure import digest, step_times, synchronize
from models import CASES, build, forward_of

import diffusers_offload
from diffusers_offload.streams import find_device

ROWS: dict[str, tuple[bool | None, str]] = {  # pair_passes, tier
    "one by one": (False, "pinned"),
    "together": (True, "pinned"),
    "automatic": (None, "pinned"),
    "one by one, packed": (False, "packed"),
    "together, packed": (True, "packed"),
}
_WARM_UP = 5  # steps: the order, the rehearsal, homes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--case", default="wan-7800", help="of benchmarks/models.py, with commas between")
    parser.add_argument("--size", default="full", choices=("full", "tiny"))
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--granularity", default="block")
    parser.add_argument("--max-device-memory", help="a bound, such as 8GiB; without it everything streams")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    device = find_device(arguments.device)
    print("| case | row | step ms | of one by one | GB a step | of one by one | peak GiB | bits |")
    print("|---|---|---|---|---|---|---|---|")
    for name in arguments.case.split(","):
        case = CASES[arguments.size][name]
        model = build(case.family, arguments.size, device)
        with torch.no_grad():
            resident = _measure(model, case, arguments, device, None)
            model.to("cpu")
            rows = {"resident": resident}
            for row, (pair_passes, tier) in ROWS.items():
                bound = arguments.max_device_memory
                handle = diffusers_offload.enable_block_offload(
                    model,
                    device=device,
                    offload_granularity=arguments.granularity,
                    **({"max_device_memory": bound} if bound else {"offload_ratio": 1.0}),
                    pair_passes=pair_passes,
                    tier=tier,
                )
                with handle.calling():
                    rows[row] = _measure(model, case, arguments, device, handle)
                if handle.report().unpaired:
                    print(f"<!-- {row}: {dict(handle.report().unpaired)} -->")
                handle.disable()
        alone = rows["one by one"]
        for row, (ms, nbytes, peak, bits) in rows.items():
            cells = [f"{ms:.1f}", f"{ms / alone[0]:.3f}", f"{nbytes / 1e9:.3f}", f"{nbytes / alone[1]:.3f}"]
            same = "equal" if bits == resident[3] else "DIFFERENT"
            print(f"| {name} | {row} | {' | '.join(cells)} | {peak / 2**30:.2f} | {same} |", flush=True)


def _measure(
    model: torch.nn.Module, case: Any, arguments: argparse.Namespace, device: torch.device, handle: Any
) -> tuple[float, float, int, str]:
    """(milliseconds a step, bytes a step, peak bytes, a hash of the last latents)."""
    step, latents = _denoiser(model, case, arguments.size, device)
    for _ in range(_WARM_UP):
        step()
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    before = handle.report().bytes_loaded if handle is not None else 0
    times, _ = step_times(step, arguments.steps, device)
    after = handle.report().bytes_loaded if handle is not None else 0
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0
    return sum(times) / len(times), (after - before) / arguments.steps, peak, digest(latents())


def _denoiser(
    model: torch.nn.Module, case: Any, size: str, device: torch.device
) -> tuple[Callable[[], None], Callable[[], torch.Tensor]]:
    """A step as pipelines do it: two calls with the same latents and time, for one prompt and another."""
    given: partial = forward_of(model, case, size, device).__closure__[0].cell_contents
    inputs = dict(given.keywords)
    prompts = [inputs["encoder_hidden_states"], inputs["encoder_hidden_states"] * -0.5]
    state = {"latents": inputs["hidden_states"], "number": 0}

    def step() -> None:
        state["number"] += 1
        now = {**inputs, "hidden_states": state["latents"], "timestep": inputs["timestep"] / state["number"]}
        cond, uncond = (model(**{**now, "encoder_hidden_states": prompt})[0] for prompt in prompts)
        state["latents"] = state["latents"] - 0.1 * (uncond + 4.0 * (cond - uncond)).to(
            state["latents"].dtype
        )

    return step, lambda: state["latents"]


if __name__ == "__main__":
    main()

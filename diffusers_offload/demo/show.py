"""The demo: one pipeline resident, then offloaded; outputs compared to the bit, numbers side by side."""

from __future__ import annotations

import gc
import inspect
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import diffusers_offload  # noqa: F401  gives pipelines their method

from ..report import Report, size_text, table
from ..streams import find_device
from ..units import tensors_of
from .memory import MemorySampler, Sample
from .pipelines import build, call_kwargs, output, save_preview

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline

    from ..handle import OffloadHandle
    from ..planning.planner import Plan

NONE = "-"


@dataclass(frozen=True)
class Run:
    """One measured call.

    Attributes:
        images: what `output` gives: float32 on the CPU.
        step_ms: milliseconds of a denoising step; the median, without the first.
        call_s: seconds of the whole call, with text encoders and decoding.
        peak_bytes: most bytes of tensors on the device; None on the CPU.
        memory: memory over time.
        report: of the call alone; None without offloading.
        step_bytes: bytes that a denoising step moves to the device.
        by_step: False where the pipeline does not tell when a step ends, or took only one: then a step's
            numbers are the call's, divided by the steps.
    """

    images: torch.Tensor
    step_ms: float
    call_s: float
    peak_bytes: int | None
    memory: list[Sample]
    report: Report | None = None
    step_bytes: float = 0.0
    by_step: bool = True


def show(
    name: str = "flux",
    size: str = "tiny",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    steps: int | None = None,
    offload_ratio: float | None = None,
    output_dir: str | Path = "demo-output",
) -> int:
    """Run the demo, printing what it does and finds.

    Args:
        name, size: which pipeline, as for `build`.
        device: where to compute; found by itself if None.
        dtype: of the weights; None is bfloat16 on an accelerator, float32 on the CPU.
        steps: denoising steps; None is the few that `call_kwargs` has.
        offload_ratio: as for `enable_block_offload`.
        output_dir: takes `<name>.png` and `<name>-memory.png`; made if need be.

    Returns:
        The exit code: 0, or 1 if the offloaded output differs from the resident one.

    Raises:
        KeyError: unknown name or size.
        RuntimeError: the device is not there.
    """
    device = find_device(device)
    dtype = dtype or (torch.float32 if device.type == "cpu" else torch.bfloat16)
    kwargs = call_kwargs(name, size)
    kwargs["num_inference_steps"] = steps or kwargs["num_inference_steps"]
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)

    with deterministic(device):
        pipe, resident = _run_resident(name, size, dtype, device, kwargs)
        weights = weight_bytes(pipe)
        _say("Enabling block offload")
        begin = time.perf_counter()
        ratio = (
            1.0 if offload_ratio is None else offload_ratio
        )  # a demo of offloading, even where all would fit
        pipe.enable_block_offload(device=device, offload_ratio=ratio)
        handle, seconds = pipe.block_offload, time.perf_counter() - begin
        plan = handle.plan
        _say(f"Enabled in {seconds:.1f} s; the plan:\n\n{plan}\n")
        _say("Running it offloaded: one call to warm up, then the measured one")
        try:
            offloaded = measure(pipe, kwargs, device, handle)
        finally:
            pipe.disable_block_offload()

    equal = None if resident is None else same_bits(resident.images, offloaded.images)
    _say(f"\n{table(('', 'resident', 'offloaded'), rows(resident, offloaded, plan, weights, equal))}\n")
    if device.type == "cpu":
        _say("On the CPU copies are done inline, so there is no transfer that computing could hide.")
    if not offloaded.by_step:
        _say("The ends of single steps were not seen: a step is the whole call divided by the steps.")
    _save(name, resident, offloaded, plan, folder)
    if equal is False:
        print(f"error: {_difference(resident.images, offloaded.images)}", file=sys.stderr)
        return 1
    return 0


def measure(
    pipe: DiffusionPipeline, kwargs: dict[str, Any], device: torch.device, handle: OffloadHandle | None = None
) -> Run:
    """Call `pipe` twice, measuring the second call.

    Args:
        handle: of the block offload, if there is one.

    Raises:
        torch.OutOfMemoryError: the device's memory does not suffice.
    """
    steps = kwargs["num_inference_steps"]
    moved: list[int] = []
    # Bytes are counted in the first call: while copies are timed, asking for the report waits for the device.
    _call(pipe, kwargs, lambda: moved.append(handle.report().bytes_loaded) if handle else None)
    if handle is not None:
        handle.reset()
    clock = StepClock(device)
    module = torch.get_device_module(device)
    module.synchronize(device)
    if device.type != "cpu":
        module.reset_peak_memory_stats(device)
    with MemorySampler(device) as memory, handle.measured() if handle else nullcontext():
        begin = time.perf_counter()
        images = _call(pipe, kwargs, clock.mark)  # waits for the device: the images come to the host
        seconds = time.perf_counter() - begin
    report = handle.report() if handle else None
    durations = clock.durations()
    growth = [after - before for before, after in pairwise(moved)]
    return Run(
        images=images,
        step_ms=statistics.median(durations) if durations else 1000 * seconds / steps,
        call_s=seconds,
        peak_bytes=None if device.type == "cpu" else module.max_memory_allocated(device),
        memory=memory.samples,
        report=report,
        step_bytes=statistics.median(growth) if growth else (report.bytes_loaded / steps if report else 0.0),
        by_step=bool(durations),
    )


class StepClock:
    """Times denoising steps from one's end to the next one's.

    On an accelerator the marks are events on the stream that the pipeline uses, so the host need not wait and
    copies for the next step overlap as they do without a clock.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._marks: list[Any] = []

    def mark(self) -> None:
        """A step has ended, or on an accelerator been queued."""
        if self._device.type == "cpu":
            self._marks.append(time.perf_counter())
            return
        module = torch.get_device_module(self._device)
        event = module.Event(enable_timing=True)
        event.record(module.current_stream(self._device))
        self._marks.append(event)

    def durations(self) -> list[float]:
        """Milliseconds of every step but the first; waits for the device."""
        pairs = list(pairwise(self._marks))
        if self._device.type == "cpu":
            return [1000 * (end - begin) for begin, end in pairs]
        torch.get_device_module(self._device).synchronize(self._device)
        return [begin.elapsed_time(end) for begin, end in pairs]


@contextmanager
def deterministic(device: torch.device) -> Iterator[None]:
    """Let torch use deterministic kernels only, where `device` has them, inside the block.

    CUDA also needs `CUBLAS_WORKSPACE_CONFIG=:4096:8` in the environment before it is first used.
    """
    before = (
        torch.are_deterministic_algorithms_enabled(),
        torch.is_deterministic_algorithms_warn_only_enabled(),
    )
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=device.type != "cpu")
    torch.utils.deterministic.fill_uninitialized_memory = False  # it would cost time in what is measured
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        torch.utils.deterministic.fill_uninitialized_memory = fill


def same_bits(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two float32 tensors are equal, their zeros' signs included; nothing equals NaN."""
    return torch.equal(one, other) and torch.equal(one.view(torch.int32), other.view(torch.int32))


def weight_bytes(pipe: DiffusionPipeline) -> int:
    """Bytes of all parameters and buffers, each tensor once."""
    models = (part for part in pipe.components.values() if isinstance(part, nn.Module))
    tensors = {id(tensor): tensor for model in models for tensor in tensors_of(model)}
    return sum(tensor.nbytes for tensor in tensors.values())


def rows(
    resident: Run | None, offloaded: Run, plan: Plan, weights: int, equal: bool | None
) -> list[tuple[str, str, str]]:
    """What the two runs came to; `resident` is None where it did not fit.

    Args:
        weights: bytes of the pipeline's weights.
        equal: None where there was nothing to compare.
    """
    report = offloaded.report
    on_cpu = offloaded.peak_bytes is None

    def both(label: str, text: Callable[[Run], str]) -> tuple[str, str, str]:
        return label, NONE if resident is None else text(resident), text(offloaded)

    hidden = "n/a" if report.hidden is None else f"{report.hidden:.1%}"
    return [
        both("denoising step", lambda run: f"{run.step_ms:.1f} ms"),
        both("whole call", lambda run: f"{run.call_s:.2f} s"),
        both("peak device memory", lambda run: "n/a" if on_cpu else size_text(run.peak_bytes)),
        ("weights on the device, at most", size_text(weights), size_text(plan.device_bytes)),
        ("host memory that holds weights", size_text(weights if on_cpu else 0), size_text(report.host_bytes)),
        ("moved per step", NONE, size_text(offloaded.step_bytes)),
        ("moved in the call", NONE, size_text(report.bytes_loaded)),
        ("misses", NONE, str(report.misses)),
        ("share of the transfer hidden", NONE, hidden),
        ("equal to the bit", NONE, {None: "not compared", True: "yes", False: "NO"}[equal]),
    ]


def _run_resident(
    name: str, size: str, dtype: torch.dtype, device: torch.device, kwargs: dict[str, Any]
) -> tuple[DiffusionPipeline, Run | None]:
    """The pipeline, and its run with all weights on `device`: None if they do not fit."""
    described = f"{name} ({size}, {str(dtype).removeprefix('torch.')})"
    _say(f"Building {described} with random weights on {device}")
    pipe = resident = None
    try:
        pipe = _built(name, size, dtype, device)
        _say("Running it resident: one call to warm up, then the measured one")
        resident = measure(pipe, kwargs, device)
    except torch.OutOfMemoryError as error:
        _say(f"{described} does not fit into the memory of {device}: {str(error).split('. ')[0]}.")
        _say("So there is no resident run, and nothing to compare the offloaded one with.")
    if resident is None:  # outside of `except`, where the traceback keeps tensors alive
        gc.collect()
        if device.type != "cpu":
            torch.get_device_module(device).empty_cache()
    if pipe is None:
        _say(f"Building {described} on the host, which takes longer")
        pipe = _built(name, size, dtype, torch.device("cpu"))
    return pipe, resident


def _built(name: str, size: str, dtype: torch.dtype, device: torch.device) -> DiffusionPipeline:
    pipe = build(name, size=size, dtype=dtype, device=device)
    pipe.set_progress_bar_config(disable=None, leave=False)  # None: where there is a terminal
    return pipe


def _call(pipe: DiffusionPipeline, kwargs: dict[str, Any], on_step: Callable[[], None]) -> torch.Tensor:
    """Call `pipe` from a fixed seed; `on_step` is called at the end of each step, if `pipe` tells of it."""

    def step_ended(_: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        on_step()
        return tensors

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        kwargs = {**kwargs, "callback_on_step_end": step_ended}
    return output(pipe(**kwargs, generator=torch.Generator("cpu").manual_seed(0)))


def _save(name: str, resident: Run | None, offloaded: Run, plan: Plan, folder: Path) -> None:
    picture, plot = folder / f"{name}.png", folder / f"{name}-memory.png"
    save_preview((offloaded.images,), picture)
    _say(f"The offloaded run's picture: {picture}")
    runs = {"resident": resident, "offloaded": offloaded}
    try:
        from .plot import plot_memory

        plot_memory(
            {label: run.memory for label, run in runs.items() if run is not None},
            plot,
            title=f"{name} on {plan.device}",
            arena_bytes=plan.arena_bytes,
        )
    except ImportError:
        _say("No plot of the memory over time: install matplotlib (the extra `plot`)")
    else:
        _say(f"Memory over time: {plot}")


def _difference(one: torch.Tensor, other: torch.Tensor) -> str:
    if one.shape != other.shape:
        return f"the offloaded output has shape {tuple(other.shape)}, the resident one {tuple(one.shape)}"
    if not (one.isfinite().all() and other.isfinite().all()):
        return "an output has values that are not finite, so nothing can be said about equality"
    count = int((one.view(torch.int32) != other.view(torch.int32)).sum())
    largest = (one - other).abs().max().item()
    return (
        f"the offloaded output differs from the resident one in {count} of {one.numel()} values, "
        f"by at most {largest:.3g}"
    )


def _say(text: str) -> None:
    print(text, flush=True)

"""What is measured, and how: transfer rates, steps, memory of device and host, the host's time in hooks."""

from __future__ import annotations

import gc
import hashlib
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

GIB, MIB = 2**30, 2**20
_RATE_BUFFER = GIB
_RATE_PIECES = (64 * MIB, 256 * MIB, GIB)
_SAMPLE_EVERY = 0.005  # seconds


def synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.cuda.synchronize(device)


def settle(device: torch.device) -> None:
    """Free what nobody uses, on the host and in the device's caching allocator."""
    gc.collect()
    if device.type != "cpu":
        torch.cuda.synchronize(device)
        torch.cuda.empty_cache()


def start_up(device: torch.device) -> None:
    """Bring up context and libraries, so that they count to the baseline and not to a row."""
    a = torch.ones(512, 512, dtype=torch.bfloat16, device=device)
    torch.nn.functional.layer_norm((a @ a).float(), (512,)).sum().item()
    del a
    if device.type != "cpu":
        # The workspace of the default stream: a row that computes on another one makes its own.
        torch._C._cuda_clearCublasWorkspaces()
    settle(device)


# --- transfer rate --------------------------------------------------------------------------------------


def h2d_rates(device: torch.device, repeats: int = 5) -> dict[str, float]:
    """GB/s from registered host memory to the device by size of copy: medians over copies of 1 GiB in all."""
    if device.type == "cpu":
        return {}
    rates = _h2d_rates(device, repeats)
    settle(device)
    return rates


def _h2d_rates(device: torch.device, repeats: int) -> dict[str, float]:
    source = torch.empty(_RATE_BUFFER, dtype=torch.uint8).fill_(1)
    destination = torch.empty(_RATE_BUFFER, dtype=torch.uint8, device=device)
    cudart = torch.cuda.cudart()
    error = cudart.cudaHostRegister(source.data_ptr(), source.numel(), 0)
    if int(error) != 0:
        raise RuntimeError(f"cudaHostRegister of 1 GiB failed: {error}")
    try:
        rates = {}
        for piece in _RATE_PIECES:
            copy = partial(_copy_in_pieces, source, destination, piece)
            copy()
            milliseconds, _ = step_times(copy, repeats, device)
            rates[f"{piece // MIB} MiB"] = _RATE_BUFFER / median(milliseconds) / 1e6
        return rates
    finally:
        synchronize(device)
        cudart.cudaHostUnregister(source.data_ptr())


def _copy_in_pieces(source: torch.Tensor, destination: torch.Tensor, piece: int) -> None:
    for of, to in zip(source.split(piece), destination.split(piece), strict=True):
        to.copy_(of, non_blocking=True)


# --- steps ----------------------------------------------------------------------------------------------


def step_times(step: Callable[[], Any], count: int, device: torch.device) -> tuple[list[float], float]:
    """(milliseconds of each step, mean by the host's clock), steps run back to back.

    The device is synchronized before the first and after the last, not in between: what a step queues for
    the next one (a prefetch) is paid for by some step. On the device, a step lasts from event to event.
    """
    synchronize(device)
    if device.type == "cpu":
        ticks = [perf_counter()]
        for _ in range(count):
            step()
            ticks.append(perf_counter())
        times = [(b - a) * 1e3 for a, b in pairwise(ticks)]
        return times, sum(times) / count
    events = [torch.cuda.Event(enable_timing=True) for _ in range(count + 1)]
    start = perf_counter()
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize(device)
    wall = (perf_counter() - start) * 1e3 / count
    return [a.elapsed_time(b) for a, b in pairwise(events)], wall


def digest(output: torch.Tensor) -> str:
    """A hash of the output's bytes; an output that is not finite proves nothing and raises."""
    if not bool(output.isfinite().all()):
        raise RuntimeError("the output is not finite")
    raw = output.detach().contiguous().view(torch.uint8).cpu().numpy()
    return hashlib.sha256(raw.tobytes()).hexdigest()


def hook_microseconds(forward: Callable[[], Any], device: torch.device) -> list[float]:
    """The host's time in the two hooks around each streamed unit, over one forward.

    The device catches up before every eighth unit, so that waiting for room in its queue is not counted;
    hence this disturbs the step, and is run apart from those that are timed.
    """
    from diffusers_offload.hooks import UnitHook

    before, behind = UnitHook.pre_forward, UnitHook.post_forward
    spent: dict[UnitHook, float] = {}
    pairs: list[float] = []

    def pre_forward(self: UnitHook, module: Any, *args: Any, **kwargs: Any) -> Any:
        if len(pairs) % 8 == 0:
            synchronize(device)
        start = perf_counter()
        result = before(self, module, *args, **kwargs)
        spent[self] = perf_counter() - start
        return result

    def post_forward(self: UnitHook, module: Any, output: Any) -> Any:
        start = perf_counter()
        result = behind(self, module, output)
        pairs.append((spent.pop(self) + perf_counter() - start) * 1e6)
        return result

    UnitHook.pre_forward, UnitHook.post_forward = pre_forward, post_forward
    try:
        forward()
        synchronize(device)
    finally:
        UnitHook.pre_forward, UnitHook.post_forward = before, behind
    return pairs


# --- memory of the device -------------------------------------------------------------------------------


def reset_device_peaks(device: torch.device) -> int | None:
    """Peaks count from here on; returns the bytes allocated now, None on the CPU."""
    if device.type == "cpu":
        return None
    synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    return torch.cuda.memory_allocated(device)


def device_peaks(device: torch.device) -> tuple[int | None, int | None]:
    """(allocated, reserved) bytes at most since the reset; None on the CPU."""
    if device.type == "cpu":
        return None, None
    synchronize(device)
    return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)


# --- memory of the host ---------------------------------------------------------------------------------


def host_rss() -> int:
    """Bytes of this process in host memory now."""
    return _proc("self/status")["VmRSS"]


def host_high_water() -> int:
    """The most bytes of this process in host memory since `reset_host_high_water`, 0 where not known."""
    return _proc("self/status").get("VmHWM", 0)


def host_available() -> int:
    """Bytes that the system can still give: sees pinned memory that the process' own size may not show."""
    return _proc("meminfo").get("MemAvailable", 0)


def reset_host_high_water() -> bool:
    """Whether the kernel let the high-water mark be reset."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


@contextmanager
def repeatedly(work: Callable[[], object], every: float) -> Iterator[None]:
    """Call `work` every so many seconds in a thread until the block is left, and then once more."""
    done = threading.Event()

    def run() -> None:
        while not done.wait(every):
            work()

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        work()


@contextmanager
def host_peak() -> Iterator[list[int]]:
    """Samples the process' size; the list's one element is the most seen so far."""
    peak = [host_rss()]

    def look() -> None:
        peak[0] = max(peak[0], host_rss())

    with repeatedly(look, _SAMPLE_EVERY):
        yield peak


def _proc(name: str) -> dict[str, int]:
    """The sizes that a file of /proc gives in kB, in bytes."""
    lines = (line.split() for line in Path("/proc", name).read_text().splitlines())
    return {words[0].rstrip(":"): int(words[1]) * 1024 for words in lines if words[2:] == ["kB"]}

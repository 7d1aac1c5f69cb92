"""Memory over time: of the device, as its allocator counts it, and of this process on the host."""

from __future__ import annotations

import os
import threading
import time
from dataclasses import dataclass
from types import TracebackType

import torch


@dataclass(frozen=True)
class Sample:
    """One look: seconds since sampling began, and bytes; `device` is None where the device is the CPU."""

    seconds: float
    device: int | None
    host: int


class MemorySampler:
    """Samples memory in a thread of its own for the duration of a `with` block.

    Args:
        device: whose allocator to ask; the CPU has none.
        interval: seconds between two samples.

    Attributes:
        samples: what was seen, in order; complete once the block is left.
    """

    def __init__(self, device: torch.device, interval: float = 0.01) -> None:
        self.samples: list[Sample] = []
        self._device = device
        self._interval = interval
        self._finished = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory-sampler", daemon=True)

    def __enter__(self) -> MemorySampler:
        self._begin = time.perf_counter()
        self._look()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._finished.set()
        self._thread.join()
        self._look()

    def _run(self) -> None:
        while not self._finished.wait(self._interval):
            self._look()

    def _look(self) -> None:
        seconds = time.perf_counter() - self._begin
        self.samples.append(Sample(seconds, device_bytes(self._device), host_bytes()))


def device_bytes(device: torch.device) -> int | None:
    """Bytes that tensors take on `device` now; None for the CPU."""
    if device.type == "cpu":
        return None
    return torch.get_device_module(device).memory_allocated(device)


def host_bytes() -> int:
    """Bytes of host memory that this process has resident now, pinned memory included."""
    try:
        with open("/proc/self/statm") as statm:
            return int(statm.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # not on Linux
        import psutil

        return psutil.Process().memory_info().rss

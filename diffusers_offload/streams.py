"""The three prioritized streams (compute, load, evict) of one device, and their events.

Everything goes through `torch.get_device_module`, so CUDA, NPU and XPU share one class. On the CPU work
is done the moment it is asked for, so its streams and events have nothing to order.
"""

from __future__ import annotations

import functools
import importlib.util
import os
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from .log import logger
from .quoting import quoted

# Lower is more urgent. A device that knows fewer levels clamps them, or ignores them (NPU).
COMPUTE_PRIORITY, LOAD_PRIORITY, EVICT_PRIORITY = -1, 0, 0

# Seconds that the host waits for the device before it says so, and before it raises. Honest work may take
# minutes on a slow device.
WARN_AFTER, GIVE_UP_AFTER = 60.0, 1800.0
_SPINS_FOR, _LONGEST_SLEEP = 0.0002, 0.001  # most waits are shorter than the system can sleep
_NAMED = 8  # units in a diagnosis


class Teller(Protocol):
    """Whoever knows what was queued."""

    def under_way(self) -> list[str]: ...


class DeviceStreams:
    """Three streams of one accelerator, and a fourth that belongs to `load`.

    Args:
        device: the accelerator, with an index.

    Attributes:
        tellers: who is asked what was queued when a wait does not end.
    """

    asynchronous = True

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tellers: WeakSet[Teller] = WeakSet()
        self._module = torch.get_device_module(device)
        self.compute = self._module.Stream(device=device, priority=COMPUTE_PRIORITY)
        self.load = self._module.Stream(device=device, priority=LOAD_PRIORITY)
        self.evict = self._module.Stream(device=device, priority=EVICT_PRIORITY)
        # What was loaded packed is unpacked behind its copy, while `load` goes on to the next one.
        self.unpack = self._module.Stream(device=device, priority=LOAD_PRIORITY)
        # `current_stream` takes 13 us in the middle of a model; comparing what it wraps takes a fraction.
        self._raw_stream = getattr(torch._C, f"_{device.type}_getCurrentRawStream", None)
        if self._raw_stream is not None:
            with self._module.stream(self.compute):
                self._raw_compute = self._raw_stream(device.index)
        self._take_their_places()

    def _take_their_places(self) -> None:
        """Use each stream once, in this order.

        CUDA gives a stream its place in the hardware's queues when the first kernel comes, and where `unpack` came
        behind `compute` and `load`, copies and computing beside it were some 5 % slower, for as long as the
        process lasted (benchmarks/results/2026-12-01-h200-packed.md).
        """
        number = torch.zeros(1, device=self.device)
        before = self.current()
        for stream in (self.load, self.unpack, self.compute, self.evict):
            stream.wait_stream(before)
            outside = self.switch(stream)
            try:
                number.add_(1)
            finally:
                self.restore(outside)
            before = stream
        self._module.synchronize(self.device)  # so that nobody has to wait for it

    def current(self) -> Any:
        """The stream that the caller's work on this device is queued on."""
        if self._raw_stream is not None and self._raw_stream(self.device.index) == self._raw_compute:
            return self.compute
        return self._module.current_stream(self.device)

    def event(self, timing: bool = False) -> Any:
        return self._module.Event(enable_timing=True) if timing else self._module.Event()

    def switch(self, stream: Any, current: Any = None) -> tuple[Any, int]:
        """Make `stream` current; returns what `restore` needs to undo it. `current`: if known already."""
        before = (current or self.current(), self._module.current_device())
        self._module.set_stream(stream)
        return before

    def restore(self, before: tuple[Any, int]) -> None:
        stream, device_index = before
        self._module.set_stream(stream)  # this makes the stream's device current, too
        if device_index != self.device.index:
            self._module.set_device(device_index)

    def lend(self, tensors: Iterable[torch.Tensor]) -> None:
        """From now on these are read on the current stream: their memory is not reused before it is done with them.

        The allocator reuses memory in the order of the stream that it belongs to, here `compute`. A forward begins
        behind what its own thread queued before, but not behind what another thread has queued since.
        """
        current = self.current()
        if current != self.compute:
            for tensor in tensors:
                for plain in _plain(tensor):
                    if plain.device == self.device:
                        plain.record_stream(current)

    def wait_for(self, event: Any, what: str) -> None:
        """The host waits for `event`.

        Args:
            what: is waited for, in words.

        Raises:
            RuntimeError: it did not come in `GIVE_UP_AFTER` seconds.
        """
        self._wait_until(event.query, what)
        event.synchronize()  # which returns at once; it is by this that the host comes behind the event

    def synchronize(self, what: str = "the device to be done") -> None:
        """The host waits for all that is queued on the device, also on streams that nobody noted.

        Events of our streams would not do: what stays on the device is used on any stream, and its memory may be
        about to go. Ours are asked first all the same, since that wait tells if it does not end.

        Args, Raises: as for `wait_for`.
        """
        for stream in (self.load, self.unpack, self.compute, self.evict, self.current()):
            self._wait_until(stream.query, what)
        self._module.synchronize(self.device)

    def _wait_until(self, done: Callable[[], bool], what: str) -> None:
        if done():
            return
        began, warned = time.monotonic(), False
        while not done():
            waited = time.monotonic() - began
            if waited >= GIVE_UP_AFTER:
                raise RuntimeError(
                    f"{self._diagnose(what, waited)} Start the process anew; CUDA_LAUNCH_BLOCKING=1 (or "
                    "ASCEND_LAUNCH_BLOCKING=1) shows which kernel does not end, the system's log whether the driver "
                    "has failed. If the device is just slow, raise diffusers_offload.streams.GIVE_UP_AFTER."
                )
            if waited >= WARN_AFTER and not warned:
                warned = True
                logger.warning("%s It may be slow, or hang.", self._diagnose(what, waited))
            if waited >= _SPINS_FOR:
                time.sleep(min(waited / 4, _LONGEST_SLEEP))

    def _diagnose(self, what: str, waited: float) -> str:
        names = ("compute", "load", "unpack", "evict")
        streams = {name: getattr(self, name) for name in names}
        busy = [name for name, stream in streams.items() if not stream.query()]
        units = [unit for teller in self.tellers for unit in teller.under_way()]
        rest = f" and {len(units) - _NAMED} more" if len(units) > _NAMED else ""
        return (
            f"waited {waited:.0f} s for {what} on {self.device}. Streams with work left: "
            f"{', '.join(busy) or 'none of ours'}; units: {', '.join(units[:_NAMED]) or 'none under way'}{rest}."
        )

    def empty_cache(self) -> None:
        """Give freed device memory back, so that the next component finds it whatever stream it uses."""
        self._module.empty_cache()

    def peak_reserved(self) -> int:
        """The same with what the allocator holds for later."""
        return self._module.max_memory_reserved(self.device)

    def reserved(self) -> int:
        """Bytes that the allocator holds now."""
        return self._module.memory_reserved(self.device)

    def available(self) -> int:
        """Bytes of the device that this process may have: what it has already, and what is free."""
        if not hasattr(self._module, "mem_get_info"):  # nobody says what is free: all of it, then
            return self._module.get_device_properties(self.device).total_memory
        free, total = self._module.mem_get_info(self.device)
        fraction = getattr(self._module, "get_per_process_memory_fraction", None)
        share = int(fraction(self.device) * total) if fraction is not None else total
        return min(free + self.reserved(), share)

    def begin_peak(self) -> None:
        """Measure the peak anew."""
        self._module.reset_peak_memory_stats(self.device)

    def peak(self) -> int:
        """Most bytes of tensors on the device at once since `begin_peak`."""
        return self._module.max_memory_allocated(self.device)

    def allocated(self) -> int:
        """Bytes of tensors on the device now, whoever they belong to."""
        return self._module.memory_allocated(self.device)

    def random_state(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The state of the generators that a forward may draw from."""
        return torch.get_rng_state(), self._module.get_rng_state(self.device)

    def restore_random(self, state: tuple[torch.Tensor, torch.Tensor]) -> None:
        torch.set_rng_state(state[0])
        self._module.set_rng_state(state[1], self.device)

    def forget_workspaces(self) -> None:
        """Free what cuBLAS keeps for each stream that it ran on; it comes back when needed."""
        if self.device.type == "cuda":
            torch._C._cuda_clearCublasWorkspaces()


class InlineEvent:
    """An event on the CPU: everything before it has happened already."""

    def record(self, stream: Any = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, later: InlineEvent) -> float:
        return 0.0


class InlineStream:
    """A stream on the CPU: work runs when it is asked for, so there is nothing to wait for."""

    def wait_event(self, event: Any) -> None: ...

    def wait_stream(self, stream: Any) -> None: ...


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that hold the memory of `tensor`: itself, unless it wraps others or is sparse."""
    if is_traceable_wrapper_subclass(tensor):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor.layout is torch.sparse_coo:
        yield from (tensor._indices(), tensor._values())
    elif tensor.layout is torch.strided:
        yield tensor


class InlineStreams:
    """The CPU as device: the same interface as `DeviceStreams`, and nothing to order."""

    asynchronous = False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.tellers: WeakSet[Teller] = WeakSet()
        self.compute = self.load = self.unpack = self.evict = InlineStream()

    def current(self) -> InlineStream:
        return self.compute

    def event(self, timing: bool = False) -> InlineEvent:
        return InlineEvent()

    def lend(self, tensors: Iterable[torch.Tensor]) -> None: ...

    def switch(self, stream: InlineStream, current: InlineStream | None = None) -> None: ...

    def restore(self, before: None) -> None: ...

    def wait_for(self, event: InlineEvent, what: str) -> None: ...

    def synchronize(self, what: str = "") -> None: ...

    def empty_cache(self) -> None: ...

    def begin_peak(self) -> None: ...

    def peak(self) -> int:
        return 0  # nobody counts; a budget then bounds the weights alone

    def allocated(self) -> int:
        return 0

    def peak_reserved(self) -> int:
        return 0

    def reserved(self) -> int:
        return 0

    def random_state(self) -> torch.Tensor:
        return torch.get_rng_state()

    def restore_random(self, state: torch.Tensor) -> None:
        torch.set_rng_state(state)

    def forget_workspaces(self) -> None: ...


Streams = DeviceStreams | InlineStreams


@functools.cache  # one set a device: libraries keep a workspace for every stream that they have seen
def open_streams(device: torch.device) -> Streams:
    """The streams of `device`; inline ones for the CPU."""
    return InlineStreams(device) if device.type == "cpu" else DeviceStreams(device)


def find_device(device: str | torch.device | None) -> torch.device:
    """The device to run on, with its index.

    Args:
        device: a name such as "cuda", "npu:1" or "cpu"; None takes the accelerator of this machine, or
            the CPU where there is none.

    Raises:
        ValueError: `device` is no device's name.
        RuntimeError: the accelerator asked for is not there.
    """
    if device is None:
        found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        usable = found is not None and _count(found.type) > 0
        device = found if usable else "cpu"
    name = device.partition(":")[0] if isinstance(device, str) else None
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError, ValueError) as error:
        if name == "npu":
            raise RuntimeError(f"device={quoted(device)} is not there: {_why_no_npu()}") from error
        raise ValueError(
            f"device={quoted(device)} is not a device; use 'cuda', 'npu', 'xpu' (with an index if you like) or 'cpu'"
        ) from error
    if device.type == "cpu":
        return torch.device("cpu")
    count = _count(device.type)
    if not 0 <= (device.index or 0) < count:  # torch reads "cuda:200" as device -56
        raise RuntimeError(
            f"device={str(device)!r} is not there: this machine has {count} {device.type} device(s) with streams; "
            "leave `device` out to use what the machine has, or pass device='cpu'"
        )
    index = torch.get_device_module(device).current_device() if device.index is None else device.index
    return torch.device(device.type, index)


def _why_no_npu() -> str:
    """What to do where torch does not know the device "npu"."""
    if importlib.util.find_spec("torch_npu") is None:
        return "install torch_npu, in the version of your torch"
    setting = os.environ.get("TORCH_DEVICE_BACKEND_AUTOLOAD", "1")
    if setting == "0":
        return "TORCH_DEVICE_BACKEND_AUTOLOAD=0 keeps torch from loading torch_npu; unset it, or import torch_npu first"
    return "torch_npu is installed but was not loaded; import torch_npu first, it says what it lacks"


def _count(kind: str) -> int:
    """How many devices of this kind there are that copy and compute on streams."""
    try:
        module = torch.get_device_module(kind)
        return module.device_count() if module.is_available() and hasattr(module, "Stream") else 0
    except (RuntimeError, AttributeError):
        return 0

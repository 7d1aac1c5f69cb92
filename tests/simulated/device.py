"""An accelerator named `npu` on a machine that has none: real bytes, and streams whose order is looked after.

Work is computed by torch's CPU kernels, at once or later (`schedule`), and what each stream, event and copy
orders is checked (`clocks`). The package sees `torch.npu` with the names that torch_npu 2.13 has, and
tensors that lie on the device `npu:0`: mixing them with the CPU's raises, as on any accelerator.

One process has one such device, and keeps it: these tests run in a process of their own (`make test`).
"""

from __future__ import annotations

import types
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as register_backend

from .clocks import HOST, Checker, Clock, responsible
from .memory import Block, Memory, make_block
from .schedule import Queue, Schedule

BUS = 50e9  # bytes a second between host and device, in simulated time
MEMORY = 1e11  # bytes a second that kernels read and write: slow, so that computing takes about as long
LAUNCH = 5e-6  # seconds of every kernel and copy
TOTAL = 8 * 2**30  # bytes of the device
LATE = 3  # times that an event denies being reached: a device is late, but comes at last


class Stream:
    """Work in order. Its `priority` says nothing here, as on an NPU."""

    def __init__(self, device: Any = None, priority: int = 0) -> None:
        self.device = torch.device("npu", 0)
        self.number = THE.number_of(self)
        self.clock = Clock()
        self.queue = Queue()
        self.time = 0.0  # simulated seconds at which all of its work is done

    def wait_event(self, event: Event) -> None:
        if THE.dropped("wait_event"):
            return
        event.wait(self)

    def wait_stream(self, stream: Stream) -> None:
        if THE.dropped("wait_stream"):
            return
        event = Event()
        event._record(stream)
        event.wait(self)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def synchronize(self) -> None:
        THE.schedule.finish(self.queue)
        THE.host.join(self.clock)

    def query(self) -> bool:
        THE.schedule.advance()
        done = not self.queue.pending
        if done and not THE.dropped("host wait"):
            THE.host.join(self.clock)
        return done


class Event:
    """A point in a stream's work."""

    def __init__(self, enable_timing: bool = False, blocking: bool = False) -> None:
        self._timed = enable_timing
        self._clock: Clock | None = None  # None: never recorded, so there is nothing to wait for
        self._mark: Any = None
        self._asked = 0  # how often somebody asked since it was recorded
        self.time = 0.0

    def record(self, stream: Stream | None = None) -> None:
        if not THE.dropped("record"):
            self._record(stream or THE.current)

    def _record(self, stream: Stream) -> None:
        stream.clock.join(THE.host)
        self._clock = stream.clock.copy()
        self._mark = THE.schedule.mark(stream.queue)
        self._asked = 0
        self.time = stream.time

    def wait(self, stream: Stream | None = None) -> None:
        stream = stream or THE.current
        if self._clock is not None:
            stream.clock.join(self._clock)
            THE.schedule.wait(stream.queue, self._mark)
            stream.time = max(stream.time, self.time)

    def synchronize(self) -> None:
        if self._clock is not None and not THE.dropped("host wait"):
            THE.schedule.reach(self._mark)
            THE.host.join(self._clock)

    def query(self) -> bool:
        if self._clock is None:
            return True
        THE.schedule.advance()
        if THE.dropped("host wait"):
            return True
        self._asked += 1
        if not self._mark.reached or (self._asked <= LATE and not THE.host.knows(self._clock)):
            return False
        THE.host.join(self._clock)  # who has seen it done is behind it
        return True

    def elapsed_time(self, later: Event) -> float:
        """Milliseconds.

        Raises:
            RuntimeError: one of the two was made without timing.
        """
        if not (self._timed and later._timed):
            raise RuntimeError("both events must be made with enable_timing=True")
        return (later.time - self.time) * 1e3


class Simulator:
    """The device's state: streams, memory, what the host knows, and what is checked."""

    def __init__(self) -> None:
        self.streams: list[Any] = []
        self.host = Clock()
        self.checker: Checker | None = None
        self.schedule = Schedule()
        self.memory = Memory(TOTAL, self.synchronize, self._gone, self._done)
        self.pinned: dict[int, Block] = {}  # by address
        self.refuses_to_pin: Callable[[int], bool] = lambda nbytes: False
        self.drops: Callable[[str, str], bool] | None = None  # (what, line of the package) -> not performed
        self.current: Any = None

    def number_of(self, stream: Stream) -> int:
        self.streams.append(stream)
        return len(self.streams)  # the host is 0

    def dropped(self, what: str) -> bool:
        if self.drops is None:
            return False
        # A wait of the host is known by who asked for it, not by the loop that all of these run through.
        return self.drops(what, responsible(("streams.py",) if what == "host wait" else ()))

    @property
    def pending(self) -> bool:
        return any(stream.queue.pending for stream in self.streams)

    def synchronize(self) -> None:
        for stream in self.streams:
            stream.synchronize()

    # --- memory -------------------------------------------------------------------------------------

    def allocate(self, nbytes: int) -> torch.UntypedStorage:
        """Device memory for work on the current stream; goes back when nobody holds it."""
        block = self.memory.allocate(nbytes, self.current.number)
        self.launch(
            [], [(block.address, block.address, block.address + block.nbytes)], block.fill, "allocation"
        )
        return self._storage(block, nbytes, torch.device("npu", 0), self.memory.free)

    def allocate_pinned(self, nbytes: int) -> torch.UntypedStorage:
        """Host memory that the device copies from by itself."""
        if self.refuses_to_pin(nbytes):
            raise RuntimeError("pinning host memory was refused (simulated)")
        block = make_block(nbytes, None)
        self.pinned[block.address] = block
        return self._storage(block, nbytes, torch.device("cpu"), self._unpin)

    def _storage(
        self, block: Block, nbytes: int, device: torch.device, free: Callable[[Block], None]
    ) -> torch.UntypedStorage:
        storage = torch._C._construct_storage_from_data_pointer(block.address, device, nbytes)
        weakref.finalize(storage, free, block).atexit = False
        return storage

    def _unpin(self, block: Block) -> None:
        # As strict as registered memory, which is unmapped; torch's pinned allocator would wait for the copies.
        self.host_access(block.address, (block.address, block.address + block.nbytes), True, "unpinning")
        if self.pending:
            self.synchronize()
        self.pinned.pop(block.address, None)
        self._gone(block.address)

    def record(self, tensor: torch.Tensor, stream: Stream) -> None:
        """`Tensor.record_stream`, which as on any accelerator is for its own tensors alone."""
        if tensor.device.type != "npu":
            raise RuntimeError(f"record_stream of a tensor on {tensor.device}")
        block = self.memory.live.get(tensor.untyped_storage().data_ptr())  # None if it is empty
        if block is not None and block.owner != stream.number:
            block.users.add(stream)

    def _done(self, block: Block) -> Callable[[], bool]:
        """Whether the host knows that others have done what they have to do with the block by now.

        It does not ask: what it learned by that would order more than is promised.
        """
        clocks = [stream.clock.copy() for stream in block.users]
        return lambda: all(self.host.knows(clock) for clock in clocks)

    def _gone(self, address: int) -> None:
        if self.checker is not None:
            self.checker.forget(address)

    # --- work ---------------------------------------------------------------------------------------

    def launch(
        self,
        reads: list[tuple[int, int, int]],
        writes: list[tuple[int, int, int]],
        work: Callable[[], None],
        what: str,
        seconds: float = 0.0,
    ) -> None:
        """Queue `work` on the current stream.

        Args:
            reads, writes: (address of the block, first and last address) of what it touches.
            seconds: that it takes.
        """
        stream = self.current
        stream.clock.join(self.host)
        stream.clock.step(stream.number)
        if self.checker is not None:
            for spans, write in ((reads, False), (writes, True)):
                for block, *span in spans:
                    self.checker.look(block, tuple(span), stream.number, stream.clock, write, what)
        stream.time += LAUNCH + seconds
        self.schedule.queue(stream.queue, work)

    def host_access(self, block: int, span: tuple[int, int], write: bool, what: str) -> None:
        """The host itself touches memory that the device knows (announced: torch does not see `readinto`)."""
        self.host.step(HOST)
        if self.checker is not None:
            self.checker.look(block, span, HOST, self.host, write, what)

    @contextmanager
    def checked(self) -> Iterator[Checker]:
        """Within, every access is checked."""
        from .kernels import HostWatch

        self.synchronize()
        self.checker = checker = Checker()
        try:
            with HostWatch():
                yield checker
        finally:
            self.checker = None

    @contextmanager
    def delayed(self, seed: int) -> Iterator[None]:
        """Within, work is done as late and in as odd an order as the waits allow; `seed` chooses which."""
        self.synchronize()
        self.schedule.begin(seed)
        try:
            yield
        finally:
            self.synchronize()
            self.schedule.end()


THE = Simulator()


class _Module(types.ModuleType):
    """`torch.npu`, as far as the package and Diffusers ask: names and arguments are those of torch_npu 2.13."""

    Stream, Event = Stream, Event

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def set_device(self, device: Any) -> None: ...

    def current_stream(self, device: Any = None) -> Stream:
        return THE.current

    def default_stream(self, device: Any = None) -> Stream:
        return THE.streams[0]

    def set_stream(self, stream: Stream) -> None:
        THE.current = stream

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        before, THE.current = THE.current, stream
        try:
            yield
        finally:
            THE.current = before

    def synchronize(self, device: Any = None) -> None:
        if not THE.dropped("host wait"):
            THE.synchronize()

    def empty_cache(self) -> None:
        THE.memory.empty_cache()

    def mem_get_info(self, device: Any = None) -> tuple[int, int]:
        return THE.memory.total - THE.memory.reserved, THE.memory.total

    def memory_allocated(self, device: Any = None) -> int:
        return THE.memory.allocated

    def max_memory_allocated(self, device: Any = None) -> int:
        return THE.memory.peak_allocated

    def memory_reserved(self, device: Any = None) -> int:
        return THE.memory.reserved

    def max_memory_reserved(self, device: Any = None) -> int:
        return THE.memory.peak_reserved

    def reset_peak_memory_stats(self, device: Any = None) -> None:
        THE.memory.reset_peaks()

    def get_rng_state(self, device: Any = None) -> torch.Tensor:
        return torch.get_rng_state()  # kernels that draw are the CPU's, and so is their generator

    def set_rng_state(self, state: torch.Tensor, device: Any = None) -> None: ...

    def manual_seed_all(self, seed: int) -> None: ...

    def _is_in_bad_fork(self) -> bool:
        return False


def install() -> Simulator:
    """Register the device with torch, once."""
    if THE.current is None:
        from . import kernels

        register_backend("npu", backend_module=_Module("torch.npu"))
        torch.Tensor.record_stream = lambda tensor, stream: THE.record(tensor, stream)
        THE.current = Stream()
        kernels.register()
    return THE

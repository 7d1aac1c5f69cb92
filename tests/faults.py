"""The world fails at the n-th time that a place is passed; and what a process holds, to see that nothing leaks."""

from __future__ import annotations

import errno
import gc
import os
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from helpers import build, run, weights_of
from torch import nn
from torch.nn import functional

from diffusers_offload import hooks, slab
from diffusers_offload.demo.memory import host_bytes
from diffusers_offload.engine import Engine
from diffusers_offload.loads import Loads
from diffusers_offload.stems import Stems
from diffusers_offload.tiers import pinned
from diffusers_offload.transfers import Transfers
from diffusers_offload.weights import Weights

STEPS = ("enable", "call", "call", "disable")


@dataclass(frozen=True)
class Place:
    """Somewhere the world can fail: the function `name` of `owner`, and the error that it raises then."""

    owner: Any
    name: str
    error: Callable[[], BaseException]


def out_of_device_memory() -> BaseException:
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


PLACES = {
    "device memory": Place(Transfers, "allocate", out_of_device_memory),
    "host memory": Place(pinned, "_Mapping", lambda: OSError(errno.ENOMEM, "Cannot allocate memory")),
    "host memory, as Python says it": Place(pinned, "_Mapping", lambda: MemoryError("no memory left")),
    "a thread": Place(threading.Thread, "start", lambda: RuntimeError("can't start new thread")),
    "a copy to the device": Place(
        pinned.PinnedTier, "load", lambda: RuntimeError("CUDA error: unspecified launch failure")
    ),
    "moving in": Place(slab, "gather", lambda: RuntimeError("CUDA error: unspecified launch failure")),
    "moving in, interrupted": Place(slab, "gather", lambda: KeyboardInterrupt("while moving in")),
    "moving out": Place(slab, "separate", lambda: RuntimeError("can't allocate memory: you tried to")),
    "moving out, interrupted": Place(slab, "separate", lambda: KeyboardInterrupt("while moving out")),
    "a matrix product": Place(functional, "linear", lambda: ValueError("in a matrix product")),
    "a matrix product, interrupted": Place(functional, "linear", lambda: KeyboardInterrupt("in a product")),
    "a convolution": Place(functional, "conv2d", lambda: ValueError("in a convolution")),
    "a convolution, interrupted": Place(functional, "conv2d", lambda: KeyboardInterrupt("in a convolution")),
    "a norm": Place(functional, "layer_norm", lambda: ValueError("in a norm")),
    "an embedding": Place(functional, "embedding", lambda: KeyboardInterrupt("in an embedding")),
    "binding, interrupted": Place(Weights, "bind", lambda: KeyboardInterrupt("while binding")),
    "unbinding, interrupted": Place(Weights, "unbind", lambda: KeyboardInterrupt("while unbinding")),
    "placing, interrupted": Place(Weights, "place", lambda: KeyboardInterrupt("while placing")),
    "acquire, interrupted": Place(Engine, "acquire", lambda: KeyboardInterrupt("before a unit")),
    "release, interrupted": Place(Engine, "release", lambda: KeyboardInterrupt("after a unit")),
    "prefetch, interrupted": Place(Loads, "prefetch", lambda: KeyboardInterrupt("while loading ahead")),
    "enter, interrupted": Place(Engine, "enter", lambda: KeyboardInterrupt("before a component")),
    "leave, interrupted": Place(Engine, "leave", lambda: KeyboardInterrupt("after a component")),
    "stem, interrupted": Place(Stems, "bring", lambda: KeyboardInterrupt("before a stem")),
    "stem away, interrupted": Place(Stems, "send_away", lambda: KeyboardInterrupt("after a stem")),
    "a hook": Place(hooks, "attach", lambda: KeyboardInterrupt("while attaching")),
}


class Fault:
    """Counts how often a place is passed, and fails there.

    Args:
        place: where.
        at: the first pass that fails, from 0; None: none does.
        times: how many passes in a row fail.

    Attributes:
        passed: how often it was passed.
        raised: the errors so far.
    """

    def __init__(self, place: Place, at: int | None = None, times: int = 1) -> None:
        self._place = place
        self._failing = range(0) if at is None else range(at, at + times)
        self._counting = threading.Lock()  # threads of the package pass here, too
        self.passed = 0
        self.raised: list[BaseException] = []

    def pass_by(self) -> None:
        with self._counting:
            number, self.passed = self.passed, self.passed + 1
        if number in self._failing:
            error = self._place.error()
            self.raised.append(error)
            raise error

    @property
    def over(self) -> bool:
        """Whether all that was to fail has failed."""
        return self.passed >= self._failing.stop


@contextmanager
def failing(place: Place, at: int | None = None, times: int = 1) -> Iterator[Fault]:
    """Within, the passes `at`, `at + 1` ... of `place` fail, `times` of them; None: they are only counted."""
    fault, original = Fault(place, at, times), getattr(place.owner, place.name)

    @wraps(original)
    def passed(*args: Any, **kwargs: Any) -> Any:
        fault.pass_by()
        return original(*args, **kwargs)

    setattr(place.owner, place.name, passed)
    try:
        yield fault
    finally:
        setattr(place.owner, place.name, original)


def spread(count: int, most: int) -> list[int]:
    """All of 0 ... count - 1, or `most` of them in even steps: the first and the last always."""
    if count <= most:
        return list(range(count))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


class Subject:
    """A pipeline, its output and what it was like before anything was done to it."""

    def __init__(self, name: str, device: str) -> None:
        self.name, self.device = name, device
        self.pipe = build(name, device=device)
        self.expected = run(self.pipe, name)
        self.pipe.to("cpu")
        self.before = {key: weights_of(module) for key, module in self.modules.items()}
        self.storages = self._storages()

    @property
    def modules(self) -> dict[str, nn.Module]:
        return {key: value for key, value in self.pipe.components.items() if isinstance(value, nn.Module)}

    def step(self, step: str, granularity: str, **options: Any) -> None:
        """One of `STEPS`."""
        if step == "enable":
            options = {"offload_ratio": 1.0, **options}
            self.pipe.enable_block_offload(device=self.device, offload_granularity=granularity, **options)
        elif step == "call":
            assert torch.equal(run(self.pipe, self.name), self.expected)
        else:
            self.pipe.disable_block_offload()

    def passes(self, place: Place, granularity: str, **options: Any) -> dict[str, int]:
        """How often `place` is passed until each step is over, undisturbed."""
        passed = {}
        with failing(place) as fault:
            for step in STEPS:
                self.step(step, granularity, **options)
                passed[step] = fault.passed
        return passed

    def live_through(self, place: Place, at: int, granularity: str, times: int = 1, **options: Any) -> Fault:
        """Every step, the fault on the way; a step that fails is made again, and is right then."""
        with failing(place, at, times) as fault:
            for step in STEPS:
                for _ in range(times + 1):
                    try:
                        self.step(step, granularity, **options)
                        break
                    except (RuntimeError, ValueError, MemoryError, KeyboardInterrupt) as error:
                        if error not in fault.raised and error.__cause__ not in fault.raised:
                            raise
                    self.assert_quiet()
                    if step == "enable":
                        self.assert_plain(shared=place is PLACES["moving out"])
                else:
                    raise AssertionError(f"{step} fails for ever")
        self.assert_plain(shared=place is PLACES["moving out"])
        return fault

    def assert_quiet(self) -> None:
        """Nothing is under way, and no thread would wait for ever."""
        handle = self.pipe.block_offload
        if handle is not None:
            engine = handle._engine
            assert not engine.busy
            assert not engine._using
            assert not engine.lock._is_owned()
            assert not any(component.present for component in engine.components)

    def assert_plain(self, shared: bool = False) -> None:
        """No trace of the offload is left, but that weights may share memory if there was too little of it."""
        assert self.pipe.block_offload is None
        for key, module in self.modules.items():
            for part in module.modules():
                assert not hasattr(part, "_hf_hook")
                assert not hasattr(part, "_old_forward")
                assert part.forward.__func__ is type(part).forward
                assert "to" not in vars(part)
                assert "__deepcopy__" not in vars(part)
            after = module.state_dict()
            assert list(after) == list(self.before[key])
            assert all(torch.equal(after[path], tensor) for path, tensor in self.before[key].items())
            assert {t.device.type for t in after.values()} <= {"cpu"}
        if not shared:
            assert self._storages() == self.storages

    def _storages(self) -> dict[str, int]:
        return {
            f"{key}.{path}": tensor.untyped_storage().nbytes()
            for key, module in self.modules.items()
            for path, tensor in module.state_dict().items()
        }


@dataclass(frozen=True)
class Holdings:
    """What this process holds of what the package takes.

    Attributes:
        mapped: bytes of host memory for weights.
        on_device: bytes that were allocated by an engine.
        threads, files: how many are running, and open.
    """

    mapped: int
    on_device: int
    threads: int
    files: int


class Tally:
    """Follows what the package allocates for as long as somebody holds it."""

    def __init__(self) -> None:
        self._buffers: weakref.WeakSet[torch.UntypedStorage] = weakref.WeakSet()
        self._mappings: weakref.WeakSet[Any] = weakref.WeakSet()

    @contextmanager
    def following(self) -> Iterator[Tally]:
        allocate, mapping_of = Transfers.allocate, pinned._Mapping

        def allocated(transfers: Transfers, nbytes: int) -> torch.Tensor:
            buffer = allocate(transfers, nbytes)
            self._buffers.add(buffer.untyped_storage())
            return buffer

        def mapped(*args: Any, **kwargs: Any) -> Any:
            mapping = mapping_of(*args, **kwargs)
            self._mappings.add(mapping)
            return mapping

        Transfers.allocate, pinned._Mapping = allocated, mapped
        try:
            yield self
        finally:
            Transfers.allocate, pinned._Mapping = allocate, mapping_of

    def now(self) -> Holdings:
        gc.collect()
        return Holdings(
            mapped=sum(len(mapping) for mapping in self._mappings),
            on_device=sum(storage.nbytes() for storage in self._buffers),
            threads=len(list(Path("/proc/self/task").iterdir())),
            files=len(os.listdir("/proc/self/fd")),
        )


def resident_bytes() -> int:
    """Bytes of this process in memory."""
    gc.collect()
    return host_bytes()

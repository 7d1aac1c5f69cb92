"""Units on disk, host memory to read them into, and disks that are slow or wrong."""

import gc
import mmap
import os
import threading
import time
from pathlib import Path

import pytest
import torch

from diffusers_offload.slab import align
from diffusers_offload.tiers import digests
from diffusers_offload.tiers import workers as workers_module
from diffusers_offload.tiers.blockfile import Stored
from diffusers_offload.tiers.descriptors import System

PAGE = 4096
PIECE = 64 * 1024  # small, so that units of some hundred KiB have several


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(digests, "PIECE", PIECE)
    monkeypatch.setattr(workers_module, "_PAUSES", (0.001, 0.002, 0.003))


@pytest.fixture(autouse=True)
def nothing_left_behind():
    threads = set(threading.enumerate())
    yield
    until(lambda: set(threading.enumerate()) <= threads)
    if descriptors():
        gc.collect()
    assert not descriptors()


def descriptors():
    """The units' files that are open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{name}"))
        except OSError:
            pass
    return {path for path in found if path.endswith(".unit")}


def until(true, seconds=5.0):
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def memory(nbytes, offset=0):
    """Page-aligned host memory with room for `nbytes` rounded up, 0xAA everywhere."""
    mapping = mmap.mmap(-1, align(max(nbytes, 1), PAGE) + PAGE)
    return torch.frombuffer(mapping, dtype=torch.uint8)[offset : offset + align(max(nbytes, 1), PAGE)].fill_(
        0xAA
    )


def store(folder, nbytes, name="a", offset=PAGE):
    """A file with a unit of random bytes behind something else; returns (Stored, bytes)."""
    data = os.urandom(nbytes)
    path = Path(folder) / f"{name}.unit"
    path.write_bytes(bytes(offset) + data)
    return Stored(path, offset, nbytes, digests.of_slab([memoryview(data)])), data


def fetch(reader, stored, **kwargs):
    target = memory(stored.nbytes)
    reader.request(stored, target, **kwargs).wait()
    return target[: stored.nbytes].numpy().tobytes()


def preadv(descriptor, into, offset):
    return os.preadv(descriptor, [into], offset)


class Gate:
    """A disk that reads only as often as it is let, and remembers where."""

    def __init__(self):
        self.passes = threading.Semaphore(0)
        self.places = []  # (file's name, offset), in the order in which reads began

    def read(self, descriptor, into, offset):
        self.places.append((Path(os.readlink(f"/proc/self/fd/{descriptor}")).stem, offset))
        assert self.passes.acquire(timeout=20)
        return preadv(descriptor, into, offset)

    def let(self, times=1000):
        self.passes.release(times)


def faulty(faults, only=lambda offset: True):
    """A read that first raises or returns what `faults` hold, one after the other."""
    left, lock = list(faults), threading.Lock()

    def read(descriptor, into, offset):
        with lock:
            fault = left.pop(0) if left and only(offset) else None
        if isinstance(fault, BaseException):
            raise fault
        if fault is not None:
            into = into[:fault]
        return preadv(descriptor, into, offset)

    return System(read=read)

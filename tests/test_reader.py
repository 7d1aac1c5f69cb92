"""The reader: right bytes or an error that says why, the urgent first, and never a thread that hangs."""

import ctypes
import errno
import fcntl
import gc
import hashlib
import mmap
import os
import threading
import time
import weakref
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_offload.slab import align
from diffusers_offload.tiers import reader as module
from diffusers_offload.tiers import workers as workers_module
from diffusers_offload.tiers.blockfile import Stored
from diffusers_offload.tiers.descriptors import Descriptors, System
from diffusers_offload.tiers.pieces import Destination, cut, reach
from diffusers_offload.tiers.reader import DiskReadError, Reader

PAGE = 4096
PIECE = 64 * 1024  # small, so that units of some hundred KiB have several
DIRECT = getattr(os, "O_DIRECT", 0)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(module, "PIECE", PIECE)
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
    return Stored(path, offset, nbytes, hashlib.blake2b(data, digest_size=16).hexdigest()), data


def fetch(reader, stored, **kwargs):
    target = memory(stored.nbytes)
    reader.request(stored, target, **kwargs).wait()
    return target[: stored.nbytes].numpy().tobytes()


def preadv(descriptor, into, offset):
    return os.preadv(descriptor, [into], offset)


def is_direct(descriptor):
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


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


# --- right bytes --------------------------------------------------------------------------------------

SIZES = [0, 1, 4095, 4096, 4097, PIECE - 1, PIECE, PIECE + 1, 5 * PIECE, 5 * PIECE + 4097]


@pytest.mark.parametrize("direct", [True, False])
def test_the_bytes_are_right(tmp_path, direct):
    for nbytes in SIZES:
        stored, data = store(tmp_path, nbytes, f"unit{nbytes}")
        with Reader(2, direct=direct) as reader:
            assert fetch(reader, stored) == data
            assert fetch(reader, stored) == data
            assert reader.counters.bytes_read == 2 * nbytes
            assert reader.counters.verified == 1
            assert reader.counters.reads == 2


@pytest.mark.parametrize("offset", [0, 1, 512])
def test_memory_without_room_or_alignment_is_filled_to_the_byte(tmp_path, offset):
    with Reader(2) as reader:
        for nbytes in SIZES:
            stored, data = store(tmp_path, nbytes, f"unit{nbytes}")
            around = memory(nbytes + 2 * PAGE)
            reader.request(stored, around[offset : offset + nbytes], 0).wait()
            assert around[offset : offset + nbytes].numpy().tobytes() == data
            assert bool((around[:offset] == 0xAA).all() and (around[offset + nbytes :] == 0xAA).all())


@pytest.mark.parametrize("workers", [1, 2, 5])
def test_many_units_of_many_files(tmp_path, workers):
    units = [store(tmp_path, size, f"unit{n}") for n, size in enumerate(SIZES * 3)]
    targets = [memory(stored.nbytes) for stored, _ in units]
    with Reader(workers) as reader:
        for _ in range(3):
            reads = [reader.request(u[0], t, n) for n, (u, t) in enumerate(zip(units, targets, strict=True))]
            for read, target, (stored, data) in zip(reads, targets, units, strict=True):
                read.wait()
                assert target[: stored.nbytes].numpy().tobytes() == data
        assert reader.counters.verified == len(units)


def test_a_unit_in_the_middle_of_a_file(tmp_path):
    stored, data = store(tmp_path, 3 * PIECE)
    part = data[PIECE : PIECE + 5000]
    middle = Stored(stored.path, PAGE + PIECE, 5000, hashlib.blake2b(part, digest_size=16).hexdigest())
    with Reader(2) as reader:
        assert fetch(reader, middle) == part


def test_threads_may_ask_at_once(tmp_path):
    units = [store(tmp_path, 3 * PIECE + n, f"unit{n}") for n in range(8)]
    wrong = []
    with Reader(3) as reader:

        def ask(mine):
            for stored, data in mine * 10:
                if fetch(reader, stored) != data:
                    wrong.append(stored)

        threads = [threading.Thread(target=ask, args=(units[n::4],)) for n in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert not wrong


@given(st.integers(0, 10 * PAGE), st.integers(1, 5).map(lambda n: n * PAGE))
def test_pieces_follow_each_other_without_gap(nbytes, piece):
    pieces = cut(nbytes, piece)
    assert pieces[0][0] == 0 and pieces[-1][1] == nbytes
    assert all(a[1] == b[0] for a, b in pairwise(pieces))
    assert all(start % PAGE == 0 for start, _ in pieces)


@given(
    st.integers(0, 3).map(lambda n: n * 2048),
    st.integers(0, 5000),
    st.integers(1, 20_000),
    st.integers(0, 9000),
)
def test_direct_reads_are_aligned_and_stay_inside(address, at, nbytes, room):
    destination = Destination(memoryview(bytearray(nbytes + room)), address)
    stored, stop = Stored(Path("x"), PAGE, nbytes, ""), nbytes
    steps = 0
    while at < stop:
        end, direct = reach(stored, destination, at, stop)
        assert at < end <= len(destination.bytes)
        if direct:
            assert all(n % PAGE == 0 for n in (address + at, stored.offset + at, end))
        else:
            assert end == stop
        at, steps = end, steps + 1
    assert steps <= 2


@pytest.mark.parametrize(
    "target",
    [
        torch.empty(99, dtype=torch.uint8),
        torch.empty(400, dtype=torch.int8),
        torch.empty(400, dtype=torch.uint8)[::2],
        torch.empty(400, dtype=torch.uint8, device="meta"),
    ],
)
def test_memory_that_cannot_be_filled_is_refused(tmp_path, target):
    stored, _ = store(tmp_path, 100)
    with Reader(1) as reader, pytest.raises(ValueError, match="destination"):
        reader.request(stored, target, 0)


@pytest.mark.parametrize("arguments", [{"workers": 0}, {"workers": 1, "timeout": 0}])
def test_impossible_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"num_disk_workers|timeout"):
        Reader(**arguments)


# --- past the page cache, where that is possible --------------------------------------------------------


@pytest.fixture
def direct_folder(tmp_path):
    """A folder whose file system has O_DIRECT."""
    probe = tmp_path / "probe"
    probe.write_bytes(bytes(PAGE))
    try:
        os.close(os.open(probe, os.O_RDONLY | DIRECT))
    except OSError:
        pytest.skip("no O_DIRECT here")
    if not DIRECT:
        pytest.skip("no O_DIRECT here")
    return tmp_path


def test_aligned_units_go_past_the_page_cache(direct_folder):
    stored, data = store(direct_folder, 3 * PIECE + 100)
    seen = []

    def read(descriptor, into, offset):
        seen.append((is_direct(descriptor), len(into) % PAGE, offset % PAGE))
        return preadv(descriptor, into, offset)

    with Reader(2, system=System(read=read)) as reader:
        assert fetch(reader, stored) == data
    assert set(seen) == {(True, 0, 0)} and len(seen) == 4


def refusing(when):
    """A file system that does not know O_DIRECT, and says so on `when`: "open" or "read"."""
    tried = []

    def open_(path, flags):
        if flags & DIRECT:
            tried.append("open")
            if when == "open":
                raise OSError(errno.EINVAL, "Invalid argument")
        return os.open(path, flags & ~DIRECT)

    direct_ones = set()

    def open_direct(path, flags):
        descriptor = open_(path, flags)
        (direct_ones.add if flags & DIRECT else direct_ones.discard)(descriptor)
        return descriptor

    def read(descriptor, into, offset):
        if descriptor in direct_ones:
            raise OSError(errno.EINVAL, "Invalid argument")
        return preadv(descriptor, into, offset)

    return System(open=open_direct, read=read), tried


@pytest.mark.skipif(not DIRECT, reason="this system has no O_DIRECT")
@pytest.mark.parametrize("when", ["open", "read"])
def test_a_file_system_without_direct_reads_is_remembered(tmp_path, when):
    system, tried = refusing(when)
    units = [store(tmp_path, 2 * PIECE + 5, f"unit{n}") for n in range(5)]
    with Reader(1, system=system) as reader:
        for stored, data in units:
            assert fetch(reader, stored) == data
        assert reader.counters.retries == 0
    assert tried == ["open"]


def test_short_reads_are_continued(tmp_path):
    stored, data = store(tmp_path, 3 * PIECE + 100)
    with Reader(2, system=faulty([1, 4096, 4097, 100, PIECE - 1, InterruptedError(), 8192])) as reader:
        assert fetch(reader, stored) == data


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, PIECE), max_size=12), st.integers(1, 3 * PIECE))
def test_short_reads_of_any_length(tmp_path_factory, lengths, nbytes):
    stored, data = store(tmp_path_factory.mktemp("short"), nbytes)
    with Reader(2, system=faulty(lengths)) as reader:
        assert fetch(reader, stored) == data


def test_few_files_stay_open(tmp_path):
    units = [store(tmp_path, 10, f"unit{n}") for n in range(20)]
    files = Descriptors(System(), most=4)
    for stored, _ in units * 2:
        files.open(stored.path, direct=False)
        assert len(descriptors()) <= 5
    held = files.open(units[0][0].path, direct=False)
    files.close()
    assert len(descriptors()) == 1 and os.pread(held.descriptor, 1, 0)


# --- order ----------------------------------------------------------------------------------------------


def test_the_unit_needed_next_goes_first(tmp_path):
    gate = Gate()
    units = {name: store(tmp_path, 100, name)[0] for name in "abcdef"}
    with Reader(1, system=System(read=gate.read)) as reader:
        first = reader.request(units["a"], memory(100), 0)
        until(lambda: gate.places)  # the worker is busy with it
        distances = zip("bcdef", (5, 2, 4, 2, 1), strict=True)
        reads = {name: reader.request(units[name], memory(100), d) for name, d in distances}
        reads["b"].hurry(0)
        reads["c"].hurry(9)
        gate.let()
        until(lambda: first.settled and all(read.settled for read in reads.values()))
    assert [name for name, _ in gate.places] == list("abfced")


def test_an_urgent_unit_overtakes_a_long_one_between_pieces(tmp_path):
    gate = Gate()
    long, urgent = store(tmp_path, 4 * PIECE, "long")[0], store(tmp_path, 2 * PIECE, "urgent")[0]
    with Reader(1, system=System(read=gate.read)) as reader:
        reads = [reader.request(long, memory(4 * PIECE), 3)]
        until(lambda: gate.places)
        reads.append(reader.request(urgent, memory(2 * PIECE), 1))
        gate.let()
        until(lambda: all(read.settled for read in reads))
    assert [name for name, _ in gate.places] == ["long", "urgent", "urgent", "long", "long", "long"]


def test_what_is_waited_for_goes_first(tmp_path):
    gate = Gate()
    units = {name: store(tmp_path, 100, name)[0] for name in "abc"}
    with Reader(1, system=System(read=gate.read)) as reader:
        reads = {
            name: reader.request(units[name], memory(100), d)
            for name, d in zip("abc", (0, 1, 2), strict=True)
        }
        until(lambda: gate.places)
        waiting = threading.Thread(target=reads["c"].wait)
        waiting.start()
        until(lambda: reads["c"].distance == 0)
        gate.let()
        waiting.join()
        until(lambda: all(read.settled for read in reads.values()))
    assert [name for name, _ in gate.places] == list("acb")


def test_several_workers_fill_one_unit(tmp_path):
    gate = Gate()
    stored, data = store(tmp_path, 3 * PIECE)
    target = memory(stored.nbytes)
    with Reader(3, system=System(read=gate.read)) as reader:
        read = reader.request(stored, target, 0)
        until(lambda: len(gate.places) == 3)  # nobody has been let through yet
        gate.let()
        read.wait()
    assert target[: stored.nbytes].numpy().tobytes() == data


# --- what is wrong is never served ----------------------------------------------------------------------


def error_of(reader, stored):
    with pytest.raises(DiskReadError) as caught:
        fetch(reader, stored)
    assert str(stored.path) in str(caught.value) and caught.value.path == stored.path
    assert caught.value.offset == stored.offset and "Remedy: " in str(caught.value)
    return caught.value


def test_an_error_that_passes_is_retried(tmp_path):
    stored, data = store(tmp_path, 3 * PIECE)
    with Reader(2, system=faulty([OSError(errno.EIO, "I/O error")] * 3)) as reader:
        assert fetch(reader, stored) == data
        assert reader.counters.retries == 3 and reader.counters.failures == 0


def test_an_error_that_stays_is_raised_with_the_file(tmp_path):
    stored, _ = store(tmp_path, 3 * PIECE)
    other, data = store(tmp_path, 100, "other", offset=8 * PIECE)
    broken = faulty([OSError(errno.EIO, "Input/output error")] * 1000, only=lambda offset: offset < 8 * PIECE)
    with Reader(2, system=broken) as reader:
        error = error_of(reader, stored)
        assert error.errno == errno.EIO and "Input/output error (4 attempts)" in str(error)
        assert isinstance(error.__cause__, OSError)
        read = reader.request(stored, memory(stored.nbytes), 0)
        for _ in range(2):  # every time that it is asked
            with pytest.raises(DiskReadError):
                read.wait()
        assert reader.counters.failures == 2
        assert fetch(reader, other) == data


@pytest.mark.parametrize("size", [0, 100, PAGE, PAGE + 1, PAGE + 100, PAGE + PIECE, PAGE + 3 * PIECE - 1])
def test_a_truncated_file_is_refused(tmp_path, size):
    stored, _ = store(tmp_path, 3 * PIECE)
    with Reader(2) as reader:
        fetch(reader, stored)
        os.truncate(stored.path, size)
        error = error_of(reader, stored)
        assert "truncated" in str(error) and "delete the file" in str(error)


def test_a_vanished_file_is_missed_even_while_it_is_open(tmp_path):
    stored, _ = store(tmp_path, 100)
    with Reader(1) as reader:
        fetch(reader, stored)
        stored.path.unlink()
        error = error_of(reader, stored)
        assert error.errno == errno.ENOENT and reader.counters.retries == 0


def test_a_directory_in_its_place(tmp_path):
    (tmp_path / "a.unit").mkdir()
    with Reader(1) as reader:
        error_of(reader, Stored(tmp_path / "a.unit", PAGE, 100, ""))


@pytest.mark.parametrize("place", [0, 1, PIECE, 2 * PIECE + 99])
def test_a_corrupted_byte_is_caught_on_the_first_read(tmp_path, place):
    stored, data = store(tmp_path, 2 * PIECE + 100)
    flip(stored, place)
    with Reader(2) as reader:
        for _ in range(2):
            error = error_of(reader, stored)
            assert "digest" in str(error) and "delete the file" in str(error)
        flip(stored, place)
        assert fetch(reader, stored) == data


def flip(stored, place):
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset + place)
        byte = file.read(1)[0]
        file.seek(stored.offset + place)
        file.write(bytes([byte ^ 1]))
    os.utime(stored.path, ns=(time.time_ns(), time.time_ns()))  # the clock of some file systems is coarse


def test_a_file_that_changes_later_is_verified_again(tmp_path):
    stored, _ = store(tmp_path, 2 * PIECE)
    with Reader(2) as reader:
        for _ in range(3):
            fetch(reader, stored)
        assert reader.counters.verified == 1
        flip(stored, 5)
        error_of(reader, stored)


def test_a_file_that_is_replaced_is_read_anew(tmp_path):
    stored, data = store(tmp_path, 2 * PIECE)
    with Reader(2) as reader:
        fetch(reader, stored)
        same = tmp_path / "new"
        same.write_bytes(bytes(PAGE) + data)
        os.replace(same, stored.path)
        assert fetch(reader, stored) == data
        assert reader.counters.verified == 2
        same.write_bytes(bytes(PAGE) + os.urandom(len(data)))
        os.replace(same, stored.path)
        error_of(reader, stored)


def test_a_file_replaced_between_two_pieces_is_caught(tmp_path):
    stored, data = store(tmp_path, 2 * PIECE)
    replaced = []
    with Reader(1) as reader:
        fetch(reader, stored)

    def read(descriptor, into, offset):
        count = preadv(descriptor, into, offset)
        if len(replaced) == 2:  # behind the first piece of the second read
            (tmp_path / "new").write_bytes(bytes(PAGE) + os.urandom(len(data)))
            os.replace(tmp_path / "new", stored.path)
        replaced.append(offset)
        return count

    with Reader(1, system=System(read=read)) as reader:
        fetch(reader, stored)
        error_of(reader, stored)


# --- never a forward that hangs -------------------------------------------------------------------------


def test_a_disk_that_does_not_answer_ends_in_a_diagnosis(tmp_path):
    gate = Gate()
    stored, data = store(tmp_path, 3 * PIECE, "slow")
    queued, _ = store(tmp_path, 100, "queued")
    target = memory(stored.nbytes)
    with Reader(2, timeout=0.2, system=System(read=gate.read)) as reader:
        read = reader.request(stored, target, 0)
        waiting = reader.request(queued, memory(100), 7)
        began = time.monotonic()
        with pytest.raises(TimeoutError) as caught:
            read.wait()
        assert 0.2 <= time.monotonic() - began < 5
        text = str(caught.value)
        for part in (
            "slow.unit",
            "disk worker 1 (alive) reading bytes",
            "disk worker 2",
            "queued.unit",
            "distance 7",
        ):
            assert part in text
        assert not read.settled
        gate.let()
        read.wait()
        waiting.wait()
    assert target[: stored.nbytes].numpy().tobytes() == data


def test_a_disk_that_is_slow_but_moves_is_waited_for(tmp_path):
    def read(descriptor, into, offset):
        time.sleep(0.1)
        return preadv(descriptor, into, offset)

    stored, data = store(tmp_path, 6 * PIECE)
    with Reader(1, timeout=0.4, system=System(read=read)) as reader:
        assert fetch(reader, stored) == data


@pytest.mark.parametrize(
    "error", [RuntimeError("injected"), SystemExit(), MemoryError(), KeyboardInterrupt()]
)
def test_a_worker_that_dies_is_replaced_and_its_piece_read(tmp_path, error):
    stored, data = store(tmp_path, 3 * PIECE)
    for workers in (1, 2):
        with Reader(workers, timeout=10, system=faulty([error, error])) as reader:
            assert fetch(reader, stored) == data
            assert fetch(reader, stored) == data


def test_a_unit_that_kills_every_worker_is_given_up(tmp_path):
    stored, _ = store(tmp_path, 100)
    other, data = store(tmp_path, 100, "other", offset=2 * PAGE)
    killing = faulty([ValueError("injected")] * 1000, only=lambda offset: offset == PAGE)
    with Reader(2, timeout=10, system=killing) as reader:
        error = error_of(reader, stored)
        assert "died" in str(error) and isinstance(error.__cause__, ValueError)
        assert fetch(reader, other) == data


def test_workers_killed_from_outside_are_replaced(tmp_path):
    stored, data = store(tmp_path, 3 * PIECE)
    with Reader(2, timeout=10) as reader:
        fetch(reader, stored)
        for worker in list(reader._workers._workers):
            kill(worker.thread)
        read = reader.request(stored, memory(stored.nbytes), 0)  # wakes them, and they die
        read.wait()
        assert fetch(reader, stored) == data


def test_a_worker_killed_without_a_word_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "_POLL", 0.01)
    stored, data = store(tmp_path, 3 * PIECE)
    with Reader(1, timeout=10, system=faulty([SystemExit()])) as reader:
        monkeypatch.setattr(type(reader._workers), "_bury", lambda self, worker, error: None)
        monkeypatch.setattr(type(reader._workers), "_leave", lambda self, worker: None)
        target = memory(stored.nbytes)
        read = reader.request(stored, target, 0)
        until(lambda: not reader._workers._workers[0].thread.is_alive())
        monkeypatch.undo()
        monkeypatch.setattr(module, "PIECE", PIECE)
        read.wait()
        assert target[: stored.nbytes].numpy().tobytes() == data


def kill(thread):
    ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident), ctypes.py_object(SystemExit))


def test_no_thread_to_be_had_is_an_error(tmp_path, monkeypatch):
    stored, data = store(tmp_path, 100)
    with Reader(2) as reader:
        with monkeypatch.context() as patch:

            def start(self):
                raise RuntimeError("can't start new thread")

            patch.setattr(threading.Thread, "start", start)
            assert "can't start new thread" in str(error_of(reader, stored))
        assert fetch(reader, stored) == data


# --- cancelled, closed, forgotten -----------------------------------------------------------------------


def test_a_cancelled_read_leaves_its_memory_alone(tmp_path):
    gate = Gate()
    stored, _ = store(tmp_path, 3 * PIECE)
    later, data = store(tmp_path, 100, "later")
    target = memory(stored.nbytes)
    with Reader(1, system=System(read=gate.read)) as reader:
        read = reader.request(stored, target, 0)
        until(lambda: gate.places)
        cancelling = threading.Thread(target=read.cancel)
        cancelling.start()
        until(lambda: not read._pending)
        assert cancelling.is_alive() and not read.settled  # a worker still writes
        gate.let()
        cancelling.join()
        assert read.settled and bool((target[PIECE:] == 0xAA).all())
        with pytest.raises(DiskReadError, match="cancelled"):
            read.wait()
        assert fetch(reader, later) == data
        assert len(gate.places) == 2


def test_a_read_can_be_cancelled_before_it_begins_and_after_it_ended(tmp_path):
    gate = Gate()
    stored, data = store(tmp_path, 100)
    target = memory(100)
    with Reader(1, system=System(read=gate.read)) as reader:
        first = reader.request(stored, target, 0)
        second = reader.request(stored, memory(100), 1)
        second.cancel()
        assert second.settled
        gate.let()
        first.wait()
        first.cancel()
        first.wait()
    assert target[:100].numpy().tobytes() == data and len(gate.places) == 1


def test_retrying_stops_when_nobody_wants_it(tmp_path, monkeypatch):
    monkeypatch.setattr(workers_module, "_PAUSES", (60.0,))
    stored, _ = store(tmp_path, 100)
    with Reader(1, system=faulty([OSError(errno.EIO, "I/O error")] * 9)) as reader:
        read = reader.request(stored, memory(100), 0)
        until(lambda: reader.counters.retries)
        read.cancel()
        read = reader.request(stored, memory(100), 0)
        until(lambda: reader.counters.retries == 2)
    with pytest.raises(DiskReadError):
        read.wait()


def test_closing_fails_what_is_queued_and_ends_what_is_under_way(tmp_path):
    gate = Gate()
    units = [store(tmp_path, 100, f"unit{n}") for n in range(4)]
    target = memory(100)
    reader = Reader(1, system=System(read=gate.read))
    reads = [reader.request(units[0][0], target, 0)]
    until(lambda: gate.places)
    reads += [reader.request(stored, memory(100), 1) for stored, _ in units[1:]]
    closing = threading.Thread(target=reader.close)
    closing.start()
    for read in reads[1:]:
        with pytest.raises(DiskReadError, match="closed"):
            read.wait()
    gate.let()
    closing.join()
    reads[0].wait()
    assert target[:100].numpy().tobytes() == units[0][1]
    reader.close()
    with pytest.raises(RuntimeError, match="closed"):
        reader.request(units[0][0], target, 0)


def test_closing_does_not_wait_for_ever(tmp_path):
    gate = Gate()
    stored, _ = store(tmp_path, 100)
    reader = Reader(1, timeout=0.1, system=System(read=gate.read))
    read = reader.request(stored, memory(100), 0)
    until(lambda: gate.places)
    reader.close()
    gate.let()
    until(lambda: read.settled)


def test_a_reader_that_nobody_holds_ends_its_threads(tmp_path):
    before = threading.active_count()
    stored, _ = store(tmp_path, 3 * PIECE)
    for _ in range(5):
        reader = Reader(3)
        fetch(reader, stored)
        reader.itself = reader  # only the collector finds it
    del reader
    gc.collect()
    until(lambda: threading.active_count() == before)


def test_reads_of_a_forgotten_reader_fail_instead_of_hanging(tmp_path):
    gate = Gate()
    stored, _ = store(tmp_path, 3 * PIECE)
    reader = Reader(1, system=System(read=gate.read))
    read = reader.request(stored, memory(stored.nbytes), 0)
    until(lambda: gate.places)
    del reader
    gate.let()
    with pytest.raises(DiskReadError, match="closed"):
        read.wait()


def test_what_was_read_is_not_held_on_to(tmp_path):
    stored, _ = store(tmp_path, 3 * PIECE)
    for system in (System(), faulty([OSError(errno.EIO, "I/O error")] * 99), faulty([ValueError()] * 99)):
        with Reader(2, system=system) as reader:
            read = reader.request(stored, memory(stored.nbytes), 0)
            try:
                read.wait()
            except DiskReadError:
                pass
            alive = weakref.ref(read)
            del read
            gc.disable()  # no cycles to be found either
            try:
                until(lambda alive=alive: alive() is None)
            finally:
                gc.enable()


def test_time_spent_reading_is_counted_once_however_many_read(tmp_path):
    def read(descriptor, into, offset):
        time.sleep(0.05)
        return preadv(descriptor, into, offset)

    stored, _ = store(tmp_path, 4 * PIECE)
    with Reader(4, system=System(read=read)) as reader:
        fetch(reader, stored)
        assert 0.05 <= reader.counters.seconds < 0.19

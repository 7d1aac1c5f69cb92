"""The reader: what is wrong is never served, and nobody hangs, whatever becomes of disk, threads and callers."""

import ctypes
import errno
import gc
import os
import random
import re
import threading
import time
import weakref

import pytest
from disks import (  # noqa: F401
    PAGE,
    PIECE,
    Gate,
    faulty,
    fetch,
    memory,
    nothing_left_behind,
    preadv,
    small_pieces,
    store,
    until,
)

from diffusers_offload.tiers import digests
from diffusers_offload.tiers import workers as workers_module
from diffusers_offload.tiers.blockfile import Stored
from diffusers_offload.tiers.descriptors import System
from diffusers_offload.tiers.reader import DiskReadError, Reader

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


def test_a_thousand_random_bytes_are_caught(tmp_path):
    """Changed on the way, so that the file stays the same; each reader sees it for the first time."""
    stored, data = store(tmp_path, 3 * PIECE + 100)
    choose = random.Random(0)
    for _ in range(1000):
        place, bit = choose.randrange(len(data)), 1 << choose.randrange(8)

        def read(descriptor, into, offset, place=place + stored.offset, bit=bit):
            count = preadv(descriptor, into, offset)
            if offset <= place < offset + count:
                into[place - offset] ^= bit
            return count

        with Reader(2, system=System(read=read)) as reader:
            assert "digest" in str(error_of(reader, stored))


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
        for part in ("slow.unit", "queued.unit", "distance 7"):
            assert part in text
        assert re.search(r"disk worker \d \(alive\) reading bytes", text)  # whichever came first
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
        until(lambda: not all(worker.thread.is_alive() for worker in reader._workers._workers))
        monkeypatch.undo()
        monkeypatch.setattr(digests, "PIECE", PIECE)
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

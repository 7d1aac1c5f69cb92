"""The reader: right bytes, past the page cache where it can, the urgent first."""

import errno
import fcntl
import os
import threading
import time
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from disks import (  # noqa: F401
    PAGE,
    PIECE,
    Gate,
    descriptors,
    faulty,
    fetch,
    memory,
    nothing_left_behind,
    preadv,
    small_pieces,
    store,
    until,
)
from hypothesis import given, settings
from hypothesis import strategies as st

from diffusers_offload.tiers import digests
from diffusers_offload.tiers import workers as workers_module
from diffusers_offload.tiers.blockfile import Stored
from diffusers_offload.tiers.descriptors import Descriptors, System
from diffusers_offload.tiers.pieces import Destination, reach
from diffusers_offload.tiers.reader import DiskReadError, Reader

DIRECT = getattr(os, "O_DIRECT", 0)


def is_direct(descriptor):
    return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & DIRECT)


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
    middle = Stored(stored.path, PAGE + PIECE, 5000, digests.of_slab([memoryview(part)]))
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


@given(st.integers(0, 10 * PIECE))
def test_pieces_follow_each_other_without_gap(nbytes):
    pieces = digests.cut(nbytes)
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


@given(st.lists(st.integers(0, 3 * PIECE), max_size=6))
def test_a_slabs_digest_does_not_depend_on_where_its_bytes_lie(lengths):
    data = os.urandom(sum(lengths))
    ends = list(accumulate(lengths, initial=0))
    views = [memoryview(data)[start:stop] for start, stop in pairwise(ends)]
    pieces = [digests.of_piece(memoryview(data)[start:stop]) for start, stop in digests.cut(len(data))]
    assert digests.of_slab(views) == digests.of_slab([memoryview(data)])
    assert digests.of_slab(views) == digests.of_pieces(pieces, len(data))


def test_a_worker_that_only_counted_does_not_vouch_for_the_unit(tmp_path, monkeypatch):
    """Of two that end at once, one compares the digest: until it has, the unit has not arrived."""
    stored, _ = store(tmp_path, 2 * PIECE)
    data = stored.path.read_bytes()
    stored.path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    counted, ended = threading.Barrier(2), threading.Event()
    count, finish = workers_module.Workers._is_last, workers_module.Workers._finish

    def is_last(self, task, digest):
        last = count(self, task, digest)
        counted.wait(10)
        if last:
            assert ended.wait(10)
        return last

    def finishing(self, worker, failure):
        last = worker.task.last
        finish(self, worker, failure)
        if not last:
            ended.set()

    monkeypatch.setattr(workers_module.Workers, "_is_last", is_last)
    monkeypatch.setattr(workers_module.Workers, "_finish", finishing)
    with Reader(2) as reader, pytest.raises(DiskReadError, match="digest"):
        fetch(reader, stored)


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


def test_no_more_workers_read_at_once_than_were_asked_for(tmp_path):
    gate = Gate()
    units = [store(tmp_path, 100, f"unit{n}")[0] for n in range(6)]
    with Reader(2, system=System(read=gate.read)) as reader:
        reads = [reader.request(stored, memory(100), n) for n, stored in enumerate(units)]
        for begun in range(2, 7):
            until(lambda begun=begun: len(gate.places) == begun)
            time.sleep(0.01)
            assert len(gate.places) == begun
            gate.let(1)
        gate.let()
        for read in reads:
            read.wait()


def test_the_disk_does_not_stand_still_while_digests_are_compared(tmp_path, monkeypatch):
    hashing, true = threading.Event(), digests.of_piece

    def of_piece(*views):
        assert hashing.wait(20)
        return true(*views)

    units = [store(tmp_path, 2 * PIECE, name) for name in "ab"]
    monkeypatch.setattr(digests, "of_piece", of_piece)
    monkeypatch.setattr(digests, "cores", lambda: 3)
    targets = [memory(2 * PIECE) for _ in units]
    with Reader(1) as reader:
        reads = [reader.request(stored, target) for (stored, _), target in zip(units, targets, strict=True)]
        until(lambda: reader.counters.bytes_read == 4 * PIECE)
        assert not any(read.settled for read in reads)
        hashing.set()
        for read in reads:
            read.wait()
    for target, (_, data) in zip(targets, units, strict=True):
        assert target.numpy().tobytes() == data

"""The checker finds what is wrong, and nothing in what is right."""

import pytest
import torch

from .device import THE

SIZE, STEPS = 1024, 6


class Engine:
    """A small engine that loads pieces into the halves of a flat buffer for a kernel, with all waits this needs.

    Args:
        without: the wait to leave out.
        seed: what is in the pieces.
    """

    def __init__(self, without=None, seed=0):
        self.without = without
        self.load, self.compute = torch.npu.Stream(), torch.npu.Stream()
        self.host = torch.empty(STEPS * SIZE, pin_memory=True)
        self.host.copy_(torch.rand(STEPS * SIZE, generator=torch.Generator().manual_seed(seed)))
        with torch.npu.stream(self.load):
            self.buffer = torch.empty(2 * SIZE, device="npu")
        self.ready, self.done = ([torch.npu.Event() for _ in range(2)] for _ in range(2))

    def wait(self, what, stream, event):
        if what != self.without:
            stream.wait_event(event)

    def run(self):
        results = []
        for step, piece in enumerate(self.host.split(SIZE)):
            halves = self.buffer.split(SIZE)
            with torch.npu.stream(self.load):
                self.wait("done", self.load, self.done[step % 2])
                halves[step % 2].copy_(piece, non_blocking=True)
                if self.without != "record":
                    self.ready[step % 2].record()
            with torch.npu.stream(self.compute):
                self.wait("ready", self.compute, self.ready[step % 2])
                results.append(halves[0 if self.without == "views" else step % 2] * 2)
                self.done[step % 2].record()
        if self.without == "source":
            self.host.zero_()
        if self.without != "results":
            torch.npu.synchronize()
        found = [result.cpu() for result in results]
        torch.npu.synchronize()
        return torch.cat(found)


def found(without=None):
    with THE.checked() as checker:
        Engine(without).run()
    return checker.races


def test_an_engine_with_all_its_waits_is_right():
    assert not found()


@pytest.mark.parametrize(
    ("without", "complaint"),
    [
        ("ready", "read by stream"),
        ("done", "write by stream"),
        ("record", "read by stream"),
        ("views", "is not ordered behind"),
        ("source", "write by the host"),
        ("results", "read by stream"),
    ],
)
def test_an_engine_that_lacks_one_is_not(without, complaint):
    races = found(without)
    assert races
    assert any(complaint in race for race in races)


def test_memory_that_was_freed_too_early():
    """Its next owner, on the stream that it was allocated on, writes while another stream still reads."""
    for waits in (True, False):
        with THE.checked() as checker:
            load, compute = torch.npu.Stream(), torch.npu.Stream()
            with torch.npu.stream(load):
                buffer = torch.ones(SIZE, device="npu")
            compute.wait_stream(load)
            with torch.npu.stream(compute):
                result = buffer * 2
            if waits:
                load.wait_stream(compute)
            del buffer
            with torch.npu.stream(load):
                again = torch.zeros(SIZE, device="npu")
            torch.npu.synchronize()
            assert result.sum().item() == 2 * SIZE
            del again
        assert bool(checker.races) is not waits


def test_the_host_may_read_what_it_has_waited_for():
    for waits in (True, False):
        with THE.checked() as checker:
            host = torch.empty(SIZE, pin_memory=True)
            stream, written = torch.npu.Stream(), torch.npu.Event()
            with torch.npu.stream(stream):
                host.copy_(torch.ones(SIZE, device="npu"), non_blocking=True)
                written.record()
            if waits:
                written.synchronize()
            host.sum()
            torch.npu.synchronize()
        assert bool(checker.races) is not waits


def test_what_is_announced_counts():
    """Writes that torch does not see, `readinto` and the like."""
    with THE.checked() as checker:
        host = torch.empty(SIZE, pin_memory=True)
        device = host.to("npu", non_blocking=True)
        THE.host_access(host.data_ptr(), (host.data_ptr(), host.data_ptr() + 4), True, "readinto")
        torch.npu.synchronize()
        del device
    assert any("readinto" in race for race in checker.races)


def late(seed, without=None):
    """What an engine gives whose work is done late, in memory where another one's lies."""
    Engine(seed=1).run()
    with THE.delayed(seed):
        return Engine(without).run()


@pytest.mark.parametrize("seed", range(20))
def test_late_work_gives_the_same(seed):
    assert torch.equal(late(seed), Engine().run())


@pytest.mark.parametrize("without", ["ready", "done", "views", "record"])
def test_late_work_shows_what_a_missing_wait_does(without):
    expected = Engine().run()
    assert not all(torch.equal(late(seed, without), expected) for seed in range(30))


def test_mixing_devices_raises():
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(3, device="npu") + torch.ones(3)

"""A device that never ends is told of: what was waited for, what is queued, what to do."""

from types import SimpleNamespace

import pytest
import torch
from helpers import warnings_of_ours

from diffusers_offload import streams
from diffusers_offload.streams import GIVE_UP_AFTER, WARN_AFTER, DeviceStreams, InlineEvent, InlineStreams


class Time:
    """A clock that only sleeping, and being asked, moves on."""

    def __init__(self):
        self.now = 0.0
        self.sleeps = []

    def monotonic(self):
        self.now += 1e-6
        return self.now

    def sleep(self, seconds):
        self.sleeps.append(seconds)
        self.now += seconds


class Pending:
    """An event, or a stream, that is done at `when`."""

    def __init__(self, clock, when):
        self.clock, self.when, self.waited = clock, when, False

    def query(self):
        return self.clock.now >= self.when

    def synchronize(self):
        assert self.query(), "the host would wait for ever"
        self.waited = True


class Teller:
    def __init__(self, *units):
        self.units = list(units)

    def under_way(self):
        return self.units


@pytest.fixture
def clock(monkeypatch):
    clock = Time()
    monkeypatch.setattr(streams, "time", clock)
    monkeypatch.setattr(streams, "_LONGEST_SLEEP", 1.0)  # or it would take a million looks
    return clock


@pytest.fixture
def hung(clock):
    """Streams of a device of which `load` never ends."""
    device = object.__new__(DeviceStreams)
    device.device = torch.device("cuda", 0)
    device.tellers = [Teller("transformer.blocks.3 (loading)", "transformer.blocks.2 (in_use)")]
    device.compute, device.evict, device.unpack = (Pending(clock, 0) for _ in range(3))
    device.load = Pending(clock, float("inf"))
    device._raw_stream = None
    device._module = SimpleNamespace(
        current_stream=lambda _: device.compute, synchronize=lambda _: device.load.synchronize()
    )
    return device


def test_what_is_done_costs_one_look(hung, clock):
    event = Pending(clock, 0)
    hung.wait_for(event, "a copy")
    assert event.waited
    assert clock.now == 0


def test_short_waits_do_not_sleep_and_long_ones_overshoot_by_little(hung, clock):
    hung.wait_for(Pending(clock, 1e-4), "a copy")
    assert not clock.sleeps
    hung.wait_for(Pending(clock, clock.now + 0.1), "a copy")
    assert len(clock.sleeps) < 50
    assert clock.now < 0.1002 * 1.25


def test_one_warning_says_what_is_waited_for_and_what_is_queued(hung, clock):
    with warnings_of_ours() as records:
        hung.wait_for(Pending(clock, 4 * WARN_AFTER), "copies of transformer")
    (message,) = (record.getMessage() for record in records)
    for words in (
        "copies of transformer",
        "waited 6",
        "cuda:0",
        "work left: load;",
        "blocks.3 (loading)",
        "blocks.2 (in",
    ):
        assert words in message


@pytest.mark.parametrize("wait", ["for an event", "for all"])
def test_a_wait_that_never_ends_raises_with_remedies(wait, hung, clock):
    waits = {
        "for an event": lambda: hung.wait_for(hung.load, "copies"),
        "for all": lambda: hung.synchronize("copies"),
    }
    with pytest.raises(RuntimeError, match=r"waited 180\d s for copies on cuda:0.*LAUNCH_BLOCKING") as raised:
        waits[wait]()
    assert "GIVE_UP_AFTER" in str(raised.value)
    assert GIVE_UP_AFTER <= clock.now < GIVE_UP_AFTER + 10


def test_a_diagnosis_names_some_units_and_counts_the_rest(hung, clock):
    hung.tellers = [Teller(*(f"blocks.{i} (in_use)" for i in range(30)))]
    with pytest.raises(RuntimeError, match=r"blocks\.7 \(in_use\) and 22 more\."):
        hung.wait_for(hung.load, "copies")


def test_the_cpu_waits_for_nothing():
    device = InlineStreams(torch.device("cpu"))
    device.wait_for(InlineEvent(), "a copy")
    device.synchronize("all")


def test_the_engine_tells_which_units_are_under_way():
    from helpers import build, run

    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    roster = pipe.block_offload._engine.roster
    assert roster in roster.streams.tellers
    assert roster.under_way() == []
    seen = []
    pipe.transformer.transformer_blocks[1].norm1.register_forward_hook(
        lambda *_: seen.append(roster.under_way())
    )
    run(pipe, "flux")
    assert "transformer.transformer_blocks.1 (in_use)" in seen[0]


@pytest.mark.gpu
def test_a_wait_for_a_real_event_ends():
    device = streams.open_streams(streams.find_device("cuda"))
    before = device.switch(device.load)
    try:
        torch.cuda._sleep(100_000_000)
        event = device.event()
        event.record(device.load)
    finally:
        device.restore(before)
    device.wait_for(event, "a kernel that sleeps")
    assert event.query()
    device.synchronize()

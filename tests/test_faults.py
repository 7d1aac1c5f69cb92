"""Whatever fails, the error is clear, the next call is right to the bit, and nothing leaks."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest
import torch
from faults import PLACES, STEPS, Subject, Tally, failing, resident_bytes, spread

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="counts files as Linux shows them")

# Where a fault is tried at every pass, or at many; elsewhere at some. The first and the last are always among them.
EVERYWHERE = ("device memory", "host memory", "a copy to the device", "moving in", "moving out")
AT_MOST_THERE, AT_MOST = 12, 4
OTHERS = (("flux", "phase"), ("flux", "leaf"), ("wan22", "block"), ("sdxl-controlnet", "block"))


@functools.cache
def subject_of(name, device):
    return Subject(name, device)


@pytest.fixture(autouse=True, scope="module")
def forget_subjects():
    yield
    subject_of.cache_clear()


def live_through_faults(name, granularity, what, device, most, times=1, **options):
    """Live through the fault at up to `most` passes, and see that all is given back."""
    tally = Tally()
    with tally.following():
        subject, place = subject_of(name, device), PLACES[what]
        passes = subject.passes(place, granularity, **options)
        numbers = spread(passes[STEPS[-1]], most)
        if not numbers:
            pytest.skip(
                "not passed on this device: no thread is started for the CPU, an NPU's memory is torch's own"
            )
        before = tally.now()
        for at in numbers:
            fault = subject.live_through(place, at, granularity, times, **options)
            assert fault.raised, f"fault {at} of {passes} did not happen"
            del fault  # its errors know the frames that they went through
        if what == "moving out":  # without memory for copies weights stayed where they were moved
            for step in STEPS:
                subject.step(step, granularity, **options)
        assert tally.now() == before


@pytest.mark.parametrize("what", PLACES)
def test_the_pipeline_lives_through(what, device):
    most = AT_MOST_THERE if what in EVERYWHERE else AT_MOST
    live_through_faults("flux", "block", what, device, most)


@pytest.mark.parametrize("what", EVERYWHERE)
@pytest.mark.parametrize(("name", "granularity"), OTHERS)
def test_other_pipelines_live_through(name, granularity, what, device):
    live_through_faults(name, granularity, what, device, most=2)


@pytest.mark.parametrize("granularity", ["block", "phase", "leaf"])
@pytest.mark.parametrize("what", ["device memory", "host memory", "a copy to the device"])
def test_it_lives_through_a_place_that_fails_for_a_while(what, granularity, device):
    live_through_faults("flux", granularity, what, device, most=3, times=4)


@pytest.mark.parametrize("what", ["device memory", "a copy to the device", "a matrix product"])
def test_it_lives_through_with_residents(what, device):
    live_through_faults("flux", "block", what, device, most=6, offload_ratio=0.5)


def test_many_faults_take_no_memory(device):
    subject, place = subject_of("flux", device), PLACES["a copy to the device"]
    after = []
    for number in range(30):
        subject.live_through(place, number, "block")
        if number in (9, 29):
            after.append(resident_bytes())
    assert (
        after[1] - after[0] < 16 * 2**20
    )  # the weights are 4 MB: one set of them for each fault would be 80


def test_without_memory_for_copies_disabling_leaves_weights_where_they_were_moved():
    subject, place = subject_of("flux", "cpu"), PLACES["moving out"]
    for step in STEPS[:-1]:
        subject.step(step, "block")
    with failing(place, 0, times=1000):
        subject.step("disable", "block")
    subject.assert_plain(shared=True)
    for step in STEPS:
        subject.step(step, "block")
    subject.assert_plain()


def test_an_error_about_host_memory_names_a_remedy():
    subject = subject_of("flux", "cpu")
    with failing(PLACES["host memory"], 3), pytest.raises(MemoryError, match="max_host_memory") as raised:
        subject.step("enable", "block")
    assert isinstance(raised.value.__cause__, OSError)


def test_a_copy_that_failed_does_not_spoil_the_report():
    subject = subject_of("flux", "cpu")
    subject.step("enable", "block")
    handle = subject.pipe.block_offload
    with handle.measured(), failing(PLACES["a copy to the device"], 7), pytest.raises(RuntimeError):
        subject.step("call", "block")
    assert handle.report().transfer_ms is not None
    subject.step("disable", "block")


class Pinning:
    """Streams of the CPU that pass for those of an accelerator, so that host memory is prepared on threads."""

    asynchronous = True
    device = torch.device("cuda", 0)


@pytest.mark.parametrize("refused", range(2))
def test_without_threads_memory_is_prepared_in_turn(refused, monkeypatch):
    from diffusers_offload.tiers.pinned import PinnedTier

    monkeypatch.setattr(PinnedTier, "_register", lambda *_: True)
    tier = PinnedTier(Pinning())
    sizes = [5000, 3, 20000, 7, 1]
    with failing(PLACES["a thread"], refused, times=1000) as fault:
        found = [memory.bytes.numel() for memory in tier.prepare(sizes)]
    assert fault.raised
    assert found == sizes

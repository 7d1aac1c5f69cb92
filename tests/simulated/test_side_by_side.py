"""Pipelines that threads run at the same time: whenever they change hands, nothing races."""

from collections import deque
from collections.abc import Callable
from random import Random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from helpers import build, run

from diffusers_offload import hooks
from diffusers_offload.inputs import tensors_of_output
from diffusers_offload.streams import open_streams

from .device import THE

STEPS = {"num_inference_steps": 4}


class SideBySide:
    """Jobs that change hands at each `change`, as threads might anywhere.

    Each has what a thread has for itself: a current stream. Who goes on is drawn.
    """

    def __init__(self, seed: int) -> None:
        self._random = Random(seed)
        self._hub = getcurrent()
        self._now: list[Any] = []  # where the job that runs goes on, and its current stream

    def run(self, *jobs: Callable[[], Any]) -> list[Any]:
        """What the jobs return."""
        results: dict[int, Any] = {}
        going = []
        for number, job in enumerate(jobs):
            going.append([greenlet(lambda n=number, j=job: results.update({n: j()})), THE.current])
        outside = THE.current
        try:
            while going:
                self._now = self._random.choice(going)
                THE.current = self._now[1]
                self._now[0].switch()
                going = [job for job in going if not job[0].dead]
        finally:
            THE.current = outside
        return [results[number] for number in range(len(jobs))]

    def change(self, chance: float = 1.0) -> None:
        if self._random.random() < chance:
            self._now[:] = getcurrent(), THE.current
            self._hub.switch()


@pytest.mark.parametrize(("seed", "pair_passes"), [(1, None), (2, False)])
def test_nothing_races(seed, pair_passes, monkeypatch):
    """A result is freed as soon as it was read, while another forward on the same stream is under way."""
    pipes = [build("wan", device="npu") for _ in range(2)]
    expected = run(pipes[0], "wan", **STEPS)
    both = SideBySide(seed)
    begin = hooks.UnitHook.pre_forward

    def begin_of_a_unit(self: hooks.UnitHook, module: Any, *args: Any, **kwargs: Any) -> Any:
        both.change(0.1)
        return begin(self, module, *args, **kwargs)

    with THE.checked() as checker, torch.no_grad():
        for pipe in pipes:
            pipe.to("cpu").enable_block_offload(device="npu", offload_ratio=1.0, pair_passes=pair_passes)
            pipe.scheduler.step = handing_over(pipe.scheduler.step, both)
        monkeypatch.setattr(hooks.UnitHook, "pre_forward", begin_of_a_unit)
        found = both.run(*(lambda pipe=pipe: run(pipe, "wan", **STEPS) for pipe in pipes))
        paired = [pipe.block_offload.report().paired for pipe in pipes]
        for pipe in pipes:
            pipe.disable_block_offload()
    assert all(torch.equal(result, expected) for result in found)
    assert all(paired) == (pair_passes is None)
    assert not checker.races, "\n".join(checker.races[:5])


def test_results_of_any_kind_are_lent():
    """Memory of whatever a forward returned stays until its reader is done; what is on the host is none."""

    class Slotted:
        __slots__ = "tensor"  # as a string, too

    streams = open_streams(torch.device("npu", 0))
    with torch.npu.stream(streams.compute):
        made = [torch.ones(n, device="npu") for n in range(1, 7)]
    slotted, plain = Slotted(), SimpleNamespace(tensor=made[1], module=torch, own=None)
    slotted.tensor, plain.own = made[0], plain
    output = {
        "a": [slotted, (plain,)],
        "b": {made[2]},
        "c": deque([[[[made[3]]]]]),
        "d": (made[4], torch.ones(1)),
    }
    sparse = torch.ones(3).to_sparse()
    assert {id(t) for t in tensors_of_output(output)} >= {id(tensor) for tensor in made[:5]}
    streams.lend([*tensors_of_output(output), sparse])
    users = [bool(THE.memory.live[t.untyped_storage().data_ptr()].users) for t in made]
    assert users == [True] * 5 + [False]


def handing_over(step: Callable[..., Any], both: SideBySide) -> Callable[..., Any]:
    def stepping(*args: Any, **kwargs: Any) -> Any:
        both.change()
        result = step(*args, **kwargs)
        both.change()
        return result

    return stepping

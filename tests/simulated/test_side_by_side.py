"""Pipelines that threads run at the same time: whenever they change hands, nothing races."""

from collections.abc import Callable
from random import Random
from typing import Any

import pytest
import torch
from greenlet import getcurrent, greenlet
from helpers import build, run

from .device import THE


class SideBySide:
    """Jobs that change hands as threads might: between forwards of modules now and then, and at each `change`.

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
        hook = torch.nn.modules.module.register_module_forward_pre_hook(lambda *_: self.change(0.05))
        try:
            while going:
                self._now = self._random.choice(going)
                THE.current = self._now[1]
                self._now[0].switch()
                going = [job for job in going if not job[0].dead]
        finally:
            THE.current = outside
            hook.remove()
        return [results[number] for number in range(len(jobs))]

    def change(self, chance: float = 1.0) -> None:
        if self._random.random() < chance:
            self._now[:] = getcurrent(), THE.current
            self._hub.switch()


@pytest.mark.parametrize("seed", [1, 2])
def test_nothing_races(seed):
    """A result is freed as soon as it was read, while another forward on the same stream is under way."""
    pipes = [build("wan", device="npu") for _ in range(2)]
    expected = run(pipes[0], "wan")
    both = SideBySide(seed)
    with THE.checked() as checker, torch.no_grad():
        for pipe in pipes:
            pipe.to("cpu").enable_block_offload(device="npu", offload_ratio=1.0)
            pipe.scheduler.step = handing_over(pipe.scheduler.step, both)
        found = both.run(*(lambda pipe=pipe: run(pipe, "wan") for pipe in pipes))
        for pipe in pipes:
            pipe.disable_block_offload()
    assert all(torch.equal(result, expected) for result in found)
    assert not checker.races, "\n".join(checker.races[:5])


def handing_over(step: Callable[..., Any], both: SideBySide) -> Callable[..., Any]:
    def stepping(*args: Any, **kwargs: Any) -> Any:
        both.change()
        result = step(*args, **kwargs)
        both.change()
        return result

    return stepping

"""A small model that is called several times a step, as guidance does, and what calls it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import nn

import diffusers_offload

WIDTH = 24


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.two = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x, prompt):
        return x + self.two(torch.tanh(self.one(x) + prompt))


class Net(nn.Module):
    """Blocks that mix `x` with `prompt`, at `time`."""

    def __init__(self, blocks=4, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.out = nn.Linear(WIDTH, WIDTH)
        self.eval()

    def begin(self, x, prompt):
        """For those who do something at the beginning."""
        return x, prompt

    def end(self, x):
        """For those who do something at the end."""
        return x

    def forward(self, x, time, prompt, options=None):
        x, prompt = self.begin(x + time, prompt)
        for number, block in enumerate(self.blocks):
            if options and number in options.get("skip", ()):
                continue
            x = block(x, prompt)
        return self.end(self.out(x))


class Loop:
    """Denoises as pipelines do: every step calls the model once for each prompt, with the same latents and time.

    Args:
        between: is called with the loop and the number of the step before each step but the first.
        time_of: what the model is given for the time; computed for each call.
    """

    def __init__(
        self, prompts=2, between: Callable | None = None, time_of: Callable | None = None, **options
    ):
        generator = torch.Generator().manual_seed(1)
        self.latents = torch.randn(3, WIDTH, generator=generator)
        self.prompts = [torch.randn(1, WIDTH, generator=generator) for _ in range(prompts)]
        self.given = list(range(prompts))  # the prompts that are used, in this order
        self.options = options
        self.between = between
        self.time_of = time_of or (lambda time: time)
        self.bytes: list[int] = []

    def run(self, net, steps=6, handle=None):
        """The latents after each step."""
        made = []
        for step in range(steps):
            if step and self.between is not None:
                self.between(self, step)
            time = torch.tensor([step / 10])
            results = [self.call(net, time, number) for number in self.given]
            weights = [1.5, -0.5, 0.25, 0.125, -0.25][: len(results)]
            self.latents = sum(w * result for w, result in zip(weights, results, strict=True))
            made.append(self.latents)
            if handle is not None:
                self.bytes.append(handle.report().bytes_loaded)
        return torch.stack(made)

    def call(self, net, time, number):
        return net(self.latents, self.time_of(time), self.prompts[number], **self.options)

    @property
    def per_step(self) -> list[int]:
        """Bytes loaded in each step but the first."""
        return [after - before for before, after in pairwise(self.bytes)]


class Disturbed(Loop):
    """Something happens between the two calls of step 4."""

    def __init__(self, disturb, after=None):
        super().__init__()
        self.disturb, self.after = disturb, after

    def call(self, net, time, number):
        if number == 0 and round(float(time) * 10) == 5 and self.after is not None:
            self.after(self, net)
        if number == 1 and round(float(time) * 10) == 4:
            self.disturb(self, net)
        return super().call(net, time, number)


def offload(net, **arguments):
    arguments = {"device": "cpu", "offload_ratio": 1.0, **arguments}
    return diffusers_offload.enable_block_offload(net, **arguments)


def compare(make_net, make_loop=Loop, steps=6, **arguments):
    """Run resident and offloaded; they must be equal. Returns the report, and the loop of the latter."""
    with torch.no_grad():
        net, loop = make_net(), make_loop()
        expected = loop.run(net, steps)
        net, loop = make_net(), make_loop()
        handle = offload(net, **arguments)
        with handle.calling():
            got = loop.run(net, steps, handle)
        report = handle.report()
        handle.disable()
    assert expected.isfinite().all()
    assert torch.equal(got, expected)
    return report, loop

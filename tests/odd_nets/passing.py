"""What goes into a block and comes out of it: its own weights, dataclasses, generators, all kinds of arguments."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from .base import WIDTH, Net, Plain


class GivesParameter(Plain):
    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.randn(3, WIDTH))

    def forward(self, x):
        return super().forward(x), self.table


class GivesView(GivesParameter):
    def forward(self, x):
        return Plain.forward(self, x), self.table[:2].T


class GivesBuffer(Plain):
    def __init__(self):
        super().__init__()
        self.register_buffer("positions", torch.randn(3, WIDTH))

    def forward(self, x):
        return super().forward(x), self.positions[None]


class UsesGifts(Net):
    """What blocks gave of their own weights is used after all of them have run."""

    def run(self, x, step):
        gifts = []
        for block in self.blocks:
            x, gift = block(x)
            gifts.append(gift)
        return x + sum(gift.sum() * (i + 1) for i, gift in enumerate(gifts))


class GivesInput(Plain):
    def forward(self, x):
        return x


class WritesInput(Plain):
    def forward(self, x):
        return x.add_(super().forward(x))


@dataclass
class Given:
    sample: torch.Tensor
    extra: torch.Tensor


class GivesDataclass(Plain):
    def forward(self, *, given: Given):
        return Given(super().forward(given.sample), self.a(given.extra))


class PassesDataclass(Net):
    def run(self, x, step):
        given = Given(x, x)
        for block in self.blocks:
            given = block(given=given)
        return given.sample + given.extra


class GivesDict(Plain):
    def forward(self, *, values: dict[str, Any]):
        return {"deep": [super().forward(values["deep"][0]), (values["deep"][1],)]}


class PassesDict(Net):
    def run(self, x, step):
        values = {"deep": [x, (x,)]}
        for block in self.blocks:
            values = block(values=values)
        return values["deep"][0]


class Generates(Plain):
    """A generator: it computes when it is asked, after its forward has returned."""

    def forward(self, x) -> Iterator[torch.Tensor]:
        x = self.a(x)
        yield x
        yield self.c(torch.tanh(F.linear(x, self.b.weight, self.b.bias)))


class Collects(Net):
    def run(self, x, step):
        for block in self.blocks:
            x = sum(block(x))
        return x


class CollectsLate(Net):
    def run(self, x, step):
        generators = [block(x) for block in self.blocks]
        return sum(part for generator in generators for part in generator)


class ManyArguments(Plain):
    def forward(self, x, *rest, scale: float = 1.0, **more):
        return super().forward(x) * scale + sum(rest) + sum(more.values())


class PassesMany(Net):
    def run(self, x, step):
        for block in self.blocks:
            x = block(x, x, x, scale=0.5, a=x, b=1)
        return x

"""Who runs whom: blocks in blocks, lists in lists, run twice, in another order, or not at all."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .base import WIDTH, Net, Plain


class Recursive(Plain):
    def forward(self, x, depth: int = 2):
        x = super().forward(x)
        return self(x, depth - 1) * self.a.weight[0] if depth else x


class CallsAnother(Plain):
    """Runs a block of the list in its middle, one that it does not own."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.hidden = [other]

    def forward(self, x):
        return self.c(self.b(self.hidden[0](self.a(x))))


class Owns(Plain):
    """Has a block of the list among its own children as well."""

    def __init__(self, other: nn.Module):
        super().__init__()
        self.other = other

    def forward(self, x):
        return self.c(self.b(self.other(self.a(x))))


class Chain(Plain):
    """Each block runs the next from within: all of them are under way at once."""

    def __init__(self):
        super().__init__()
        self.following: list[nn.Module] = []

    def forward(self, x):
        x = self.a(x)
        for block in self.following:
            x = block(x)
        return self.c(torch.tanh(self.b(x)))


class Chained(Net):
    def __init__(self):
        super().__init__(*(Chain() for _ in range(5)))
        for block, following in zip(self.blocks, list(self.blocks)[1:], strict=False):
            block.following.append(following)

    def run(self, x, step):
        return self.blocks[0](x)


class Wrapped(nn.Module):
    def __init__(self, block: nn.Module):
        super().__init__()
        self.block = block

    def forward(self, *args: Any, **kwargs: Any):
        return self.block(*args, **kwargs)


class Passing(Wrapped):
    """Takes attributes that it does not have from what it wraps."""

    def __getattr__(self, name: str):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("block"), name)


class Stages(Net):
    """Lists in lists, in a Sequential and in a ModuleDict."""

    def __init__(self):
        super().__init__(Plain(), Plain())
        self.lists = nn.ModuleList([nn.ModuleList([Plain(), Plain()]), nn.ModuleList([Plain()])])
        self.sequential = nn.Sequential(Plain(), nn.Sequential(Plain(), nn.Tanh()), Plain())
        self.by_name = nn.ModuleDict({"one": nn.ModuleList([Plain(), Plain()]), "two": Plain()})

    def run(self, x, step):
        for block in (*self.lists[0], *self.lists[1], *self.blocks):
            x = block(x)
        x = self.sequential(x)
        for block in (*self.by_name["one"], self.by_name["two"]):
            x = block(x)
        return x


class SequentialBlocks(Net):
    def __init__(self):
        super().__init__(*(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh(), Plain()) for _ in range(4)))


class Twice(Net):
    def __init__(self):
        super().__init__(*(Plain() for _ in range(4)))

    def run(self, x, step):
        for block in (*self.blocks, *self.blocks):
            x = block(x)
        return x


class SameBlockManyTimes(Net):
    """The list holds one block at several places."""

    def __init__(self):
        one, two = Plain(), Plain()
        super().__init__(one, two, one, Plain(), two)


class SometimesRun(Net):
    """One list never runs, one from the third step on, one in every second."""

    def __init__(self):
        super().__init__(*(Plain() for _ in range(3)))
        self.never = nn.ModuleList([Plain(), Plain()])
        self.late = nn.ModuleList([Plain(), Plain(), Plain()])
        self.odd = nn.ModuleList([Plain(), Plain()])

    def run(self, x, step):
        for block in (*self.blocks, *(self.late if step >= 2 else ()), *(self.odd if step % 2 else ())):
            x = block(x)
        return x


class Reordered(Net):
    """Puts its list in another order before each step, as a list of other objects."""

    def __init__(self):
        super().__init__(*(Plain() for _ in range(5)))

    def run(self, x, step):
        self.blocks = nn.ModuleList([self.blocks[i] for i in (3, 0, 4, 2, 1)])
        return super().run(x, step)

"""Weights that change while they are used, or lie oddly."""

from __future__ import annotations

import torch
from torch import nn

from .base import WIDTH, Plain


class Counts(Plain):
    """Buffers that each forward writes to, in place and by `copy_`."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(WIDTH))
        self.register_buffer("calls", torch.tensor(0))
        self.register_buffer("latest", torch.zeros(WIDTH))

    def forward(self, x):
        self.mean.mul_(0.9).add_(x.mean((0, 1)))
        self.calls += 1
        self.latest.copy_(x[0, 0])
        return super().forward(x) + self.mean * self.calls + self.latest


class Replaces(Plain):
    """A buffer in whose place each forward puts another."""

    def __init__(self):
        super().__init__()
        self.register_buffer("latest", torch.zeros(WIDTH))

    def forward(self, x):
        self.latest = self.latest * 0.5 + x[0, 1]
        return super().forward(x) + self.latest


class Normalised(Plain):
    """A BatchNorm that keeps its running statistics while it runs."""

    def __init__(self):
        super().__init__()
        self.norm = nn.BatchNorm1d(3)

    def forward(self, x):
        self.norm.train()
        return super().forward(x + self.norm(x))


class Odd(Plain):
    """Weights of every kind that is dense: empty, expanded, strided, of all dtypes, scalars, slices."""

    def __init__(self):
        super().__init__()
        self.empty = nn.Parameter(torch.empty(0, WIDTH))
        self.expanded = nn.Parameter(torch.randn(1, WIDTH).expand(3, WIDTH))
        self.strided = nn.Parameter(torch.randn(WIDTH, 4).T[::2])
        self.scalar = nn.Parameter(torch.tensor(0.3))
        self.precise = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.float64))
        self.coarse = nn.Parameter(torch.randn(5, WIDTH, dtype=torch.bfloat16))
        self.turns = nn.Parameter(torch.randn(WIDTH, dtype=torch.complex64))
        whole = torch.randn(10, WIDTH)
        self.left, self.right = nn.Parameter(whole[1:4]), nn.Parameter(whole[3:9:2])
        self.register_buffer("mask", torch.rand(WIDTH) > 0.3)
        self.register_buffer("index", torch.randperm(WIDTH))
        self.register_buffer("nothing", None)
        self.conv = nn.Conv2d(4, 4, 3, padding=1).to(memory_format=torch.channels_last)

    def forward(self, x):
        x = super().forward(x)[..., self.index] * self.mask + self.expanded.sum(0) * self.scalar
        x = (
            x
            + self.strided.sum(0)
            + self.empty.sum(0)
            + self.precise.sum(0).float()
            + self.coarse.sum(0).float()
        )
        x = x + self.turns.real + self.turns.angle() + self.left.sum(0) - self.right.prod(0)
        return x + self.conv(x[:, :, None, :].reshape(2, 4, 3, 4)).reshape(x.shape)


class OnlyBuffers(nn.Module):
    """Hardly anything but a buffer."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.rand(1))
        self.register_buffer("matrix", torch.randn(WIDTH, WIDTH))

    def forward(self, x):
        return torch.tanh(x @ self.matrix) * self.scale


class WithBuffersOnly(Plain):
    """A child has nothing but a buffer, which is larger than any parameter."""

    def __init__(self):
        super().__init__()
        self.only = OnlyBuffers()

    def forward(self, x):
        return self.only(super().forward(x))


class HoldsList(Plain):
    def __init__(self):
        super().__init__()
        self.tables = nn.ParameterList(nn.Parameter(torch.randn(WIDTH)) for _ in range(3))
        self.named = nn.ParameterDict({"x": nn.Parameter(torch.randn(WIDTH))})

    def forward(self, x):
        x = x * self.tables[0]
        x = super().forward(x) + self.tables[1] * self.named["x"]
        return x + self.tables[2]


class Begins(Plain):
    """Its own weights are used at the beginning, in the middle and at the end."""

    def __init__(self):
        super().__init__()
        self.first, self.middle, self.last = (nn.Parameter(torch.randn(WIDTH)) for _ in range(3))

    def forward(self, x):
        return self.c(self.b(self.a(x * self.first)) * self.middle.repeat(2)) + self.last


class BeginsEarly(Begins):
    """Looks at its weights once, at the beginning."""

    def forward(self, x):
        first, middle, last = torch.stack([self.first, self.middle, self.last]).unbind()
        return self.c(self.b(self.a(x * first)) * middle.repeat(2)) + last


class ViewsEarly(Begins):
    """Takes views of its own weights at the beginning, and uses them at the end."""

    def forward(self, x):
        first, middle, last = self.first[None], self.middle.view(-1), self.last.reshape(1, -1)
        return self.c(self.b(self.a(x * first)) * middle.repeat(2)) + last


class KeepsView(Plain):
    """Takes a view of a layer's weight at the beginning, and uses it after that layer and others ran."""

    def forward(self, x):
        turned = self.b.weight.T
        return super().forward(x) + (x @ turned)[..., :WIDTH]

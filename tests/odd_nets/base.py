"""What the odd ones are made from: a plain block, a net that runs its blocks, and the steps that it takes."""

from __future__ import annotations

import torch
from torch import nn

WIDTH = 16


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Plain(nn.Module):
    """Two layers, the second twice as wide, so that units differ in size."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, 2 * WIDTH),
            nn.Linear(2 * WIDTH, WIDTH),
        )

    def forward(self, x, *_):
        return torch.tanh(x + self.c(torch.tanh(self.b(self.a(x)))))


class Net(nn.Module):
    """Runs its blocks one after the other."""

    def __init__(self, *blocks: nn.Module):
        super().__init__()
        self.embed, self.blocks, self.out = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(blocks),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x, step: int = 0):
        return self.out(self.run(self.embed(x), step))

    def run(self, x, step):
        for block in self.blocks:
            x = block(x)
        return x


STEPS = [
    lambda module, device, step=step: module(_noise(2, 3, WIDTH, seed=step).to(device), step=step)
    for step in range(4)
]

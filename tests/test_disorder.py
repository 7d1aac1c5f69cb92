"""Blocks that are skipped, run again, called by each other and built in every odd way: equal to the bit."""

from __future__ import annotations

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from poison import check
from torch import nn

GRANULARITIES = ("block", "phase", "leaf")
RATIOS = (0.0, 0.3, 1.0)
WIDTH = 16


# --- synthetic blocks in random order ----------------------------------------------------------------------


class Block(nn.Module):
    """An attention-like and a feed-forward part of any size, and weights of the block's own in between."""

    def __init__(self, hidden: int = WIDTH, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.first = nn.Parameter(torch.randn(WIDTH))
        self.attn = nn.Sequential(nn.Linear(WIDTH, hidden), nn.Tanh(), nn.Linear(hidden, WIDTH))
        self.middle = nn.Parameter(torch.randn(WIDTH))
        self.ff = nn.Sequential(nn.Linear(WIDTH, 2 * hidden), nn.Tanh(), nn.Linear(2 * hidden, WIDTH)).to(
            dtype
        )
        self.last = nn.Parameter(torch.randn(WIDTH))

    def forward(self, x):
        y = self.attn(x * self.first) * self.middle
        y = self.ff(y.to(self.ff[0].weight.dtype)).to(x.dtype)
        return torch.tanh(x + y * self.last)


class Scheduled(nn.Module):
    """Runs its blocks in the order that it is told."""

    def __init__(self, blocks):
        super().__init__()
        self.embed, self.blocks, self.out = (
            nn.Linear(WIDTH, WIDTH),
            nn.ModuleList(blocks),
            nn.Linear(WIDTH, WIDTH),
        )

    def forward(self, x, order):
        x = self.embed(x)
        for number in order:
            x = self.blocks[number](x)
        return self.out(x)


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _in_order(order):
    return lambda module, device: module(_noise(3, WIDTH).to(device), order=order)


_DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])
_BLOCKS = st.lists(st.tuples(st.integers(1, 80), _DTYPES), min_size=2, max_size=7)
_ORDERS = st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=3, max_size=6)


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=_BLOCKS, orders=_ORDERS, granularity=st.sampled_from(GRANULARITIES), ratio=st.sampled_from(RATIOS)
)
def test_blocks_of_any_size_in_any_order(blocks, orders, granularity, ratio, device):
    torch.manual_seed(0)
    module = Scheduled(Block(*block) for block in blocks)
    orders = [[number % len(blocks) for number in order] for order in orders]
    orders = [range(len(blocks)), *orders]  # see test_a_block_first_run_late_...
    check(module, [_in_order(order) for order in orders], granularity, ratio, device)

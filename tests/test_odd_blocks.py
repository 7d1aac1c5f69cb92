"""Blocks built and used in every odd way that Python allows: equal to the bit, at each granularity."""

from __future__ import annotations

import pytest
import torch
from odd_nets import NETS, REPLACE_WEIGHTS, STEPS
from poison import check

GRANULARITIES = ("block", "phase", "leaf")

KEPT = "a view kept from one forward to the next looks at bytes that are others' by then"
LATE = "nobody watches any longer when the parent first uses a weight past its block"
DEFECTS: dict[str, tuple[str, tuple[str, ...]]] = {
    "a view kept for ever": (KEPT, ("phase",)),
    "a stray from the third step on": (LATE, GRANULARITIES),
}


@pytest.mark.parametrize("name", [name for name in NETS if len(DEFECTS.get(name, ("", ()))[1]) < 3])
def test_odd_blocks(name, device):
    for granularity in GRANULARITIES:
        if granularity not in DEFECTS.get(name, ("", ()))[1]:
            _check(name, granularity, device)


@pytest.mark.parametrize(
    ("name", "granularity"),
    [(name, each) for name, (_, granularities) in DEFECTS.items() for each in granularities],
)
def test_known_defects(name, granularity, device, request):
    reason = DEFECTS[name][0]
    if device == "cpu" or reason is not LATE:  # on an accelerator the forward fails, and is run again
        # What a view that was kept looks at is a matter of luck.
        request.applymarker(pytest.mark.xfail(strict=reason is not KEPT, reason=reason))
    _check(name, granularity, device)


def _check(name: str, granularity: str, device: str) -> None:
    torch.manual_seed(0)
    with torch.no_grad():
        check(NETS[name](), STEPS, granularity, device=device, poison=name not in REPLACE_WEIGHTS)

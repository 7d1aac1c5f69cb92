"""Any policy for any component, in any mixture and after any other: equal to the bit."""

from __future__ import annotations

import functools
import random

import pytest
import torch
import zoo
from helpers import no_weight_used_while_offloaded
from poison import poisoned
from test_zoo import run
from torch import nn

from diffusers_offload import OffloadPolicy
from diffusers_offload.units import dissect

PIPELINES = [  # of different kinds, with components of different kinds
    "sd",
    "kandinsky-combined",
    "hidream",
    "wan-vace",
    "cascade-decoder",
    "kandinsky5",
    "z-image-controlnet",
    "lumina2",
    "audioldm2",
    "sd3-controlnet",
]
STREAMING = ("block", "phase", "leaf")


@functools.cache
def resident(name: str, device: str) -> torch.Tensor:
    return run(zoo.build(name, device=device), name, device)


def modules_of(pipe) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def mixture(pipe, draw: random.Random) -> dict[str, str | OffloadPolicy]:
    """A policy for some of the components, of those that it can have."""
    policies = {}
    for name, module in modules_of(pipe).items():
        streaming = [each for each in STREAMING if dissect(module, each).parts]
        words = draw.choice([("resident", "model"), streaming or ("model",)])
        ratio = draw.choice([0.0, 0.3, 0.5, 1.0])
        choice = draw.choice(words)
        if choice in STREAMING and draw.random() < 0.7:
            choice = OffloadPolicy(choice, ratio)
        if draw.random() < 0.8:
            policies[name] = choice
    return policies


def assert_equal(pipe, name: str, device: str, what: object) -> None:
    assert torch.equal(run(pipe, name, device), resident(name, device)), what


@pytest.mark.parametrize("name", PIPELINES)
def test_mixed_policies_one_after_the_other(name, device):
    draw = random.Random(name)
    pipe = zoo.build(name)
    for number in range(3):  # without disabling in between
        default, policies = draw.choice(STREAMING), mixture(pipe, draw)
        what = f"{default}, {policies}"
        pipe.enable_block_offload(device=device, offload_granularity=default, components=policies)
        for plan in pipe.block_offload.plan.components:
            if plan.name in policies and isinstance(policies[plan.name], OffloadPolicy):
                assert plan.policy == policies[plan.name]
        assert_equal(pipe, name, device, what)
        if number == 0:
            assert_equal(pipe, name, device, what)
            with no_weight_used_while_offloaded(pipe, but=zoo.PIPELINES[name].reads):
                assert_equal(pipe, name, device, what)
        with poisoned(pipe.block_offload, but=zoo.PIPELINES[name].reads):
            assert_equal(pipe, name, device, f"what is not loaded being NaN: {what}")
    pipe.disable_block_offload()
    pipe.to(device)
    assert_equal(pipe, name, device, "disabled")


@pytest.mark.parametrize("first", [*STREAMING, "model", "resident"])
@pytest.mark.parametrize("name", ["sd", "z-image-controlnet"])
def test_enable_run_disable_run_and_again(name, first, device):
    pipe = zoo.build(name)
    for granularity in (first, *STREAMING):
        pipe.enable_block_offload(device=device, offload_granularity=granularity)
        assert_equal(pipe, name, device, granularity)
        pipe.disable_block_offload()
        pipe.to(device)
        assert_equal(pipe, name, device, f"resident after {granularity}")
        pipe.to("cpu")


@pytest.mark.parametrize("name", ["sd", "hidream"])
def test_enabled_anew_before_the_first_has_run(name, device):
    pipe = zoo.build(name)
    for granularity in (*STREAMING, "resident", "model", "leaf"):
        pipe.enable_block_offload(device=device, offload_granularity=granularity)
    assert_equal(pipe, name, device, "the last one counts")
    assert {plan.policy.granularity for plan in pipe.block_offload.plan.components} <= {"leaf", "model"}

"""Blocks that are skipped, run again, called by each other and built in every odd way: equal to the bit."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from diffusers import DiffusionPipeline, LayerSkipConfig
from diffusers.hooks.layer_skip import apply_layer_skip
from helpers import build
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from poison import check, poisoned
from torch import nn

from diffusers_offload import OffloadPolicy

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


class Stop(Exception):
    pass


class Scheduled(nn.Module):
    """Runs its blocks in the order that it is told; what is no number of a block makes it fail there."""

    dtype = torch.float32  # which pipelines ask for

    @property
    def device(self) -> torch.device:
        return self.embed.weight.device

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
            if number >= len(self.blocks):
                raise Stop
            x = self.blocks[number](x)
        return self.out(x)


def _noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _in_order(order, inference: bool = False):
    def step(module, device):
        try:
            with torch.inference_mode(inference):
                return module(_noise(3, WIDTH).to(device), order=order)
        except Stop:
            return torch.zeros(1)

    return step


_DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16, torch.float64])
_BLOCKS = st.lists(st.tuples(st.integers(1, 80), _DTYPES), min_size=2, max_size=7)
_ORDERS = st.lists(st.lists(st.integers(0, 99), max_size=12), min_size=3, max_size=6)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    blocks=_BLOCKS, orders=_ORDERS, granularity=st.sampled_from(GRANULARITIES), ratio=st.sampled_from(RATIOS)
)
def test_blocks_of_any_size_in_any_order(blocks, orders, granularity, ratio, device):
    torch.manual_seed(0)
    module = Scheduled(Block(*block) for block in blocks)
    orders = [[number % len(blocks) for number in order] for order in orders]
    orders = [range(len(blocks)), *orders]  # units that run late are another matter: see test_odd_blocks
    check(module, [_in_order(order) for order in orders], granularity, ratio, device)


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    orders=st.lists(
        st.tuples(st.lists(st.integers(0, 5), max_size=10), st.booleans()), min_size=3, max_size=6
    ),
    granularity=st.sampled_from(GRANULARITIES),
    ratio=st.sampled_from(RATIOS),
)
def test_forwards_that_fail_anywhere_between_others(orders, granularity, ratio, device):
    torch.manual_seed(0)
    module = Scheduled(Block(hidden) for hidden in (16, 80, 3, 40, 40))  # the number 5 fails
    steps = [_in_order(range(5)), *(_in_order(*order) for order in orders)]
    check(module, steps, granularity, ratio, device)


class Pair(DiffusionPipeline):
    """Two components that hold some of the same blocks, run in any order and one within the other's step."""

    def __init__(self, first: nn.Module, second: nn.Module):
        super().__init__()
        self.register_modules(first=first, second=second)

    @torch.no_grad()
    def __call__(self, orders):
        x = _noise(3, WIDTH).to(self._execution_device)
        for use_second, order in orders:
            x = torch.tanh(
                (self.second if use_second else self.first)(x, order=[number % 4 for number in order])
            )
        self.maybe_free_model_hooks()
        return x.cpu()


class Simple(Block):
    """Its own weights are used at its beginning only, where its first phase brings them."""

    def forward(self, x):
        return torch.tanh(x + self.ff(self.attn(x * self.first)))


def _pair(kind: type[Block] = Simple) -> Pair:
    torch.manual_seed(0)
    blocks = [kind(hidden) for hidden in (16, 80, 3, 40, 40, 20)]
    return Pair(Scheduled(blocks[:4]), Scheduled([blocks[3], blocks[4], blocks[1], blocks[5]]))


_POLICIES = st.sampled_from([*GRANULARITIES, "model", "resident", OffloadPolicy("phase", 0.5)])
_TURNS = st.lists(st.tuples(st.booleans(), st.lists(st.integers(0, 3), max_size=6)), min_size=1, max_size=5)


@settings(deadline=None, max_examples=20, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(calls=st.lists(_TURNS, min_size=2, max_size=4), first=_POLICIES, second=_POLICIES)
def test_blocks_that_two_components_share(calls, first, second, device):
    pipe, resident = _pair(), _pair().to(device)
    everything = [(False, range(4)), (True, range(4))]
    pipe.enable_block_offload(device=device, components={"first": first, "second": second})
    for orders in (everything, *calls):
        assert torch.equal(pipe(orders), resident(orders))
    with poisoned(pipe.block_offload):
        for orders in calls:
            assert torch.equal(pipe(orders), resident(orders)), "what is not loaded being NaN"
    pipe.disable_block_offload()
    assert torch.equal(pipe.to(device)(everything), resident(everything))


@pytest.mark.parametrize("granularity", ["phase", "leaf"])
def test_a_shared_block_with_weights_of_its_own_runs_in_the_second_component(granularity, device):
    pipe, resident = _pair(Block), _pair(Block).to(device)
    once = [(True, range(4))]
    pipe.enable_block_offload(device=device, offload_granularity=granularity)
    for _ in range(2):
        assert torch.equal(pipe(once), resident(once))
    with poisoned(pipe.block_offload):
        assert torch.equal(pipe(once), resident(once)), "what is not loaded being NaN"


# --- real models in random order ---------------------------------------------------------------------------


@functools.cache
def _flux() -> nn.Module:
    return build("flux").transformer.requires_grad_(False)


@functools.cache
def _sd3() -> nn.Module:
    return build("sd3").transformer.requires_grad_(False)


@functools.cache
def _unet() -> nn.Module:
    return build("sdxl").unet.requires_grad_(False)


def _lists(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The lists whose blocks can take each other's place, as they were at first."""
    if not hasattr(model, "lists_at_first"):
        model.lists_at_first = {
            name: list(part)
            for name, part in model.named_modules()
            if isinstance(part, nn.ModuleList) and name.endswith("transformer_blocks")
        }
    return model.lists_at_first


def _put_in_order(model: nn.Module, draws: list[int]) -> None:
    """Skip, repeat and exchange blocks, as `draws` say; the last one of each list, often a special one, stays."""
    for count, (name, blocks) in enumerate(_lists(model).items()):
        chosen = [blocks[draw * (count + 1) % len(blocks)] for draw in draws]
        chosen = [block for block in chosen if block is not blocks[-1]]
        model.get_submodule(name)._modules = {str(i): b for i, b in enumerate([*chosen, blocks[-1]])}


def _flux_inputs(model: nn.Module, device: str, seed: int, controls: int) -> dict:
    config, samples = (
        model.config,
        [_noise(1, 6, model.inner_dim, seed=i).to(device) for i in range(controls)],
    )
    return {
        "hidden_states": _noise(1, 6, config.in_channels, seed=seed).to(device),
        "encoder_hidden_states": _noise(1, 5, config.joint_attention_dim, seed=seed).to(device),
        "pooled_projections": _noise(1, config.pooled_projection_dim, seed=seed).to(device),
        "timestep": torch.tensor([seed / 10], device=device),
        "img_ids": torch.arange(18.0).view(6, 3).to(device),
        "txt_ids": torch.zeros(5, 3, device=device),
        "guidance": torch.tensor([3.5], device=device),
        "controlnet_block_samples": samples or None,
        "controlnet_single_block_samples": samples[:1] or None,
    }


def _sd3_inputs(model: nn.Module, device: str, seed: int, skipped: int) -> dict:
    config = model.config
    return {
        "hidden_states": _noise(1, config.in_channels, 8, 8, seed=seed).to(device),
        "encoder_hidden_states": _noise(1, 5, config.joint_attention_dim, seed=seed).to(device),
        "pooled_projections": _noise(1, config.pooled_projection_dim, seed=seed).to(device),
        "timestep": torch.tensor([seed * 10], device=device),
        "skip_layers": [skipped] if skipped else None,
    }


def _unet_inputs(model: nn.Module, device: str, seed: int, extra: int) -> dict:
    config = model.config
    pooled = config.projection_class_embeddings_input_dim - 6 * config.addition_time_embed_dim
    return {
        "sample": _noise(1, config.in_channels, 8, 8, seed=seed).to(device),
        "timestep": torch.tensor(seed * 10, device=device),
        "encoder_hidden_states": _noise(1, 5, config.cross_attention_dim, seed=seed).to(device),
        "added_cond_kwargs": {
            "text_embeds": _noise(1, pooled, seed=seed).to(device),
            "time_ids": torch.arange(6.0, device=device)[None],
        },
    }


MODELS = {"flux": (_flux, _flux_inputs), "sd3": (_sd3, _sd3_inputs), "unet": (_unet, _unet_inputs)}


def _real_step(inputs, number: int, draws: list[int] | None, extra: int):
    def step(model: nn.Module, device: str):
        blocks = max(map(len, _lists(model).values()))
        _put_in_order(model, draws if draws is not None else list(range(blocks)))
        try:
            return model(**inputs(model, device, number, extra)).sample
        finally:
            _put_in_order(model, list(range(blocks)))

    return step


@settings(
    deadline=None,
    max_examples=4,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(
    draws=st.lists(
        st.tuples(st.lists(st.integers(0, 9), max_size=6), st.integers(0, 2)), min_size=2, max_size=3
    ),
    ratio=st.sampled_from(RATIOS),
)
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", MODELS)
def test_real_models_with_blocks_skipped_repeated_and_exchanged(name, granularity, draws, ratio, device):
    model, inputs = MODELS[name]
    steps = [_real_step(inputs, 0, None, 0)]
    steps += [_real_step(inputs, number + 1, *draw) for number, draw in enumerate(draws)]
    check(copy.deepcopy(model()), steps, granularity, ratio, device)


SKIPPED = {
    "flux": LayerSkipConfig([1], "transformer_blocks", skip_attention=False),
    "sd3": LayerSkipConfig([0, 2], "transformer_blocks"),  # whole blocks, the first among them
}


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", SKIPPED)
def test_layers_that_a_hook_of_diffusers_skips(name, granularity, device):
    model, inputs = MODELS[name]

    def skipping() -> nn.Module:
        made = copy.deepcopy(model())
        apply_layer_skip(made, SKIPPED[name])
        return made

    steps = [_real_step(inputs, number, None, 0) for number in range(3)]
    check(skipping(), steps, granularity, device=device, resident=skipping())


@pytest.mark.parametrize("ratio", [None, 1.0], ids=["planned", "a share"])
def test_a_forward_that_uses_only_what_another_component_owns(ratio, device):
    """It may be timed: there is nothing of its own to tell."""
    pipe, resident = _pair(), _pair().to(device)
    everything, shared = [(False, range(4)), (True, range(4))], [(True, [0, 2])] * 3
    second = "block" if ratio is None else OffloadPolicy("block", ratio=0.3)
    pipe.enable_block_offload(
        device=device, offload_ratio=ratio, components={"first": "block", "second": second}
    )
    for orders in (everything, shared, everything, shared):
        assert torch.equal(pipe(orders), resident(orders))

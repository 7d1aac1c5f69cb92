"""`max_device_memory` bounds the peak, and what is left under it holds blocks."""

import pytest
import torch
from helpers import build, run
from hypothesis import given
from hypothesis import strategies as st

from diffusers_offload.planning.planner import choose_kept, choose_residents
from diffusers_offload.policy import parse_bytes
from diffusers_offload.streams import InlineStreams

sizes = st.lists(st.integers(1, 1000), max_size=40)


@given(sizes, st.floats(0, 1))
def test_what_streams_never_exceeds_the_ratio(lengths, ratio):
    stay = choose_residents(lengths, ratio)
    streamed = sum(n for i, n in enumerate(lengths) if i not in stay)
    assert streamed <= ratio * sum(lengths) * (1 + 1e-9)


@given(sizes, st.integers(-10, 20_000))
def test_what_is_kept_never_exceeds_the_room(lengths, room):
    assert sum(lengths[i] for i in choose_kept(lengths, room)) <= max(0, room)


@given(st.integers(1, 60), st.integers(1, 100), st.floats(0, 1))
def test_residents_lie_evenly_among_equal_blocks(count, size, ratio):
    stay = choose_residents([size] * count, ratio)
    for start in range(count):
        for stop in range(start + 1, count + 1):
            streamed = sum(1 for i in range(start, stop) if i not in stay)
            assert abs(streamed - ratio * (stop - start)) <= 1 + 1e-6


@pytest.mark.parametrize("value", ["ten", -1, 0, "0GB", 1.5, True, "10 apples"])
def test_wrong_sizes_are_refused(value):
    with pytest.raises(ValueError, match="max_device_memory"):
        parse_bytes("max_device_memory", value)


def test_sizes_as_accelerate_reads_them():
    assert parse_bytes("n", "10GiB") == 10 * 2**30
    assert parse_bytes("n", "10GB") == 10 * 10**9
    assert parse_bytes("n", 77) == 77
    assert parse_bytes("n", None) is None


def test_a_budget_that_holds_no_units_at_all_is_refused():
    pipe = build("flux")
    with pytest.raises(
        ValueError, match=r"max_device_memory=1000 is .* too little.*for the layers of transformer"
    ):
        pipe.enable_block_offload(device="cpu", max_device_memory=1000)
    assert pipe.block_offload is None
    assert not hasattr(pipe.transformer, "_hf_hook")


def test_where_blocks_do_not_fit_phases_and_leaves_are_taken():
    pipe = build("wan")
    expected = run(pipe, "wan")
    taken = set()
    needs = {}
    for granularity in ("block", "phase", "leaf"):
        pipe.enable_block_offload(device="cpu", offload_granularity=granularity, components={"vae": "leaf"})
        needs[granularity] = pipe.block_offload.plan.device_bytes
    assert needs["block"] > needs["phase"] > needs["leaf"]
    for limit in needs.values():
        pipe.enable_block_offload(device="cpu", max_device_memory=limit, components={"vae": "leaf"})
        plan = pipe.block_offload.plan
        assert plan.device_bytes <= limit
        taken.add(next(c.policy.granularity for c in plan.components if c.name == "transformer"))
        assert torch.equal(run(pipe, "wan"), expected)
    assert taken == {"block", "phase", "leaf"}
    with pytest.raises(ValueError, match="too little"):
        pipe.enable_block_offload(
            device="cpu",
            max_device_memory=needs["leaf"],
            components={"vae": "leaf", "transformer": "block"},
        )


def test_what_the_host_cannot_hold_stays_on_the_device():
    pipe = build("flux")
    expected = run(pipe, "flux")
    plan = needed(pipe)
    limit = plan.host_bytes - plan.components[-1].streamed_bytes // 2
    pipe.enable_block_offload(device="cpu", max_host_memory=limit)
    assert pipe.block_offload.plan.host_bytes <= limit
    assert any(component.residents for component in pipe.block_offload.plan.components)
    assert torch.equal(run(pipe, "flux"), expected)
    assert pipe.block_offload.report().host_bytes <= limit
    for arguments in ({"max_host_memory": 1000}, {"max_host_memory": limit, "offload_ratio": 1.0}):
        with pytest.raises(ValueError, match=r"max_host_memory=\d+ is .* too little"):
            pipe.enable_block_offload(device="cpu", **arguments)


def needed(pipe):
    pipe.enable_block_offload(device="cpu")
    plan = pipe.block_offload.plan
    pipe.disable_block_offload()
    return plan


@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl"])
@pytest.mark.parametrize("share", [0.0, 0.5, 2.0])
def test_the_rest_of_the_budget_holds_blocks(name, share):
    pipe = build(name)
    expected = run(pipe, name)
    plan = needed(pipe)
    denoiser = next(c for c in plan.components if c.name in ("transformer", "unet"))
    limit = int((plan.device_bytes + 4096 + share * denoiser.streamed_bytes) * 1.02)
    pipe.enable_block_offload(device="cpu", max_device_memory=limit)
    for _ in range(2):
        assert torch.equal(run(pipe, name), expected)
    pipe.block_offload.reset()
    assert torch.equal(run(pipe, name), expected)
    moved = pipe.block_offload.report().bytes_loaded
    pipe.disable_block_offload()
    assert torch.equal(run(pipe, name), expected)

    pipe.enable_block_offload(device="cpu")
    run(pipe, name)
    pipe.block_offload.reset()
    run(pipe, name)
    without = pipe.block_offload.report().bytes_loaded
    assert moved < 0.9 * without if share else moved <= without


def test_new_shapes_are_measured_before_anything_is_kept():
    pipe = build("flux")
    plan = needed(pipe)
    expected = {side: run(pipe, "flux", height=side, width=side) for side in (64, 96)}
    pipe.enable_block_offload(device="cpu", max_device_memory=4 * plan.device_bytes)
    for side in (64, 96, 64, 64, 96):
        assert torch.equal(run(pipe, "flux", height=side, width=side), expected[side])


@pytest.mark.gpu
@pytest.mark.parametrize("extra", [0, 16, 4096])
def test_the_measured_peak_stays_under_the_budget(extra):
    from diffusers_offload.demo import pipelines as zoo

    pipe = zoo.build(
        "flux",
        dtype=torch.bfloat16,
        num_attention_heads=16,
        attention_head_dim=64,
        num_layers=8,
        num_single_layers=16,
        axes_dims_rope=(16, 24, 24),
    )
    kwargs = {"height": 256, "width": 256, "num_inference_steps": 4}
    pipe.to("cuda")
    expected = run(pipe, "flux", **kwargs)
    pipe.to("cpu")
    torch.cuda.empty_cache()
    pipe.enable_block_offload(device="cuda", offload_ratio=1.0)
    run(pipe, "flux", **kwargs)
    torch.cuda.reset_peak_memory_stats()
    run(pipe, "flux", **kwargs)
    bare = torch.cuda.max_memory_allocated()
    limit = int(bare * 1.03) + extra * 2**20
    pipe.enable_block_offload(device="cuda", offload_ratio=1.0, max_device_memory=limit)
    peaks = []

    def note(pipe, step, timestep, values):
        peaks.append(torch.cuda.max_memory_allocated())  # measuring starts anew at each forward
        return values

    for _ in range(3):
        torch.cuda.reset_peak_memory_stats()
        assert torch.equal(run(pipe, "flux", callback_on_step_end=note, **kwargs), expected)
        peaks.append(torch.cuda.max_memory_allocated())
    assert max(peaks) <= limit
    pipe.block_offload.reset()
    run(pipe, "flux", **kwargs)
    assert pipe.block_offload.report().misses == 0


@pytest.mark.parametrize("name", ["sd3", "wan22", "flux-controlnet", "sdxl-controlnet"])
def test_weights_on_the_device_never_exceed_the_budget(name, monkeypatch):
    from diffusers_offload.engine import Engine

    most = 0

    def watched(self, *args, real=Engine.acquire):
        nonlocal most
        real(self, *args)
        most = max(most, self.keeping.weights_on_device())

    monkeypatch.setattr(Engine, "acquire", watched)
    pipe = build(name)
    expected = run(pipe, name)
    limit = int(needed(pipe).device_bytes * 1.5)
    pipe.enable_block_offload(device="cpu", max_device_memory=limit)
    for _ in range(3):
        assert torch.equal(run(pipe, name), expected)
    assert 0 < most <= limit


class Counting(InlineStreams):
    """Streams that count: what is on the device is the engine's weights and the activations of who runs."""

    def __init__(self, engine):
        super().__init__(engine.device)
        self._engine, self.activations, self.highest = engine, 0, 0

    def allocated(self):
        return self._engine.keeping.weights_on_device() + self.activations

    def look(self):
        self.highest = max(self.highest, self.allocated())

    def begin_peak(self):
        self.highest = self.allocated()

    def peak(self):
        return self.highest

    reserved, peak_reserved = allocated, peak


def test_two_components_that_alternate_stay_within_the_bound():
    pipe = build("flux-controlnet")
    names = ("controlnet", "transformer")
    expected = run(pipe, "flux-controlnet", num_inference_steps=6)
    weights = sum(p.numel() * p.element_size() for name in names for p in getattr(pipe, name).parameters())
    limit = int(weights * 1.1)
    pipe.enable_block_offload(device="cpu", max_device_memory=limit)
    engine = pipe.block_offload._engine
    counting = engine.budget._streams = Counting(engine)
    load, peaks = engine._transfers.load, []

    def loads(*arguments):
        load(*arguments)
        counting.look()
        peaks.append(counting.allocated())

    engine._transfers.load = loads
    for name, share in zip(names, (0.02, 0.4), strict=True):
        blocks = getattr(pipe, name).transformer_blocks

        def computes(*_, share=share):
            counting.activations = int(share * limit)
            counting.look()
            peaks.append(counting.allocated())

        def done(*_):
            counting.activations = 0

        blocks[0].register_forward_pre_hook(computes)
        getattr(pipe, name).register_forward_hook(done)
    for _ in range(3):
        assert torch.equal(run(pipe, "flux-controlnet", num_inference_steps=6), expected)
    assert max(peaks) <= limit

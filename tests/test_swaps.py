"""Components exchanged while a pipeline is offloaded: the new one is offloaded, the old one is free."""

import gc
import weakref

import pytest
import torch
from helpers import build, run, weights_of

from diffusers_offload import OffloadPolicy
from diffusers_offload.demo import pipelines as zoo

SWAPS = {
    "assigned": lambda pipe, model: setattr(pipe, "transformer", model),
    "registered": lambda pipe, model: pipe.register_modules(transformer=model),
}


def other_transformer():
    return zoo.build("flux", seed=7).transformer


def plan_of(pipe, name):
    return {plan.name: plan for plan in pipe.block_offload.plan.components}[name]


def is_plain(module):
    return not any(
        hasattr(part, "_hf_hook") or {"to", "__reduce_ex__", "enable_group_offload"} & vars(part).keys()
        for part in module.modules()
    )


@pytest.mark.parametrize("how", SWAPS)
@pytest.mark.parametrize("policy", ["block", "model", "resident", OffloadPolicy("block", 0.5)], ids=str)
def test_a_component_put_in_place_of_another_follows_the_policy_of_its_name(policy, how, device):
    pipe = build("flux", device=device)
    before = run(pipe, "flux")
    pipe.transformer = other_transformer().to(device)
    expected = run(pipe, "flux")
    assert not torch.equal(before, expected)

    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0, components={"transformer": policy})
    assert torch.equal(run(pipe, "flux"), before)
    handle, old, weights = pipe.block_offload, pipe.transformer, weights_of(pipe.transformer)
    plan = plan_of(pipe, "transformer")
    SWAPS[how](pipe, other_transformer())
    assert pipe.block_offload is handle
    assert handle.components["transformer"] is pipe.transformer
    assert plan_of(pipe, "transformer") == plan
    assert list(handle.components) == [plan.name for plan in handle.plan.components]
    assert torch.equal(run(pipe, "flux"), expected)
    assert is_plain(old)
    assert all(torch.equal(t, weights[key]) and t.device.type == "cpu" for key, t in old.state_dict().items())
    arena = handle.report().arena_bytes
    assert arena == handle.plan.arena_bytes

    pipe.transformer = old
    assert torch.equal(run(pipe, "flux"), before)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), before)


def test_the_old_component_is_not_kept_alive():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    gone = weakref.ref(pipe.transformer)
    pipe.transformer = other_transformer()
    gc.collect()
    assert gone() is None


def test_the_same_component_changes_nothing():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    component = pipe.block_offload._held["transformer"].component
    pipe.transformer = pipe.transformer
    pipe.register_modules(**pipe.components)
    assert pipe.block_offload._held["transformer"].component is component
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_component_taken_away_gets_its_weights_back_and_may_return(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    with torch.no_grad():
        embeds, pooled, _ = pipe.encode_prompt(zoo.call_kwargs("flux")["prompt"], None, max_sequence_length=8)
    latents = run(
        pipe, "flux", output_type="latent", prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled
    )
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    taken = {name: getattr(pipe, name) for name in ("vae", "text_encoder", "text_encoder_2")}
    pipe.vae = None
    pipe.text_encoder = None
    pipe.register_modules(text_encoder_2=None)
    assert list(pipe.block_offload.components) == ["transformer"]
    assert [plan.name for plan in pipe.block_offload.plan.components] == ["transformer"]
    assert all(is_plain(module) for module in taken.values())
    found = run(
        pipe, "flux", output_type="latent", prompt=None, prompt_embeds=embeds, pooled_prompt_embeds=pooled
    )
    assert torch.equal(found, latents)
    for name, module in taken.items():
        setattr(pipe, name, module)
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


class NoBlocks(torch.nn.Linear):
    pass


def on_meta():
    return other_transformer().to("meta")


def in_groups():
    model = other_transformer()
    model.enable_group_offload(torch.device("cpu"), offload_type="leaf_level")
    return model


def by_accelerate():
    from accelerate import cpu_offload

    return cpu_offload(other_transformer(), torch.device("cpu"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (on_meta, r"transformer\..*meta"),
        (in_groups, r"transformer.*group offloading"),
        (by_accelerate, r"transformer.*accelerate"),
        (lambda: NoBlocks(4, 4), r"transformer.*no blocks"),
    ],
)
@pytest.mark.parametrize("how", SWAPS)
def test_one_that_cannot_be_taken_in_leaves_the_pipeline_as_it_was(make, message, how):
    pipe = build("flux")
    expected, config = run(pipe, "flux"), dict(pipe.config)
    pipe.enable_block_offload(device="cpu", components={"transformer": "block"})
    old, component = pipe.transformer, pipe.block_offload._held["transformer"].component
    new, put = make(), SWAPS[how]
    with pytest.raises(ValueError, match=message):
        put(pipe, new)
    assert pipe.transformer is old
    assert dict(pipe.config) == config
    assert pipe.block_offload._held["transformer"].component is component
    assert torch.equal(run(pipe, "flux"), expected)


def test_one_that_is_too_large_for_the_budget_is_refused():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu", max_device_memory=pipe_bytes(pipe))
    old = pipe.transformer
    with pytest.raises(ValueError, match="max_device_memory"):
        pipe.transformer = zoo.build("flux", num_attention_heads=16).transformer
    assert pipe.transformer is old
    assert torch.equal(run(pipe, "flux"), expected)


def pipe_bytes(pipe) -> int:
    """The least budget that the pipeline accepts."""
    pipe.enable_block_offload(device="cpu")
    return pipe.block_offload.plan.device_bytes


def test_one_that_fails_half_way_leaves_the_pipeline_as_it_was(monkeypatch, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe, "flux")
    new = other_transformer()
    weights = weights_of(new)
    fails = new.single_transformer_blocks[2].attn.to_q.weight
    old, engine = pipe.transformer, pipe.block_offload._engine
    roster = type(engine.roster)
    adopt = roster.adopt

    def failing(self, component):
        for unit in adopt(self, component):
            if any(t is fails for t in unit.weights.tensors):
                raise MemoryError("no more")
            yield unit

    monkeypatch.setattr(roster, "adopt", failing)
    with pytest.raises(MemoryError):
        pipe.transformer = new
    assert pipe.transformer is old
    assert set(pipe.block_offload.components) == {"transformer", "vae", "text_encoder", "text_encoder_2"}
    assert is_plain(new)
    assert all(torch.equal(t, weights[key]) for key, t in new.state_dict().items())
    assert torch.equal(run(pipe, "flux"), expected)


def test_in_the_middle_of_a_forward_it_is_refused_and_between_steps_it_counts(device):
    def swap(pipe, step, timestep, values):
        if step == 0:
            pipe.transformer = other_transformer().to("cpu" if pipe.block_offload else device)
        return values

    expected = run(build("flux", device=device), "flux", callback_on_step_end=swap)
    pipe = build("flux")
    before = run(pipe, "flux") if device == "cpu" else None
    pipe.enable_block_offload(device=device, offload_ratio=1.0)

    def within(*_):
        pipe.transformer = None

    old = pipe.transformer
    hook = old.norm_out.register_forward_pre_hook(within)
    with pytest.raises(RuntimeError, match="in the middle of a forward"):
        run(pipe, "flux")
    hook.remove()
    assert pipe.transformer is old
    if before is not None:
        assert torch.equal(run(pipe, "flux"), before)
    assert torch.equal(run(pipe, "flux", callback_on_step_end=swap), expected)


def test_a_component_under_two_names_stays_until_both_are_gone():
    pipe = build("wan22")
    pipe.transformer_2 = pipe.transformer
    expected = run(pipe, "wan22")
    pipe.enable_block_offload(device="cpu")
    model = pipe.transformer
    pipe.transformer = build("wan22").transformer_2
    assert not is_plain(model)
    pipe.transformer = model
    assert torch.equal(run(pipe, "wan22"), expected)
    assert len([m for m in pipe.block_offload.components.values() if m is model]) == 1
    pipe.transformer = build("wan22").transformer_2
    pipe.transformer_2 = pipe.transformer
    assert is_plain(model)


def test_a_compiled_wrapper_around_the_component_changes_nothing():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    model, component = pipe.transformer, pipe.block_offload._held["transformer"].component
    pipe.transformer = torch.compile(model, backend="eager")
    assert pipe.block_offload._held["transformer"].component is component
    pipe.transformer = model
    assert pipe.block_offload._held["transformer"].component is component
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_wrapper_of_ones_own_takes_the_place_of_what_it_wraps(device):
    class Doubled(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.model, self.config, self.dtype = model, model.config, model.dtype
            self.cache_context = model.cache_context

        @property
        def device(self):
            return self.model.device

        def forward(self, *args, **kwargs):
            return tuple(2 * each for each in self.model(*args, **kwargs))

    pipe = build("flux", device=device)
    before = run(pipe, "flux")
    model = pipe.transformer
    pipe.transformer = Doubled(model)
    expected = run(pipe, "flux")
    assert not torch.equal(before, expected)
    pipe.transformer = model
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    pipe.transformer = Doubled(model)
    assert plan_of(pipe, "transformer").streamed
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.transformer = model
    assert torch.equal(run(pipe, "flux"), before)


def unhooks(pipe):
    from accelerate.hooks import remove_hook_from_module

    remove_hook_from_module(pipe.transformer)


@pytest.mark.parametrize(
    "leaves",
    [lambda pipe: setattr(pipe, "transformer", other_transformer()), unhooks],
    ids=["exchanged", "unhooked"],
)
def test_who_uses_tensors_of_a_component_that_left_has_them_to_itself(leaves, device):
    class Using(torch.nn.Module):
        def __init__(self, model):
            super().__init__()
            self.embed, self.own = model.x_embedder, torch.nn.Linear(model.x_embedder.out_features, 3)

        def forward(self, x):
            return self.own(self.embed(x))

    pipe = build("flux")
    torch.manual_seed(0)
    using = Using(pipe.transformer).requires_grad_(False)
    x = torch.randn(1, 4, pipe.transformer.config.in_channels)
    expected = using.to(device)(x.to(device))
    using.to("cpu")
    pipe.register_modules(image_encoder=using, feature_extractor=None)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(using(x.to(device)), expected)
    leaves(pipe)
    pipe.block_offload.call_ended()
    assert torch.equal(using(x.to(device)), expected)
    held = pipe.block_offload._held["image_encoder"]
    assert not held.component.needs
    owned = {id(t) for unit in held.component.units for t in unit.weights.tensors}
    assert {id(p) for p in using.parameters()} == owned


def test_other_attributes_are_none_of_its_business():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    pipe.helper = torch.nn.Linear(2, 2)
    assert is_plain(pipe.helper)
    pipe.scheduler = type(pipe.scheduler).from_config(pipe.scheduler.config)
    assert torch.equal(run(pipe, "flux"), expected)


@pytest.mark.parametrize("make", ["from_pipe", "components"])
def test_a_second_pipeline_without_enabling_runs_right_and_leaves_nothing_on_the_device(make, device):
    from diffusers import FluxImg2ImgPipeline

    def second(pipe):
        if make == "from_pipe":
            other = FluxImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
        else:
            other = FluxImg2ImgPipeline(**pipe.components)
        other.set_progress_bar_config(disable=True)
        return other

    def variation(other):
        return other(
            prompt="a fox",
            image=torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)),
            strength=0.7,
            num_inference_steps=3,
            output_type="pt",
            generator=torch.Generator("cpu").manual_seed(0),
        ).images.cpu()

    pipe = build("flux", device=device)
    expected, varied = run(pipe, "flux"), variation(second(pipe))
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    other = second(pipe)
    assert other.block_offload is None
    assert other.device == other._execution_device == pipe.device
    assert torch.equal(variation(other), varied)
    components = pipe.block_offload._engine.components
    assert not any(component.present for component in components)
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.transformer = other_transformer()
    pipe.disable_block_offload()
    assert torch.equal(variation(other.to(device)), varied)

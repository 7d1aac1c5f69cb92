"""Modular Diffusers: pipelines whose components come and go while they are offloaded."""

import weakref

import diffusers
import pytest
import torch
from diffusers import ComponentsManager, FluxPipeline, ModularPipeline
from helpers import no_weight_used_while_offloaded, weights_of
from modular import BLOCKS, DENOISER, blocks_of, build, modules_of, on_device, parts_of, quiet, run
from modular import without_ftfy as without_ftfy

from diffusers_offload import OffloadPolicy
from diffusers_offload.demo import pipelines as zoo
from diffusers_offload.handle import held_policy
from diffusers_offload.held import find_held

pytestmark = pytest.mark.usefixtures("without_ftfy")


# --- pipelines ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_of",
    [
        lambda denoiser: {"offload_ratio": 1.0},
        lambda denoiser: {"offload_ratio": 0.5},
        lambda denoiser: {"offload_granularity": "model", "components": {denoiser: "block"}},
        lambda denoiser: {
            "components": {
                denoiser: OffloadPolicy("block", ratio=0.4),
                "vae": "block",
                "text_encoder": "resident",
            }
        },
    ],
    ids=["block", "half", "model", "mixed"],
)
@pytest.mark.parametrize("name", list(BLOCKS))
def test_equals_the_resident_pipeline(name, request_of, device):
    pipe = build(name, device)
    expected = run(pipe, name)
    pipe.to("cpu")
    pipe.enable_block_offload(device=device, **request_of(DENOISER.get(name, "transformer")))
    with no_weight_used_while_offloaded(pipe):
        assert torch.equal(run(pipe, name), expected)
    assert torch.equal(run(pipe, name), expected)
    assert pipe.block_offload.report().uses
    assert pipe.device == pipe._execution_device == pipe.block_offload.device


def test_a_picture_goes_in_first(device):
    """The encoder of the autoencoder runs before anything else has."""
    picture = torch.rand(1, 3, 48, 64, generator=torch.Generator().manual_seed(0))
    pipe = build("flux", device)
    expected = run(pipe, image=picture, strength=0.7, num_inference_steps=3)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, image=picture, strength=0.7, num_inference_steps=3), expected)


def test_a_guider_with_hooks_on_the_blocks(device):
    from diffusers import LayerSkipConfig, SkipLayerGuidance

    def guider():
        config = LayerSkipConfig(indices=[1, 2], fqn="transformer_blocks", skip_attention=True)
        return SkipLayerGuidance(skip_layer_config=config, skip_layer_guidance_start=0.0)

    pipe = build("qwenimage", device)
    plain = run(pipe, "qwenimage")
    pipe.update_components(guider=guider())
    expected = run(pipe, "qwenimage")
    assert not torch.equal(expected, plain)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    for _ in range(2):
        assert torch.equal(run(pipe, "qwenimage"), expected)


def test_enable_disable_enable(device):
    pipe = build("flux", device)
    expected = run(pipe)
    pipe.to("cpu")
    weights = {name: weights_of(module) for name, module in modules_of(pipe).items()}
    for _ in range(2):
        pipe.enable_block_offload(device=device, offload_ratio=1.0)
        assert torch.equal(run(pipe), expected)
        pipe.disable_block_offload()
        assert pipe.block_offload is None
        assert pipe.device == pipe._execution_device == torch.device("cpu")
        for name, module in modules_of(pipe).items():
            assert not any(hasattr(part, "_hf_hook") for part in module.modules())
            after = module.state_dict()
            assert all(torch.equal(after[key], value) for key, value in weights[name].items())
    assert torch.equal(run(pipe.to(device)), expected)


def test_enable_twice_replaces_the_first():
    pipe = build("flux")
    expected = run(pipe)
    pipe.enable_block_offload("cpu")
    first = pipe.block_offload
    pipe.enable_block_offload("cpu", "block", 0.5)
    assert not first.enabled and pipe.block_offload is not first
    assert torch.equal(run(pipe), expected)


def test_what_came_for_a_call_leaves_with_it(device):
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe)
    assert on_device(pipe.block_offload) == []


def test_what_came_for_a_call_leaves_when_a_block_fails(device):
    pipe = build("flux", device)
    expected = run(pipe)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    decode = type(pipe._blocks.sub_blocks["denoise"])

    class Boom(Exception):
        pass

    def fail(*_):
        assert on_device(pipe.block_offload)
        raise Boom

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(decode, "__call__", fail)
        with pytest.raises(Boom):
            run(pipe)
    assert on_device(pipe.block_offload) == []
    assert torch.equal(run(pipe), expected)


def test_only_the_text_encoders(device):
    pipe = build("flux", device)
    prompt = {"prompt": zoo.PROMPT, "max_sequence_length": 32}

    def encoder():
        made = blocks_of("flux", "text_encoder").init_pipeline()
        made.update_components(
            **{k: part for k, part in pipe.components.items() if k in made.component_names}
        )
        return made

    expected = encoder()(output=["prompt_embeds", "pooled_prompt_embeds"], **prompt)
    pipe.to("cpu")
    part = encoder()
    part.enable_block_offload(device=device, offload_ratio=1.0, components={"text_encoder": "model"})
    found = part(output=["prompt_embeds", "pooled_prompt_embeds"], **prompt)
    assert list(part.block_offload.components) == ["text_encoder", "text_encoder_2"]
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert held_policy(pipe.transformer) is None


def test_blocks_called_one_by_one(device):
    """Nobody calls the pipeline, so nobody tells when a call is over; the bits are right all the same."""
    pipe = build("flux", device)
    expected = run(pipe)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    state = diffusers.modular_pipelines.PipelineState()
    for given in pipe.blocks.inputs:
        if given.name:
            state.set(given.name, zoo.call_kwargs("flux").get(given.name, given.default), given.kwargs_type)
    state.set("generator", torch.Generator("cpu").manual_seed(0))
    with torch.no_grad():
        for step in pipe._blocks.sub_blocks.values():
            _, state = step(pipe, state)
    assert torch.equal(state.get("images").cpu(), expected)
    assert on_device(pipe.block_offload)
    pipe.block_offload.call_ended()
    assert on_device(pipe.block_offload) == []


def test_a_standard_pipeline_shares_the_components(device):
    pipe = build("flux", device)
    expected = run(pipe)
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    other = FluxPipeline(**{k: v for k, v in pipe.components.items() if k != "image_processor"})
    other.set_progress_bar_config(disable=True)
    other.enable_block_offload(device=device, offload_ratio=1.0)
    kwargs = zoo.call_kwargs("flux")
    found = other(**kwargs, generator=torch.Generator("cpu").manual_seed(0)).images.cpu()
    assert torch.equal(found, expected)
    other.disable_block_offload()
    assert torch.equal(run(pipe), expected)


# --- components that come and go ------------------------------------------------------------------------


def test_an_updated_component_is_offloaded_as_the_first_was(device):
    pipe = build("flux", device)
    other = parts_of("flux", pipe, seed=1)["transformer"].to(device)
    first = pipe.transformer
    before = run(pipe)
    pipe.update_components(transformer=other)
    after = run(pipe)
    assert not torch.equal(before, after)
    pipe.update_components(transformer=first)
    pipe.to("cpu")
    other.to("cpu")
    pipe.enable_block_offload(
        device=device, offload_ratio=1.0, components={"transformer": OffloadPolicy("block", ratio=0.5)}
    )
    handle = pipe.block_offload
    assert torch.equal(run(pipe), before)
    pipe.update_components(transformer=other)
    assert pipe.block_offload is handle
    assert handle.components["transformer"] is other
    assert not any(hasattr(part, "_hf_hook") for part in first.modules())
    assert {p.device.type for p in first.parameters()} == {"cpu"}
    assert torch.equal(run(pipe), after)
    plan = next(plan for plan in handle.plan.components if plan.name == "transformer")
    assert plan.policy == OffloadPolicy("block", ratio=0.5) and plan.residents
    pipe.disable_block_offload()
    assert {p.device.type for p in other.parameters()} == {"cpu"}


def test_components_that_change_places(device):
    pipe = build("wan22", device)
    one, two = pipe.transformer, pipe.transformer_2
    pipe.update_components(transformer=two, transformer_2=one)
    expected = run(pipe, "wan22")
    pipe.update_components(transformer=one, transformer_2=two)
    pipe.to("cpu").enable_block_offload(
        device=device, offload_ratio=1.0, components={"transformer_2": "model"}
    )
    run(pipe, "wan22")
    pipe.update_components(transformer=two, transformer_2=one)
    assert torch.equal(run(pipe, "wan22"), expected)
    assert held_policy(one)[1].policy == OffloadPolicy("model")


def test_a_component_assigned_past_update_components_counts_from_the_next_call(device):
    pipe = build("flux", device)
    expected = run(pipe)
    pipe.to("cpu")
    vae, pipe.vae = pipe.vae, None
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    pipe.vae = vae
    assert torch.equal(run(pipe), expected)
    assert "vae" in pipe.block_offload.components


def test_components_loaded_after_enabling(tmp_path, device):
    whole = build("flux", device)
    expected = run(whole)
    whole.to("cpu").save_pretrained(str(tmp_path), overwrite_modular_index=True)
    pipe = ModularPipeline.from_pretrained(tmp_path)
    pipe.enable_block_offload(device=device, offload_ratio=1.0, components={"text_encoder": "resident"})
    assert pipe.block_offload.components == {}
    assert pipe.device == pipe._execution_device == pipe.block_offload.device
    pipe.load_components(["text_encoder", "tokenizer"])
    assert list(pipe.block_offload.components) == ["text_encoder"]
    pipe.load_components()
    quiet(pipe)
    assert torch.equal(run(pipe), expected)
    assert set(pipe.block_offload.components) == set(modules_of(pipe))
    plans = {plan.name: plan for plan in pipe.block_offload.plan.components}
    assert plans["text_encoder"].policy == OffloadPolicy("resident")


def test_an_unloaded_component_is_freed(device):
    pipe = build("flux", components_manager=ComponentsManager())
    pipe._components_manager.enable_block_offload(device=device, offload_ratio=1.0)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    run(pipe)
    gone = weakref.ref(pipe.transformer)
    pipe.unload_components("transformer")
    assert gone() is None
    assert "transformer" not in pipe.block_offload.components
    assert "text_encoder" in str(
        pipe._components_manager
    )  # its table of components, which looks at their hooks


def test_a_component_that_shares_weights_with_one_that_goes(device):
    pipe = build("wan22", device)
    with torch.no_grad():
        pipe.transformer_2.proj_out.weight = pipe.transformer.proj_out.weight
    expected = run(pipe, "wan22")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "wan22"), expected)
    first = pipe.transformer
    pipe.update_components(transformer=None)
    pipe.update_components(transformer=first)
    assert torch.equal(run(pipe, "wan22"), expected)
    pipe.update_components(transformer=None)
    pipe.update_components(transformer=zoo.build("wan22").transformer)
    assert torch.equal(run(pipe, "wan22"), expected)
    owned = find_held(pipe.transformer_2).component.units
    assert any(t is pipe.transformer_2.proj_out.weight for unit in owned for t in unit.weights.tensors)


def test_nothing_is_followed_after_disabling():
    pipe = build("flux")
    transformer = pipe.transformer
    pipe.update_components(transformer=None)
    for disable in (pipe.disable_block_offload, lambda: pipe.block_offload.disable()):
        pipe.enable_block_offload(device="cpu")
        disable()
        assert pipe.block_offload is None
        pipe.update_components(transformer=transformer)
        assert held_policy(transformer) is None
        pipe.update_components(transformer=None)


def test_a_hook_that_was_taken_off_is_not_put_on_again():
    from accelerate.hooks import remove_hook_from_module

    pipe = build("flux")
    expected = run(pipe)
    pipe.enable_block_offload(device="cpu")
    remove_hook_from_module(pipe.vae, recurse=True)
    assert torch.equal(run(pipe), expected)
    assert "vae" not in pipe.block_offload.components


def test_a_component_that_cannot_be_offloaded_changes_nothing():
    pipe = build("flux", components_manager=ComponentsManager())
    expected = run(pipe)
    first = pipe.transformer
    with torch.device("meta"):
        bad = type(first).from_config(first.config)
    pipe.enable_block_offload(device="cpu")
    with pytest.raises(ValueError, match="meta device"):
        pipe.update_components(transformer=bad)
    assert pipe.transformer is first
    pipe.disable_block_offload()
    manager = pipe._components_manager
    manager.enable_block_offload(device="cpu")
    before = list(manager.components)
    with pytest.raises(ValueError, match="meta device"):
        pipe.update_components(transformer=bad)
    with pytest.raises(ValueError, match="meta device"):
        manager.add("transformer", bad)
    assert pipe.transformer is first and list(manager.components) == before
    assert torch.equal(run(pipe), expected)


def test_a_component_that_exceeds_the_bound_changes_nothing():
    pipe = build("flux", device="cpu")
    transformer = pipe.transformer
    pipe.update_components(transformer=None)
    need = sum(p.nbytes for p in transformer.parameters())
    pipe.enable_block_offload(device="cpu", max_device_memory=need, components={"transformer": "resident"})
    with pytest.raises(ValueError, match="max_device_memory"):
        pipe.update_components(transformer=transformer)
    assert pipe.transformer is None
    assert held_policy(transformer) is None


def test_a_component_that_fails_to_come_leaves_nothing_behind(monkeypatch):
    from diffusers_offload.tiers.pinned import PinnedTier

    pipe = build("flux")
    expected = run(pipe)
    transformer = pipe.transformer
    pipe.update_components(transformer=None)
    pipe.enable_block_offload(device="cpu")
    plan = str(pipe.block_offload.plan)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(PinnedTier, "prepare", fail)
        with pytest.raises(MemoryError):
            pipe.update_components(transformer=transformer)
    assert held_policy(transformer) is None
    assert str(pipe.block_offload.plan) == plan
    assert torch.equal(run(pipe), expected)  # which takes it in
    assert held_policy(transformer) is not None


@pytest.mark.parametrize("name", ["nobody", "scheduler", "tokenizer"])
def test_names_of_what_is_no_module_are_refused(name):
    pipe = build("flux")
    pipe.update_components(**{name: None} if name != "nobody" else {})
    with pytest.raises(ValueError, match=f"components names '{name}'"):
        pipe.enable_block_offload(device="cpu", components={name: "resident"})
    with pytest.raises(ValueError, match="is not a mapping"):
        pipe.enable_block_offload(device="cpu", components=["vae"])
    assert pipe.block_offload is None

"""Modular Diffusers: pipelines and managers whose components come and go while they are offloaded."""

import gc
import subprocess
import sys
import types
import weakref

import diffusers
import pytest
import torch
from diffusers import ComponentsManager, FluxPipeline, ModularPipeline
from diffusers.modular_pipelines import components_manager
from diffusers.modular_pipelines.wan import encoders as wan_encoders
from helpers import no_weight_used_while_offloaded, warnings_of_ours, weights_of

import diffusers_offload
from diffusers_offload import OffloadPolicy
from diffusers_offload.demo import pipelines as zoo
from diffusers_offload.handle import held_policy, live_handles
from diffusers_offload.held import find_held

BLOCKS = {
    "flux": "FluxAutoBlocks",
    "qwenimage": "QwenImageAutoBlocks",
    "sdxl": "StableDiffusionXLAutoBlocks",
    "wan22": "Wan22Blocks",
}
DENOISER = {"sdxl": "unet"}


@pytest.fixture(autouse=True)
def without_ftfy(monkeypatch):
    """Wan's blocks clean prompts with a package that is not needed for anything else here."""
    monkeypatch.setattr(
        wan_encoders, "ftfy", types.SimpleNamespace(fix_text=lambda text: text), raising=False
    )


def blocks_of(name, *path):
    blocks = getattr(diffusers, BLOCKS[name])()
    for step in path:
        blocks = blocks.sub_blocks[step]
    return blocks


def parts_of(name, pipe, seed=0):
    parts = zoo.build(name, seed=seed).components
    return {key: part for key, part in parts.items() if key in pipe.component_names and part is not None}


def build(name, device="cpu", parts=None, **kwargs):
    pipe = blocks_of(name).init_pipeline(**kwargs)
    pipe.update_components(**(parts_of(name, pipe) if parts is None else parts))
    quiet(pipe)
    return pipe.to(device)


def quiet(pipe):
    for block in (pipe._blocks, *pipe._blocks.sub_blocks.values()):
        for each in (block, *block.sub_blocks.values()):
            if hasattr(each, "set_progress_bar_config"):
                each.set_progress_bar_config(disable=True)


def run(pipe, name="flux", seed=0, **changes):
    inputs = {each.name for each in pipe.blocks.inputs}
    kwargs = {key: value for key, value in zoo.call_kwargs(name).items() if key in inputs}
    kwargs["generator"] = torch.Generator("cpu").manual_seed(seed)
    output = "videos" if name in zoo.VIDEO else "images"
    return pipe(output=output, **{**kwargs, **changes}).cpu()


def modules_of(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def on_device(handle):
    return [c.name for held in handle._held.values() for c in held.engine.components if c.present]


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
    assert "cpu" in str(pipe._components_manager)  # its table of components, which looks at their hooks


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


# --- the manager ----------------------------------------------------------------------------------------


def workflow(manager, *path):
    pipe = blocks_of("flux", *path).init_pipeline(components_manager=manager)
    found = {name: manager.get_one(name=name) for name in pipe.pretrained_component_names}
    pipe.update_components(**found)
    quiet(pipe)
    return pipe


def test_a_manager_serves_the_parts_of_a_workflow(device):
    manager = ComponentsManager()
    whole = build("flux", device, components_manager=manager)
    expected = run(whole)
    whole.to("cpu")
    manager.enable_block_offload(device=device, offload_ratio=1.0, components={"vae": "block"})
    text, rest = workflow(manager, "text_encoder"), workflow(manager)
    rest._blocks.sub_blocks.pop("text_encoder")
    assert text._execution_device == rest._execution_device == manager.block_offload.device == rest.device
    embeds = text(prompt=zoo.PROMPT, max_sequence_length=32)
    assert on_device(manager.block_offload) == []
    found = run(rest, state=embeds)
    assert on_device(manager.block_offload) == []
    assert torch.equal(found, expected)
    assert torch.equal(run(whole), expected)
    assert whole.block_offload is None  # it is the manager's
    manager.disable_block_offload()
    assert manager.block_offload is None and not live_handles()
    assert whole.device == torch.device("cpu")
    assert torch.equal(run(whole.to(device)), expected)


def test_a_manager_takes_in_what_is_added_later(device):
    reference = build("flux", device)
    expected = run(reference)
    parts = {key: part for key, part in reference.to("cpu").components.items() if key != "image_processor"}
    manager = ComponentsManager()
    manager.enable_block_offload(device=device, offload_ratio=1.0, components={"transformer": "model"})
    handle = manager.block_offload
    assert handle.components == {}
    pipe = build("flux", parts=parts, components_manager=manager, collection="first")
    assert torch.equal(run(pipe), expected)
    assert manager.block_offload is handle
    ids = {id(module) for module in handle.components.values()}
    assert ids == {id(module) for module in modules_of(pipe).values()}
    assert held_policy(pipe.transformer)[1].policy == OffloadPolicy("model")


def test_two_pipelines_and_their_manager(device):
    """Each pipeline may be enabled as well; what the manager shares stays as it is until the last one ends."""
    manager = ComponentsManager()
    pipe = build("flux", device, components_manager=manager)
    expected = run(pipe)
    pipe.to("cpu")
    other = workflow(manager)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    other.enable_block_offload(device=device, offload_ratio=1.0)
    manager.enable_block_offload(device=device, offload_ratio=1.0)
    for each in (pipe, other):
        assert torch.equal(run(each), expected)
    pipe.disable_block_offload()
    manager.disable_block_offload()
    assert torch.equal(run(other), expected)
    assert held_policy(pipe.transformer) is not None
    other.disable_block_offload()
    assert held_policy(pipe.transformer) is None


def test_policies_by_id_and_by_name():
    manager = ComponentsManager()
    one, two, three = (zoo.build("wan", seed=seed).transformer for seed in range(3))
    ids = [manager.add("transformer", each) for each in (one, two)]
    manager.enable_block_offload(device="cpu", components={"transformer": "model", ids[1]: "resident"})
    manager.add("transformer", three)
    words = [held_policy(each)[1].policy.granularity for each in (one, two, three)]
    assert words == ["model", "resident", "model"]


def test_a_policy_for_nobody_is_warned_of():
    manager = ComponentsManager()
    manager.add("transformer", zoo.build("wan").transformer)
    with warnings_of_ours() as records:
        manager.enable_block_offload(device="cpu", components={"transfomer": "model"})
    assert "transfomer" in records[0].getMessage()


def test_what_is_removed_gets_its_weights_back(device):
    manager = ComponentsManager()
    pipe = zoo.build("wan")
    expected = weights_of(pipe.transformer)
    ids = {name: manager.add(name, getattr(pipe, name)) for name in ("transformer", "text_encoder", "vae")}
    manager.enable_block_offload(device=device, offload_ratio=1.0)
    with warnings_of_ours() as records:
        manager.remove(ids["transformer"])
    assert not records
    assert held_policy(pipe.transformer) is None
    found = pipe.transformer.state_dict()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert set(manager.block_offload.components) == {ids["text_encoder"], ids["vae"]}


def test_a_collection_replaces_the_component_of_that_name(device):
    manager = ComponentsManager()
    one, two = (zoo.build("wan", seed=seed).transformer for seed in range(2))
    need = sum(p.nbytes for p in one.parameters())
    manager.add("transformer", one, collection="video")
    manager.enable_block_offload("cpu", "resident", max_device_memory=need + need // 2)
    second = manager.add("transformer", two, collection="video")
    assert list(manager.block_offload.components) == [second]
    assert held_policy(one) is None
    with pytest.raises(ValueError, match="max_device_memory"):
        manager.add("transformer", one)
    assert list(manager.components) == [second]


def test_one_module_under_two_names():
    manager = ComponentsManager()
    model = zoo.build("wan").transformer
    first = manager.add("transformer", model)
    manager.enable_block_offload(device="cpu")
    second = manager.add("expert", model)
    assert list(manager.block_offload.components) == [first]
    manager.components.pop(first), manager.added_time.pop(first)
    manager.add("vae", zoo.build("wan").vae)
    assert second in manager.block_offload.components
    assert held_policy(model) is not None


# --- refusals -------------------------------------------------------------------------------------------


@pytest.fixture
def auto_on_cpu(monkeypatch):
    """Diffusers' own offloading of a manager, which asks for free memory that the CPU cannot tell."""
    backend = types.SimpleNamespace(mem_get_info=lambda: (2**40, 2**40))
    monkeypatch.setattr(components_manager, "TorchDeviceBackend", lambda device: backend)


def test_auto_offload_before_ours_is_refused(auto_on_cpu):
    manager = ComponentsManager()
    pipe = build("flux", components_manager=manager)
    manager.enable_auto_cpu_offload("cpu")
    expected = run(pipe)
    for enable in (manager.enable_block_offload, pipe.enable_block_offload):
        with pytest.raises(ValueError, match="disable_auto_cpu_offload"):
            enable(device="cpu")
    with pytest.raises(ValueError, match="disable_auto_cpu_offload"):
        diffusers_offload.enable_block_offload(pipe.transformer, device="cpu")
    assert torch.equal(run(pipe), expected)
    manager.disable_auto_cpu_offload()
    manager.enable_block_offload(device="cpu")
    assert torch.equal(run(pipe), expected)


def test_auto_offload_after_ours_is_refused(auto_on_cpu):
    manager = ComponentsManager()
    manager.enable_block_offload(device="cpu")
    with pytest.raises(ValueError, match="disable_block_offload"):
        manager.enable_auto_cpu_offload("cpu")
    manager.disable_block_offload()
    pipe = build("flux", components_manager=manager)
    expected = run(pipe)
    pipe.enable_block_offload(device="cpu")
    with pytest.raises(ValueError, match="disable_block_offload"):
        manager.enable_auto_cpu_offload("cpu")
    assert torch.equal(run(pipe), expected)
    pipe.disable_block_offload()
    manager.enable_auto_cpu_offload("cpu")
    assert torch.equal(run(pipe), expected)


def test_a_manager_with_auto_offload_is_given_nothing_of_ours(auto_on_cpu):
    manager = ComponentsManager()
    manager.enable_auto_cpu_offload("cpu")
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    with pytest.raises(ValueError, match="disable one of the two"):
        manager.add("transformer", pipe.transformer)
    assert not manager.components


# --- installing -----------------------------------------------------------------------------------------


def test_importing_does_not_import_modular_diffusers():
    code = (
        "import sys, diffusers_offload, diffusers\n"
        "print('diffusers.modular_pipelines.modular_pipeline' in sys.modules)\n"
        "from diffusers import ComponentsManager, ModularPipeline, FluxPipeline\n"
        "for each in (ComponentsManager, ModularPipeline, FluxPipeline):\n"
        "    print(each.enable_block_offload.__name__, each.block_offload.fget.__qualname__)\n"
        "print(any(type(f).__name__ == '_WhenImported' for f in sys.meta_path))"
    )
    out = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    line = "enable_block_offload BlockOffloadMixin.block_offload"
    assert out.splitlines() == ["False", line, line, line, "False"]


def test_uninstall_is_the_inverse_of_install():
    pipe = build("flux", components_manager=ComponentsManager())
    expected = run(pipe)
    pipe._components_manager.enable_block_offload(device="cpu")
    diffusers_offload.uninstall()
    try:
        for owner in (ModularPipeline, ComponentsManager):
            assert not [name for name in vars(owner) if name.startswith("_diffusers_")]
            assert not hasattr(owner, "enable_block_offload")
        assert not hasattr(pipe.transformer, "_hf_hook")
        assert torch.equal(run(pipe), expected)
    finally:
        diffusers_offload.install()
        diffusers_offload.install()
    pipe.enable_block_offload(device="cpu")
    assert torch.equal(run(pipe), expected)


def test_deleting_pipeline_and_manager_frees_everything():
    manager = ComponentsManager()
    pipe = build("flux", components_manager=manager)
    manager.enable_block_offload(device="cpu")
    pipe.enable_block_offload(device="cpu")
    run(pipe)
    gone = weakref.ref(pipe.transformer)
    del pipe, manager
    gc.collect()
    assert gone() is None
    assert not live_handles()

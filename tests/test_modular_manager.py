"""Modular Diffusers: a manager of components that are offloaded, what is refused, and how it is installed."""

import gc
import subprocess
import sys
import types
import weakref

import pytest
import torch
from diffusers import ComponentsManager, ModularPipeline
from diffusers.modular_pipelines import components_manager
from helpers import warnings_of_ours, weights_of
from modular import build, modules_of, on_device, run, workflow
from modular import without_ftfy as without_ftfy

import diffusers_offload
from diffusers_offload import OffloadPolicy
from diffusers_offload.demo import pipelines as zoo
from diffusers_offload.handle import held_policy, live_handles

pytestmark = pytest.mark.usefixtures("without_ftfy")


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

"""LightX2V's configuration: its keys mean what they mean there."""

import json
from pathlib import Path

import pytest
import torch
from helpers import build, no_weight_used_while_offloaded, run, warnings_of_ours
from modular import blocks_of
from modular import build as build_modular
from modular import without_ftfy as without_ftfy

from diffusers_offload import OffloadConfig, OffloadPolicy
from diffusers_offload.lightx2v import default_folder

EXAMPLES = sorted((Path(__file__).parent.parent / "integrations" / "lightx2v").glob("*.json"))
READ = OffloadConfig.from_lightx2v
DISK_ARGUMENTS = {"tier", "offload_dir", "num_disk_workers", "max_host_memory"}


@pytest.fixture(scope="module")
def flux():
    """Its `text_encoder` is a CLIP, its `text_encoder_2` a T5."""
    return build("flux")


def policies(pipe):
    """Granularity by component, as planned."""
    return {c.name: c.policy.granularity for c in pipe.block_offload.plan.components}


# --- what a configuration asks for --------------------------------------------------------------------


def test_defaults_are_those_of_lightx2v(flux):
    config = READ({})
    assert config == OffloadConfig()
    assert not config.cpu_offload
    assert config.num_disk_workers == 2
    assert config.max_memory_bytes == 2 * 2**30
    assert config.arguments(flux) == {"offload_granularity": "resident", "components": {}}


@pytest.mark.parametrize("granularity", ["block", "phase", "model"])
def test_all_follow_cpu_offload(flux, granularity):
    config = READ({"cpu_offload": True, "offload_granularity": granularity})
    assert config.arguments(flux) == {"offload_granularity": granularity, "components": {}}


@pytest.mark.parametrize(
    ("key", "component"),
    [
        ("t5_cpu_offload", "text_encoder_2"),
        ("clip_cpu_offload", "text_encoder"),
        ("vae_cpu_offload", "vae"),
    ],
)
def test_a_component_with_a_flag_of_its_own(flux, key, component):
    off = READ({"cpu_offload": True, key: False}).arguments(flux)
    assert off["components"] == {component: "resident"}
    on = READ({"cpu_offload": False, "offload_granularity": "phase", key: True}).arguments(flux)
    whole = component == "vae"
    assert on["offload_granularity"] == "resident"
    assert on["components"] == {component: OffloadPolicy("model" if whole else "phase")}
    for cpu_offload in (True, False):  # what repeats `cpu_offload` changes nothing
        same = READ({"cpu_offload": cpu_offload, key: cpu_offload})
        assert same.arguments(flux)["components"] == {}


def test_the_ratio_is_the_denoisers(flux):
    arguments = READ({"cpu_offload": True, "offload_ratio": 0.5, "vae_cpu_offload": False}).arguments(flux)
    assert arguments == {
        "offload_granularity": "block",
        "offload_ratio": 0.5,
        "components": {
            "vae": "resident",
            "text_encoder": OffloadPolicy("block"),
            "text_encoder_2": OffloadPolicy("block"),
        },
    }
    assert READ({"cpu_offload": True, "offload_ratio": 1}).arguments(flux)["components"] == {}
    for config in (
        {"offload_ratio": 0.5},
        {"cpu_offload": True, "offload_granularity": "model", "offload_ratio": 0.5},
    ):
        assert "offload_ratio" not in READ(config).arguments(flux)


@pytest.mark.parametrize("key", ["lazy_load", "offload_to_disk"])
def test_either_key_keeps_weights_on_disk(flux, key):
    config = {"cpu_offload": True, key: True, "num_disk_workers": 4, "max_memory": 1.5}
    assert READ(config).arguments(flux) == {
        "offload_granularity": "block",
        "tier": "disk",
        "offload_dir": default_folder(),
        "num_disk_workers": 4,
        "max_host_memory": 3 * 2**29,
        "components": {},
    }
    theirs = READ({"cpu_offload": True, key: True}).arguments(flux)
    assert (theirs["num_disk_workers"], theirs["max_host_memory"]) == (2, 2**31)
    assert not DISK_ARGUMENTS & READ({"cpu_offload": True, key: False}).arguments(flux).keys()
    assert not DISK_ARGUMENTS & READ(config).arguments(flux, tier="pinned").keys() - {"tier"}


@pytest.mark.parametrize(
    ("size", "nbytes"),
    [(8, 2**33), (0.5, 2**29), ("8GiB", 2**33), ("1536MiB", 3 * 2**29), ("8GB", 8 * 10**9)],
)
def test_max_memory_counts_gib(size, nbytes):
    assert OffloadConfig(max_memory=size).max_memory_bytes == nbytes


def test_wans_text_encoder_is_a_t5():
    config = READ({"cpu_offload": True, "t5_cpu_offload": False})
    assert config.arguments(build("wan"))["components"] == {"text_encoder": "resident"}


# --- enabling -----------------------------------------------------------------------------------------

CONFIGS = [
    {"cpu_offload": True},
    {"cpu_offload": True, "offload_ratio": 0.5, "offload_granularity": "phase"},
    {"cpu_offload": True, "t5_cpu_offload": False, "clip_cpu_offload": False, "vae_cpu_offload": False},
    {"cpu_offload": True, "offload_granularity": "model"},
    {"cpu_offload": False},
    {"cpu_offload": False, "t5_cpu_offload": True, "vae_cpu_offload": True},
]


@pytest.mark.parametrize("name", ["wan", "flux"])
@pytest.mark.parametrize("config", CONFIGS, ids=["all", "half", "denoiser", "model", "none", "others"])
def test_equals_the_resident_pipeline(name, config, device):
    pipe = build(name, device=device)
    expected = run(pipe, name)
    pipe.to("cpu").enable_block_offload(device=device, config=config)
    with no_weight_used_while_offloaded(pipe):
        assert torch.equal(run(pipe, name), expected)
    assert torch.equal(run(pipe, name), expected)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), name), expected)


def test_a_path_a_dict_and_a_config_are_the_same(tmp_path):
    config = {"cpu_offload": True, "offload_ratio": 0.5, "vae_cpu_offload": False}
    file = tmp_path / "wan.json"
    file.write_text(json.dumps(config))
    assert READ(file) == READ(str(file)) == READ(config) == OffloadConfig(**config)
    pipe = build("wan")
    plans = []
    for each in (file, str(file), config, READ(config)):
        pipe.enable_block_offload("cpu", config=each)
        plans.append(pipe.block_offload.plan)
    assert all(plan == plans[0] for plan in plans)
    assert policies(pipe) == {"vae": "resident", "text_encoder": "block", "transformer": "block"}
    ratios = {c.name: c.policy.ratio for c in pipe.block_offload.plan.components}
    assert ratios["text_encoder"] == 1.0
    assert ratios["transformer"] == 0.5


def test_arguments_given_besides_win(flux):
    config = {"cpu_offload": True, "offload_ratio": 0.5, "t5_cpu_offload": False, "clip_cpu_offload": False}
    asked = OffloadConfig(**config)
    flux.enable_block_offload(
        "cpu",
        "phase",
        offload_ratio=1.0,
        components={"text_encoder": "model"},
        max_device_memory=None,
        config=config,
    )
    assert policies(flux) == {
        "vae": "model",
        "text_encoder": "model",
        "text_encoder_2": "resident",
        "transformer": "phase",
    }
    assert flux.block_offload.request.default == OffloadPolicy("phase")
    assert asked.arguments(flux, offload_ratio=None)["offload_ratio"] == 0.5  # None is not given
    assert "offload_ratio" not in asked.arguments(flux, offload_granularity="model")
    flux.enable_block_offload("cpu", offload_granularity="resident", config=config)
    assert set(policies(flux).values()) == {"resident"}
    flux.disable_block_offload()


def test_what_is_wrong_changes_nothing(flux):
    flux.enable_block_offload("cpu")
    handle = flux.block_offload
    for config, key in (
        ({"cpu_offload": "yes"}, "cpu_offload"),
        ("nowhere.json", "nowhere.json"),
    ):
        with pytest.raises(ValueError, match=key):
            flux.enable_block_offload("cpu", config=config)
    with pytest.raises(ValueError, match="components"):
        flux.enable_block_offload("cpu", components=["vae"], config={})
    with pytest.raises(TypeError, match="offload_gran"):
        flux.enable_block_offload("cpu", offload_gran="block", config={})
    assert flux.block_offload is handle
    flux.disable_block_offload()


@pytest.mark.parametrize("key", ["lazy_load", "offload_to_disk"])
def test_lazy_loading(key, tmp_path, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    config = {"cpu_offload": True, key: True, "max_memory": "1100KiB", "offload_granularity": "phase"}
    config["offload_ratio"] = 1.0  # or everything would stay on a device that has room for it
    pipe.to("cpu").enable_block_offload(device, config=config, offload_dir=tmp_path)
    assert torch.equal(run(pipe, "flux"), expected)
    assert pipe.block_offload.plan.disk_bytes and list(tmp_path.rglob("*.safetensors"))


# --- Modular Diffusers --------------------------------------------------------------------------------


@pytest.mark.usefixtures("without_ftfy")
def test_a_modular_pipeline():
    pipe = build_modular("flux")
    pipe.enable_block_offload(device="cpu", config={"cpu_offload": True, "t5_cpu_offload": False})
    assert policies(pipe)["text_encoder_2"] == "resident"
    assert policies(pipe)["text_encoder"] == "block"


@pytest.mark.usefixtures("without_ftfy")
def test_a_modular_pipeline_whose_components_come_later():
    pipe = blocks_of("flux").init_pipeline()
    with warnings_of_ours() as warned:
        pipe.enable_block_offload("cpu", config={"cpu_offload": True, "t5_cpu_offload": False})
    assert not warned
    pipe.update_components(**{k: m for k, m in build("flux").components.items() if k in pipe.component_names})
    assert policies(pipe)["text_encoder_2"] == "resident"
    assert policies(pipe)["text_encoder"] == "block"


# --- the examples -------------------------------------------------------------------------------------


def test_there_is_an_example_for_each_card():
    assert [path.stem for path in EXAMPLES] == ["card_12gb", "card_16gb", "card_24gb", "card_8gb"]


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
@pytest.mark.parametrize("name", ["wan", "flux"])
def test_the_examples_load_without_a_warning_and_run(path, name, tmp_path):
    with warnings_of_ours() as warned:
        config = READ(path)
    assert not warned
    assert config.cpu_offload
    pipe = build(name)
    expected = run(pipe, name)
    pipe.enable_block_offload("cpu", config=config, offload_dir=tmp_path)
    assert torch.equal(run(pipe, name), expected)

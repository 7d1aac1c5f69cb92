"""Weights on disk: equal to the bit, within the host memory that is given, whatever is done to them."""

import shutil

import pytest
import torch
from helpers import build, run, weights_of

import diffusers_offload
from diffusers_offload import OffloadPolicy
from diffusers_offload.tiers import files
from diffusers_offload.tiers.blockfile import StoreError
from diffusers_offload.tiers.mapped import DiskMemory
from diffusers_offload.tiers.reader import DiskReadError

GRANULARITIES = ("block", "phase", "leaf")


def weights_and_modules(pipe):
    return {key: m for key, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def on_disk(pipe, folder, device, **arguments):
    pipe.to("cpu").enable_block_offload(
        device=device, tier="disk", offload_dir=folder, **{"offload_ratio": 1.0, **arguments}
    )
    return pipe.block_offload


@pytest.mark.parametrize("memory", [None, "1100KiB"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl-controlnet"])
def test_equals_the_resident_pipeline(name, granularity, memory, tmp_path, device):
    if name == "sdxl-controlnet" and memory is not None:
        memory = "3MiB"
    pipe = build(name, device=device)
    expected = run(pipe, name)
    weights = {key: weights_of(module) for key, module in weights_and_modules(pipe).items()}
    handle = on_disk(pipe, tmp_path, device, offload_granularity=granularity, max_host_memory=memory)
    for _ in range(3):
        assert torch.equal(run(pipe, name), expected)
    report = handle.report()
    assert report.disk.bytes_read and report.disk.misses
    if memory is None:
        assert report.disk.hits and report.disk.bytes_read <= report.disk.stored_bytes
    else:
        assert report.host_bytes <= diffusers_offload.policy.parse_bytes("", memory)
    for key, module in weights_and_modules(pipe).items():
        assert all(torch.equal(t.cpu(), weights[key][n]) for n, t in module.state_dict().items())
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), name), expected)


@pytest.mark.parametrize("policy", ["static", "fifo", "lru"])
def test_cache_policies(policy, tmp_path, device):
    pipe = build("wan", device=device)
    expected = run(pipe, "wan")
    handle = on_disk(pipe, tmp_path, device, cache_policy=policy)
    run(pipe, "wan")
    handle.reset()
    before = handle.report().disk
    assert torch.equal(run(pipe, "wan"), expected)
    after = handle.report().disk
    assert after.bytes_read == before.bytes_read  # a cache that holds everything reads nothing
    assert after.misses == before.misses and after.hits > before.hits


def test_files_are_written_once(tmp_path, device):
    pipe = build("flux")
    on_disk(pipe, tmp_path, device)
    files = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")}
    assert len(files) > 10
    pipe.disable_block_offload()
    on_disk(pipe, tmp_path, device)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*.safetensors")} == files


def test_two_models_in_one_folder_do_not_mix(tmp_path, device):
    first, second = build("flux"), build("flux")
    with torch.no_grad():
        second.transformer.transformer_blocks[0].attn.to_q.weight.mul_(2)
    right = [run(each, "flux") for each in (first, second)]
    for each in (first, second, first):
        each.disable_block_offload()
    on_disk(first, tmp_path, "cpu")
    on_disk(second, tmp_path, "cpu")
    assert torch.equal(run(first, "flux"), right[0])
    assert torch.equal(run(second, "flux"), right[1])


@pytest.mark.parametrize("tells", [True, False], ids=["smaps", "no-smaps"])
@pytest.mark.parametrize("edit", ["in place", "replaced", "suspended"])
def test_edits_reach_the_disk(edit, tells, tmp_path, device, monkeypatch):
    """Whether or not the system tells which pages of a mapping were written to."""
    if not tells:
        monkeypatch.setattr(files, "private_bytes", dict)

    def change(pipe):
        weight = pipe.transformer.transformer_blocks[1].attn.to_q.weight
        if edit == "replaced":
            weight.data = weight.data * 2
        else:
            weight.mul_(2)

    pipe = build("flux")
    with torch.no_grad():
        changed = build("flux")
        change(changed)
        before, expected = run(pipe.to(device), "flux"), run(changed.to(device), "flux")
        handle = on_disk(pipe, tmp_path, device)
        assert torch.equal(run(pipe, "flux"), before)
        if edit == "suspended":
            with handle.suspended():
                change(pipe)
        else:
            change(pipe)
        for _ in range(2):
            assert torch.equal(run(pipe, "flux"), expected)
        weight = pipe.transformer.transformer_blocks[1].attn.to_q.weight
        assert torch.equal(weight.cpu(), changed.transformer.transformer_blocks[1].attn.to_q.weight.cpu())
    pipe.disable_block_offload()
    assert not list(tmp_path.rglob("edited-*"))
    assert torch.equal(run(pipe.to(device), "flux"), expected)


def test_only_some_components_are_on_disk(tmp_path, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    policy = OffloadPolicy("phase", tier="disk")
    pipe.to("cpu").enable_block_offload(
        device=device, offload_ratio=1.0, offload_dir=tmp_path, components={"text_encoder_2": policy}
    )
    assert torch.equal(run(pipe, "flux"), expected)
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} == {"text_encoder_2"}


def test_what_the_host_does_not_hold_goes_to_disk(tmp_path, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(
        device=device, max_host_memory="2MiB", offload_ratio=1.0, offload_dir=tmp_path
    )
    assert pipe.block_offload.plan.disk_bytes
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.enable_block_offload(device=device, max_host_memory="1GiB", offload_ratio=1.0, offload_dir=tmp_path)
    assert not pipe.block_offload.plan.disk_bytes


def test_a_component_that_is_exchanged(tmp_path, device):
    pipe, other = build("flux"), build("flux")
    with torch.no_grad():
        for parameter in other.transformer.parameters():
            parameter.mul_(0.9)
    before = run(pipe.to(device), "flux")
    pipe.transformer, original = other.transformer.to(device), pipe.transformer
    expected = run(pipe, "flux")
    pipe.transformer = original
    on_disk(pipe, tmp_path, device)
    assert torch.equal(run(pipe, "flux"), before)
    pipe.transformer = other.transformer.to("cpu")
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_file_that_vanishes(tmp_path, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    handle = on_disk(pipe, tmp_path, device, max_host_memory="1100KiB")
    assert torch.equal(run(pipe, "flux"), expected)
    unit = handle._held["transformer"].component.streamed[2]
    path = unit.weights.host.stored.path
    path.rename(path.with_suffix(".away"))
    with pytest.raises(DiskReadError, match=path.name):
        run(pipe, "flux")
    path.with_suffix(".away").rename(path)
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_damaged_file_is_never_served(tmp_path, device):
    pipe = build("flux", device=device)
    handle = on_disk(pipe, tmp_path, device)
    stored = handle._held["transformer"].component.streamed[2].weights.host.stored
    with open(stored.path, "r+b") as file:
        file.seek(stored.offset + 5)
        byte = file.read(1)
        file.seek(stored.offset + 5)
        file.write(bytes([byte[0] ^ 1]))
    with pytest.raises(DiskReadError, match=stored.path.name):
        run(pipe, "flux")


def test_a_full_disk_leaves_the_pipeline_as_it_was(tmp_path, device, monkeypatch):
    pipe = build("flux")
    expected = run(pipe.to(device), "flux")
    pipe.to("cpu")
    usage = shutil.disk_usage(tmp_path)
    calls = iter(range(1000))
    monkeypatch.setattr(
        shutil, "disk_usage", lambda path: usage._replace(free=0) if next(calls) > 3 else usage
    )
    with pytest.raises(StoreError, match=r"transformer|text_encoder|vae"):
        on_disk(pipe, tmp_path, device)
    monkeypatch.undo()
    assert pipe.block_offload is None
    assert torch.equal(run(pipe.to(device), "flux"), expected)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({"tier": "disk"}, "offload_dir"),
        ({"tier": "tape", "offload_dir": "x"}, "tier"),
        ({"tier": "disk", "offload_dir": 3}, "offload_dir"),
        ({"offload_dir": "x", "num_disk_workers": 0}, "num_disk_workers"),
        ({"offload_dir": "x", "cache_policy": "best"}, "cache_policy"),
        ({"tier": "disk", "offload_dir": "x", "max_host_memory": 1000}, "max_host_memory"),
    ],
)
def test_wrong_arguments(arguments, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pipe = build("wan")
    with pytest.raises(ValueError, match=name):
        pipe.enable_block_offload(device="cpu", **arguments)
    assert pipe.block_offload is None
    assert not list(tmp_path.iterdir())


def test_the_tensors_look_at_the_files(tmp_path):
    pipe = build("wan")
    handle = on_disk(pipe, tmp_path, "cpu")
    for held in handle._held.values():
        for unit in (*held.component.streamed, *held.component.stem):
            assert isinstance(unit.weights.host, DiskMemory)

"""Packed weights on disk: outputs and weights are the true ones, the disk reads less, and what stands in says so."""

import pytest
import torch
from helpers import build, run, weights_of
from safetensors import safe_open
from test_packed_tier import assert_same, modules, packed_units

import diffusers_offload
from diffusers_offload.tiers import packed
from diffusers_offload.tiers.mapped import PackedDiskMemory


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    """Units of some KiB go through the ring in several batches, as large ones do."""
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)


def on_disk(pipe, folder, device, **arguments):
    given = {"tier": "disk", "offload_dir": folder, "offload_ratio": 1.0, "pack_on_disk": True, **arguments}
    pipe.to("cpu").enable_block_offload(device=device, **given)
    return pipe.block_offload


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


@pytest.mark.parametrize(
    ("granularity", "memory", "dtype"),
    [
        ("block", None, torch.bfloat16),
        ("block", "500KiB", torch.float32),
        ("phase", "500KiB", torch.bfloat16),
        ("leaf", None, torch.float32),
        ("leaf", "500KiB", torch.float16),
    ],
)
@pytest.mark.parametrize("name", ["flux", "wan22"])
def test_equals_the_resident_pipeline(name, granularity, memory, dtype, tmp_path, device):
    if memory is not None and dtype is torch.float32:
        memory = "1000KiB"
    pipe = build(name, dtype, device)
    expected, weights = run(pipe, name), {key: weights_of(module) for key, module in modules(pipe)}
    handle = on_disk(pipe, tmp_path, device, offload_granularity=granularity, max_host_memory=memory)
    assert len(packed_units(pipe)) > 5
    for _ in range(2):
        assert torch.equal(run(pipe, name), expected)
    report = handle.report()
    assert report.disk.bytes_read and report.packed is not None
    if memory is not None:
        assert report.host_bytes <= diffusers_offload.policy.parse_bytes("", memory)
    assert_same(weights, pipe)  # read from the files
    pipe.disable_block_offload()
    assert_same(weights, pipe)
    assert torch.equal(run(pipe.to(device), name), expected)


@pytest.mark.parametrize("policy", ["static", "fifo", "lru"])
def test_the_disk_reads_and_the_host_holds_less(policy, tmp_path, device):
    pipe = build("flux", torch.bfloat16, device)
    expected, reports = run(pipe, "flux"), []
    for packs in (False, True):
        memory = {"static": None, "fifo": "600KiB", "lru": "600KiB"}[policy]
        handle = on_disk(
            pipe, tmp_path, device, pack_on_disk=packs, cache_policy=policy, max_host_memory=memory
        )
        assert torch.equal(run(pipe, "flux"), expected)
        reports.append(handle.report())
        pipe.disable_block_offload()
    raw, less = reports
    assert less.disk.stored_bytes < 0.85 * raw.disk.stored_bytes
    if policy == "static":  # everything is read once
        assert less.disk.bytes_read < 0.85 * raw.disk.bytes_read
        assert less.host_bytes < 0.85 * raw.host_bytes
    assert less.disk.bytes_read < raw.disk.bytes_read
    assert {path.name.partition("-")[0] for path in tmp_path.iterdir()} >= {"transformer"}
    assert len(list(tmp_path.glob("transformer-*"))) == 2  # raw and packed are different folders


def test_files_are_written_once_and_packed_once(tmp_path, monkeypatch):
    pipe = build("flux", torch.bfloat16)
    calls, pack = [], packed.pack
    monkeypatch.setattr(packed, "pack", lambda *a: (calls.append(a[1].nbytes), pack(*a))[1])
    on_disk(pipe, tmp_path, "cpu")
    before = written(tmp_path)
    units = [u for h in pipe.block_offload._held.values() for u in h.component.streamed]
    assert sum(calls) == sum(unit.nbytes for unit in units)
    calls.clear()
    pipe.disable_block_offload()
    on_disk(pipe, tmp_path, "cpu")
    assert written(tmp_path) == before and not calls


def test_any_reader_opens_the_files(tmp_path):
    pipe = build("flux", torch.bfloat16)
    on_disk(pipe, tmp_path, "cpu")
    unit = next(unit for unit in packed_units(pipe) if unit.component.name == "transformer")
    host = unit.weights.host
    assert isinstance(host, PackedDiskMemory)
    with safe_open(host.stored.path, "pt") as opened:
        (name,) = (name for name in opened.keys() if name.startswith("__packed__"))  # noqa: SIM118
        assert torch.equal(opened.get_tensor(name), host.bytes)
        assert unit.name in opened.metadata()["diffusers_offload"]


# --- what tensors look at meanwhile ----------------------------------------------------------------------


@pytest.mark.parametrize("silently", [False, True])
def test_an_edit_of_what_stands_in_is_refused(silently, tmp_path, device):
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    pipe.transformer.requires_grad_(False)
    on_disk(pipe, tmp_path, device)
    model = written(tmp_path)
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    (weight.data if silently else weight).add_(1)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0.*suspended"):
        run(pipe, "flux")
    assert torch.equal(run(pipe, "flux"), expected)
    with pipe.block_offload.suspended():
        assert not weight.isnan().any()
        weight.add_(1)
    edited = run(pipe, "flux")
    assert weight.isnan().all() and not torch.equal(edited, expected)
    assert len(list(tmp_path.rglob("edited-*"))) == 1  # of one unit, the others are the model's still
    with pipe.block_offload.suspended():
        weight.sub_(1)
        back = torch.equal(weight, weight)
    assert back
    pipe.disable_block_offload()
    assert written(tmp_path) == model


def test_edited_back_is_the_models(tmp_path):
    pipe = build("flux", torch.bfloat16)
    pipe.transformer.requires_grad_(False)
    expected = run(pipe, "flux")
    on_disk(pipe, tmp_path, "cpu")
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    for factor, files in ((2, 1), (0.5, 0)):
        with pipe.block_offload.suspended():
            weight.mul_(factor)
        run(pipe, "flux")
        assert len(list(tmp_path.rglob("edited-*"))) == files
    assert torch.equal(run(pipe, "flux"), expected)


@pytest.mark.parametrize("kept_as_it_is", [False, True])
def test_a_weight_that_is_replaced_or_was_never_coded(kept_as_it_is, tmp_path, device, monkeypatch):
    """A small tensor is true in between, and may be edited there; so may any be replaced."""
    monkeypatch.setattr(packed, "SMALLEST", 1024)
    pipe = build("flux", torch.bfloat16, device)
    on_disk(pipe, tmp_path, device)
    run(pipe, "flux")
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    with torch.no_grad():
        if kept_as_it_is:
            assert not layer.bias.isnan().any() and layer.weight.isnan().all()
            layer.bias.mul_(2)
        else:
            layer.weight.data = torch.ones(layer.weight.shape, dtype=torch.bfloat16)
    edited = run(pipe, "flux")
    pipe.disable_block_offload()
    assert not layer.weight.isnan().any()
    assert torch.equal(run(pipe.to(device), "flux"), edited)

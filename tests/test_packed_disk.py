"""Packed weights on disk: outputs and weights are the true ones, the disk reads less, and what stands in says so."""

import shutil

import odd_nets
import pytest
import torch
from helpers import build, run, weights_of
from safetensors import safe_open
from stores import change
from test_disk_faults import net_of, outputs, same, same_weights
from test_disk_states import adapted
from test_from_pretrained import quiet
from test_packed_tier import assert_same, modules, packed_units

import diffusers_offload
from diffusers_offload import OffloadPolicy
from diffusers_offload.packing import unpacks_fast
from diffusers_offload.tiers import disk, packed
from diffusers_offload.tiers.blockfile import StoreError
from diffusers_offload.tiers.mapped import PackedDiskMemory
from diffusers_offload.tiers.packedmemory import PackedMemory
from diffusers_offload.tiers.reader import DiskReadError
from diffusers_offload.tiers.store import Store


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
    ("name", "granularity", "memory", "dtype"),
    [
        ("flux", "block", None, torch.bfloat16),
        ("flux", "block", "1000KiB", torch.float32),
        ("wan22", "phase", "500KiB", torch.bfloat16),
        ("flux", "leaf", "500KiB", torch.float16),
    ],
)
def test_equals_the_resident_pipeline(name, granularity, memory, dtype, tmp_path, device):
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


def test_the_disk_reads_and_the_host_holds_less(tmp_path, device):
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    for policy, memory in (("static", None), ("fifo", "600KiB"), ("lru", "600KiB")):
        reports = []
        for packs in (False, True):
            handle = on_disk(
                pipe, tmp_path, device, pack_on_disk=packs, cache_policy=policy, max_host_memory=memory
            )
            assert torch.equal(run(pipe, "flux"), expected)
            reports.append(handle.report())
            pipe.disable_block_offload()
        raw, less = reports
        assert less.disk.stored_bytes < 0.85 * raw.disk.stored_bytes
        assert less.disk.bytes_read < raw.disk.bytes_read
        if policy == "static":  # everything is read once
            assert less.disk.bytes_read < 0.85 * raw.disk.bytes_read
            if device == "cpu":  # staging is larger than so small a model
                assert less.host_bytes < 0.85 * raw.host_bytes
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


def unnamed(folder):
    with open("/proc/self/maps") as lines:
        return any(str(folder) in line and "(deleted)" in line for line in lines)


def test_an_edit_of_what_stands_in_is_refused(tmp_path, device):
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    pipe.transformer.requires_grad_(False)
    on_disk(pipe, tmp_path, device)
    model = written(tmp_path)
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    for silently in (False, True):
        (weight.data if silently else weight).add_(1)
        with pytest.raises(RuntimeError, match=r"transformer_blocks\.0.*suspended"):
            run(pipe, "flux")
    assert torch.equal(run(pipe, "flux"), expected)
    with pipe.block_offload.suspended():
        assert not weight.isnan().any() and not unnamed(tmp_path)
        weight.mul_(2)
    other = run(pipe, "flux")
    assert weight.isnan().all() and not torch.equal(other, expected)
    assert len(list(tmp_path.rglob("edited-*"))) == 1  # of one unit, the others are the model's still
    pipe.disable_block_offload()
    assert written(tmp_path) == model


def test_edited_back_is_the_models(tmp_path, monkeypatch):
    """Also where memory is too short to unpack everything at once."""
    monkeypatch.setattr(disk, "available_memory", lambda: 1)
    pipe = build("flux", torch.bfloat16)
    pipe.transformer.requires_grad_(False)
    expected = run(pipe, "flux")
    on_disk(pipe, tmp_path, "cpu", max_host_memory="4MiB")
    weight = pipe.transformer.transformer_blocks[0].ff.net[2].weight
    for factor, files in ((2, 1), (0.5, 0)):
        with pipe.block_offload.suspended():
            weight.mul_(factor)
            assert unnamed(tmp_path)
        assert len(list(tmp_path.rglob("edited-*"))) == files
    assert torch.equal(run(pipe, "flux"), expected)


def test_weights_that_are_replaced_or_were_never_coded(tmp_path, device, monkeypatch):
    """A small tensor is true in between, and may be edited there; so may any be replaced."""
    monkeypatch.setattr(packed, "SMALLEST", 1024)
    resident, pipe = build("flux", torch.bfloat16, device), build("flux", torch.bfloat16, device)
    on_disk(pipe, tmp_path, device)
    run(pipe, "flux")
    edits = {
        0: lambda layer: layer.bias.mul_(2),
        1: lambda layer: setattr(layer.weight, "data", torch.ones_like(layer.weight, device="cpu")),
    }
    layers = [[block.proj_mlp for block in p.transformer.single_transformer_blocks] for p in (resident, pipe)]
    assert not layers[1][0].bias.isnan().any() and layers[1][0].weight.isnan().all()
    with torch.no_grad():
        for number, edit in edits.items():
            for each in layers:
                edit(each[number])
    expected = run(resident.to(device), "flux")
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert not layers[1][1].weight.isnan().any()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


class Remembers(torch.nn.Module):
    """Writes to a buffer that is coded, and maybe to one that is not."""

    def __init__(self, counts):
        super().__init__()
        self.counts = counts
        self.a, self.b = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        self.register_buffer("seen", torch.randn(64, 64))
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))

    def forward(self, x):
        self.seen += x.mean()
        self.count += self.counts
        return torch.tanh(self.b(self.a(x)) @ self.seen) + self.count.sum()


@pytest.mark.parametrize("counts", [0, 1], ids=["coded", "both"])
def test_buffers_that_a_forward_writes_to(counts, tmp_path, device):
    def net():
        torch.manual_seed(0)
        made = odd_nets.Net(*(Remembers(counts) for _ in range(4)))
        made.embed, made.out = torch.nn.Linear(64, 64), torch.nn.Linear(64, 64)
        return made.eval().requires_grad_(False)

    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(1)).to(device)
    resident, offloaded = net().to(device), net()
    handle = diffusers_offload.enable_block_offload(
        offloaded, device, offload_ratio=1.0, tier="disk", offload_dir=tmp_path, pack_on_disk=True
    )
    units = handle._engine.homes.units
    assert all(isinstance(unit.weights.host, PackedMemory) for unit in units)
    for _ in range(3):
        assert torch.equal(offloaded(x), resident(x))
    assert not any(
        isinstance(unit.weights.host, PackedMemory) for unit in units
    )  # it would be packed again and again
    assert same_weights(offloaded, resident)
    handle.disable()
    assert same_weights(offloaded, resident)


class Wide(odd_nets.Plain):
    """With a layer in between that shrinks."""

    def __init__(self):
        super().__init__()
        self.b, self.d = torch.nn.Linear(odd_nets.WIDTH, 128), torch.nn.Linear(128, 128)
        self.c = torch.nn.Linear(128, odd_nets.WIDTH)

    def forward(self, x, *_):
        return torch.tanh(x + self.c(torch.tanh(self.d(self.b(self.a(x))))))


def test_a_component_that_is_taken_apart_anew(tmp_path, device):
    """Its new units are not those of the files: true values are written, and what is gone goes."""
    net, twin = net_of(4, Wide), net_of(4, Wide)
    arguments = {"tier": "disk", "offload_dir": tmp_path, "pack_on_disk": True, "offload_ratio": 1.0}
    with torch.no_grad():
        handle = diffusers_offload.enable_block_offload(net, device, **arguments)
        twin.to(device)
        assert same(outputs(net, device), outputs(twin, device))
        assert all(isinstance(unit.weights.host, PackedMemory) for unit in handle._engine.units)
        model, layers = written(tmp_path), (net.blocks[1].d, twin.blocks[1].d)
        for each in (net, twin):
            torch.manual_seed(0)
            each.blocks[1].d = adapted(each.blocks[1].d.to(device if each is twin else "cpu"))
        twin.to(device)
        handle.call_ended()
        assert same(outputs(net, device), outputs(twin, device)) and same_weights(net, twin)
        assert len(list((tmp_path / "passing").iterdir())) == 1
        net.blocks[1].d, twin.blocks[1].d = layers
        handle.call_ended()
        assert same(outputs(net, device), outputs(twin, device))
        assert not (tmp_path / "passing").exists() and written(tmp_path) == model
        held = handle._held["module"]
        held.target = held.target.finer()
        held.renew()
        assert same(outputs(net, device), outputs(twin, device)) and same_weights(net, twin)
        assert not (tmp_path / "passing").exists()  # the same weights, divided in another way
        handle.disable()
    assert same_weights(net, twin)


# --- folders that are there -------------------------------------------------------------------------------


PARTLY = ("partly resident", "one resident", "as a whole")
OPENED = {
    "as it is": {},
    "smaller units": {"offload_granularity": "phase"},
    "raw": {"pack_on_disk": False},
    "pinned": {"tier": "pinned"},
    "packed": {"tier": "packed"},
    "partly resident": {"offload_ratio": 0.5},
    "resident": {"offload_granularity": "resident"},
    "one resident": {"components": {"transformer": "resident"}},
    "as a whole": {"components": {"transformer": OffloadPolicy("model", tier="disk")}},
}


@pytest.fixture(scope="module")
def converted(tmp_path_factory):
    """A pipeline, its picture, and where it was converted to."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packed, "SMALLEST", 0)
        patch.setattr(packed, "SLOT_BYTES", 64 * 1024)
        folder = tmp_path_factory.mktemp("converted")
        pipe = build("flux", torch.bfloat16)
        pipe.save_pretrained(folder / "source", max_shard_size="300KB")
        place = diffusers_offload.convert(folder / "source", folder / "packed", torch.bfloat16, packed=True)
        shutil.rmtree(folder / "source")
        yield pipe, run(pipe, "flux"), place


@pytest.mark.parametrize("how", OPENED)
def test_a_converted_folder_is_used_as_it_is(how, converted, tmp_path, device):
    right, expected, place = converted
    place = shutil.copytree(place, tmp_path / "place")
    before = written(place)
    arguments = {"device": device, "offload_ratio": 1.0, **OPENED[how]}
    pipe = quiet(diffusers_offload.from_pretrained(place, **arguments))
    weights = {key: weights_of(module) for key, module in modules(right)}
    if device == "cpu":
        assert torch.equal(run(pipe, "flux"), expected)
    assert_same(weights, pipe)
    assert (written(place) == before) == (how not in ("smaller units", "as a whole"))
    packs = ["as it is", "raw", "packed", *PARTLY]
    if unpacks_fast(torch.device(device)):  # there what is written anew is packed, too
        packs.append("smaller units")
    assert bool(packed_units(pipe)) == (how in packs)
    pipe.disable_block_offload()
    assert_same(weights, pipe)


def test_from_pretrained_packs(converted, tmp_path, monkeypatch):
    right, expected, _ = converted
    right.save_pretrained(tmp_path / "source")
    folder = tmp_path / "offload"
    arguments = {"torch_dtype": torch.bfloat16, "device": "cpu", "offload_dir": folder}
    pipe = quiet(diffusers_offload.from_pretrained(tmp_path / "source", **arguments, pack_on_disk=True))
    assert len(packed_units(pipe)) > 5 and torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    before = written(folder)
    monkeypatch.setattr("diffusers_offload.saved.settling._part", lambda *_: pytest.fail("read again"))
    again = quiet(diffusers_offload.from_pretrained(tmp_path / "source", **arguments, pack_on_disk=True))
    assert written(folder) == before and len(packed_units(again)) > 5
    again.disable_block_offload()
    monkeypatch.undo()
    raw = quiet(diffusers_offload.from_pretrained(tmp_path / "source", **arguments))
    assert not packed_units(raw)  # the CPU unpacks slowly


def test_a_conversion_that_was_stopped_goes_on(converted, tmp_path, monkeypatch):
    """What was packed and written before is not packed again."""
    right, expected, _ = converted
    right.save_pretrained(tmp_path / "source")
    arguments = {
        "source": tmp_path / "source",
        "destination": tmp_path / "place",
        "torch_dtype": torch.bfloat16,
        "packed": True,
    }
    calls, done, pack, put = [], [], packed.pack, Store.put
    monkeypatch.setattr(packed, "pack", lambda *a: (calls.append(a), pack(*a))[1])

    def stop(store, block, parts, digests=None):
        if len(calls) > 4:
            raise StoreError("the disk is full")
        done.append(len(calls))
        return put(store, block, parts, digests)

    monkeypatch.setattr(Store, "put", stop)
    with pytest.raises(StoreError, match="full"):
        diffusers_offload.convert(**arguments)
    monkeypatch.setattr(Store, "put", put)
    calls.clear()
    place = diffusers_offload.convert(**arguments)
    again = len(calls)
    diffusers_offload.convert(**{**arguments, "destination": tmp_path / "other"})
    assert done[-1] > 2 and done[-1] + again == len(calls) - again
    pipe = quiet(diffusers_offload.from_pretrained(place, device="cpu"))
    assert len(packed_units(pipe)) > 5 and torch.equal(run(pipe, "flux"), expected)
    calls.clear()
    files = written(place)
    assert written(diffusers_offload.convert(**arguments)) == files and not calls


# --- damage -----------------------------------------------------------------------------------------------


def test_damage_is_never_served(tmp_path, device):
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    on_disk(pipe, tmp_path, device)
    unit = next(unit for unit in packed_units(pipe) if unit.component.name == "transformer")
    stored = unit.weights.host.stored
    change(stored.path, stored.offset + 5000, stored.path.read_bytes()[stored.offset + 5000] ^ 1)
    with pytest.raises(DiskReadError, match=stored.path.name):
        run(pipe, "flux")
    with pytest.raises(StoreError, match=stored.path.name):
        pipe.transformer.state_dict()
    with pytest.raises(StoreError, match=stored.path.name):
        pipe.disable_block_offload()
    change(stored.path, stored.offset + 5000, stored.path.read_bytes()[stored.offset + 5000] ^ 1)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


@pytest.mark.parametrize("value", [1, 0, "yes", [], "True"])
def test_wrong_arguments(value, tmp_path):
    pipe = build("wan")
    with pytest.raises(ValueError, match="pack_on_disk"):
        pipe.enable_block_offload(device="cpu", offload_dir=tmp_path, pack_on_disk=value)
    with pytest.raises(ValueError, match="packed"):
        diffusers_offload.convert("nowhere", tmp_path, packed=value)

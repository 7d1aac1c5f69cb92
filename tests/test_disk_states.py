"""What weights become while they are on disk, and what is left of it; and a disk that does not answer."""

import gc
import json
import logging
import shutil
import time

import pytest
import torch
from disks import Gate, preadv, until
from odd_nets import STEPS
from stores import read_only, tiny_disk  # noqa: F401
from test_disk_faults import net_of, on_disk, outputs, same, same_weights, unit_of

from diffusers_offload import slab
from diffusers_offload.tiers import buffers, digests, lock
from diffusers_offload.tiers.blockfile import Part, StoreError
from diffusers_offload.tiers.cache import share_out
from diffusers_offload.tiers.descriptors import System
from diffusers_offload.tiers.mapped import DiskMemory
from diffusers_offload.tiers.pinned import STAGING_BYTES, STAGING_SHARE, staging_bytes
from diffusers_offload.tiers.reader import Reader
from diffusers_offload.tiers.store import Store


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


def written(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*.safetensors")}


def adapted(layer):
    """As an adapter does it: the layer within another one, with more weights."""
    return torch.nn.Sequential(layer, torch.nn.Linear(layer.out_features, layer.out_features))


# --- what weights become ------------------------------------------------------------------------------------


def test_files_of_a_state_that_is_gone_go(tmp_path):
    net = net_of(4)
    handle = on_disk(net, tmp_path)
    expected, model, layer = outputs(net), written(tmp_path), net.blocks[1].a
    passing = tmp_path / "passing"
    for _ in range(3):
        net.blocks[1].a = adapted(layer)
        handle.call_ended()
        outputs(net)
        assert len(list(passing.iterdir())) == 1
        net.blocks[1].a = layer
        handle.call_ended()
        assert same(outputs(net), expected)
        assert not passing.exists() and written(tmp_path) == model  # found again, not written
    net.blocks[1].a = adapted(layer)
    handle.call_ended()
    expected = outputs(net)
    handle.disable()
    assert not passing.exists() and written(tmp_path) == model
    assert same(outputs(net), expected)


def test_edits_of_a_state_that_is_gone_go(tmp_path):
    net, twin = net_of(4), net_of(4)
    handle = on_disk(net, tmp_path)
    for each in (net, twin):
        each.blocks[1].a.weight.mul_(2)
    assert same(outputs(net), outputs(twin))
    assert len(list(tmp_path.rglob("edited-*"))) == 1
    for each in (net, twin):
        torch.manual_seed(0)
        each.blocks[1].a = adapted(each.blocks[1].a)
    handle.call_ended()
    assert same(outputs(net), outputs(twin))
    assert not list(tmp_path.rglob("edited-*"))
    handle.disable()
    assert same_weights(net, twin)


def test_a_restart_finds_the_files_also_with_an_adapter(tmp_path):
    for adapt in (False, True):
        net = net_of(4)
        if adapt:
            torch.manual_seed(1)
            net.blocks[1].a = adapted(net.blocks[1].a)
        on_disk(net, tmp_path).disable()
        model = written(tmp_path)
        assert model
        on_disk(net, tmp_path).disable()
        assert written(tmp_path) == model


def test_the_same_weights_divided_in_another_way_stay(tmp_path):
    """A process that needs smaller units needs them the next time, too."""
    found = []
    for _ in range(2):
        net = net_of(4)
        handle = on_disk(net, tmp_path)
        held = handle._held["module"]
        held.target = held.target.finer()
        held.renew()
        assert same(outputs(net), outputs(net_of(4)))
        handle.disable()
        assert not (tmp_path / "passing").exists()
        found.append(written(tmp_path))
    assert found[0] == found[1] and len({path.parent for path in found[0]}) == 2


def left_behind(folder):
    """A store as a process leaves it that was killed while an adapter was loaded."""
    tensors = [torch.ones(10)]
    part = Part("a", slab.lay_out(tensors), ("a.0",), slab.sources(slab.lay_out(tensors), tensors))
    store = Store(folder / "passing", "module", "0" * 16)
    store.put("a", [part])
    store.commit(["a"])
    return store


def test_what_a_killed_process_left_is_deleted(tmp_path):
    left_behind(tmp_path).close()
    on_disk(net_of(2), tmp_path).disable()
    assert not (tmp_path / "passing").exists()


def test_what_another_process_uses_stays(tmp_path):
    used = left_behind(tmp_path)  # its lock is another one, as another process's would be
    net = net_of(4)
    handle = on_disk(net, tmp_path)
    assert used.folder.exists()
    net.blocks[1].a = adapted(net.blocks[1].a)
    handle.call_ended()
    expected = outputs(net)
    mine = next(path for path in (tmp_path / "passing").iterdir() if path != used.folder)
    with Store(tmp_path / "passing", "module", identity_in(mine)) as other:
        handle.disable()
        assert mine.exists() and other.complete
    assert same(outputs(net), expected)
    used.close()


def identity_in(folder):
    return json.loads((folder / "manifest.json").read_bytes())["manifest"]["identity"]


def test_a_folder_that_was_deleted_while_its_lock_was_waited_for_is_made_anew(tmp_path, monkeypatch):
    store = left_behind(tmp_path)
    store._lock.make_alone()
    true = lock.time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (store.discard(), true(0)))
    with Store(tmp_path / "passing", "module", "0" * 16, wait=5.0) as second:
        assert second.folder.exists() and not second.complete and not second.blocks()
        with pytest.raises(OSError, match="is being written"):
            Store(tmp_path / "passing", "module", "0" * 16)


def test_a_unit_that_was_never_on_disk_gets_a_file_when_it_is_edited(tmp_path):
    net, twin = net_of(4), net_of(4)
    handle = on_disk(net, tmp_path)
    files, component = handle._engine.disk._files, handle._held["module"].component
    outputs(net)
    shelf = files._shelves[component]
    for store in shelf.lasting:
        store.close()
    shelf.lasting = []
    for _ in range(2):
        for each in (net, twin):
            each.blocks[1].a.weight.mul_(2)
        assert same(outputs(net), outputs(twin)) and same_weights(net, twin)
        assert isinstance(unit_of(handle, 1).weights.host, DiskMemory)
    handle.disable()
    assert not (tmp_path / "passing").exists()


def test_weights_are_read_where_they_lie(tmp_path, monkeypatch):
    """Each byte is hashed once, none is copied, and what is on the disk is not written."""
    hashed, copied = [], []
    of_piece, gather = digests.of_piece, slab.gather
    monkeypatch.setattr(digests, "of_piece", lambda *v: (hashed.append(sum(map(len, v))), of_piece(*v))[1])
    monkeypatch.setattr(slab, "gather", lambda *a: (copied.append(a), gather(*a))[1])
    net = net_of(4)
    for _ in range(2):
        handle = on_disk(net, tmp_path)
        component = handle._held["module"].component
        assert sum(hashed) == sum(unit.nbytes for unit in (*component.streamed, *component.stem))
        assert not copied
        handle.disable()
        hashed.clear()


# --- host memory --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [2**16, 10**6, 512 * 2**20, 2**34])
def test_staging_is_a_small_part_of_the_bound(limit):
    total = staging_bytes(limit, True)
    assert 8192 <= total <= max(8192, min(limit // STAGING_SHARE, 2 * STAGING_BYTES))
    assert total.bit_count() == 1 and staging_bytes(limit, False) == 0
    sizes = [limit // 10 // 4096 * 4096] * 20
    assert share_out(limit, sizes, staging=total).nbytes + total <= limit


def test_what_is_said_to_be_enough_host_memory_is():
    for largest in (2**16, 10**6, 10**8 + 1):
        for limit in (largest // 2, largest, largest * 9 // 8):
            if staging_bytes(limit, True) + largest > limit:
                with pytest.raises(ValueError, match="give at least"):
                    share_out(limit, [largest] * 2, staging=staging_bytes(limit, True))
        least = largest * 8 // 7 + 1
        assert share_out(least, [largest] * 2, staging=staging_bytes(least, True)).slots == 1


# --- a disk that does not answer ----------------------------------------------------------------------------


@pytest.fixture
def stuck(monkeypatch):
    """A disk that reads only as often as it is let, and readers that lose patience soon."""
    gate = Gate()
    monkeypatch.setattr(
        buffers, "Reader", lambda workers: Reader(workers, timeout=0.3, system=System(read=gate.read))
    )
    yield gate
    gate.let(10**6)


@pytest.mark.parametrize("end", ["disabled", "edited"])
def test_a_disk_that_does_not_answer(stuck, end, tmp_path, caplog):
    net, twin = net_of(6), net_of(6)
    handle = on_disk(net, tmp_path, max_host_memory=3 * buffers.room_for(8192))
    with pytest.raises(TimeoutError, match="loading timeout"):
        STEPS[0](net, "cpu")
    tier = handle._engine.disk._buffers
    late = [buffer for buffer in tier._lying.values() if not buffer.read.settled]
    assert late
    reads = [buffer.read for buffer in late]
    with caplog.at_level(logging.WARNING):
        if end == "edited":
            net.blocks[0].a.weight.mul_(2), twin.blocks[0].a.weight.mul_(2)
            with pytest.raises(TimeoutError):
                STEPS[0](net, "cpu")
            stuck.let(10**6)
            assert same(outputs(net), outputs(twin))
        handle.disable()
    assert "does not answer" in caplog.text
    assert same(outputs(net), outputs(twin))
    assert not handle.enabled
    late.clear()
    del tier
    gc.collect()
    if end == "disabled":
        assert not all(read.settled for read in reads)
        # Whoever holds the memory now is the thread that may still write to it.
    stuck.let(10**6)
    until(lambda: all(read.settled for read in reads))


def test_a_slow_disk_is_waited_for(tmp_path, monkeypatch):
    def read(descriptor, into, offset):
        time.sleep(0.01)
        return preadv(descriptor, into, offset)

    monkeypatch.setattr(
        buffers, "Reader", lambda workers: Reader(workers, timeout=0.5, system=System(read=read))
    )
    net = net_of(12)
    handle = on_disk(net, tmp_path, max_host_memory=3 * 8192)
    assert same(outputs(net), outputs(net_of(12)))
    assert handle.report().disk.read_seconds > 0.05
    handle.disable()


# --- folders that cannot be written -------------------------------------------------------------------------


def test_a_folder_that_may_only_be_read(tmp_path, monkeypatch):
    net, expected = net_of(4), outputs(net_of(4))
    on_disk(net, tmp_path / "full").disable()
    (tmp_path / "empty").mkdir()
    read_only(monkeypatch)
    handle = on_disk(net, tmp_path / "full")
    assert same(outputs(net), expected)
    handle.disable()
    with pytest.raises(StoreError, match="Pass an offload_dir"):
        on_disk(net, tmp_path / "empty")
    assert same(outputs(net), expected)


@pytest.mark.parametrize("told", [True, False], ids=["seen before", "while writing"])
def test_a_full_file_system_leaves_everything_as_it_was(tiny_disk, told, monkeypatch):  # noqa: F811
    net, twin = net_of(100), net_of(100)
    if not told:
        usage = shutil.disk_usage(tiny_disk)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**40))
    with pytest.raises(StoreError, match="Free space there"):
        on_disk(net, tiny_disk)
    assert same_weights(net, twin) and same(outputs(net), outputs(twin))
    assert not list(tiny_disk.rglob("*.safetensors"))

"""Edits of packed weights on disk: nobody computes with what stands in for them, and what is lost is told."""

import gc

import pytest
import torch
from helpers import run
from test_disk_faults import net_of, outputs, same, same_weights
from test_packed_disk import Wide
from test_packed_tier import METHODS, flux, packed_units

import diffusers_offload
from diffusers_offload.tiers import packed
from diffusers_offload.tiers.blockfile import StoreError
from diffusers_offload.tiers.mapped import veil_of
from diffusers_offload.tiers.store import Store


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)


def on_disk(net, folder, device="cpu"):
    return diffusers_offload.enable_block_offload(
        net, device, offload_ratio=1.0, tier="disk", offload_dir=folder, pack_on_disk=True
    )


@pytest.mark.parametrize("edit", METHODS.values(), ids=METHODS)
def test_the_models_own_methods_find_true_weights(edit, tmp_path):
    resident, offloaded = flux("cpu"), flux("cpu")
    edit(resident)
    others = dict.fromkeys(("text_encoder", "text_encoder_2", "vae"), "resident")
    offloaded.enable_block_offload(
        device="cpu",
        offload_ratio=1.0,
        tier="disk",
        offload_dir=tmp_path,
        pack_on_disk=True,
        components=others,
    )
    edit(offloaded)
    assert packed_units(offloaded)
    assert torch.equal(run(offloaded, "flux"), run(resident, "flux"))
    offloaded.disable_block_offload()
    assert "fuse_lora" not in vars(offloaded.transformer)


def product(layer):
    layer.weight.data = layer.weight.data * 2


def product_as_a_parameter(layer):
    layer.weight = torch.nn.Parameter(layer.weight * 2, requires_grad=False)


@pytest.mark.parametrize("edit", [product, product_as_a_parameter])
def test_weights_computed_from_nan_never_run(edit, tmp_path):
    with torch.no_grad():
        net, twin = net_of(4, Wide), net_of(4, Wide)
        handle = on_disk(net, tmp_path)
        before = net.blocks[1].d.weight, net.blocks[1].d.weight.data
        edit(net.blocks[1].d)
        with pytest.raises(RuntimeError, match=r"blocks\.1.*suspended"):
            outputs(net)
        net.blocks[1].d.weight = before[0]
        if edit is product:  # it has its true weights again already
            assert veil_of(before[0]) is not None
        assert same(outputs(net), outputs(twin))
        handle.call_ended()
        for each in (net, twin):
            with handle.suspended():
                edit(each.blocks[1].d)
        assert same(outputs(net), outputs(twin)) and same_weights(net, twin)
        handle.disable()
    assert same_weights(net, twin)


def turned(block):
    block.d.weight.data = block.d.weight.data.t()


def exchanged(block):
    one, other = block.b.weight, block.c.weight
    one.data, other.data = other.data.t(), one.data.t()


def another_tensor(block):
    block.d.weight = torch.nn.Parameter(block.d.weight.data, requires_grad=False)


@pytest.mark.parametrize("edit", [turned, exchanged, another_tensor])
def test_another_view_of_what_stands_in_is_one_of_the_true_weights(edit, tmp_path):
    with torch.no_grad():
        net, twin = net_of(4, Wide), net_of(4, Wide)
        handle = on_disk(net, tmp_path)
        for each in (net, twin):
            edit(each.blocks[1])
        assert same(outputs(net), outputs(twin)) and same_weights(net, twin)
        handle.disable()
    assert same_weights(net, twin)


@pytest.mark.parametrize("following", ["disable", "suspended", "to"])
def test_a_lost_edit_is_told_before_the_true_weights_are_used_otherwise(following, tmp_path):
    with torch.no_grad():
        net, twin = net_of(4, Wide), net_of(4, Wide)
        handle = on_disk(net, tmp_path)
        for block in net.blocks:
            block.d.weight.data.mul_(2)

        def follow():
            if following == "disable":
                handle.disable()
            elif following == "to":
                net.to(torch.float32)
            else:
                with handle.suspended():
                    pass

        with pytest.raises(
            RuntimeError, match=r"blocks\.0 and of 3 more units were edited.*pack_on_disk=False"
        ):
            follow()
        follow()  # told once, of all
        assert same(outputs(net), outputs(twin)) and same_weights(net, twin)
        handle.disable()


def test_state_dicts_are_apart_and_up_to_date(tmp_path):
    net = net_of(4, Wide).requires_grad_(False)
    handle, layer = on_disk(net, tmp_path), net.blocks[1].d
    first = layer.state_dict()
    first["weight"].zero_()
    second = layer.state_dict()
    assert second["weight"].any()
    with handle.suspended():
        layer.weight.add_(1)
    assert not torch.equal(layer.state_dict()["weight"], second["weight"])


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_formats_whose_nan_is_another_stay_as_they_are(dtype, tmp_path):
    net = net_of(4, Wide).requires_grad_(False)
    for block in net.blocks[:2]:
        block.register_buffer("codes", torch.randn(400, 400).to(dtype))
    expected = net.blocks[1].codes.float()
    handle = on_disk(net, tmp_path)
    assert torch.equal(net.blocks[1].codes.float(), expected)
    assert net.blocks[2].d.weight.isnan().all()
    handle.disable()


def widen(net, handle):
    with handle.suspended():
        for block in net.blocks:
            block.extra = torch.nn.Linear(8, 8)


@pytest.mark.parametrize("again", ["disable", "run"])
def test_a_component_that_could_not_be_taken_in_again_has_its_weights(again, tmp_path, monkeypatch):
    """New modules (an adapter's) want files anew, and there is no room for these."""
    full, put = [False], Store.put

    def put_if_room(*given):
        if full[0]:
            raise StoreError("no space left")
        return put(*given)

    monkeypatch.setattr(Store, "put", put_if_room)
    with torch.no_grad():
        net, twin = net_of(4, Wide), net_of(4, Wide)
        handle = on_disk(net, tmp_path)
        assert same(outputs(net), outputs(twin))
        handle.call_ended()
        full[0] = True
        with pytest.raises(StoreError):
            widen(net, handle)
        handle._engine.homes.units.clear()  # nobody remembers where they were
        gc.collect()
        full[0] = False
        if again == "run":
            assert same(outputs(net), outputs(twin))
        handle.disable()
    for block in net.blocks:
        del block.extra
    assert same_weights(net, twin)
    with torch.no_grad():
        assert same(outputs(net), outputs(twin))

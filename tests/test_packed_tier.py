"""Weights packed in host memory: outputs and weights are the true ones, and what stands in for them says so."""

import gc

import odd_nets
import pytest
import torch
from helpers import build, run, weights_of
from peft import LoraConfig

import diffusers_offload
from diffusers_offload import OffloadPolicy, held
from diffusers_offload.planning.budget import DeviceBudget
from diffusers_offload.tiers import packed
from diffusers_offload.tiers.packed import PackedMemory
from diffusers_offload.tiers.standin import stand_in
from diffusers_offload.tiers.traces import private_bytes


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    """Units of some KiB go through the ring in several batches, as large ones do."""
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)


def packed_units(pipe):
    units = [unit for held in pipe.block_offload._held.values() for unit in held.component.streamed]
    return [unit for unit in units if isinstance(unit.weights.host, PackedMemory)]


def enable(pipe, device, **arguments):
    pipe.to("cpu").enable_block_offload(
        **{"device": device, "offload_ratio": 1.0, "tier": "packed", **arguments}
    )


CASES = [
    ("flux", "block", torch.float16),
    ("flux", "block", torch.float32),
    ("flux", "leaf", torch.bfloat16),
    ("wan22", "block", torch.bfloat16),
    ("wan22", "phase", torch.bfloat16),
    ("sdxl", "phase", torch.bfloat16),
]


@pytest.mark.parametrize(("name", "granularity", "dtype"), CASES)
def test_packed_equals_resident(name, granularity, dtype, device):
    pipe = build(name, dtype, device)
    expected, weights = run(pipe, name), {k: weights_of(m) for k, m in modules(pipe)}
    enable(pipe, device, offload_granularity=granularity)
    assert len(packed_units(pipe)) > 5
    for _ in range(2):
        assert torch.equal(run(pipe, name), expected)
    assert_same(weights, pipe)  # read while they are packed
    pipe.disable_block_offload()
    assert_same(weights, pipe)
    assert torch.equal(run(pipe.to(device), name), expected)


def modules(pipe):
    return ((name, module) for name, module in pipe.components.items() if isinstance(module, torch.nn.Module))


def assert_same(weights, pipe):
    for name, module in modules(pipe):
        found = weights_of(module)
        assert found.keys() == weights[name].keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, weights[name][key]), key


def test_less_is_held_and_copied(device):
    pipe = build("flux", torch.bfloat16, device)
    run(pipe, "flux")
    reports = {}
    for tier in ("pinned", "packed"):
        enable(pipe, device, tier=tier)
        run(pipe, "flux")
        pipe.block_offload.reset()
        run(pipe, "flux")
        reports[tier] = pipe.block_offload.report()
        pipe.disable_block_offload()
    plain, less = reports["pinned"], reports["packed"]
    assert less.loads == plain.loads
    assert less.bytes_loaded < 0.85 * plain.bytes_loaded  # of so small a model, much is kept as it is
    assert less.host_bytes < 0.85 * plain.host_bytes
    assert "packed" in str(less) and "packed" not in str(plain)


def test_one_component_alone(device):
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    enable(pipe, device, tier=None, components={"transformer": OffloadPolicy(tier="packed")})
    assert {unit.component.name for unit in packed_units(pipe)} == {"transformer"}
    assert torch.equal(run(pipe, "flux"), expected)


def test_what_does_not_shrink_stays_as_it_is(device):
    torch.manual_seed(0)
    net = odd_nets.Net(*(odd_nets.Plain() for _ in range(4))).eval().requires_grad_(False)
    for parameter in net.parameters():  # exponents as likely as one another
        parameter.copy_(torch.randint(0, 2**31, parameter.shape).to(torch.int32).view(torch.float32))
        parameter.nan_to_num_(0.5)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=1.0, tier="packed")
    hosts = [unit.weights.host for unit in handle._engine.units]
    assert hosts and not any(isinstance(host, PackedMemory) for host in hosts)
    handle.disable()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz], ids=str)
def test_formats_whose_nan_is_another_stay_as_they_are(dtype):
    net = odd_nets.Net(*(odd_nets.Plain() for _ in range(4))).eval().requires_grad_(False)
    for block in net.blocks:
        block.register_buffer("codes", torch.randn(400, 400).to(dtype))
    expected = net.blocks[1].codes.float()
    handle = diffusers_offload.enable_block_offload(net, device="cpu", offload_ratio=1.0, tier="packed")
    assert torch.equal(net.blocks[1].codes.float(), expected)
    handle.disable()


def test_what_is_kept_as_it_is_may_be_read_whatever_its_size():
    net = odd_nets.Net(*(odd_nets.Plain() for _ in range(4))).eval().requires_grad_(False)
    for block in net.blocks:
        block.register_buffer("numbers", torch.arange(40_000))  # more than a slot
        block.register_buffer("coded", torch.randn(400, 1000))
    handle = diffusers_offload.enable_block_offload(net, device="cpu", offload_ratio=1.0, tier="packed")
    assert net.blocks[1].coded.isnan().all()
    assert torch.equal(net.blocks[1].numbers, torch.arange(40_000))
    handle.disable()


# --- what tensors look at meanwhile ----------------------------------------------------------------------


def test_what_stands_in_is_nan_and_takes_no_memory():
    def resident():
        gc.collect()
        with open("/proc/self/statm") as numbers:
            return int(numbers.read().split()[1]) * 4096

    before, mappings = resident(), len(private_bytes())
    blank = stand_in(3 * 2**30 + 5)
    assert blank[[0, 2**24, 2**31, -1]].tolist() == [255] * 4
    assert resident() - before < 32 * 2**20
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.float8_e4m3fn):
        assert blank[: 2**16].view(dtype).float().isnan().all()
    tail = blank[-10:]
    del blank
    assert tail.tolist() == [255] * 10
    del tail
    gc.collect()
    assert len(private_bytes()) <= mappings + 2


def test_weights_in_between_are_nan_and_save_as_true_ones(tmp_path):
    pipe = build("flux", torch.bfloat16)
    weights = weights_of(pipe.transformer)
    enable(pipe, "cpu")
    blind = [name for name, p in pipe.transformer.named_parameters() if p.isnan().any()]
    assert len(blind) > 20
    assert pipe.transformer.dtype is torch.bfloat16
    assert sum(p.numel() for p in pipe.transformer.parameters()) == sum(
        weights[name].numel() for name, _ in pipe.transformer.named_parameters()
    )
    part = pipe.transformer.transformer_blocks[1].attn.state_dict()
    assert part and all(torch.equal(t, weights[f"transformer_blocks.1.attn.{k}"]) for k, t in part.items())
    pipe.transformer.save_pretrained(tmp_path)
    again = type(pipe.transformer).from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, weights[name])
    hooks = [m._state_dict_hooks for m in pipe.transformer.modules() if m._state_dict_hooks]
    pipe.disable_block_offload()
    assert hooks and not any(hooks)


@pytest.mark.parametrize("silently", [False, True])
def test_an_edit_of_what_stands_in_is_refused(silently, device):
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    pipe.transformer.requires_grad_(False)
    enable(pipe, device)
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
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), edited)


def test_a_weight_that_is_replaced_counts(device):
    pipe = build("flux", torch.bfloat16, device)
    enable(pipe, device)
    run(pipe, "flux")
    layer = pipe.transformer.single_transformer_blocks[0].proj_mlp
    value = torch.randn(layer.weight.shape, generator=torch.Generator().manual_seed(3)).to(torch.bfloat16)
    layer.weight.data = value.clone()
    edited = run(pipe, "flux")
    pipe.disable_block_offload()
    assert torch.equal(layer.weight.cpu(), value)
    assert torch.equal(run(pipe.to(device), "flux"), edited)


def test_other_dtypes_and_tied_weights(device):
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a = torch.nn.Linear(32, 32).to(torch.float64)
            self.b = torch.nn.Linear(32, 32)
            self.c = torch.nn.Linear(32, 32)
            self.c.weight = self.b.weight
            self.d = torch.nn.Parameter(torch.randn(64, 32)[::2])
            self.register_buffer("steps", torch.arange(7))
            self.register_buffer("scale", torch.randn(33).to(torch.bfloat16))

        def forward(self, x):
            y = self.a(x.double()).float() + self.c(self.b(x)) @ self.d
            return y * self.scale[:32].float() + self.steps.sum()

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(5)
            self.blocks = torch.nn.ModuleList(Odd() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x).tanh()
            return x

    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(1)).to(device)
    expected = Net().requires_grad_(False).to(device)(x)
    offloaded = Net().requires_grad_(False)
    weights = weights_of(offloaded)
    handle = diffusers_offload.enable_block_offload(
        offloaded, device=device, offload_ratio=1.0, tier="packed"
    )
    assert any(isinstance(unit.weights.host, PackedMemory) for unit in handle._engine.units)
    assert offloaded.blocks[1].steps.tolist() == list(range(7))  # as it is, and so to be read
    for _ in range(2):
        assert torch.equal(offloaded(x), expected)
    handle.disable()
    assert all(torch.equal(tensor, weights[name]) for name, tensor in weights_of(offloaded).items())
    assert offloaded.blocks[0].c.weight is offloaded.blocks[0].b.weight


def assert_packed_blocks_run_and_write_as_resident_ones(block, device):
    def net():
        torch.manual_seed(0)
        return odd_nets.Net(*(block() for _ in range(4))).eval().requires_grad_(False)

    x = torch.randn(2, 3, odd_nets.WIDTH, generator=torch.Generator().manual_seed(1)).to(device)
    resident, offloaded = net().to(device), net()
    handle = diffusers_offload.enable_block_offload(
        offloaded, device=device, offload_ratio=1.0, tier="packed"
    )
    for _ in range(3):
        assert torch.equal(offloaded(x), resident(x))
    handle.disable()
    for a, b in zip(offloaded.state_dict().values(), resident.state_dict().values(), strict=True):
        assert torch.equal(a.cpu(), b.cpu())


def test_buffers_that_a_forward_writes_to(device):
    assert_packed_blocks_run_and_write_as_resident_ones(odd_nets.Counts, device)


def test_memory_is_given_back(device):
    if device == "cpu":
        pytest.skip("the CPU needs no ring")
    pipe = build("flux", torch.bfloat16, device)
    expected = run(pipe, "flux")
    enable(pipe, device)
    run(pipe, "flux")
    tier = pipe.block_offload._engine.packed
    assert 0 < tier.staging_bytes <= packed.SLOTS * packed.SLOT_BYTES
    pipe.disable_block_offload()
    assert tier.staging_bytes == 0
    assert torch.equal(run(pipe.to(device), "flux"), expected)


# --- what others read while NaN stands in ----------------------------------------------------------------


def add_adapter(pipe):
    torch.manual_seed(7)
    config = LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False)
    pipe.transformer.add_adapter(config, "a")


METHODS = {  # of the model: they find the true weights by themselves
    "an adapter, fused": lambda pipe: (add_adapter(pipe), pipe.transformer.fuse_lora(adapter_names=["a"])),
    "projections, fused": lambda pipe: pipe.transformer.fuse_qkv_projections(),
    "a state dict": lambda pipe: pipe.transformer.load_state_dict(
        {name: tensor * 2 for name, tensor in pipe.transformer.state_dict().items()}
    ),
}
EDITS = {
    "an adapter, merged": lambda pipe: (add_adapter(pipe), to_q(pipe).merge(adapter_names=["a"])),
    "another dtype for a while": lambda pipe: pipe.transformer.transformer_blocks[0].ff.float().bfloat16(),
    "another dtype for storage": lambda pipe: pipe.transformer.enable_layerwise_casting(
        torch.float8_e4m3fn, torch.bfloat16
    ),
    "a product": lambda pipe: replace_weight(pipe, lambda data: data * 2),
    "a product, as a parameter": lambda pipe: setattr(
        to_q(pipe), "weight", torch.nn.Parameter(to_q(pipe).weight * 2, requires_grad=False)
    ),
    "a norm": lambda pipe: torch.nn.utils.parametrizations.weight_norm(to_q(pipe)),
}


def to_q(pipe):
    return pipe.transformer.transformer_blocks[0].attn.to_q


def replace_weight(pipe, change):
    to_q(pipe).weight.data = change(to_q(pipe).weight.data)


def flux(device):
    pipe = build("flux", torch.bfloat16, device)
    pipe.transformer.requires_grad_(False)
    return pipe


@pytest.mark.parametrize("edit", EDITS.values(), ids=EDITS)
def test_weights_computed_from_nan_never_run(edit, device):
    pipe = flux(device)
    enable(pipe, device)
    edit(pipe)
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0.*suspended"):
        run(pipe, "flux")


@pytest.mark.parametrize("edit", METHODS.values(), ids=METHODS)
def test_the_models_own_methods_find_true_weights(edit, device):
    resident, offloaded = flux(device), flux(device)
    edit(resident)
    enable(offloaded, device)
    edit(offloaded)
    assert packed_units(offloaded)
    assert torch.equal(run(offloaded, "flux"), run(resident, "flux"))
    offloaded.disable_block_offload()
    assert "fuse_lora" not in vars(offloaded.transformer)


@pytest.mark.parametrize("edit", {**EDITS, **METHODS}.values(), ids={**EDITS, **METHODS})
def test_the_same_while_suspended_counts(edit, device):
    resident, offloaded = flux(device), flux(device)
    edit(resident)
    enable(offloaded, device)
    with offloaded.block_offload.suspended():
        edit(offloaded)
    assert torch.equal(run(offloaded, "flux"), run(resident, "flux"))


@pytest.mark.parametrize("following", ["disable", "suspended", "to"])
def test_a_lost_edit_is_told_before_the_true_weights_are_used_otherwise(following, device):
    pipe = flux(device)
    weights = weights_of(pipe.transformer)
    enable(pipe, device)
    for block in pipe.transformer.transformer_blocks:
        block.attn.to_q.weight.data.mul_(2)

    def follow():
        if following == "disable":
            pipe.disable_block_offload()
        elif following == "to":
            pipe.transformer.to(torch.float32)
        else:
            with pipe.block_offload.suspended():
                pass

    with pytest.raises(RuntimeError, match=r"transformer_blocks\.0 and of 2 more units were edited"):
        follow()
    follow()  # told once, of all
    if pipe.block_offload is not None:
        pipe.disable_block_offload()
    for name, tensor in weights_of(pipe.transformer).items():
        assert torch.equal(tensor.to(torch.bfloat16), weights[name])


@pytest.mark.parametrize(
    "change",
    [lambda data: data.t(), lambda data: data.view(torch.int16).view(data.dtype)],
    ids=["turned", "viewed"],
)
def test_another_view_of_what_stands_in_is_one_of_the_true_weights(change, device):
    resident, offloaded = flux(device), flux(device)
    replace_weight(resident, change)
    enable(offloaded, device)
    replace_weight(offloaded, change)
    assert torch.equal(run(offloaded, "flux"), run(resident, "flux"))


def test_exchanged_views_of_what_stands_in(device):
    def exchange(pipe):
        attention = pipe.transformer.transformer_blocks[0].attn
        one, other = attention.to_q.weight, attention.to_k.weight
        one.data, other.data = other.data, one.data

    resident, offloaded = flux(device), flux(device)
    exchange(resident)
    enable(offloaded, device)
    exchange(offloaded)
    assert torch.equal(run(offloaded, "flux"), run(resident, "flux"))


def test_state_dicts_are_apart_and_up_to_date(device):
    pipe = flux(device)
    enable(pipe, device)
    layer = to_q(pipe)
    first = layer.state_dict()
    first["weight"].zero_()
    second = layer.state_dict()
    assert second["weight"].any()
    with pipe.block_offload.suspended():
        layer.weight.add_(1)
    assert not torch.equal(layer.state_dict()["weight"], second["weight"])


def test_a_coded_buffer_that_a_forward_writes_to(device):
    class Remembers(odd_nets.Plain):
        def __init__(self):
            super().__init__()
            self.register_buffer("seen", torch.randn(64, 512))

        def forward(self, x):
            self.seen.add_(x.mean())
            return super().forward(x) + self.seen.mean()

    assert_packed_blocks_run_and_write_as_resident_ones(Remembers, device)


# --- packing between two calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("fails_at", [None, 0, 3], ids=["well", "failing at once", "failing half way"])
def test_packing_before_a_call(fails_at, device, monkeypatch):
    monkeypatch.setattr(held, "unpacks_fast", lambda device: True)
    monkeypatch.setattr(DeviceBudget, "is_bound_by_copies", lambda self, component: component.trace != [])
    pack, count = packed.PackedTier._pack, iter(range(100))

    def failing(self, weights):
        if next(count) == fails_at:
            raise MemoryError("no memory left")
        return pack(self, weights)

    monkeypatch.setattr(packed.PackedTier, "_pack", failing)
    pipe = flux(device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0, max_device_memory="1GiB")
    assert torch.equal(run(pipe, "flux"), expected)
    assert not packed_units(pipe)
    for _ in range(2):
        assert torch.equal(run(pipe, "flux"), expected)
        units = pipe.block_offload._engine.units
        assert packed_units(pipe)  # of the other components, if not of this one
        assert all(unit.slot is not None or unit.keeps for unit in units)  # they go on sharing the arena
    pipe.disable_block_offload()
    assert torch.equal(run(pipe.to(device), "flux"), expected)

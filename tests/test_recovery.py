"""A forward that runs out of device memory is run again with less on the device; the result is right."""

import weakref

import pytest
import torch
from helpers import build, run, warnings_of_ours
from torch import nn

import diffusers_offload


def out_of_memory():
    return torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB.")


class Card:
    """Lets an engine allocate no more than `limit` bytes at once."""

    def __init__(self, engine, limit):
        self._transfers, self.limit, self.used = engine._transfers, limit, 0
        self._real = engine._transfers.allocate
        if engine.arena.buffer is not None:
            self._count(engine.arena.buffer)
        engine._transfers.allocate = self.allocate

    def allocate(self, nbytes):
        if self.used + nbytes > self.limit:
            raise out_of_memory()
        buffer = self._real(nbytes)
        self._count(buffer)
        return buffer

    def _count(self, buffer):
        size = buffer.numel()
        self.used += size
        weakref.finalize(buffer.untyped_storage(), self._free, size)

    def _free(self, size):
        self.used -= size


def shortage_in(module, while_true):
    """A hook that fails `module` as long as there is too much on the device."""

    def fail(*_):
        if while_true():
            raise out_of_memory()

    return module.register_forward_pre_hook(fail)


@pytest.mark.parametrize("granularity", ["block", "phase", "leaf"])
def test_residents_are_dropped(granularity, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(
        device=device, offload_granularity=granularity, offload_ratio=0.5, components={"vae": "resident"}
    )
    handle = pipe.block_offload
    assert handle.report().resident_bytes
    shortage_in(pipe.transformer.proj_out, lambda: handle.report().resident_bytes)
    with warnings_of_ours() as warnings:
        assert torch.equal(run(pipe, "flux"), expected)
    report = handle.report()
    assert (report.resident_bytes, report.shortages) == (0, 1)
    assert "out of device memory" in warnings[0].getMessage()
    assert all(not component.residents for component in handle.plan.components)
    assert torch.equal(run(pipe, "flux"), expected)
    assert handle.report().shortages == 1
    pipe.disable_block_offload()
    pipe.transformer.proj_out._forward_pre_hooks.clear()
    assert torch.equal(run(pipe.to(device), "flux"), expected)


@pytest.mark.parametrize("granularity", ["block", "phase", "leaf"])
def test_the_arena_shrinks_to_one_unit(granularity, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0, offload_granularity=granularity)
    handle = pipe.block_offload
    failed = []

    def once():
        failed.append(handle._engine.arena.capacity)
        return len(failed) == 1

    shortage_in(pipe.transformer.transformer_blocks[1], once)
    assert torch.equal(run(pipe, "flux"), expected)
    largest = (
        max(u.nbytes for c in handle._engine.components for u in c.streamed if not u.floats)
        if failed[0]
        else 0
    )
    assert handle._engine.arena.capacity == largest
    handle.reset()
    assert torch.equal(run(pipe, "flux"), expected)
    assert handle.report().shortages == 0


def test_a_card_too_small_for_two_units():
    pipe = build("wan")
    expected = run(pipe, "wan")
    pipe.enable_block_offload(device="cpu")
    engine = pipe.block_offload._engine
    stems = max(component.stem_bytes for component in engine.components)
    card = Card(engine, engine.arena.capacity // 2 + stems + 8192)
    assert torch.equal(run(pipe, "wan"), expected)
    assert pipe.block_offload.report().shortages == 1
    assert card.used <= card.limit
    assert torch.equal(run(pipe, "wan"), expected)


def test_what_the_budget_kept_is_dropped(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0, max_device_memory="1GiB")
    handle = pipe.block_offload
    component = next(c for c in handle._engine.components if c.name == "transformer")
    run(pipe, "flux")
    before = []

    def first_time():
        before.append(component.kept_bytes)
        return len(before) == 1

    shortage_in(pipe.transformer.transformer_blocks[2], first_time)
    limit = handle._engine.budget.limit
    assert torch.equal(run(pipe, "flux"), expected)
    assert before[0]
    assert handle._engine.budget.limit < limit


def test_if_nothing_helps_the_error_comes_through_and_the_next_call_is_right(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=0.5)
    error = out_of_memory()

    def fail(*_):
        raise error

    hook = pipe.transformer.proj_out.register_forward_pre_hook(fail)
    with pytest.raises(torch.OutOfMemoryError) as raised:
        run(pipe, "flux")
    assert raised.value is error
    hook.remove()
    assert torch.equal(run(pipe, "flux"), expected)


def test_the_random_numbers_are_the_same_again(device):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            return self.b(self.a(x)) + torch.rand(x.shape).to(x.device) + torch.rand(x.shape, device=x.device)

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    net = Net().to(device).requires_grad_(False)
    x = torch.randn(2, 8, device=device)
    torch.manual_seed(0)
    expected = net(x)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=0.5)
    shortage_in(net.blocks[3], lambda: handle.report().resident_bytes)
    torch.manual_seed(0)
    assert torch.equal(net(x), expected)
    assert handle.report().shortages == 1


def test_a_forward_that_a_cache_remembers_is_not_run_twice():
    from diffusers.hooks import FirstBlockCacheConfig

    pipe = build("flux")
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    pipe.enable_block_offload(device="cpu", offload_ratio=0.5)
    shortage_in(pipe.transformer.proj_out, lambda: pipe.block_offload.report().resident_bytes)
    with pytest.raises(torch.OutOfMemoryError):
        run(pipe, "flux")


def test_decoding_is_run_again_too(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=0.5)
    shortage_in(pipe.vae.decoder.conv_out, lambda: pipe.block_offload.report().resident_bytes)
    assert torch.equal(run(pipe, "flux"), expected)
    assert pipe.block_offload.report().shortages == 1


@pytest.mark.gpu
def test_a_full_card():
    from diffusers_offload.demo import pipelines as zoo

    size = {"num_attention_heads": 16, "attention_head_dim": 64, "num_layers": 8, "num_single_layers": 16}
    pipe = zoo.build("flux", dtype=torch.bfloat16, axes_dims_rope=(16, 24, 24), **size)
    kwargs = {"height": 512, "width": 512, "num_inference_steps": 3}
    expected = run(pipe.to("cuda"), "flux", **kwargs)
    pipe.to("cpu")
    torch.cuda.empty_cache()
    pipe.enable_block_offload(device="cuda", offload_ratio=0.0)
    total = torch.cuda.get_device_properties(0).total_memory
    room = torch.cuda.memory_reserved() + 8 * 2**20  # next to nothing for activations
    torch.cuda.set_per_process_memory_fraction(room / total)
    try:
        assert torch.equal(run(pipe, "flux", **kwargs), expected)
        assert pipe.block_offload.report().shortages
        assert pipe.block_offload.report().resident_bytes == 0
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)


class Taking(nn.Module):
    """Takes items out of a list that it is given, or writes to a tensor."""

    def __init__(self, writes=False):
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8)) for _ in range(4))
        self.writes = writes

    def forward(self, x, extra=None):
        if self.writes:
            x.mul_(2)
        for block in self.blocks:
            x = block(x)
            if extra:
                x = x + extra.pop(0)
        return x


def test_a_list_that_the_forward_empties_is_full_again(device):
    net = Taking().to(device).requires_grad_(False)
    x, extra = torch.randn(2, 8, device=device), [torch.randn(2, 8, device=device) for _ in range(3)]
    expected = net(x, extra=list(extra))
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=0.5)
    shortage_in(net.blocks[3], lambda: handle.report().resident_bytes)
    assert torch.equal(net(x, extra=list(extra)), expected)
    assert handle.report().shortages == 1


def test_a_forward_that_writes_to_its_input_is_not_run_again(device):
    net = Taking(writes=True).to(device).requires_grad_(False)
    handle = diffusers_offload.enable_block_offload(net, device=device, offload_ratio=0.5)
    shortage_in(net.blocks[3], lambda: handle.report().resident_bytes)
    with pytest.raises(torch.OutOfMemoryError):
        net(torch.randn(2, 8, device=device))


def test_components_that_share_tensors_give_up_as_well(device):
    from diffusers_offload.handle import OffloadHandle
    from diffusers_offload.policy import parse_request
    from diffusers_offload.routing import plan_targets

    one, other = Taking(), Taking()
    other.blocks[1] = one.blocks[1]
    modules = {"one": one.requires_grad_(False), "other": other.requires_grad_(False)}
    request = parse_request("block", 1.0, None, tuple(modules))
    where = torch.device(device) if device == "cpu" else torch.device(device, 0)
    handle = OffloadHandle(plan_targets(modules, request, where), where, request)
    hook = shortage_in(other.blocks[3], lambda: True)
    x = torch.randn(2, 8, device=device)
    with torch.no_grad(), pytest.raises(torch.OutOfMemoryError):
        other(x)
    hook.remove()
    with torch.no_grad():
        found = other(x)
        handle.disable()
        assert torch.equal(found, other.to(device)(x))


def test_half_a_stem_is_no_stem():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu", components={"vae": "leaf"})
    engine = pipe.block_offload._engine
    real, left = engine._stems.bring_unit, [3]

    def failing(unit):
        left[0] -= 1
        if left[0] == 0:
            raise out_of_memory()
        real(unit)

    engine._stems.bring_unit = failing
    assert torch.equal(run(pipe, "flux"), expected)
    assert pipe.block_offload.report().shortages == 1
    assert torch.equal(run(pipe, "flux"), expected)
    assert all(unit.state.value == "offloaded" for component in engine.components for unit in component.stem)


def test_a_forward_broken_off_is_no_measurement():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu", max_device_memory="1GiB", offload_ratio=1.0)
    budget = pipe.block_offload._engine.budget

    def stop(*_):
        raise KeyboardInterrupt

    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, "flux")
    hook.remove()
    assert not any(component.name == "transformer" for component, _ in budget._known)


def test_the_host_may_have_no_room_for_what_leaves(monkeypatch):
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu", offload_ratio=0.5)
    tier = pipe.block_offload._engine._transfers.tier
    hook = shortage_in(pipe.transformer.proj_out, lambda: pipe.block_offload.report().resident_bytes)

    def full(sizes):
        raise MemoryError("no more")
        yield

    monkeypatch.setattr(tier, "prepare", full)
    with pytest.raises(torch.OutOfMemoryError):
        run(pipe, "flux")
    monkeypatch.undo()
    hook.remove()
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    assert torch.equal(run(pipe, "flux"), expected)

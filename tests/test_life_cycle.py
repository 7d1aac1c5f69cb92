"""Enable and disable are inverse, failures leave nothing behind, and nothing is kept alive."""

import copy
import gc
import weakref

import pytest
import torch
from helpers import build, run, weights_of

import diffusers_offload
from diffusers_offload.handle import live_handles


def modules_of(pipe):
    return {name: c for name, c in pipe.components.items() if isinstance(c, torch.nn.Module)}


def test_enable_run_disable_three_times(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu")
    weights = {name: weights_of(module) for name, module in modules_of(pipe).items()}
    for _ in range(3):
        pipe.enable_block_offload(device=device, offload_ratio=1.0)
        assert torch.equal(run(pipe, "flux"), expected)
        pipe.disable_block_offload()
        assert pipe.block_offload is None
        for name, module in modules_of(pipe).items():
            assert not any(hasattr(part, "_hf_hook") for part in module.modules())
            assert "forward" not in module.__dict__ or not hasattr(module, "_old_forward")
            assert "to" not in module.__dict__
            after = module.state_dict()
            assert list(after) == list(weights[name])
            assert all(torch.equal(after[key], value) for key, value in weights[name].items())
            assert all(tensor.device.type == "cpu" for tensor in after.values())
    assert torch.equal(run(pipe.to(device), "flux"), expected)


def test_disable_gives_each_tensor_storage_of_its_own():
    pipe = build("flux")
    sizes = {n: p.untyped_storage().nbytes() for n, p in pipe.transformer.named_parameters()}
    pipe.enable_block_offload(device="cpu")
    pipe.disable_block_offload()
    assert {n: p.untyped_storage().nbytes() for n, p in pipe.transformer.named_parameters()} == sizes


def test_enable_twice_replaces_the_first():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    first = pipe.block_offload
    pipe.enable_block_offload(device="cpu", offload_ratio=0.5)
    assert pipe.block_offload is not first
    assert not first.enabled
    assert torch.equal(run(pipe, "flux"), expected)


def test_parameters_keep_their_identity_and_their_values_while_offloaded():
    pipe = build("flux")
    expected, before = weights_of(pipe.transformer), list(pipe.transformer.parameters())
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    assert all(a is b for a, b in zip(before, pipe.transformer.parameters(), strict=True))
    found = pipe.transformer.state_dict()
    assert list(found) == list(expected)
    assert all(torch.equal(found[key], expected[key]) for key in expected)
    assert pipe.transformer.dtype == torch.float32


def test_execution_device_and_dtype_answer_correctly(device):
    pipe = build("flux", torch.bfloat16)
    pipe.enable_block_offload(device=device, offload_ratio=1.0)
    assert pipe._execution_device == pipe.device == pipe.block_offload.device
    assert pipe.dtype == torch.bfloat16
    run(pipe, "flux")
    assert pipe._execution_device == pipe.device == pipe.block_offload.device
    pipe.disable_block_offload()
    assert pipe._execution_device == pipe.device == torch.device("cpu")


class Boom(Exception):
    pass


@pytest.mark.parametrize("error", [Boom, KeyboardInterrupt])
@pytest.mark.parametrize(
    "where",
    [
        "transformer_blocks.0",
        "transformer_blocks.2",
        "single_transformer_blocks.1.attn",
        "time_text_embed",
        "proj_out",
    ],
)
def test_an_exception_in_a_block_leaves_nothing_behind(where, error, device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    part = pipe.transformer.get_submodule(where)

    def fail(*_):
        raise error("in the middle")

    hook = part.register_forward_pre_hook(fail)
    with pytest.raises(error):
        run(pipe, "flux")
    hook.remove()
    if device != "cpu":
        assert torch.cuda.current_stream() == torch.cuda.default_stream()
    assert torch.equal(run(pipe, "flux"), expected)
    assert torch.equal(run(pipe, "flux"), expected)


def test_two_pipelines_share_their_components(device):
    from diffusers import FluxImg2ImgPipeline

    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(device=device, offload_ratio=1.0)
    other = FluxImg2ImgPipeline.from_pipe(pipe, torch_dtype=torch.float32)
    other.set_progress_bar_config(disable=True)
    other.enable_block_offload(device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "flux"), expected)
    picture = torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))

    def variation():
        return other(
            prompt="a fox",
            image=picture,
            strength=0.7,
            num_inference_steps=3,
            output_type="pt",
            generator=torch.Generator("cpu").manual_seed(0),
        ).images.cpu()

    offloaded = variation()
    pipe.disable_block_offload()
    assert pipe.block_offload is None
    assert torch.equal(variation(), offloaded)  # the other still wants them offloaded
    other.disable_block_offload()
    other.to(device)
    assert torch.equal(variation(), offloaded)
    assert not hasattr(pipe.transformer, "_hf_hook")


def test_deleting_the_pipeline_frees_everything():
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    gone = weakref.ref(pipe.transformer)
    engine = weakref.ref(pipe.block_offload._engine)
    del pipe
    gc.collect()
    assert gone() is None
    assert engine() is None
    assert not live_handles()


@pytest.mark.gpu
def test_device_memory_returns_to_the_baseline():
    def allocated():
        gc.collect()
        torch._C._cuda_clearCublasWorkspaces()
        return torch.cuda.memory_allocated()

    before = allocated()
    pipe = build("flux")
    after = []
    for _ in range(3):
        pipe.enable_block_offload(device="cuda", offload_ratio=1.0)
        run(pipe, "flux")
        pipe.disable_block_offload()
        after.append(allocated())
    assert after[0] - before < 8192  # the scheduler keeps its timesteps on the device
    assert after[0] == after[1] == after[2]
    pipe.enable_block_offload(device="cuda", offload_ratio=1.0)
    run(pipe, "flux")
    del pipe
    assert allocated() == before


def test_a_single_module_outside_a_pipeline(device):
    pipe = build("wan", device=device)
    model = pipe.transformer
    expected = run(pipe, "wan")
    handle = diffusers_offload.enable_block_offload(model, device=device, offload_ratio=1.0)
    assert torch.equal(run(pipe, "wan"), expected)
    assert handle.report().uses
    handle.disable()
    assert next(model.parameters()).device.type == device
    assert torch.equal(run(pipe, "wan"), expected)


def test_inference_mode_throughout(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu")
    with torch.inference_mode():
        pipe.enable_block_offload(device=device, offload_ratio=1.0)
        assert torch.equal(run(pipe, "flux"), expected)
    assert torch.equal(run(pipe, "flux"), expected)


def test_uninstall_is_the_inverse_of_install():
    from diffusers import DiffusionPipeline

    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    diffusers_offload.uninstall()
    try:
        assert not hasattr(DiffusionPipeline, "enable_block_offload")
        assert not hasattr(pipe.transformer, "_hf_hook")
        assert torch.equal(run(pipe, "flux"), expected)
    finally:
        diffusers_offload.install()
        diffusers_offload.install()
    pipe.enable_block_offload(device="cpu")
    assert torch.equal(run(pipe, "flux"), expected)


def test_a_list_of_blocks_may_hold_none():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)

        def forward(self, x):
            return self.b(self.a(x))

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = torch.nn.ModuleList([Block(), None, Block(), Block()])

        def forward(self, x):
            for block in self.blocks:
                x = block(x) if block is not None else x
            return x

    net = Net().requires_grad_(False)
    x = torch.randn(2, 4)
    expected = net(x)
    handle = diffusers_offload.enable_block_offload(net, device="cpu")
    assert len(handle.plan.components[0].streamed) == 3
    assert torch.equal(net(x), expected)


def test_a_block_that_holds_a_shared_parameter_still_streams():
    class Block(torch.nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.a, self.b, self.scale = torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), shared

        def forward(self, x):
            return self.b(self.a(x)) * self.scale

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            shared = torch.nn.Parameter(torch.randn(4))
            self.blocks = torch.nn.ModuleList(Block(shared) for _ in range(4))

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return x

    net = Net().requires_grad_(False)
    x = torch.randn(2, 4)
    expected, alone = net(x), net.blocks[2](x)
    handle = diffusers_offload.enable_block_offload(net, device="cpu")
    assert torch.equal(net.blocks[2](x), alone)
    assert torch.equal(net(x), expected)
    assert handle.report().uses == 5
    assert handle.report().resident_bytes == 0


def fails_in_a_block(pipe):
    def fail(*_):
        raise Boom

    hook = pipe.transformer.transformer_blocks[1].register_forward_pre_hook(fail)
    with pytest.raises(Boom):
        run(pipe, "flux")
    hook.remove()


def fails_in_a_callback(pipe):
    def fail(*_):
        raise Boom

    with pytest.raises(Boom):
        run(pipe, "flux", callback_on_step_end=fail)


def fails_to_exchange(pipe):
    with pytest.raises(ValueError, match="meta"):
        pipe.transformer = build("flux").transformer.to("meta")


def fails_while_suspended(pipe):
    with pytest.raises(RuntimeError, match="meta"), pipe.block_offload.suspended():
        pipe.transformer.proj_out.weight = torch.nn.Parameter(torch.empty(1, device="meta"))


def fails_to_copy(pipe):
    with pytest.raises(TypeError):
        copy.deepcopy(pipe)


def exchanges(pipe):
    pipe.transformer = build("flux").transformer
    pipe.vae = None


def suspends(pipe):
    with pipe.block_offload.suspended():
        pipe.transformer.fuse_qkv_projections()


def enables_twice(pipe):
    pipe.enable_block_offload(device="cpu", offload_ratio=0.5)


@pytest.mark.parametrize(
    "event",
    [
        fails_in_a_block,
        fails_in_a_callback,
        fails_to_exchange,
        fails_while_suspended,
        fails_to_copy,
        exchanges,
        suspends,
        enables_twice,
    ],
    ids=lambda event: event.__name__,
)
@pytest.mark.parametrize("how", ["deleted", "disabled"])
def test_nothing_is_kept_alive_whatever_happened(event, how):
    pipe = build("flux")
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    gone = [weakref.ref(module) for module in modules_of(pipe).values()]
    gone += [weakref.ref(pipe.block_offload), weakref.ref(pipe.block_offload._engine), weakref.ref(pipe)]
    gone += [weakref.ref(p) for module in modules_of(pipe).values() for p in module.parameters()]
    event(pipe)
    gone += [weakref.ref(module) for module in modules_of(pipe).values()]
    if how == "disabled":
        engine = weakref.ref(pipe.block_offload._engine)
        pipe.disable_block_offload()
        gc.collect()
        assert engine() is None
    del pipe
    gc.collect()
    assert not [reference() for reference in gone if reference() is not None]
    assert not live_handles()

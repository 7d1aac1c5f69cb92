"""Whoever else moves weights, before ours or after: it works, or it is refused, and never is anything wrong."""

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook, disk_offload, dispatch_model
from diffusers.hooks import apply_group_offloading
from helpers import build, run, warnings_of_ours

from diffusers_offload.refusals import by_groups

CPU = torch.device("cpu")
IN_GROUPS = {"onload_device": CPU, "offload_type": "leaf_level"}


def is_plain(pipe):
    modules = [m for m in pipe.components.values() if isinstance(m, torch.nn.Module)]
    return not any(hasattr(part, "_hf_hook") for module in modules for part in module.modules())


# --- before ours ----------------------------------------------------------------------------------------


def on_one_device(model):
    dispatch_model(model, {"": "cpu"}, force_hooks=True)


BEFORE = {
    "cpu_offload": (
        lambda pipe: cpu_offload(pipe.transformer, CPU),
        r"transformer.*accelerate.*remove_all_hooks",
    ),
    "cpu_offload_with_hook": (
        lambda pipe: cpu_offload_with_hook(pipe.text_encoder, CPU),
        r"text_encoder.*accelerate.*remove_all_hooks",
    ),
    "of a block": (
        lambda pipe: cpu_offload(pipe.transformer.transformer_blocks[1], CPU),
        r"transformer\.transformer_blocks\.1.*accelerate.*remove_all_hooks",
    ),
    "model_cpu_offload": (
        lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
        r"accelerate.*remove_all_hooks",
    ),
    "sequential_cpu_offload": (
        lambda pipe: pipe.enable_sequential_cpu_offload(device="cpu"),
        r"accelerate.*remove_all_hooks",
    ),
    "dispatch_model": (
        lambda pipe: on_one_device(pipe.transformer),
        r"transformer.*accelerate.*remove_all_hooks",
    ),
    "group_offload of a pipeline": (
        lambda pipe: pipe.enable_group_offload(**IN_GROUPS),
        r"group offloading.*load .* anew",
    ),
    "group_offload of a module": (
        lambda pipe: pipe.vae.enable_group_offload(**IN_GROUPS),
        r"vae.*group offloading.*load vae anew",
    ),
    "apply_group_offloading": (
        lambda pipe: apply_group_offloading(pipe.text_encoder, **IN_GROUPS),
        r"text_encoder.*group offloading.*load text_encoder anew",
    ),
}


@pytest.mark.parametrize("name", BEFORE)
def test_before_ours_it_is_refused_and_nothing_has_changed(name):
    other, message = BEFORE[name]
    pipe = build("flux")
    expected = run(pipe, "flux")
    other(pipe)
    with pytest.raises(ValueError, match=message):
        pipe.enable_block_offload(device="cpu")
    assert pipe.block_offload is None
    if name != "sequential_cpu_offload":  # which accelerate 1.15 cannot run on a CPU
        assert torch.equal(run(pipe, "flux"), expected)
    if "remove_all_hooks" in message and name != "of a block":
        pipe.remove_all_hooks()
        pipe.enable_block_offload(device="cpu")
        assert torch.equal(run(pipe, "flux"), expected)


# --- after ours -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_accelerates_pipeline_methods_take_ours_off_and_work(name):
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    run(pipe, "flux")
    getattr(pipe, name)(device="cpu")
    assert pipe.block_offload is None
    if name != "enable_sequential_cpu_offload":  # which accelerate 1.15 cannot run on a CPU
        assert torch.equal(run(pipe, "flux"), expected)
    pipe.remove_all_hooks()
    assert is_plain(pipe)
    pipe.enable_block_offload(device="cpu")
    assert torch.equal(run(pipe, "flux"), expected)


GROUPS = {
    "pipeline": lambda pipe: pipe.enable_group_offload(**IN_GROUPS),
    "some of a pipeline": lambda pipe: pipe.enable_group_offload(exclude_modules="vae", **IN_GROUPS),
    "component": lambda pipe: pipe.transformer.enable_group_offload(**IN_GROUPS),
    "positional": lambda pipe: pipe.vae.enable_group_offload(CPU),
}


@pytest.mark.parametrize("other", GROUPS.values(), ids=GROUPS)
def test_group_offloading_is_refused_at_once(other):
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    with pytest.raises(ValueError, match=r"offloaded block by block.*disable_block_offload"):
        other(pipe)
    assert not any(by_groups(name, module) for name, module in pipe.block_offload.components.items())
    assert torch.equal(run(pipe, "flux"), expected)
    pipe.disable_block_offload()
    pipe.enable_group_offload(**IN_GROUPS)
    assert torch.equal(run(pipe, "flux"), expected)


def in_groups_on_disk(module, tmp_path):
    apply_group_offloading(module, **IN_GROUPS, offload_to_disk_path=str(tmp_path))


def in_groups_by_block(module, tmp_path):
    apply_group_offloading(module, CPU, offload_type="block_level", num_blocks_per_group=1)


LATER = {
    "in groups": lambda module, tmp_path: apply_group_offloading(module, **IN_GROUPS),
    "in groups by block": in_groups_by_block,
    "in groups on disk": in_groups_on_disk,
    "cpu_offload": lambda module, tmp_path: cpu_offload(module, CPU),
    "cpu_offload_with_hook": lambda module, tmp_path: cpu_offload_with_hook(module, CPU),
    "disk_offload": lambda module, tmp_path: disk_offload(module, str(tmp_path), CPU),
    "dispatch_model": lambda module, tmp_path: on_one_device(module),
}


@pytest.mark.parametrize("component", ["transformer", "text_encoder_2", "vae"])
@pytest.mark.parametrize("other", LATER.values(), ids=LATER)
def test_what_is_put_on_a_module_is_refused_at_the_next_forward(other, component, tmp_path):
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    assert torch.equal(run(pipe, "flux"), expected)
    other(getattr(pipe, component), tmp_path)
    for _ in range(2):
        with pytest.raises(RuntimeError, match=rf"{component}.*disable_block_offload"):
            run(pipe, "flux")
    pipe.disable_block_offload()
    if (other, component) != (
        in_groups_on_disk,
        "text_encoder_2",
    ):  # which does not work without ours, either
        assert torch.equal(run(pipe, "flux"), expected)  # left to the other


def test_a_device_map_cannot_be_reset_where_there_is_none():
    pipe = build("flux")
    expected = run(pipe, "flux")
    pipe.enable_block_offload(device="cpu")
    pipe.reset_device_map()
    assert pipe.block_offload is not None
    assert torch.equal(run(pipe, "flux"), expected)


def test_moving_is_refused_with_a_warning_and_changes_nothing(device):
    pipe = build("flux", device=device)
    expected = run(pipe, "flux")
    pipe.to("cpu").enable_block_offload(
        device=device, offload_ratio=1.0, components={"text_encoder": "resident"}
    )
    where = {name: p.device for name, p in pipe.text_encoder.named_parameters()}
    for move in (
        lambda: pipe.to("meta"),
        lambda: pipe.transformer.to("meta"),
        lambda: pipe.to("cpu"),
        lambda: pipe.text_encoder.cpu(),
        lambda: pipe.transformer.cuda(0),
        lambda: pipe.text_encoder.to("meta"),
    ):
        with warnings_of_ours() as records:
            move()
        assert device == "cpu" or records
        assert {name: p.device for name, p in pipe.text_encoder.named_parameters()} == where
        assert torch.equal(run(pipe, "flux"), expected)


@pytest.mark.parametrize("ratio", [1.0, 0.5])
def test_another_dtype_is_applied(ratio, device):
    def pictures(pipe):
        yield run(pipe.to(torch.bfloat16), "flux")
        yield run(pipe.to(dtype=torch.float32), "flux")
        pipe.transformer.bfloat16()
        pipe.transformer.float()
        yield run(pipe, "flux")

    expected = list(pictures(build("flux", device=device)))
    pipe = build("flux")
    pipe.enable_block_offload(device=device, offload_ratio=ratio)
    assert all(torch.equal(a, b) for a, b in zip(pictures(pipe), expected, strict=True))
    assert pipe.transformer.dtype == torch.float32

"""Whatever is read from a pipeline while it is offloaded is right."""

import pytest
import torch
from diffusers import DiffusionPipeline
from helpers import build, run, weights_of

ARGUMENTS = {
    "streamed": {"offload_ratio": 1.0},
    "half": {"offload_ratio": 0.5},
    "resident": {"offload_granularity": "resident"},
    "model": {"offload_granularity": "model"},
}


def modules_of(pipe):
    return {name: m for name, m in pipe.components.items() if isinstance(m, torch.nn.Module)}


def facts(module) -> dict:
    """What can be asked of a module, but for its weights."""
    asked = {
        "dtype": module.dtype,
        "parameters": [(name, p.shape, p.dtype, p.stride()) for name, p in module.named_parameters()],
        "buffers": [(name, b.shape, b.dtype) for name, b in module.named_buffers()],
        "count": sum(p.numel() for p in module.parameters()),
        "trainable": [p.requires_grad for p in module.parameters()],
        "config": dict(module.config) if not hasattr(module.config, "to_dict") else module.config.to_dict(),
    }
    for name in ("num_parameters", "get_memory_footprint"):
        if hasattr(module, name):
            asked[name] = getattr(module, name)()
    return asked


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl-controlnet"])
def test_everything_that_is_asked_of_a_module(name, arguments, device):
    pipe = build(name, torch.bfloat16)
    right = {part: (facts(module), weights_of(module)) for part, module in modules_of(pipe).items()}
    pipe.enable_block_offload(device=device, **arguments)

    def check(pipe, *_):
        for part, module in modules_of(pipe).items():
            expected, weights = right[part]
            assert facts(module) == expected, part
            found = module.state_dict()
            assert list(found) == list(weights)
            assert all(torch.equal(found[key].cpu(), value) for key, value in weights.items()), part
            assert all(torch.equal(p.cpu(), weights[key]) for key, p in module.named_parameters())
        assert pipe.dtype == torch.bfloat16
        assert pipe.device == pipe._execution_device == pipe.block_offload.device
        return {}

    check(pipe)
    run(pipe, name, callback_on_step_end=check)
    check(pipe)
    if arguments == ARGUMENTS["streamed"]:
        assert {module.device.type for module in modules_of(pipe).values()} == {torch.device(device).type}
        assert pipe.vae.decoder.conv_in.weight.device.type == "cpu"


@pytest.mark.parametrize("arguments", ARGUMENTS.values(), ids=ARGUMENTS)
@pytest.mark.parametrize("name", ["flux", "wan22", "sdxl-controlnet"])
def test_a_pipeline_saved_while_offloaded_is_equal_to_the_bit(name, arguments, tmp_path, device):
    pipe = build(name, device=device)
    expected = run(pipe, name)
    pipe.to("cpu").enable_block_offload(device=device, **arguments)
    assert torch.equal(run(pipe, name), expected)
    pipe.save_pretrained(tmp_path / "whole")
    pipe.save_pretrained(tmp_path / "parts", max_shard_size="100KB")
    assert torch.equal(run(pipe, name), expected)
    assert list((tmp_path / "parts").glob("*/*.index.json"))
    for folder in ("whole", "parts"):
        loaded = DiffusionPipeline.from_pretrained(tmp_path / folder)
        for part, module in modules_of(pipe).items():
            found = getattr(loaded, part).state_dict()
            assert all(torch.equal(found[key], value.cpu()) for key, value in module.state_dict().items()), (
                part
            )
        loaded.set_progress_bar_config(disable=True)
        assert torch.equal(run(loaded.to(device), name), expected)
    size = sum(path.stat().st_size for path in (tmp_path / "whole").rglob("*.safetensors"))
    weights = sum(m.get_memory_footprint() for m in modules_of(pipe).values())
    assert size < 1.1 * weights + 2**16 * len(modules_of(pipe))  # no slab was saved for a tensor's sake

"""The demo pipelines run, repeat themselves, and have the structure that tests of the plugin rely on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusers_offload.demo.pipelines import PIPELINES, build, call_kwargs, output, save_preview

NAMES = list(PIPELINES)
DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")
BLOCK_LISTS = ("blocks", "transformer_blocks", "single_transformer_blocks", "refiner_blocks")


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Models this small lose more to waiting for threads than they gain: five times, on a busy machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def run(pipe, name: str, **changes) -> torch.Tensor:
    """The output of a short run from seed 0."""
    kwargs = {**call_kwargs(name), **changes}
    return output(pipe(**kwargs, generator=torch.Generator("cpu").manual_seed(0)))


def models(pipe) -> dict[str, nn.Module]:
    """The models of `pipe`, by name."""
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def block_lists(pipe) -> Iterator[tuple[str, nn.ModuleList]]:
    """The lists of transformer blocks in the denoisers, with their paths."""
    for role, model in models(pipe).items():
        for path, module in model.named_modules():
            # A controlnet's `blocks` are the convolutions that shrink its control image.
            convolutions = "controlnet_cond_embedding" in path
            if role in DENOISERS and path.split(".")[-1] in BLOCK_LISTS and not convolutions:
                yield f"{role}.{path}", module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_runs_and_repeats(name: str, dtype: torch.dtype):
    pipe = build(name, dtype=dtype)
    first = run(pipe, name)
    call = call_kwargs(name)
    frames = (call["num_frames"],) if "num_frames" in call else ()
    assert first.shape == (1, *frames, 3, call["height"], call["width"])
    assert first.isfinite().all()
    assert first.std() > 0.05
    assert torch.equal(run(pipe, name), first)


@pytest.mark.parametrize("name", NAMES)
def test_every_block_matters(name: str):
    pipe = build(name)
    generator = torch.Generator("cpu").manual_seed(0)
    with_gradients = type(pipe).__call__.__wrapped__
    media = with_gradients(pipe, **call_kwargs(name), generator=generator, return_dict=False)[0]
    (media * torch.randn(media.shape, generator=generator)).sum().backward()
    for path, blocks in block_lists(pipe):
        for index, block in enumerate(blocks):
            weight = max(block.parameters(), key=torch.Tensor.numel)
            assert weight.grad is not None and weight.grad.abs().max() > 1e-3, f"{path}.{index}"


@pytest.mark.parametrize("name", NAMES)
def test_seed_and_inputs_matter(name: str):
    pipe = build(name)
    reference = run(pipe, name)
    assert torch.equal(run(build(name), name), reference)
    assert not torch.equal(run(build(name, seed=1), name), reference)
    changes = {"prompt": "a green house"}
    if control := PIPELINES[name].control:
        changes[control] = call_kwargs(name)[control].rotate(180)
    for key, value in changes.items():
        assert (run(pipe, name, **{key: value}) - reference).abs().max() > 1e-3, key


@pytest.mark.parametrize("name", NAMES)
def test_structure(name: str):
    pipe = build(name)
    assert not any(module.training for model in models(pipe).values() for module in model.modules())
    lengths = {path: len(blocks) for path, blocks in block_lists(pipe)}
    assert {path.split(".")[0] for path in lengths} == set(DENOISERS) & set(models(pipe))
    assert min(lengths.values()) >= 3, lengths
    encoders = [model for role, model in models(pipe).items() if role.startswith("text_encoder")]
    for encoder in encoders:
        assert all(
            len(m) >= 3 for path, m in encoder.named_modules() if path.endswith(("layers", "encoder.block"))
        )
    shapes = [sorted(tuple(parameter.shape) for parameter in encoder.parameters()) for encoder in encoders]
    assert all(one != other for one, other in combinations(shapes, 2))


@pytest.mark.parametrize("name", NAMES)
def test_no_two_parameters_are_equal(name: str):
    by_shape = defaultdict(list)
    # The float32 weights round to these, so they differ too.
    for role, model in models(build(name, dtype=torch.bfloat16)).items():
        for path, parameter in model.named_parameters():
            by_shape[parameter.shape].append((f"{role}.{path}", parameter))
    for group in by_shape.values():
        for (one, left), (other, right) in combinations(group, 2):
            assert not torch.equal(left, right), f"{one} equals {other}"


@pytest.mark.parametrize("name", ["flux", "wan", "sd3"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
def test_dtypes_are_those_of_a_loaded_pipeline(name: str, dtype: torch.dtype, tmp_path: Path):
    pipe = build(name, dtype=dtype)
    pipe.save_pretrained(tmp_path)
    loaded = type(pipe).from_pretrained(tmp_path, torch_dtype=dtype)
    assert dtypes(pipe) == dtypes(loaded)


def dtypes(pipe) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer."""
    return {
        f"{role}.{path}": tensor.dtype
        for role, model in models(pipe).items()
        for tensors in (model.named_parameters(), model.named_buffers())
        for path, tensor in tensors
    }


def test_both_experts_of_wan22_run():
    pipe = build("wan22")
    calls = []
    for role in ("transformer", "transformer_2"):
        getattr(pipe, role).register_forward_pre_hook(lambda *_, role=role: calls.append(role))
    run(pipe, "wan22")
    assert calls == ["transformer"] * 2 + ["transformer_2"] * 2


@pytest.mark.parametrize(
    ("name", "billions"), [("flux", 11.9), ("wan", 14.3), ("sd3", 8.06), ("sdxl", 2.57), ("qwenimage", 20.4)]
)
def test_full_size_is_the_published_size(name: str, billions: float):
    pipe = build(name, size="full", dtype=torch.bfloat16, device="meta")
    denoiser = models(pipe).get("transformer") or models(pipe)["unet"]
    count = sum(parameter.numel() for parameter in denoiser.parameters())
    assert count / 1e9 == pytest.approx(billions, rel=0.01)
    assert torch.get_default_dtype() == torch.float32


def test_unknown_names_are_refused():
    with pytest.raises(KeyError):
        build("nothing")
    with pytest.raises(KeyError):
        call_kwargs("flux", size="huge")


@pytest.mark.parametrize(("name", "size"), [("flux", (64, 48)), ("wan", (9 * 48, 32))])
def test_preview(name: str, size: tuple[int, int], tmp_path: Path):
    from PIL import Image

    pipe = build(name)
    kwargs = {**call_kwargs(name), "generator": torch.Generator("cpu").manual_seed(0)}
    result = pipe(**kwargs)
    save_preview(result, tmp_path / "preview.png")
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.size == size
    kwargs |= {"output_type": "np", "generator": torch.Generator("cpu").manual_seed(0)}
    torch.testing.assert_close(output(pipe(**kwargs)), output(result))

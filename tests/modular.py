"""Modular pipelines with small random weights, made of the parts that the standard ones are made of."""

import types

import diffusers
import pytest
import torch
from diffusers.modular_pipelines.wan import encoders as wan_encoders

from diffusers_offload.demo import pipelines as zoo

BLOCKS = {
    "flux": "FluxAutoBlocks",
    "qwenimage": "QwenImageAutoBlocks",
    "sdxl": "StableDiffusionXLAutoBlocks",
    "wan22": "Wan22Blocks",
}
DENOISER = {"sdxl": "unet"}


def blocks_of(name, *path):
    blocks = getattr(diffusers, BLOCKS[name])()
    for step in path:
        blocks = blocks.sub_blocks[step]
    return blocks


def parts_of(name, pipe, seed=0):
    parts = zoo.build(name, seed=seed).components
    return {key: part for key, part in parts.items() if key in pipe.component_names and part is not None}


def build(name, device="cpu", parts=None, **kwargs):
    pipe = blocks_of(name).init_pipeline(**kwargs)
    pipe.update_components(**(parts_of(name, pipe) if parts is None else parts))
    quiet(pipe)
    return pipe.to(device)


def quiet(pipe):
    for block in (pipe._blocks, *pipe._blocks.sub_blocks.values()):
        for each in (block, *block.sub_blocks.values()):
            if hasattr(each, "set_progress_bar_config"):
                each.set_progress_bar_config(disable=True)


def run(pipe, name="flux", seed=0, **changes):
    inputs = {each.name for each in pipe.blocks.inputs}
    kwargs = {key: value for key, value in zoo.call_kwargs(name).items() if key in inputs}
    kwargs["generator"] = torch.Generator("cpu").manual_seed(seed)
    output = "videos" if name in zoo.VIDEO else "images"
    return pipe(output=output, **{**kwargs, **changes}).cpu()


def modules_of(pipe):
    return {name: part for name, part in pipe.components.items() if isinstance(part, torch.nn.Module)}


def on_device(handle):
    return [c.name for held in handle._held.values() for c in held.engine.components if c.present]


@pytest.fixture
def without_ftfy(monkeypatch):
    """Wan's blocks clean prompts with a package that is not needed for anything else here."""
    monkeypatch.setattr(
        wan_encoders, "ftfy", types.SimpleNamespace(fix_text=lambda text: text), raising=False
    )


def workflow(manager, *path):
    pipe = blocks_of("flux", *path).init_pipeline(components_manager=manager)
    found = {name: manager.get_one(name=name) for name in pipe.pretrained_component_names}
    pipe.update_components(**found)
    quiet(pipe)
    return pipe

"""Importing the package costs next to nothing, whatever was imported before it."""

import subprocess
import sys

import pytest

import diffusers_offload


def python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout


def test_everything_that_is_public_is_there():
    assert set(diffusers_offload._HOME) | {"install", "uninstall"} == set(diffusers_offload.__all__)
    for name in diffusers_offload.__all__:
        assert getattr(diffusers_offload, name).__module__.startswith("diffusers_offload"), name


def test_importing_loads_nothing_heavy():
    out = python(
        "import sys, diffusers; before = set(sys.modules); import diffusers_offload\n"
        "new = {m.partition('.')[0] for m in set(sys.modules) - before}\n"
        "print(sorted(new & {'accelerate', 'transformers', 'matplotlib', 'tqdm', 'numpy'}))\n"
        "print('diffusers.pipelines.pipeline_utils' in sys.modules)"
    )
    assert out.split() == ["[]", "False"]


@pytest.mark.parametrize(
    "order",
    [
        "import diffusers_offload; from diffusers import DiffusionPipeline",
        "from diffusers import DiffusionPipeline; import diffusers_offload",
        "import diffusers_offload, diffusers; from diffusers import DiffusionPipeline",
    ],
)
def test_the_methods_are_there_in_any_order_of_imports(order):
    out = python(
        order + "; import diffusers_offload as d; d.install()\n"
        "print(DiffusionPipeline.enable_block_offload.__qualname__)\n"
        "d.uninstall(); print(hasattr(DiffusionPipeline, 'enable_block_offload'),"
        " DiffusionPipeline.maybe_free_model_hooks.__qualname__); d.install()\n"
        "from diffusers import FluxPipeline; print(FluxPipeline.disable_block_offload.__qualname__)"
    )
    assert out.split() == [
        "BlockOffloadMixin.enable_block_offload",
        "False",
        "DiffusionPipeline.maybe_free_model_hooks",
        "BlockOffloadMixin.disable_block_offload",
    ]

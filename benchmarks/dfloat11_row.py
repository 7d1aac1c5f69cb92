"""DFloat11 on a model with random weights: compressed by `dfloat11_writer`, loaded and run by its own code."""

from __future__ import annotations

import sys
import types
from contextlib import redirect_stdout
from importlib import import_module
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import dfloat11_writer
import torch
from peers import Enabled
from torch import nn

if find_spec("pkg_resources") is None:  # left setuptools with 82; dfloat11 asks it for the path of its kernel
    pkg_resources = types.ModuleType("pkg_resources")
    pkg_resources.resource_filename = lambda package, name: str(files(package) / name)
    sys.modules["pkg_resources"] = pkg_resources
dfloat11 = import_module("dfloat11.dfloat11")
utilities = import_module("dfloat11.dfloat11_utils")

# Which layers of a block are one compressed tensor, as in the checkpoints that its authors publish.
PATTERNS = {
    "FluxTransformer2DModel": {
        r"transformer_blocks\.\d+": [
            *("norm1.linear", "norm1_context.linear"),
            *("attn.to_q", "attn.to_k", "attn.to_v", "attn.add_k_proj", "attn.add_v_proj", "attn.add_q_proj"),
            *("attn.to_out.0", "attn.to_add_out"),
            *("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"),
        ],
        r"single_transformer_blocks\.\d+": [
            *("norm.linear", "proj_mlp", "proj_out", "attn.to_q", "attn.to_k", "attn.to_v"),
        ],
    },
    "WanTransformer3DModel": {
        r"blocks\.\d+": [
            *(f"attn{n}.{layer}" for n in (1, 2) for layer in ("to_q", "to_k", "to_v", "to_out.0")),
            *("ffn.net.0.proj", "ffn.net.2"),
        ],
    },
}


def enable(model: nn.Module, device: torch.device) -> Enabled:
    patterns = PATTERNS[type(model).__name__]
    begin = perf_counter()
    with TemporaryDirectory(prefix="dfloat11-") as folder, redirect_stdout(sys.stderr):
        dfloat11_writer.write(model, patterns, Path(folder), utilities)
        prepared = perf_counter() - begin
        dfloat11.DFloat11Model.from_pretrained(
            folder, device=str(device), bfloat16_model=model, cpu_offload=True, pin_memory=True
        )
    blocks = [module for module in model.modules() if hasattr(module, "offloaded_tensors")]
    moved = sum(tensor.nbytes for block in blocks for tensor in block.offloaded_tensors.values())
    found = f"dfloat11 {version('dfloat11')}, cupy {dfloat11.cp.__version__}, {len(blocks)} blocks"
    return Enabled(moved, found, prepared)

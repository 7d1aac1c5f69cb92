"""`from_pretrained`: a saved pipeline, ready to run, of which no more than two blocks were ever in memory."""

from __future__ import annotations

import inspect
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..pipeline import BlockOffloadMixin
from ..quoting import quoted
from ..streams import find_device
from .converted import open_converted
from .streaming import storage_of, stream

_OF_OFFLOAD = frozenset(inspect.signature(BlockOffloadMixin.enable_block_offload).parameters) - {"self"}
_REFUSED = {
    "device_map": "block offload decides what lies where",
    "quantization_config": "quantised weights cannot be streamed",
    "use_flashpack": "only .safetensors files are read piece by piece",
    "use_onnx": "an ONNX model has no blocks",
}


def from_pretrained(
    path: str | os.PathLike,
    torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    offload_dir: str | os.PathLike | None = None,
    variant: str | None = None,
    device: str | torch.device | None = None,
    **arguments: Any,
) -> Any:
    """Load a saved pipeline without ever holding it in host memory, and offload it from disk.

    What comes out computes the same, to the bit, as `DiffusionPipeline.from_pretrained(path, torch_dtype=...)`. The
    first call reads the checkpoint once and writes its weights to `offload_dir`, in the dtype asked for; later ones
    find them there, unless the checkpoint has changed.

    Args:
        path: a folder that `save_pretrained` or `diffusers-offload convert` wrote, or an id on the Hub.
        torch_dtype: of the weights: one for all, or one per component's name and "default"; as in Diffusers, which
            calls it `dtype` now: that is accepted as well.
        offload_dir: folder for the block files, with room for all weights. A converted folder is its own.
        variant: of the files, as "fp16"; as in Diffusers.
        device: where to compute; found by itself if None.
        **arguments: those of `enable_block_offload`, and any that `DiffusionPipeline.from_pretrained` takes:
            `text_encoder=...` and other components of your own, which are not loaded; `revision`, `cache_dir` ...
            `pipeline_class` is the class to load as, `DiffusionPipeline` if left out.

    Returns:
        The pipeline, with block offload enabled and `tier="disk"` unless `tier` says otherwise.

    Raises:
        ValueError: an argument is wrong, or weights are pickled, quantised or missing.
        StoreError: `offload_dir` cannot be used, or has no room.
        OSError: files of the checkpoint are missing or damaged.
    """
    offload = {name: arguments.pop(name) for name in list(arguments) if name in _OF_OFFLOAD}
    _refuse(arguments)
    if "dtype" in arguments:  # what Diffusers calls it from 0.42 on
        if torch_dtype is not None:
            raise ValueError("torch_dtype and dtype are the same: give one of them")
        torch_dtype = arguments.pop("dtype")
    find_device(device)
    converted = open_converted(path, torch_dtype, variant, arguments)
    if offload_dir is None and converted is None:
        raise ValueError("offload_dir is missing: give a folder with room for the weights, which go there")
    offload_dir = Path(offload_dir if offload_dir is not None else path)
    storage = storage_of(offload_dir, offload)
    offload = {"tier": "disk", **offload, "device": device, "offload_dir": storage.directory}
    if converted is not None:
        pipe = converted.open()
    else:
        pipe = stream(path, torch_dtype, variant, storage.directory, offload, arguments)
    pipe.enable_block_offload(**offload)
    return pipe


def _refuse(arguments: Mapping[str, Any]) -> None:
    for name, why in _REFUSED.items():
        if arguments.get(name):
            raise ValueError(
                f"{name}={quoted(arguments[name])} does not go with block offload: {why}. Leave it out"
            )
    if arguments.get("use_safetensors") is False:
        raise ValueError(
            "use_safetensors=False would read pickled weights, which cannot be streamed: leave it out"
        )
    if arguments.get("low_cpu_mem_usage") is False:
        raise ValueError("low_cpu_mem_usage=False would hold the whole model in memory: leave it out")

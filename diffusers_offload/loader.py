"""`from_pretrained`: a saved pipeline, ready to run, of which no more than two blocks were ever in memory.

Diffusers and transformers load it themselves, with everything that they do to names, dtypes and ties; the casts of
its weights are `deferred`, and what is looked at through mappings of the checkpoint is then written to block files,
a block at a time (`settling`). The pipeline's tensors look at these.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from . import sources
from .conversion import open_converted
from .deferred import DeferredCasts, Promises
from .holes import Holes
from .lightx2v import OffloadConfig
from .packing import unpacks_fast
from .pipeline import BlockOffloadMixin
from .policy import Request, Storage, parse_request, parse_storage
from .quoting import quoted
from .report import GIB
from .routing import make_target
from .settling import settle
from .skeleton import INDEX, read_json
from .streams import find_device, open_streams
from .target import Target
from .tiers.packed import Packer
from .units import tensors_of

_PROGRESS_FROM = GIB  # bytes from which on writing takes long enough to show a progress bar
_ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers casts in threads otherwise, where nothing is deferred
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
    storage = _storage(offload_dir, offload)
    offload = {"tier": "disk", **offload, "device": device, "offload_dir": storage.directory}
    if converted is not None:
        pipe = converted.open()
    else:
        pipe = stream(path, torch_dtype, variant, storage.directory, offload, arguments)
    pipe.enable_block_offload(**offload)
    return pipe


def stream(
    path: str | os.PathLike,
    torch_dtype: Any,
    variant: str | None,
    root: Path,
    offload: Mapping[str, Any],
    arguments: Mapping[str, Any],
    progress: bool | None = None,
    identities: dict[str, str] | None = None,
) -> Any:
    """Load a pipeline whose weights look at block files below `root`, which are written unless they are there.

    Args:
        offload: arguments of `enable_block_offload`: the files are made for these.
        arguments: for `DiffusionPipeline.from_pretrained`.
        progress: whether to show a bar; None: if it takes long.
        identities: what the components' weights are called is put here.
    """
    folder = find(path, variant, arguments)
    given = {name for name, value in arguments.items() if value is None or isinstance(value, nn.Module)}
    saved = saved_modules(folder, given)
    for name, where in saved.items():
        sources.refuse(name, where)
    stamps = {name: sources.stamp_of(where) for name, where in saved.items()}
    with Promises() as promises:
        pipe = load(folder, promises, torch_dtype=torch_dtype, variant=variant, **arguments)
        modules = pipe._offloadable_modules()
        own = {n: m for n, m in modules.items() if n in saved and m is not arguments.get(n)}
        request, device = _request(pipe, modules, offload), find_device(offload.get("device"))
        total = sum(t.numel() * t.element_size() for m in own.values() for t in tensors_of(m))
        quiet = not progress if progress is not None else total < _PROGRESS_FROM or None
        with tqdm(
            total=total, unit="B", unit_scale=True, unit_divisor=1024, desc="Weights to disk", disable=quiet
        ) as bar:
            for name, module in own.items():
                target = make_target(name, module, request, name in request.by_name)
                stamp = f"{stamps[name]} {_dtype_of(name, torch_dtype)} {variant} {type(module).__qualname__}"
                packer = _packer(target, request, device)
                identity = settle(target, root, stamp, promises, bar.update, packer)
                if identities is not None:
                    identities[name] = identity
    if not os.path.isdir(path):
        pipe.register_to_config(_name_or_path=str(path))
    return pipe


def find(path: str | os.PathLike, variant: str | None, arguments: Mapping[str, Any]) -> Path:
    """The folder of a saved pipeline; one of the Hub's is downloaded."""
    from diffusers import DiffusionPipeline

    if os.path.isdir(path):
        if not (Path(path) / INDEX).is_file():
            raise ValueError(
                f"{path} is no pipeline: it has no {INDEX}. Name a folder that save_pretrained wrote"
            )
        return Path(path)
    others = {name: value for name, value in arguments.items() if not isinstance(value, nn.Module)}
    others.pop("pipeline_class", None)
    return Path(DiffusionPipeline.download(str(path), variant=variant, use_safetensors=True, **others))


def saved_modules(folder: Path, given: set[str]) -> dict[str, Path]:
    """Where the components with weights are saved, by name, but for those that are given."""
    found = {}
    for name, entry in read_json(folder / INDEX).items():
        if name in given or not (isinstance(entry, list) and len(entry) == 2 and entry[0]):
            continue
        where = sources.folder_of(name, folder)
        if where != folder and where.is_dir():
            found[name] = where
    return found


def load(folder: Path, promises: Promises, holes: Mapping[Path, int] | None = None, **arguments: Any) -> Any:
    """The pipeline as Diffusers loads it, except that its weights are promised or looked at in their files.

    Args:
        holes: files of it that hold nothing from some byte on.
        **arguments: for `from_pretrained` of its class.
    """
    from diffusers import DiffusionPipeline
    from diffusers.utils import deprecation_utils

    cls = arguments.pop("pipeline_class", None) or DiffusionPipeline
    if hasattr(deprecation_utils, "_resolve_dtype"):  # from 0.42 on, with a warning for the old word
        arguments["dtype"] = arguments.pop("torch_dtype")
    arguments = {"use_safetensors": True, "low_cpu_mem_usage": True, **arguments}
    with _in_this_thread(), DeferredCasts(promises, Holes(holes or {})):
        return cls.from_pretrained(folder, **arguments)


@contextmanager
def _in_this_thread() -> Iterator[None]:
    before = os.environ.get(_ASYNC)
    os.environ[_ASYNC] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[_ASYNC]
        else:
            os.environ[_ASYNC] = before


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


def _request(pipe: Any, modules: Mapping[str, nn.Module], offload: Mapping[str, Any]) -> Request:
    """What enabling is going to ask for."""
    offload = dict(offload)
    config = offload.pop("config", None)
    if config is not None:
        config = config if isinstance(config, OffloadConfig) else OffloadConfig.from_lightx2v(config)
        offload = config.arguments(pipe, **offload)
    return parse_request(
        offload.get("offload_granularity", "block"),
        offload.get("offload_ratio"),
        offload.get("components"),
        tuple(modules),
        offload.get("tier"),
        _storage(offload["offload_dir"], offload),
        offload.get("pair_passes"),
    )


def _storage(offload_dir: Path, offload: Mapping[str, Any]) -> Storage:
    workers, cache = offload.get("num_disk_workers", 2), offload.get("cache_policy", "static")
    return parse_storage(offload_dir, workers, cache, offload.get("pack_on_disk"))


def _packer(target: Target, request: Request, device: torch.device) -> Packer | None:
    """What packs the files of a component; None if they hold its weights as they are."""
    fast = unpacks_fast(device)
    wanted = request.storage.packs
    packs = fast and target.policy.tier == "disk" if wanted is None else wanted
    return Packer(open_streams(device), fast) if packs else None


def _dtype_of(component: str, torch_dtype: Any) -> str:
    if isinstance(torch_dtype, Mapping):
        torch_dtype = torch_dtype.get(component, torch_dtype.get("default"))
    return str(torch_dtype)

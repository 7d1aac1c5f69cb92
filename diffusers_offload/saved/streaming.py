"""Brings the weights of a saved pipeline to block files while it is loaded: no more than two blocks are in memory.

Diffusers and transformers load it themselves, with everything that they do to names, dtypes and ties; the casts of
its weights are `deferred`, and what is looked at through mappings of the checkpoint is then written to block files,
a block at a time (`settling`). The pipeline's tensors look at these.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from ..lightx2v import OffloadConfig
from ..packing import unpacks_fast
from ..policy import Request, Storage, parse_request, parse_storage
from ..report import GIB
from ..routing import make_target
from ..streams import find_device, open_streams
from ..target import Target
from ..tiers.packed import Packer
from ..units import tensors_of
from . import sources
from .deferred import Promises
from .loading import find, load, saved_modules
from .settling import settle

_PROGRESS_FROM = GIB  # bytes from which on writing takes long enough to show a progress bar


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


def storage_of(offload_dir: Path, offload: Mapping[str, Any]) -> Storage:
    """What arguments of `enable_block_offload` say of weights on disk."""
    workers, cache = offload.get("num_disk_workers", 2), offload.get("cache_policy", "static")
    return parse_storage(offload_dir, workers, cache, offload.get("pack_on_disk"))


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
        storage_of(offload["offload_dir"], offload),
        offload.get("pair_passes"),
    )


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

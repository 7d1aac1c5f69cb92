"""`convert`: a saved pipeline as a folder of block files, which `from_pretrained` opens without the source.

The folder holds the pipeline's configs, tokenizers and schedulers, the weights' stores, and a note (`converted`).
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..quoting import quoted
from ..tiers import blockfile
from . import sources
from .converted import NOTE, in_words, write_note
from .loading import find
from .skeleton import INDEX
from .streaming import stream

_NOT_COPIED = (*sources.PICKLES, sources.WEIGHTS, ".onnx", ".msgpack.index.json", ".bin.index.json")


def convert(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    torch_dtype: torch.dtype | Mapping[str, torch.dtype] | None = None,
    variant: str | None = None,
    offload_granularity: str = "block",
    components: Mapping[str, Any] | None = None,
    progress: bool | None = None,
    packed: bool = False,
    **arguments: Any,
) -> Path:
    """Write a saved pipeline as block files, which `from_pretrained(destination)` opens at once.

    Killed at any moment, it goes on where it was when it is called again; a folder that is not complete is not opened.

    Args:
        source: a folder that `save_pretrained` wrote, or an id on the Hub.
        destination: a folder that is not there, empty, or an earlier conversion's.
        torch_dtype, variant: as in `from_pretrained`.
        offload_granularity, components: what it will be offloaded with; otherwise weights are written once more when
            it is opened with another.
        progress: whether to show a bar; None: if it takes long.
        packed: pack the weights of blocks, without loss in some 70 % of the bytes: for devices that unpack fast.
        **arguments: for `DiffusionPipeline.from_pretrained`.

    Returns:
        The folder.

    Raises:
        ValueError: an argument is wrong, or weights are pickled, quantised or missing.
        StoreError: the folder cannot be used, or has no room.
        OSError: files of the checkpoint are missing or damaged.
    """
    if not isinstance(packed, bool):
        raise ValueError(f"packed={quoted(packed)} is neither True nor False")
    source, root = find(source, variant, arguments), Path(destination).expanduser().absolute()
    _refuse_destination(source, root)
    given = sorted(name for name, value in arguments.items() if isinstance(value, nn.Module))
    if given:
        raise ValueError(f"{given[0]}= is a model of your own: give it to from_pretrained, not to convert")
    absent = sorted(name for name, value in arguments.items() if value is None)
    about = {"torch_dtype": in_words(torch_dtype), "variant": variant, "absent": absent}
    root.mkdir(parents=True, exist_ok=True)
    write_note(root, {"complete": False, **about, "components": {}, "headers": {}})
    _copy_configs(source, root)
    offload = {"offload_granularity": offload_granularity, "tier": "disk", "offload_dir": root}
    offload["pack_on_disk"] = packed
    if components is not None:
        offload["components"] = components
    identities: dict[str, str] = {}
    pipe = stream(source, torch_dtype, variant, root, offload, arguments, progress, identities)
    left = sorted(pipe._offloadable_modules().keys() - identities.keys())
    if left:
        raise ValueError(f"{left[0]} has no folder of its own in {source}, so it cannot be converted")
    headers = {
        str(file.relative_to(source)): [file.stat().st_size, sources.header_of(file)[8:].decode()]
        for file in sources.checkpoints(source)
        if file.parent != source
    }
    write_note(root, {"complete": True, **about, "components": identities, "headers": headers})
    return root


def _refuse_destination(source: Path, root: Path) -> None:
    if root.exists() and not root.is_dir():
        raise ValueError(f"{root} is a file: name a folder")
    if root.is_dir() and os.path.samefile(source, root):
        raise ValueError(f"{root} is the source itself: name another folder")
    if os.path.lexists(source / NOTE):
        raise ValueError(f"{source} is converted already: name the pipeline that it was made from")
    others = [each for each in root.iterdir() if not blockfile.is_temporary(each)] if root.is_dir() else []
    if others and not os.path.lexists(root / NOTE):
        raise ValueError(f"{root} holds something else: name an empty folder, or one that is not there")


def _copy_configs(source: Path, root: Path) -> None:
    """What is small: all but weights, and the pipeline's index last, so that what has one has everything."""
    for file in sorted(source.rglob("*"), key=lambda file: file.name == INDEX):
        place = file.relative_to(source)
        if any(part.startswith(".") for part in place.parts) or file.name.endswith(_NOT_COPIED):
            continue
        if file.is_file():
            (root / place).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, root / place)

"""Loads a saved pipeline as Diffusers does, with its weights promised or looked at in their files."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from . import sources
from .deferred import DeferredCasts, Promises
from .holes import Holes
from .skeleton import INDEX, read_json

_ASYNC = "HF_DEACTIVATE_ASYNC_LOAD"  # transformers casts in threads otherwise, where nothing is deferred


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

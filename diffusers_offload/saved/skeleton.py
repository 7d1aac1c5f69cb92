"""A saved pipeline's modules without their weights: built from their configs, on the meta device.

The folder may be a stranger's: only JSON is read, only classes of Diffusers and transformers are built, and what
building may do is `confined`.
"""

from __future__ import annotations

import importlib
import inspect
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..demo.maker import cast_as_loaded, default_dtype
from ..quoting import quoted
from .confinement import ConfinedError, confined

INDEX, _CONFIG = "model_index.json", "config.json"
_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_LARGEST_HEADER = 100 * 2**20  # bytes; safetensors itself reads none that is larger
_LARGEST_CONFIG = 10 * 2**20  # bytes; real ones have a few thousand
_PLAIN_ATTENTION = (None, "eager", "sdpa")  # what needs no code beyond the installed libraries
_LONGEST_REASON = 1000  # characters of an exception that are shown
_STORED = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class NoPipelineError(ValueError):
    """What was named is no saved pipeline; the message says what was looked for."""


@dataclass(frozen=True)
class Skeleton:
    """A pipeline's modules without weights.

    Attributes:
        title: what it is: the pipeline's class, or the component's.
        modules: those that could be built, by the component's name.
        dtypes: of their weights, in words: which, and who says so.
        missing: for each component that could not be built, why.
    """

    title: str
    modules: Mapping[str, nn.Module]
    dtypes: Mapping[str, str]
    missing: Mapping[str, str]

    def only(self, names: Collection[str] | None) -> Skeleton:
        """The same with the components `names` alone; all of them if None.

        Raises:
            ValueError: it has no such component.
        """
        known = (*self.modules, *self.missing)
        unknown = [name for name in names or () if name not in known]
        if unknown:
            raise ValueError(
                f"there is no component {unknown[0]!r}; there are {', '.join(map(repr, known)) or 'none'}"
            )
        if names is None:
            return self
        modules = {name: module for name, module in self.modules.items() if name in names}
        missing = {name: why for name, why in self.missing.items() if name in names}
        return replace(self, modules=modules, missing=missing)


def open_skeleton(path: str, dtype: torch.dtype | None = None) -> Skeleton:
    """Build the modules of a saved pipeline, or of one saved component, as `from_pretrained` would load them.

    Args:
        path: a directory with a model_index.json, or with the config.json of one component; or the id of a
            pipeline on the Hub, of which the configs are fetched unless they are in the cache.
        dtype: as `torch_dtype` of `from_pretrained`; None takes that of the stored weights, which the
            headers of their files tell (or the config, or else float32).

    Raises:
        NoPipelineError: there is none.
    """
    folder = _find_folder(path)
    if (folder / INDEX).is_file():
        index = read_json(folder / INDEX)
        title = index.get("_class_name")
        title = title if isinstance(title, str) and title.isidentifier() else "a pipeline"
        entries = {
            name: (index[name][0], index[name][1])
            for name in _in_order_of_signature(title, index)
            if isinstance(index[name], list) and len(index[name]) == 2 and all(index[name])
        }
        return _build_all(title, {name: (folder / name, *entry) for name, entry in entries.items()}, dtype)
    if (folder / _CONFIG).is_file():
        config = read_json(folder / _CONFIG)
        architectures = config.get("architectures")
        library = "diffusers" if "_class_name" in config else "transformers"
        listed = architectures[0] if isinstance(architectures, list) and architectures else None
        class_name = config.get("_class_name") or listed
        if isinstance(class_name, str):
            name = folder.resolve().name
            return _build_all(class_name, {name: (folder, library, class_name)}, dtype)
        raise NoPipelineError(
            f"{path}: its {_CONFIG} names no class, neither as _class_name nor in architectures"
        )
    if (folder / "modular_model_index.json").is_file():
        raise NoPipelineError(f"{path} is a modular pipeline: name the directory of one of its components")
    raise NoPipelineError(
        f"{path} is no pipeline: it has neither a {INDEX} (a pipeline saved by save_pretrained) "
        f"nor a {_CONFIG} (one of its components)"
    )


def demo_skeleton(name: str, size: str, dtype: torch.dtype | None = None) -> Skeleton:
    """The modules of one of the demo's pipelines; in bfloat16 if `dtype` is None."""
    from ..demo.pipelines import build

    pipe = build(name, size=size, dtype=dtype or torch.bfloat16, device="meta")
    modules = {name: module for name, module in pipe.components.items() if isinstance(module, nn.Module)}
    words = _in_words(dtype or torch.bfloat16, "as asked" if dtype else "the demo's")
    return Skeleton(type(pipe).__name__, modules, dict.fromkeys(modules, words), {})


# --- finding it -----------------------------------------------------------------------------------------


def _find_folder(path: str) -> Path:
    try:
        folder = Path(path).expanduser()
        if folder.is_dir():
            return folder
        exists = folder.exists()
    except (OSError, ValueError, RuntimeError) as error:  # too long, not ours to read, no such user
        raise NoPipelineError(
            f"{quoted(path)} cannot be looked at ({error}): name a directory that save_pretrained wrote"
        ) from error
    if exists:
        raise NoPipelineError(f"{path} is a file: name the directory that save_pretrained wrote")
    if not _HUB_ID.fullmatch(path):
        raise NoPipelineError(
            f"{path} is not there: name a directory that save_pretrained wrote, or an id on the Hub"
        )
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(path, allow_patterns=[INDEX, _CONFIG, f"*/{_CONFIG}"]))
    except Exception as error:  # of the network, the cache, the id: huggingface_hub has a class for each
        reason = str(error).strip().partition("\n")[0]
        raise NoPipelineError(
            f"{path} is no directory here, and the Hub does not give it: {reason}"
        ) from error


def read_json(file: Path) -> dict[str, Any]:
    """What a saved config holds.

    Raises:
        NoPipelineError: it cannot be read, or is none.
    """
    try:
        size = file.stat().st_size
        if size > _LARGEST_CONFIG:
            raise NoPipelineError(f"{file} is not what save_pretrained writes: it has {size} bytes")
        content = json.loads(file.read_text(encoding="utf-8"))
    except NoPipelineError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise NoPipelineError(f"{file} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise NoPipelineError(f"{file} is not what save_pretrained writes: no JSON object")
    return content


def _in_order_of_signature(class_name: str, index: Mapping[str, Any]) -> list[str]:
    """The components' names as the pipeline's class lists them; the file has them by the alphabet."""
    import diffusers

    names = [name for name in index if name.isidentifier() and not name.startswith("_")]
    try:
        listed = list(inspect.signature(getattr(diffusers, class_name).__init__).parameters)
    except (AttributeError, ImportError, RuntimeError, TypeError, ValueError):
        return names  # a class of somebody's own
    return sorted(names, key=lambda name: listed.index(name) if name in listed else len(listed))


# --- building -------------------------------------------------------------------------------------------


def _build_all(
    title: str, entries: Mapping[str, tuple[Path, str, str]], dtype: torch.dtype | None
) -> Skeleton:
    modules, dtypes, missing = {}, {}, {}
    for name, (folder, library, class_name) in entries.items():
        try:
            cls = _find_class(library, class_name)
            if cls is not None and not issubclass(cls, nn.Module):
                continue  # a tokenizer, a scheduler
            if not (folder / _CONFIG).is_file():
                if cls is not None:
                    missing[name] = f"there is no {name}/{_CONFIG}"
                continue
            if cls is None:
                missing[name] = f"there is no class {_name_text(class_name)} in {_name_text(library)}"
                continue
            if not hasattr(cls, "load_config") and getattr(cls, "config_class", None) is None:
                missing[name] = f"a {class_name} has no config of its own"
                continue
            config = read_json(folder / _CONFIG)
            if config.get("quantization_config"):
                missing[name] = "quantised weights are not supported"
                continue
            chosen, source = (dtype, "as asked") if dtype is not None else _dtype_of(folder, config)
            modules[name] = _build(cls, folder, chosen)
            dtypes[name] = _in_words(chosen, source)
        except Exception as error:  # whatever a model's constructor may raise
            first = str(error).strip().partition("\n")[0]
            what = (
                f"{type(error).__name__}: {first}" if len(first) <= _LONGEST_REASON else type(error).__name__
            )
            missing[name] = f"{_name_text(class_name)} cannot be built without weights: {what}"
    return Skeleton(title, modules, dtypes, missing)


def _name_text(name: object) -> str:
    return name if isinstance(name, str) and name.isidentifier() else quoted(name)


def _find_class(library: str, class_name: str) -> type | None:
    """The class that a model_index.json names: of a library, or of one of Diffusers' pipelines."""
    import diffusers.pipelines

    # Public names only: what these modules list, or hold because they imported it. Nothing is imported by name.
    if not all(isinstance(n, str) and n.isidentifier() and n[0] != "_" for n in (library, class_name)):
        return None
    if hasattr(diffusers.pipelines, library):
        home = getattr(diffusers.pipelines, library)
    elif library in ("diffusers", "transformers"):
        home = importlib.import_module(library)
    else:
        return None  # code that lies beside the weights, or in a library of its own
    found = getattr(home, class_name, None)
    return found if isinstance(found, type) else None


def _build(cls: type[nn.Module], folder: Path, dtype: torch.dtype) -> nn.Module:
    def make() -> nn.Module:
        if hasattr(cls, "load_config"):  # Diffusers'
            return cls.from_config(cls.load_config(folder))
        config = cls.config_class.from_pretrained(folder)
        for each in _configs_in(config):  # a model within asks its config, not the default
            setattr(each, "dtype" if hasattr(each, "dtype") else "torch_dtype", dtype)
            _disarm(each)
        model = cls(config)
        model.tie_weights()
        return model

    with confined():
        model = _without_weights(make, dtype)
    if hasattr(cls, "load_config"):
        _cast_what_is_stored(model, dtype)
    else:
        cast_as_loaded(model, dtype)
    return model.eval()


def _configs_in(config: Any) -> Iterator[Any]:
    """A config of transformers', and those within it."""
    yield config
    for value in list(vars(config).values()):
        if hasattr(type(value), "model_type"):
            yield from _configs_in(value)


def _disarm(config: Any) -> None:
    """Take from a config of transformers' what names code that is not installed: it may be on the Hub.

    What computes the attention or the experts changes no weight.
    """
    vars(config).pop("auto_map", None)
    if getattr(config, "_attn_implementation", None) not in _PLAIN_ATTENTION:
        config._attn_implementation = None
    if getattr(config, "_experts_implementation", None) is not None:
        config._experts_implementation = None


def _cast_what_is_stored(model: nn.Module, dtype: torch.dtype) -> None:
    """As Diffusers does: what comes from a file is cast, what the constructor computes is not."""
    kept = set(getattr(model, "_keep_in_fp32_modules", None) or ())
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.float32 if kept.intersection(name.split(".")) else dtype)


def _without_weights(make: Callable[[], nn.Module], dtype: torch.dtype) -> nn.Module:
    with default_dtype(dtype):
        try:
            with torch.device("meta"):
                return make()
        except ConfinedError:
            raise
        except Exception:  # a constructor that computes with the values of a tensor
            from accelerate import init_empty_weights

            with init_empty_weights():
                return make()


# --- dtypes ---------------------------------------------------------------------------------------------


def _dtype_of(folder: Path, config: Mapping[str, Any]) -> tuple[torch.dtype, str]:
    stored = _stored_dtype(folder)
    if stored is not None:
        return stored, "as stored"
    # Not getattr: torch imports some of its modules when they are asked for.
    named = vars(torch).get(str(config.get("dtype") or config.get("torch_dtype")).removeprefix("torch."))
    if isinstance(named, torch.dtype) and named.is_floating_point:
        return named, "as its config says"
    return torch.float32, "a guess, for nothing says"


def _stored_dtype(folder: Path) -> torch.dtype | None:
    """The dtype that most bytes of the safetensors files in `folder` have; reads nothing but their headers."""
    files = sorted(
        file for file in folder.glob("*.safetensors") if file.is_file()
    )  # opening a pipe would wait
    # "model.fp16.safetensors" is a variant, which is loaded only by its name.
    files = [file for file in files if "." not in file.stem] or files
    sizes: dict[str, int] = {}
    for file in files:
        for word, nbytes in _stored_sizes(file):
            sizes[word] = sizes.get(word, 0) + nbytes
    floating = {word: nbytes for word, nbytes in sizes.items() if word in _STORED}
    return _STORED[max(floating, key=floating.__getitem__)] if floating else None


def _stored_sizes(file: Path) -> Iterator[tuple[str, int]]:
    """For each tensor in a safetensors file, the word for its dtype, and its bytes."""
    try:
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            header = json.loads(stream.read(length)) if length <= _LARGEST_HEADER else {}
        for name, entry in header.items():
            if name != "__metadata__":
                begin, end = entry["data_offsets"]
                yield str(entry["dtype"]), int(end) - int(begin)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        return  # damaged, or a pointer in place of the file: the config may know


def _in_words(dtype: torch.dtype, source: str) -> str:
    return f"{str(dtype).removeprefix('torch.')}, {source}"

"""`convert`: a saved pipeline as a folder of block files, which `from_pretrained` opens without the source.

The folder holds the pipeline's configs, tokenizers and schedulers, the weights' stores, and a note that ties them
together: which stores, for which dtype, and the headers of the checkpoint's files. Opened, the libraries load from
files that have these headers and nothing behind them (sparse: they take no room), so that whatever a class does when
it is loaded is done again; then the true weights take the place of what came from there.
"""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from . import sources
from .log import logger
from .quoting import quoted
from .settling import settle_as
from .skeleton import INDEX
from .tiers import blockfile
from .tiers.blockfile import StoreError
from .tiers.sealed import seal, unseal
from .tiers.strictjson import keys, mapping, sequence, sizes, text

NOTE = "diffusers_offload.json"
_FORMAT = 1
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
    from .loader import find, stream

    if not isinstance(packed, bool):
        raise ValueError(f"packed={quoted(packed)} is neither True nor False")
    source, root = find(source, variant, arguments), Path(destination).expanduser().absolute()
    _refuse_destination(source, root)
    given = sorted(name for name, value in arguments.items() if isinstance(value, nn.Module))
    if given:
        raise ValueError(f"{given[0]}= is a model of your own: give it to from_pretrained, not to convert")
    absent = sorted(name for name, value in arguments.items() if value is None)
    about = {"torch_dtype": _in_words(torch_dtype), "variant": variant, "absent": absent}
    root.mkdir(parents=True, exist_ok=True)
    _write_note(root, {"complete": False, **about, "components": {}, "headers": {}})
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
    _write_note(root, {"complete": True, **about, "components": identities, "headers": headers})
    return root


@dataclass(frozen=True)
class Converted:
    """A folder that `convert` wrote, found complete.

    Attributes:
        note: what the note says.
        arguments: for `DiffusionPipeline.from_pretrained`.
    """

    root: Path
    note: Mapping[str, Any]
    arguments: Mapping[str, Any]

    def open(self) -> Any:
        """The pipeline, its weights looking at the block files.

        Raises:
            StoreError: files were changed, or are gone; the message names one.
        """
        from .deferred import Promises
        from .loader import load

        arguments = {**dict.fromkeys(self.note["absent"]), **self.arguments}
        given = {name for name, value in arguments.items() if value is None or isinstance(value, nn.Module)}
        with tempfile.TemporaryDirectory(prefix="diffusers_offload-") as folder, Promises() as promises:
            stand_in = Path(folder) / self.root.name
            holes = self._make_stand_in(stand_in)
            pipe = load(
                stand_in,
                promises,
                holes,
                torch_dtype=_from_words(self.note["torch_dtype"]),
                variant=self.note["variant"],
                **arguments,
            )
            try:
                for name, identity in self.note["components"].items():
                    if name not in given:
                        settle_as(name, getattr(pipe, name), self.root, identity)
            except StoreError as error:
                raise StoreError(f"{error}. Convert the pipeline again into {self.root}") from error
            _rename(pipe, str(stand_in), str(self.root))
        return pipe

    def _make_stand_in(self, folder: Path) -> dict[Path, int]:
        """What the libraries load from: links to what was copied, and the checkpoint's headers.

        Returns:
            Where these end, in bytes: behind them is nothing.
        """
        headers = {Path(name): entry for name, entry in self.note["headers"].items()}
        folder.mkdir()
        real = {folder / parent for name in headers for parent in name.parents}
        for within in sorted(real):
            within.mkdir(exist_ok=True)
            for entry in (self.root / within.relative_to(folder)).iterdir():
                if within / entry.name not in real:
                    (within / entry.name).symlink_to(entry)
        for name, (nbytes, header) in headers.items():
            raw = header.encode()
            with (folder / name).open("xb") as stream:
                stream.write(len(raw).to_bytes(8, "little") + raw)
                stream.truncate(nbytes)
        return {folder / name: 8 + len(entry[1].encode()) for name, entry in headers.items()}


def open_converted(
    path: str | os.PathLike, torch_dtype: Any, variant: str | None, arguments: Mapping[str, Any]
) -> Converted | None:
    """A converted folder; None if `path` is something else.

    Raises:
        ValueError: it holds another dtype or variant than is asked for.
        StoreError: it is not complete, or its note was changed.
    """
    root = Path(path).expanduser().absolute()
    if not root.is_dir() or not os.path.lexists(root / NOTE):
        return None
    note = _read_note(root)
    if not note["complete"]:
        raise StoreError(
            f"{root / NOTE} says that the conversion into this folder did not end. Run `diffusers-offload convert` "
            "again with the same arguments: it goes on where it was"
        )
    for name, asked, held in (
        ("torch_dtype", _in_words(torch_dtype), note["torch_dtype"]),
        ("variant", variant, note["variant"]),
    ):
        if asked is not None and asked != held:
            raise ValueError(
                f"{name}={quoted(asked)}, but {root} was converted with {quoted(held)}: leave it out, or convert "
                "into another folder"
            )
    return Converted(root, note, dict(arguments))


# --- the note ---------------------------------------------------------------------------------------------


def _write_note(root: Path, content: dict[str, Any]) -> None:
    blockfile.replace(root / NOTE, [memoryview(seal({"format": _FORMAT, **content}))])


def _read_note(root: Path) -> dict[str, Any]:
    try:
        note = unseal((root / NOTE).read_bytes())
        if note.get("format") != _FORMAT:
            raise ValueError(f"its format is {note.get('format')!r}, this program writes {_FORMAT}")
        _check_note(note)
    except (OSError, ValueError) as error:
        raise StoreError(f"{root / NOTE} cannot be used: {error}. Convert the pipeline again") from error
    return note


def _check_note(note: dict[str, Any]) -> None:
    """Raise ValueError unless the note is what `convert` writes: somebody else may have written it."""
    keys(note, "format", "complete", "torch_dtype", "variant", "absent", "components", "headers")
    if not isinstance(note["complete"], bool):
        raise ValueError("whether it is complete is neither true nor false")
    dtypes = note["torch_dtype"] if isinstance(note["torch_dtype"], dict) else {"": note["torch_dtype"]}
    if not all(each is None or isinstance(_from_words(each), torch.dtype) for each in dtypes.values()):
        raise ValueError("its dtype is none")
    if note["variant"] is not None:
        text(note["variant"], "variant")
    for name in (*sequence(note["absent"], "absent"), *mapping(note["components"], "components")):
        if not text(name, "a component").isidentifier():
            raise ValueError(f"{name!r} is no component")
    for identity in note["components"].values():
        text(identity, "an identity")
    for name, entry in mapping(note["headers"], "headers").items():
        place = PurePosixPath(name)  # a file is made under this name: it must not lead out of the folder
        if place.is_absolute() or ".." in place.parts or "\0" in name or place.suffix != sources.WEIGHTS:
            raise ValueError(f"{name!r} is no file of a checkpoint")
        nbytes, header = sequence(entry, name)
        sizes([nbytes], name)
        if len(text(header, name).encode()) + 8 > nbytes:
            raise ValueError(f"the header of {name!r} is longer than its file")


def _in_words(dtype: Any) -> Any:
    if isinstance(dtype, Mapping):
        return {name: _in_words(each) for name, each in dtype.items()}
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _from_words(words: Any) -> Any:
    if isinstance(words, dict):
        return {name: _from_words(each) for name, each in words.items()}
    return None if words is None else vars(torch).get(words)


# --- folders ----------------------------------------------------------------------------------------------


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


def _rename(pipe: Any, before: str, after: str) -> None:
    """Let nothing say that it came from the stand-in, which is gone."""
    for each in (pipe, *pipe.components.values()):
        if each is None:
            continue
        config = getattr(each, "config", None)
        if str(getattr(config, "_name_or_path", "")).startswith(before):
            name = after + str(config._name_or_path)[len(before) :]
            if hasattr(each, "register_to_config"):
                each.register_to_config(_name_or_path=name)
            else:
                config._name_or_path = name
        if str(vars(each).get("name_or_path", "")).startswith(before):
            each.name_or_path = after + each.name_or_path[len(before) :]
    logger.debug("opened %s", after)

"""A folder that `convert` wrote, and its note: opened, the libraries load from the checkpoint's headers alone.

The note ties the folder together: which stores, for which dtype, and the headers of the checkpoint's files. The
libraries load from files that have these headers and nothing behind them (sparse: they take no room), so that
whatever a class does when it is loaded is done again; then the true weights take the place of what came from there.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from torch import nn

from ..log import logger
from ..quoting import quoted
from ..tiers import blockfile
from ..tiers.blockfile import StoreError
from ..tiers.sealed import seal, unseal
from ..tiers.strictjson import keys, mapping, sequence, sizes, text
from . import sources
from .deferred import Promises
from .loading import load
from .settling import settle_as

NOTE = "diffusers_offload.json"
_FORMAT = 1


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
        ("torch_dtype", in_words(torch_dtype), note["torch_dtype"]),
        ("variant", variant, note["variant"]),
    ):
        if asked is not None and asked != held:
            raise ValueError(
                f"{name}={quoted(asked)}, but {root} was converted with {quoted(held)}: leave it out, or convert "
                "into another folder"
            )
    return Converted(root, note, dict(arguments))


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


# --- the note ---------------------------------------------------------------------------------------------


def write_note(root: Path, content: dict[str, Any]) -> None:
    """Write the note of a folder, as a whole or not at all."""
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


def in_words(dtype: Any) -> Any:
    """A dtype, or dtypes by name, as JSON knows them."""
    if isinstance(dtype, Mapping):
        return {name: in_words(each) for name, each in dtype.items()}
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _from_words(words: Any) -> Any:
    if isinstance(words, dict):
        return {name: _from_words(each) for name, each in words.items()}
    return None if words is None else vars(torch).get(words)

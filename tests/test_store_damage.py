"""Damaged stores: right, or refused with the file's name; never another model's, never half."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path

import pytest
from stores import BLOCKS, MINE, OTHER, change, fill, holds, parts, refuses

from diffusers_offload.tiers import blockfile, store
from diffusers_offload.tiers.store import MANIFEST, Store, file_name, verify


@pytest.fixture
def filled(tmp_path) -> Path:
    return fill(tmp_path)


def test_each_changed_byte_of_the_manifest_is_caught(tmp_path, filled):
    path = filled / MANIFEST
    whole = path.read_bytes()
    for position, old in enumerate(whole):
        for value in {old ^ 1, old ^ 0x20, old ^ 0x80, 0x20, 0} - {old}:
            change(path, position, value)
            refuses(tmp_path, r"manifest\.json cannot be used")
        change(path, position, old)
    fill(tmp_path)


def test_each_changed_byte_of_a_header_is_caught(tmp_path, filled):
    path = filled / file_name(BLOCKS[1])
    whole = path.read_bytes()
    for position in range(8 + int.from_bytes(whole[:8], "little")):
        change(path, position, whole[position] ^ (1 << position % 8))
        refuses(tmp_path, rf"{path.name} cannot be used")
        change(path, position, whole[position])
    fill(tmp_path)


def test_changed_data_are_found_and_written_anew(tmp_path, filled):
    path = filled / file_name(BLOCKS[1])
    with Store(tmp_path, "transformer", MINE) as opened:
        stored = opened.get(BLOCKS[1]).parts[1].stored
        change(path, stored.offset + 17, path.read_bytes()[stored.offset + 17] ^ 4)
        damaged = verify(opened)
        assert list(damaged) == [BLOCKS[1]] and path.name in str(damaged[BLOCKS[1]])
        for block in damaged:
            opened.forget(block)
            opened.put(block, parts(block))
        opened.commit(BLOCKS)
        assert not verify(opened)


def truncated(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def extended(path: Path) -> None:
    path.write_bytes(path.read_bytes() + b"\0")


def swapped(path: Path) -> None:
    other = path.with_name(file_name(BLOCKS[2]))
    path.rename(path.with_name("x"))
    other.rename(path)
    path.with_name("x").rename(other)


def replaced(path: Path) -> None:
    """By a right file with other weights."""
    blockfile.write(path, parts(BLOCKS[1], 1))


def linked(path: Path) -> None:
    path.rename(path.parent.parent / "elsewhere")
    path.symlink_to(path.parent.parent / "elsewhere")


@pytest.mark.parametrize("damage", [truncated, extended, swapped, replaced, linked, Path.unlink])
def test_damaged_files_are_refused_or_rebuilt(tmp_path, filled, damage, caplog):
    path = filled / file_name(BLOCKS[1])
    damage(path)
    refuses(tmp_path, path.name)
    refuses(tmp_path, "Delete")
    with caplog.at_level(logging.WARNING), Store(tmp_path, "transformer", MINE, rebuild=True) as opened:
        assert not opened.complete and BLOCKS[1] not in opened.blocks()
        assert all(holds(opened, block) for block in opened.blocks())
    fill(tmp_path, rebuild=True)
    assert not path.is_symlink()
    fill(tmp_path)


def sealed(path: Path, **edits) -> None:
    """The manifest with `edits`, by somebody who knows how its digest is made."""
    content = json.loads(path.read_bytes())["manifest"]
    path.write_bytes(store.seal(content | edits))


def entry(**edits) -> dict:
    return {BLOCKS[0]: {"file": file_name(BLOCKS[0]), "nbytes": 1, "fingerprint": "0"} | edits}


MANIFESTS = {
    "another model's": {"identity": OTHER},
    "of the future": {"format": 3},
    "a key too many": {"more": 1},
    "complete a number": {"complete": 1},
    "files a list": {"files": []},
    "an entry a list": {"files": {"a": []}},
    "a path that leads out": {"files": entry(file="../../secret.safetensors")},
    "an absolute path": {"files": entry(file="/etc/passwd")},
    "another block's file": {"files": entry(file=file_name(BLOCKS[1]))},
    "a name that is a number": {"files": entry(file=3)},
    "negative": {"files": entry(nbytes=-1)},
    "a float": {"files": entry(nbytes=1.0)},
    "fingerprint a list": {"files": entry(fingerprint=[])},
}


@pytest.mark.parametrize("edits", MANIFESTS)
def test_manifests_that_lie_are_refused_or_rebuilt(tmp_path, filled, edits, monkeypatch):
    sealed(filled / MANIFEST, **MANIFESTS[edits])
    opened = []
    true = os.open
    monkeypatch.setattr(
        os, "open", lambda path, *rest, **more: (opened.append(path), true(path, *rest, **more))[1]
    )
    refuses(tmp_path, r"manifest\.json cannot be used")
    assert all(Path(path).is_relative_to(filled) for path in opened)
    fill(tmp_path, rebuild=True)


@pytest.mark.parametrize(
    "raw", [b"", b"{", b"[]", b"null", b"{}", b'{"digest":1,"manifest":2}', b"[" * 10**5]
)
def test_other_manifests_are_refused(tmp_path, filled, raw):
    (filled / MANIFEST).write_bytes(raw)
    refuses(tmp_path, r"manifest\.json cannot be used")
    fill(tmp_path, rebuild=True)


def test_without_a_manifest_nothing_is_served(tmp_path, filled):
    (filled / MANIFEST).unlink()
    with Store(tmp_path, "transformer", MINE) as opened:
        assert not opened.complete and opened.blocks() == []

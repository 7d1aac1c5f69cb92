"""Folders that a store may not or cannot use, and disks that are full."""

from __future__ import annotations

import errno
import os
import shutil
from pathlib import Path

import pytest
from stores import BLOCKS, MINE, fill, holds, parts, read_only, refuses, tiny_disk  # noqa: F401

from diffusers_offload.tiers import folders, lock
from diffusers_offload.tiers.blockfile import StoreError
from diffusers_offload.tiers.store import MANIFEST, Store, file_name, verify


@pytest.fixture
def filled(tmp_path) -> Path:
    return fill(tmp_path)


# --- folders ----------------------------------------------------------------------------------------------


def test_folders_where_everybody_may_write_are_refused(tmp_path, filled):
    for folder in (filled, tmp_path):
        mode = folder.stat().st_mode
        folder.chmod(0o777)
        refuses(tmp_path, r"everybody may replace files in .*chmod")
        folder.chmod(0o1777)
        fill(tmp_path)
        folder.chmod(mode)


def test_a_folder_that_another_user_made_where_everybody_may_is_refused(tmp_path, filled, monkeypatch):
    tmp_path.chmod(0o1777)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    if filled.stat().st_uid == 0:
        os.chown(filled, 54321, -1)
    refuses(tmp_path, "made by another user")


def test_a_folder_that_is_a_link_is_refused(tmp_path, filled):
    filled.rename(tmp_path / "elsewhere")
    filled.symlink_to(tmp_path / "elsewhere")
    refuses(tmp_path, "is a link or a file, not a folder")
    filled.unlink()
    filled.write_bytes(b"")
    refuses(tmp_path, "cannot be made|not a folder")


def test_the_directory_itself_may_be_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    fill(tmp_path / "link")
    fill(tmp_path / "disk")


def test_a_complete_store_serves_users_who_may_only_read(tmp_path, filled, monkeypatch):
    read_only(monkeypatch)
    with Store(tmp_path, "transformer", MINE) as opened, Store(tmp_path, "transformer", MINE):
        assert all(holds(opened, block) for block in BLOCKS)
        opened.put(BLOCKS[0], parts(BLOCKS[0]))
        with pytest.raises(StoreError, match="cannot be written to"):
            opened.put(BLOCKS[0], parts(BLOCKS[0], 1))
        with pytest.raises(StoreError, match="could not be written"):
            opened.edit(BLOCKS[0], parts(BLOCKS[0], 1)[0])
        assert all(holds(opened, block) for block in BLOCKS)
    (filled / lock.FILE).unlink()
    with Store(tmp_path, "transformer", MINE) as opened:
        assert opened.complete


def test_an_unfinished_store_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    Store(tmp_path, "transformer", MINE).close()
    read_only(monkeypatch)
    refuses(tmp_path, f"transformer-{MINE[:16]} cannot be written to. Pass an offload_dir")


def test_a_directory_that_cannot_be_made_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_bytes(b"")
    with pytest.raises(StoreError, match=r"file/sub cannot be made.*Pass an offload_dir"):
        Store(tmp_path / "file" / "sub", "transformer", MINE)


# --- space ------------------------------------------------------------------------------------------------


def test_too_little_space_is_found_before_anything_is_written(tmp_path, filled, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**20 + 100))
    with Store(tmp_path, "transformer", MINE) as opened:
        changed = parts(BLOCKS[0], 1)
        for change, what in ((opened.put, changed), (opened.edit, changed[0])):
            with pytest.raises(StoreError, match=r"0\.00 GiB free, and 0\.00 GiB are needed"):
                change(BLOCKS[0], what)
        assert opened.complete and holds(opened, BLOCKS[0])
    with pytest.raises(StoreError, match=r"are needed\. Free space there"):
        folders.require_space(tmp_path / "not" / "yet", 2**40)


@pytest.mark.parametrize("number", range(1, 12))
def test_a_disk_that_fills_up_leaves_the_store_as_it_was(tmp_path, filled, monkeypatch, number):
    before = sorted(os.listdir(filled))
    with Store(tmp_path, "transformer", MINE) as opened:
        used, true = [], os.writev

        def full(handle, views):
            used.append(handle)
            if len(used) >= number:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return true(handle, [views[0][:5000]])

        with monkeypatch.context() as patch:
            patch.setattr(os, "writev", full)
            with pytest.raises(StoreError, match=r"No space left on device\. Free space there"):
                opened.put(BLOCKS[1], parts(BLOCKS[1], 1, size=20_000))
        assert sorted(os.listdir(filled)) == before
        assert not verify(opened) and all(holds(opened, block) for block in opened.blocks())
        assert sorted(opened.blocks()) == BLOCKS
        opened.put(BLOCKS[1], parts(BLOCKS[1]))
        opened.commit(BLOCKS)
    fill(tmp_path)


def test_a_full_file_system(tiny_disk, monkeypatch):  # noqa: F811
    usage = shutil.disk_usage(tiny_disk)
    with Store(tiny_disk, "transformer", MINE) as opened:
        with pytest.raises(StoreError, match="GiB are needed"):
            opened.put(BLOCKS[0], parts(BLOCKS[0]))
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=2**40))
        opened.put(BLOCKS[0], parts(BLOCKS[0]))
        for _ in range(2):
            with pytest.raises(StoreError, match=r"No space left on device\. Free space there"):
                opened.put(BLOCKS[1], parts(BLOCKS[1], size=200_000))
            with pytest.raises(StoreError, match="No space left on device"):
                opened.edit(BLOCKS[0], parts(BLOCKS[0], 1, size=200_000)[0])
        assert holds(opened, BLOCKS[0]) and opened.blocks() == BLOCKS[:1]
        assert sorted(os.listdir(opened.folder)) == sorted([file_name(BLOCKS[0]), "lock", MANIFEST])
    with Store(tiny_disk, "transformer", MINE) as opened:
        assert holds(opened, BLOCKS[0])

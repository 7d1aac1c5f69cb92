"""A component's blocks on disk: right, or refused with the file's name; never another model's, never half."""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_offload import slab
from diffusers_offload.tiers import blockfile, folders, lock, store
from diffusers_offload.tiers.blockfile import Part, StoreError
from diffusers_offload.tiers.store import MANIFEST, Store, file_name, identity_of, verify

MINE, OTHER = "0123456789abcdef" * 2, "fedcba9876543210" * 2
BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]


def parts(block: str, version: int = 0, size: int = 300) -> list[Part]:
    """Two phases of a block: its weights depend on its name and `version`."""
    made = []
    for phase in ("attention", "feed_forward"):
        number = int.from_bytes(f"{block}{phase}{version}".encode(), "big") % 2**62
        tensors = [
            torch.randn(size, generator=torch.Generator().manual_seed(number)).bfloat16() for _ in range(2)
        ]
        layout = slab.lay_out(tensors)
        data = torch.empty(layout.nbytes, dtype=torch.uint8)
        slab.gather(layout, tensors, data)
        names = tuple(f"{block}.{phase}.{i}" for i in range(2))
        made.append(Part(f"{block}.{phase}", layout, names, data))
    return made


def holds(opened: Store, block: str, version: int = 0) -> bool:
    for found, wanted in zip(opened.get(block).parts, parts(block, version), strict=True):
        buffer = torch.empty(found.layout.nbytes, dtype=torch.uint8)
        blockfile.read(found.stored, buffer)
        pairs = zip(slab.views(found.layout, buffer), slab.views(wanted.layout, wanted.data), strict=True)
        if not all(a.equal(b) for a, b in pairs):
            return False
    return True


def fill(folder: Path, component: str = "transformer", identity: str = MINE, **options) -> Path:
    with Store(folder, component, identity, **options) as opened:
        for block in BLOCKS:
            opened.put(block, parts(block))
        opened.commit(BLOCKS)
        assert opened.complete and all(holds(opened, block) for block in BLOCKS)
        return opened.folder


@pytest.fixture
def filled(tmp_path) -> Path:
    return fill(tmp_path)


def writes(monkeypatch) -> list[str]:
    """The names of the files that are replaced from now on."""
    true, names = blockfile.replace, []
    monkeypatch.setattr(
        blockfile, "replace", lambda path, pieces: (names.append(path.name), true(path, pieces))[1]
    )
    return names


# --- what is written is found -----------------------------------------------------------------------------


def test_a_complete_store_is_found_again_and_nothing_is_written_twice(tmp_path, filled, monkeypatch):
    written = writes(monkeypatch)
    with Store(tmp_path, "transformer", MINE) as opened:
        assert opened.complete and opened.folder == filled and opened.blocks() == BLOCKS
        for block in BLOCKS:
            opened.put(block, parts(block))
        opened.commit(BLOCKS)
        assert all(holds(opened, block) for block in BLOCKS) and not verify(opened)
    assert written == []


def test_an_unfinished_store_is_resumed_where_it_stopped(tmp_path, monkeypatch):
    with Store(tmp_path, "transformer", MINE) as opened:
        opened.put(BLOCKS[0], parts(BLOCKS[0]))
        with pytest.raises(StoreError, match=r"does not hold 'blocks\.1' yet"):
            opened.commit(BLOCKS)
    written = writes(monkeypatch)
    with Store(tmp_path, "transformer", MINE) as opened:
        assert not opened.complete and opened.blocks() == BLOCKS[:1]
        with pytest.raises(StoreError, match=r"does not hold 'blocks\.1' yet"):
            opened.get(BLOCKS[1])
    fill(tmp_path)
    assert file_name(BLOCKS[0]) not in written and file_name(BLOCKS[1]) in written


def test_components_and_models_in_one_directory_do_not_mix(tmp_path):
    places = [("transformer", MINE), ("transformer", OTHER), ("transformer_2", MINE)]
    made = []
    for version, (component, identity) in enumerate(places):
        with Store(tmp_path, component, identity) as opened:
            for block in BLOCKS:
                opened.put(block, parts(block, version))
            opened.commit(BLOCKS)
            made.append(opened.folder)
    assert len(set(made)) == 3
    for version, (component, identity) in enumerate(places):
        with Store(tmp_path, component, identity) as opened:
            assert all(holds(opened, block, version) for block in BLOCKS)


def test_identity_is_the_contents(tmp_path):
    def identity(version: int, blocks: list[str] = BLOCKS) -> str:
        return identity_of(
            (block, blockfile.plan(tmp_path / "x", parts(block, version)).fingerprint) for block in blocks
        )

    assert identity(0) == identity(0, BLOCKS[::-1]) != identity(1)
    assert list(tmp_path.iterdir()) == []


def test_blocks_of_another_division_are_deleted_at_commit(tmp_path, filled):
    with Store(tmp_path, "transformer", MINE) as opened:
        opened.put("all", parts("all"))
        opened.commit(["all"])
    assert sorted(os.listdir(filled)) == sorted([file_name("all"), "lock", MANIFEST])


def test_a_changed_block_is_struck_off_before_it_is_replaced(tmp_path, filled, monkeypatch):
    written = writes(monkeypatch)
    with Store(tmp_path, "transformer", MINE) as opened:
        opened.put(BLOCKS[1], parts(BLOCKS[1], 1))
        assert written == [MANIFEST, file_name(BLOCKS[1]), MANIFEST] and not opened.complete
        opened.commit(BLOCKS)
        assert [holds(opened, block, int(n == 1)) for n, block in enumerate(BLOCKS)] == [True] * 3


@pytest.mark.parametrize("block", ["../../etc/passwd", "/", "", ".", "..", "a\0b", "blöcke.0 + x", "n" * 999])
def test_any_block_name_makes_a_safe_file_name(tmp_path, block):
    with Store(tmp_path, "../transformer/..", MINE) as opened:
        path = opened.put(block, parts("x")).path
        assert path.parent == opened.folder and opened.folder.parent == tmp_path
        assert not path.name.startswith(".") and len(path.name) < 120 and path.name.isascii()
        assert file_name(block) != file_name(block + "!")
    with Store(tmp_path, "../transformer/..", MINE) as opened:
        assert opened.blocks() == [block]


@pytest.mark.parametrize("identity", ["", "../../../../../..", "ABCDEF0123456789", "0" * 15, "0" * 129])
def test_identities_that_are_none_are_refused(tmp_path, identity):
    with pytest.raises(ValueError, match="hexadecimal"):
        Store(tmp_path, "transformer", identity)


# --- edits while on disk ----------------------------------------------------------------------------------


def lies(stored, part: Part) -> bool:
    """Whether `stored` holds the bytes of `part`."""
    blockfile.read(stored, torch.empty(stored.nbytes, dtype=torch.uint8))
    return stored.digest == blockfile.digest_of(part)


def test_edited_weights_are_served_here_and_never_as_the_models(tmp_path, filled):
    (first, second), (_, other), (_, model) = (parts(BLOCKS[1], version) for version in (1, 2, 0))
    with Store(tmp_path, "transformer", MINE) as opened:
        assert lies(opened.edit(BLOCKS[1], first), first)
        opened.edit(BLOCKS[1], second)
        assert lies(opened.edit(BLOCKS[1], other), other)
        assert lies(opened.edit(BLOCKS[1], first), first)  # whatever becomes of the block's other parts
        assert (
            opened.edit(BLOCKS[1], model) == opened.get(BLOCKS[1]).parts[1].stored
        )  # a LoRA taken out again
        assert opened.complete and holds(opened, BLOCKS[1]) and not verify(opened)
        assert sum(name.startswith("edited-") for name in os.listdir(filled)) == 1
    with Store(tmp_path, "transformer", MINE) as opened:
        assert opened.complete and holds(opened, BLOCKS[1])
    assert len(os.listdir(filled)) == len(BLOCKS) + 2


def test_edits_of_a_killed_process_are_deleted(tmp_path, filled):
    (filled / f"edited-{'0' * 16}-{file_name(BLOCKS[0])}").write_bytes(b"half")
    (filled / f".{'0' * 16}.tmp").write_bytes(b"half")
    (filled / "notes.txt").write_bytes(b"of the user")
    fill(tmp_path)
    assert sorted(os.listdir(filled)) == sorted([*map(file_name, BLOCKS), "lock", MANIFEST, "notes.txt"])


# --- damage -----------------------------------------------------------------------------------------------


def refuses(tmp_path: Path, name: str) -> None:
    """Opening raises, and names the file; a rebuild forgets it and serves right bytes only."""
    with pytest.raises(StoreError, match=name):
        Store(tmp_path, "transformer", MINE)


def change(path: Path, position: int, value: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([value]), position)


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


def read_only(monkeypatch) -> None:
    """As for a user without rights: root's are not limited by modes."""
    true = os.open

    def refusing(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return true(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


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


@pytest.fixture
def tiny_disk(tmp_path):
    folder = tmp_path / "tiny"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=512k,mode=755", "tmpfs", str(folder)]
    try:
        made = subprocess.run(command, capture_output=True).returncode == 0
    except OSError:
        made = False
    if not made:
        pytest.skip("a small file system cannot be mounted here")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_file_system(tiny_disk, monkeypatch):
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


# --- other processes --------------------------------------------------------------------------------------


def test_a_second_writer_is_refused_and_told_by_whom(tmp_path):
    with Store(tmp_path, "transformer", MINE) as first:
        first.put(BLOCKS[0], parts(BLOCKS[0]))
        refuses(tmp_path, rf"is being written by process {os.getpid()} \(.*Wait for it to end")
        assert holds(first, BLOCKS[0])
        Store(tmp_path, "transformer", OTHER).close()
    Store(tmp_path, "transformer", MINE).close()


def test_readers_share_a_complete_store_and_keep_writers_out(tmp_path, filled):
    with Store(tmp_path, "transformer", MINE) as first, Store(tmp_path, "transformer", MINE) as second:
        with pytest.raises(StoreError, match="while another process reads it"):
            first.put(BLOCKS[0], parts(BLOCKS[0], 1))
        assert holds(first, BLOCKS[0]) and holds(second, BLOCKS[0]) and first.complete
        with pytest.raises(StoreError, match="while another process reads it"):
            second.put(BLOCKS[0], parts(BLOCKS[0], 1))  # the first still reads, though it was refused
        second.close()
        first.put(BLOCKS[0], parts(BLOCKS[0], 1))
        refuses(tmp_path, "is being written by process")


def test_a_closed_store_writes_nothing(tmp_path, filled):
    opened = Store(tmp_path, "transformer", MINE)
    opened.close()
    opened.close()
    with pytest.raises(StoreError):
        opened.put(BLOCKS[0], parts(BLOCKS[0], 1))


def test_who_waits_gets_what_the_other_wrote(tmp_path, monkeypatch):
    first = Store(tmp_path, "transformer", MINE)
    for block in BLOCKS:
        first.put(block, parts(block))
    true = lock.time.sleep
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: (first.commit(BLOCKS), true(0)))
    with Store(tmp_path, "transformer", MINE, wait=5.0) as second:
        assert second.complete and all(holds(second, block) for block in BLOCKS)
    first.close()


def test_what_the_lock_file_says_is_not_believed(tmp_path):
    with Store(tmp_path, "transformer", MINE) as first:
        (first.folder / lock.FILE).write_bytes(b"process \x1b[31m" * 50)
        refuses(tmp_path, "is being written by another process")


def test_killed_writers_leave_what_is_right_or_refused(tmp_path):
    """At 50 random moments, and before each single call to the system; then resumed."""
    script = Path(__file__).with_name("killed_writer.py")
    environment = os.environ | {"PYTHONPATH": str(script.parent.parent)}
    done = subprocess.run(
        [sys.executable, str(script), str(tmp_path)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert seen["killed"] == 50 and seen["steps"] > 50
    assert seen["partial"] > 10 and seen["complete"] > 10


def test_threads_write_side_by_side(tmp_path):
    from concurrent.futures import ThreadPoolExecutor

    blocks = [f"blocks.{n}" for n in range(24)]
    random.Random(0).shuffle(blocks)
    with Store(tmp_path, "transformer", MINE) as opened, ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda block: opened.put(block, parts(block)), blocks))
        opened.commit(blocks)
    with Store(tmp_path, "transformer", MINE) as opened:
        assert opened.complete and all(holds(opened, block) for block in blocks)

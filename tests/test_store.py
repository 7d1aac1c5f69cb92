"""A component's blocks on disk: what is written is found, edits stay apart, processes do not meet."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stores import BLOCKS, MINE, OTHER, fill, holds, parts, refuses, writes

from diffusers_offload.tiers import blockfile, lock
from diffusers_offload.tiers.blockfile import Part, StoreError
from diffusers_offload.tiers.store import MANIFEST, Store, file_name, identity_of, verify


@pytest.fixture
def filled(tmp_path) -> Path:
    return fill(tmp_path)


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


def lies(found, part: Part) -> bool:
    """Whether what was found holds the bytes of `part`."""
    stored = found.stored
    blockfile.read(stored, torch.empty(stored.nbytes, dtype=torch.uint8))
    return stored.digest == blockfile.digest_of(part)


def test_edited_weights_are_served_here_and_never_as_the_models(tmp_path, filled):
    (first, second), (_, other), (_, model) = (parts(BLOCKS[1], version) for version in (1, 2, 0))
    with Store(tmp_path, "transformer", MINE) as opened:
        assert lies(opened.edit(BLOCKS[1], first), first)
        opened.edit(BLOCKS[1], second)
        assert lies(opened.edit(BLOCKS[1], other), other)
        assert lies(opened.edit(BLOCKS[1], first), first)  # whatever becomes of the block's other parts
        assert opened.edit(BLOCKS[1], model) == opened.get(BLOCKS[1]).parts[1]  # a LoRA taken out again
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

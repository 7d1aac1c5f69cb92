"""A small store of weights, and what may be asked of it."""

from __future__ import annotations

import errno
import os
import subprocess
from pathlib import Path

import pytest
import torch

from diffusers_offload import slab
from diffusers_offload.tiers import blockfile
from diffusers_offload.tiers.blockfile import Part, StoreError
from diffusers_offload.tiers.store import Store

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


def writes(monkeypatch) -> list[str]:
    """The names of the files that are replaced from now on."""
    true, names = blockfile.replace, []
    monkeypatch.setattr(
        blockfile, "replace", lambda path, pieces: (names.append(path.name), true(path, pieces))[1]
    )
    return names


def refuses(tmp_path: Path, name: str) -> None:
    """Opening raises, and names the file; a rebuild forgets it and serves right bytes only."""
    with pytest.raises(StoreError, match=name):
        Store(tmp_path, "transformer", MINE)


def change(path: Path, position: int, value: int) -> None:
    with open(path, "r+b", buffering=0) as file:
        os.pwrite(file.fileno(), bytes([value]), position)


def read_only(monkeypatch) -> None:
    """As for a user without rights: root's are not limited by modes."""
    true = os.open

    def refusing(path, flags, *rest, **more):
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), path)
        return true(path, flags, *rest, **more)

    monkeypatch.setattr(os, "open", refusing)


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

"""The folders that hold weights: made, found safe, with room enough; all that goes wrong is a StoreError."""

from __future__ import annotations

import os
import shutil
import stat
from pathlib import Path

from .blockfile import StoreError

_SPARE = 2**20  # bytes that stay free on the disk: for the manifest and the file system itself


def require_space(folder: Path | str, nbytes: int) -> None:
    """Raise StoreError unless `nbytes` more fit on the disk of `folder`, which need not exist yet."""
    folder = Path(folder).absolute()
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < nbytes + _SPARE:
        raise StoreError(
            f"{folder} has {free / 2**30:.2f} GiB free, and {(nbytes + _SPARE) / 2**30:.2f} GiB are needed. "
            "Free space there, or pass an offload_dir on another disk"
        )


def names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)
    except OSError as error:
        raise StoreError(f"{folder} cannot be listed: {error.strerror}. Pass another offload_dir") from error


def delete(path: Path) -> None:
    try:
        path.unlink(missing_ok=True)
    except OSError:
        pass  # it is listed nowhere: it costs space, and the next process tries again


def delete_if_empty(folder: Path) -> None:
    try:
        folder.rmdir()
    except OSError:
        pass  # there is none, or something is in it


def make(root: Path, folder: Path) -> None:
    """Make `folder` in `root`, unless it is there; raise StoreError unless only its owners can change it."""
    try:
        root.mkdir(0o755, parents=True, exist_ok=True)
        _refuse_if_open(root, root.stat())  # it may be a link: it is the user's own choice
        try:
            folder.mkdir(0o755, exist_ok=True)
        except FileNotFoundError:  # `root` was empty, and another process has just deleted it
            root.mkdir(0o755, parents=True, exist_ok=True)
            folder.mkdir(0o755, exist_ok=True)
        status = folder.lstat()
    except OSError as error:
        if isinstance(error, StoreError):
            raise
        raise StoreError(
            f"{error.filename or folder} cannot be made or looked at: {error.strerror}. Pass an offload_dir that "
            "this user may write to"
        ) from error
    if not stat.S_ISDIR(status.st_mode):
        raise StoreError(
            f"{folder} is a link or a file, not a folder. Delete it, or pass another offload_dir"
        )
    _refuse_if_open(folder, status)
    if root.stat().st_mode & stat.S_IWOTH and status.st_uid not in (0, os.geteuid()):
        raise StoreError(
            f"{folder} was made by another user, in a folder where everybody may. Pass another offload_dir"
        )


def _refuse_if_open(folder: Path, status: os.stat_result) -> None:
    if status.st_mode & stat.S_IWOTH and not status.st_mode & stat.S_ISVTX:
        raise StoreError(
            f"everybody may replace files in {folder}. Take that right away (chmod o-w), or pass another offload_dir"
        )

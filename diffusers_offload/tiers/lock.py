"""A lock on a folder: one process that writes, or any number that read.

flock(2) on a file in the folder. The system lets go of it when the process ends, however it ends, so a crash
leaves nothing to clean up. The file stays as long as its folder does, since removing it would let two processes lock
two files; who takes a lock looks afterwards whether the file is still there (`is_current`).
"""

from __future__ import annotations

import errno
import os
import shutil
import sys
import time
from pathlib import Path

from ..log import logger
from .blockfile import StoreError

FILE = "lock"
_PAUSE = 0.05  # seconds between two attempts
_SIGNATURE = 400  # bytes


class FolderLock:
    """Held from `take` on, until `release` or the end of the process.

    Args:
        folder: that is locked.

    Raises:
        StoreError: the file system refuses, or knows no locks.
    """

    def __init__(self, folder: Path) -> None:
        self._path = folder / FILE
        self.may_write = True
        self.alone = False
        flags = os.O_CLOEXEC | os.O_NOFOLLOW
        try:
            self._handle = os.open(self._path, os.O_RDWR | os.O_CREAT | flags, 0o644)
        except OSError as error:
            if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
                raise StoreError(f"{self._path} cannot be opened: {error.strerror}. Delete it") from error
            self.may_write = False
            self._handle = self._open_for_reading(flags)

    def take(self, wait: float = 0.0) -> None:
        """Lock the folder for writing, or, where others read or nothing can be written, for reading.

        Args:
            wait: seconds to wait for a process that writes.

        Raises:
            StoreError: a process still writes; the message says which.
        """
        deadline, told = time.monotonic() + wait, False
        while not (self.may_write and self._try(exclusive=True)) and not self._try(exclusive=False):
            if time.monotonic() >= deadline:
                raise StoreError(
                    f"{self._path.parent} is being written by {self._holder()}. Wait for it to end, or pass "
                    "another offload_dir"
                )
            if not told:
                logger.info("%s is being written by %s: waiting", self._path.parent, self._holder())
                told = True
            time.sleep(_PAUSE)
        if self.alone:
            self._sign()

    def is_current(self) -> bool:
        """Whether the folder that was locked is the one that is there: the last to hold it may have deleted it."""
        if self._handle is None:
            return True
        try:
            there = os.stat(self._path, follow_symlinks=False)
        except FileNotFoundError:
            return False
        mine = os.fstat(self._handle)
        return (mine.st_ino, mine.st_dev) == (there.st_ino, there.st_dev)

    def share(self) -> None:
        """From writing to reading: others may read as well."""
        if self.alone:
            self._back_to_reading()

    def make_alone(self) -> None:
        """From reading to writing.

        Raises:
            StoreError: others read, or nothing can be written here; it stays locked for reading.
        """
        if self.alone:
            return
        if not self.may_write:
            raise StoreError(
                f"{self._path.parent} cannot be written to. Pass an offload_dir that this user may write to"
            )
        if not self._try(exclusive=True):
            self._back_to_reading()  # a failed change of the lock gives the old one up
            raise StoreError(
                f"{self._path.parent} cannot be changed while another process reads it. End that one, or give "
                "each process an offload_dir of its own"
            )
        self._sign()

    def release(self) -> None:
        """Unlock; a second call does nothing."""
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None
        self.alone = self.may_write = False

    def __del__(self) -> None:  # whoever forgets to release it, like a pipeline that is just dropped
        if getattr(self, "_handle", None) is not None:
            os.close(self._handle)

    def _open_for_reading(self, flags: int) -> int | None:
        try:
            return os.open(self._path, os.O_RDONLY | flags)
        except FileNotFoundError:
            return None  # whoever could write here would have made the file: there is nobody to lock out
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be opened: {error.strerror}. Pass an offload_dir that this user may write to"
            ) from error

    def _try(self, exclusive: bool) -> bool:
        import fcntl  # not on Windows, where the package shall still import

        if self._handle is None:
            return True
        try:
            fcntl.flock(self._handle, (fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH) | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        except OSError as error:
            raise StoreError(
                f"{self._path} cannot be locked: {error.strerror}. Pass an offload_dir on a local disk"
            ) from error
        self.alone = exclusive
        return True

    def _back_to_reading(self) -> None:
        # The change is not atomic: another may have slipped in between, and holds the lock for moments only.
        self.alone = False
        deadline = time.monotonic() + 10.0
        while not self._try(exclusive=False):
            if time.monotonic() >= deadline:
                raise StoreError(f"{self._path.parent} was taken by {self._holder()}. Open it again later")
            time.sleep(_PAUSE)

    def _sign(self) -> None:
        """Say who holds the lock, for the message that another process may have to give."""
        name = Path(sys.argv[0] if sys.argv else "").name or "python"
        text = f"process {os.getpid()} ({name[:80]})".encode(errors="replace")
        try:
            os.pwrite(self._handle, text.ljust(_SIGNATURE), 0)  # the same length always: nothing to cut off
        except OSError:
            pass  # a full disk: the lock holds without a name

    def _holder(self) -> str:
        text = os.pread(self._handle, _SIGNATURE, 0).decode(errors="replace").strip()
        return text if text.startswith("process ") and text.isprintable() else "another process"


def delete_unused(folder: Path) -> None:
    """Delete a folder that has a lock, unless a process uses it or it cannot be deleted."""
    try:
        lock = FolderLock(folder)
    except StoreError:
        return
    try:
        lock.take()
        if lock.alone:
            shutil.rmtree(folder, ignore_errors=True)
    except StoreError:
        pass
    finally:
        lock.release()

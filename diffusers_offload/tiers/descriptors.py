"""Open files for reading: few, shared by all threads, past the page cache where the file system allows it.

Nothing counts users: a file that is forgotten while a thread still reads from it is closed when that
thread lets go of it.
"""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from threading import Lock

_MOST = 64  # descriptors kept open; a process may have 1024 by default
_DIRECT = getattr(os, "O_DIRECT", 0)  # Linux; elsewhere everything goes through the page cache
NO_DIRECT = frozenset({errno.EINVAL, errno.EOPNOTSUPP})  # how file systems say that they have no O_DIRECT

Identity = tuple[int, int, int, int]  # (mtime in ns, size in bytes, inode, device): changes with the content


def _open(path: Path, flags: int) -> int:
    return os.open(path, flags)


def _stat(path: Path) -> os.stat_result:
    return os.stat(path)


def _read(descriptor: int, into: memoryview, offset: int) -> int:
    return os.preadv(descriptor, [into], offset)


@dataclass(frozen=True)
class System:
    """What is asked of the operating system; tests put faults in its place.

    Attributes:
        open: (path, flags) -> descriptor.
        read: (descriptor, memory to fill, offset in the file) -> bytes read, 0 at the end of the file.
        stat: (path) -> the file's status.
    """

    open: Callable[[Path, int], int] = _open
    read: Callable[[int, memoryview, int], int] = _read
    stat: Callable[[Path], os.stat_result] = _stat


class File:
    """An open file, closed when nobody holds it any more."""

    def __init__(self, descriptor: int, direct: bool) -> None:
        self.descriptor = descriptor
        self.direct = direct
        self.identity = identity(os.fstat(descriptor))

    def __del__(self, close: Callable[[int], None] = os.close) -> None:
        close(self.descriptor)


class Descriptors:
    """The files that are open, the least recently used going first when there are too many.

    Args:
        system: how files are opened.
        direct: try `O_DIRECT`; a file system that refuses is remembered and not asked again.
        most: files kept open at once, those still in use by a thread not counted.
    """

    def __init__(self, system: System, direct: bool = True, most: int = _MOST) -> None:
        self._system = system
        self._direct = direct and bool(_DIRECT)
        self._most = most
        self._open: OrderedDict[tuple[Path, bool], File] = OrderedDict()
        self._refusing: set[int] = set()  # devices whose file system has no O_DIRECT
        self._lock = Lock()

    def open(self, path: Path, direct: bool) -> File:
        """The file that `path` names now, open; past the page cache if `direct` and if it can be had.

        Raises:
            OSError: what opening it said.
        """
        now = self.identity(path)
        direct = direct and self._direct and now[3] not in self._refusing
        with self._lock:
            file = self._open.get((path, direct))
            if file is not None and file.identity == now:
                self._open.move_to_end((path, direct))
                return file
        flags = os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)
        try:
            file = File(self._system.open(path, flags | (_DIRECT if direct else 0)), direct)
        except OSError as error:
            if not direct or error.errno not in NO_DIRECT:
                raise
            self._refusing.add(now[3])
            return self.open(path, direct=False)
        with self._lock:
            self._open[path, direct] = file
            self._open.move_to_end((path, direct))
            while len(self._open) > self._most:
                self._open.popitem(last=False)
        return file

    def identity(self, path: Path) -> Identity:
        """Of the file that `path` names now."""
        return identity(self._system.stat(path))

    def refuse_direct(self, file: File) -> None:
        """`file` could be opened with `O_DIRECT`, and not be read: go without on its file system."""
        self._refusing.add(file.identity[3])

    def forget(self, path: Path) -> None:
        """Open `path` anew next time."""
        with self._lock:
            for direct in (False, True):
                self._open.pop((path, direct), None)

    def close(self) -> None:
        """Close what no thread is using; the rest follows when they are done."""
        with self._lock:
            self._open.clear()


def identity(status: os.stat_result) -> Identity:
    """What changes whenever the content of a file does, as far as file systems tell."""
    return status.st_mtime_ns, status.st_size, status.st_ino, status.st_dev

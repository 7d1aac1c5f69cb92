"""One piece of a unit, from its file straight into host memory; and what can go wrong on the way.

`O_DIRECT` wants address, offset and length in multiples of the page. So a piece is read directly as far as it is
aligned and the destination has room for whole pages; a remainder, and what follows a short read that ended off
the grid, goes through the page cache.
"""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..report import size_text
from ..slab import align
from .blockfile import Stored
from .descriptors import NO_DIRECT, Descriptors, Identity, System

PAGE = 4096  # bytes; no disk asks for more alignment
_FINAL = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR, errno.ELOOP})
REBUILD = "delete the file, so that it is built anew"
_REMEDIES = {
    errno.EACCES: "make the file readable for this user",
    errno.EPERM: "make the file readable for this user",
    errno.EMFILE: "raise the limit on open files (`ulimit -n`)",
    errno.ENFILE: "raise the limit on open files (`ulimit -n`)",
    errno.EIO: "look at the system's log, the disk may be failing; keep `offload_dir` on another one",
}
for _code in (errno.ENOENT, errno.EISDIR, errno.ENOTDIR, errno.ELOOP):
    _REMEDIES[_code] = "it was there when offloading was enabled: enable anew, so that it is built again"


class DiskReadError(OSError):
    """Bytes of a unit could not be read from disk.

    Attributes:
        path: the file; also as `filename`.
        offset: where in the file the unit's bytes begin.
        cause, remedy: what happened and what helps, in words.
        errno: the system's number for it, None where it is not the system that complained.
    """

    def __init__(self, source: Stored, cause: str, remedy: str, errno: int | None = None) -> None:
        super().__init__(
            f"reading {size_text(source.nbytes)} at byte {source.offset} of {source.path} failed: {cause}. "
            f"Remedy: {remedy}."
        )
        self.path, self.offset, self.cause, self.remedy = source.path, source.offset, cause, remedy
        self.filename, self.errno = str(source.path), errno

    def __str__(self) -> str:
        return self.args[0]  # OSError would build its own from errno and filename


@dataclass(frozen=True)
class Destination:
    """Host memory to fill: the bytes, and the address of the first."""

    bytes: memoryview
    address: int


def open_destination(tensor: torch.Tensor, nbytes: int) -> Destination:
    """`tensor` as memory for `nbytes` bytes.

    Raises:
        ValueError: it is not contiguous uint8 memory of the host, or too small.
    """
    if tensor.dtype != torch.uint8 or tensor.device.type != "cpu" or not tensor.is_contiguous():
        raise ValueError(
            f"destination must be contiguous, uint8 and on the host, not {tensor.dtype} on {tensor.device}"
        )
    if tensor.numel() < nbytes:
        raise ValueError(f"destination has {tensor.numel()} bytes, the unit {nbytes}")
    return Destination(memoryview(tensor.detach().numpy()).cast("B"), tensor.data_ptr())


def reach(source: Stored, destination: Destination, at: int, stop: int) -> tuple[int, bool]:
    """How far one read from byte `at` of the unit may go on its way to `stop`, and whether `O_DIRECT` fits it."""
    if (destination.address + at) % PAGE or (source.offset + at) % PAGE:
        return stop, False
    whole = align(stop, PAGE)
    if whole > len(destination.bytes):  # no room behind the unit: its last page needs a copy
        whole -= PAGE
    return (whole, True) if whole > at else (stop, False)


def fill(
    system: System,
    files: Descriptors,
    source: Stored,
    destination: Destination,
    start: int,
    stop: int,
    moved: Callable[[int], None],
    again: Callable[[int, OSError], bool],
) -> set[Identity]:
    """Read bytes `start` to `stop` of a unit; the destination is overwritten up to the end of their last page.

    Args:
        moved: told the bytes of each read that came back.
        again: asked after the n-th error in a row whether to try once more; pauses if so.

    Returns:
        The identities of the files that were read: more than one if the file changed meanwhile.

    Raises:
        OSError: what the system said when `again` said no.
        DiskReadError: the file ends too early.
    """
    at, failed, seen = start, 0, set()
    while at < stop:
        end, direct = reach(source, destination, at, stop)
        file = None
        try:
            file = files.open(source.path, direct)
            if not file.direct:
                end = stop
            count = system.read(file.descriptor, destination.bytes[at:end], source.offset + at)
        except InterruptedError:
            continue
        except OSError as error:
            if file is not None and file.direct and error.errno in NO_DIRECT:
                files.refuse_direct(file)
                continue
            failed += 1
            if error.errno in _FINAL or not again(failed, error):
                raise
            files.forget(source.path)  # a network file system may want it opened anew
            continue
        if count <= 0:
            have = f"the file ends {size_text(stop - at)} too early, at byte {source.offset + at}"
            raise DiskReadError(source, f"it is truncated: {have}", REBUILD)
        seen.add(file.identity)
        count = min(count, stop - at)
        at, failed = at + count, 0
        moved(count)
    return seen


def told(source: Stored, error: OSError, attempts: int) -> DiskReadError:
    """`error` of the system as an error that names the file and a remedy."""
    if isinstance(error, DiskReadError):
        return error
    often = f" ({attempts} attempts)" if attempts > 1 else ""
    remedy = _REMEDIES.get(error.errno, "check the disk and its mount, or choose another `offload_dir`")
    return DiskReadError(source, f"{error.strerror or error}{often}", remedy, error.errno)

"""A block on disk: one `.safetensors` file, whose parts are slabs that one read each brings in.

A part is what moves as a whole: the block, or one of its phases. Parts start at multiples of `PAGE` in the file
and are padded to the next, so that one `preadv` (with O_DIRECT too) of `align(nbytes, PAGE)` bytes fills a slab.
A file is replaced as a whole or not at all. What is read from one is checked before it is believed. A part may be
packed (`packings`): the read then brings the packed bytes.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch

from ..slab import Layout
from . import digests, header
from .header import PAGE, Described
from .packings import Packing
from .parts import Part, as_bytes, digest_of, pieces_of

TEMPORARY = ".tmp"  # what the name of an unfinished file ends in
_PIECES = 512  # per system call; IOV_MAX is 1024 on Linux


class StoreError(OSError):
    """What is on the disk, or where it should go, cannot be used; the message names the file and a remedy."""


@dataclass(frozen=True)
class Stored:
    """A slab in a file: `nbytes` from `offset` (from the file's first byte), and their `digest`."""

    path: Path
    offset: int
    nbytes: int
    digest: str


@dataclass(frozen=True)
class StoredPart:
    """A part as it lies in a file; spans of `layout.regions` count from the slab's first byte.

    Attributes:
        stored: the slab, or what it is packed into.
        packing: how; None if it is not packed.
    """

    name: str
    layout: Layout
    names: tuple[str, ...]
    stored: Stored
    packing: Packing | None = None

    @property
    def content(self) -> str:
        """The same for the same tensors under the same names, packed or not."""
        slab = self.packing.digest if self.packing is not None else self.stored.digest
        told = [self.name, self.names, self.layout.nbytes, slab, list(map(str, self.layout.placements))]
        return digest(json.dumps(told).encode())


@dataclass(frozen=True)
class BlockFile:
    """What a file holds.

    Attributes:
        nbytes: length of the file.
        fingerprint: digest of the header, which holds names, dtypes, shapes, strides and the parts' digests: two
            files with the same fingerprint hold the same.
    """

    path: Path
    nbytes: int
    fingerprint: str
    parts: tuple[StoredPart, ...]

    @property
    def content(self) -> str:
        """The same for the same tensors in the same parts, packed or not."""
        return digest(*(part.content.encode() for part in self.parts))


# --- digests ------------------------------------------------------------------------------------


def digest(*pieces: bytes | memoryview) -> str:
    """BLAKE2b (RFC 7693) with 16 bytes, as 32 hexadecimal digits, of `pieces` one behind the other.

    For what is small: slabs have `digests` of their own kind.
    """
    state = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        state.update(piece)
    return state.hexdigest()


# --- writing ----------------------------------------------------------------------------------------------


def plan(path: Path | str, parts: Sequence[Part], digests: Sequence[str] | None = None) -> BlockFile:
    """What `write` would make of the same arguments; nothing is written."""
    return _plan(Path(path), parts, digests)[1]


def write(path: Path | str, parts: Sequence[Part], digests: Sequence[str] | None = None) -> BlockFile:
    """Write `parts` to `path`, which is replaced as a whole; on any failure it is left as it was.

    Args:
        digests: what `digest_of` gives for each part, if that is known already.

    Raises:
        ValueError: names are reserved or given twice, or slab and layout do not fit.
        StoreError: the file system refused; the temporary file is gone.
    """
    head, file = _plan(Path(path), parts, digests)
    replace(file.path, _in_order(head, parts))
    return file


def _plan(path: Path, parts: Sequence[Part], digests: Sequence[str] | None) -> tuple[bytes, BlockFile]:
    if digests is None:
        digests = [digest_of(part) for part in parts]
    pairs = zip(parts, digests, strict=True)
    told = [Described(p.name, p.names, p.layout, p.nbytes, text, p.packing) for p, text in pairs]
    head, nbytes = header.encode(told)
    return head, _described(path, head, nbytes)  # read as it will be: what cannot be read is not written


def _in_order(head: bytes, parts: Sequence[Part]) -> Iterator[memoryview]:
    yield memoryview(head)
    for part in parts:
        yield from pieces_of(part)
        yield memoryview(bytes(-part.nbytes % PAGE))


def is_temporary(path: Path) -> bool:
    """Whether it is called like what `replace` leaves behind if the process is killed."""
    return path.name.startswith(".") and path.suffix == TEMPORARY


def replace(path: Path, pieces: Iterable[memoryview]) -> None:
    """Put a file with `pieces` in place of `path`, so that whoever opens it finds the old or the new one whole.

    Written under another name and forced to the disk, then renamed, then the folder forced to the disk: the
    order that survives a loss of power on every POSIX file system.

    Raises:
        StoreError: the file system refused. The temporary file is gone, and `path` as it was.
    """
    folder = path.parent
    temporary = folder / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        handle = os.open(
            temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC | os.O_NOFOLLOW, 0o644
        )
        try:
            try:
                _write_all(handle, pieces)
                os.fsync(handle)
            finally:
                os.close(handle)
            os.rename(temporary, path)
        except BaseException:  # a Ctrl-C too leaves nothing behind
            try:
                os.unlink(temporary)
            except OSError:
                pass  # renamed already, or as unwilling as before: the next writer clears it
            raise
        _sync_folder(folder)
    except OSError as error:
        raise StoreError(f"{path} could not be written: {_why(error)}") from error


def link(source: Path, path: Path) -> None:
    """Put the file `source` in place of `path`: a second name for it, or a copy where there are no such names.

    Raises:
        StoreError: the file system refused, and `path` is as it was.
    """
    temporary = path.parent / f".{secrets.token_hex(8)}{TEMPORARY}"
    try:
        try:
            os.link(source, temporary)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.ENOTSUP, errno.EMLINK, errno.ENOSYS):
                raise
            shutil.copyfile(source, temporary)
            _sync_file(temporary)
        os.rename(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise StoreError(f"{path} could not be written: {_why(error)}") from error


def _sync_file(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _write_all(handle: int, pieces: Iterable[memoryview]) -> None:
    waiting: list[memoryview] = []
    for piece in pieces:
        if len(piece):
            waiting.append(piece)
        if len(waiting) == _PIECES:
            _drain(handle, waiting)
    _drain(handle, waiting)


def _drain(handle: int, waiting: list[memoryview]) -> None:
    """Write all of `waiting` and empty it; one call writes less than 2 GiB, or what there was room for."""
    while waiting:
        written = os.writev(handle, waiting)
        while waiting and written >= len(waiting[0]):
            written -= len(waiting.pop(0))
        if waiting:
            waiting[0] = waiting[0][written:]


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno != errno.EINVAL:  # some network file systems cannot, and need not
            raise
    finally:
        os.close(handle)


def _why(error: OSError) -> str:
    reason = error.strerror or str(error)
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"{reason}. Free space there, or pass an offload_dir on another disk"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{reason}. Pass an offload_dir that this user may write to"
    return f"{reason}. Check the disk, or pass another offload_dir"


# --- reading ----------------------------------------------------------------------------------------------


def read_layout(path: Path | str) -> BlockFile:
    """What the file says it holds; its data are not read.

    Raises:
        StoreError: it cannot be opened, is no regular file or no block file, or contradicts itself.
    """
    path = Path(path)
    with opened(path) as handle:
        size = os.fstat(handle).st_size
        length = int.from_bytes(_read(handle, min(8, size)), "little")
        if length > header.HEADER_LIMIT or 8 + length > size:
            raise StoreError(unusable(path, "it is truncated, or no .safetensors file"))
        head = length.to_bytes(8, "little") + _read(handle, length)
    try:
        return _described(path, head, size - len(head))
    except ValueError as error:
        raise StoreError(unusable(path, str(error))) from error


def read(stored: Stored, buffer: torch.Tensor) -> None:
    """Read a slab into `buffer` (uint8, CPU, at least `nbytes` long) and compare its digest.

    Raises:
        StoreError: the file is gone, shorter, or holds other bytes than were written.
    """
    target = as_bytes(buffer)[: stored.nbytes]
    if len(target) < stored.nbytes:
        raise ValueError(f"a buffer of {len(target)} bytes for a slab of {stored.nbytes}")
    with opened(stored.path) as handle:
        done = 0
        while done < stored.nbytes:
            count = os.preadv(handle, [target[done:]], stored.offset + done)
            if not count:
                raise StoreError(unusable(stored.path, "it is shorter than when it was written"))
            done += count
    check(stored, buffer)


def check(stored: Stored, buffer: torch.Tensor) -> None:
    """Compare what was read into `buffer` with what was written.

    Raises:
        StoreError: it is something else.
    """
    if digests.of_slab([as_bytes(buffer)[: stored.nbytes]]) != stored.digest:
        stop = stored.offset + stored.nbytes
        what = f"its bytes {stored.offset} to {stop} are not those that were written"
        raise StoreError(unusable(stored.path, what))


@contextmanager
def opened(path: Path) -> Iterator[int]:
    """A descriptor of the regular file `path`, for reading; what fails within is a StoreError too."""
    try:
        # O_NONBLOCK: a pipe put in the file's place would make us wait for somebody to write to it
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK)
        try:
            if not stat.S_ISREG(os.fstat(handle).st_mode):
                raise StoreError(unusable(path, "it is no regular file"))
            yield handle
        finally:
            os.close(handle)
    except StoreError:
        raise
    except OSError as error:
        what = "it is a symbolic link" if error.errno == errno.ELOOP else error.strerror or str(error)
        raise StoreError(unusable(path, what)) from error


def unusable(path: Path, what: str) -> str:
    """What to tell about a file that cannot be used."""
    return f"{path} cannot be used: {what}. Delete {path.parent} to have it written anew"


def _read(handle: int, nbytes: int) -> bytes:
    pieces, missing = [], nbytes
    while missing:
        piece = os.read(handle, missing)
        if not piece:
            raise OSError(errno.EIO, "it ended early")
        pieces.append(piece)
        missing -= len(piece)
    return b"".join(pieces)


def _described(path: Path, head: bytes, data_nbytes: int) -> BlockFile:
    parts = tuple(
        StoredPart(
            part.name,
            part.layout,
            part.names,
            Stored(path, len(head) + part.offset, part.nbytes, part.digest),
            part.packing,
        )
        for part in header.decode(head, data_nbytes)
    )
    return BlockFile(path, len(head) + data_nbytes, digest(head), parts)

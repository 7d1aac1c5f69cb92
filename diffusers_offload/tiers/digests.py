"""Digests of slabs: of pieces, each by itself, and then of these.

So a slab can be hashed on all cores, and each piece as soon as it has come from the disk. Pieces are hashed with
SHA-256, for which processors have instructions (2016 and later, most): about 1.5 GB/s a core, where BLAKE2b has 1.0.
It is the pieces that are read, so a reader that hashes them while the next ones come never reads anything twice.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

PIECE = 8 * 2**20  # bytes: keeps an NVMe drive busy, and lets an urgent unit wait for milliseconds only


def cores() -> int:
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def cut(nbytes: int) -> list[tuple[int, int]]:
    """The pieces of a slab as (start, stop) in bytes; an empty one has one, which is empty."""
    return [(start, min(start + PIECE, nbytes)) for start in range(0, nbytes, PIECE)] or [(0, 0)]


def of_piece(*views: memoryview) -> bytes:
    """The digest of a piece, whose bytes lie in `views`; others run meanwhile (hashlib lets go of the GIL)."""
    state = hashlib.sha256()
    for view in views:
        state.update(view)
    return state.digest()


def of_pieces(pieces: Iterable[bytes], nbytes: int) -> str:
    """A slab's digest, as 32 hexadecimal digits, from those of its pieces in order."""
    return hashlib.blake2b(
        b"".join((nbytes.to_bytes(8, "little"), *pieces)), digest_size=16, person=b"slab"
    ).hexdigest()


def of_slab(views: Sequence[memoryview]) -> str:
    """The digest of a slab whose bytes lie in `views`, computed on all cores."""
    nbytes = sum(map(len, views))
    pieces = list(_gathered(views))
    workers = min(cores(), len(pieces))
    if workers > 1:
        try:
            with ThreadPoolExecutor(workers) as pool:
                return of_pieces(list(pool.map(lambda piece: of_piece(*piece), pieces)), nbytes)
        except RuntimeError:  # "can't start new thread"
            pass
    return of_pieces([of_piece(*piece) for piece in pieces], nbytes)


def _gathered(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """The views of each piece in turn."""
    piece, room = [], PIECE
    for view in views:
        while len(view) >= room:
            piece.append(view[:room])
            yield piece
            view, piece, room = view[room:], [], PIECE
        if len(view):
            piece.append(view)
            room -= len(view)
    if piece or not sum(map(len, views)):
        yield piece

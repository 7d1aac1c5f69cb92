"""Block files: where a unit's bytes lie on disk."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Stored:
    """`nbytes` bytes at `offset` (absolute, page-aligned) of the file `path`.

    Attributes:
        digest: the hex of `hashlib.blake2b(data, digest_size=16)`.
    """

    path: Path
    offset: int
    nbytes: int
    digest: str

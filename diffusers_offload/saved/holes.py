"""Files that hold nothing behind their headers: what is read there is known, and need not be read.

safetensors looks at the first byte of each tensor when it opens a file. Of a file with holes the system answers that
with zeros that it fills the page cache with, as many as it reads ahead: gigabytes, for a large model.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from pathlib import Path


class Holes:
    """The holes of files, each from a byte on to the end; they are found in memory where the system tells.

    Args:
        begins: for each file, where its hole begins, in bytes.
    """

    def __init__(self, begins: Mapping[Path, int]) -> None:
        self._begins = {os.path.realpath(file): begin for file, begin in begins.items()}
        self._spans: list[tuple[int, int]] = []  # addresses

    def has(self, address: int) -> bool:
        """Whether this address of the process's memory lies in a hole."""
        if not self._begins:
            return False
        if not self._among_spans(address):
            self._spans = list(self._look())
        return self._among_spans(address)

    def _among_spans(self, address: int) -> bool:
        return any(start <= address < stop for start, stop in self._spans)

    def _look(self) -> Iterable[tuple[int, int]]:
        try:
            with open("/proc/self/maps") as lines:
                for line in lines:
                    words = line.rstrip("\n").split(maxsplit=5)
                    begin = self._begins.get(words[5]) if len(words) == 6 else None
                    if begin is not None:
                        start, stop = (int(word, 16) for word in words[0].split("-"))
                        yield max(start, start + begin - int(words[2], 16)), stop
        except OSError:
            return

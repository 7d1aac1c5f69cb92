"""Packs a unit's weights without loss, into pieces that a device unpacks one by one. See docs/packing.md."""

from .batch import Batch
from .expectation import expected_nbytes
from .packer import Packed, pack
from .piece import Piece, batches, check, from_json, packed_nbytes, to_json
from .unpacking import prepare, unpack, unpacks_fast

__all__ = [
    "Batch",
    "Packed",
    "Piece",
    "batches",
    "check",
    "expected_nbytes",
    "from_json",
    "pack",
    "packed_nbytes",
    "prepare",
    "to_json",
    "unpack",
    "unpacks_fast",
]

"""Unpacks a coded piece with torch operations that are queued and never waited for: for devices without the kernel.

All sizes are known beforehand, so nothing has to be asked of the device. A running sum tells each escape its rank.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from .decoder import add_rest, put_exceptions
from .formats import COMMON, FORMATS, RARE, Format
from .piece import RARE_BITS, Piece

_TABLES = 4096  # tensors whose tables are kept, some KiB each: to put one on a device is to wait for it


def decode_queued(piece: Piece, staged: torch.Tensor, out: torch.Tensor) -> None:
    """Write the elements of a coded piece.

    Args:
        staged: uint8, the piece's packed bytes.
        out: uint8, as long as what the piece holds.
    """
    made, streams = FORMATS[piece.format], piece.streams
    out = out.view(made.integer)
    common, escapes, rare = _tables(piece.table, made, staged.device)
    codes = staged[streams.codes : streams.codes + -(-len(out) // 4)].to(torch.int32)
    elements = common.index_select(0, codes).view(-1)[: len(out)]
    if piece.rare:
        flags = escapes.index_select(0, codes).view(-1)[: len(out)]
        bits = rare.index_select(0, _rare_codes(staged, streams.rare, piece.rare))
        bits = bits.index_select(0, _ranks(flags, piece.rare))
        elements = torch.where(flags == 1, bits, elements)
    add_rest(made, streams.rest, staged, elements, 0, out)
    put_exceptions(piece, staged, out)


@lru_cache(_TABLES)
def _tables(
    table: tuple[int, ...], made: Format, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """By the byte of codes, four elements' exponents where these have them, and which of the four escape, both
    (256, 4); by the rare code, an element's exponent."""
    with torch.inference_mode(False):
        bits = torch.tensor([exponent << made.mantissa_bits for exponent in table] + [0]).to(made.integer)
        codes = torch.arange(256).unsqueeze(1) >> torch.arange(0, 8, 2) & 3
        escapes = (codes == COMMON).to(torch.uint8)
        common = torch.where(escapes == 1, len(table), codes)
        return bits[common].to(device), escapes.to(device), bits[COMMON : COMMON + RARE].to(device)


def _rare_codes(staged: torch.Tensor, offset: int, count: int) -> torch.Tensor:
    """The stream of rare codes, int32 (count,)."""
    eights = -(-count // 8)
    three = staged[offset : offset + eights * RARE_BITS].view(-1, RARE_BITS).to(torch.int32)
    words = three[:, 0] | three[:, 1] << 8 | three[:, 2] << 16
    shifts = torch.arange(0, 8 * RARE_BITS, RARE_BITS, dtype=torch.int32, device=staged.device)
    return (words.unsqueeze(1) >> shifts & (RARE - 1)).view(-1)[:count]


def _ranks(flags: torch.Tensor, count: int) -> torch.Tensor:
    """For each flag that is 1, how many are before it, int32; for the others anything from 0 to `count` - 1."""
    return flags.cumsum(0, dtype=torch.int32).sub_(1).clamp_(0, count - 1)

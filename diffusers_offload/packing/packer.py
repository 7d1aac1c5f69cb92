"""Packs a unit: coded pieces for the tensors that shrink, the other bytes as they are. Torch operations only.

The device is asked twice for numbers: for samples of all exponents, to choose the tables, and for how many rare
codes and exceptions each block has, which says where pieces end and how long each is. Then every byte of the result
has its place.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from ..slab import ALIGNMENT, SMALL, Layout
from . import cutting
from .cutting import Run
from .formats import COMMON, EXCEPTION, FORMATS, Format, choose_table, symbols
from .piece import BLOCK, LOWER_BITS, PLACE_BITS, RARE_BITS, UPPER_BITS, Piece, packed_nbytes

SMALLEST = SMALL  # bytes of a tensor worth coding
_SAMPLE = 16 * 1024  # exponents that choose a table
_CHUNK = 1024 * BLOCK  # elements worked on at once: some 30 bytes of scratch for each
_PRIME = 2_654_435_761  # steps through a tensor so that no stride of its own can hide from the sample


@dataclass(frozen=True)
class Packed:
    """A packed unit.

    Attributes:
        bytes: uint8, on the device of the slab.
        pieces: in the order of the slab and of `bytes`; what lies in none of them belongs to no tensor.
        nbytes_raw: of the slab.
    """

    bytes: torch.Tensor
    pieces: tuple[Piece, ...]
    nbytes_raw: int


def pack(slab: torch.Tensor, layout: Layout, slot_nbytes: int, smallest: int = SMALLEST) -> Packed:
    """Pack the tensors of `layout`, which lie in `slab`. The same tensors give the same bytes.

    Args:
        slab: uint8, contiguous, at least `layout.nbytes` long, on any device.
        slot_nbytes: packed bytes of a piece, at most.
        smallest: bytes of a tensor that is coded; smaller ones are kept as they are.

    Raises:
        ValueError: the slab is no such tensor, the layout contradicts itself, or the slot has no useful size.
    """
    cutting.check_slot(slot_nbytes)
    if slab.dtype != torch.uint8 or slab.dim() != 1 or not slab.is_contiguous() or len(slab) < layout.nbytes:
        raise ValueError("a slab is a contiguous uint8 tensor with one dimension, as long as its layout")
    if slab.storage_offset() % ALIGNMENT:
        raise ValueError(f"a slab starts at a multiple of {ALIGNMENT} bytes of its storage")
    with torch.inference_mode(False), torch.no_grad():
        runs = cutting.find_runs(layout, smallest)
        cuts = _cut_coded(slab, [run for run in runs if run.format is not None], slot_nbytes)
        kept = cutting.join([run if cuts.get(run) else replace(run, format=None) for run in runs])
        pieces: list[Piece] = []
        for run in kept:
            base = packed_nbytes(pieces)
            cut = cuts[run] if run.format is not None else cutting.cut_plain(run, slot_nbytes)
            pieces.extend(replace(piece, source=piece.source + base) for piece in cut)
        out = torch.zeros(packed_nbytes(pieces), dtype=torch.uint8, device=slab.device)
        for piece in pieces:
            into = out[piece.source : piece.source + piece.nbytes]
            if piece.format is not None:
                _encode(slab, piece, into)
        _copy_plain(slab, layout, pieces, out)
    return Packed(out, tuple(pieces), layout.nbytes)


def _copy_plain(slab: torch.Tensor, layout: Layout, pieces: Sequence[Piece], out: torch.Tensor) -> None:
    """Copy what is kept as it is, region by region: what lies between them is anything, and stays zero here."""
    plain = iter([piece for piece in pieces if piece.format is None])
    piece = next(plain, None)
    for region in sorted(layout.regions, key=lambda region: region.offset):
        end = region.offset + region.nbytes
        while piece is not None and piece.start < end:
            start, stop = max(piece.start, region.offset), min(piece.stop, end)
            if start < stop:
                at = piece.source + start - piece.start
                out[at : at + stop - start].copy_(slab[start:stop])
            if piece.stop > end:
                break
            piece = next(plain, None)


# --- what the host has to know ----------------------------------------------------------------------------


def _cut_coded(slab: torch.Tensor, runs: Sequence[Run], slot_nbytes: int) -> dict[Run, list[Piece]]:
    """The pieces of each run that shrinks enough; their sources count from the run's first packed byte."""
    if not runs:
        return {}
    samples = torch.stack([_sample(slab, run) for run in runs]).tolist()
    tables = [
        choose_table(row[: FORMATS[run.format].exponents]) for row, run in zip(samples, runs, strict=True)
    ]
    counts = [_count(slab, run, table) for run, table in zip(runs, tables, strict=True)]
    told = torch.cat(counts, dim=1).tolist()
    cuts, first = {}, 0
    for run, table, each in zip(runs, tables, counts, strict=True):
        last = first + each.shape[1]
        rare, exceptions = (row[first:last] for row in told)
        cuts[run] = cutting.cut_coded(run, table, rare, exceptions, slot_nbytes)
        first = last
    return cuts


def _sample(slab: torch.Tensor, run: Run) -> torch.Tensor:
    """How often each exponent occurs in a sample of the run: int64 (256,)."""
    made = FORMATS[run.format]
    elements = slab[run.start : run.stop].view(made.integer)
    if len(elements) > _SAMPLE:
        steps = torch.arange(_SAMPLE, device=slab.device)
        elements = elements[steps * _PRIME % len(elements)]
    exponents = _exponents(elements, made).to(torch.uint8)
    every = torch.arange(256, device=slab.device).to(torch.uint8)
    return (exponents.unsqueeze(0) == every.unsqueeze(1)).sum(dim=1)


def _count(slab: torch.Tensor, run: Run, table: Sequence[int]) -> torch.Tensor:
    """For each block, how many elements have a rare code, and how many are exceptions: int32 (2, blocks)."""
    made = FORMATS[run.format]
    elements = slab[run.start : run.stop].view(made.integer)
    places = _places(table, made, slab.device)
    chunks = elements.split(_CHUNK)
    return torch.cat([_per_block(places.index_select(0, _exponents(chunk, made))) for chunk in chunks], dim=1)


def _exponents(elements: torch.Tensor, made: Format) -> torch.Tensor:
    """int32, one for each element."""
    return (elements.to(torch.int32) >> made.mantissa_bits) & (made.exponents - 1)


def _places(table: Sequence[int], made: Format, device: torch.device) -> torch.Tensor:
    return torch.tensor(symbols(table, made.exponents), dtype=torch.uint8, device=device)


# --- one coded piece --------------------------------------------------------------------------------------


def _encode(slab: torch.Tensor, piece: Piece, out: torch.Tensor) -> None:
    """Write the streams of `piece` into `out` (uint8, `piece.nbytes` zeros)."""
    made, streams = FORMATS[piece.format], piece.streams
    elements = slab[piece.start : piece.stop].view(made.integer)
    places = _places(piece.table, made, slab.device)
    found = torch.empty(len(elements), dtype=torch.uint8, device=slab.device)
    counts = []
    for first in range(0, len(elements), _CHUNK):
        last = first + _CHUNK
        chunk, part = elements[first:last].to(torch.int32), found[first:last]
        torch.index_select(places, 0, _exponents(chunk, made), out=part)
        _write_rest(chunk, made, streams.rest, first, out)
        # The codes of exceptions are never used: the shortest.
        codes = part.clamp(max=COMMON).masked_fill_(part == EXCEPTION, 0)
        _write(out, streams.codes, codes, 2, first)
        counts.append(_per_block(part))
    # To select is to wait for the device, so it is done once for the piece, not for each chunk.
    rare = found[(found >= COMMON) & (found < EXCEPTION)] - COMMON
    _write_rare(out, streams.rare, torch.nn.functional.pad(rare, (0, -piece.rare % 8)))
    listed = (found == EXCEPTION).nonzero().view(-1)
    exponents = _exponents(elements[listed], made)
    entries = (listed.to(torch.int32) & (BLOCK - 1)) | (exponents << PLACE_BITS)
    _put(out, streams.exceptions, (entries & 0xFFFF).to(torch.int16).view(torch.uint8))
    _write(out, streams.uppers, (exponents >> LOWER_BITS).to(torch.uint8), UPPER_BITS, 0)
    per_block = torch.cat(counts, dim=1)
    starts = (per_block.cumsum(dim=1) - per_block).to(torch.int32)
    _put(out, streams.starts, starts.view(-1).view(torch.uint8))


def _per_block(found: torch.Tensor) -> torch.Tensor:
    """Of these places in a table, how many of each block are rare, and how many exceptions: int32 (2, blocks)."""
    if len(found) % BLOCK:
        found = torch.nn.functional.pad(found, (0, -len(found) % BLOCK))  # 0 is neither
    found = found.view(-1, BLOCK)
    exceptions = (found == EXCEPTION).sum(dim=1, dtype=torch.int32)
    return torch.stack([(found >= COMMON).sum(dim=1, dtype=torch.int32) - exceptions, exceptions])


def _write_rest(
    chunk: torch.Tensor, made: Format, offsets: Sequence[int], first: int, out: torch.Tensor
) -> None:
    """Write sign and mantissa of `chunk` (int32), whose first element is the piece's `first`."""
    sign = (chunk >> (8 * made.itemsize - 1) & 1) << made.mantissa_bits
    rest = (chunk & ((1 << made.mantissa_bits) - 1)) | sign
    for offset, width in zip(offsets, made.fields, strict=True):
        low = rest & ((1 << width) - 1)
        if width == 16:
            _put(out, offset + 2 * first, low.to(torch.int16).view(torch.uint8))
        else:
            _write(out, offset, low.to(torch.uint8), width, first)
        rest = rest >> width


def _write(out: torch.Tensor, offset: int, values: torch.Tensor, width: int, first: int) -> None:
    """Write `values` (uint8) with `width` bits each (1, 2, 4 or 8), lowest bits first, from the `first` on.

    `first` is a multiple of `BLOCK`, hence at the start of a byte.
    """
    each = 8 // width
    if each > 1:
        values = torch.nn.functional.pad(values, (0, -len(values) % each))
        words = values.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[each])
        joined = words.clone()
        for place in range(1, each):
            joined |= words >> (place * (8 - width))
        values = (joined & 0xFF).to(torch.uint8)
    _put(out, offset + first * width // 8, values)


def _write_rare(out: torch.Tensor, offset: int, codes: torch.Tensor) -> None:
    """Write codes of 3 bits one behind the other, 8 codes in 3 bytes, lowest bits first."""
    for first in range(0, len(codes), _CHUNK):
        words = codes[first : first + _CHUNK].view(torch.int64)
        # Pairs, then fours, then all eight side by side.
        for shift, mask in ((5, 0x003F003F003F003F), (10, 0x00000FFF00000FFF), (20, 0xFFFFFF)):
            words = (words | words >> shift) & mask
        words = words.to(torch.int32)
        three = words.view(torch.uint8).view(-1, 4)[:, :RARE_BITS].reshape(-1)
        _put(out, offset + first * RARE_BITS // 8, three)


def _put(out: torch.Tensor, offset: int, values: torch.Tensor) -> None:
    out[offset : offset + len(values)] = values

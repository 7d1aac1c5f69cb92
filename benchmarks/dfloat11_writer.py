"""Writes a model's weights in DFloat11's format, with torch operations on the device.

The package's own encoder is a Python loop over the weights, hours for a model of 12 billion. This one writes the same
bytes: Huffman codes of the exponents end to end (highest bit first), a byte of sign and mantissa for each weight, and
what threads need that decode at once: where in a thread's 64 bits the first code begins (5 bits each), and which
weight is the first of each block of 512 threads.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import ModuleType

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn

BYTES_PER_THREAD, THREADS = 8, 512
CHUNK = 2**25  # weights that are encoded at a time
WORD = 32  # bits; a code has no more


def write(model: nn.Module, patterns: dict[str, list[str]], folder: Path, utilities: ModuleType) -> None:
    """The compressed layers of each module that a pattern names, a file each, and the config.

    Args:
        utilities: `dfloat11.dfloat11_utils`, which makes the codes and their tables.
    """
    for pattern, layers in patterns.items():
        for name, module in model.named_modules():
            if re.fullmatch(pattern, name):
                weights = [module.get_submodule(layer).weight.detach() for layer in layers]
                tensors = {f"{name}.{key}": tensor for key, tensor in compress(weights, utilities).items()}
                save_file(tensors, folder / f"{name.replace('.', '_')}.safetensors")
    config = {
        "version": "0.5.0",
        "threads_per_block": [THREADS],
        "bytes_per_thread": BYTES_PER_THREAD,
        "pattern_dict": patterns,
    }
    (folder / "config.json").write_text(json.dumps({"dfloat11_config": config}))


def compress(weights: list[torch.Tensor], utilities: ModuleType) -> dict[str, torch.Tensor]:
    """The tensors that `dfloat11` keeps instead of these weights."""
    if any(weight.dtype != torch.bfloat16 for weight in weights):
        raise ValueError("DFloat11 compresses bfloat16 alone")
    bits = torch.cat([weight.flatten() for weight in weights]).view(torch.int16)
    exponents = ((bits >> 7) & 0xFF).to(torch.uint8)
    rest = ((bits >> 8) & 0x80 | (bits & 0x7F)).to(torch.uint8).cpu()
    del bits
    counts = torch.bincount(exponents, minlength=256).tolist()
    codec, _, table = utilities.get_32bit_codec({e: count for e, count in enumerate(counts) if count})
    codes = {exponent: code for exponent, code in table.items() if isinstance(exponent, int)}
    encoded, gaps, positions = encode(exponents, codes, table[codec._eof], counts)
    splits = np.cumsum([weight.numel() for weight in weights])[:-1]
    return {
        "luts": utilities.get_luts(table),
        "encoded_exponent": encoded,
        "sign_mantissa": rest,
        "output_positions": torch.from_numpy(positions.view(np.uint8)),
        "gaps": gaps,
        "split_positions": torch.from_numpy(splits.astype(np.int64)),
    }


def encode(
    exponents: torch.Tensor,
    codes: dict[int, tuple[int, int]],
    end: tuple[int, int],
    counts: list[int],
) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """(codes end to end, packed gaps, first weights of the thread blocks), on the host.

    Args:
        exponents: uint8, on the device that encodes.
        codes: (bits, value) of each exponent; `end` is the code that fills the last byte.
        counts: how often each exponent occurs.
    """
    device = exponents.device
    table = torch.zeros(2, 256, dtype=torch.int64)
    for exponent, code in codes.items():
        table[:, exponent] = torch.tensor(code)
    lengths, values = table.to(device)
    total = sum(counts[exponent] * length for exponent, (length, _) in codes.items())
    nbytes = -(-total // 8)
    words = torch.zeros(total // WORD + 2, dtype=torch.int64, device=device)
    gaps, positions = _Firsts(8 * BYTES_PER_THREAD), _Firsts(8 * BYTES_PER_THREAD * THREADS)
    at = 0
    for first in range(0, exponents.numel(), CHUNK):
        symbols = exponents[first : first + CHUNK].int()
        length, value = lengths[symbols], values[symbols]
        ends = length.cumsum(0)
        starts = ends - length + at
        _put(words, starts, length, value)
        gaps.see(starts, first)
        positions.see(starts, first)
        at += int(ends[-1])
    if total % 8:
        start = torch.tensor([total], device=device)
        gaps.see(start, exponents.numel())
        positions.see(start, exponents.numel())
        room, (length, value) = 8 - total % 8, end
        value = value >> (length - room) if length > room else value << (room - length)
        _put(words, start, torch.full_like(start, room), torch.full_like(start, value))
    shifts = torch.arange(24, -1, -8, device=device)
    encoded = ((words[:, None] >> shifts) & 0xFF).to(torch.uint8).flatten()[:nbytes].cpu()
    blocks = -(-nbytes // (THREADS * BYTES_PER_THREAD))
    firsts = np.append(positions.symbols().numpy(), exponents.numel()).astype(np.uint32)
    return encoded, _packed(gaps.offsets(), THREADS * blocks), firsts


class _Firsts:
    """The first code that begins in each stretch of so many bits; no code is as long as a stretch."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.last = torch.tensor([-1])
        self.found: list[tuple[torch.Tensor, torch.Tensor]] = []

    def see(self, starts: torch.Tensor, symbol: int) -> None:
        """Codes that begin at these bits; the first is that of `symbol`."""
        stretch = starts // self.bits
        new = stretch != torch.cat([self.last.to(stretch), stretch[:-1]])
        self.last = stretch[-1:]
        self.found.append((new.nonzero()[:, 0] + symbol, starts[new] % self.bits))

    def symbols(self) -> torch.Tensor:
        return torch.cat([symbols for symbols, _ in self.found]).cpu()

    def offsets(self) -> torch.Tensor:
        return torch.cat([offsets for _, offsets in self.found])


def _put(words: torch.Tensor, starts: torch.Tensor, length: torch.Tensor, value: torch.Tensor) -> None:
    """Codes into 32-bit words, which are kept in 64: a code lies in one or two of them, over no other code."""
    word, offset = starts // WORD, starts % WORD
    both = value << (2 * WORD - offset - length)
    words.scatter_add_(0, word, (both >> WORD) & 0xFFFFFFFF)
    words.scatter_add_(0, word + 1, both & 0xFFFFFFFF)


def _packed(offsets: torch.Tensor, count: int) -> torch.Tensor:
    """So many offsets, those that are missing 0, in 5 bits each; eight of them are five bytes."""
    padded = torch.zeros(count, dtype=torch.int64, device=offsets.device)
    padded[: offsets.numel()] = offsets
    shifts = torch.arange(35, -1, -5, device=offsets.device)
    fives = (padded.view(-1, 8) << shifts).sum(1)
    shifts = torch.arange(32, -1, -8, device=offsets.device)
    return ((fives[:, None] >> shifts) & 0xFF).to(torch.uint8).flatten().cpu()

"""The header of a block file: which tensor lies where, as `safetensors` and as this package read it.

A `.safetensors` file is 8 bytes with the header's length (little endian), the header (JSON), and the data, which
the tensors must cover from the first byte to the last (source: the format section of safetensors' README).
Three liberties of the format are used: spaces behind the JSON, so that data start at a multiple of `PAGE`;
tensors with reserved names, which fill the gaps between the slab's regions; and the free text in
`__metadata__`, which says what the format cannot: strides, aliases, dtypes it does not know.

Everything here is arithmetic over plain data. Offsets and lengths are in bytes. A header is hostile input:
what does not fit is a ValueError that says what is wrong; the caller knows the file's name.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import safetensors
import torch

from ..slab import Layout, Placement, Region, Span, align
from .strictjson import keys, mapping, parse, sequence, sizes

PAGE = 4096  # O_DIRECT wants offsets, lengths and addresses in multiples of the device's sector: 512 or 4096
HEADER_LIMIT = 100_000_000  # safetensors' own
VERSION = 2  # 1: digests of a slab in one go

_KEY = "diffusers_offload"
_GAP = "__gap__."
_RAW = "__bytes__."
_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)
_WORDS = {
    "bool": "BOOL",
    "uint8": "U8",
    "uint16": "U16",
    "uint32": "U32",
    "uint64": "U64",
    "int8": "I8",
    "int16": "I16",
    "int32": "I32",
    "int64": "I64",
    "float16": "F16",
    "bfloat16": "BF16",
    "float32": "F32",
    "float64": "F64",
    "complex64": "C64",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
}  # float4 is missing: safetensors counts its halves of a byte, torch the bytes
_NAMES = {word: name for name, word in _WORDS.items()}
_DTYPES = {
    str(kind).removeprefix("torch."): kind for kind in vars(torch).values() if type(kind) is torch.dtype
}


@dataclass(frozen=True)
class Described:
    """One part of a file as its header tells: `offset` counts from the first byte of data."""

    name: str
    names: tuple[str, ...]
    layout: Layout
    offset: int
    digest: str


@dataclass(frozen=True)
class Range:
    """Bytes `start` to `stop` of a slab that one entry of the header names.

    Attributes:
        tensor: index of the placement that the bytes are, if they are one tensor in order; None otherwise.
        gap: whether no tensor lies here.
    """

    start: int
    stop: int
    tensor: int | None = None
    gap: bool = False


def ranges(layout: Layout) -> list[Range]:
    """Cut a slab, from its first byte to its last, into what the header can name.

    A region that one tensor fills in order (or several that are the same in all) is that tensor; any other is
    raw bytes, whose tensors the metadata describe.

    Raises:
        ValueError: regions overlap, or reach beyond the slab.
    """
    cut: list[Range] = []
    end = 0
    for region in sorted(layout.regions, key=lambda region: region.offset):
        found = _range_of(region, layout.placements)
        if found.start < end or found.stop > layout.nbytes:
            raise ValueError("the regions of the layout overlap, or reach beyond its end")
        if found.start > end:
            cut.append(Range(end, found.start, gap=True))
        cut.append(found)
        end = found.stop
    if end < layout.nbytes:
        cut.append(Range(end, layout.nbytes, gap=True))
    return cut


def _range_of(region: Region, placements: Sequence[Placement]) -> Range:
    stop = region.offset + region.nbytes
    within = [i for i, p in enumerate(placements) if _numel(p) and region.offset <= p.offset < stop]
    first = placements[within[0]] if within else None
    same = all(placements[i] == first for i in within)
    if first is not None and same and _is_plain(first) and first.offset + _nbytes(first) <= stop:
        return Range(first.offset, first.offset + _nbytes(first), within[0])
    return Range(region.offset, stop)


def encode(parts: Sequence[tuple[str, Sequence[str], Layout, str]]) -> tuple[bytes, int]:
    """The header, length and padding included, and the length of the data, for parts of one file.

    Args:
        parts: name, the tensors' names in the order of the placements, layout and digest of each.

    Raises:
        ValueError: names are reserved, given twice or too few; or the layout is none.
    """
    entries: dict[str, Any] = {}
    described = []
    start = 0
    for name, names, layout, digest in parts:
        _check_names(names, layout, entries)
        stop = start + align(layout.nbytes, PAGE)
        for i, place in enumerate(layout.placements):
            if not _numel(place) and _is_plain(place):
                entries[names[i]] = _entry(_WORDS[_word(place)], place.shape, start, start)
        for cut in ranges(layout):
            if cut.tensor is not None:
                place = layout.placements[cut.tensor]
                label, kind, shape = names[cut.tensor], _WORDS[_word(place)], place.shape
            else:
                label = f"{_GAP if cut.gap else _RAW}{len(entries)}"
                kind, shape = "U8", (cut.stop - cut.start,)
            entries[label] = _entry(kind, shape, start + cut.start, start + cut.stop)
        if layout.nbytes % PAGE:
            entries[f"{_GAP}{len(entries)}"] = _entry(
                "U8", (stop - start - layout.nbytes,), start + layout.nbytes, stop
            )
        tensors = [
            label if _derived(entries.get(label), start) == place else _record(label, place)
            for label, place in zip(names, layout.placements, strict=True)
        ]
        described.append(
            {"name": name, "offset": start, "nbytes": layout.nbytes, "digest": digest, "tensors": tensors}
        )
        start = stop
    note = json.dumps({"version": VERSION, "parts": described}, ensure_ascii=False, separators=(",", ":"))
    whole = {"__metadata__": {"format": "pt", _KEY: note}, **entries}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    length = align(8 + len(text), PAGE) - 8
    if length > HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes is more than safetensors reads ({HEADER_LIMIT})")
    return length.to_bytes(8, "little") + text.ljust(length), start


def _check_names(names: Sequence[str], layout: Layout, taken: Mapping[str, Any]) -> None:
    if len(names) != len(layout.placements):
        raise ValueError(f"{len(names)} names for {len(layout.placements)} tensors")
    for i, name in enumerate(names):
        if not isinstance(name, str) or name == "__metadata__" or name.startswith((_GAP, _RAW)):
            raise ValueError(f"a tensor cannot be named {name!r} in a .safetensors file")
        if name in taken or name in names[:i]:
            raise ValueError(f"two tensors are named {name!r}")


def _entry(kind: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}


def _record(name: str, place: Placement) -> dict[str, Any]:
    kind = _word(place)
    return {
        "name": name,
        "offset": place.offset,
        "dtype": kind,
        "shape": list(place.shape),
        "stride": list(place.stride),
    }


def decode(head: bytes, data_nbytes: int) -> tuple[Described, ...]:
    """What the header `head` (length and padding included) says of `data_nbytes` bytes of data.

    Raises:
        ValueError: it is none of ours, or contradicts itself or the data's length.
    """
    text = head[8:]
    if len(head) % PAGE or int.from_bytes(head[:8], "little") != len(text):
        raise ValueError("data do not start at a page")
    if not text.startswith(b"{"):
        raise ValueError("the header is no JSON object")
    entries = mapping(parse(text), "the header")
    note = mapping(entries.pop("__metadata__", None), "__metadata__")
    if not all(isinstance(value, str) for value in note.values()) or _KEY not in note:
        raise ValueError("it was not written by diffusers_offload")
    _check_entries(entries, data_nbytes)
    described = mapping(parse(note[_KEY].encode()), "the metadata")
    if described.get("version") != VERSION:
        raise ValueError(f"its format is version {described.get('version')!r}, this program reads {VERSION}")
    keys(described, "version", "parts")
    parts: list[Described] = []
    end, seen = 0, set()
    for raw in sequence(described["parts"], "parts"):
        part = _part(mapping(raw, "a part"), entries)
        if part.offset != end:
            raise ValueError(f"part {part.name!r} does not start where the one before ends")
        if any(part.name == other.name for other in parts) or seen & set(part.names):
            raise ValueError(f"part {part.name!r} repeats a name")
        seen |= set(part.names)
        end += align(part.layout.nbytes, PAGE)
        parts.append(part)
    if end != data_nbytes:
        raise ValueError(f"its parts are {end} bytes long, its data {data_nbytes}")
    if any(name not in seen for name in entries if not name.startswith((_GAP, _RAW))):
        raise ValueError("it holds tensors that are in no part")
    return tuple(parts)


def _check_entries(entries: Mapping[str, Any], data_nbytes: int) -> None:
    """safetensors' own rules: known dtypes, lengths that fit, no hole and no overlap."""
    spans = []
    for name, raw in entries.items():
        entry = mapping(raw, f"the entry of {name!r}")
        keys(entry, "dtype", "shape", "data_offsets")
        kind = _NAMES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if kind not in _DTYPES:
            raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}, which is not known here")
        shape, offsets = sizes(entry["shape"], name), sizes(entry["data_offsets"], name)
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * _DTYPES[kind].itemsize:
            raise ValueError(f"the offsets of {name!r} do not fit its shape")
        spans.append((*offsets, name))
    end = 0
    for start, stop, name in sorted(spans):
        if start != end:
            raise ValueError(f"there is a hole or an overlap before {name!r}")
        end = stop
    if end != data_nbytes:
        raise ValueError(f"it describes {end} bytes of data and holds {data_nbytes}")


def _part(raw: Mapping[str, Any], entries: Mapping[str, Any]) -> Described:
    keys(raw, "name", "offset", "nbytes", "digest", "tensors")
    name, digest = raw["name"], raw["digest"]
    if not isinstance(name, str) or not isinstance(digest, str) or not _DIGEST.fullmatch(digest):
        raise ValueError("a part's name or digest is none")
    start, nbytes = sizes([raw["offset"], raw["nbytes"]], name)
    names, placements = [], []
    for told in sequence(raw["tensors"], "tensors"):
        if isinstance(told, str):
            place = None if told.startswith((_GAP, _RAW)) else _derived(entries.get(told), start)
            names.append(told)
        else:
            place = _explicit(mapping(told, "a tensor"))
            names.append(told["name"])
            entry = entries.get(told["name"])
            named = entry and (_NAMES[entry["dtype"]], tuple(entry["shape"]))
            if named and named != (_word(place), place.shape):
                raise ValueError(f"{told['name']!r} is described twice, and differently")
        if place is None or (_numel(place) and not 0 <= place.offset <= nbytes - _reach(place)):
            raise ValueError(f"a tensor of part {name!r} does not lie in it")
        placements.append(place)
    if len(set(names)) != len(names):
        raise ValueError(f"part {name!r} names a tensor twice")
    layout = Layout(tuple(placements), _regions(placements), nbytes)
    return Described(name, tuple(names), layout, start, digest)


def _explicit(raw: Mapping[str, Any]) -> Placement:
    keys(raw, "name", "offset", "dtype", "shape", "stride")
    name, kind = raw["name"], raw["dtype"]
    if not isinstance(name, str) or name.startswith((_GAP, _RAW)):
        raise ValueError("a tensor has no name")
    if not isinstance(kind, str) or kind not in _DTYPES:
        raise ValueError(f"{name!r} has the dtype {kind!r}, which this torch does not know")
    shape, stride = sizes(raw["shape"], name), sizes(raw["stride"], name)
    (offset,) = sizes([raw["offset"]], name)
    if len(shape) != len(stride) or offset % _DTYPES[kind].itemsize:
        raise ValueError(f"shape, strides and offset of {name!r} do not fit together")
    return Placement(offset, _DTYPES[kind], shape, stride)


def _derived(entry: Mapping[str, Any] | None, start: int) -> Placement | None:
    """The placement of a contiguous tensor, from its entry alone, in the part that starts at `start`."""
    if entry is None:
        return None
    shape = tuple(entry["shape"])
    dtype = _DTYPES[_NAMES[entry["dtype"]]]
    return Placement(entry["data_offsets"][0] - start, dtype, shape, _contiguous(shape))


def _regions(placements: Sequence[Placement]) -> tuple[Region, ...]:
    """The unions of the placements that overlap; their spans count from the slab's first byte."""
    unions: list[list[int]] = []
    for start, stop in sorted((p.offset, p.offset + _reach(p)) for p in placements if _numel(p)):
        if unions and start < unions[-1][1]:
            unions[-1][1] = max(unions[-1][1], stop)
        else:
            unions.append([start, stop])
    return tuple(Region(Span(0, start, stop), start) for start, stop in unions)


# --- the shape of one tensor ------------------------------------------------------------------------------


def _numel(place: Placement) -> int:
    return math.prod(place.shape)


def _nbytes(place: Placement) -> int:
    return _numel(place) * place.dtype.itemsize


def _reach(place: Placement) -> int:
    """Bytes from the first that the tensor has to the last, which is more than it has if there are holes."""
    steps = sum((n - 1) * step for n, step in zip(place.shape, place.stride, strict=True))
    return (1 + steps) * place.dtype.itemsize


def _word(place: Placement) -> str:
    return str(place.dtype).removeprefix("torch.")


def _is_plain(place: Placement) -> bool:
    """Whether an entry of safetensors' says all there is: in order, and of a dtype it knows."""
    in_order = zip(place.shape, place.stride, _contiguous(place.shape), strict=True)
    ordered = not _numel(place) or all(n == 1 or step == usual for n, step, usual in in_order)
    return ordered and _word(place) in _WORDS and _is_known(_WORDS[_word(place)])


def _contiguous(shape: Sequence[int]) -> tuple[int, ...]:
    """torch's strides, in elements, of a tensor whose elements lie one behind the other."""
    return tuple(math.prod(max(n, 1) for n in shape[i + 1 :]) for i in range(len(shape)))


@functools.cache
def _is_known(word: str) -> bool:
    """Whether the safetensors installed here knows the dtype: the number grows from version to version."""
    text = json.dumps({"x": _entry(word, (0,), 0, 0)}).encode()
    try:
        safetensors.deserialize(len(text).to_bytes(8, "little") + text)
    except safetensors.SafetensorError:
        return False
    return True

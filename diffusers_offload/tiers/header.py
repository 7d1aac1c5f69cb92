"""The header of a block file: which tensor lies where, as `safetensors` and as this package read it.

A `.safetensors` file is 8 bytes with the header's length (little endian), the header (JSON), and the data, which
the tensors must cover from the first byte to the last (source: the format section of safetensors' README).
Three liberties of the format are used: spaces behind the JSON, so that data start at a multiple of `PAGE`;
tensors with reserved names, which fill the gaps between the slab's regions or are a packed slab; and the free text
in `__metadata__`, which says what the format cannot: strides, aliases, dtypes it does not know, packing.

Everything here is arithmetic over plain data. Offsets and lengths are in bytes. A header is hostile input:
what does not fit is a ValueError that says what is wrong; the caller knows the file's name.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..slab import Layout, Placement, Region, Span, align
from .packings import Packing, from_note, slab_nbytes, to_note
from .strictjson import keys, mapping, parse, sequence, sizes
from .words import DTYPES, NAMES, WORDS, contiguous, is_plain, nbytes_of, numel, reach, word_of

PAGE = 4096  # O_DIRECT wants offsets, lengths and addresses in multiples of the device's sector: 512 or 4096
HEADER_LIMIT = 100_000_000  # safetensors' own
VERSION = 2  # 1: digests of a slab in one go
VERSION_PACKED = 3  # of a file with a packed part; what knows version 2 alone refuses it

_KEY = "diffusers_offload"
_GAP = "__gap__."
_RAW = "__bytes__."
_PACKED = "__packed__."
_RESERVED = (_GAP, _RAW, _PACKED)
_DIGEST = re.compile(r"[0-9a-f]{32}", re.ASCII)


@dataclass(frozen=True)
class Described:
    """One part of a file as its header tells.

    Attributes:
        nbytes: in the file, without what fills the last page; `digest` is of these.
        packing: how they are packed; None if they are the slab.
        offset: of the first, from the first byte of data.
    """

    name: str
    names: tuple[str, ...]
    layout: Layout
    nbytes: int
    digest: str
    packing: Packing | None = None
    offset: int = 0


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
    within = [i for i, p in enumerate(placements) if numel(p) and region.offset <= p.offset < stop]
    first = placements[within[0]] if within else None
    same = all(placements[i] == first for i in within)
    if first is not None and same and is_plain(first) and first.offset + nbytes_of(first) <= stop:
        return Range(first.offset, first.offset + nbytes_of(first), within[0])
    return Range(region.offset, stop)


def encode(parts: Sequence[Described]) -> tuple[bytes, int]:
    """The header, length and padding included, and the length of the data, for parts of one file.

    Args:
        parts: their offsets do not count: each starts at the first page behind the one before.

    Raises:
        ValueError: names are reserved, given twice or too few; or the layout is none.
    """
    entries: dict[str, Any] = {}
    seen: set[str] = set()
    described = []
    start = 0
    for part in parts:
        _check_names(part.names, part.layout, seen)
        seen |= set(part.names)
        tensors = _add_packed(part, start, entries) if part.packing else _add_raw(part, start, entries)
        stop = start + align(part.nbytes, PAGE)
        if part.nbytes % PAGE:
            end = start + part.nbytes
            entries[f"{_GAP}{len(entries)}"] = _entry("U8", (stop - end,), end, stop)
        told = {"name": part.name, "offset": start, "nbytes": part.nbytes, "digest": part.digest}
        packed = {"slab": to_note(part.packing, part.layout.nbytes)} if part.packing else {}
        described.append({**told, "tensors": tensors, **packed})
        start = stop
    version = VERSION_PACKED if any(part.packing for part in parts) else VERSION
    note = json.dumps({"version": version, "parts": described}, ensure_ascii=False, separators=(",", ":"))
    whole = {"__metadata__": {"format": "pt", _KEY: note}, **entries}
    text = json.dumps(whole, ensure_ascii=False, separators=(",", ":")).encode()
    length = align(8 + len(text), PAGE) - 8
    if length > HEADER_LIMIT:
        raise ValueError(f"a header of {length} bytes is more than safetensors reads ({HEADER_LIMIT})")
    return length.to_bytes(8, "little") + text.ljust(length), start


def _add_raw(part: Described, start: int, entries: dict[str, Any]) -> list[Any]:
    """Enter the slab of a part that begins at `start`; returns what the metadata say of its tensors."""
    names, layout = part.names, part.layout
    for i, place in enumerate(layout.placements):
        if not numel(place) and is_plain(place):
            entries[names[i]] = _entry(WORDS[word_of(place)], place.shape, start, start)
    for cut in ranges(layout):
        if cut.tensor is not None:
            place = layout.placements[cut.tensor]
            label, kind, shape = names[cut.tensor], WORDS[word_of(place)], place.shape
        else:
            label = f"{_GAP if cut.gap else _RAW}{len(entries)}"
            kind, shape = "U8", (cut.stop - cut.start,)
        entries[label] = _entry(kind, shape, start + cut.start, start + cut.stop)
    return [
        label if _derived(entries.get(label), start) == place else _record(label, place)
        for label, place in zip(names, layout.placements, strict=True)
    ]


def _add_packed(part: Described, start: int, entries: dict[str, Any]) -> list[Any]:
    """The same for packed bytes, in which nobody else finds a tensor."""
    entries[f"{_PACKED}{len(entries)}"] = _entry("U8", (part.nbytes,), start, start + part.nbytes)
    return [_record(label, place) for label, place in zip(part.names, part.layout.placements, strict=True)]


def _check_names(names: Sequence[str], layout: Layout, taken: set[str]) -> None:
    if len(names) != len(layout.placements):
        raise ValueError(f"{len(names)} names for {len(layout.placements)} tensors")
    for i, name in enumerate(names):
        if not isinstance(name, str) or name == "__metadata__" or name.startswith(_RESERVED):
            raise ValueError(f"a tensor cannot be named {name!r} in a .safetensors file")
        if name in taken or name in names[:i]:
            raise ValueError(f"two tensors are named {name!r}")


def _entry(kind: str, shape: Sequence[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": kind, "shape": list(shape), "data_offsets": [start, stop]}


def _record(name: str, place: Placement) -> dict[str, Any]:
    kind = word_of(place)
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
    version = described.get("version")
    if type(version) is not int or not VERSION <= version <= VERSION_PACKED:
        raise ValueError(
            f"its format is version {version!r}, this program reads {VERSION} and {VERSION_PACKED}"
        )
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
        end += align(part.nbytes, PAGE)
        parts.append(part)
    if end != data_nbytes:
        raise ValueError(f"its parts are {end} bytes long, its data {data_nbytes}")
    if any(name not in seen for name in entries if not name.startswith(_RESERVED)):
        raise ValueError("it holds tensors that are in no part")
    _check_packed(parts, entries, version)
    return tuple(parts)


def _check_packed(parts: Sequence[Described], entries: Mapping[str, Any], version: int) -> None:
    """What is packed is entered as such, and nothing else is."""
    packed = [part for part in parts if part.packing is not None]
    told = [_entry("U8", (part.nbytes,), part.offset, part.offset + part.nbytes) for part in packed]
    found = [entry for name, entry in entries.items() if name.startswith(_PACKED)]
    if sorted(found, key=str) != sorted(told, key=str) or bool(packed) != (version == VERSION_PACKED):
        raise ValueError("what it says to be packed is not what its entries say")
    if any(name in entries for part in packed for name in part.names):
        raise ValueError("a tensor is packed, and has an entry of its own")


def _check_entries(entries: Mapping[str, Any], data_nbytes: int) -> None:
    """safetensors' own rules: known dtypes, lengths that fit, no hole and no overlap."""
    spans = []
    for name, raw in entries.items():
        entry = mapping(raw, f"the entry of {name!r}")
        keys(entry, "dtype", "shape", "data_offsets")
        kind = NAMES.get(entry["dtype"]) if isinstance(entry["dtype"], str) else None
        if kind not in DTYPES:
            raise ValueError(f"{name!r} has the dtype {entry['dtype']!r}, which is not known here")
        shape, offsets = sizes(entry["shape"], name), sizes(entry["data_offsets"], name)
        if len(offsets) != 2 or offsets[1] - offsets[0] != math.prod(shape) * DTYPES[kind].itemsize:
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
    note = mapping(raw["slab"], "a packed slab") if "slab" in raw else None
    keys(raw, "name", "offset", "nbytes", "digest", "tensors", *(("slab",) if note is not None else ()))
    name, digest = raw["name"], raw["digest"]
    told_digests = (digest, note.get("digest")) if note is not None else (digest,)
    if not isinstance(name, str) or not all(
        isinstance(d, str) and _DIGEST.fullmatch(d) for d in told_digests
    ):
        raise ValueError("a part's name or digest is none")
    start, stored = sizes([raw["offset"], raw["nbytes"]], name)
    nbytes = slab_nbytes(note, name) if note is not None else stored
    names, placements = [], []
    for told in sequence(raw["tensors"], "tensors"):
        if isinstance(told, str):
            place = None if told.startswith(_RESERVED) else _derived(entries.get(told), start)
            names.append(told)
        else:
            place = _explicit(mapping(told, "a tensor"))
            names.append(told["name"])
            entry = entries.get(told["name"])
            named = entry and (NAMES[entry["dtype"]], tuple(entry["shape"]))
            if named and named != (word_of(place), place.shape):
                raise ValueError(f"{told['name']!r} is described twice, and differently")
        if place is None or (numel(place) and not 0 <= place.offset <= nbytes - reach(place)):
            raise ValueError(f"a tensor of part {name!r} does not lie in it")
        placements.append(place)
    if len(set(names)) != len(names):
        raise ValueError(f"part {name!r} names a tensor twice")
    layout = Layout(tuple(placements), _regions(placements), nbytes)
    packing = from_note(note, name, stored, layout.regions) if note is not None else None
    return Described(name, tuple(names), layout, stored, digest, packing, start)


def _explicit(raw: Mapping[str, Any]) -> Placement:
    keys(raw, "name", "offset", "dtype", "shape", "stride")
    name, kind = raw["name"], raw["dtype"]
    if not isinstance(name, str) or name.startswith(_RESERVED):
        raise ValueError("a tensor has no name")
    if not isinstance(kind, str) or kind not in DTYPES:
        raise ValueError(f"{name!r} has the dtype {kind!r}, which this torch does not know")
    shape, stride = sizes(raw["shape"], name), sizes(raw["stride"], name)
    (offset,) = sizes([raw["offset"]], name)
    if len(shape) != len(stride) or offset % DTYPES[kind].itemsize:
        raise ValueError(f"shape, strides and offset of {name!r} do not fit together")
    return Placement(offset, DTYPES[kind], shape, stride)


def _derived(entry: Mapping[str, Any] | None, start: int) -> Placement | None:
    """The placement of a contiguous tensor, from its entry alone, in the part that starts at `start`."""
    if entry is None:
        return None
    shape = tuple(entry["shape"])
    dtype = DTYPES[NAMES[entry["dtype"]]]
    return Placement(entry["data_offsets"][0] - start, dtype, shape, contiguous(shape))


def _regions(placements: Sequence[Placement]) -> tuple[Region, ...]:
    """The unions of the placements that overlap; their spans count from the slab's first byte."""
    unions: list[list[int]] = []
    for start, stop in sorted((p.offset, p.offset + reach(p)) for p in placements if numel(p)):
        if unions and start < unions[-1][1]:
            unions[-1][1] = max(unions[-1][1], stop)
        else:
            unions.append([start, stop])
    return tuple(Region(Span(0, start, stop), start) for start, stop in unions)

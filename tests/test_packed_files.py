"""Packed parts in block files: what goes in comes out, and no description of them is believed unchecked."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_blockfile import edited, noise, part_of, raw

from diffusers_offload import slab
from diffusers_offload.streams import open_streams
from diffusers_offload.tiers import blockfile, digests, packed
from diffusers_offload.tiers.blockfile import PAGE, StoredPart, StoreError
from diffusers_offload.tiers.packed import Packer, unpack_all


@pytest.fixture(autouse=True)
def small_slots(monkeypatch):
    monkeypatch.setattr(packed, "SMALLEST", 0)
    monkeypatch.setattr(packed, "SLOT_BYTES", 64 * 1024)


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    full = torch.randn(200, 40)
    return {
        "w": torch.randn(300, 200).bfloat16(),
        "steps": torch.arange(7),
        "empty": torch.empty(0, 3),
        "even": full[::2],
        "odd": full[1::2],
        "v": torch.randn(50, 100),
        "tiny": noise((3,), torch.float16),
    }


def packed_part(name: str, tensors: dict[str, torch.Tensor]) -> blockfile.Part:
    part = part_of(name, tensors)
    made = Packer(open_streams(torch.device("cpu")), False).pack_part(part, blockfile.digest_of(part))
    assert made.packing is not None and made.nbytes < part.nbytes
    return made


def read_back(part: StoredPart) -> list[torch.Tensor]:
    buffer = torch.randint(256, (part.stored.nbytes,), dtype=torch.uint8)
    blockfile.read(part.stored, buffer)
    data = torch.randint(256, (part.layout.nbytes,), dtype=torch.uint8)
    unpack_all(part.packing.pieces, buffer, data)
    return slab.views(part.layout, data)


@pytest.fixture
def file(tmp_path):
    parts = [part_of("raw", {"r": noise((70, 10))}), packed_part("p", weights())]
    return blockfile.write(tmp_path / "block.safetensors", parts)


def test_what_was_packed_comes_back(file):
    found = blockfile.read_layout(file.path)
    assert found == file and file.nbytes % PAGE == 0 and found.parts[1].names == tuple(weights())
    for tensor, wanted in zip(read_back(found.parts[1]), weights().values(), strict=True):
        assert (tensor.dtype, tensor.shape, tensor.stride()) == (wanted.dtype, wanted.shape, wanted.stride())
        assert raw(tensor) == raw(wanted)
    with safe_open(file.path, "pt") as opened:
        names = list(opened.keys())
        assert "r" in names and not set(names) & set(weights())
        (name,) = (name for name in names if name.startswith("__packed__."))
        data = opened.get_tensor(name)
    assert digests.of_slab([memoryview(data.numpy())]) == file.parts[1].stored.digest


def test_the_same_weights_have_the_same_content_packed_or_not(tmp_path):
    plain, less = part_of("p", weights()), packed_part("p", weights())
    files = [blockfile.plan(tmp_path / "x", [part]) for part in (plain, less)]
    assert files[0].content == files[1].content and files[0].fingerprint != files[1].fingerprint
    other = weights() | {"steps": torch.arange(1, 8)}
    assert blockfile.plan(tmp_path / "x", [packed_part("p", other)]).content != files[0].content


def test_each_changed_byte_of_the_header_is_refused_or_changes_the_fingerprint(file):
    whole = bytearray(file.path.read_bytes())
    head = len(whole) - sum(slab.align(part.stored.nbytes, PAGE) for part in file.parts)
    path = file.path.with_name("changed.safetensors")
    path.write_bytes(whole)
    with open(path, "r+b", buffering=0) as changed:
        for position in range(8 + len(whole[8:head].rstrip())):
            for value in {whole[position] ^ 1, whole[position] ^ 0x80, 0x39} - {whole[position]}:
                os.pwrite(changed.fileno(), bytes([value]), position)
                found = read_or_refuse(path)
                if found is not None:  # names and digests are any text: the fingerprint tells
                    assert found.fingerprint != file.fingerprint
                    unpack_anything(found.parts[1])
            os.pwrite(changed.fileno(), whole[position : position + 1], position)
    assert blockfile.read_layout(path).fingerprint == file.fingerprint


def read_or_refuse(path: Path) -> blockfile.BlockFile | None:
    try:
        return blockfile.read_layout(path)
    except StoreError as error:
        if f"{path.name} cannot be used" not in str(error):
            raise
        return None


def unpack_anything(part: StoredPart) -> None:
    """Whatever the bytes are, nothing is read or written outside."""
    generator = torch.Generator().manual_seed(0)
    buffer = torch.randint(256, (part.stored.nbytes,), dtype=torch.uint8, generator=generator)
    unpack_all(part.packing.pieces, buffer, torch.empty(part.layout.nbytes, dtype=torch.uint8))


def test_random_changes_in_the_data_are_caught(file):
    rng, part = random.Random(0), file.parts[1]
    with open(file.path, "r+b", buffering=0) as changed:
        for _ in range(200):
            position = part.stored.offset + rng.randrange(part.stored.nbytes)
            old = os.pread(changed.fileno(), 1, position)
            os.pwrite(changed.fileno(), bytes([old[0] ^ rng.randrange(1, 256)]), position)
            with pytest.raises(StoreError, match=r"block\.safetensors cannot be used: its bytes"):
                read_back(part)
            os.pwrite(changed.fileno(), old, position)


def _slab(note):
    return note["parts"][1]["slab"]


def _piece(note, index=0):
    return _slab(note)["packing"]["pieces"][index]


def _entry(entries):
    return next(entry for name, entry in entries.items() if name.startswith("__packed__"))


EDITS = {
    "version that packs nothing": lambda e, n: n.update(version=2),
    "version no number": lambda e, n: n.update(version=3.0),
    "packing of the future": lambda e, n: _slab(n)["packing"].update(version=3),
    "packing a list": lambda e, n: _slab(n).update(packing=[]),
    "slab a list": lambda e, n: n["parts"][1].update(slab=[]),
    "slab null": lambda e, n: n["parts"][1].update(slab=None),
    "no slab": lambda e, n: n["parts"][1].pop("slab"),
    "slab of another part": lambda e, n: n["parts"][0].update(slab=_slab(n)),
    "a key too many": lambda e, n: _slab(n).update(more=1),
    "digest no digest": lambda e, n: _slab(n).update(digest="x" * 32),
    "digest a list": lambda e, n: _slab(n).update(digest=[]),
    "slab too short": lambda e, n: _slab(n).update(nbytes=_slab(n)["nbytes"] - 256),
    "slab too long": lambda e, n: _slab(n).update(nbytes=_slab(n)["nbytes"] + 256),
    "slab that no memory holds": lambda e, n: _slab(n).update(nbytes=2**62),
    "slab negative": lambda e, n: _slab(n).update(nbytes=-1),
    "no pieces": lambda e, n: _slab(n)["packing"].update(pieces=[]),
    "a piece too few": lambda e, n: _slab(n)["packing"]["pieces"].pop(),
    "the first piece left out": lambda e, n: _slab(n)["packing"]["pieces"].pop(0),
    "a piece in the middle left out": lambda e, n: _slab(n)["packing"]["pieces"].pop(1),
    "pieces swapped": lambda e, n: _slab(n)["packing"]["pieces"].reverse(),
    "a piece twice": lambda e, n: _slab(n)["packing"]["pieces"].insert(0, _piece(n)),
    "a piece beyond the slab": lambda e, n: _piece(n, -1).update(slab=[0, 2**40]),
    "a piece beyond the bytes": lambda e, n: _piece(n, -1).update(source=2**40),
    "a piece from the middle of a line": lambda e, n: _piece(n, 1).update(source=_piece(n, 1)["source"] + 1),
    "more rare codes than bytes": lambda e, n: _piece(n).update(rare=200_000),
    "more exceptions than bytes": lambda e, n: _piece(n).update(exceptions=200_000),
    "a format that is a module": lambda e, n: _piece(n).update(format="os"),
    "another format": lambda e, n: _piece(n).update(format="e4m3"),
    "a table too short": lambda e, n: _piece(n).update(table=[1, 2, 3]),
    "a table out of range": lambda e, n: _piece(n).update(table=[256] * 11),
    "fewer bytes than are entered": lambda e, n: n["parts"][1].update(nbytes=n["parts"][1]["nbytes"] - 256),
    "a tensor by its name alone": lambda e, n: n["parts"][1]["tensors"].__setitem__(0, "w"),
    "a tensor beyond the slab": lambda e, n: n["parts"][1]["tensors"][0].update(offset=2**40),
    "a tensor with an entry": lambda e, n: e.update(
        w={"dtype": "BF16", "shape": [300, 200], "data_offsets": _entry(e)["data_offsets"]}
    ),
    "an empty one with an entry": lambda e, n: e.update(
        empty={"dtype": "F32", "shape": [0, 3], "data_offsets": [0, 0]}
    ),
    "packed bytes that are floats": lambda e, n: _entry(e).update(
        dtype="F32", shape=[_entry(e)["shape"][0] // 4]
    ),
    "packed bytes in two dimensions": lambda e, n: _entry(e).update(shape=[2, _entry(e)["shape"][0] // 2]),
    "an entry of nothing": lambda e, n: e.update(
        {"__packed__.99": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]}}
    ),
}


def test_descriptions_that_lie_are_refused(file):
    accepted = [edit for edit, change in EDITS.items() if read_or_refuse(edited(file, change)) is not None]
    assert not accepted


NUMBERS = st.integers(-2, 2**64) | st.sampled_from([2**31, 2**32, 2**62, 2**63 - 1, True, 1.0, None, "1", []])
PATHS = st.lists(st.integers(0, 50), min_size=1, max_size=6)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(changes=st.lists(st.tuples(PATHS, NUMBERS), min_size=1, max_size=3))
def test_any_description_is_refused_or_stays_within(file, changes):
    def change(entries, note):
        for path, value in changes:
            place, key = note["parts"][1]["slab"], None
            for step in path:
                keys = list(place) if isinstance(place, dict) else range(len(place))
                if not keys:
                    break
                holder, key = place, list(keys)[step % len(keys)]
                place = place[key]
                if not isinstance(place, (dict, list)):
                    break
            if key is not None:
                holder[key] = value

    found = read_or_refuse(edited(file, change))
    if found is not None:
        assert found.parts[1].layout.nbytes < 2 * file.parts[1].layout.nbytes
        unpack_anything(found.parts[1])


def test_what_does_not_shrink_is_written_as_it_is(tmp_path):
    part = part_of("p", {"w": noise((300, 200), torch.int32)})
    packer = Packer(open_streams(torch.device("cpu")), False)
    assert packer.pack_part(part, blockfile.digest_of(part)) is part
    empty = part_of("q", {})
    assert packer.pack_part(empty, blockfile.digest_of(empty)) is empty

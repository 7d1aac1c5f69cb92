"""Packed weights come back bit by bit, whatever they are; what is wrong is refused, or does no harm."""

from __future__ import annotations

import copy
import json
import random

import packing_reference
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from packed_units import DTYPES, SLOT, UNTOUCHED, patterns, same_regions, slab_of, unpacked, weights

from diffusers_offload.packing import (
    Piece,
    batches,
    check,
    cutting,
    decoder,
    expected_nbytes,
    from_json,
    pack,
    packed_nbytes,
    to_json,
    unpack,
)
from diffusers_offload.packing.formats import ENTRIES, FORMATS, choose_table
from diffusers_offload.packing.piece import BLOCK, LARGEST, SOURCE_ALIGNMENT
from diffusers_offload.packing.queued import decode_queued
from diffusers_offload.slab import Layout, Placement, Region, Span

FORMAT_NAMES = sorted(DTYPES)


@pytest.fixture
def always_coded(monkeypatch):
    """A tensor is coded even if that makes it longer."""
    monkeypatch.setattr(cutting, "LEAST_SAVING", -1e-9)


def round_trip(tensors: list[torch.Tensor], device: str = "cpu", slot: int = SLOT):
    """Pack and unpack; returns what was packed."""
    slab, layout = slab_of(tensors, device)
    packed = pack(slab, layout, slot, smallest=0)
    assert same_regions(layout, slab, unpacked(packed))
    return packed


# --- every bit comes back ---------------------------------------------------------------------------------


@pytest.mark.usefixtures("always_coded")
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_bit_pattern_comes_back(name, device):
    found = patterns(DTYPES[name])
    shuffled = found[torch.randperm(len(found), generator=torch.Generator().manual_seed(0))]
    packed = round_trip([found, shuffled, found.repeat_interleave(3)], device)
    assert all(piece.format == name for piece in packed.pieces)


@pytest.mark.usefixtures("always_coded")
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_every_length_comes_back(name, device):
    for count in (1, 2, 3, 7, 8, 9, BLOCK - 1, BLOCK, BLOCK + 1, 3 * BLOCK + 5):
        packed = round_trip([weights(count, DTYPES[name])], device)
        assert [piece.format for piece in packed.pieces] == [name]


@pytest.mark.usefixtures("always_coded")
def test_constant_tensors_come_back(device):
    for value in (0.0, -0.0, 1.0, float("nan"), float("inf")):
        packed = round_trip([torch.full((2 * BLOCK + 3,), value, dtype=torch.bfloat16)], device)
        assert packed.pieces[0].rare == 0


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_weights_shrink_and_come_back(name, device):
    packed = round_trip([weights(60_000, DTYPES[name])], device)
    expected = {"bf16": 11.3, "fp16": 14.3, "fp32": 27.4, "e4m3": 7.0, "e5m2": 6.4}
    assert len(packed.bytes) * 8 / 60_000 < expected[name]


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_what_does_not_shrink_stays_as_it_is(name):
    noise = torch.randint(0, 256, (4 * BLOCK * 4,), dtype=torch.uint8).view(DTYPES[name])
    packed = round_trip([noise])
    assert {piece.format for piece in packed.pieces} == {None}
    assert len(packed.bytes) == packed.nbytes_raw


def test_an_empty_unit_is_packed_to_nothing():
    for tensors in ([], [torch.empty(0, dtype=torch.bfloat16)]):
        packed = round_trip(tensors)
        assert packed.pieces == () and len(packed.bytes) == 0


@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_long_tensors_are_decoded_in_chunks(name, monkeypatch, device):
    monkeypatch.setattr(decoder, "_CHUNK", 2 * BLOCK)
    round_trip([weights(9 * BLOCK + 77, DTYPES[name])], device, slot=2**20)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_what_is_expected_is_enough_and_not_much_more(dtype):
    """A bound on host memory goes by it."""
    torch.manual_seed(0)
    normal = torch.randn(1000, 1000)
    kinds = (
        normal,
        torch.distributions.Laplace(0.0, 1.0).sample((1000, 1000)),
        normal * torch.randn(1000, 1).mul(0.5).exp(),
    )
    for kind in kinds:
        slab, layout = slab_of([(kind * 0.02).to(dtype)])
        needed = len(pack(slab, layout, 2**24).bytes)
        assert needed <= expected_nbytes([kind.to(dtype)]) <= 1.05 * needed


def test_a_sample_may_miss_exponents():
    numbers = torch.full((200_000,), 0.5, dtype=torch.bfloat16)
    numbers[123_456] = 3e38
    round_trip([numbers], slot=2**20)


tensor_kinds = st.sampled_from(["plain", "sliced", "transposed", "offset", "expanded", "odd dtype"])


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_units_of_any_tensors_come_back(data):
    tensors = []
    for seed in range(data.draw(st.integers(1, 5))):
        dtype = DTYPES[data.draw(st.sampled_from(FORMAT_NAMES))]
        rows, columns = data.draw(st.integers(1, 90)), data.draw(st.integers(1, 150))
        whole = weights(rows * columns, dtype, seed).view(rows, columns)
        kind = data.draw(tensor_kinds)
        if kind == "sliced":
            tensors += [whole[::2], whole[1::2]]
        elif kind == "transposed":
            tensors += [whole.t()]
        elif kind == "offset":
            tensors += [whole.view(-1)[1:]]
        elif kind == "expanded":
            tensors += [whole[:1].expand(7, columns)]
        elif kind == "odd dtype":
            tensors += [whole.view(torch.uint8), whole] if data.draw(st.booleans()) else [whole != 0]
        else:
            tensors += [whole]
    slab, layout = slab_of(tensors)
    packed = pack(slab, layout, SLOT, smallest=data.draw(st.sampled_from([0, 4096, 100_000])))
    assert same_regions(layout, slab, unpacked(packed))
    description = json.loads(json.dumps(to_json(packed.pieces)))
    assert from_json(description, len(packed.bytes), layout.nbytes) == packed.pieces


@pytest.mark.usefixtures("always_coded")
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_the_description_of_the_format_is_enough(name):
    tensors = [weights(BLOCK + 301, DTYPES[name]), torch.arange(5), patterns(DTYPES[name])[-700:]]
    slab, layout = slab_of(tensors)
    packed = pack(slab, layout, SLOT, smallest=0)
    description = json.loads(json.dumps(to_json(packed.pieces)))
    found = packing_reference.unpack(description, packed.bytes.numpy().tobytes(), layout.nbytes)
    assert same_regions(layout, slab, torch.frombuffer(bytearray(found), dtype=torch.uint8))


# --- pieces -----------------------------------------------------------------------------------------------


def mixed_unit() -> list[torch.Tensor]:
    large = weights(150_000, torch.bfloat16)
    return [
        torch.ones(10, dtype=torch.bfloat16),
        large,
        torch.arange(100),
        weights(90_000, torch.float32),
        torch.randint(0, 256, (200_000,), dtype=torch.uint8),
    ]


def test_pieces_fit_their_slot_and_follow_each_other():
    packed = round_trip(mixed_unit())
    assert {piece.format for piece in packed.pieces} == {None, "bf16", "fp32"}
    written = read = 0
    for piece in packed.pieces:
        assert piece.start >= written and piece.source >= read and piece.nbytes <= SLOT
        assert piece.source % SOURCE_ALIGNMENT == 0
        written, read = piece.stop, piece.source + piece.nbytes
    assert packed_nbytes(packed.pieces) == len(packed.bytes)


@pytest.mark.parametrize("slots", [1, 1.2, 2.6])
def test_a_large_tensor_comes_in_few_pieces_of_one_size(slots):
    """None of them is a small rest, which would cost as much to start."""
    elements = 40 * BLOCK
    (whole,) = round_trip([weights(elements, torch.bfloat16)], slot=2**20).pieces
    slot = max(int(whole.nbytes / slots), 64 * 1024)
    pieces = round_trip([weights(elements, torch.bfloat16)], slot=slot).pieces
    assert len(pieces) == -(-whole.nbytes // slot)
    sizes = [piece.nbytes for piece in pieces]
    assert max(sizes) <= slot and min(sizes) > 0.8 * max(sizes)


def test_each_piece_is_unpacked_on_its_own():
    slab, layout = slab_of(mixed_unit())
    packed = pack(slab, layout, SLOT, smallest=0)
    for piece in packed.pieces:
        destination = torch.full_like(slab, UNTOUCHED)
        staged = packed.bytes[piece.source : piece.source + piece.nbytes].clone()
        unpack([piece], staged, destination)
        assert (destination[: piece.start] == UNTOUCHED).all() and (
            destination[piece.stop :] == UNTOUCHED
        ).all()


def test_pieces_are_unpacked_from_where_the_first_one_begins():
    slab, layout = slab_of(mixed_unit())
    packed = pack(slab, layout, SLOT, smallest=0)
    pieces = packed.pieces[2:-1]
    destination = torch.full_like(slab, UNTOUCHED)
    unpack(pieces, packed.bytes[pieces[0].source :].clone(), destination)
    expected = torch.full_like(slab, UNTOUCHED)
    for piece in pieces:
        unpack([piece], packed.bytes[piece.source :].clone(), expected)
    assert (expected != UNTOUCHED).any()
    assert torch.equal(destination, expected)


def test_one_piece_that_does_not_fit_keeps_all_of_them_from_being_unpacked():
    slab, layout = slab_of(mixed_unit())
    packed = pack(slab, layout, SLOT, smallest=0)
    for pieces, staged, room in (
        (packed.pieces[::-1], packed.bytes, len(slab)),
        (packed.pieces, packed.bytes[: packed.pieces[-1].source + packed.pieces[-1].nbytes - 1], len(slab)),
        (packed.pieces, packed.bytes, packed.pieces[-1].stop - 1),
    ):
        destination = torch.full((room,), UNTOUCHED, dtype=torch.uint8)
        with pytest.raises(ValueError, match="piece"):
            unpack(pieces, staged, destination)
        assert (destination == UNTOUCHED).all()


def test_batches_hold_each_piece_once_and_fit_a_slot():
    pieces = round_trip(mixed_unit()).pieces
    found = batches(pieces, 2 * SLOT)
    assert [rank for first, last in found for rank in range(first, last)] == list(range(len(pieces)))
    assert len(found) < len(pieces)
    for first, last in found:
        end = pieces[last - 1].source + pieces[last - 1].nbytes
        assert end - pieces[first].source <= 2 * SLOT


def test_small_tensors_share_a_piece():
    tensors = [torch.ones(10 + i, dtype=torch.bfloat16) for i in range(20)]
    slab, layout = slab_of(tensors)
    (piece,) = pack(slab, layout, SLOT).pieces
    assert piece.format is None


def test_what_lies_between_tensors_does_not_change_the_packed_bytes():
    tensors = mixed_unit()
    slab, layout = slab_of(tensors)
    other = torch.zeros_like(slab)
    for region in layout.regions:
        other[region.offset : region.offset + region.nbytes] = slab[
            region.offset : region.offset + region.nbytes
        ]
    one, two = (pack(each, layout, SLOT, smallest=0) for each in (slab, other))
    assert torch.equal(one.bytes, two.bytes) and one.pieces == two.pieces


def test_a_region_whose_tensors_disagree_stays_as_it_is():
    whole = weights(30_000, torch.bfloat16)
    packed = round_trip([whole, whole.view(torch.float16)[:100]])
    assert {piece.format for piece in packed.pieces} == {None}


def test_a_region_at_an_odd_byte_stays_as_it_is():
    count = 30_000
    slab = torch.zeros(2 * count + 1, dtype=torch.uint8)
    layout = Layout(
        (Placement(1, torch.bfloat16, (count,), (1,)),), (Region(Span(0, 0, 2 * count), 1),), len(slab)
    )
    assert {piece.format for piece in pack(slab, layout, SLOT, smallest=0).pieces} == {None}


def test_regions_that_overlap_are_refused():
    regions = (Region(Span(0, 0, 64), 0), Region(Span(1, 0, 64), 32))
    with pytest.raises(ValueError, match="overlaps"):
        pack(torch.zeros(96, dtype=torch.uint8), Layout((), regions, 96), SLOT)


@pytest.mark.parametrize("slot", [0, 1000, LARGEST + 1])
def test_useless_slots_are_refused(slot):
    with pytest.raises(ValueError, match="slot"):
        pack(torch.zeros(0, dtype=torch.uint8), Layout((), (), 0), slot)


def test_tables_hold_the_most_frequent_exponents():
    counts = [0] * 256
    for rank, exponent in enumerate((120, 121, 119, 118, 122)):
        counts[exponent] = 1000 - rank
    table = choose_table(counts)
    assert table[:5] == (120, 121, 119, 118, 122) and len(set(table)) == ENTRIES


# --- hostile input ----------------------------------------------------------------------------------------


def good() -> tuple[dict, torch.Tensor, int]:
    slab, layout = slab_of(
        [weights(30_000, torch.bfloat16), torch.arange(9), weights(20_000, torch.float8_e5m2)]
    )
    packed = pack(slab, layout, SLOT, smallest=0)
    return to_json(packed.pieces), packed.bytes, layout.nbytes


def test_what_reaches_outside_is_refused():
    description, packed, nbytes = good()
    from_json(description, len(packed), nbytes)
    for wrong in (
        {"slab": [-2, 10]},
        {"slab": [10, 10]},
        {"slab": [0, 10**18]},
        {"slab": [0, nbytes + 2]},
        {"slab": [1, 61]},
        {"slab": [0.0, 60]},
        {"slab": [0]},
        {"source": 1},
        {"source": -256},
        {"source": len(packed) // 256 * 256 + 256},
        {"source": True},
        {"source": 2**62},
        {"format": "fp64"},
        {"format": None},
        {"format": ["bf16"]},
        {"rare": 2**40},
        {"rare": -1},
        {"exceptions": 2**40},
        {"exceptions": -1},
        {"exceptions": [5]},
        {"rare": 15_000, "exceptions": 15_001},
        {"table": [0] * (ENTRIES - 1)},
        {"table": [256] * ENTRIES},
        {"table": [-1] * ENTRIES},
        {"more": 1},
    ):
        broken = copy.deepcopy(description)
        broken["pieces"][0].update(wrong)
        with pytest.raises(ValueError):  # noqa: PT011
            from_json(broken, len(packed), nbytes)
    for broken in (None, [], {}, {"version": 1, "pieces": []}, {"version": True, "pieces": []}):
        with pytest.raises(ValueError):  # noqa: PT011
            from_json(broken, len(packed), nbytes)
    with pytest.raises(ValueError, match="fill"):
        from_json({"version": 2, "pieces": description["pieces"][:1] * 2}, len(packed), nbytes)
    with pytest.raises(ValueError, match="packed bytes"):
        from_json(description, len(packed) - 1024, nbytes)


@pytest.mark.parametrize(("rare", "exceptions"), [(-1, 0), (0, -1), (5001, 0), (0, 5001), (2500, 2501)])
def test_more_codes_than_elements_are_refused_whatever_bytes_there_are(rare, exceptions):
    table = tuple(range(ENTRIES))
    check([Piece(0, 2 * 5000, 0, "bf16", 2500, 2500, table)], 2**20, 2 * 5000)
    with pytest.raises(ValueError, match="too many for 5000 elements"):
        check([Piece(0, 2 * 5000, 0, "bf16", rare, exceptions, table)], 2**20, 2 * 5000)


def test_whatever_is_accepted_lies_inside():
    description, packed, nbytes = good()
    dice = random.Random(0)
    accepted = 0
    for _ in range(1500):
        broken = copy.deepcopy(description)
        for _ in range(dice.randint(1, 3)):
            entry = dice.choice(broken["pieces"])
            key = dice.choice(list(entry))
            if isinstance(entry[key], list):
                place = dice.randrange(len(entry[key]))
                step = dice.choice([-1, 1, 2, 4096, 8192, -8192, 2**31, -(2**63)])
                entry[key][place] = dice.choice([entry[key][place] + step, 0, dice.randrange(nbytes)])
            elif key == "source":
                entry[key] = dice.choice([0, entry[key] + 256, entry[key] - 256, len(packed)])
            elif key in ("rare", "exceptions"):
                step = dice.choice([-1, 1, 2, 8, 300, 2**31, -(2**63)])
                entry[key] = dice.choice([entry[key] + step, 0, dice.randrange(nbytes)])
            else:
                entry[key] = dice.choice(list(FORMATS))
        try:
            pieces = from_json(broken, len(packed), nbytes)
        except ValueError:
            continue
        accepted += 1
        room = torch.full((nbytes + 1024,), UNTOUCHED, dtype=torch.uint8)
        for piece in pieces:
            assert 0 <= piece.start < piece.stop <= nbytes
            assert 0 <= piece.source < piece.source + piece.nbytes <= len(packed)
            unpack([piece], packed[piece.source : piece.source + piece.nbytes], room[512:-512])
        assert (room[:512] == UNTOUCHED).all() and (room[-512:] == UNTOUCHED).all()
    assert accepted


@pytest.mark.usefixtures("always_coded")
@pytest.mark.parametrize("kind", ["plain", "constant", "patterns"])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_both_decoders_agree(name, kind, device):
    """That of the CPU, and that of devices which must not be waited for."""
    counts = (1, 3, BLOCK, 2 * BLOCK + 77)
    dtype = DTYPES[name]
    made = {
        "plain": [weights(count, dtype) for count in counts],
        "constant": [torch.ones(count).to(dtype) for count in counts],
        "patterns": [patterns(dtype)],
    }
    for tensor in made[kind]:
        slab, layout = slab_of([tensor], device)
        packed = pack(slab, layout, SLOT, smallest=0)
        assert packed.pieces
        for piece in (each for each in packed.pieces if each.format is not None):
            out = torch.zeros(piece.stop - piece.start, dtype=torch.uint8, device=device)
            decode_queued(piece, packed.bytes[piece.source :], out)
            assert torch.equal(out, slab[piece.start : piece.stop])


@pytest.mark.usefixtures("always_coded")
@pytest.mark.parametrize("chunk", [BLOCK, 64 * BLOCK])
@pytest.mark.parametrize("name", FORMAT_NAMES)
def test_corrupt_bytes_do_no_harm(name, chunk, device, monkeypatch):
    monkeypatch.setattr(decoder, "_CHUNK", chunk)
    slab, layout = slab_of([weights(2 * BLOCK + 11, DTYPES[name])], device)
    packed = pack(slab, layout, SLOT, smallest=0)
    dice = torch.Generator().manual_seed(0)
    for turn in range(8):
        if turn < 2:
            noise = torch.full((len(packed.bytes),), (0x00, 0xFF)[turn], dtype=torch.uint8)
        else:
            noise = torch.randint(0, 256, (len(packed.bytes),), dtype=torch.uint8, generator=dice)
        packed.bytes.copy_(noise)
        unpacked(packed)
        for piece in packed.pieces:
            out = torch.empty(piece.stop - piece.start, dtype=torch.uint8, device=device)
            decode_queued(piece, packed.bytes[piece.source :], out)


def test_what_does_not_fit_a_piece_is_refused():
    slab, layout = slab_of([weights(BLOCK * 4, torch.bfloat16)])
    packed = pack(slab, layout, SLOT, smallest=0)
    (piece,) = packed.pieces
    room = torch.zeros(len(slab) + 1, dtype=torch.uint8)
    for staged, destination in (
        (packed.bytes[: piece.nbytes - 1], slab),
        (packed.bytes, slab[:-1]),
        (packed.bytes.view(torch.int8), slab),
        (packed.bytes, slab.view(2, -1)),
        (packed.bytes, room[1:]),
        (torch.cat([packed.bytes, packed.bytes])[::2], slab),
    ):
        with pytest.raises(ValueError):  # noqa: PT011
            unpack([piece], staged, destination)
    for wrong in (slab[:-1], torch.cat([slab, slab])[16:], slab.view(torch.int8)):
        with pytest.raises(ValueError, match="slab"):
            pack(wrong, layout, SLOT)


def test_a_piece_knows_its_streams():
    piece = Piece(0, 2 * 5000, 0, "bf16", 100, 7, tuple(range(ENTRIES)))
    streams = piece.streams
    assert (streams.starts, streams.exceptions, streams.uppers) == (0, 128, 256)
    assert (streams.rare, streams.codes) == (384, 512)
    assert streams.rest == (512 + 1280,) and piece.nbytes == 512 + 1280 + 5008

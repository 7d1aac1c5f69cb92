"""The slab: any dtype, stride and aliasing goes in and comes out as it was."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from diffusers_offload import slab
from diffusers_offload.packing import pack
from diffusers_offload.streams import open_streams
from diffusers_offload.tiers.pinned import PinnedTier
from diffusers_offload.weights import Weights

DTYPES = [
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int8,
    torch.bool,
    torch.int64,
    torch.complex64,
    torch.float8_e4m3fn,
    torch.float64,
]

spans = st.lists(
    st.builds(
        lambda storage, start, length: slab.Span(storage, start, start + length),
        st.integers(1, 3),
        st.integers(0, 2000),
        st.integers(0, 700),
    ),
    max_size=12,
)


@given(spans)
def test_regions_are_aligned_disjoint_and_hold_every_span(given_spans):
    regions = slab.arrange(given_spans)
    end = 0
    for region in regions:
        assert region.offset % slab.ALIGNMENT == 0
        assert region.offset >= end
        end = region.offset + region.nbytes
    for span in given_spans:
        if span.start == span.stop:
            continue
        holding = [
            r
            for r in regions
            if r.span.storage == span.storage and r.span.start <= span.start and span.stop <= r.span.stop
        ]
        assert len(holding) == 1


@given(spans)
def test_no_byte_of_a_storage_is_stored_twice(given_spans):
    regions = slab.arrange(given_spans)
    for storage in {span.storage for span in given_spans}:
        covered = set()
        for span in given_spans:
            if span.storage == storage:
                covered |= set(range(span.start, span.stop))
        assert sum(r.nbytes for r in regions if r.span.storage == storage) == len(covered)


@st.composite
def tensors(draw):
    made = []
    for _ in range(draw(st.integers(1, 5))):
        dtype = draw(st.sampled_from(DTYPES))
        shape = draw(st.lists(st.integers(0, 5), max_size=3))
        full = torch.randint(0, 100, [2 * n for n in shape]).to(dtype)
        kind = draw(st.sampled_from(["plain", "slice", "transposed", "expanded", "tied"]))
        if kind == "plain":
            made.append(full.clone())
        elif kind == "slice":
            made.append(full[tuple(slice(None, None, 2) for _ in shape)])
        elif kind == "transposed":
            made.append(full.permute(tuple(reversed(range(full.dim())))))
        elif kind == "expanded":
            made.append(full.reshape(-1)[:1].expand(3, full.numel() and 1) if full.numel() else full)
        else:
            made += [full, full.view(full.shape)]
    return made


def host_memory(nbytes):
    return PinnedTier(open_streams(torch.device("cpu"))).allocate(nbytes)


def bits(tensor):
    flat = torch.empty(tensor.numel(), dtype=tensor.dtype)
    return flat.copy_(tensor.reshape(-1)).view(torch.uint8)


@given(tensors())
def test_tensors_come_back_with_bits_strides_and_dtypes(originals):
    expected = [t.clone() for t in originals]
    strides = [t.stride() for t in originals]
    held = [t.detach() for t in originals]
    weights = Weights(held)
    weights.move_to_host(host_memory(weights.nbytes))
    arena = torch.full((weights.nbytes + 256,), 255, dtype=torch.uint8)
    arena[256:].copy_(weights.host.bytes)
    weights.place(arena[256:])
    for step in (weights.bind, weights.unbind, weights.restore):
        step()
        for tensor, value, stride in zip(held, expected, strides, strict=True):
            assert tensor.stride() == stride
            assert tensor.dtype == value.dtype
            assert torch.equal(bits(tensor), bits(value))


def test_every_second_row_of_a_storage_keeps_its_stride():
    full = torch.randn(8, 6)
    odd, even = full[1::2], full[::2]
    layout = slab.lay_out([even, odd])
    assert len(layout.regions) == 1
    buffer = torch.empty(layout.nbytes, dtype=torch.uint8)
    slab.gather(layout, [even, odd], buffer)
    copies = slab.views(layout, buffer)
    assert [c.stride() for c in copies] == [even.stride(), odd.stride()]
    assert torch.equal(copies[0], even)
    assert torch.equal(copies[1], odd)


def test_tied_tensors_stay_tied():
    weight = torch.randn(4, 4)
    tied = [weight, weight[1:3]]
    held = [t.detach() for t in tied]
    weights = Weights(held)
    weights.move_to_host(host_memory(weights.nbytes))
    held[0][1, 0] = 7.0
    assert held[1][0, 0] == 7.0
    weights.restore()
    held[0][1, 0] = 8.0
    assert held[1][0, 0] == 8.0
    assert held[0].untyped_storage().data_ptr() == held[1].untyped_storage().data_ptr()


def test_what_cannot_be_laid_out_is_named():
    assert "meta" in slab.why_not(torch.empty(2, device="meta"))
    assert "sparse" in slab.why_not(torch.eye(2).to_sparse())
    assert "conj" in slab.why_not(torch.ones(2, dtype=torch.complex64).conj())
    assert slab.why_not(torch.ones(2)) is None


def test_small_tensors_lie_side_by_side_before_the_others():
    sizes = [40_000, 10, 70_000, 300, 33_000, 20]  # of float32
    layout = slab.lay_out([torch.randn(size) for size in sizes])
    offsets = [place.offset for place in layout.placements]
    assert sorted(range(6), key=offsets.__getitem__) == [1, 3, 5, 0, 2, 4]
    assert [region.nbytes < slab.SMALL for region in layout.regions] == [True] * 3 + [False] * 3


def test_a_unit_with_many_small_tensors_has_one_piece_that_is_not_coded():
    tensors = [torch.randn(n).bfloat16() * 0.02 for n in (90_000, 64, 100_000, 3000, 64, 80_000)]
    layout = slab.lay_out(tensors)
    buffer = torch.zeros(layout.nbytes, dtype=torch.uint8)
    slab.gather(layout, tensors, buffer)
    assert [piece.format for piece in pack(buffer, layout, 2**20).pieces] == [None, "bf16", "bf16", "bf16"]

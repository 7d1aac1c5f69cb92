"""The kernel that unpacks: interpreted on the CPU where there is Triton, and on a device where there is one."""

from __future__ import annotations

import os
import subprocess
import sys
import types
from pathlib import Path

import pytest
import torch
from packed_units import DTYPES, same_regions, slab_of, unpacked, weights

from diffusers_offload.packing import pack, prepare, unpack, unpacking

HERE = Path(__file__).parent
SLOT = 2**20


def test_the_interpreted_kernel_agrees_and_stays_inside():
    pytest.importorskip("triton")
    places = [str(HERE.parent), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    surroundings = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(places)}
    command = [sys.executable, str(HERE / "interpreted_kernel.py")]
    done = subprocess.run(command, env=surroundings, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.returncode}\n{done.stderr}"


def test_without_a_kernel_torch_operations_unpack(monkeypatch, caplog):
    """A device that should have a kernel, but where it cannot be compiled or gives something else."""
    slab, layout = slab_of([weights(50_000, torch.bfloat16)])
    packed = pack(slab, layout, SLOT, smallest=0)
    monkeypatch.setattr(unpacking, "_KERNEL_DEVICES", ("cpu",))
    unpacking.has_kernel.cache_clear()
    try:
        with caplog.at_level("WARNING"):
            assert same_regions(layout, slab, unpacked(packed))
            prepare(slab.device, packed.pieces)
    finally:
        unpacking.has_kernel.cache_clear()
    assert len([r for r in caplog.records if "torch operations do it" in r.getMessage()]) <= 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_kernel_is_used_and_takes_no_memory(name):
    pytest.importorskip("triton")
    device = torch.device("cuda", torch.cuda.current_device())
    assert unpacking.has_kernel(device, name)
    slab, layout = slab_of([weights(1_000_001, DTYPES[name]).to(device)], device)
    packed = pack(slab, layout, SLOT, smallest=0)
    destination = torch.zeros_like(slab)
    staged = [packed.bytes[piece.source : piece.source + piece.nbytes] for piece in packed.pieces]
    unpack(packed.pieces[:1], staged[0], destination)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for piece, each in zip(packed.pieces, staged, strict=True):
            unpack([piece], each, destination)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.max_memory_allocated(device) == before
    assert same_regions(layout, slab, destination)


@pytest.mark.gpu
@pytest.mark.parametrize("name", sorted(DTYPES))
def test_the_kernel_writes_to_any_address_of_an_element(name):
    pytest.importorskip("triton")
    slab, layout = slab_of([weights(100_001, DTYPES[name]).to("cuda")], "cuda")
    packed = pack(slab, layout, SLOT, smallest=0)
    shift = DTYPES[name].itemsize
    destination = torch.zeros(len(slab) + shift, dtype=torch.uint8, device="cuda")[shift:]
    unpack(packed.pieces, packed.bytes, destination)
    assert same_regions(layout, slab, destination)


@pytest.mark.gpu
def test_packing_needs_little_memory_of_its_own():
    count = 64 * 2**20
    slab = (torch.randn(count, device="cuda") * 0.02).bfloat16().view(torch.uint8)
    from diffusers_offload.slab import Layout, Placement, Region, Span

    place = Placement(0, torch.bfloat16, (count,), (1,))
    layout = Layout((place,), (Region(Span(0, 0, len(slab)), 0),), len(slab))
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    packed = pack(slab, layout, 16 * 2**20)
    own = torch.cuda.max_memory_allocated() - before - len(packed.bytes)
    asked_for = torch.cuda.memory_stats().get("requested_bytes.all.peak")  # blocks may be larger
    told = f"{before} bytes at first, peak of what was asked for {asked_for}, {torch.cuda.get_allocator_backend()}"
    assert own <= 8 * 24 * 2**20, told


def test_a_trial_without_memory_is_repeated(monkeypatch):
    def out_of_memory(device, name):
        raise torch.OutOfMemoryError("CUDA out of memory")

    trial = types.SimpleNamespace(agrees=out_of_memory)
    monkeypatch.setitem(sys.modules, "diffusers_offload.packing.trial", trial)
    device = torch.device("cuda", 7)
    with pytest.raises(torch.OutOfMemoryError):
        unpacking.has_kernel(device, "bf16")
    trial.agrees = lambda device, name: True
    assert unpacking.has_kernel(device, "bf16")
    unpacking.has_kernel.cache_clear()

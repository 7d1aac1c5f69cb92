"""How far weights shrink, and how fast they are packed and unpacked, against the bus of the same device.

python benchmarks/packing.py --device cuda --out benchmarks/results/packing
python benchmarks/packing.py --device cpu --width 512 --gib 0

The tensors of a FLUX block of each kind, again and again up to `--gib` for each unit, filled with random numbers of
several distributions in each dtype. GB/s count the bytes of the weights, not the packed ones. "loading" brings packed
weights from pinned host memory through two staging slots, one filled while the other is unpacked; "replayed" is
unpacking as a CUDA graph, without the host's time for each launch; "H2D" is the best rate of plain copies. Each rate is
the median of several runs.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from functools import partial
from importlib import import_module
from pathlib import Path
from statistics import median

import torch
from measure import GIB, MIB, h2d_rates, settle, step_times, synchronize
from models import CONFIGS, FAMILIES, STD

from diffusers_offload.packing import Packed, batches, pack, prepare, unpack
from diffusers_offload.packing.unpacking import by_torch, has_kernel
from diffusers_offload.slab import Layout, gather, lay_out

DTYPES = {
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp32": torch.float32,
    "fp8 e4m3fn": torch.float8_e4m3fn,
    "fp8 e5m2": torch.float8_e5m2,
}
E4M3_MOST = 448.0  # weights in e4m3 are scaled so that the largest is this
HEADER = (
    "dtype",
    "weights",
    "bits",
    "of raw",
    "coded",
    "pack",
    "unpack",
    "replayed",
    "torch ops",
    "loading",
    "equal",
)


def _normal(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=draw, device=draw.device) * STD


def _laplace(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    even = torch.rand(shape, generator=draw, device=draw.device) - 0.5
    return -STD * even.sign() * torch.log1p(-2 * even.abs().clamp(max=0.4999999))


def _uniform(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    return (torch.rand(shape, generator=draw, device=draw.device) * 2 - 1) * STD


def _channels(shape: torch.Size, draw: torch.Generator) -> torch.Tensor:
    """Normal, each output channel with a scale of its own: log-normal, sigma 0.5."""
    scale = torch.randn((shape[0], *(1 for _ in shape[1:])), generator=draw, device=draw.device)
    return _normal(shape, draw) * (scale * 0.5).exp()


WEIGHTS = {"normal": _normal, "Laplace": _laplace, "uniform": _uniform, "per channel": _channels}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--width", type=int, default=3072, help="of the blocks, a multiple of 128; FLUX: 3072"
    )
    parser.add_argument("--gib", type=float, default=1.0, help="bytes of a unit; at least one of each block")
    parser.add_argument("--slot-mib", type=int, default=16)
    parser.add_argument("--dtypes", default=",".join(DTYPES))
    parser.add_argument("--weights", default=",".join(WEIGHTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", help="writes OUT.json and OUT.md")
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type != "cpu" and device.index is None:
        device = torch.device(device.type, 0)
    rates = h2d_rates(device)
    rows = []
    with torch.no_grad():
        for dtype in arguments.dtypes.split(","):
            for weights in arguments.weights.split(","):
                rows.append(_row(dtype, weights, arguments, device))
                print(json.dumps(rows[-1]), flush=True)
    text = _table(rows, device, rates)
    print(text)
    if arguments.out:
        Path(arguments.out).parent.mkdir(parents=True, exist_ok=True)
        found = {"device": _name(device), "torch": torch.__version__, "h2d_gbs": rates, "rows": rows}
        Path(f"{arguments.out}.json").write_text(json.dumps(found, indent=1) + "\n")
        Path(f"{arguments.out}.md").write_text(text + "\n")


def _row(name: str, weights: str, arguments: argparse.Namespace, device: torch.device) -> dict[str, object]:
    slab, layout = _unit(arguments.width, int(arguments.gib * GIB), DTYPES[name], WEIGHTS[weights], device)
    slot = arguments.slot_mib * MIB
    rate = partial(_rate, nbytes=layout.nbytes, repeats=arguments.repeats, device=device)
    packed = pack(slab, layout, slot)
    prepare(device, packed.pieces)
    formats = {piece.format for piece in packed.pieces} - {None}
    destination = torch.zeros_like(slab)
    row = {
        "dtype": name,
        "weights": weights,
        "nbytes": layout.nbytes,
        "packed": len(packed.bytes),
        "bits": len(packed.bytes) / layout.nbytes * DTYPES[name].itemsize * 8,
        "coded": sum(p.stop - p.start for p in packed.pieces if p.format) / layout.nbytes,
        "pieces": len(packed.pieces),
        "kernel": bool(formats) and all(has_kernel(device, each) for each in formats),
        "unpack_gbs": rate(partial(_unpack_all, packed, destination)),
    }
    row["equal"] = _same(layout, slab, destination)
    destination.zero_()
    row["torch_gbs"] = rate(partial(_decode_all, packed, destination))
    row["equal"] = row["equal"] and _same(layout, slab, destination)
    if device.type == "cuda" and row["kernel"]:
        destination.zero_()
        row["replayed_gbs"] = rate(_recorded(partial(_unpack_all, packed, destination)))
        row["equal"] = row["equal"] and _same(layout, slab, destination)
    if device.type == "cuda":
        destination.zero_()
        row["loading_gbs"] = rate(_loading(packed, slot, destination, device))
        row["equal"] = row["equal"] and _same(layout, slab, destination)
    del destination
    row["pack_gbs"] = rate(partial(pack, slab, layout, slot))
    del packed, slab
    settle(device)
    return row


def _unit(
    width: int, nbytes: int, dtype: torch.dtype, fill: Callable, device: torch.device
) -> tuple[torch.Tensor, Layout]:
    """The slab of as many blocks' tensors as `nbytes` hold, and its layout."""
    module, name = FAMILIES["flux"]
    config = CONFIGS["full"]["flux"] | {
        "num_attention_heads": width // 128,
        "num_layers": 1,
        "num_single_layers": 1,
    }
    with torch.device("meta"):
        model = getattr(import_module(module), name)(**config)
    blocks = [model.transformer_blocks[0], model.single_transformer_blocks[0]]
    shapes = [p.shape for block in blocks for p in block.parameters()]
    each = sum(shape.numel() for shape in shapes) * dtype.itemsize
    draw = torch.Generator(device).manual_seed(0)
    tensors = []
    for shape in shapes * max(1, nbytes // each):
        numbers = fill(shape, draw)
        if dtype is torch.float8_e4m3fn:
            numbers *= E4M3_MOST / numbers.abs().max()
        tensors.append(numbers.to(dtype))
    layout = lay_out(tensors)
    slab = torch.zeros(layout.nbytes, dtype=torch.uint8, device=device)
    gather(layout, tensors, slab)
    return slab, layout


def _rate(run: Callable[[], object], nbytes: int, repeats: int, device: torch.device) -> float:
    run()
    milliseconds, _ = step_times(run, repeats, device)
    return nbytes / median(milliseconds) / 1e6


def _unpack_all(packed: Packed, destination: torch.Tensor) -> None:
    unpack(packed.pieces, packed.bytes, destination)


def _decode_all(packed: Packed, destination: torch.Tensor) -> None:
    for piece in packed.pieces:
        staged = packed.bytes[piece.source : piece.source + piece.nbytes]
        if piece.format is None:
            unpack([piece], staged, destination)
        else:
            by_torch(piece, staged, destination[piece.start : piece.stop])


def _recorded(run: Callable[[], None]) -> Callable[[], None]:
    """What `run` queues, without the host's part in it."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def _loading(
    packed: Packed, slot: int, destination: torch.Tensor, device: torch.device
) -> Callable[[], None]:
    """A load of all pieces from pinned memory: copies on one stream, unpacking on another, two slots between."""
    source = packed.bytes.cpu().pin_memory()
    slots = [torch.empty(slot, dtype=torch.uint8, device=device) for _ in range(2)]
    copying, unpacking = torch.cuda.Stream(device), torch.cuda.Stream(device)
    copied, free = ([torch.cuda.Event() for _ in slots] for _ in range(2))
    plan = batches(packed.pieces, slot)

    def load() -> None:
        caller = torch.cuda.current_stream(device)
        copying.wait_stream(caller)
        unpacking.wait_stream(caller)
        for turn, (first, last) in enumerate(plan):
            pieces = packed.pieces[first:last]
            start, stop = pieces[0].source, pieces[-1].source + pieces[-1].nbytes
            staged = slots[turn % 2]
            with torch.cuda.stream(copying):
                free[turn % 2].wait()
                staged[: stop - start].copy_(source[start:stop], non_blocking=True)
                copied[turn % 2].record()
            with torch.cuda.stream(unpacking):
                copied[turn % 2].wait()
                unpack(pieces, staged, destination)
                free[turn % 2].record()
        caller.wait_stream(unpacking)

    return load


def _same(layout: Layout, one: torch.Tensor, other: torch.Tensor) -> bool:
    synchronize(one.device)
    ends = [(region.offset, region.offset + region.nbytes) for region in layout.regions]
    return all(torch.equal(one[start:stop], other[start:stop]) for start, stop in ends)


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else str(device)


def _table(rows: list[dict], device: torch.device, rates: dict[str, float]) -> str:
    lines = [
        f"{_name(device)}, torch {torch.__version__}; H2D "
        + (f"{max(rates.values()):.1f} GB/s" if rates else "not measured")
        + "; rates in GB/s of weights",
        "",
        "| " + " | ".join(HEADER) + " |",
        "|---" * len(HEADER) + "|",
    ]
    for row in rows:
        unpacking = f"{row['unpack_gbs']:.1f}" + ("" if row["kernel"] else " (torch)")
        cells = (
            row["dtype"],
            row["weights"],
            f"{row['bits']:.2f}",
            f"{row['packed'] / row['nbytes']:.1%}",
            f"{row['coded']:.1%}",
            f"{row['pack_gbs']:.2f}",
            unpacking,
            f"{row['replayed_gbs']:.1f}" if "replayed_gbs" in row else "",
            f"{row['torch_gbs']:.2f}",
            f"{row['loading_gbs']:.1f}" if "loading_gbs" in row else "",
            "yes" if row["equal"] else "NO",
        )
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

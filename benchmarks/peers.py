"""The rows of other packages that stream weights: how each is enabled, and why with these settings (README.md).

They are asked for what our rows are: weights do not stay on the device, the output is that of the resident run, the
step as short as can be, then little memory. None of them is a dependency: a row whose package is missing says so.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

GIB = 2**30
_ALIVE: list[Any] = []  # what must outlive `enable`: a process runs one row


@dataclass(frozen=True)
class Enabled:
    """What a peer tells of itself once it is enabled.

    Attributes:
        moved_bytes: that cross the bus in a forward.
        found: versions, and what the settings came to, for the table.
        prepared_s: seconds spent before enabling, on what its users find done (compressed weights).
    """

    moved_bytes: int
    found: str
    prepared_s: float = 0.0


@dataclass(frozen=True)
class Peer:
    """One row of a peer.

    Attributes:
        enable: sets it up on a model.
        packages: modules that are imported ahead.
        settings: what is asked for, as the table says it.
        needs_streams: cannot run on the CPU.
        from_host: wants the weights on the host before `enable`.
    """

    enable: Callable[[nn.Module, torch.device], Enabled]
    packages: tuple[str, ...]
    settings: str
    needs_streams: bool = True
    from_host: bool = False


# --- diffusers-mm ---------------------------------------------------------------------------------------


def _diffusers_mm(model: nn.Module, device: torch.device) -> Enabled:
    manager = _manager("group_offload", model, device)
    return _applied(manager, model, device, _nbytes(model))


def _diffusers_mm_half(model: nn.Module, device: torch.device) -> Enabled:
    """`block_pin` with the number of blocks at which what stays is nearest to half of the weights."""
    block_pin = import_module("diffusers_mm.block_pin")
    name, blocks = block_pin.find_largest_block_list(model)
    other = block_pin.non_block_size_bytes(model, name)
    each = block_pin.per_block_size_bytes(blocks)
    count = min(len(blocks), max(0, round((_nbytes(model) / 2 - other) / each)))
    manager = _manager("block_pin", model, device)
    manager.set_block_pin_count("transformer", count)
    enabled = _applied(manager, model, device, (len(blocks) - count) * each)
    return Enabled(enabled.moved_bytes, f"{enabled.found}; {count} of {len(blocks)} {name} stay")


def _manager(strategy: str, model: nn.Module, device: torch.device) -> Any:
    diffusers_mm = import_module("diffusers_mm")
    manager = diffusers_mm.ModelManager(
        strategy=strategy,
        group_offload_use_stream=device.type != "cpu",
        group_offload_low_cpu_mem=False,
    )
    manager.register_component("transformer", model)
    _ALIVE.append(manager)
    return manager


def _applied(manager: Any, model: nn.Module, device: torch.device, moved: int) -> Enabled:
    strategy = manager.apply_offload_strategy(device)
    if not any(hasattr(module, "_diffusers_hook") for module in model.modules()):
        raise RuntimeError("diffusers-mm put no hook on the model: what it failed at is in its log")
    return Enabled(moved, f"diffusers-mm {version('diffusers-mm')}, strategy {strategy}")


# --- cache-dit ------------------------------------------------------------------------------------------


def _cache_dit(**window: Any) -> Callable[[nn.Module, torch.device], Enabled]:
    def enable(model: nn.Module, device: torch.device) -> Enabled:
        offload = import_module("cache_dit.offload")
        device = _indexed(device)
        for module in model.modules():  # it takes leaves; what lies beside them (Wan's tables) stays
            if any(True for _ in module.children()):
                for tensor in (*module.parameters(recurse=False), *module.buffers(recurse=False)):
                    tensor.data = tensor.data.to(device)
        handle = offload.layerwise_cpu_offload(
            model, onload_device=device, async_transfer=True, transfer_buckets=2, max_copy_streams=2, **window
        )
        _ALIVE.append(handle)
        moved = sum(target.prefetch_residency_bytes for target in handle.targets)
        return Enabled(moved, f"cache-dit {version('cache-dit')}, {len(handle.targets)} layers")

    return enable


# --- mmgp -----------------------------------------------------------------------------------------------


def _mmgp(model: nn.Module, device: torch.device) -> Enabled:
    offload = import_module("mmgp.offload")
    physical = import_module("psutil").virtual_memory().total
    keep_fp32(model)
    with redirect_stdout(sys.stderr):
        manager = offload.profile(
            {"transformer": model},
            import_module("mmgp").profile_type.HighRAM_LowVRAM,
            quantizeTransformer=False,
            convertWeightsFloatTo=None,
            # A share of the memory that the system has, which in a virtual machine may grow only when it is used.
            perc_reserved_mem_max=max(0.5, 2 * _nbytes(model) / physical),
        )
    torch.set_default_device(None)  # it leaves "cuda" behind, and inputs are drawn on the host
    _ALIVE.append(manager)
    staying = {
        "transformer",
        *(f"transformer/{name}" for name in manager.preloaded_blocks_per_model["transformer"]),
    }
    sizes = manager.blocks_of_modules_sizes
    moved = sum(nbytes for name, nbytes in sizes.items() if name not in staying)
    stays = sum(sizes.values()) - moved
    found = f"mmgp {version('mmgp')}, {len(sizes) - len(staying)} blocks stream, {stays / GIB:.2f} GiB stay"
    return Enabled(moved, f"{found}, {getattr(model, '_pinned_bytes', 0) / GIB:.1f} GiB pinned")


def keep_fp32(model: nn.Module) -> None:
    """Tell mmgp, by its own mark, which modules keep fp32: it refuses models of two dtypes otherwise.

    The mark on the model and its children keeps fp32 arguments, too: they would be rounded to bf16.
    """
    if len({parameter.dtype for parameter in model.parameters()}) < 2:
        return
    for module in (model, *model.children()):
        module._lock_dtype = torch.float32
    for module in model.modules():
        if any(parameter.dtype == torch.float32 for parameter in module.parameters(recurse=False)):
            module._lock_dtype = torch.float32


# --- dfloat11 -------------------------------------------------------------------------------------------


def _dfloat11(model: nn.Module, device: torch.device) -> Enabled:
    return import_module("dfloat11_row").enable(model, _indexed(device))


# --------------------------------------------------------------------------------------------------------


def _nbytes(model: nn.Module) -> int:
    return sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))


def _indexed(device: torch.device) -> torch.device:
    """With its number: some compare it with the device of a tensor."""
    return torch.device(device.type, 0) if device.type != "cpu" and device.index is None else device


_CACHE_DIT = "layerwise_cpu_offload, async_transfer=True, transfer_buckets=2, max_copy_streams=2"
PEERS = {
    "diffusers-mm": Peer(
        _diffusers_mm,
        ("diffusers_mm", "diffusers.hooks"),
        "strategy='group_offload' (leaf level), use_stream=True, low_cpu_mem=False",
        needs_streams=False,
    ),
    "diffusers-mm-half": Peer(
        _diffusers_mm_half,
        ("diffusers_mm", "diffusers.hooks"),
        "strategy='block_pin', so many blocks that about half of the bytes stay; use_stream=True, low_cpu_mem=False",
        needs_streams=False,
    ),
    "cache-dit": Peer(
        _cache_dit(max_inflight_prefetch_bytes=2 * GIB),
        ("cache_dit",),
        f"{_CACHE_DIT}, max_inflight_prefetch_bytes=2 GiB",
    ),
    "cache-dit-window": Peer(
        _cache_dit(prefetch_limit=True),
        ("cache_dit",),
        f"{_CACHE_DIT}, prefetch_limit=True (8 layers ahead)",
    ),
    "mmgp": Peer(
        _mmgp,
        ("mmgp.offload",),
        "profile HighRAM_LowVRAM (pinned, budget 1200 MB, asyncTransfers), no quantization, fp32 kept, all pinned",
        from_host=True,
    ),
    "dfloat11": Peer(
        _dfloat11,
        ("dfloat11_row",),
        "cpu_offload=True, pin_memory=True, every block; compressed ahead by dfloat11_writer.py",
    ),
}

"""What the simulated device computes: torch's CPU kernels, on the same bytes."""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import library
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from . import device as simulated

aten = torch.ops.aten
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)
_MATH = 0  # the way of attention that is made of other kernels
_kept: list[library.Library] = []  # a registration ends with its object


def register() -> None:
    """Take over all of torch's kernels for the device."""
    fallback = library.Library("_", "IMPL")
    fallback.fallback(_run, "PrivateUse1")
    own = library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel of torch's own is replaced
        own.impl("_has_compatible_shallow_copy_type", lambda a, b: True, "CompositeImplicitAutograd")
    own.impl("convolution_overrideable", _convolve, "PrivateUse1")  # whose own kernel says: override me
    _kept.extend((fallback, own))
    torch.empty = _pinning(torch.empty)
    torch.Tensor.is_pinned = lambda tensor: tensor.untyped_storage().data_ptr() in simulated.THE.pinned
    torch.tensor, torch.as_tensor = _by_way_of_the_host(torch.tensor), _by_way_of_the_host(torch.as_tensor)


def _pinning(empty: Callable) -> Callable:
    """`torch.empty` whose pinned memory is the simulator's."""

    @functools.wraps(empty)
    def pinning(*size: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        made = empty(*size, **options)
        if not pin_memory:
            return made
        storage = simulated.THE.allocate_pinned(made.numel() * made.element_size())
        return made.set_(storage, 0, made.shape, made.stride())

    return pinning


def _by_way_of_the_host(make: Callable) -> Callable:
    """`torch.tensor`, which cannot make a tensor of this device under a dispatch mode."""

    @functools.wraps(make)
    def made(data: Any, *, device: Any = None, **options: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "npu":
            return make(data, device=device, **options)
        return make(data, **options).to(device)

    return made


# --- memory under a tensor ------------------------------------------------------------------------------


def span_of(tensor: torch.Tensor) -> tuple[int, int, int] | None:
    """(address of its block, its first address, the one behind its last); None if it has no elements."""
    if tensor.numel() == 0:
        return None
    size = tensor.element_size()
    base = tensor.untyped_storage().data_ptr()
    start = base + tensor.storage_offset() * size
    reach = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return base, start, start + (reach + 1) * size


def _spans(tensors: list[torch.Tensor]) -> list[tuple[int, int, int]]:
    return [span for span in map(span_of, tensors) if span is not None]


def _on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """The same bytes as a tensor of the CPU's."""
    storage = tensor.untyped_storage()
    cpu = torch.device("cpu")
    if storage.nbytes() == 0:
        return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=cpu)
    alias = torch._C._construct_storage_from_data_pointer(storage.data_ptr(), cpu, storage.nbytes())
    empty = torch.empty(0, dtype=tensor.dtype, device=cpu)
    return empty.set_(alias, tensor.storage_offset(), tensor.shape, tensor.stride())


def _new(shape: Any, stride: Any, dtype: torch.dtype) -> torch.Tensor:
    """A tensor on the device, in memory of its own."""
    reach = sum((n - 1) * step for n, step in zip(shape, stride, strict=True)) if math.prod(shape) else -1
    storage = simulated.THE.allocate((reach + 1) * torch.empty(0, dtype=dtype).element_size())
    made = torch._C._acc.create_empty_tensor((0,), dtype)
    return aten.set_.source_Storage_storage_offset.redispatch(
        _CPU, made, storage, 0, tuple(shape), tuple(stride)
    )


# --- kernels --------------------------------------------------------------------------------------------


def _run(op: torch._ops.OpOverload, *args: Any, **kwargs: Any) -> Any:
    """What the dispatcher calls for every kernel of the device."""
    args = tuple(_as_declared(each, told) for each, told in zip(args, op._schema.arguments, strict=False))
    special = _SPECIAL.get(op)
    if special is not None:
        return special(*args, **kwargs)
    if _is_view(op):
        return op.redispatch(_CPU, *args, **kwargs)
    return _compute(op, args, kwargs)


def _as_declared(value: Any, argument: torch.Argument) -> Any:
    """A number that the dispatcher unwrapped, as the tensor that some kernels (`bitwise_and.Tensor`) insist on."""
    declared = str(argument.type) == "Tensor"
    return torch.tensor(value) if declared and isinstance(value, int) else value


def _compute(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Any:
    flat, structure = tree_flatten((args, kwargs))
    for each in flat:
        if _is_tensor(each) and not _is_ours(each) and each.dim() > 0:
            raise RuntimeError(
                f"{op}: expected all tensors to be on the same device, but found {each.device} and npu:0"
            )
    shapes = _shapes_of(op, flat, structure)
    if shapes is None:
        return _compute_now(op, flat, structure)
    result, fresh = shapes
    aliases = [_on_cpu(each) if _is_ours(each) else each for each in flat]
    targets = {at: _on_cpu(each) for at, each in fresh.items()}

    def work() -> None:
        computed = tree_flatten(_call(op, aliases, structure, "cpu"))[0]
        for at, target in targets.items():
            target.copy_(computed[at])

    given = [each for each in flat if _is_ours(each)]
    _launch(op, given, [*_mutated(op, args, kwargs), *fresh.values()], work)
    return result


def _compute_now(op: torch._ops.OpOverload, flat: list, structure: Any) -> Any:
    """How large the results are depends on the data, or on a generator: wait for the one, keep the other's order."""
    simulated.THE.current.synchronize()
    aliases = [_on_cpu(each) if _is_ours(each) else each for each in flat]
    computed, shape = tree_flatten(_call(op, aliases, structure, "cpu"))
    args, kwargs = tree_unflatten(flat, structure)
    given = [each for each in flat if _is_ours(each)]
    results = []
    for each in computed:
        own = [mine for mine, alias in zip(flat, aliases, strict=True) if alias is each]
        if _is_tensor(each) and not own:
            own = [_new(each.shape, each.stride(), each.dtype)]
            _on_cpu(own[0]).copy_(each)
        results.append(own[0] if own else each)
    _launch(op, given, [*_mutated(op, args, kwargs), *filter(_is_ours, results)], lambda: None)
    return tree_unflatten(results, shape)


def _shapes_of(
    op: torch._ops.OpOverload, flat: list, structure: Any
) -> tuple[Any, dict[int, torch.Tensor]] | None:
    """(the results, those of them that are fresh by position) before an op is computed; None if unknown."""
    unknown = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
    if any(isinstance(each, torch.Generator) for each in flat) or unknown & set(op.tags):
        return None
    key = (op, structure, *map(_described, flat))
    if key not in _OUTCOMES:
        found, grew = _outcome(op, flat, structure)
        if grew:  # which the next one like it will not
            return _made(found, flat)
        _OUTCOMES[key] = found
    return _made(_OUTCOMES[key], flat)


_OUTCOMES: dict[
    tuple, Any
] = {}  # by op and arguments' shapes: what `_outcome` said, which takes as long as the op


def _described(value: Any) -> tuple:
    """What of an argument the shapes of results follow from."""
    if _is_tensor(value):
        return torch.Tensor, tuple(value.shape), value.stride(), value.dtype
    return type(value), value


def _outcome(op: torch._ops.OpOverload, flat: list, structure: Any) -> tuple[Any, bool]:
    """(the results' structure, and for each the rank of the argument that it is, or what it looks like, or itself),
    None if unknown; and whether a result that was given grew."""
    metas = [
        torch.empty_strided(each.shape, each.stride(), dtype=each.dtype, device="meta")
        if _is_tensor(each)
        else each
        for each in flat
    ]
    try:
        leaves, shape = tree_flatten(_call(op, metas, structure, "meta"))
    except (NotImplementedError, RuntimeError):
        return None, False
    grew = False
    for own, meta in zip(flat, metas, strict=True):
        if _is_ours(own) and own.shape != meta.shape:
            _resize(own, meta.shape)
            grew = True
    told: list[tuple[str, Any]] = []
    for each in leaves:
        given = [rank for rank, meta in enumerate(metas) if meta is each]
        if given:
            told.append(("given", given[0]))
        elif _is_tensor(each):
            told.append(("fresh", (each.shape, each.stride(), each.dtype)))
        else:
            told.append(("told", each))
    return (shape, told), grew


def _made(outcome: Any, flat: list) -> tuple[Any, dict[int, torch.Tensor]] | None:
    if outcome is None:
        return None
    results, fresh = [], {}
    for at, (kind, each) in enumerate(outcome[1]):
        if kind == "fresh":
            fresh[at] = each = _new(*each)
        results.append(flat[each] if kind == "given" else each)
    return tree_unflatten(results, outcome[0]), fresh


def _call(op: torch._ops.OpOverload, flat: list, structure: Any, device: str) -> Any:
    there = [torch.device(device) if isinstance(each, torch.device) else each for each in flat]
    args, kwargs = tree_unflatten(there, structure)
    # torch hands a number over where the schema has a tensor (`bits & 255`), and does not take it back.
    args = [
        torch.tensor(value, device=device)
        if type(value) in (bool, int, float) and isinstance(argument.type, torch.TensorType)
        else value
        for value, argument in zip(args, op._schema.arguments, strict=False)
    ]
    with torch.no_grad():
        return op(*args, **kwargs)


def _launch(
    op: Any, reads: list, writes: list, work: Callable[[], None], rate: float = simulated.MEMORY
) -> None:
    spans = _spans(reads), _spans(writes)
    seconds = sum(stop - start for each in spans for _, start, stop in each) / rate
    simulated.THE.launch(*spans, work, str(op), seconds)


def _mutated(op: torch._ops.OpOverload, args: tuple, kwargs: dict) -> Iterator[torch.Tensor]:
    """What an op writes to, of what it is given."""
    for position, argument in enumerate(op._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            yield from filter(_is_tensor, value if isinstance(value, (list, tuple)) else (value,))


def _is_view(op: torch._ops.OpOverload) -> bool:
    returns = op._schema.returns
    return bool(returns) and any(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _is_ours(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.device.type == "npu"


# --- what is no kernel of the CPU's ---------------------------------------------------------------------


def _empty(size: Any, dtype: Any = None, memory_format: Any = None, **_: Any) -> torch.Tensor:
    like = torch.empty(
        size,
        dtype=dtype or torch.get_default_dtype(),
        device="meta",
        memory_format=memory_format or torch.contiguous_format,
    )
    return _new(like.shape, like.stride(), like.dtype)


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **_: Any) -> torch.Tensor:
    return _new(size, stride, dtype or torch.get_default_dtype())


def _copy_from(source: torch.Tensor, target: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
    """A copy on the current stream. From and to pageable memory it blocks the host, as on an NPU."""
    crosses = source.device != target.device
    host = None if not crosses else source if source.device.type == "cpu" else target
    read, written = ([_on_cpu(each) if _is_ours(each) else each] for each in (source, target))
    is_pinned = host is not None and host.untyped_storage().data_ptr() in simulated.THE.pinned
    tracked = [each for each in (source, target) if _is_ours(each) or is_pinned]

    def work() -> None:
        written[0].copy_(read[0])

    _launch(
        "copy",
        [each for each in tracked if each is source],
        [each for each in tracked if each is target],
        work,
        simulated.BUS if crosses else simulated.MEMORY,
    )
    if crosses and not (is_pinned and non_blocking):
        simulated.THE.current.synchronize()
    return target


def _item(tensor: torch.Tensor) -> Any:
    _launch("item", [tensor], [], lambda: None)
    simulated.THE.current.synchronize()
    return aten._local_scalar_dense(_on_cpu(tensor))


def _equal(a: torch.Tensor, b: torch.Tensor) -> bool:
    _launch("equal", [a, b], [], lambda: None)
    simulated.THE.current.synchronize()
    return torch.equal(_on_cpu(a), _on_cpu(b))


def _convolve(*args: Any) -> torch.Tensor:
    return _compute(aten.convolution.default, args, {})


def _resize(tensor: torch.Tensor, size: Any, memory_format: Any = None) -> torch.Tensor:
    made = _empty(size, tensor.dtype, memory_format)
    return aten.set_.source_Storage_storage_offset.redispatch(
        _CPU, tensor, made.untyped_storage(), 0, made.shape, made.stride()
    )


def _set(tensor: torch.Tensor, *source: Any) -> torch.Tensor:
    if len(source) == 1 and isinstance(source[0], torch.Tensor):
        other = source[0]
        source = (other.untyped_storage(), other.storage_offset(), other.shape, other.stride())
    return aten.set_.source_Storage_storage_offset.redispatch(_CPU, tensor, *source)


_SPECIAL: dict[Any, Callable[..., Any]] = {
    aten.empty.memory_format: _empty,
    aten.empty_strided.default: _empty_strided,
    aten._copy_from.default: _copy_from,
    aten._local_scalar_dense.default: _item,
    aten.equal.default: _equal,
    aten.resize_.default: _resize,
    aten.set_.source_Storage_storage_offset: _set,
    aten.set_.source_Tensor: _set,
    aten._fused_sdp_choice.default: lambda *_, **__: _MATH,
}


class HostWatch(TorchDispatchMode):
    """Tells the checker what the host itself does to pinned memory."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        pinned = simulated.THE.pinned
        if pinned and not _is_view(func):
            tensors = [each for each in tree_flatten((args, kwargs))[0] if isinstance(each, torch.Tensor)]
            if tensors and all(each.device.type == "cpu" for each in tensors):
                written = set(map(id, _mutated(func, args, kwargs)))
                for each in tensors:
                    span = span_of(each) if each.layout is torch.strided else None
                    if span is not None and span[0] in pinned:
                        simulated.THE.host_access(span[0], span[1:], id(each) in written, str(func))
        return func(*args, **kwargs)

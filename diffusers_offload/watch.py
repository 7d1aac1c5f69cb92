"""Notices weights that are used while their unit is not: by a parent, by another block, past a forward.

Some models read a block's weights without running the block (DiT takes the embedder of block 0 after its
loop). No inspection tells; the first forwards do. While they run, every torch call is looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .component import State, Unit

# What an unloaded weight answers correctly: what it is, not what it holds. `device` is not among them:
# who asks where a weight lies wants to compute there.
_METADATA = frozenset(
    [
        "shape",
        "dtype",
        "requires_grad",
        "layout",
        "ndim",
        "is_leaf",
        "grad",
        "grad_fn",
        "names",
        "itemsize",
        "nbytes",
        "_version",
        "is_sparse",
        "is_quantized",
        "is_meta",
        "size",
        "dim",
        "ndimension",
        "numel",
        "nelement",
        "element_size",
        "stride",
        "storage_offset",
        "is_contiguous",
        "is_floating_point",
        "is_complex",
        "is_inference",
        "is_conj",
        "is_neg",
        "is_signed",
        "is_pinned",
        "data_ptr",
        "untyped_storage",
        "_typed_storage",
        "__len__",
        "__hash__",
        "requires_grad_",
        "has_names",
        "is_set_to",
        "_is_view",
        "is_same_size",
        "__set__",
        "__delete__",
        "__repr__",
        "__format__",
    ]
)


class Watch(TorchFunctionMode):
    """Calls `found` with each watched tensor that a torch call uses, before it is used.

    Args:
        watched: whether a tensor is one to look at.
        found: makes the tensor usable.

    Attributes:
        strays: what was found.
    """

    def __init__(
        self, watched: Callable[[torch.Tensor], bool], found: Callable[[torch.Tensor], None]
    ) -> None:
        super().__init__()
        self._watched = watched
        self._found = found
        self.strays: list[torch.Tensor] = []

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        if _name(func) not in _METADATA:
            for tensor in _tensors((*args, *(kwargs or {}).values())):
                if self._watched(tensor):
                    self.strays.append(tensor)
                    self._found(tensor)
        return func(*args, **(kwargs or {}))


def watch_units(units: Iterable[Unit], move: Callable[[Unit, torch.Tensor], None]) -> Watch:
    """A watch over the tensors of `units`: calls `move` with those that are used while their unit is not."""
    unit_of = {id(tensor): unit for unit in units for tensor in unit.weights.tensors}

    def watched(tensor: torch.Tensor) -> bool:
        unit = unit_of.get(id(tensor))
        return unit is not None and unit.state not in (State.IN_USE, State.RESIDENT)

    return Watch(watched, lambda tensor: move(unit_of.pop(id(tensor)), tensor))


def _name(func: Any) -> str:
    """The name of a function or method, that of the attribute for a property that is read."""
    name = getattr(func, "__name__", "")
    return func.__self__.__name__ if name == "__get__" else name


def _tensors(values: Iterable[Any]) -> Iterator[torch.Tensor]:
    for value in values:
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)

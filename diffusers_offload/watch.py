"""Notices weights that are used while their unit is not: by a parent, by another block, past a forward.

Some models read a block's weights without running the block (DiT takes the embedder of block 0 after its
loop). No inspection tells; the first forwards do. While they run, every torch call is looked at.
"""

from __future__ import annotations

import functools
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from .component import State, Unit
from .units import FUSED

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
    """Calls `found` with the watched tensors that a torch call uses, all at once, before they are used.

    Args:
        watched: whether a tensor is one to look at.
        found: makes the tensors usable.
        seen_by: called with each tensor that `found` was called with, if the call's result looks at its bytes.
        roots: modules within which torch's attention layers are left alone (see `left_alone`).
        looked_at: whether a tensor is one whose views are remembered (see `views_left`).
    """

    def __init__(
        self,
        watched: Callable[[torch.Tensor], bool],
        found: Callable[[list[torch.Tensor]], None],
        seen_by: Callable[[torch.Tensor], None] = lambda tensor: None,
        roots: Iterable[nn.Module] = (),
        looked_at: Callable[[torch.Tensor], bool] = lambda tensor: False,
    ) -> None:
        super().__init__()
        self._looked_at = looked_at
        self._views: dict[int, tuple[weakref.ref[torch.Tensor], torch.Tensor]] = {}  # and what they look at
        self._roots = list(roots)
        self._left_alone = ExitStack()
        self._watched = watched
        self._found = found
        self._seen_by = seen_by

    def __enter__(self) -> Watch:
        for root in self._roots:
            self._left_alone.enter_context(left_alone(root))
        return super().__enter__()

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)
        self._left_alone.close()

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Mapping | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if _name(func) in _METADATA:
            return func(*args, **kwargs)
        strays = [tensor for tensor in _tensors((*args, *kwargs.values())) if self._watched(tensor)]
        if strays:
            self._found(strays)
        result = func(*args, **kwargs)
        self._remember_views((*args, *kwargs.values()), result)
        for tensor in strays:
            if any(_same_memory(tensor, each) for each in _tensors((result,))):
                self._seen_by(tensor)
        return result

    def views_left(self, tensors: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Those of `tensors` that a view taken while this watched still looks at."""
        wanted = {id(tensor) for tensor in tensors}
        self._views = {key: pair for key, pair in self._views.items() if pair[0]() is not None}
        origins = {id(origin): origin for _, origin in self._views.values()}
        return [origin for key, origin in origins.items() if key in wanted]

    def _remember_views(self, given: Iterable[Any], result: Any) -> None:
        for tensor in _tensors(given):
            view = self._views.get(id(tensor))
            origin = view[1] if view is not None and view[0]() is tensor else tensor
            if origin is tensor and not self._looked_at(tensor):
                continue
            for made in _tensors((result,)):
                if made is not tensor and made is not origin and _same_memory(tensor, made):
                    self._views[id(made)] = (weakref.ref(made), origin)


def watch_units(
    units: Iterable[Unit],
    use: Callable[[list[tuple[Unit, torch.Tensor]]], None],
    cling: Callable[[Unit], None] = lambda unit: None,
) -> Watch:
    """A watch over the tensors of `units`: calls `use` with those that are used while their unit is not.

    Args:
        cling: called with a unit whose bytes the result of such a use looks at.
    """
    units = list(units)
    unit_of = {id(tensor): unit for unit in units for tensor in unit.weights.tensors}
    roots = {id(unit.component): unit.component.module for unit in units}

    def watched(tensor: torch.Tensor) -> bool:
        unit = unit_of.get(id(tensor))
        if unit is None or unit.state is State.RESIDENT:
            return False
        if unit.state is not State.IN_USE:
            return True
        # On the device, but its own forward is not under way: only what its block holds itself may be used.
        opened = unit.opener is not None and id(tensor) not in unit.opened
        return unit.depth <= 0 and (opened or unit.clings or unit in unit.component.late)

    def in_use(tensor: torch.Tensor) -> bool:
        unit = unit_of.get(id(tensor))
        return unit is not None and unit.state is State.IN_USE

    return Watch(
        watched,
        found=lambda tensors: use([(unit_of[id(tensor)], tensor) for tensor in tensors]),
        seen_by=lambda tensor: cling(unit_of[id(tensor)]),
        roots=roots.values(),
        looked_at=in_use,
    )


@contextmanager
def left_alone(module: nn.Module) -> Iterator[None]:
    """Lets torch's attention layers within `module` run without a watch, which they would notice.

    Under a function mode they take another path, whose result may differ by a bit.
    """
    with ExitStack() as stack:
        for part in module.modules():
            if isinstance(part, (*FUSED, nn.TransformerEncoder)):
                stack.enter_context(_without_modes(part))
        yield


@contextmanager
def _without_modes(module: nn.Module) -> Iterator[None]:
    # Under a hook, what it wraps: the hook's own part may look on, and the forward may be under way already.
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward, shadowed = getattr(module, name), module.__dict__.get(name)

    @functools.wraps(forward)
    def alone(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunction():
            return forward(*args, **kwargs)

    setattr(module, name, alone)
    try:
        yield
    finally:
        if shadowed is None:
            delattr(module, name)
        else:
            setattr(module, name, shadowed)


def runs_within(modules: Iterable[nn.Module]) -> bool:
    """Whether the forward of one of `modules` is under way in this thread."""
    wanted = {id(module) for module in modules}
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "forward" and id(frame.f_locals.get("self")) in wanted:
            return True
        frame = frame.f_back
    return False


def _same_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    try:
        return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # no storage: nothing to look at
        return False


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

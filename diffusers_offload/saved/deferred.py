"""Loading a model without holding it: what a checkpoint's tensors are cast to is computed when it is asked for.

Diffusers and transformers look at a `.safetensors` file through a mapping, which costs no memory that the system
could not take back; casting to the dtype asked for is what fills it. `DeferredCasts` answers such a cast with memory
that nobody has touched yet, and remembers what belongs there. So their own loaders run as they are, with every rename,
conversion and tie, and `value_of` gives one tensor at a time.
"""

from __future__ import annotations

import mmap
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .holes import Holes

_AT_LEAST = 2**16  # bytes: what is smaller is cast at once
_CAST, _ITEM = torch.ops.aten._to_copy.default, torch.ops.aten._local_scalar_dense.default
_SAME_PLACE = (None, torch.device("cpu"))


class _Untouched(mmap.mmap):
    """Anonymous memory whose pages are there once somebody writes to them."""


@dataclass(frozen=True, eq=False)
class _Promise:
    """What belongs into memory that has not been touched.

    Attributes:
        source: what is to be cast; itself promised, or of a file.
        memory: not held: when nobody else does, it goes, and the promise with it.
    """

    source: torch.Tensor
    dtype: torch.dtype
    memory: weakref.ref[_Untouched]


class Promises:
    """What was promised and not computed yet. Leaving keeps all promises that somebody can still ask for.

    Attributes:
        computed: bytes of large tensors that were computed as a whole, since something asked for their values.
    """

    def __init__(self) -> None:
        self.computed = 0
        self._promises: dict[int, _Promise] = {}

    def __enter__(self) -> Promises:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: Any) -> None:
        if kind is None:  # or nobody gets what was loaded
            self.keep_all()

    def has(self, tensor: torch.Tensor) -> bool:
        """Whether the values of `tensor` are promised and no more."""
        return _address(tensor) in self._promises

    def value_of(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` with its values: itself, or computed anew and the caller's own. Safe in any thread."""
        promise = self._promises.get(_address(tensor))
        if promise is None:
            return tensor
        with torch.no_grad():
            whole = self.value_of(promise.source).to(promise.dtype)
        return whole.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())

    def copy_to(self, tensor: torch.Tensor, place: torch.Tensor) -> None:
        """Write the values of `tensor` to `place`, of the same shape and dtype. Safe in any thread."""
        promise = self._promises.get(_address(tensor))
        with torch.no_grad():
            if promise is not None and promise.source.shape == tensor.shape and tensor.is_contiguous():
                place.copy_(self.value_of(promise.source))  # cast on the way: nothing lies between
            else:
                place.copy_(self.value_of(tensor))

    def keep_all(self) -> None:
        """Fill all memory that was promised and that somebody still holds."""
        for address in list(self._promises):
            self._keep(address)

    def _keep(self, address: int) -> None:
        promise = self._promises.get(address)
        memory = promise.memory() if promise is not None else None
        if memory is None:
            return
        with torch.no_grad():
            whole = torch.frombuffer(memory, dtype=promise.dtype, count=promise.source.numel())
            whole.view(promise.source.shape).copy_(self.value_of(promise.source))
        self._promises.pop(address, None)
        self.computed += len(memory)

    def _promise(self, source: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        memory = _untouched(source.numel() * dtype.itemsize)
        result = torch.frombuffer(memory, dtype=dtype, count=source.numel()).view(source.shape)
        address = _address(result)
        gone = weakref.ref(memory, lambda _: self._promises.pop(address, None))
        self._promises[address] = _Promise(source.detach(), dtype, gone)
        return result


class DeferredCasts(TorchDispatchMode):
    """Within, casts of what a file holds are promised, and kept where something computes with them.

    Only this thread's casts are deferred.

    Args:
        holes: what is asked for, or cast, in these is zero, without a look at the file.
    """

    def __init__(self, promises: Promises, holes: Holes) -> None:
        super().__init__()
        self._kept = promises
        self._holes = holes
        self._files: dict[tuple[int, int], torch.Tensor] = {}  # held: or other memory may get the addresses

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is _CAST and _only_casts(args[0], kwargs):
            if self._can_wait(args[0], kwargs["dtype"]):
                return self._kept._promise(args[0], kwargs["dtype"])
            if self._holes.has(args[0].data_ptr()):
                return torch.zeros(args[0].shape, dtype=kwargs["dtype"])
        if func is _ITEM and args[0].dtype is torch.uint8 and self._holes.has(args[0].data_ptr()):
            return 0
        if self._kept._promises and not _only_looks(func):
            for tensor in _tensors_in(args, kwargs):
                self._kept._keep(_address(tensor))
        return func(*args, **kwargs)

    def _can_wait(self, source: torch.Tensor, dtype: torch.dtype) -> bool:
        large = source.numel() * dtype.itemsize >= _AT_LEAST
        return large and (self._kept.has(source) or self._is_of_a_file(source))

    def _is_of_a_file(self, tensor: torch.Tensor) -> bool:
        if lies_in(tensor, list(self._files)):
            return True
        address = _address(tensor)
        spans = [span for span in mapped_files() if span[0] <= address < span[1]]
        self._files.update((span, tensor.detach()) for span in spans)
        return bool(spans)


def _only_casts(source: torch.Tensor, kwargs: dict[str, Any]) -> bool:
    """Whether the result has the same values in the same order, and another dtype."""
    dtype = kwargs.get("dtype")
    return (
        dtype is not None
        and dtype != source.dtype
        and kwargs.get("device") in _SAME_PLACE
        and kwargs.get("layout") in (None, torch.strided)
        and kwargs.get("memory_format") in (None, torch.preserve_format, torch.contiguous_format)
        and not kwargs.get("pin_memory")
        and source.device.type == "cpu"
        and type(source) in (torch.Tensor, torch.nn.Parameter)
        and source.is_contiguous()
    )


def _only_looks(func: Any) -> bool:
    """Whether an operator reads no values: its results lie where its arguments do."""
    return func.is_view or func in _LOOKING


_LOOKING = (torch.ops.aten.detach.default, torch.ops.aten.alias.default, torch.ops.aten._unsafe_view.default)


def _tensors_in(*values: Any) -> Iterator[torch.Tensor]:
    for value in tree_leaves(values):
        if isinstance(value, torch.Tensor) and value.device.type == "cpu" and value.layout is torch.strided:
            yield value


def _address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _untouched(nbytes: int) -> _Untouched:
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    return _Untouched(-1, nbytes, flags=flags)


def mapped_files() -> list[tuple[int, int]]:
    """The addresses where this process looks at files; none where the system does not tell."""
    found = []
    try:
        with open("/proc/self/maps") as lines:
            for line in lines:
                words = line.split(maxsplit=5)
                if len(words) == 6 and words[4] != "0":  # the inode; the name of a blob has no suffix
                    start, _, stop = words[0].partition("-")
                    found.append((int(start, 16), int(stop, 16)))
    except OSError:
        pass
    return found


def lies_in(tensor: torch.Tensor, spans: Sequence[tuple[int, int]]) -> bool:
    """Whether the storage of `tensor` begins in one of `spans`."""
    address = _address(tensor)
    return any(start <= address < stop for start, stop in spans)

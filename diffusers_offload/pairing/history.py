"""Which calls of a module go together in a denoising step, and whether a call is the one that was expected.

A step calls the transformer once per guidance pass: with the same latents and timestep, and other prompt
embeddings, which are the very objects of the step before. So once a step has been seen, the first call of the
next one, the *lead*, tells what its *followers* are going to be. Tensors are known by identity, never by content,
but for small ones that are computed anew for each call (`timestep / 1000`).
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

_HELD = 64 * 2**10  # bytes of a tensor that is kept alive, so that its content can be compared later
_COMPARED = 16 * 2**20  # bytes of a tensor whose content is compared
_REMEMBERED = 16  # calls: twice as many as any step has
_ALIGNMENT = 64  # kernels may choose by it, and sum in another order
_VALUES = (type(None), bool, int, str, bytes, torch.dtype, torch.device, torch.Size, torch.memory_format)

Path = tuple  # of positions and keys, from the arguments to a leaf


class Unpairable(Exception):
    """A call cannot be foreseen; the message says why."""


class Leaf:
    """A tensor among the arguments, as it was: by weak reference, but for small ones."""

    __slots__ = ("_held", "_ref", "version")

    def __init__(self, tensor: torch.Tensor) -> None:
        self._ref = weakref.ref(tensor)
        self._held = tensor if tensor.nbytes <= _HELD else None
        self.version = tensor._version

    def tensor(self) -> torch.Tensor | None:
        """The tensor, or None if nobody has it any longer."""
        return self._ref()

    def is_(self, other: Leaf) -> bool:
        """Whether both are, or were, the same object: CPython gives one an only weak reference."""
        return self._ref is other._ref

    def intact(self) -> bool:
        """Whether it is still there, and nobody has written to it."""
        tensor = self._ref()
        return tensor is not None and tensor._version == self.version


class Call:
    """The arguments of one call: what they are apart from tensors' content (`spec`), and the tensors (`leaves`).

    Raises:
        Unpairable: there is something among them that cannot be known again.
    """

    def __init__(self, args: tuple, kwargs: Mapping[str, Any]) -> None:
        self.leaves: dict[Path, Leaf] = {}
        self.spec = self._describe((tuple(args), dict(kwargs)), ())

    def _describe(self, value: Any, path: Path) -> tuple:
        kind = type(value)
        if isinstance(value, torch.Tensor):
            described = describe(value)
            self.leaves[path] = Leaf(value)
            return described
        if kind in (list, tuple):
            return (kind, tuple(self._describe(item, (*path, i)) for i, item in enumerate(value)))
        if kind is dict:
            return (kind, tuple((key, self._describe(item, (*path, key))) for key, item in value.items()))
        if kind in _VALUES:
            return (kind, value)
        if kind is float:
            return (kind, value, repr(value))  # 0.0 == -0.0
        raise Unpairable(f"an argument is a {kind.__name__}")

    def intact(self) -> bool:
        """Whether nobody has written to its tensors since; one that is gone cannot have been."""
        return _intact(self.leaves)


def describe(tensor: torch.Tensor) -> tuple:
    """What a kernel may choose by, apart from content and alignment.

    Raises:
        Unpairable: one cannot tell when the tensor is written to, or it is of a class of its own.
    """
    if type(tensor) not in (torch.Tensor, torch.nn.Parameter) or tensor.layout is not torch.strided:
        raise Unpairable(f"an argument is a {type(tensor).__name__} of layout {tensor.layout}")
    if tensor.is_inference():
        raise Unpairable(
            "an argument was made in inference mode, which does not count how often it is written to"
        )
    flags = tensor.is_conj(), tensor.is_neg(), tensor.requires_grad, type(tensor)
    return (torch.Tensor, tuple(tensor.shape), tensor.stride(), tensor.dtype, tensor.device, flags)


@dataclass(frozen=True)
class Expected:
    """A call that is expected to follow a lead.

    Attributes:
        spec: of its arguments.
        leaves: its tensors; those of the lead where it is expected to get the same.
        shared: paths of these: a tensor of the same content will do there.
    """

    spec: tuple
    leaves: Mapping[Path, Leaf]
    shared: frozenset[Path]

    @property
    def shapes(self) -> tuple:
        """Of the tensors that are still there, in the order of the arguments."""
        tensors = (self.leaves[path].tensor() for path in sorted(self.leaves, key=repr))
        return tuple(tensor.shape for tensor in tensors if tensor is not None)

    def arguments(self) -> tuple[tuple, dict[str, Any]]:
        """What the module is to be called with, in containers of its own.

        Raises:
            Unpairable: a tensor is gone.
        """
        return self._build(self.spec, ())

    def _build(self, spec: tuple, path: Path) -> Any:
        kind = spec[0]
        if kind is torch.Tensor:
            tensor = self.leaves[path].tensor()
            if tensor is None:
                raise Unpairable("an argument is gone")
            return tensor
        if kind in (list, tuple):
            return kind(self._build(item, (*path, i)) for i, item in enumerate(spec[1]))
        if kind is dict:
            return {key: self._build(item, (*path, key)) for key, item in spec[1]}
        return spec[1]

    def intact(self) -> bool:
        """Whether nobody has written to its tensors since; one that is gone cannot have been."""
        return _intact(self.leaves)

    def is_met_by(self, call: Call) -> bool:
        """Whether `call` is this one: the very same objects, not written to since; waits for the device
        if the content of some has to be compared."""
        if call.spec != self.spec:
            return False
        compared = []
        for path, leaf in self.leaves.items():
            theirs = call.leaves[path]
            if leaf.is_(theirs):
                if leaf.version != theirs.version:
                    return False
            elif path in self.shared and leaf.intact():
                compared.append((leaf.tensor(), theirs.tensor()))
            else:
                return False
        return equal_bits(compared)


class History:
    """The latest calls of a module, and what they say of the next."""

    def __init__(self) -> None:
        self._calls: list[Call] = []

    def __len__(self) -> int:
        return len(self._calls)

    def add(self, call: Call) -> None:
        """`call` is made now."""
        self._calls.append(call)
        del self._calls[:-_REMEMBERED]

    def clear(self) -> None:
        """Forget them all."""
        self._calls.clear()

    def followers(self, call: Call) -> list[Expected]:
        """The calls that are going to follow `call`, which is about to be made, as far as they can be foreseen.

        Its counterpart one step earlier is the call that has the most of the very same tensors. Those made between
        the two had other ones there, but shared with the counterpart what has changed since.
        """
        at, most = None, 0
        for number in range(len(self._calls) - 1, -1, -1):  # the latest of those that have the most of them
            before = self._calls[number]
            if before.spec == call.spec and len(_kept(call, before)) > most:
                at, most = number, len(_kept(call, before))
        found = []
        for between in self._calls[at + 1 :] if at is not None else ():
            expected = _expect(call, self._calls[at], between)
            if expected is None:
                break
            found.append(expected)
        return found


def _intact(leaves: Mapping[Path, Leaf]) -> bool:
    return all(leaf.tensor() is None or leaf.intact() for leaf in leaves.values())


def _kept(call: Call, before: Call) -> set[Path]:
    return {path for path, leaf in call.leaves.items() if leaf.is_(before.leaves[path])}


def _expect(lead: Call, before: Call, between: Call) -> Expected | None:
    """The call that is to `lead` what `between` was to `before`; None if that cannot be said."""
    kept = _kept(lead, before)
    leaves, shared, compared = {}, set(), []
    together = kept == set(lead.leaves)
    for path, leaf in between.leaves.items():
        theirs = before.leaves.get(path)
        if theirs is not None and leaf.is_(theirs):
            together |= path not in kept
            shared.add(path)
        elif path in lead.leaves and path not in kept:  # it changes from step to step
            shared.add(path)
            if not (leaf.intact() and theirs.intact()):
                return None
            compared.append((leaf.tensor(), theirs.tensor()))
        elif (tensor := leaf.tensor()) is not None:
            leaves[path] = Leaf(tensor)
        else:
            return None
    for path in shared:
        leaves[path] = lead.leaves[path]
    if not together or not equal_bits(compared):
        return None
    return Expected(between.spec, leaves, frozenset(shared))


def equal_bits(pairs: list[tuple[torch.Tensor, torch.Tensor]]) -> bool:
    """Whether the tensors of each pair are of one kind and hold the same bits; waits for the device once."""
    differ: dict[torch.device, list[torch.Tensor]] = {}
    for one, other in pairs:
        alike = one.shape == other.shape and one.stride() == other.stride() and one.dtype == other.dtype
        alike = alike and one.device == other.device and one.is_conj() == other.is_conj()
        alike = alike and one.is_neg() == other.is_neg()
        if not alike or (one.data_ptr() - other.data_ptr()) % _ALIGNMENT:
            return False
        if one.nbytes > _COMPARED or one.dtype.is_complex:
            return False
        if one.numel():
            differ.setdefault(one.device, []).append((_bits(one) != _bits(other)).any())
    return not any(torch.stack(flags).any().item() for flags in differ.values())


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def tensors_in(value: Any) -> Iterator[torch.Tensor]:
    """The tensors that a forward returned.

    Raises:
        Unpairable: there may be others in it.
    """
    if isinstance(value, torch.Tensor):
        describe(value)
        yield value
    elif isinstance(value, Mapping):
        for item in value.values():
            yield from tensors_in(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors_in(item)
    elif not isinstance(value, (*_VALUES, float)):
        raise Unpairable(f"it returns a {type(value).__name__}")


def same_results(one: Any, other: Any) -> bool:
    """Whether two forwards returned the same bits."""
    ours, theirs = list(tensors_in(one)), list(tensors_in(other))
    if type(one) is not type(other) or len(ours) != len(theirs):
        return False
    differ = []
    for a, b in zip(ours, theirs, strict=True):
        if describe(a) != describe(b):
            return False
        if a.numel():
            differ.append((_bits(a.resolve_conj()) != _bits(b.resolve_conj())).any().cpu())
    return not any(differ)


def share_memory(ones: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
    """Whether a tensor of `ones` lies in the storage of one of `others`."""
    storages = {each.untyped_storage().data_ptr() for each in others if each.numel()}
    return any(each.untyped_storage().data_ptr() in storages for each in ones if each.numel())

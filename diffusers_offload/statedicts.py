"""`state_dict()`, and so `save_pretrained()`, of a component whose units are packed: true values in place of NaN."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from . import slab
from .component import Component, State
from .engine import Engine
from .tiers.packedmemory import PackedMemory
from .units import own_tensors


class TrueStates:
    """Hooks on the modules that hold packed weights.

    What comes out has memory of its own. Where the very tensors are asked for (`keep_vars=True`), nothing is done.
    """

    def __init__(self, engine: Engine, component: Component) -> None:
        self._engine = engine
        self._unit_of = {id(t): unit for unit in component.streamed for t in unit.weights.tensors}
        self._latest: _Unpacked | None = None

        def fill_in(*args: Any) -> None:  # torch marks the function, which it cannot do to a method
            self._fill_in(*args)

        self._handles = [
            module.register_state_dict_post_hook(fill_in)
            for module in component.module.modules()
            if any(id(tensor) in self._unit_of for tensor in own_tensors(module))
        ]

    def detach(self) -> None:
        """Take the hooks off."""
        for handle in self._handles:
            handle.remove()

    def _fill_in(self, module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        with self._engine.lock:
            for name, tensor in (*module._parameters.items(), *module._buffers.items()):
                unit = self._unit_of.get(id(tensor))
                if unit is None or unit.state is State.IN_USE or state.get(prefix + name, tensor) is tensor:
                    continue
                host = unit.weights.host
                if isinstance(host, PackedMemory) and host.is_blank(tensor):
                    index = next(i for i, each in enumerate(unit.weights.tensors) if each is tensor)
                    state[prefix + name] = slab.views(
                        unit.weights.layout, self._raw(host, unit.nbytes, state)
                    )[index]

    def _raw(self, host: PackedMemory, nbytes: int, state: dict[str, Any]) -> torch.Tensor:
        """A unit's slab, once for all of its tensors that one `state` comes to hold one after the other."""
        latest = self._latest
        if latest is not None and latest.host() is host and latest.state() is state:
            storage = latest.storage()
            if storage is not None:
                with torch.inference_mode(False):
                    return torch.empty(0, dtype=torch.uint8, device="cpu").set_(storage)
        data = self._engine.packed.raw(host, nbytes)
        self._latest = None
        if isinstance(state, OrderedDict):  # another kind, given by the user, cannot be referred to
            self._latest = _Unpacked(*map(weakref.ref, (host, state, data.untyped_storage())))
        return data


@dataclass(frozen=True)
class _Unpacked:
    """The slab that was unpacked last: from what, for what state, and to where."""

    host: weakref.ref[PackedMemory]
    state: weakref.ref[OrderedDict]
    storage: weakref.ref[torch.UntypedStorage]

"""The tensors of one unit, and which bytes they are bound to: the host's, the device's, or their own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from . import slab
from .log import logger
from .tiers.pinned import HostMemory


class Weights:
    """Parameters and buffers that move as a whole.

    The tensors themselves are never replaced, only what they point at (`tensor.data`), so whoever holds
    one sees true values at any time: on the host while offloaded, on the device while bound.

    Args:
        tensors: distinct tensors, of any dtype and stride.
        writers: for the id of a tensor, the module that writes to it without counting while it trains.
    """

    def __init__(
        self, tensors: Sequence[torch.Tensor], writers: Mapping[int, torch.nn.Module] | None = None
    ) -> None:
        self.tensors = list(tensors)
        self.writers = writers or {}
        self._silent = [(i, self.writers[id(t)]) for i, t in enumerate(self.tensors) if id(t) in self.writers]
        self.layout = slab.lay_out(self.tensors)
        self.nbytes = self.layout.nbytes
        self.host: HostMemory | None = None
        self.moved = False
        self.origin = [tensor.device for tensor in self.tensors]
        self._host_views: list[torch.Tensor] = []
        self._host_addresses: list[int] = []
        self._device_views: list[torch.Tensor] = []
        self._place: torch.Tensor | None = None
        # Tensors made in inference mode do not count how often they were written to: buffers among them
        # are taken to be written in every use.
        self._uncounted = [
            i
            for i, t in enumerate(self.tensors)
            if t.is_inference() and not isinstance(t, torch.nn.Parameter)
        ]
        self._counting = [tensor for tensor in self.tensors if not tensor.is_inference()]
        self._versions: list[int] = []
        self._written: set[int] = (
            set()
        )  # tensors that units wrote to: the host's bytes are newer than a file's

    def lay_out_anew(self) -> None:
        """Before they are moved: somebody has pointed the tensors elsewhere since they were taken in."""
        self.layout = slab.lay_out(self.tensors)
        self.nbytes = self.layout.nbytes

    def move_to_host(self, host: HostMemory, filled: bool = False) -> None:
        """Copy the tensors from where they are into `host` and let go of where they were.

        Args:
            filled: it holds them already.
        """
        if not filled:
            slab.gather(self.layout, self.tensors, host.bytes)
        self.moved = True
        self.stay_on_host(host)

    def stay_on_host(self, host: HostMemory) -> None:
        """Take the tensors as they lie: `host` holds them in the order of the layout, and goes on doing so."""
        views = host.views(self.layout)
        self.host, self._host_views = host, views
        self._point_at(views)
        self._host_addresses = [tensor.data_ptr() for tensor in self.tensors]
        self._versions = self._count_writes()

    def reveal(self, host: HostMemory, stands_in: torch.Tensor) -> None:
        """`host` holds the slab as it is from now on; tensors that somebody replaced stay replaced.

        Args:
            stands_in: for the slab until now (uint8). A tensor that looks at another place of it, or in another way
                (`weight.data = weight.data.t()`), looks at the slab like that.
        """
        storage = stands_in.untyped_storage().data_ptr()
        for tensor, blind, place in zip(self.tensors, self._host_views, self.layout.placements, strict=True):
            if tensor.untyped_storage().data_ptr() == storage:
                offset = tensor.data_ptr() - stands_in.data_ptr()
            elif tensor.data_ptr() == blind.data_ptr():
                offset = place.offset
            else:
                continue
            there = slab.Placement(offset, tensor.dtype, tuple(tensor.shape), tensor.stride())
            (tensor.data,) = slab.views(slab.Layout((there,), (), 0), host.bytes)
        views = host.views(
            self.layout
        )  # last: whoever is interrupted before finds what stood in, and begins again
        self.host, self._host_views, self._host_addresses = host, views, [view.data_ptr() for view in views]

    def move_to_device(self, buffer: torch.Tensor) -> None:
        """Copy the tensors from where they are into `buffer` and stay there; the host keeps nothing."""
        slab.gather(self.layout, self.tensors, buffer)
        self.place(buffer)
        self._point_at(self._device_views)
        self.moved = True

    def place(self, buffer: torch.Tensor | None) -> None:
        """From now on `bind` points the tensors into `buffer` (uint8, on the device); None: nowhere."""
        if buffer is not self._place:  # a unit that returns to its home finds its views there
            self._device_views = slab.views(self.layout, buffer) if buffer is not None else []
            self._place = buffer

    def bind(self) -> None:
        """Point the tensors at the device bytes."""
        self._point_at(self._device_views)

    def unbind(self) -> list[int]:
        """Point the tensors at the host bytes; returns which of them were written to while bound."""
        versions = self._count_writes()
        self._point_at(self._host_views)
        silent = [i for i, writer in self._silent if writer.training] + self._uncounted
        if versions == self._versions:
            return silent
        self._versions, earlier = versions, self._versions
        pairs = zip(self._counting, versions, earlier, strict=True)
        written = {id(tensor) for tensor, now, before in pairs if now != before}
        return [i for i, tensor in enumerate(self.tensors) if id(tensor) in written] + silent

    def write_back(self, changed: Sequence[int]) -> None:
        """Queue, on the current stream, the copies of `changed` from the device to the host."""
        self._written.update(changed)
        for i in changed:
            self._host_views[i].copy_(self._device_views[i], non_blocking=True)

    def renew_written(self) -> None:
        """Queue, on the current stream, the copies to the device of what `write_back` ever brought from there.

        For who loads the rest from a file, which does not have it.
        """
        for i in self._written:
            self._device_views[i].copy_(self._host_views[i], non_blocking=True)

    @property
    def written_bytes(self) -> int:
        """Of tensors that `write_back` brought to the host."""
        return sum(self.tensors[i].nbytes for i in self._written)

    def written_pages(self, size: int) -> set[int]:
        """Of the host's pages of `size` bytes, the numbers of those that these tensors lie in."""
        views = [self._host_views[i] for i in self._written]
        spans = ((view.data_ptr(), view.data_ptr() + slab.span_of(view).nbytes) for view in views)
        return {page for start, stop in spans for page in range(start // size, -(-stop // size))}

    def is_intact(self) -> bool:
        """Whether the unbound tensors still point at the host bytes: false after `tensor.data = ...`."""
        return self._host_addresses == [tensor.data_ptr() for tensor in self.tensors]

    def is_in_place(self, on_device: bool) -> bool:
        """Whether the tensors point at the bytes on the device, or on the host, that they were given."""
        views = self._device_views if on_device else self._host_views
        return not views or all(
            tensor.data_ptr() == view.data_ptr() for tensor, view in zip(self.tensors, views, strict=True)
        )

    def is_undisturbed(self) -> bool:
        """Whether the tensors point where they were moved, on the host or to stay on the device."""
        if self.host is None and not self._device_views:  # not moved, or there already
            return True
        in_place = self.is_intact() if self.host is not None else not self.was_replaced()
        return in_place and self.keeps_layout()

    def keeps_layout(self) -> bool:
        """Whether each tensor has the shape, strides and dtype with which it was taken in.

        `tensor.data = tensor.data.t()` changes them and no address.
        """
        views = self._host_views or self._device_views
        return not views or all(
            tensor.dtype == view.dtype and tensor.shape == view.shape and tensor.stride() == view.stride()
            for tensor, view in zip(self.tensors, views, strict=True)
        )

    def was_replaced(self) -> bool:
        """Whether the bound tensors point elsewhere than they were bound to: after `tensor.data = ...`."""
        return any(
            tensor.data_ptr() != view.data_ptr()
            for tensor, view in zip(self.tensors, self._device_views, strict=True)
        )

    def edited(self) -> list[torch.Tensor]:
        """The tensors that were written to since they were last bound, or noted, as far as that is counted."""
        pairs = zip(self._counting, self._versions, strict=True)
        return [tensor for tensor, before in pairs if tensor._version != before]

    def replaced(self) -> list[torch.Tensor]:
        """The unbound tensors that do not look at the host bytes any more."""
        pairs = zip(self.tensors, self._host_addresses, strict=True)
        return [tensor for tensor, address in pairs if tensor.data_ptr() != address]

    def note_edits(self) -> bool:
        """Whether the unbound tensors were replaced or written to since they were last bound, or noted.

        What is written now goes to the host bytes, so it is no write of the device's.
        """
        versions, self._versions = self._versions, self._count_writes()
        return versions != self._versions or not self.is_intact()

    def restore(self) -> None:
        """Give the tensors storage of their own again, on the devices they came from.

        If there is no memory for that, those that are on their device already keep the memory that they share.

        Raises:
            RuntimeError: another device has no room; nothing has changed.
        """
        if self.moved:
            try:
                self._point_at(slab.separate([tensor.data for tensor in self.tensors], self.origin))
            except (RuntimeError, MemoryError) as error:
                if any(t.device != where for t, where in zip(self.tensors, self.origin, strict=True)):
                    raise
                logger.warning("weights stay in the memory that they were offloaded to: %s", str(error))
            self.moved = False
        self.place(None)
        self.host, self._host_views = None, []
        self._written.clear()

    def _count_writes(self) -> list[int]:
        return [tensor._version for tensor in self._counting]

    def _point_at(self, views: Sequence[torch.Tensor]) -> None:
        for tensor, view in zip(self.tensors, views):  # noqa: B905 (the same length by construction; this is hot)
            tensor.data = view

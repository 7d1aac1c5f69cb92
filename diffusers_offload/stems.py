"""Stems: what of a component lies in no unit comes when it runs, and leaves with it."""

from __future__ import annotations

from contextlib import ExitStack

from .component import Component, State, Unit
from .streams import Streams
from .transfers import Transfers


class Stems:
    """Brings stems to the device and sends them away.

    Args:
        streams: the device's streams.
        transfers: queues the copies.
    """

    def __init__(self, streams: Streams, transfers: Transfers) -> None:
        self._streams = streams
        self._transfers = transfers

    def bring(self, component: Component) -> None:
        """The stem of `component` is there for what is queued on the current stream from now on."""
        if not component.present:
            component.present = True  # from here on, whatever happens, sending it away undoes what was done
            try:
                for unit in component.stem:
                    self.bring_unit(unit)
            except BaseException:  # half a stem is none
                self.send_away(component)
                raise
        stream = self._streams.current()
        if stream not in component.users:
            for unit in component.stem:
                stream.wait_event(unit.ready)
            component.users.append(stream)

    def bring_unit(self, unit: Unit) -> None:
        if not unit.weights.is_intact():
            self._transfers.take_over(unit)
        self._transfers.load(unit, self._transfers.allocate(unit.nbytes))
        unit.weights.bind()
        unit.state = State.IN_USE

    def send_away(self, component: Component) -> int:
        """The stem leaves behind everybody who used it; returns the bytes that become free."""
        load, freed = self._streams.load, 0
        for stream in component.users:
            load.wait_stream(stream)
        component.users.clear()
        component.present = False
        with ExitStack() as leaving:  # all of it, even if a piece fails
            for unit in component.stem:
                if unit.state is State.IN_USE:
                    leaving.callback(self._send_unit_away, unit)
                    freed += unit.nbytes
        return freed

    def _send_unit_away(self, unit: Unit) -> None:
        unit.state = State.OFFLOADED
        if unit.weights.was_replaced():
            self._transfers.take_over(unit)
            return
        changed = unit.weights.unbind()
        try:
            if changed:
                self._transfers.write_back(unit, changed, self._streams.load)
        finally:
            unit.weights.place(None)

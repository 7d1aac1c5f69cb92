"""The engine: loads units before they are needed, binds them while they compute, lets them go.

Deciding is done elsewhere (`order`, `arena`, `budget`, `turns`), loading ahead in `loads`, copying in `transfers`. What
makes each step safe:

- a unit computes after its *ready* event (recorded on `load` behind its copy);
- a unit is overwritten after the *done* event of its last use (recorded on the stream that used it);
- device memory is dropped only once `load` waits for its last users (see `transfers`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from threading import RLock
from typing import TYPE_CHECKING, Any

import torch

from .arena import Arena
from .component import WAITING, Component, State, Unit
from .homes import Homes
from .keeping import Keeping
from .learning import Learning
from .loads import Loads
from .planning.budget import DeviceBudget
from .report import Counters
from .roster import Roster
from .stems import Stems
from .streams import Streams
from .transfers import Transfers
from .turns import Turns

if TYPE_CHECKING:
    from .pairing.passes import Passes
    from .policy import Storage
    from .tiers.disk import DiskTier
    from .tiers.packed import PackedTier

_EMPTY_CACHE_FROM = 64 * 2**20  # bytes worth a cudaFree once a component has left


class Engine:
    """Moves the units of some components through one arena on one device."""

    def __init__(
        self,
        streams: Streams,
        budget: DeviceBudget | None = None,
        storage: Storage | None = None,
        host_limit: int | None = None,
        pair_passes: bool | None = None,
    ) -> None:
        self.pair_passes = pair_passes  # whether passes of a step run for one load; None: where that gains
        self.passes: Passes | None = None  # those that take turns now
        self.streams = streams
        self.device = streams.device
        self.counters = Counters(streams=streams)
        self.lock = RLock()  # held by one thread for a forward, a unit's use or a call of the pipeline
        self._transfers = Transfers(streams, self.counters, storage, host_limit)
        self._stems = Stems(streams, self._transfers)
        self.homes = Homes(self._transfers.allocate, self._clear)
        self.loads = Loads(streams, self._transfers, self.homes)
        self._learning = Learning(lambda unit: self._acquire(unit, opening=True), self._finish)
        self._lingers: Unit | None = None  # a floating unit that was used and is about to be used again
        self._stack: list[Component] = []  # forwards under way, outermost first
        self._outside: Any = None  # what was current before the outermost forward
        self._turns = Turns()
        self.roster = Roster(
            streams,
            self._transfers,
            self._stems,
            self.homes,
            self.lock,
            clear=self._clear,
            withdraw=self._withdraw,
            forget=self._forget,
        )
        self.keeping = Keeping(budget, streams, self.roster, self.homes, self.disk, self.packed, self.loads)
        self._using: list[Unit] = []  # whose forwards are under way, innermost last
        self._random: Any = None  # the generators' state when the outermost forward began
        self.suspended: set[torch.nn.Module] = set()  # components that are being edited, and must not run

    @property
    def budget(self) -> DeviceBudget | None:
        """What bounds the memory of the device, if anybody does."""
        return self.keeping.budget

    @property
    def disk(self) -> DiskTier | None:
        """Where weights are kept on disk, if any may be."""
        return self._transfers.disk

    @property
    def packed(self) -> PackedTier:
        """Packs weights, where that is asked for."""
        return self._transfers.packed

    @property
    def components(self) -> list[Component]:
        return self.roster.components

    @property
    def arena(self) -> Arena:
        return self.homes.arena

    @property
    def units(self) -> list[Unit]:
        """The streamed units, by number."""
        return self.homes.units

    # --- the component's forward --------------------------------------------------------------------

    @contextmanager
    def call(self) -> Iterator[None]:
        """A call of the pipeline: other threads wait, and what came for it leaves, however it ends."""
        with self.lock:
            under_way, using = len(self._stack), len(self._using)
            try:
                yield
            finally:
                while len(self._stack) > under_way:  # left by a hook that failed before the forward
                    self.leave(self._stack[-1], completed=False)
                self._unwind(using)
                self.call_ended()

    def enter(self, component: Component, shapes: tuple = ()) -> None:
        """A forward of `component` begins: order it behind the caller and bring its stem.

        Args:
            shapes: of what the forward is given; with a budget, its memory is expected to follow from them.
        """
        self._refuse_suspended(component)
        self.lock.acquire()
        outermost = not self._stack
        if outermost:  # which keeps the lock until it leaves
            caller = self.streams.current()
            self.streams.compute.wait_stream(caller)
            self._outside = (caller, self.streams.switch(self.streams.compute), len(self._using))
            self._random = self.streams.random_state()
        else:
            self.lock.release()
        self._stack.append(component)
        component.depth += 1
        try:
            if self.homes.lost and outermost:
                self.homes.fit()
            self._bring(component)
            if outermost:
                self._transfers.stopwatch = self.keeping.begin(component, shapes)
            if component.depth == 1:
                self._notice_edits(component.streamed)
                component.trace = []
                self._learning.begin(component)
                if component.first is not None:
                    self.homes.order.expect(component.first)
                    self.loads.prefetch()
        except BaseException:
            self.leave(component, completed=False)
            raise
        self.counters.forwards += component.depth == 1

    def leave(self, component: Component, completed: bool = True) -> None:
        """The forward of `component` is over: order the caller behind it.

        Args:
            completed: False if it failed, so that not all of it has been seen.
        """
        if component not in self._stack:
            return
        try:
            for each in self._pop(component):
                self._learning.end(each, completed)
            if component.depth == 0 and component.trace and self.homes.learn(component):
                self.loads.prefetch()
            if not self._stack:
                self._transfers.stopwatch = None
                self.keeping.end(component, completed)
        finally:
            if not self._stack:
                caller, before, using = self._outside
                caller.wait_stream(self.streams.compute)
                self.streams.restore(before)
                self._outside = None
                try:
                    self._unwind(using)
                finally:
                    self.lock.release()

    def _pop(self, component: Component) -> list[Component]:
        """Take forwards off the stack up to that of `component`; returns the components that run no longer."""
        over = []
        while self._stack:
            left = self._stack.pop()
            left.depth -= 1
            if left.depth == 0:
                over.append(left)
            if left is component:
                break
        return over

    def _unwind(self, using: int) -> None:
        """End uses that a hook left under way, which failed before the forward."""
        while len(self._using) > using:
            self.release(self._using[-1])

    @property
    def busy(self) -> bool:
        """Whether a forward is under way."""
        return bool(self._stack)

    def touch(self, component: Component) -> None:
        """`component` is used without its forward (`vae.decode`): bring its stem to the caller's stream."""
        self._refuse_suspended(component)
        with self.lock:
            if not component.depth:
                self._bring(component)

    def call_ended(self) -> None:
        """The pipeline's call is over: what came for it leaves."""
        with self.lock:
            self._leave([c for c in self.components if c.present and not c.depth])
            # What was loaded ahead is dropped, too: before the next call, the user may edit weights in ways
            # that leave no trace (`weight.data.add_()`).
            for unit in self.units:
                if unit.state in WAITING:
                    self.loads.drop(unit)
            self._turns.call_ended()
            for component in self.components:
                component.checked = False
                component.runs = 0
                if component.pairs is not None:
                    component.pairs.call_ended()

    # --- the unit's forward ---------------------------------------------------------------------------

    def acquire(self, unit: Unit, opening: bool = False) -> None:
        """A forward of `unit` begins on the current stream: its weights are there, or come at once.

        Args:
            opening: it is the block that begins; the forward of the unit itself is still to come.
        """
        if unit.state is State.RESIDENT:
            return
        self.lock.acquire()  # until it is released: another thread may call this very unit
        self._using.append(unit)
        try:
            self._acquire(unit, opening)
        except BaseException:
            self.release(unit)
            raise

    def _acquire(self, unit: Unit, opening: bool) -> None:
        component = unit.component
        self._learning.meet(unit, opening)
        if unit.state is State.IN_USE:
            unit.depth += not opening
            return
        if self._lingers is not None:
            self._let_linger(unit)
        self.homes.order.observe(unit.number)
        if component.depth:
            component.trace.append(unit.number)
        else:
            self._refuse_suspended(unit.component)
            self._notice_edits([unit])
        self.counters.uses += 1
        missed = unit.state is State.OFFLOADED
        stream = self.streams.current()
        arrival = self.counters.arrive(stream) if self.counters.timing else None
        watch = self._transfers.stopwatch
        if watch is not None:
            watch.arrives(unit, stream)
        if missed:  # this may wait for the disk
            self.counters.misses += 1
            self.loads.load(unit, self.arena.overwritten_by(unit), stream)
        if arrival is not None:
            self.counters.waits(unit, arrival)
        stream.wait_event(unit.ready)
        if watch is not None:
            watch.starts(unit, stream)
        unit.weights.bind()
        self.loads.bound(unit)
        unit.state = State.IN_USE
        unit.depth = not opening
        unit.stream = stream
        if missed or unit.floats:
            self.loads.prefetch(stream)

    def release(self, unit: Unit) -> None:
        """The forward of `unit` is queued: its bytes are free behind it, and the next loads can go."""
        if unit not in self._using:
            return
        self._using.remove(unit)
        try:
            unit.depth -= 1
            self._finish(unit)
        finally:
            self.lock.release()

    def _finish(self, unit: Unit) -> None:
        """If nobody uses the unit any longer, its bytes are free."""
        if unit.state is not State.IN_USE or unit.depth > 0:
            return
        self._learning.part(unit)
        if not unit.clings:
            stream = unit.stream
            self._retire(unit, stream)
            self.loads.prefetch(stream)

    def _refuse_suspended(self, component: Component) -> None:
        if component.module in self.suspended:
            raise RuntimeError(
                f"{component.name} is being edited: leave `with pipe.block_offload.suspended()` before running it"
            )

    # --- what becomes of a unit between its uses ------------------------------------------------------

    def _notice_edits(self, units: list[Unit]) -> None:
        """Before a forward, where others have had their turn: what they did to the weights counts.

        Those replaced (`weight.data = ...`) get new host memory; those loaded ahead are loaded again.
        """
        self.packed.refuse_edits(units, silent=False)
        for unit in units:
            waits, offloaded = unit.state in WAITING, unit.state is State.OFFLOADED
            edited = (waits or (offloaded and unit.component.on_disk)) and unit.weights.note_edits()
            if waits and edited:
                self.loads.drop(unit)
            # What is on disk is read from there, so an edit in place must get there.
            lost = edited and unit.component.on_disk
            if unit.state is State.OFFLOADED and (lost or not unit.weights.is_intact()):
                self._transfers.take_over(unit)

    def notice_silent_edits(self, component: Component) -> None:
        """Before a call: what was done to weights without a trace (`weight.data.add_()`) counts."""
        if not component.on_disk:
            return
        for unit in self.disk.silently_edited(component.streamed):
            if unit.state in WAITING:
                self.loads.drop(unit)
            if unit.state is State.OFFLOADED:
                self._transfers.take_over(unit)

    def _retire(self, unit: Unit, stream: Any) -> None:
        """The unit's use is over: what it reads is the host's again, its bytes may be overwritten."""
        unit.done.record(stream)
        if self._transfers.stopwatch is not None:
            self._transfers.stopwatch.ends(unit, stream)
        changed = unit.weights.unbind()
        unit.used = True
        unit.state = State.READY
        if changed:
            self._transfers.write_back(unit, changed, stream)
        if unit.borrows and not (unit.keeps and unit.component.present):
            if unit.floats and next(self.homes.order.upcoming(), None) == unit.number:
                self._lingers = unit
            else:
                self.loads.drop(unit)

    def _let_linger(self, coming: Unit) -> None:
        """A unit that was expected to be used again lies there still: if another one comes, it goes."""
        unit, self._lingers = self._lingers, None
        if unit is not coming and unit.state is State.READY and unit.borrows and not unit.keeps:
            self.loads.drop(unit)

    def _clear(self, units: list[Unit]) -> None:
        """Take units out of the arena, and their views with them."""
        for unit in units:
            if unit.state is State.IN_USE:
                self._retire(unit, unit.stream)
            if unit in self.arena.lying or unit.borrows:
                self.loads.drop(unit)
            unit.weights.place(None)
            unit.slot = None

    # --- components that come and leave ---------------------------------------------------------------

    def _bring(self, component: Component) -> None:
        """The stem of `component`, and those that it shares tensors with, are there for this stream."""
        coming = [component, *(each for each in component.needs if each in self.components)]
        if not all(c.present for c in coming):
            leaving = [c for c in self.components if c.present and not c.depth and c not in coming]
            self._leave([c for c in leaving if not self._may_stay(c, component)], component)
        for each in coming:
            self._stems.bring(each)

    def _may_stay(self, present: Component, coming: Component) -> bool:
        """Whether the stem of `present` stays while `coming` runs."""
        together = self.keeping.standing_bytes(coming) + present.stem_bytes
        fits = self.budget is None or together <= self.budget.limit
        return fits and self._turns.alternate(present, coming)

    def _leave(self, components: list[Component], coming: Component | None = None) -> None:
        freed = 0
        for component in components:
            freed += self._stems.send_away(component)
            for unit in component.streamed:
                if unit.keeps and unit.borrows:
                    self.loads.drop(unit)
                    freed += unit.nbytes
            if coming is not None:
                self._turns.displaced(component, coming)
        if freed >= _EMPTY_CACHE_FROM:
            self.streams.empty_cache()

    def _forget(self, component: Component) -> None:
        self._turns.forget(component)
        self.keeping.forget(component)

    def _withdraw(self, component: Component) -> None:
        """Everything of `component` that moves is on the host afterwards."""
        if component.present:
            self._leave([component])
        self._clear(component.streamed)

    # --- when memory is short -------------------------------------------------------------------------

    def drop_kept(self, running: Component) -> bool:
        """Nothing is on the device that `running` does not need, but for residents; returns what that changed."""
        staying = (running, *running.needs)
        others = [c for c in self.components if c.present and not c.depth and c not in staying]
        self._leave(others)
        return self.keeping.keep_nothing() or bool(others)

    def shrink_arena(self) -> bool:
        """From now on nothing is loaded before the unit before it is done; returns whether that is new."""
        if self.homes.slots == 1 or not self.units:
            return False
        self.homes.slots = 1
        self.homes.fit()
        return True

    def restore_random(self) -> None:
        """The generators are as they were when the last forward began."""
        self.streams.restore_random(self._random)

    def random_changed(self) -> bool:
        """Whether somebody has drawn random numbers since the forward under way began."""
        before, now = self._random, self.streams.random_state()
        if isinstance(now, torch.Tensor):
            return not torch.equal(before, now)
        return not all(torch.equal(one, other) for one, other in zip(before, now, strict=True))

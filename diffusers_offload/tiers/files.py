"""The block files that components lie in: found or written, edited, and deleted when their state is gone.

A component's weights as they are when offloading begins, or as `from_pretrained` finds them, get a folder that stays:
the next process finds it. What they become meanwhile (an adapter is loaded, say) lies in the folder `passing`, and goes
as soon as nothing looks at it, with the process at the latest: after a crash, the next one that offloads there
deletes it.
"""

from __future__ import annotations

import mmap
from collections import defaultdict, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from .. import slab
from ..packing import expected_nbytes
from ..packing.piece import VERSION
from . import blockfile, folders
from .blockfile import BlockFile, Part
from .lock import delete_unused
from .mapped import DiskMemory, MappedPart, Unpacks, map_file, map_part, mapped_already, names_in, unveiled
from .packed import Packer
from .packedmemory import PackedMemory
from .pinned import map_memory
from .store import Store, file_name, identity_of
from .traces import private_bytes

if TYPE_CHECKING:
    from ..component import Component, Unit

_PATIENCE = 600.0  # seconds for another process that writes the same
_PASSING = "passing"
_WRITERS = 2  # blocks that are written at a time: one waits for the disk while the other is copied
_T, _R = TypeVar("_T"), TypeVar("_R")


@dataclass(eq=False)
class _Shelf:
    """The stores that a component lies in."""

    lasting: list[Store] = field(default_factory=list)  # found by the next process
    passing: list[Store] = field(default_factory=list)  # gone with the state that they hold
    ground: set[int] | None = None  # mappings of lasting files when it was taken apart anew; None: never was

    @property
    def stores(self) -> list[Store]:
        """The latest first."""
        return [*reversed(self.passing), *reversed(self.lasting)]

    def find(self, block: str, content: str) -> BlockFile | None:
        """The file that holds just this, packed or not."""
        files = (store.get(block) for store in self.stores if block in store.blocks())
        return next((file for file in files if file.content == content), None)


class Files:
    """Puts weights into files below `directory`.

    Args:
        packer: packs what streams before it is written; None: it is written as it is.
        raw: unpacks what is packed.
    """

    def __init__(self, directory: Path, packer: Packer | None, raw: Unpacks) -> None:
        self._directory = directory
        self._packer = packer
        self._raw = raw
        self._shelves: dict[Component, _Shelf] = defaultdict(_Shelf)
        self._swept = False

    def put(self, component: Component, units: Sequence[Unit]) -> Iterator[Unit]:
        """Write the weights of `units` to files that do not hold them yet, and let the tensors look at these.

        Raises:
            StoreError: the folder cannot be used, or has no room; what was written is gone again.
        """
        shelf, names = self._shelves[component], names_in(component.module)
        private = private_bytes()  # what somebody wrote to a mapping is in no file
        blocks: dict[str, list[Unit]] = defaultdict(list)
        for unit in units:
            mapped = mapped_already(component.module, unit.weights, names)
            if mapped is not None and isinstance(mapped.memory, PackedMemory) and not unit.modules:
                mapped = None  # stems are never packed
            if mapped is not None and not private.get(mapped.memory.bytes.untyped_storage().data_ptr()):
                _hold(shelf, mapped)
                unit.weights.stay_on_host(mapped.memory)
                yield unit
            else:
                blocks[unit.block].append(unit)
        # Weights are known by what they are, not by what they are called: so all are looked at before one is written.
        missing: dict[str, _Draft] = {}
        for block, members in blocks.items():
            draft = self._draft(block, members, names)
            file = shelf.find(block, draft.content)
            if file is None:
                missing[block] = draft
            else:
                yield from _look_at(file, members)
        if missing:
            passes = shelf.ground is not None and not _lies_in(missing.values(), shelf.ground, private)
            yield from self._write(component, missing, names, passes)
        self._tidy(component)

    def _write(
        self, component: Component, drafts: dict[str, _Draft], names: Mapping[int, str], passes: bool
    ) -> Iterator[Unit]:
        self._sweep()
        shelf = self._shelves[component]
        root, shelved = self._directory, shelf.lasting
        if passes:
            root, shelved = self._directory / _PASSING, shelf.passing
        if self._packer is None:
            identity = identity_of((draft.block, draft.fingerprint) for draft in drafts.values())
        else:
            identity = identity_of(((draft.block, draft.content) for draft in drafts.values()), VERSION)
        store = Store(root, component.name, identity, True, _PATIENCE)
        shelved.append(store)
        was_empty = not store.blocks()

        def write(pair: tuple[_Draft, list[Part] | None]) -> BlockFile:
            draft, parts = pair
            if parts is None:
                return store.get(draft.block)
            return store.put(draft.block, parts, draft.digests if self._packer is None else None)

        # Made in this thread: what is on a device is copied behind what its stream does.
        pairs = ((draft, self._parts(draft, names, store)) for draft in drafts.values())
        # What is packed is a copy: so one block at a time.
        writers = _WRITERS if self._packer is None else 1

        try:
            needed = [draft.nbytes for block, draft in drafts.items() if block not in store.blocks()]
            if needed:
                folders.require_space(store.folder, sum(needed))
            for draft, file in zip(drafts.values(), _ahead(write, pairs, writers), strict=True):
                yield from _look_at(file, draft.units)
            store.commit(list(drafts))
        except BaseException:
            if was_empty and not store.complete:
                shelved.remove(store)
                store.discard()
            raise

    def _draft(self, block: str, units: list[Unit], names: Mapping[int, str]) -> _Draft:
        with self._true_values(units):
            parts = [_part(unit, names) for unit in units]
            digests = [blockfile.digest_of(part) for part in parts]
        file = blockfile.plan(file_name(block), parts, digests)
        nbytes = sum(expected_nbytes(u.weights.tensors) if self._packs(u) else u.nbytes for u in units)
        return _Draft(block, units, digests, file.fingerprint, file.content, nbytes)

    def _parts(self, draft: _Draft, names: Mapping[int, str], store: Store) -> list[Part] | None:
        """What is to be written of a block; None if that is there already: to find out is to pack it."""
        there = store.get(draft.block) if draft.block in store.blocks() else None
        if self._packer is not None and there is not None and there.content == draft.content:
            return None
        with self._true_values(draft.units):
            parts = [_part(unit, names) for unit in draft.units]
            triples = zip(draft.units, parts, draft.digests, strict=True)
            return [self._packer.pack_part(p, text) if self._packs(u) else p for u, p, text in triples]

    def _packs(self, unit: Unit) -> bool:
        """Whether it is packed before it is written: stems are not, which others may look into."""
        return self._packer is not None and bool(unit.modules)

    @contextmanager
    def _true_values(self, units: Iterable[Unit]) -> Iterator[None]:
        """Within, no tensor of a unit that is to be written looks at what stands in for it."""
        units = list(units)
        with unveiled([t for unit in units for t in unit.weights.tensors], self._raw) as somewhere_else:
            for unit in units if somewhere_else else ():
                unit.weights.lay_out_anew()
            yield

    def edit(self, unit: Unit, packs: bool = True) -> DiskMemory:
        """Write a unit's weights, which are others than the model's now, to a file of this process's own.

        Args:
            packs: they may be packed; otherwise they are going to be written to where they lie.

        Raises:
            StoreError: nothing can be written; the unit is as it was.
        """
        names = names_in(unit.component.module)
        store = next(
            (each for each in self._shelves[unit.component].stores if unit.block in each.blocks()), None
        )
        if store is None:  # it was never on the disk
            for _ in self._write(
                unit.component, {unit.block: self._draft(unit.block, [unit], names)}, names, True
            ):
                pass
            return unit.weights.host
        pack = self._packer.pack_part if packs and self._packs(unit) else None
        host = map_part(store.edit(unit.block, _part(unit, names), pack, written_to=not packs))
        unit.weights.move_to_host(host, filled=True)
        return host

    def silently_edited(self, units: Iterable[Unit]) -> list[Unit]:
        """Units whose bytes were written to by others than us, which the tensors may not have counted."""
        private = private_bytes()
        return [
            unit
            for unit in units
            if isinstance(unit.weights.host, DiskMemory)
            and private.get(unit.weights.host.bytes.untyped_storage().data_ptr(), 0)
            > mmap.PAGESIZE * len(unit.weights.written_pages(mmap.PAGESIZE))
        ]

    def pass_on(self, before: Component, after: Component) -> None:
        """`after` is the same module taken apart anew: some of its units are where those of `before` were."""
        shelf = self._shelves[after] = self._shelves.pop(before, _Shelf())
        lasting = {store.folder for store in shelf.lasting}
        hosts = [unit.weights.host for unit in before.units if isinstance(unit.weights.host, DiskMemory)]
        shelf.ground = {
            looked_at.untyped_storage().data_ptr()
            for host in hosts
            if host.stored.path.parent in lasting and not host.is_edited
            for looked_at in (host.bytes, getattr(host, "blank", host.bytes))
        }

    def release(self, component: Component) -> None:
        """The component is offloaded no longer. The model's files stay, those of what it had become go."""
        shelf = self._shelves.pop(component, _Shelf())
        for store in shelf.lasting:
            store.close()
        self._discard(shelf.passing)

    def _tidy(self, component: Component) -> None:
        """Delete what none of the component's units looks at, but for the model's files."""
        shelf = self._shelves[component]
        hosts = [unit.weights.host for unit in component.units]
        used = {host.stored.path for host in hosts if isinstance(host, DiskMemory)}
        folders_used = {path.parent for path in used}
        gone = [store for store in shelf.passing if store.folder not in folders_used]
        shelf.passing = [store for store in shelf.passing if store not in gone]
        self._discard(gone)
        for store in shelf.stores:
            store.drop_edits(used)

    def _discard(self, stores: Iterable[Store]) -> None:
        for store in stores:
            store.discard()
            folders.delete_if_empty(self._directory / _PASSING)

    def _sweep(self) -> None:
        """Delete what processes that were killed have left."""
        root = self._directory / _PASSING
        if self._swept or not root.is_dir():
            return
        self._swept = True
        for name in folders.names(root):
            delete_unused(root / name)
        folders.delete_if_empty(root)


# --- parts ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Draft:
    """A block that may have to be written."""

    block: str
    units: list[Unit]
    digests: list[str]  # of the slabs, as they are
    fingerprint: str
    content: str
    nbytes: int  # that it is expected to take


def _part(unit: Unit, names: Mapping[int, str]) -> Part:
    """A unit's weights as its file holds them."""
    weights = unit.weights
    if all(tensor.device.type == "cpu" for tensor in weights.tensors):
        data: Any = slab.sources(weights.layout, weights.tensors)  # hashed and written from where they lie
    else:
        data = map_memory(weights.nbytes)[1]
        slab.gather(weights.layout, weights.tensors, data)
    # A tensor that the module has no longer (another parameter was put in its place) belongs to the unit all the same,
    # until the component is taken apart anew.
    pairs = enumerate(map(id, weights.tensors))
    called = tuple(names.get(key, f"{unit.name}: replaced {index}") for index, key in pairs)
    return Part(unit.name, weights.layout, called, data)


def _look_at(file: BlockFile, units: Sequence[Unit]) -> Iterator[Unit]:
    for unit, memory in zip(units, map_file(file), strict=True):
        unit.weights.move_to_host(memory, filled=True)
        yield unit


def _lies_in(drafts: Iterable[_Draft], mappings: set[int], private: Mapping[int, int]) -> bool:
    """Whether the weights are those of the mappings, only divided in another way."""
    tensors = [tensor for draft in drafts for unit in draft.units for tensor in unit.weights.tensors]
    storages = {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}
    return storages <= mappings and not any(map(private.get, storages))


def _hold(shelf: _Shelf, part: MappedPart) -> None:
    """Keep others from changing the files that a model was built on, and have a place for edits."""
    if all(store.identity != part.identity for store in shelf.lasting):
        shelf.lasting.append(Store(part.root, part.component, part.identity))


def _ahead(work: Callable[[_T], _R], items: Iterable[_T], workers: int) -> Iterator[_R]:
    """What `work` makes of each item in turn; some are worked on at a time."""
    rest, pending = iter(items), deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in rest:
            try:
                pending.append(pool.submit(work, item).result)
            except RuntimeError:  # "can't start new thread"
                pending.append(partial(work, item))
            del item  # or it would stay in memory while the next one is made
            if len(pending) == workers:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()

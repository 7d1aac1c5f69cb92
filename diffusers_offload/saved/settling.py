"""From a model that was loaded without being held to one that is built on block files, block by block.

The weights' store has their content for its name, which is known once all are written: until then they lie in the
folder `unfinished`, named for where they come from, so that who was killed goes on where it was. A note in `sources`
says which source became which store: as long as the source has not changed, it is not read again.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import slab
from ..log import logger
from ..packing.piece import VERSION
from ..report import size_text
from ..target import Target, build_component
from ..tiers import blockfile, folders
from ..tiers.blockfile import Part, StoreError
from ..tiers.mapped import build_on, names_in, unveiled
from ..tiers.packed import Packer
from ..tiers.pinned import map_memory
from ..tiers.sealed import seal, unseal
from ..tiers.store import Store, folder_name, identity_of
from ..units import tensors_of
from .deferred import Promises, lies_in, mapped_files

_UNFINISHED, _SOURCES = "unfinished", "sources"
_WRITERS = 2  # threads, and so blocks that are in memory at a time
_WORTH_A_WORD = 64 * 2**20  # bytes in memory that the user hears of


@dataclass(frozen=True)
class _Draft:
    """A unit that is to be written."""

    name: str
    block: str
    names: tuple[str, ...]
    tensors: tuple[torch.Tensor, ...]
    layout: slab.Layout
    odd: frozenset[int]  # ids of tensors that overlap others or have holes: copied as they lie
    streams: bool  # and so may be packed


def refuse_what_cannot(name: str, module: nn.Module) -> None:
    """Raise ValueError if a weight of the component is missing, or is none that a block file can hold."""
    names = names_in(module)
    for tensor in tensors_of(module):
        if tensor.is_meta:
            raise ValueError(
                f"{name}: the checkpoint holds no {names[id(tensor)]!r}, which {type(module).__name__} has. Get "
                f"the missing files, or pass {name}= a model of your own"
            )
        why = slab.why_not(tensor)
        if why is not None:
            raise ValueError(f"{name}.{names[id(tensor)]} {why}")


def settle(
    target: Target,
    root: Path,
    stamp: str,
    promises: Promises,
    moved: Callable[[int], Any] = lambda nbytes: None,
    packer: Packer | None = None,
) -> str:
    """Have the component's weights in block files below `root`, and let its tensors look at these.

    Args:
        target: how it is going to be offloaded, so that the files suit that.
        stamp: another one whenever the weights may be others.
        promises: of weights that were not computed.
        moved: is told how many bytes have come to the disk, or were there.
        packer: packs what is going to stream; None: it is written as it is.

    Returns:
        The identity of the weights: of their content.

    Raises:
        ValueError: a weight is missing or cannot be stored.
        StoreError: the folder cannot be used, or has no room; what is written is of use to the next call.
    """
    name, module = target.name, target.module
    refuse_what_cannot(name, module)
    drafts = _drafts(target)
    _tell_what_is_held(name, module, promises)
    blocks: dict[str, list[_Draft]] = {}
    for draft in drafts:
        blocks.setdefault(draft.block, []).append(draft)
    told = [(d.block, d.name, d.names, d.layout.nbytes, list(map(str, d.layout.placements))) for d in drafts]
    packed = [] if packer is None else [f"packed {VERSION}"]
    key = blockfile.digest(json.dumps([stamp, told, *packed]).encode())
    note = root / _SOURCES / f"{folder_name(name, key)}.json"
    identity = _noted(note)
    store = _open(root, name, identity) if identity is not None else None
    if store is not None:
        moved(sum(draft.layout.nbytes for draft in drafts))
    else:
        store = _write(root, name, key, blocks, promises, moved, packer)
        folders.make(root, note.parent)
        blockfile.replace(note, [memoryview(seal({"component": name, "identity": store.identity}))])
    with store:
        _discard(root, name, key)
        build_on(module, store, root, name)
        return store.identity


def settle_as(name: str, module: nn.Module, root: Path, identity: str) -> None:
    """Let the tensors of `module` look at block files that are there already.

    Raises:
        StoreError: they are not, or are not this model's.
    """
    with Store(root, name, identity) as store:
        if not store.complete:
            raise StoreError(f"{store.folder} is not complete")
        build_on(module, store, root, name)


# --- what is written --------------------------------------------------------------------------------------


def _drafts(target: Target) -> list[_Draft]:
    if target.policy.granularity == "resident":
        target = target.streaming()
    component = build_component(replace(target, residents=frozenset()), {})
    names = names_in(target.module)
    odd = _odd_ones(tensors_of(target.module))
    drafts = []
    for number, unit in enumerate(component.residents):  # small, and never streamed
        drafts.append(_draft(f"at_hand.{number}", "at_hand", unit.weights.tensors, names, odd))
    for unit in (*component.stem, *component.streamed):
        streams = bool(unit.modules)
        drafts.append(_draft(unit.name, unit.block, unit.weights.tensors, names, odd, streams))
    return drafts


def _draft(
    name: str,
    block: str,
    tensors: Sequence[torch.Tensor],
    names: dict[int, str],
    odd: frozenset[int],
    streams: bool = False,
) -> _Draft:
    # Laid out by themselves: where in the checkpoint a tensor lies, and how it is aligned there, is left behind.
    alone = [t if id(t) in odd else _without_place(t) for t in tensors]
    called = tuple(names[id(t)] for t in tensors)
    return _Draft(name, block, called, tuple(tensors), slab.lay_out(alone), odd, streams)


def _without_place(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def _odd_ones(tensors: Sequence[torch.Tensor]) -> frozenset[int]:
    """Ids of tensors that share bytes with others, or have holes or several elements in one place."""
    spans = [slab.Span(s.storage, s.start, s.stop) for s in map(_exact_span, tensors)]
    order = sorted(range(len(tensors)), key=lambda i: (spans[i].storage, spans[i].start))
    odd: set[int] = set()
    furthest = order[0] if order else 0
    for i in order[1:]:
        if slab.overlap(spans[furthest], spans[i]):
            odd |= {id(tensors[furthest]), id(tensors[i])}
        if spans[i].storage != spans[furthest].storage or spans[i].stop > spans[furthest].stop:
            furthest = i
    for tensor, span in zip(tensors, spans, strict=True):
        if span.stop - span.start != tensor.numel() * tensor.element_size():
            odd.add(id(tensor))
    return frozenset(odd)


def _exact_span(tensor: torch.Tensor) -> slab.Span:
    span = slab.span_of(tensor)
    start = tensor.storage_offset() * tensor.element_size()
    return slab.Span(span.storage, start, max(start, span.stop))


def _part(draft: _Draft, promises: Promises) -> Part:
    """The unit's weights as its file holds them, computed now."""
    # Not from malloc, which keeps some of what is freed: with every block a little more of the model would stay.
    data = map_memory(draft.layout.nbytes)[1]
    with unveiled(draft.tensors):  # one module under two names was written already, and packed
        for tensor, view in zip(draft.tensors, slab.views(draft.layout, data), strict=True):
            if id(tensor) not in draft.odd:
                promises.copy_to(tensor, view)
        odd = [tensor for tensor in draft.tensors if id(tensor) in draft.odd]
        if odd:
            _copy_odd(draft, odd, data)
    return Part(draft.name, draft.layout, draft.names, data)


def _copy_odd(draft: _Draft, odd: Sequence[torch.Tensor], data: torch.Tensor) -> None:
    storages = {slab.storage_of(tensor) for tensor in odd}
    regions = tuple(region for region in draft.layout.regions if region.span.storage in storages)
    slab.gather(replace(draft.layout, regions=regions), odd, data)


def _packed(part: Part, packer: Packer) -> Part:
    return packer.pack_part(part, blockfile.digest_of(part))


# --- writing ----------------------------------------------------------------------------------------------


def _write(
    root: Path,
    name: str,
    key: str,
    blocks: dict[str, list[_Draft]],
    promises: Promises,
    moved: Callable[[int], Any],
    packer: Packer | None,
) -> Store:
    """Write what is not written yet, and open the store that holds it."""
    folders.make(root, root / _UNFINISHED)
    with Store(root / _UNFINISHED, name, key, rebuild=True) as unfinished:
        missing = [block for block in blocks if block not in unfinished.blocks()]
        needed = sum(draft.layout.nbytes for block in missing for draft in blocks[block])
        folders.require_space(root, needed)
        moved(sum(d.layout.nbytes for drafts in blocks.values() for d in drafts) - needed)
        if missing and len(missing) < len(blocks):
            logger.info(
                "%s: going on with %d of %d blocks on disk", name, len(blocks) - len(missing), len(blocks)
            )

        def part(draft: _Draft) -> Part:
            made = _part(draft, promises)
            return _packed(made, packer) if packer is not None and draft.streams else made

        def write(block: str) -> int:
            with torch.inference_mode(False):
                unfinished.put(block, [part(draft) for draft in blocks[block]])
            return sum(draft.layout.nbytes for draft in blocks[block])

        # What is packed is in memory twice meanwhile: so one block at a time.
        with ThreadPoolExecutor(_WRITERS if packer is None else 1) as pool:
            try:
                for done in as_completed([pool.submit(write, block) for block in missing]):
                    moved(done.result())
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise
        files = {block: unfinished.get(block) for block in blocks}
        if packer is None:
            identity = identity_of((block, file.fingerprint) for block, file in files.items())
        else:
            identity = identity_of(((block, file.content) for block, file in files.items()), VERSION)
        store = Store(root, name, identity, rebuild=True)
        try:
            if not store.complete:
                for block in blocks:
                    store.link(block, unfinished.get(block))
                store.commit(list(blocks))
        except BaseException:
            store.close()
            raise
        return store


def _discard(root: Path, name: str, key: str) -> None:
    """Delete what was written for this, now that it has its place."""
    folder = root / _UNFINISHED / folder_name(name, key)
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.parent.rmdir()
    except OSError:
        pass  # there is none, or others are writing


def _noted(note: Path) -> str | None:
    """The identity that the source had when it was read."""
    try:
        identity = unseal(note.read_bytes()).get("identity")
    except (OSError, ValueError):
        return None
    return identity if isinstance(identity, str) else None


def _open(root: Path, name: str, identity: str) -> Store | None:
    """The store, if all of it is there."""
    try:
        store = Store(root, name, identity)
    except (StoreError, ValueError) as error:
        logger.warning("%s: %s", name, str(error).split(". Delete")[0])
        return None
    if store.complete:
        return store
    store.close()
    return None


def _tell_what_is_held(name: str, module: nn.Module, promises: Promises) -> None:
    """Say so if the component was in memory: its class computes weights as it loads them."""
    files = mapped_files()
    held = {
        slab.storage_of(t): t.untyped_storage().nbytes()
        for t in tensors_of(module)
        if not promises.has(t) and not lies_in(t, files)
    }
    if sum(held.values()) >= _WORTH_A_WORD:
        logger.warning(
            "%s: %s of its weights were in memory at once: %s computes them as it loads them",
            name,
            size_text(sum(held.values())),
            type(module).__name__,
        )

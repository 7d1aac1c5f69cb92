"""A component's blocks on disk: a folder of block files, and the manifest that says what they hold.

    <offload_dir>/<component>-<identity[:16]>/
        manifest.json               what is here; only what it lists exists
        lock                        one process writes, or several read
        <block>-<hash>.safetensors  one file per block (`blockfile`)
        edited-<process>-...        a part with other weights than the model's; gone with the process

A folder may be deleted by who holds its lock alone; who has waited for that lock meanwhile finds that out.

A file counts once the manifest lists it with its length and fingerprint, and the manifest never lists bytes that
may not be there: a file that changes is struck off first, then replaced, then listed again, each step forced to
the disk. So at every moment a power cut or a SIGKILL leaves a folder whose listed files are right. Weights that
somebody changes while they are on the disk go beside the model's files, never into them: the folder says whose
weights it holds, and the next process, or another one that reads now, must find those.

The digests notice damage and mistakes. They are no signature: whoever may write to the folder can write anything,
so folders in which everybody may write are refused.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import threading
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from ..log import logger
from . import blockfile, folders
from .blockfile import BlockFile, Part, StoredPart, StoreError
from .lock import FolderLock
from .names import file_name, folder_name
from .sealed import seal, unseal
from .strictjson import keys, mapping, sizes, text

MANIFEST = "manifest.json"
EDITED = "edited-"
FORMAT = 2  # 1: with digests of a slab in one go
_MANIFEST_LIMIT = 64 * 2**20  # bytes; a listed block takes about 200
_IDENTITY = re.compile(r"[0-9a-f]{16,128}", re.ASCII)
_OURS = re.compile(r".*-[0-9a-f]{12}\.safetensors", re.ASCII)
_LEFT_OVER = re.compile(r"\.[0-9a-f]{16}\.tmp|" + EDITED + r"[0-9a-f]{16}-.*\.safetensors", re.ASCII)


def identity_of(files: Iterable[tuple[str, str]], packing: int | None = None) -> str:
    """An identity by content, from the blocks' names and what `blockfile.plan` calls their fingerprints.

    The order does not matter.

    Args:
        packing: version of how they are packed: then what tells the blocks apart is their `content`, which is known
            before anything is packed, and is the same whatever packs it.
    """
    told = sorted(files) if packing is None else [f"packed {packing}", sorted(files)]
    return blockfile.digest(json.dumps(told).encode())


def verify(store: Store) -> dict[str, StoreError]:
    """Read everything that `store` lists; for each block that is not what was written, what is wrong.

    Takes as long as the disk needs, and the memory of the largest part.
    """
    damaged: dict[str, StoreError] = {}
    for block in store.blocks():
        try:
            for part in store.get(block).parts:
                blockfile.read(part.stored, torch.empty(part.stored.nbytes, dtype=torch.uint8))
        except StoreError as error:
            damaged[block] = error
    return damaged


class Store:
    """The blocks of one component, on disk.

    A store that is complete is open to other readers; one that is being filled is this process's alone. Methods
    may be called from several threads, for different blocks.

    Args:
        offload_dir: holds a folder per component and content.
        component: its name in the pipeline.
        identity: of the content: 16 to 128 hexadecimal digits. Other content, other identity.
        rebuild: what to do about damage: forget what is damaged, so that `put` writes it again, instead of
            raising.
        wait: seconds to wait for another process that is writing the same.

    Attributes:
        folder: where the files are.
        complete: whether every block of the component is here.

    Raises:
        StoreError: the folder is damaged, another model's, in use, not safe or not writable.
    """

    def __init__(
        self,
        offload_dir: Path | str,
        component: str,
        identity: str,
        rebuild: bool = False,
        wait: float = 0.0,
    ) -> None:
        if not _IDENTITY.fullmatch(identity):
            raise ValueError(f"identity={identity!r} is none: use 16 to 128 hexadecimal digits")
        root = Path(offload_dir).absolute()
        self.folder = root / folder_name(component, identity)
        self.component, self.identity = component, identity
        self.complete = False
        self._files: dict[str, BlockFile] = {}
        self._edits: set[Path] = set()
        self._token = secrets.token_hex(8)
        self._busy = threading.RLock()
        while True:
            folders.make(root, self.folder)
            self._lock = FolderLock(self.folder)
            try:
                self._lock.take(wait)
                if self._lock.is_current():
                    self._open(rebuild)
                    return
            except BaseException:
                self._lock.release()
                raise
            self._lock.release()  # somebody has deleted the folder meanwhile: make it anew

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def close(self) -> None:
        """Let others have the folder. The model's weights stay, edited ones are deleted."""
        with self._busy:
            for path in self._edits:
                folders.delete(path)
            self._edits = set()
            self._lock.release()

    def discard(self) -> bool:
        """Close, and delete the folder unless others use it; returns whether it is gone."""
        with self._busy:
            try:
                self._lock.make_alone()
            except StoreError:
                self.close()
                return False
            shutil.rmtree(self.folder, ignore_errors=True)
            self._edits = set()
            self._lock.release()
            return True

    def drop_edits(self, used: Collection[Path]) -> None:
        """Delete the files that `edit` wrote, but for those in `used`."""
        with self._busy:
            for path in [path for path in self._edits if path not in used]:
                folders.delete(path)
                self._edits.discard(path)

    def blocks(self) -> list[str]:
        """The blocks that are here."""
        with self._busy:
            return list(self._files)

    def get(self, block: str) -> BlockFile:
        """Where the parts of the model's block are.

        Raises:
            StoreError: it is not here.
        """
        with self._busy:
            if block not in self._files:
                raise StoreError(f"{self.folder} does not hold {block!r} yet. Finish writing it")
            return self._files[block]

    def put(self, block: str, parts: Sequence[Part], digests: Sequence[str] | None = None) -> BlockFile:
        """Have `block` on the disk with `parts`, weights of this identity; what is there already stays.

        Args:
            digests: what `blockfile.digest_of` gives for each part, if that is known already.

        Raises:
            StoreError: nothing can be written, or no space is left; the block is as it was before.
        """
        file = blockfile.plan(self.folder / file_name(block), parts, digests)
        with self._busy:
            known = self._files.get(block)
            if known == file:
                return file
            self._lock.make_alone()
            folders.require_space(self.folder, file.nbytes)
            self._strike(block)
        try:
            blockfile.write(file.path, parts, [part.stored.digest for part in file.parts])
        except BaseException:
            self._list_again(block, known)
            raise
        with self._busy:
            self._files[block] = file
            self._save()
        return file

    def link(self, block: str, file: BlockFile) -> None:
        """Have `block` on the disk as `file` of another store on the same file system has it.

        Raises:
            StoreError: it cannot be; the block is as it was before, or missing.
        """
        with self._busy:
            known = self._files.get(block)
            if known is not None and known.fingerprint == file.fingerprint:
                return
            self._lock.make_alone()
            self._strike(block)
            path = self.folder / file_name(block)
            blockfile.link(file.path, path)
            self._files[block] = blockfile.read_layout(path)
            self._save()

    def edit(
        self,
        block: str,
        part: Part,
        pack: Callable[[Part, str], Part] | None = None,
        written_to: bool = False,
    ) -> StoredPart:
        """Where `part` of `block` lies, whose weights are no longer the model's (a fused LoRA).

        That is a file of this process's own until `close`, or the model's if the part was edited back. The model's
        file stays as it is, so other processes may read meanwhile; so do the block's other parts.

        Args:
            pack: packs a part, given the digest of its slab; None: it is written as it is.
            written_to: what is found is going to be written to where it lies, so it must not be packed.

        Raises:
            StoreError: nothing can be written, or no space is left; the part is as it was before.
        """
        path = self.folder / f"{EDITED}{self._token}-{file_name(part.name)}"
        file = blockfile.plan(path, [part])
        for model in self.get(block).parts:
            if model.content == file.parts[0].content and not (written_to and model.packing is not None):
                with self._busy:
                    self._edits.discard(path)
                folders.delete(path)
                return model
        if pack is not None:
            part = pack(part, file.parts[0].stored.digest)
            file = blockfile.plan(path, [part])
        folders.require_space(self.folder, file.nbytes)
        blockfile.write(path, [part], [file.parts[0].stored.digest])
        with self._busy:
            self._edits.add(path)
        return file.parts[0]

    def forget(self, block: str) -> None:
        """Strike a block off (it was found damaged), so that the next `put` writes it."""
        with self._busy:
            self._lock.make_alone()
            self._strike(block)

    def commit(self, blocks: Collection[str]) -> None:
        """Declare the store complete with exactly `blocks`, and open it to other readers.

        Files of other blocks, left by another way of taking the component apart, are deleted.

        Raises:
            StoreError: one is missing.
        """
        with self._busy:
            missing = [block for block in blocks if block not in self._files]
            if missing:
                raise StoreError(f"{self.folder} does not hold {missing[0]!r} yet. Finish writing it")
            if not self.complete:
                self._lock.make_alone()
                self._files = {block: self._files[block] for block in blocks}
                self.complete = True
                self._save()
                self._delete_unlisted()
            self._lock.share()

    # --- changing ---------------------------------------------------------------------------------------

    def _strike(self, block: str) -> None:
        """Make sure that the manifest on the disk does not list `block`, nor call the store complete."""
        if block not in self._files and not self.complete:
            return
        before = self._files, self.complete
        self._files = {name: file for name, file in self._files.items() if name != block}
        self.complete = False
        try:
            self._save()
        except BaseException:
            self._files, self.complete = before
            raise

    def _list_again(self, block: str, known: BlockFile | None) -> None:
        """After a failed write: list the old file, if it is still that one."""
        with self._busy:
            try:
                if known is not None and blockfile.read_layout(known.path) == known:
                    self._files[block] = known
                    self._save()
            except StoreError:
                pass  # the disk is as unwilling as before; the next process writes the block again

    def _save(self) -> None:
        files = {
            block: {"file": file.path.name, "nbytes": file.nbytes, "fingerprint": file.fingerprint}
            for block, file in self._files.items()
        }
        content = {
            "format": FORMAT,
            "component": self.component,
            "identity": self.identity,
            "complete": self.complete,
            "files": files,
        }
        blockfile.replace(self.folder / MANIFEST, [memoryview(seal(content))])

    def _delete_unlisted(self) -> None:
        kept = {path.name for path in (*(file.path for file in self._files.values()), *self._edits)}
        for name in folders.names(self.folder):
            if _OURS.fullmatch(name) and name not in kept:
                folders.delete(self.folder / name)

    # --- opening ----------------------------------------------------------------------------------------

    def _open(self, rebuild: bool) -> None:
        if self._lock.alone:
            for name in folders.names(self.folder):
                if _LEFT_OVER.fullmatch(name):  # by a process that was killed: its lock is gone
                    folders.delete(self.folder / name)
        entries: dict[str, dict[str, Any]] = {}
        try:
            self.complete, entries = self._read_manifest()
        except StoreError as error:
            self._forgive(error, rebuild)
        for block, entry in entries.items():
            try:
                self._files[block] = self._find(block, entry)
            except StoreError as error:
                self._forgive(error, rebuild)
        if self.complete:
            self._lock.share()
            if self._read_manifest()[1] != entries:  # another process slipped in while the lock changed
                raise StoreError(f"{self.folder} was changed while it was opened. Open it again")
        else:
            self._lock.make_alone()  # or say why not: an unfinished store is of use to its writer only

    def _forgive(self, error: StoreError, rebuild: bool) -> None:
        """Raise `error`, or go on without what is damaged."""
        if not rebuild:
            raise error
        self._lock.make_alone()
        self.complete = False
        logger.warning("%s: writing it anew", str(error).split(". Delete")[0])

    def _read_manifest(self) -> tuple[bool, dict[str, dict[str, Any]]]:
        """Whether the store is complete, and what it lists: nothing, if there is no manifest."""
        path = self.folder / MANIFEST
        if not os.path.lexists(path):
            return False, {}
        with blockfile.opened(path) as handle:
            size = os.fstat(handle).st_size
            raw = os.read(handle, min(size, _MANIFEST_LIMIT) + 1)
        try:
            if len(raw) != size:
                raise ValueError("it is too large")
            content = unseal(raw)
            if content.get("format") != FORMAT:
                raise ValueError(f"its format is {content.get('format')!r}, this program writes {FORMAT}")
            keys(content, "format", "component", "identity", "complete", "files")
            if content["identity"] != self.identity:
                raise ValueError("it belongs to another model")
            if not isinstance(content["complete"], bool):
                raise ValueError("whether it is complete is neither true nor false")
            files = mapping(content["files"], "files")
            for block, entry in files.items():
                keys(mapping(entry, block), "file", "nbytes", "fingerprint")
                # The only name that is ever opened is the one we would give: no path leads anywhere else.
                if entry["file"] != file_name(block):
                    raise ValueError(f"the file of {block!r} has the name {entry['file']!r}")
                sizes([entry["nbytes"]], block)
                text(entry["fingerprint"], block)
        except ValueError as error:
            raise StoreError(blockfile.unusable(path, str(error))) from error
        return content["complete"], files

    def _find(self, block: str, entry: dict[str, Any]) -> BlockFile:
        """The file of a listed block, if its length and header are those that were written."""
        file = blockfile.read_layout(self.folder / entry["file"])
        if (file.nbytes, file.fingerprint) != (entry["nbytes"], entry["fingerprint"]):
            raise StoreError(blockfile.unusable(file.path, "it is not the file that was written here"))
        return file

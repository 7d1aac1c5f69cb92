"""Writers of a store that are killed; run by test_store.py in a process of its own, since it forks.

Prints, as JSON, how often what was seen. Exits with an AssertionError if a store ever served a wrong byte.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from diffusers_offload import slab
from diffusers_offload.tiers import blockfile
from diffusers_offload.tiers.blockfile import Part, StoreError
from diffusers_offload.tiers.store import Store

BLOCKS = [f"blocks.{n}" for n in range(3)]
IDENTITY = "0123456789abcdef"
CALLS = ("open", "writev", "fsync", "rename", "close", "listdir")


def content(block: str, version: int) -> bytes:
    return random.Random(f"{block} {version}").randbytes(150_000)


def parts(block: str, version: int) -> list[Part]:
    tensor = torch.frombuffer(bytearray(content(block, version)), dtype=torch.uint8)
    layout = slab.lay_out([tensor])
    data = torch.zeros(layout.nbytes, dtype=torch.uint8)
    slab.gather(layout, [tensor], data)
    return [Part(block, layout, (f"{block}.weight",), data)]


def fill(folder: Path, version: int) -> None:
    with Store(folder, "transformer", IDENTITY) as store:
        for block in BLOCKS:
            store.put(block, parts(block, version))
        store.commit(BLOCKS)


def versions_in(folder: Path) -> tuple[bool, set[int | None]]:
    """Whether the store says it is complete, and of which version its blocks are; None: one is missing."""
    found: set[int | None] = set()
    with Store(folder, "transformer", IDENTITY) as store:
        for block in BLOCKS:
            if block not in store.blocks():
                found.add(None)
                continue
            (part,) = store.get(block).parts
            buffer = torch.empty(part.stored.nbytes, dtype=torch.uint8)
            blockfile.read(part.stored, buffer)
            held = bytes(blockfile.as_bytes(buffer)[:150_000])
            (version,) = [v for v in (0, 1) if held == content(block, v)]
            found.add(version)
        left = [name for name in os.listdir(store.folder) if name.endswith(".tmp")]
        assert not left, left
        return store.complete, found


def run_child(task: Callable[[], None]) -> int:
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        task()
        code = 0
    finally:
        os._exit(code)


def dying_at(number: int, task: Callable[[], None]) -> Callable[[], None]:
    """`task` in a process that is killed right before its `number`-th call to the system."""

    def run() -> None:
        made = 0

        def counted(true: Callable) -> Callable:
            def call(*args, **kwargs):
                nonlocal made
                made += 1
                if made == number:
                    os.kill(os.getpid(), signal.SIGKILL)
                return true(*args, **kwargs)

            return call

        for name in CALLS:
            setattr(os, name, counted(getattr(os, name)))
        task()

    return run


def look(folder: Path, new: int, seen: Counter) -> None:
    try:
        complete, versions = versions_in(folder)
    except StoreError:
        seen["refused"] += 1
        return
    assert not complete or versions in ({0}, {1}), (complete, versions)
    seen["complete" if complete else "partial"] += 1
    seen["mixed"] += versions == {0, 1}


def main() -> None:
    folder = Path(sys.argv[1])
    torch.set_num_threads(1)
    seen: Counter = Counter()
    begin = time.perf_counter()
    fill(folder / "random", 0)
    duration = time.perf_counter() - begin
    rng = random.Random(5)
    turn = 0
    while seen["killed"] < 50:
        turn += 1
        version = turn // 2 % 2
        child = run_child(lambda v=version: fill(folder / "random", v))
        time.sleep(rng.uniform(0, duration))
        os.kill(child, signal.SIGKILL)
        seen["killed"] += os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        look(folder / "random", version, seen)
        if turn % 2:
            fill(folder / "random", version)
            assert versions_in(folder / "random") == (True, {version})
    each = folder / "each"
    for number in range(1, 1000):
        child = run_child(dying_at(number, lambda n=number: fill(each, n % 2)))
        ended = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert ended in (0, -signal.SIGKILL), ended
        look(each, number % 2, seen)
        if ended == 0:
            break
        fill(each, number % 2)
        assert versions_in(each) == (True, {number % 2})
        seen["steps"] += 1
    print(json.dumps(seen))


if __name__ == "__main__":
    main()

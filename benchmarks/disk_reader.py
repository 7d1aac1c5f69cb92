"""How fast the Reader brings units from a cold disk, against a bare O_DIRECT reader with as many threads.

python benchmarks/disk_reader.py --folder /mnt/nvme/offload --gib 8 --workers 2

Files of random bytes are written to the folder and removed afterwards. The rows take turns, in another order each time;
before each of them, what the page cache holds of the files is dropped. All memory was touched before, and the slots
are made as the pinned tier makes them (huge pages, which spare O_DIRECT much work). The bare reader only reads: its
threads share a list of pieces. Once they read into a buffer each, which a cache of the processor may hold, and once
into the slots, as the Reader does; both are what the others are divided by. "digests compared" is what the Reader
does when it meets a file for the first time; "page cache" is what it does where the file system has no O_DIRECT.
"""

from __future__ import annotations

import argparse
import os
import threading
from collections.abc import Callable
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch

from diffusers_offload.slab import align
from diffusers_offload.streams import open_streams
from diffusers_offload.tiers import digests
from diffusers_offload.tiers.blockfile import Stored
from diffusers_offload.tiers.digests import PIECE
from diffusers_offload.tiers.pinned import PinnedTier
from diffusers_offload.tiers.reader import Reader

GIB, MIB, PAGE = 2**30, 2**20, 4096
BARE = ("bare O_DIRECT", "bare O_DIRECT, into the slots")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--folder", required=True, help="on the disk to be measured")
    parser.add_argument(
        "--gib", type=float, default=8.0, help="bytes of all files; more than the disk's own cache"
    )
    parser.add_argument(
        "--unit-mib", type=float, default=340.0, help="bytes of one unit (FLUX: 680 and 283 MB)"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--slots", type=int, default=3, help="units that are read ahead")
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with TemporaryDirectory(dir=arguments.folder, prefix="disk-reader-") as folder:
        units = write(Path(folder), int(arguments.gib * GIB), int(arguments.unit_mib * MIB))
        rows = measure(units, arguments.workers, arguments.slots, arguments.repeats)
    print(table(rows, sum(unit.nbytes for unit in units), len(units), arguments.workers))


def write(folder: Path, nbytes: int, unit_nbytes: int) -> list[Stored]:
    """Files of random bytes, one unit each behind a page of something else."""
    units = []
    for number in range(max(1, nbytes // unit_nbytes)):
        data = torch.randint(-(2**63), 2**63 - 1, (unit_nbytes // 8,)).view(torch.uint8).numpy()
        path = folder / f"{number}.unit"
        with open(path, "wb") as file:
            file.write(bytes(PAGE))
            file.write(data)
            os.fsync(file.fileno())
        digest = digests.of_slab([memoryview(data)])
        units.append(Stored(path, PAGE, data.nbytes, digest))
    return units


def measure(units: list[Stored], workers: int, slots: int, repeats: int) -> dict[str, list[float]]:
    """Bytes per second of each row, once a repeat."""
    ring = [memory(max(unit.nbytes for unit in units)) for _ in range(slots)]
    buffers = [memory(PIECE) for _ in range(workers)]
    total = sum(unit.nbytes for unit in units)
    with Reader(workers) as known, Reader(workers, direct=False) as cached:
        for reader in (known, cached):
            read_all(reader, units, ring)  # the digests
        rows: list[tuple[str, Callable[[], None]]] = [
            (BARE[0], lambda: read_bare(units, workers, lambda thread, _: buffers[thread])),
            (BARE[1], lambda: read_bare(units, workers, lambda _, unit: ring[unit % slots])),
            ("Reader", lambda: read_all(known, units, ring)),
            ("Reader, digests compared", lambda: read_all(Reader(workers), units, ring)),
            ("Reader, page cache", lambda: read_all(cached, units, ring)),
        ]
        rates: dict[str, list[float]] = {name: [] for name, _ in rows}
        for turn in range(repeats):
            for name, work in rows[turn % len(rows) :] + rows[: turn % len(rows)]:
                drop_cache(units)
                begin = perf_counter()
                work()
                rates[name].append(total / (perf_counter() - begin))
    return rates


def memory(nbytes: int) -> torch.Tensor:
    """Memory as a slot has it, page-aligned, which the system has handed out already."""
    return PinnedTier(open_streams(torch.device("cpu"))).allocate(align(nbytes, PAGE)).bytes.zero_()


def drop_cache(units: list[Stored]) -> None:
    """The page cache holds nothing of the files."""
    for unit in units:
        descriptor = os.open(unit.path, os.O_RDONLY)
        try:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(descriptor)


def read_bare(units: list[Stored], workers: int, destination: Callable[[int, int], torch.Tensor]) -> None:
    """All bytes once. `destination` is told thread and unit; a buffer of one piece is used again and again."""
    files = [os.open(unit.path, os.O_RDONLY | os.O_DIRECT) for unit in units]
    pieces = iter([(n, start) for n, unit in enumerate(units) for start in range(0, unit.nbytes, PIECE)])
    lock = threading.Lock()

    def work(thread: int) -> None:
        while True:
            with lock:
                unit, start = next(pieces, (None, 0))
            if unit is None:
                return
            into = memoryview(destination(thread, unit).numpy())
            at = start if len(into) > PIECE else 0
            length = min(PIECE, align(units[unit].nbytes - start, PAGE))
            os.preadv(files[unit], [into[at : at + length]], units[unit].offset + start)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for file in files:
        os.close(file)


def read_all(reader: Reader, units: list[Stored], ring: list[torch.Tensor]) -> None:
    """All units in turn, as an engine wants them: the next are queued while one is waited for."""
    reads = []
    for number in range(len(units) + len(ring)):
        if number >= len(ring):
            reads[number - len(ring)].wait()
        if number < len(units):
            reads.append(reader.request(units[number], ring[number % len(ring)], number))


def table(rows: dict[str, list[float]], nbytes: int, count: int, workers: int) -> str:
    bare = [median(rows[name]) for name in BARE]
    lines = [
        f"{nbytes / GIB:.2f} GiB in {count} units, {workers} workers, pieces of {PIECE // MIB} MiB, page cache cold; "
        "medians (least to most)",
        "",
        f"| row | GB/s | / {BARE[0]} | / {BARE[1]} |",
        "|---|---|---|---|",
    ]
    for row, rates in rows.items():
        least, middle, most = (each(rates) / 1e9 for each in (min, median, max))
        shares = " | ".join(f"{middle * 1e9 / each:.3f}" for each in bare)
        lines.append(f"| {row} | {middle:.2f} ({least:.2f} to {most:.2f}) | {shares} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()

"""What the engine counted, and how it reads."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .component import Unit
    from .streams import Streams

GIB = 2**30
_UNTIMED = nullcontext()


@dataclass(frozen=True)
class Prediction:
    """What a component's forward is predicted to take, for the inputs that it had last.

    Attributes:
        seconds: of one forward when they follow one another.
        peak_bytes: on the device, activations included.
        kept_bytes: of weights that stay meanwhile; `streamed_bytes` those that are copied each time.
    """

    seconds: float
    peak_bytes: int
    kept_bytes: int
    streamed_bytes: int


@dataclass(frozen=True)
class DiskReport:
    """What the disk tier did.

    Attributes:
        stored_bytes: of weights on disk.
        buffer_bytes: of host memory that they pass through and are kept in.
        hits: loads of units that host memory had kept; `misses` those that were read for it.
        evictions: units that gave way to others.
        bytes_read: from disk, in `read_seconds` during which at least one thread was reading.
        retries: reads that failed and were repeated.
    """

    stored_bytes: int
    buffer_bytes: int
    hits: int
    misses: int
    evictions: int
    bytes_read: int
    read_seconds: float
    retries: int

    def rows(self) -> list[tuple[str, str]]:
        rate = f", {self.bytes_read / self.read_seconds / 1e9:.2f} GB/s" if self.read_seconds else ""
        uses = self.hits + self.misses
        return [
            ("on disk", f"{size_text(self.stored_bytes)}, buffers {size_text(self.buffer_bytes)}"),
            ("read from disk", f"{size_text(self.bytes_read)}{rate}"),
            ("host cache", f"{self.hits / uses:.1%} of {uses} loads hit, {self.evictions} evictions")
            if uses
            else ("host cache", "not used yet"),
            *([("reads repeated", f"{self.retries}")] if self.retries else []),
        ]


@dataclass(frozen=True)
class PackedReport:
    """What packing does.

    Attributes:
        raw_bytes: of the weights that are packed; they take `packed_bytes` of host memory.
        unpack_ms: device time of the unpacking that was timed (`measured()`), None if none was.
    """

    raw_bytes: int
    packed_bytes: int
    unpack_ms: float | None

    def rows(self) -> list[tuple[str, str]]:
        ratio = self.packed_bytes / self.raw_bytes
        return [
            ("packed", f"{size_text(self.raw_bytes)} to {ratio:.1%}"),
            *([("unpacking", f"{self.unpack_ms:.1f} ms")] if self.unpack_ms is not None else []),
        ]


@dataclass(frozen=True)
class Report:
    """One enablement in numbers, counted since it began or since `reset()`.

    Attributes:
        forwards: component forwards.
        uses: forwards of streamed units.
        misses: those whose load had not been queued before (the first pass has some).
        loads: units and stems copied to the device; `bytes_loaded` the bytes copied for them, packed ones as such.
        write_backs: tensors copied to the host because a forward wrote to them.
        shortages: forwards that ran out of device memory and were run again with less of it.
        transfer_ms: device time of the copies that were timed (`measured()`), None if none were.
        stall_ms: device time that units waited for their copy, None likewise.
        paired: calls that were answered at once, having been computed together with an earlier one.
        discarded: results that were computed so for calls that did not come; `unpaired` says why the passes of a
            component are not run together, where they might be.
        predictions: per component that a budget has measured, what a forward is predicted to take.
        host_bytes: bytes of host memory that hold weights; `pinned_bytes` of them are pinned.
        packed: what packing does, None where nothing is packed.
        disk: what the disk tier did, None if there is none.
        peak_bytes: most bytes of tensors on the device at once, as torch measures it (since its statistics
            were reset, or since a budget measured a forward, which resets them); 0 on the CPU.
        arena_bytes: bytes of the arena; `resident_bytes` those of weights that stay on the device.
    """

    forwards: int
    uses: int
    misses: int
    loads: int
    bytes_loaded: int
    write_backs: int
    shortages: int
    paired: int
    discarded: int
    unpaired: Mapping[str, str]
    transfer_ms: float | None
    stall_ms: float | None
    host_bytes: int
    pinned_bytes: int
    packed: PackedReport | None
    disk: DiskReport | None
    predictions: Mapping[str, Prediction]
    peak_bytes: int
    arena_bytes: int
    resident_bytes: int

    @property
    def hidden(self) -> float | None:
        """Share of the transfer time that computing covered, 0.0 to 1.0; None where nothing was timed."""
        if not self.transfer_ms:
            return None
        return max(0.0, 1.0 - self.stall_ms / self.transfer_ms)

    def rows(self) -> list[tuple[str, str]]:
        rows = [
            ("forwards", f"{self.forwards}"),
            ("unit uses", f"{self.uses}"),
            ("misses", f"{self.misses}"),
            ("moved to the device", f"{size_text(self.bytes_loaded)} in {self.loads} loads"),
            ("written back", f"{self.write_backs} tensors"),
            *([("out of memory, run again", f"{self.shortages}")] if self.shortages else []),
            *([("answered from a pair", f"{self.paired} calls")] if self.paired else []),
            *([("computed and not asked for", f"{self.discarded} passes")] if self.discarded else []),
            ("host memory", f"{size_text(self.host_bytes)} ({size_text(self.pinned_bytes)} pinned)"),
            ("peak device memory", size_text(self.peak_bytes) if self.peak_bytes else "not counted"),
            ("arena", size_text(self.arena_bytes)),
            ("resident", size_text(self.resident_bytes)),
            *(self.packed.rows() if self.packed is not None else []),
            *(self.disk.rows() if self.disk is not None else []),
        ]
        rows += [(f"passes of {name}", f"one by one: {why}") for name, why in self.unpaired.items()]
        for name, prediction in self.predictions.items():
            rows.append(
                (
                    f"predicted for {name}",
                    f"{prediction.seconds * 1e3:.1f} ms a forward, at most {size_text(prediction.peak_bytes)}",
                )
            )
        if self.hidden is not None:
            rows.append(
                (
                    "transfer hidden",
                    f"{self.hidden:.1%} (waited {self.stall_ms:.1f} of {self.transfer_ms:.1f} ms)",
                )
            )
        return rows

    def __str__(self) -> str:
        return table(("offload", ""), self.rows())


def size_text(nbytes: float) -> str:
    """Bytes in a unit that suits them: "22.19 GiB", "3.40 MiB", "0"."""
    for unit, scale in (("GiB", GIB), ("MiB", 2**20), ("KiB", 2**10)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes:.0f} B" if nbytes else "0"


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    """Rows of text in aligned columns; all but the first column flush right."""
    lines = [header, *rows]
    widths = [max(len(str(line[i])) for line in lines) for i in range(len(header))]

    def text(line: tuple[str, ...]) -> str:
        cells = [str(line[0]).ljust(widths[0])]
        cells += [str(cell).rjust(width) for cell, width in zip(line[1:], widths[1:], strict=True)]
        return "  ".join(cells).rstrip()

    return "\n".join([text(header), "  ".join("-" * width for width in widths), *map(text, rows)])


@dataclass
class Counters:
    """What the engine counts while it runs; times only while `timing` is on."""

    forwards: int = 0
    uses: int = 0
    misses: int = 0
    loads: int = 0
    bytes_loaded: int = 0
    write_backs: int = 0
    shortages: int = 0
    paired: int = 0
    discarded: int = 0
    timing: bool = False
    streams: Streams | None = None
    _copies: list[tuple[Any, Any]] = field(default_factory=list)  # (copy begins, copy ends)
    _waits: list[tuple[Any, Any]] = field(default_factory=list)  # (unit wants to begin, copy ends)
    _unpacks: list[tuple[Any, Any]] = field(default_factory=list)  # (unpacking begins, ends)
    _ends: dict[Unit, Any] = field(default_factory=dict)

    def reset(self) -> None:
        """Count from zero again."""
        self.forwards = self.uses = self.misses = self.loads = self.bytes_loaded = 0
        self.write_backs = self.shortages = self.paired = self.discarded = 0
        for timed in (self._copies, self._waits, self._unpacks, self._ends):
            timed.clear()

    def depart(self, stream: Any) -> None:
        """A copy is about to be queued on `stream`."""
        begin = self.streams.event(timing=True)
        begin.record(stream)
        self._copies.append((begin, None))

    def loaded(self, unit: Unit, nbytes: int, stream: Any) -> None:
        """The copy of `unit`, of so many bytes, is queued up to what `stream` has by now."""
        self.loads += 1
        self.bytes_loaded += nbytes
        if self.timing:
            end = self.streams.event(timing=True)
            end.record(stream)
            self._copies[-1] = (self._copies[-1][0], end)
            self._ends[unit] = end

    def timed_unpacking(self, stream: Any) -> AbstractContextManager[None]:
        """What is queued on `stream` within unpacks."""
        return self._timed(stream) if self.timing else _UNTIMED

    @contextmanager
    def _timed(self, stream: Any) -> Iterator[None]:
        begin, end = (self.streams.event(timing=True) for _ in range(2))
        begin.record(stream)
        yield
        end.record(stream)
        self._unpacks.append((begin, end))

    def arrive(self, stream: Any) -> Any:
        """`stream` is about to ask for a unit; returns what `waits` wants."""
        arrival = self.streams.event(timing=True)
        arrival.record(stream)
        return arrival

    def waits(self, unit: Unit, arrival: Any) -> None:
        """Since `arrival` it waits for `unit`."""
        if unit in self._ends:
            self._waits.append((arrival, self._ends.pop(unit)))

    def times(self) -> tuple[float | None, float | None]:
        """(transfer, stall) in milliseconds of device time; waits for the device."""
        if not self._copies:
            return None, None
        self.streams.synchronize("the copies that were timed")
        transfer = sum(begin.elapsed_time(end) for begin, end in self._copies if end is not None)
        stall = sum(max(0.0, arrival.elapsed_time(end)) for arrival, end in self._waits)
        return transfer, stall

    def unpack_time(self) -> float | None:
        """Milliseconds of device time; waits for the device."""
        if not self._unpacks:
            return None
        self.streams.synchronize("the unpacking that was timed")
        return sum(begin.elapsed_time(end) for begin, end in self._unpacks)

"""The reader: threads that bring units from disk to host memory, the one needed next first.

A read is cut into pieces. Whenever a worker is free it takes the next piece of the most urgent read, so several
workers fill one unit, and an urgent unit overtakes a long one. A read is *settled* once its outcome is known
and no worker touches its destination any longer; only then does `wait` return or raise the read's error.
"""

from __future__ import annotations

import weakref
from collections import deque

import torch

from ..log import logger
from .blockfile import Stored
from .descriptors import Descriptors, Identity, System
from .digests import cut
from .pieces import DiskReadError, open_destination
from .workers import ReaderCounters, Workers

__all__ = ["DiskReadError", "Read", "Reader", "ReaderCounters"]


class Reader:
    """Reads units in the order of their urgency.

    Closed explicitly, as a context manager, or when nobody holds it any more; reads that are then still queued
    fail. To be called from any thread.

    Args:
        workers: threads that read at the same time; others hash meanwhile what has come, on all cores if need be.
        timeout: seconds without a byte after which `Read.wait` gives up; also how long `close` waits.
        direct: read past the page cache where the file system allows it.
        system: calls of the operating system, for tests.
    """

    def __init__(
        self, workers: int, timeout: float = 120.0, *, direct: bool = True, system: System | None = None
    ) -> None:
        if workers < 1:
            raise ValueError(f"num_disk_workers={workers} is too few: at least one thread must read")
        if not timeout > 0:
            raise ValueError(f"timeout={timeout} must be a positive number of seconds")
        system = system or System()
        self._workers = Workers(workers, timeout, system, Descriptors(system, direct))
        # The threads hold `Workers`, never the reader: so it can be collected, which ends them.
        self._stop = weakref.finalize(self, self._workers.stop)

    def request(self, source: Stored, destination: torch.Tensor, distance: int = 0) -> Read:
        """Queue the read of a whole unit.

        Args:
            destination: uint8, on the host, not to be touched until the read is settled. Page-aligned and with
                room for `nbytes` rounded up to 4096, it is filled without a copy; what lies behind the unit
                in its last page is then undefined. Otherwise the page cache helps out.
            distance: to the next use; the smallest goes first, equals in the order of their requests. It is only
                compared, so the number of that use in an endless count serves as well.

        Raises:
            ValueError: the destination is no host memory, or too small.
            RuntimeError: the reader is closed.
        """
        return self._workers.add(Read(self._workers, source, destination, distance))

    @property
    def counters(self) -> ReaderCounters:
        return self._workers.counters()

    def close(self, wait: bool = True) -> None:
        """Fail what is queued, let pieces under way end, join the threads, close the files. May be repeated.

        Args:
            wait: for the pieces under way, which end some time anyway.
        """
        self._stop()
        late = self._workers.join(wait)
        if late:
            logger.warning("the disk reader closes without waiting any longer for %s", "; ".join(late))

    def close_files(self) -> None:
        """Open them anew when they are read next."""
        self._workers.close_files()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Read:
    """The read of one unit: wait for it, hurry it, or cancel it."""

    def __init__(self, workers: Workers, source: Stored, destination: torch.Tensor, distance: int) -> None:
        self.source = source
        self.distance = distance
        self._workers = workers
        self._destination = open_destination(destination, source.nbytes)
        self._number = 0  # of the request
        self._pending = deque(cut(source.nbytes))  # pieces that no worker has taken
        self._left = len(self._pending)  # pieces that have not arrived, or are being hashed
        self._digests: dict[int, bytes] = {}  # of pieces, by where they start
        self._held = 0  # workers that may touch the destination
        self._failure: DiskReadError | None = None
        self._arrived = False
        self._moved_at = 0.0
        self._deaths = 0
        self._seen: set[Identity] = set()  # of the files it came from: one, unless somebody changed it

    @property
    def settled(self) -> bool:
        """Whether the outcome is known; the destination then belongs to the caller again."""
        return self._held == 0 and (self._arrived or self._failure is not None)

    @property
    def failed(self) -> bool:
        """Whether the unit will not arrive; `wait` says why."""
        return self._failure is not None

    def hurry(self, distance: int) -> None:
        """The unit is needed sooner than was thought; a larger distance changes nothing."""
        self.distance = min(self.distance, distance)

    def wait(self) -> None:
        """Return when the unit's bytes are in the destination; until then, nothing is more urgent.

        Raises:
            DiskReadError: they will not come: read error, truncated, vanished or changed file, cancelled, closed.
            TimeoutError: nothing came for `timeout` seconds. A worker may still write to the destination, which
                must not be used otherwise until the read is `settled`; one may wait again, or cancel.
        """
        if not self.settled:
            self._workers.settle(self)
        if self._failure is not None:
            f = self._failure  # a new error each time: tracebacks of all who waited would pile up in one
            raise DiskReadError(self.source, f.cause, f.remedy, f.errno) from f.__cause__

    def cancel(self, wait: bool = True) -> None:
        """The unit is not needed; afterwards nobody writes to the destination. No effect once it arrived.

        Args:
            wait: until it is settled; otherwise it is, soon.

        Raises:
            TimeoutError: as for `wait`.
        """
        self._workers.fail(self, DiskReadError(self.source, "the read was cancelled", "request it again"))
        if wait:
            self._workers.settle(self)

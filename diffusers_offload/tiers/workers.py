"""The threads that read: which piece comes next, who has it, and what becomes of it if its worker dies."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from threading import Condition, Thread
from time import monotonic
from typing import TYPE_CHECKING

from ..log import logger
from ..report import size_text
from . import digests
from .blockfile import Stored
from .descriptors import Descriptors, Identity, System
from .pieces import REBUILD, DiskReadError, fill, told

if TYPE_CHECKING:
    from .reader import Read

_PAUSES = (0.02, 0.1, 0.5)  # seconds before each further attempt after an error
_HASHING = (
    4  # threads for each that may read at a time, but no more than there are cores: no disk stands still
)
_DEATHS = 3  # workers that may die on one read before it is given up
_POLL = 0.5  # seconds between two looks at whether the workers live
_CLOSED = ("the reader was closed", "enable offloading again")


@dataclass(frozen=True)
class ReaderCounters:
    """What was read so far.

    Attributes:
        reads: units that arrived; `bytes_read` counts every byte that did, those of failed reads included.
        seconds: time in which at least one worker was reading.
        retries: attempts after an error; `failures` reads that ended in one.
        verified: units whose digest was compared.
    """

    reads: int = 0
    bytes_read: int = 0
    seconds: float = 0.0
    retries: int = 0
    failures: int = 0
    verified: int = 0


@dataclass(eq=False)
class _Task:
    """A piece that a worker has taken."""

    read: Read
    start: int
    stop: int
    reads: bool = True  # as opposed to hashing what it has read, or being over
    counted: bool = False  # `read` waits for it no longer
    last: bool = False  # it was the last one: what is left is to compare the digest

    def __str__(self) -> str:
        what = "comparing the digest of" if self.last else "reading" if self.reads else "hashing"
        where = "" if self.last else f" bytes {self.start} to {self.stop} of"
        return f"{what}{where} {_name(self.read)}"


@dataclass(eq=False)
class _Worker:
    """A thread and what it does."""

    name: str
    thread: Thread | None = None
    task: _Task | None = None
    since: float = 0.0

    def __str__(self) -> str:
        state = "alive" if self.thread.is_alive() else "dead"
        doing = f"{self.task} for {monotonic() - self.since:.1f} s" if self.task else "waiting for work"
        return f"{self.name} ({state}) {doing}"


class Workers:
    """Threads, the reads that they serve, and what they share.

    It knows no `Reader`, so that a reader nobody holds can be collected. The condition's lock is reentrant
    because the collector may call `stop` anywhere, also within it.
    """

    def __init__(self, count: int, timeout: float, system: System, files: Descriptors) -> None:
        self._count = count
        self._most = count + min(digests.cores(), count * _HASHING)  # threads
        self._timeout = timeout
        self._system = system
        self._files = files
        self._changed = Condition()
        self._queue: list[Read] = []  # with pieces to take: some dozens, so the first is found by looking
        self._workers: list[_Worker] = []
        self._obituaries: deque[str] = deque(maxlen=4)
        self._stopping = False
        self._moved_at = 0.0
        self._requests = self._hired = 0
        self._verified: dict[Stored, Identity] = {}
        self._counted = dict.fromkeys(ReaderCounters.__dataclass_fields__, 0)
        self._reading_since = 0.0  # when the first of the workers that are reading began

    # --- the callers' side ----------------------------------------------------------------------------

    def add(self, read: Read) -> Read:
        with self._changed:
            if self._stopping:
                raise RuntimeError("this reader is closed")
            self._requests += 1
            read._number = self._requests
            self._queue.append(read)
            self._staff()
            self._changed.notify_all()
        return read

    def settle(self, read: Read) -> None:
        """Block until `read` is settled."""
        begin = monotonic()
        with self._changed:
            read.distance = min(read.distance, 0)
            while not read.settled:
                self._staff()
                # As long as pieces of it are queued, it advances when those before it do.
                sign = max(begin, read._moved_at, self._moved_at if read._pending else 0.0)
                quiet = monotonic() - sign
                if quiet >= self._timeout:
                    raise TimeoutError(self._diagnosis(read, quiet))
                self._changed.wait(min(self._timeout - quiet, _POLL))

    def fail(self, read: Read, failure: DiskReadError) -> None:
        """Give up on `read`, unless its outcome is known."""
        with self._changed:
            if read._arrived or read._failure is not None:
                return
            read._failure = failure
            read._pending.clear()
            if read in self._queue:
                self._queue.remove(read)
            self._changed.notify_all()

    def stop(self) -> None:
        """No more reads; does not wait for the threads."""
        with self._changed:
            self._stopping = True
            for read in list(self._queue):
                self.fail(read, DiskReadError(read.source, *_CLOSED))
            self._changed.notify_all()

    def close_files(self) -> None:
        self._files.close()

    def join(self, wait: bool = True) -> list[str]:
        """Wait for the threads to end; returns what those do that did not."""
        with self._changed:
            workers = list(self._workers)
        deadline = monotonic() + (self._timeout if wait else 0.0)
        for worker in workers:
            worker.thread.join(max(0.0, deadline - monotonic()))
        self._files.close()
        return [str(worker) for worker in workers if worker.thread.is_alive()]

    def counters(self) -> ReaderCounters:
        with self._changed:
            under_way = monotonic() - self._reading_since if self._reading() else 0.0
            return ReaderCounters(**{**self._counted, "seconds": self._counted["seconds"] + under_way})

    # --- the workers' side ----------------------------------------------------------------------------

    def serve(self, worker: _Worker) -> None:
        """A worker's life."""
        try:
            while self._take(worker):
                self._perform(worker)
        except BaseException as error:  # whatever it is, somebody may wait for the piece that this worker had
            logger.error("%s died, another takes over: %r", worker.name, error)
            self._bury(worker, error.with_traceback(None))  # whose frames hold the destination
        finally:
            self._leave(worker)

    def _take(self, worker: _Worker) -> bool:
        with self._changed:
            while not self._queue or self._reading() >= self._count:
                if self._stopping:
                    return False
                self._changed.wait()
            read = min(self._queue, key=lambda each: (each.distance, each._number))
            if not self._reading():
                self._reading_since = monotonic()
            worker.task, worker.since = _Task(read, *read._pending[0]), monotonic()
            read._pending.popleft()
            read._held += 1
            if not read._pending:
                self._queue.remove(read)
            return True

    def _perform(self, worker: _Worker) -> None:
        task = worker.task
        read, attempts = task.read, 1

        def again(failed: int, error: OSError) -> bool:
            nonlocal attempts
            if failed > len(_PAUSES) or not self._pause(read, _PAUSES[failed - 1]):
                return False
            attempts += 1
            return True

        def moved(count: int) -> None:
            self._note(read, count)

        failure = None
        try:
            files = (self._system, self._files)
            seen = fill(*files, read.source, read._destination, task.start, task.stop, moved, again)
            self._hand_on(worker, seen)
            digest = None
            if read._failure is None and seen != {self._verified.get(read.source)}:
                digest = digests.of_piece(read._destination.bytes[task.start : task.stop])
            if self._is_last(task, digest):
                self._verify(read)
        except OSError as error:
            failure = told(read.source, error, attempts).with_traceback(
                None
            )  # its frames hold the destination
            if failure is not error:
                failure.__cause__ = error.with_traceback(None)
        self._finish(worker, failure)

    def _pause(self, read: Read, seconds: float) -> bool:
        """Wait before another attempt; returns whether it is still wanted."""
        with self._changed:
            self._counted["retries"] += 1
            over = lambda: self._stopping or read._failure is not None  # noqa: E731
            return not self._changed.wait_for(over, seconds)

    def _note(self, read: Read, count: int) -> None:
        with self._changed:
            self._counted["bytes_read"] += count
            read._moved_at = self._moved_at = monotonic()

    def _hand_on(self, worker: _Worker, seen: set[Identity]) -> None:
        """The piece has arrived: while this worker hashes it, another may read."""
        with self._changed:
            worker.since = monotonic()
            self._rest(worker.task)
            worker.task.read._seen |= seen
            if self._queue:
                self._changed.notify_all()

    def _is_last(self, task: _Task, digest: bytes | None) -> bool:
        """The piece is done with, and has this digest if it was hashed; whether the unit is."""
        with self._changed:
            read = task.read
            if digest is not None:
                read._digests[task.start] = digest
            read._left -= 1
            task.counted = True
            task.last = read._left == 0 and read._failure is None
            return task.last

    def _verify(self, read: Read) -> None:
        """Compare the unit's digest, unless this very file has been found right before."""
        source = read.source
        now = self._files.identity(source.path)
        read._seen.add(now)
        if read._seen == {now} and self._verified.get(source) == now:
            return
        pieces = digests.cut(source.nbytes)
        for start, stop in pieces:
            if start not in read._digests:  # the file was replaced behind this piece
                read._digests[start] = digests.of_piece(read._destination.bytes[start:stop])
                self._note(read, 0)
                if read._failure is not None:
                    return
        if digests.of_pieces([read._digests[start] for start, _ in pieces], source.nbytes) != source.digest:
            raise DiskReadError(source, "its bytes are not those that were stored (digest differs)", REBUILD)
        with self._changed:
            self._counted["verified"] += 1
            if read._seen == {now}:
                self._verified[source] = now

    def _finish(self, worker: _Worker, failure: DiskReadError | None) -> None:
        with self._changed:
            task, read = worker.task, worker.task.read
            self._rest(task)
            worker.task = None
            read._held -= 1
            if failure is not None:
                self._counted["failures"] += read._failure is None
                self.fail(read, failure)
            elif task.last and read._failure is None:  # nobody else knows whether the digest was right
                read._arrived = True
                self._counted["reads"] += 1
            if read.settled:
                self._changed.notify_all()

    def _rest(self, task: _Task) -> None:
        """The task does not read any longer."""
        if task.reads:
            task.reads = False
            if not self._reading():
                self._counted["seconds"] += monotonic() - self._reading_since

    def _reading(self) -> int:
        """How many workers read now."""
        return sum(worker.task is not None and worker.task.reads for worker in self._workers)

    # --- who works ------------------------------------------------------------------------------------

    def _staff(self) -> None:
        """See to it that all workers live."""
        for worker in [each for each in self._workers if not each.thread.is_alive()]:
            self._bury(worker, None)
        while len(self._workers) < self._most and not self._stopping:
            self._hired += 1
            worker = _Worker(f"disk worker {self._hired}")
            worker.thread = Thread(target=self.serve, args=(worker,), name=worker.name, daemon=True)
            try:
                worker.thread.start()
            except RuntimeError as error:  # the system has no thread for us, or Python is shutting down
                if not self._workers:
                    for read in list(self._queue):
                        self.fail(
                            read, DiskReadError(read.source, f"no thread can read it: {error}", "try again")
                        )
                return
            self._workers.append(worker)

    def _bury(self, worker: _Worker, error: BaseException | None) -> None:
        """A worker is dead: its piece goes back, unless it has killed too many."""
        with self._changed:
            if worker not in self._workers:
                return
            self._workers.remove(worker)
            cause = repr(error) if error is not None else "it ended without a word"
            self._obituaries.append(f"{worker.name} (dead) {cause}, {worker.task or 'idle'}")
            task, worker.task = worker.task, None
            if task is not None:
                read = task.read
                self._rest(task)
                read._held -= 1
                read._left += task.counted
                read._deaths += 1
                if read._failure is None and (read._deaths >= _DEATHS or self._stopping):
                    died = f"{read._deaths} disk worker(s) died on it, the last of {cause}"
                    failure = DiskReadError(
                        read.source, died, "report this with the log: it is a mistake in the reader"
                    )
                    failure.__cause__ = error
                    self._counted["failures"] += 1
                    self.fail(read, failure)
                elif read._failure is None:
                    read._pending.appendleft((task.start, task.stop))
                    if read not in self._queue:
                        self._queue.append(read)
                self._staff()  # at most as often as reads may kill, so this ends
            self._changed.notify_all()

    def _leave(self, worker: _Worker) -> None:
        with self._changed:
            if worker in self._workers:
                self._workers.remove(worker)
            if self._stopping and not self._workers:
                self._files.close()

    def _diagnosis(self, read: Read, quiet: float) -> str:
        have = read.source.nbytes - sum(stop - start for start, stop in read._pending)
        queued = sorted(self._queue, key=lambda each: (each.distance, each._number))
        lines = [
            f"no byte of {_name(read)} came from disk for {quiet:.1f} s (loading timeout): "
            f"{size_text(have)} have arrived or are being read, by {read._held} worker(s)",
            *(str(worker) for worker in self._workers),
            *self._obituaries,
            f"{len(queued)} read(s) queued"
            + "".join(f"; {_name(r)}, distance {r.distance}" for r in queued[:4]),
            *([f"it has failed already: {read._failure}"] if read._failure else []),
            "Remedy: see whether the disk answers (`dd` from that file); if it is only slow, give more time",
        ]
        return "\n  ".join(lines)


def _name(read: Read) -> str:
    source = read.source
    return f"{source.path} ({size_text(source.nbytes)} at byte {source.offset})"

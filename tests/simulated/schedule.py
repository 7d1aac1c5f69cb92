"""When queued work is done: at once, or as late and in as odd an order as streams and events allow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from random import Random


class Mark:
    """A point in a queue."""

    def __init__(self, queue: Queue, reached: bool) -> None:
        self.queue = queue
        self.reached = reached


class Queue:
    """The work of one stream: functions, marks to be reached, and marks of others to wait for."""

    def __init__(self) -> None:
        self.pending: deque[Callable[[], None] | Mark | tuple[Mark]] = deque()


class Schedule:
    """Does work at once; between `begin` and `end`, later, as a seed decides."""

    def __init__(self) -> None:
        self._random: Random | None = None
        self._queues: list[Queue] = []
        self.postponed = 0  # pieces of work that were not done at once

    def begin(self, seed: int) -> None:
        self._random = Random(seed)

    def end(self) -> None:
        self._random = None

    def queue(self, queue: Queue, work: Callable[[], None]) -> None:
        """More work for a stream."""
        if self._random is None and not queue.pending:
            work()
            return
        self.postponed += 1
        if queue not in self._queues:
            self._queues.append(queue)
        queue.pending.append(work)
        self.advance()

    def mark(self, queue: Queue) -> Mark:
        """A mark behind all that was queued so far."""
        mark = Mark(queue, not queue.pending)
        if queue.pending:
            queue.pending.append(mark)
        return mark

    def wait(self, queue: Queue, mark: Mark) -> None:
        """What is queued from now on is done behind `mark`."""
        if not mark.reached:
            if queue not in self._queues:
                self._queues.append(queue)
            queue.pending.append((mark,))

    def advance(self) -> None:
        """Do some work, or none, of streams chosen at random."""
        if self._random is None:
            return
        for _ in range(self._random.choice((0, 0, 0, 1, 3, 9))):
            self._queues = [queue for queue in self._queues if queue.pending]
            if self._queues:
                self._step(self._random.choice(self._queues))

    def reach(self, mark: Mark) -> None:
        """Do what must be done for `mark`."""
        while not mark.reached:
            self._force(mark.queue)

    def finish(self, queue: Queue) -> None:
        """Do all of a stream's work."""
        while queue.pending:
            self._force(queue)

    def _force(self, queue: Queue) -> None:
        """One step of `queue`, and whatever it waits for."""
        first = queue.pending[0]
        if isinstance(first, tuple):
            self.reach(first[0])
        self._step(queue)

    def _step(self, queue: Queue) -> None:
        if not queue.pending:
            return
        first = queue.pending[0]
        if isinstance(first, tuple):
            if first[0].reached:
                queue.pending.popleft()
        elif isinstance(first, Mark):
            first.reached = True
            queue.pending.popleft()
        else:
            queue.pending.popleft()
            first()

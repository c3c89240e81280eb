"""A queue of objects to look at: each is in it once, is worked on by one at a time, and comes back when it is due."""

from __future__ import annotations

import heapq
import threading
import time
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

Key = TypeVar("Key", bound=Hashable)


class WorkQueue(Generic[Key]):
    """Keys by the time when they are due. A key added while it is worked on comes back after that."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self.clock = clock
        self._due: dict[Key, float] = {}
        self._heap: list[tuple[float, int, Key]] = []
        self._working: set[Key] = set()
        self._condition = threading.Condition()
        self._count = 0
        self._closed = False

    def add(self, key: Key, delay: float = 0.0) -> None:
        """Make the key due after `delay` seconds, or at the earlier time that it already has."""
        with self._condition:
            due = self.clock() + delay
            if key in self._due and self._due[key] <= due:
                return
            self._due[key] = due
            self._count += 1
            heapq.heappush(self._heap, (due, self._count, key))
            self._condition.notify()

    def take(self) -> Key | None:
        """Wait for a key that is due and free; None when the queue is closed."""
        with self._condition:
            while not self._closed:
                wait = None
                held = []
                found = None
                while self._heap:
                    due, _, key = self._heap[0]
                    if self._due.get(key) != due:
                        heapq.heappop(self._heap)  # made due earlier, or taken since
                    elif due > self.clock():
                        wait = due - self.clock()
                        break
                    elif key in self._working:
                        held.append(heapq.heappop(self._heap))
                    else:
                        heapq.heappop(self._heap)
                        found = key
                        break
                for entry in held:
                    heapq.heappush(self._heap, entry)
                if found is not None:
                    del self._due[found]
                    self._working.add(found)
                    return found
                self._condition.wait(wait)
            return None

    def done(self, key: Key) -> None:
        with self._condition:
            self._working.discard(key)
            self._condition.notify()

    def close(self) -> None:
        with self._condition:
            self._closed = True
            self._condition.notify_all()

    def __len__(self) -> int:
        return len(self._due)

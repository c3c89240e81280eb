"""The queue hands out each key once at a time, and not before it is due."""

from __future__ import annotations

import threading

from bluewhale_operator.queue import WorkQueue


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_a_key_added_twice_is_handed_out_once() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    queue.add("a")
    assert (queue.take(), len(queue)) == ("a", 0)


def test_a_key_added_while_it_is_worked_on_comes_back_afterwards() -> None:
    queue: WorkQueue[str] = WorkQueue()
    queue.add("a")
    queue.add("b", 0.0)
    assert queue.take() == "a"
    queue.add("a")
    assert queue.take() == "b"  # a is not free
    queue.done("a")
    assert queue.take() == "a"


def test_the_earlier_of_two_times_counts() -> None:
    clock = Clock()
    queue: WorkQueue[str] = WorkQueue(clock)
    queue.add("late", 10)
    queue.add("soon", 60)
    queue.add("soon", 5)
    queue.add("soon", 30)
    clock.now = 5
    assert queue.take() == "soon"
    clock.now = 10
    assert queue.take() == "late"
    assert len(queue) == 0


def test_whoever_waits_is_woken_by_a_key_and_by_the_end() -> None:
    queue: WorkQueue[str] = WorkQueue()
    taken: list[str | None] = []
    threads = [threading.Thread(target=lambda: taken.append(queue.take())) for _ in range(2)]
    for thread in threads:
        thread.start()
    queue.add("a")
    threads[0].join(0.2)
    threads[1].join(0.2)
    queue.close()
    for thread in threads:
        thread.join(5)
    assert sorted(taken, key=str) == [None, "a"]


def test_no_key_is_worked_on_by_two_at_once_and_none_is_lost() -> None:
    queue: WorkQueue[int] = WorkQueue()
    guard, at_work, clashes, seen = threading.Lock(), set(), [], set()

    def work() -> None:
        while (key := queue.take()) is not None:
            with guard:
                clashes.extend([key] if key in at_work else [])
                at_work.add(key)
            seen.add(key)
            with guard:
                at_work.discard(key)
            queue.done(key)

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for _ in range(50):
        for key in range(20):
            queue.add(key)
    while len(queue):
        pass
    queue.close()
    for thread in threads:
        thread.join(5)
    assert clashes == []
    assert seen == set(range(20))

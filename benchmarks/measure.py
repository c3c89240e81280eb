"""A measurement is a process of its own: its wall time, and the most memory that it and its children held, at a look
every other second."""

from __future__ import annotations

import math
import subprocess
import threading
import time
from dataclasses import dataclass

import psutil

INTERVAL = 0.1
MEMORY_INTERVAL = 2.0
"""Every page is asked for: of 2 GiB that takes 90 ms of a core, which what is measured goes without."""


@dataclass(frozen=True)
class Measured:
    seconds: float
    gibibytes: float


def measure(command: list[str], limit: float = math.inf) -> Measured | None:
    """Run a command to its end; None where it fails, with its last words printed, or takes longer than the limit."""
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    words: list[str] = []
    peak, due = 0, started
    reader = threading.Thread(target=lambda: words.extend(process.stderr or []))
    reader.start()
    while process.poll() is None:
        if time.perf_counter() - started > limit:
            end(process.pid)
        if time.perf_counter() >= due:
            peak = max(peak, resident(process.pid))
            due = time.perf_counter() + MEMORY_INTERVAL
        time.sleep(INTERVAL)
    seconds = time.perf_counter() - started
    reader.join()
    if seconds > limit:
        return None
    if process.returncode:
        print(f"failed with {process.returncode}: {' '.join(command)}\n{''.join(words[-5:])}")
        return None
    return Measured(seconds, peak / 2**30)


def end(pid: int) -> None:
    """Kill a process and its children."""
    for each in [*psutil.Process(pid).children(recursive=True), psutil.Process(pid)]:
        each.kill()


def resident(pid: int) -> int:
    """Bytes in memory of a process and its children; of what they share, each counts its part."""
    total = 0
    try:
        family = [psutil.Process(pid), *psutil.Process(pid).children(recursive=True)]
    except psutil.NoSuchProcess:
        return 0
    for each in family:
        try:
            total += each.memory_full_info().pss
        except psutil.NoSuchProcess:
            continue
    return total

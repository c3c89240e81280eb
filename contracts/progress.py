"""Progress of long work, reported by whoever does it and shown by whoever runs it.

A stage may be several processes away from the terminal, so progress travels as marked lines of its output.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

listener: Callable[[float, float, str], None] | None = None
"""Set by a command that shows the progress of a stage in its own process."""

MARK = "@progress "
VARIABLE = "BLUEWHALE_PROGRESS"


def report(done: float, total: float, text: str = "") -> None:
    """Say that `done` of `total` is done; `text` is a few words or figures beside the bar."""
    if listener:
        listener(done, total, text)
    elif os.environ.get(VARIABLE):
        sys.stdout.write(f"{MARK}{json.dumps([done, total, text])}\n")
        sys.stdout.flush()


@contextmanager
def silent() -> Iterator[None]:
    """Keep what is reported within to itself: the work is a part of what reports by itself."""
    global listener
    before = listener
    listener = lambda *_: None  # noqa: E731
    try:
        yield
    finally:
        listener = before


def parse(line: str) -> tuple[float, float, str] | None:
    """The progress in a line of output, or None for any other line."""
    _, mark, rest = line.partition(MARK)
    if not mark:
        return None
    try:
        done, total, text = json.loads(rest)
        return float(done), float(total), str(text)
    except (ValueError, TypeError):
        return None

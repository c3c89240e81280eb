"""How a stage leaves its work: finished or not at all, with a record of what it made and how long it took."""

from __future__ import annotations

import fcntl
import functools
import hashlib
import json
import os
import shutil
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from contracts.job import JobError

RECORD = "stage.json"
ERROR_FILE_VARIABLE = "BLUEWHALE_ERROR_FILE"
EARLIER_VARIABLE = "BLUEWHALE_EARLIER_TRAINING"
TERMINATION_LOG_VARIABLE = "BLUEWHALE_TERMINATION_LOG"
TERMINATION_LOG_BYTES = 4000  # Kubernetes keeps 4096

_MESSAGES: dict[str, Callable[[dict[str, Any]], str]] = {
    "simulation": lambda r: f"{r['rows']:,} decisions of {r['episodes']:,} episodes",
    "timeline": lambda r: f"{r['rows_out']:,} transitions of {r['mdps']:,} MDPs, {r['rows_quarantined']:,} quarantined",
    "features": lambda r: f"{r['rows']:,} rows of {len(r['features'])} features",
    "normalization": lambda r: f"{len(r['types'])} features identified, {len(r['dropped'])} dropped",
    "understanding": lambda r: ", ".join(f"{name.replace('_', ' ')} {c['verdict']}" for name, c in r["checks"].items()),
    "training": lambda r: f"{r['epochs']} epochs on {r['transitions']:,} transitions, policy {r['digest'][:12]}",
    "evaluation": lambda r: f"gate {r['gate']['verdict']}: {r['gate']['reason']}",
    "export": lambda r: f"version {r['version']}, within {r['largest_difference']:.1g} of torch",
    "rollout": lambda r: str(r["reason"]),
}
"""A finished stage's facts in one line for people."""


class StageError(RuntimeError):
    """A stage that cannot go on, with what was wrong, where, and what to do."""


class TransientError(RuntimeError):
    """The same, where another attempt may well go on."""


@contextmanager
def stage(name: str, output: str | Path) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Give a fresh directory at `output` and a dict for facts; the record that marks it finished is written last.

    A killed or failed stage leaves no record, and so nothing that a later stage would read. What failed is also
    written to the file that the environment variable BLUEWHALE_ERROR_FILE names, for the runner to show, and the end,
    good or bad, to the one that BLUEWHALE_TERMINATION_LOG names, for a controller.
    """
    output = Path(output).absolute()
    if output.is_symlink() or output.is_file():
        output.unlink()
    elif output.exists():
        shutil.rmtree(output)
    output.mkdir(parents=True)
    facts: dict[str, Any] = {}
    started = time.time()
    try:
        yield output, facts
    except Exception as error:
        final = isinstance(error, (StageError, JobError, FileNotFoundError))
        plain = final or isinstance(error, TransientError)
        if path := os.environ.get(ERROR_FILE_VARIABLE):
            text = str(error) if plain else traceback.format_exc(limit=-3)
            Path(path).write_text(json.dumps({"stage": name, "error": text}))
        message = " ".join((str(error) if plain else f"{type(error).__name__}: {error}").split())
        tell({"stage": name, "status": "failed", "message": message, "retryable": not final})
        raise
    record = {"stage": name, "status": "succeeded", "started": started, "seconds": round(time.time() - started, 2)}
    unfinished = output / f".{RECORD}"
    unfinished.write_text(json.dumps(record | facts, indent=2))
    os.replace(unfinished, output / RECORD)
    tell(compact(record | facts, output))


@contextmanager
def untold() -> Iterator[None]:
    """Let stages within end without a word to the runner or a controller: they are parts of another one."""
    told = {name: os.environ.pop(name, None) for name in (ERROR_FILE_VARIABLE, TERMINATION_LOG_VARIABLE)}
    try:
        yield
    finally:
        os.environ.update({name: value for name, value in told.items() if value is not None})


def message(record: dict[str, Any]) -> str:
    """A finished stage's facts in one line for people; empty for a stage that has none."""
    with suppress(KeyError):
        return _MESSAGES[record["stage"]](record)
    return ""


def compact(record: dict[str, Any], output: str | Path) -> dict[str, Any]:
    """What a controller is told of a finished stage: its record in a few fields."""
    told = {"stage": record["stage"], "status": record["status"], "message": message(record), "retryable": False}
    # KFP's launcher keeps what belongs at scheme://bucket/key below /scheme/bucket/key.
    _, scheme, *key = Path(output).absolute().parts
    if scheme in ("minio", "s3", "gcs"):
        told["artifact"] = f"{scheme.replace('gcs', 'gs')}://{'/'.join(key)}"
    if record["stage"] == "export" and "digest" in record:
        told["policy"] = {"digest": record["digest"], "version": str(record["version"])}
    if record["stage"] == "rollout":
        told |= {name: record[name] for name in ("service", "rollout") if name in record}
    return told


def tell(record: dict[str, Any]) -> None:
    """Leave a record as the container's termination message, its texts cut until it fits."""
    path = os.environ.get(TERMINATION_LOG_VARIABLE)
    if not path:
        return
    texts = (json.dumps(_cut(record, longest)) for longest in (2000, 1000, 300, 100, 30))
    without = json.dumps(_cut({k: v for k, v in record.items() if k != "records"}, 300))
    Path(path).write_text(next((text for text in texts if len(text) < TERMINATION_LOG_BYTES), without))


def _cut(value: Any, longest: int) -> Any:
    """The same value, its messages no longer than that."""
    if not isinstance(value, dict):
        return value
    return {
        k: f"{v[: longest - 1]}…" if k == "message" and len(v) > longest else _cut(v, longest) for k, v in value.items()
    }


@contextmanager
def alone(directory: Path) -> Iterator[None]:
    """Keep other commands out of a directory for as long as the block runs; raises `StageError` when one is in it."""
    directory.mkdir(parents=True, exist_ok=True)
    with (directory / ".lock").open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StageError(f"{directory}: another command is at work here; wait for it, or end it") from None
        yield


def read_record(directory: str | Path) -> dict[str, Any]:
    """The record of a finished stage; raises `StageError` when there is none."""
    path = Path(directory) / RECORD
    if not path.is_file():
        raise StageError(f"{directory}: no finished stage here ({RECORD} is missing); run the stage before this one")
    record: dict[str, Any] = json.loads(path.read_text())
    return record


def digest_files(*paths: str | Path) -> str:
    """SHA-256 over the relative names and contents of files and directories; stage records do not count."""
    digest = hashlib.sha256()
    for path in map(Path, paths):
        files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
        for file in files:
            if file.name == RECORD or file.name.startswith(("_", ".")):
                continue
            digest.update(f"{file.relative_to(path) if path.is_dir() else file.name}\0{file.stat().st_size}\0".encode())
            with file.open("rb") as stream:
                while block := stream.read(1 << 20):
                    digest.update(block)
    return digest.hexdigest()


@functools.cache
def code_version() -> str:
    """Digest of the code that a stage can reach, so that a finished stage is redone when the code has changed."""
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256()
    for path in sorted([*(root / "contracts").rglob("*.py"), *(root / "components").rglob("*.py")]):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]

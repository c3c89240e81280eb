"""What training needs to go on after a step, in files that cannot run code and are whole or not there.

A directory holds the last two checkpoints, each a directory of its own that is renamed into place when it is written.
One that is not what was written is passed over for the one before. torch.distributed.checkpoint writes and reads them,
as safetensors: what it writes otherwise is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save

from components.training.trainer import Trainer

DESCRIPTION = "checkpoint.json"
KEPT = 2


def save_checkpoint(trainer: Trainer, step: int, directory: Path) -> None:
    """Keep the trainer's state as that after a step: in its place at once, or not at all."""
    place = directory / f"{step:012d}"
    draft = directory / f".{place.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    with _alone():
        save(dict(trainer.state()), storage_writer=HuggingFaceStorageWriter(str(draft)), no_dist=True)
    with (draft / DESCRIPTION).open("w") as file:
        json.dump({"step": step, "digest": _digest(draft)}, file)
        file.flush()
        os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    draft.rename(place)
    for old in _checkpoints(directory)[KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(trainer: Trainer, directory: Path) -> int:
    """Take up the newest checkpoint that is whole; returns its step, 0 where there is none."""
    for place in _checkpoints(directory):
        try:
            description = json.loads((place / DESCRIPTION).read_text())
            if _digest(place) != description["digest"] or description["step"] != int(place.name):
                raise ValueError("its content is not what was written")
            reader = HuggingFaceStorageReader(str(place))
            state = {
                name: torch.empty(kept.size, dtype=kept.properties.dtype)
                for name, kept in reader.read_metadata().state_dict_metadata.items()
                if isinstance(kept, TensorStorageMetadata)
            }
            with _alone():
                load(state, storage_reader=reader, no_dist=True)
            trainer.load_state(state)
        except (OSError, ValueError, KeyError, TypeError) as error:
            print(f"{place}: this checkpoint is passed over: {error}", file=sys.stderr, flush=True)
            continue
        return int(place.name)
    return 0


def _digest(place: Path) -> str:
    """Of all that was written before the description."""
    digest = hashlib.sha256()
    for path in sorted(place.iterdir()):
        if path.name != DESCRIPTION:
            digest.update(path.read_bytes())
    return digest.hexdigest()


@contextmanager
def _alone() -> Iterator[None]:
    """Without torch's word that one process writes or reads by itself, and with what fails as an `OSError`."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:
            # It is no `Exception`, and would pass by all who tell of one.
            causes = (str(cause) for cause, _ in error.failures.values())
            raise OSError("; ".join(causes)) from error


def _checkpoints(directory: Path) -> list[Path]:
    """The newest first."""
    return sorted((path for path in directory.glob("[0-9]*") if path.is_dir()), reverse=True)

"""What training needs to go on after an epoch, in files that cannot run code and are whole or not there.

A directory holds the last two checkpoints, each a directory of its own that is renamed into place when it is written.
One that is not what was written is passed over for the one before.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
from pathlib import Path

from safetensors.torch import load, save

from components.training.trainer import Trainer

STATE, DESCRIPTION = "state.safetensors", "checkpoint.json"
KEPT = 2


def save_checkpoint(trainer: Trainer, epoch: int, directory: Path) -> None:
    """Keep the trainer's state as that after an epoch, on disk when this returns."""
    place = directory / f"{epoch:06d}"
    draft = directory / f".{place.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    content = save(trainer.state())
    description = {"epoch": epoch, "digest": hashlib.sha256(content).hexdigest()}
    for name, data in ((STATE, content), (DESCRIPTION, json.dumps(description).encode())):
        with (draft / name).open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    shutil.rmtree(place, ignore_errors=True)
    draft.rename(place)
    for old in _checkpoints(directory)[KEPT:]:
        shutil.rmtree(old)


def load_checkpoint(trainer: Trainer, directory: Path) -> int:
    """Take up the newest checkpoint that is whole; returns its epoch, 0 where there is none."""
    for place in _checkpoints(directory):
        try:
            description = json.loads((place / DESCRIPTION).read_text())
            content = (place / STATE).read_bytes()
            if hashlib.sha256(content).hexdigest() != description["digest"]:
                raise ValueError("its content is not what was written")
            trainer.load_state(load(content))
        except (OSError, ValueError, KeyError) as error:
            print(f"{place}: this checkpoint is passed over: {error}", file=sys.stderr, flush=True)
            continue
        return int(description["epoch"])
    return 0


def _checkpoints(directory: Path) -> list[Path]:
    """The newest first."""
    return sorted((path for path in directory.glob("[0-9]*") if path.is_dir()), reverse=True)

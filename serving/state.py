"""The rollout's state: a small file that the rollout writes and the `policy` model reads.

Keys: stable and candidate (version, digest; candidate may be null), weight, weight_until, salt, deadline_ms, head.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def read_state(path: Path) -> dict[str, Any]:
    state: dict[str, Any] = json.loads(path.read_text())
    return state


def write_state(path: Path, state: dict[str, Any]) -> None:
    """Replace the rollout's state at once: a reader sees the old or the new one, never a part."""
    temporary = path.with_suffix(".new")
    temporary.write_text(json.dumps(state, indent=2))
    os.replace(temporary, path)

"""What a finished stage tells: metadata for its artifact, a table for people, a compact record for a controller."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.dataset as ds
from kfp import dsl

from contracts.stage import compact, read_record, tell

BOOKKEEPING = ("stage", "status", "started", "seconds")
WINDOW = ("first_event_time", "last_event_time")


def publish(
    artifact: dsl.Artifact,
    summary: dsl.Markdown,
    record: str,
    version: str,
    told: dict[str, Any] | None = None,
    **more: Any,
) -> None:
    """Tell of the stage whose directory `artifact` is.

    Its facts, and `more`, become the artifact's metadata and the table in `summary`. `record` is the file of the output
    parameter that gets the compact record, with the fields `told` added. `version` is that of code and data.
    """
    stage = read_record(artifact.path)
    facts = {k: v for k, v in stage.items() if k not in BOOKKEEPING}
    end = compact(stage, artifact.path) | (told or {})
    Path(record).write_text(json.dumps(end))
    tell(end)
    # KFP's metadata store refuses a null.
    known = {k: v for k, v in (facts | more).items() if v is not None}
    # An exported policy has a version of its own.
    artifact.metadata |= {{"version": "policy_version"}.get(k, k): v for k, v in known.items()}
    artifact.metadata["version"] = version
    lines = [f"**{end['message']}**", "", "| | |", "|---|---|"]
    lines += [f"| {name.replace('_', ' ')} | {_shown(value)} |" for name, value in (facts | more).items()]
    Path(summary.path).write_text("\n".join([f"### {stage['stage'].capitalize()}", "", *lines, ""]))


def data_window(directory: str | Path) -> dict[str, Any]:
    """First and last event time of a Parquet data set; nothing when it has no rows."""
    batches = ds.dataset(directory, format="parquet").to_batches(columns=["event_time"])
    ends = [pc.min_max(batch["event_time"]).as_py() for batch in batches if batch.num_rows]
    if not ends:
        return {}
    window = (min(end["min"] for end in ends), max(end["max"] for end in ends))
    return dict(zip(WINDOW, (time.isoformat() for time in window), strict=True))


def passed_on(metadata: dict[str, Any]) -> dict[str, Any]:
    """What of an input's metadata also holds for what is made of it."""
    return {name: metadata[name] for name in WINDOW if name in metadata}


def _shown(value: Any) -> str:
    if isinstance(value, dict):
        value = [f"{name}: {_shown(inner)}" for name, inner in value.items()]
    if isinstance(value, list):
        shown = ", ".join(map(_shown, value[:12]))
        return shown + (f", … ({len(value)})" if len(value) > 12 else "") or "–"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value).replace("|", "\\|")
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}"

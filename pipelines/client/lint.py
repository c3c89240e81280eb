"""The checks of the API on a job file, without a cluster: file, line, field, and what is allowed there."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from contracts.job import API_VERSION, RLTrainingJob, explain


@dataclass(frozen=True)
class Problem:
    """Something that the API would refuse."""

    file: str
    line: int
    field: str
    message: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line}: {self.field}{': ' if self.field else ''}{self.message}"


def lint(file: str | Path) -> list[Problem]:
    """Every problem of every RLTrainingJob in a YAML file; objects of other groups and services are passed over."""
    found: list[Problem] = []
    jobs = 0
    try:
        loader = yaml.SafeLoader(Path(file).read_text())
        while loader.check_node():
            node = loader.get_node()
            document = loader.construct_document(node)
            if _foreign(document):
                continue
            jobs += 1
            found += _check(str(file), node, document)
    except OSError as error:
        return [Problem(str(file), 1, "", f"cannot be read: {error.strerror}")]
    except UnicodeDecodeError as error:
        return [Problem(str(file), 1, "", f"is not text in UTF-8: {error.reason} at byte {error.start}")]
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        text = getattr(error, "problem", None) or str(error)
        return [*found, Problem(str(file), mark.line + 1 if mark else 1, "", f"not valid YAML: {text}")]
    if not jobs:
        return [Problem(str(file), 1, "", f"holds no RLTrainingJob of {API_VERSION}")]
    return found


def _foreign(document: Any) -> bool:
    if not isinstance(document, dict):
        return document is None
    ours = str(document.get("apiVersion", "")).startswith(API_VERSION.partition("/")[0])
    return document.get("kind") == "PolicyService" or not (ours or document.get("kind") == "RLTrainingJob")


def _check(file: str, node: Any, document: Any) -> list[Problem]:
    if not isinstance(document, dict):
        return [Problem(file, 1, "", f"expected an RLTrainingJob, found {type(document).__name__}")]
    try:
        RLTrainingJob.model_validate(document)
    except ValidationError as error:
        texts = [(e["loc"], explain(e).partition(": ")) for e in error.errors()]
        return [Problem(file, _line(node, loc), path, message) for loc, (path, _, message) in texts]
    return []


def _line(node: Any, loc: tuple[Any, ...]) -> int:
    """Where the field stands, or as near to it as the file goes."""
    line: int = node.start_mark.line + 1
    for part in loc:
        if isinstance(node, yaml.MappingNode):
            fields = {key.value: (key, value) for key, value in node.value}
        elif isinstance(node, yaml.SequenceNode):
            fields = {index: (value, value) for index, value in enumerate(node.value)}
        else:
            break
        if part not in fields:
            break
        key, node = fields[part]
        line = key.start_mark.line + 1
    return line

"""Try settings, judge each by counterfactual evaluation, and train with the best."""

from __future__ import annotations

import functools
import hashlib
import json
import math
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pyarrow as pa
import pyarrow.dataset as ds
from pydantic import ValidationError

from components.columns import action_bounds, check_split, open_columns, write_columns
from components.evaluation.evaluate import FEWEST_MDPS, evaluate
from components.normalization.spec import SPECS, NormalizationSpec
from components.sweep.page import best_of, write_page
from components.training.actions import find_actions
from components.training.bundle import DESCRIPTION
from components.training.fits import check_explores
from components.training.launch import train
from components.training.warm_start import check_compatible
from components.transitions import held_out
from contracts import progress
from contracts.job import JobSpec, LinearBandit, SweepParameter, explain
from contracts.stage import RECORD, StageError, TransientError, code_version, read_record, stage, untold
from contracts.transitions import STATE_PREFIX

TRIAL, REPORT, PAGE = "trial.json", "sweep.json", "sweep.html"
BATCH_ROWS = 1 << 16


class CannotJudgeError(StageError):
    """No trial can be judged, whatever its settings."""


def sweep_and_train(
    spec: JobSpec, features: str | Path, normalization: str | Path, output: str | Path, warm_start: str = ""
) -> None:
    """Train with the settings that are best by `spec.sweep`; what was tried is in `sweep.json` and `sweep.html`.

    Each trial trains on a part of the training MDPs and is judged on the rest of them, so that the MDPs that evaluation
    holds out decide nothing here. Trials that are finished are not repeated after a kill. Raises `StageError` when no
    trial could be judged, and before the first where each would be refused: for its numbers or its `warm_start`.
    """
    output = Path(output)
    work = output.with_name(f"{output.name}.sweep")
    read_record(features), read_record(normalization)
    try:
        # Told before hours of trials, not after them.
        check_split(features, spec)
        chosen, tried = search(spec, Path(features), Path(normalization), work, warm_start)
    except Exception as error:
        with stage("training", output):
            raise error
    train(chosen, features, normalization, output, warm_start, known={"sweep": _outcome(tried)})
    (output / REPORT).write_text(json.dumps({"parameters": _ranges(spec), "trials": tried}, indent=2))
    write_page(spec, tried, output / PAGE)
    shutil.rmtree(work)


def search(
    spec: JobSpec, features: Path, normalization: Path, work: Path, warm_start: str = ""
) -> tuple[JobSpec, list[dict[str, Any]]]:
    """The job with the best settings, and what was tried: {number, settings, value, low, high, seconds, failed}.

    The first trial is the job's own settings; then Optuna's Tree-structured Parzen Estimator (Bergstra et al. 2011)
    proposes. Best is the highest lower bound of the gate's estimate.
    """
    sweep = spec.sweep
    assert sweep
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    mine = _identity(spec, features, normalization, warm_start)
    if not (work / "identity").is_file() or (work / "identity").read_text() != mine:
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir(parents=True)
        with untold():
            training_mdps(spec, features, work / "features")
        write_columns(work / "features", _of_trials(spec), work / "columns")
        (work / "identity").write_text(mine)
    data, _ = open_columns(work / "columns")
    check_explores(data)
    if spec.action_space == "continuous":
        # A trial's part of the MDPs may reach less far than all that the policy is trained on.
        spec = spec.model_copy(update={"action_bounds": action_bounds(work / "features") | spec.action_bounds})
    # Each trial would be refused for what follows, for no setting changes it.
    actions = find_actions(data, spec, normalization, warn=lambda _: None)
    if warm_start and not isinstance(spec.algorithm.config, LinearBandit):
        check_compatible(warm_start, NormalizationSpec.read(normalization / SPECS[STATE_PREFIX]), actions)
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.TPESampler(seed=spec.seed))
    parameters = sweep.parameters
    own = {path: value for path in parameters if (value := _of(spec, path)) is not None}
    tried: list[dict[str, Any]] = []
    for number in range(sweep.trials):
        trial = None if number == 0 else study.ask()
        settings = own
        if trial:
            settings = {path: _suggest(trial, path, p, own.get(path)) for path, p in parameters.items()}
        progress.report(number, sweep.trials, f"trial {number + 1}: {_in_words(settings)}")
        found = try_settings(spec, settings, number, normalization, work, warm_start)
        tried.append(found)
        if trial and found["failed"]:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        elif trial:
            study.tell(trial, found["low"])
    judged = [each for each in tried if not each["failed"]]
    if not judged:
        raise StageError(f"sweep: no trial of {len(tried)} could be judged; the last: {tried[-1]['failed']}")
    best = best_of(judged)
    progress.report(sweep.trials, sweep.trials, f"best: {_in_words(best['settings'])}")
    return spec.with_settings(best["settings"]), tried


def try_settings(
    spec: JobSpec, settings: dict[str, Any], number: int, normalization: Path, work: Path, warm_start: str = ""
) -> dict[str, Any]:
    """Train and judge once; what is finished comes back as it was."""
    assert spec.sweep
    directory = work / f"{number:04}"
    if (directory / TRIAL).is_file():
        known: dict[str, Any] = json.loads((directory / TRIAL).read_text())
        if known["settings"] == settings:
            return known
    shutil.rmtree(directory, ignore_errors=True)
    started = time.time()
    found: dict[str, Any] = {"number": number, "settings": settings, "failed": None}
    # What failed for where it ran, or for `workers`, may not the next time.
    finished = True
    gate = spec.evaluation.gate
    try:
        made = spec.with_settings(settings | ({"training.epochs": spec.sweep.epochs} if spec.sweep.epochs else {}))
        made = _of_trials(made)
        # Of a trial's stages, people and controllers hear nothing: it is a part of the training stage.
        with progress.silent(), untold():
            learn = functools.partial(
                train, made, work / "features", normalization, directory / "training", warm_start,
                laid_out=work / "columns",
            )  # fmt: skip
            try:
                learn(part=f"-t{number}")
            except TransientError:
                # Workers may have been lost, or these settings are what they cannot bear. By another name: in a
                # cluster, what has failed is still there.
                learn(part=f"-t{number}b")
            evaluate(made, work / "features", directory / "training", directory / "evaluation", last_only=True)
        document = json.loads((directory / "evaluation" / "report.json").read_text())
        report, mdps = document["final"][gate.estimator], document["diagnostics"]["held_out_mdps"]
        if "refused" in report:
            raise CannotJudgeError(f"sweep: the gate's estimator {gate.estimator} is refused: {report['refused']}")
        if mdps < FEWEST_MDPS:
            raise CannotJudgeError(f"sweep: {mdps} MDPs to judge a trial by are too few for an interval; log more")
        found |= {name: report[gate.metric][name] for name in ("value", "low", "high", "relative")}
    except CannotJudgeError:
        raise
    except StageError as error:
        found["failed"] = str(error).splitlines()[0]
    except TransientError as error:
        found["failed"], finished = str(error).splitlines()[0], False
    except ValidationError as error:
        # Settings that are allowed each by itself may not go together.
        found["failed"], finished = explain(error.errors()[0]), False
    found["seconds"] = round(time.time() - started, 2)
    shutil.rmtree(directory, ignore_errors=True)
    if not finished:
        return found
    directory.mkdir()
    unfinished = directory / f".{TRIAL}"
    unfinished.write_text(json.dumps(found))
    unfinished.replace(directory / TRIAL)
    return found


def training_mdps(spec: JobSpec, features: Path, output: Path) -> None:
    """The features stage's training data without the MDPs that evaluation holds out."""
    data = ds.dataset(features / "training", format="parquet")
    with stage("features", output) as (directory, facts):

        def kept() -> Iterator[pa.RecordBatch]:
            for batch in data.to_batches(batch_size=BATCH_ROWS):
                ids = batch["mdp_id"].dictionary_encode()
                out = held_out(ids.dictionary.to_pylist(), spec)
                rows = np.flatnonzero(~out[ids.indices.to_numpy()]) if len(out) else np.zeros(0, int)
                yield batch.take(rows)

        ds.write_dataset(kept(), directory / "training", schema=data.schema, format="parquet")
        facts |= {k: v for k, v in read_record(features).items() if k in ("features", "action_features")}


def _of_trials(spec: JobSpec) -> JobSpec:
    """With another seed: the MDPs that trials are judged on are others in each split, and none of the gate's."""
    return spec.model_copy(update={"seed": (spec.seed + 1) % 2**31})


def _identity(spec: JobSpec, features: Path, normalization: Path, warm_start: str) -> str:
    """What trials depend on."""
    records = [(directory / RECORD).read_text() for directory in (features, normalization)]
    records += [path.read_text() for path in Path(warm_start).glob(DESCRIPTION)] if warm_start else []
    return hashlib.sha256("".join([spec.deciding(), code_version(), *records]).encode()).hexdigest()


def _of(spec: JobSpec, path: str) -> Any:
    level: Any = spec.model_dump(by_alias=True)
    for part in path.split("."):
        level = level[part]
    return level


def _suggest(trial: optuna.Trial, path: str, parameter: SweepParameter, own: Any) -> Any:
    if parameter.choices:
        return parameter.values()[parameter.choices.index(trial.suggest_categorical(path, parameter.choices))]
    low, high = parameter.values()
    if isinstance(own, int) or path == "training.stepsPerEpoch":
        return trial.suggest_int(path, math.ceil(low), math.floor(high), log=parameter.log)
    return trial.suggest_float(path, low, high, log=parameter.log)


def _in_words(settings: dict[str, Any]) -> str:
    return ", ".join(
        f"{path.rpartition('.')[2]} {value:.3g}" if isinstance(value, float) else f"{path.rpartition('.')[2]} {value}"
        for path, value in settings.items()
    )


def _ranges(spec: JobSpec) -> dict[str, Any]:
    assert spec.sweep
    return {path: p.model_dump(by_alias=True, exclude_none=True) for path, p in spec.sweep.parameters.items()}


def _outcome(tried: list[dict[str, Any]]) -> dict[str, Any]:
    """What the stage's record says of the sweep."""
    judged = [each for each in tried if not each["failed"]]
    best = best_of(judged)
    own = tried[0]
    return {
        "trials": len(tried),
        "failed": len(tried) - len(judged),
        "settings": best["settings"],
        "low": best["low"],
        "own_low": None if own["failed"] else own["low"],
    }

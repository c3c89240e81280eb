"""The training pipeline: timeline -> features -> normalization -> training -> evaluation -> export."""

# Annotations are not postponed here: KFP reads the pipeline's signature.

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from kfp import compiler, dsl

from components.evaluation.component import evaluation
from components.export.component import export
from components.features.component import features
from components.normalization.component import normalization
from components.timeline.component import timeline
from components.training.component import training
from contracts.job import JobError, JobSpec, RLTrainingJob
from contracts.stage import code_version

STAGES = ("timeline", "features", "normalization", "training", "evaluation", "export")

SECTIONS: dict[str, tuple[str, ...]] = {
    "timeline": ("data", "reward"),
    "features": ("features",),
    "normalization": ("normalization",),
    "training": ("data", "reward", "algorithm", "training", "export"),
    "evaluation": ("data", "reward", "evaluation"),
    "export": ("data", "export"),
}
"""What each stage reads of the job: a change elsewhere leaves its finished work valid."""


class Outputs(NamedTuple):
    """What the stages leave: a directory each."""

    timeline: dsl.Dataset
    features: dsl.Dataset
    normalization: dsl.Artifact
    training: dsl.Model
    evaluation: dsl.Artifact
    export: dsl.Model


def parameters(spec: JobSpec, decision_log: str, version: str) -> dict[str, str]:
    """The pipeline's arguments for a job; `version` names the code and data, so that caches see both."""
    values = {
        "decision_log": decision_log,
        "outcomes": spec.data.outcomes or "",
        "version": version,
        **{f"{stage}_job": spec.only(*SECTIONS[stage]) for stage in STAGES},
    }
    if odd := [name for name, value in values.items() if "python3" in value]:
        raise JobError(
            f"{odd[0]}: KFP's local runner replaces the word 'python3' in arguments; use another path or name"
        )
    return values


def build_pipeline(name: str, defaults: dict[str, str] | None = None) -> Callable[..., Outputs]:
    """The KFP pipeline; with `defaults`, its parameters come filled in, so that it can be started from the UI."""

    def bluewhale(
        decision_log: str,
        outcomes: str,
        version: str,
        timeline_job: str,
        features_job: str,
        normalization_job: str,
        training_job: str,
        evaluation_job: str,
        export_job: str,
    ) -> Outputs:
        transitions = timeline(job=timeline_job, decision_log=decision_log, outcomes=outcomes, version=version)
        joined = features(job=features_job, version=version, transitions=transitions.output)
        normalized = normalization(job=normalization_job, version=version, training_data=joined.output)
        trained = training(
            job=training_job, version=version, training_data=joined.output, normalization=normalized.output
        )
        evaluated = evaluation(job=evaluation_job, version=version, training_data=joined.output, policy=trained.output)
        exported = export(job=export_job, version=version, training_data=joined.output, policy=trained.output).after(
            evaluated
        )
        return Outputs(
            timeline=transitions.output,
            features=joined.output,
            normalization=normalized.output,
            training=trained.output,
            evaluation=evaluated.output,
            export=exported.output,
        )

    if defaults:
        signature = inspect.signature(bluewhale)
        filled = [p.replace(default=defaults[p.name]) for p in signature.parameters.values()]
        bluewhale.__signature__ = signature.replace(parameters=filled)  # type: ignore[attr-defined]
    return dsl.pipeline(name=name, description="Logged decisions to an exported policy.")(bluewhale)


def compile_pipeline(job: RLTrainingJob, decision_log: str, path: Path) -> None:
    """Write the pipeline's IR YAML with the job's own parameters as defaults."""
    pipeline = build_pipeline(job.metadata.name, parameters(job.spec, decision_log, code_version()))
    compiler.Compiler().compile(pipeline, str(path))

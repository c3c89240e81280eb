"""The pipeline: timeline -> features -> normalization -> understanding -> training -> evaluation -> export.

In a cluster, a rollout follows.
"""

# Annotations are not postponed here: KFP reads the pipeline's signature.

import functools
import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

from kfp import dsl

from components.evaluation.component import evaluation
from components.export.component import export
from components.features.component import features
from components.normalization.component import normalization
from components.rollout.component import rollout
from components.sweep.component import training as swept_training
from components.timeline.component import timeline
from components.training.component import training
from components.understanding.component import understanding
from contracts.job import Data, JobError, JobSpec
from simulation.component import simulation

if TYPE_CHECKING:
    from pipelines.cluster import Cluster

STAGES = ("timeline", "features", "normalization", "understanding", "training", "evaluation", "export")

SECTIONS: dict[str, tuple[str, ...]] = {
    "simulation": ("simulation", "export"),
    # What lies in `data` for others is of no concern to the timeline, save for keys that it is to bring along.
    "timeline": (
        *(f"data.{name}" for name in Data.model_fields if name not in ("features", "holdout_fraction")),
        *(f"data.features.{name}" for name in ("repository", "service", "keys")),
        # Not the metrics' weights: what is rewarded is often tried anew on the same transitions.
        "reward.discount",
        "reward.discount_interval",
    ),
    "features": ("data.features",),
    "normalization": ("normalization",),
    "understanding": ("data", "reward", "understanding", "evaluation.gate.metric"),
    "training": ("action_bounds", "data", "reward", "algorithm", "training", "export", "sweep"),
    "evaluation": ("data", "reward", "evaluation"),
    "export": ("data", "export"),
    "rollout": ("deploy", "images", "reward", "storage"),
}
"""What each stage reads of the job: a change elsewhere leaves its finished work valid."""


class Outputs(NamedTuple):
    """What the stages leave: a directory each."""

    timeline: dsl.Dataset
    features: dsl.Dataset
    normalization: dsl.Artifact
    understanding: dsl.Artifact
    training: dsl.Model
    evaluation: dsl.Artifact
    export: dsl.Model


def inputs(cluster: "Cluster | None") -> list[str]:
    """Names of the pipeline's parameters."""
    names = ["decision_log", "outcomes", "version", "warm_start", *(f"{stage}_job" for stage in STAGES)]
    if cluster:
        names.append("rollout_job")
        if cluster.job.spec.simulation:
            names[0] = "simulation_job"
    return names


def parameters(
    spec: JobSpec, decision_log: str, version: str, cluster: "Cluster | None" = None, warm_start: str = ""
) -> dict[str, str]:
    """The pipeline's arguments for a job; `version` names the code and data, so that caches see both."""
    values = {
        "decision_log": decision_log,
        "outcomes": spec.data.outcomes or "",
        "version": version,
        "warm_start": warm_start,
        **{f"{stage}_job": spec.only(*sections) for stage, sections in SECTIONS.items()},
    }
    if spec.sweep:
        # Trials are judged as the gate judges.
        values["training_job"] = spec.only(*SECTIONS["training"], "evaluation")
    values = {name: values[name] for name in inputs(cluster)}
    if not cluster and (odd := [name for name, value in values.items() if "python3" in value]):
        raise JobError(
            f"{odd[0]}: KFP's local runner replaces the word 'python3' in arguments; use another path or name"
        )
    return values


def build_pipeline(
    name: str, defaults: dict[str, str] | None = None, cluster: "Cluster | None" = None, sweep: bool = False
) -> Callable[..., Outputs]:
    """The KFP pipeline; with `defaults`, its parameters come filled in, so that it can be started from the UI.

    With `cluster`, a job without a log of its own first plays its simulation, the policy goes on to a rollout, and
    every stage's pod is given what it needs there. With `sweep`, training first searches for settings.
    """
    sweep = sweep or bool(cluster and cluster.job.spec.sweep)
    learn = swept_training if sweep else training

    def placed(task: dsl.PipelineTask, stage: str) -> dsl.PipelineTask:
        return cluster.place(task, stage) if cluster else task

    def bluewhale(
        decision_log: str = "",
        simulation_job: str = "",
        outcomes: str = "",
        version: str = "",
        timeline_job: str = "",
        features_job: str = "",
        normalization_job: str = "",
        understanding_job: str = "",
        training_job: str = "",
        evaluation_job: str = "",
        export_job: str = "",
        rollout_job: str = "",
        warm_start: str = "",
    ) -> Outputs:
        """Logged decisions to an exported policy, and in a cluster to its rollout.

        Args:
            decision_log: Path of the decision log.
            simulation_job: The job's sections that the simulation reads, as JSON.
            outcomes: Path of outcomes reported later; empty when there are none.
            version: Code and data; finished stages are redone when it changes.
            timeline_job: The job's sections that the timeline reads, as JSON.
            features_job: The job's sections that features reads, as JSON.
            normalization_job: The job's sections that normalization reads, as JSON.
            understanding_job: The job's sections that understanding reads, as JSON.
            training_job: The job's sections that training reads, as JSON.
            evaluation_job: The job's sections that evaluation reads, as JSON.
            export_job: The job's sections that export reads, as JSON.
            rollout_job: The job's sections that the rollout reads, as JSON.
            warm_start: Directory of the policy bundle that training begins with; empty to begin anew.
        """
        behaviour_policy = ""
        if cluster and cluster.job.spec.simulation:
            simulated = simulation(job=simulation_job, version=version, directory=cluster.logs)
            # KFP's cache does not know whether the log still lies on the volume.
            placed(simulated, "simulation").set_caching_options(False)
            decision_log = simulated.outputs["decision_log"]
            behaviour_policy = simulated.outputs["behaviour_policy"]
        transitions = timeline(job=timeline_job, decision_log=decision_log, outcomes=outcomes, version=version)
        joined = features(job=features_job, version=version, transitions=transitions.outputs["transitions"])
        training_data = joined.outputs["training_data"]
        normalized = normalization(job=normalization_job, version=version, training_data=training_data)
        understood = understanding(
            job=understanding_job,
            version=version,
            training_data=training_data,
            normalization=normalized.outputs["normalization"],
        )
        trained = learn(
            job=training_job,
            version=version,
            training_data=training_data,
            normalization=normalized.outputs["normalization"],
            warm_start=warm_start,
        ).after(understood)
        policy = trained.outputs["policy"]
        evaluated = evaluation(job=evaluation_job, version=version, training_data=training_data, policy=policy)
        exported = export(job=export_job, version=version, training_data=training_data, policy=policy).after(evaluated)
        stages = (transitions, joined, normalized, understood, trained, evaluated, exported)
        tasks = dict(zip(STAGES, stages, strict=True))
        for stage, task in tasks.items():
            placed(task, stage)
        if cluster:
            requested = rollout(
                job=rollout_job,
                version=version,
                policy=policy,
                model_repository=exported.outputs["model_repository"],
                behaviour_policy=behaviour_policy,
                **{stage: task.outputs["record"] for stage, task in tasks.items()},
            )
            # What a rollout asks for lies outside of KFP: that it was asked for once does not mean that it is there.
            placed(requested, "rollout").set_caching_options(False)
        return Outputs(
            timeline=transitions.outputs["transitions"],
            features=training_data,
            normalization=normalized.outputs["normalization"],
            understanding=understood.outputs["understanding"],
            training=policy,
            evaluation=evaluated.outputs["evaluation"],
            export=exported.outputs["model_repository"],
        )

    signature, names = inspect.signature(bluewhale), inputs(cluster)
    kept = [p for p in signature.parameters.values() if p.name in names]

    @functools.wraps(bluewhale)
    def with_inputs(*given: str) -> Outputs:
        # KFP passes by position what the signature names.
        return bluewhale(**{p.name: value for p, value in zip(kept, given, strict=True)})

    with_inputs.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[p.replace(default=(defaults or {}).get(p.name, inspect.Parameter.empty)) for p in kept]
    )
    return dsl.pipeline(name=name, pipeline_root=cluster.pipeline_root if cluster else None)(with_inputs)

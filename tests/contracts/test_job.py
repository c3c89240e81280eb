"""The job file: what is accepted, and what is said of a file that is not."""

import copy
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from contracts.job import Data, JobError, JobSpec, RLTrainingJob, load_job

EXAMPLES = Path(__file__).parents[2] / "manifests" / "examples"


@pytest.fixture
def document() -> dict[str, Any]:
    return yaml.safe_load((EXAMPLES / "cartpole.yaml").read_text())


def change(document: dict[str, Any], path: str, value: Any) -> dict[str, Any]:
    """A copy of the document with `value` at the dotted path; ... removes what is there."""
    changed = copy.deepcopy(document)
    *parents, last = path.split(".")
    section = changed
    for parent in parents:
        section = section.setdefault(parent, {})
    if value is ...:
        del section[last]
    else:
        section[last] = value
    return changed


def message(tmp_path: Path, document: Any) -> str:
    path = tmp_path / "job.yaml"
    path.write_text(document if isinstance(document, str) else yaml.safe_dump(document))
    with pytest.raises(JobError) as caught:
        load_job(path)
    assert str(path) in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["cartpole", "cartpole-harmful"])
def test_the_example_jobs_load(name: str) -> None:
    job = load_job(EXAMPLES / f"{name}.yaml")
    assert job.metadata.name == name
    assert job.spec.actions == ["left", "right"]


def test_a_job_needs_no_more_than_actions_and_data(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(
        "apiVersion: bluewhale.io/v1alpha1\nkind: RLTrainingJob\nmetadata: {name: small}\n"
        "spec: {actions: [a, b], data: {decisionLog: log.parquet}}\n"
    )
    assert load_job(path).spec.reward.discount == 0.99


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("spec.algorithm.dqn.learningRate", "fast", ["spec.algorithm.dqn.learningRate", "valid number", "'fast'"]),
        ("spec.algorithm.dqn.learningRate", 0, ["spec.algorithm.dqn.learningRate", "greater than 0"]),
        ("spec.algorithm.dqn.hiddenLayers", [64, 0], ["spec.algorithm.dqn.hiddenLayers.1", "greater than or equal"]),
        ("spec.reward.discount", float("nan"), ["spec.reward.discount", "finite"]),
        ("spec.reward.discount", 1.5, ["spec.reward.discount", "less than or equal to 1", "1.5"]),
        ("spec.reward.metricWeights", {"balanced": float("inf")}, ["spec.reward.metricWeights.balanced", "finite"]),
        ("spec.data.lastStep", "end", ["spec.data.lastStep", "'terminal'", "'truncated'", "'column'", "'end'"]),
        ("spec.evaluation.gate.estimator", "is", ["spec.evaluation.gate.estimator", "'stepwise_doubly_robust'"]),
        ("spec.export.backend", "tensorrt", ["spec.export.backend", "'python'", "'onnxruntime'"]),
        ("spec.simulation.environment", "Pong", ["spec.simulation.environment", "'CartPole-v1'"]),
        ("spec.normalization.overrides", {"x": "log"}, ["spec.normalization.overrides.x", "'box_cox'"]),
        ("spec.actions", ["only"], ["spec", "actions must name two or more"]),
        ("spec.actions", ..., ["spec", "actions must name two or more"]),
        ("spec.simulation.behaviourPolicy", ..., ["spec.simulation.behaviourPolicy", "required"]),
        ("spec.deploy", [1], ["spec.deploy", "dictionary"]),
        ("metadata.name", "Not_A_Name", ["metadata.name", "a-z0-9", "'Not_A_Name'"]),
        ("metadata.name", "x" * 53, ["metadata.name", "at most 52"]),
        ("kind", "Job", ["kind", "'RLTrainingJob'", "'Job'"]),
        ("apiVersion", "v1", ["apiVersion", "'bluewhale.io/v1alpha1'"]),
    ],
)
def test_a_wrong_value_is_named_by_its_full_path_with_what_is_allowed(
    tmp_path: Path, document: dict[str, Any], path: str, value: Any, said: list[str]
) -> None:
    text = message(tmp_path, change(document, path, value))
    for part in said:
        assert part in text


@pytest.mark.parametrize(
    ("path", "meant", "allowed"),
    [
        ("spec.algorithm.dqn.lerningRate", "learningRate", "double, dueling, hiddenLayers, learningRate"),
        ("spec.deploy.canary.weight", "weights", "deadlineMs, maxErrorFraction"),
        ("spec.simulation.behaviourPolicy.wieghts", "weights", "exploration, weights"),
        ("metadata.labls", "labels", "annotations, labels, name, namespace"),
        ("specc", "spec", "apiVersion, kind, metadata, spec"),
    ],
)
def test_an_unknown_field_is_answered_with_the_nearest_and_all_allowed_fields(
    tmp_path: Path, document: dict[str, Any], path: str, meant: str, allowed: str
) -> None:
    text = message(tmp_path, change(document, path, 1))
    assert f"{path}: unknown field" in text
    assert f"did you mean {meant}?" in text
    assert allowed in text


def test_an_unknown_field_like_no_other_gets_no_suggestion(tmp_path: Path, document: dict[str, Any]) -> None:
    text = message(tmp_path, change(document, "spec.algorithm.ppo", {}))
    assert "spec.algorithm.ppo: unknown field" in text
    assert "did you mean" not in text
    assert "Allowed here: bcq, behaviourCloning, c51, cql, ddpg, dqn, iql" in text


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"spec.actions": ["left", "left"]}, ["spec", "actions", "distinct"]),
        ({"spec.deploy.canary.weights": [0.5, 0.1]}, ["spec.deploy.canary", "weights [0.5, 0.1]", "rise"]),
        ({"spec.deploy.canary.weights": [0.5, 0.5]}, ["spec.deploy.canary", "weights [0.5, 0.5]", "rise"]),
        ({"spec.training.batchSize": 511}, ["spec.training", "batchSize 511", "multiple of workers.max 2"]),
        ({"spec.data.decisionLog": "log.parquet"}, ["spec", "simulation", "data.decisionLog", "either"]),
        ({"spec.simulation": ...}, ["spec.data.decisionLog", "missing", "spec.simulation"]),
    ],
)
def test_fields_that_do_not_fit_together_are_named(
    tmp_path: Path, document: dict[str, Any], changes: dict[str, Any], said: list[str]
) -> None:
    for path, value in changes.items():
        document = change(document, path, value)
    text = message(tmp_path, document)
    for part in said:
        assert part in text


def test_all_mistakes_are_named_at_once(tmp_path: Path, document: dict[str, Any]) -> None:
    for path, value in {
        "spec.algorithm.dqn.lerningRate": 1,
        "spec.reward.discount": 2,
        "spec.training.epochs": "many",
        "metadata.name": ...,
    }.items():
        document = change(document, path, value)
    text = message(tmp_path, document)
    for path in ("spec.algorithm.dqn.lerningRate", "spec.reward.discount", "spec.training.epochs", "metadata.name"):
        assert f"\n  {path}: " in text


def test_what_is_not_yaml_is_said_to_be_so(tmp_path: Path) -> None:
    assert "not valid YAML" in message(tmp_path, "spec: [1, 2\nkind: {")


@pytest.mark.parametrize(("text", "found"), [("- a\n- b\n", "list"), ("just words", "str"), ("", "NoneType")])
def test_what_is_not_a_mapping_is_said_to_be_so(tmp_path: Path, text: str, found: str) -> None:
    assert f"expected an RLTrainingJob, found {found}" in message(tmp_path, text)


def test_a_missing_file_is_said_to_be_missing(tmp_path: Path) -> None:
    with pytest.raises(JobError, match=r"nowhere\.yaml: no such job file"):
        load_job(tmp_path / "nowhere.yaml")


def test_a_directory_is_not_a_job_file(tmp_path: Path) -> None:
    with pytest.raises(JobError):
        load_job(tmp_path)


def test_a_file_that_is_not_text_is_not_a_job_file(tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_bytes(b"\x89PNG\xff\xfe\x00")
    with pytest.raises(JobError):
        load_job(path)


def test_the_online_store_passes_further_keys_on(tmp_path: Path, document: dict[str, Any]) -> None:
    document = change(document, "spec.data.features", {"onlineStore": {"type": "redis", "connection_string": "h:1"}})
    store = RLTrainingJob.model_validate(document).spec.data.features.online_store
    assert store.model_dump() == {"type": "redis", "connection_string": "h:1"}


def test_sections_of_a_job_round_trip_without_the_others(document: dict[str, Any]) -> None:
    spec = RLTrainingJob.model_validate(document).spec
    read = JobSpec.model_validate_json(spec.only("reward", "training"))
    assert (read.actions, read.seed, read.reward, read.training) == (
        spec.actions,
        spec.seed,
        spec.reward,
        spec.training,
    )
    assert read.simulation is None
    assert read.algorithm == JobSpec(actions=["a", "b"]).algorithm != spec.algorithm


def test_a_stage_is_not_made_stale_by_sections_that_it_does_not_read(document: dict[str, Any]) -> None:
    spec = RLTrainingJob.model_validate(document).spec
    other = RLTrainingJob.model_validate(change(document, "spec.deploy.canary.minimumMdps", 99)).spec
    assert spec.only("reward", "data") == other.only("reward", "data")
    assert spec.only("deploy") != other.only("deploy")


@pytest.mark.parametrize(
    ("space", "algorithm", "others"),
    [
        ("continuous", "dqn", "ddpg, td3, td3Bc, sac, iql"),
        ("parametric", "linUcb", "dqn, c51, qrDqn, cql, bcq"),
        ("discrete", "sac", "dqn"),
        ("slate", "dqn", "slateQ"),
    ],
)
def test_an_algorithm_that_cannot_learn_from_the_actions_is_refused(
    tmp_path: Path, space: str, algorithm: str, others: str
) -> None:
    actions = ["a", "b"] if space == "discrete" else []
    spec = {"actionSpace": space, "actions": actions, "algorithm": {algorithm: {}}, "data": {"decisionLog": "log"}}
    if space == "slate":
        spec["slate"] = {"size": 2}
    path = tmp_path / "job.yaml"
    document = {"apiVersion": "bluewhale.io/v1alpha1", "kind": "RLTrainingJob", "metadata": {"name": "x"}, "spec": spec}
    path.write_text(json.dumps(document))
    with pytest.raises(JobError, match=f"{algorithm} cannot learn from {space} actions: set one of {others}"):
        load_job(path)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"slate": None}, "slate and actionSpace slate go together: set slate.size"),
        ({"actionSpace": "parametric"}, "slate and actionSpace slate go together"),
        ({"slate": {"size": 0}}, "greater than or equal to 1"),
        ({"slate": {"size": 2, "choice": "reward"}}, "reward.metricWeights.reward: slate.choice is a place"),
        ({"actions": ["a", "b"]}, "actions are discrete"),
        ({"deploy": {"service": "shop"}}, "a policy over slate actions is exported, not rolled out"),
    ],
)
def test_a_slate_has_a_size_and_a_metric_that_tells_what_was_chosen(changes: dict[str, Any], said: str) -> None:
    job = {"apiVersion": "bluewhale.io/v1alpha1", "kind": "RLTrainingJob", "metadata": {"name": "shelf"}}
    spec = {"actionSpace": "slate", "slate": {"size": 2}, "algorithm": {"slateQ": {}}, "data": {"decisionLog": "log"}}
    assert RLTrainingJob.model_validate(job | {"spec": spec}).spec.slate is not None
    with pytest.raises(ValidationError, match=re.escape(said)):
        RLTrainingJob.model_validate(job | {"spec": spec | changes})


@pytest.mark.parametrize(
    ("parameters", "said"),
    [
        ({"algorithm.dqn.alpha": {"low": 0.0, "high": 1.0}}, "this job has no such setting"),
        ({"algorithm.cql.alpha": {"low": 0.0, "high": 1.0}}, "this job has no such setting"),
        ({"algorithm.dqn.hiddenLayers.0": {"low": 1.0, "high": 8.0}}, "this job has no such setting"),
        ({"algorithm.dqn.learningRate.x": {"low": 0.1, "high": 1.0}}, "this job has no such setting"),
        ({"algorithm.dqn.dueling": {"choices": ["[64"]}}, "choices: not valid YAML"),
        ({"training.epochs": {"low": 1.0, "high": 8.0}}, "sweep.epochs are those of a trial"),
        ({"algorithm.dqn.learningRate": {"low": -1.0, "high": 1.0}}, "-1.0 is refused: algorithm.dqn.learningRate"),
        ({"reward.discount": {"low": 0.5, "high": 0.9}}, "only settings of algorithm and training"),
        ({"algorithm.dqn.steps": {"low": 1.0}}, "set low and high, or choices"),
        ({"algorithm.dqn.dueling": {"choices": ["true", "7"]}}, "7 is refused"),
    ],
)
def test_a_sweep_over_what_cannot_be_set_is_refused(parameters: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(said)):
        JobSpec.model_validate({"actions": ["a", "b"], "sweep": {"parameters": parameters}})


def test_settings_of_a_sweep_become_those_of_the_job() -> None:
    parameters = {
        "algorithm.dqn.steps": {"low": 1.0, "high": 5.0},
        "algorithm.dqn.hiddenLayers": {"choices": ["[8, 8]"]},
    }
    spec = JobSpec.model_validate({"actions": ["a", "b"], "sweep": {"parameters": parameters}})
    made = spec.with_settings(
        {"algorithm.dqn.steps": 3.0, "algorithm.dqn.hiddenLayers": [8, 8], "training.stepsPerEpoch": 9}
    )
    assert made.algorithm.dqn is not None
    assert (made.algorithm.dqn.steps, made.algorithm.dqn.hidden_layers) == (3, [8, 8])
    assert made.training.steps_per_epoch == 9
    assert made.sweep is None
    assert made.data == spec.data


@pytest.mark.parametrize(
    ("gate", "fits"), [({}, False), ({"enabled": False}, True), ({"estimator": "stepwise_direct_method"}, True)]
)
def test_a_gate_on_a_policy_over_numbers_needs_an_estimator_without_propensities(
    gate: dict[str, Any], fits: bool
) -> None:
    spec = {
        "actionSpace": "continuous",
        "algorithm": {"iql": {}},
        "data": {"decisionLog": "log"},
        "evaluation": {"gate": gate},
    }
    job = {"apiVersion": "bluewhale.io/v1alpha1", "kind": "RLTrainingJob", "metadata": {"name": "x"}, "spec": spec}
    if fits:
        RLTrainingJob.model_validate(job)
    else:
        with pytest.raises(ValidationError, match="has no propensities: set sequential_direct_method"):
            RLTrainingJob.model_validate(job)


@pytest.mark.parametrize(
    ("formats", "placed"),
    [
        ({}, ("/root/log", "/root/late")),
        ({"format": "table"}, ("log", "/root/late")),
        ({"outcomeFormat": "table"}, ("/root/log", "late")),
    ],
)
def test_a_table_s_name_is_no_path(formats: dict[str, str], placed: tuple[str, str]) -> None:
    found = Data.model_validate({"decisionLog": "log", "outcomes": "late"} | formats).placed("/root")
    assert (found.decision_log, found.outcomes) == placed


@pytest.mark.parametrize(
    ("training", "decides"),
    [
        ({"checkpointSeconds": 600}, False),
        ({"resources": {"memory": "8Gi"}, "nodeSelector": {"pool": "large"}, "tolerations": [{}]}, False),
        ({"workers": {"min": 1, "max": 2}}, False),
        ({"volumes": [{"claimName": "more", "mountPath": "/more"}], "scheduler": "kubernetes"}, False),
        ({"batchSize": 256}, True),
    ],
)
def test_where_training_runs_and_how_often_it_is_kept_does_not_decide_what_is_learned(
    training: dict[str, Any], decides: bool
) -> None:
    made = {"actions": ["a", "b"]}
    found = [JobSpec.model_validate(made | change).deciding() for change in ({}, {"training": training})]
    assert (found[0] != found[1]) == decides

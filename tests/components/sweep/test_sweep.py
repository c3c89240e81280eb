"""A sweep finds better settings than the job's own, looks at no MDP of the gate, and goes on after a kill."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.columns import load_transitions, open_columns
from components.normalization.spec import NormalizationSpec
from components.sweep import sweep as module
from components.sweep.sweep import search, sweep_and_train, training_mdps
from components.training.actions import Actions
from components.training.algorithms.build import build_network
from components.training.bundle import write_bundle
from components.transitions import held_out
from contracts.job import Algorithm, Bounds, JobSpec, PolicyHead
from contracts.stage import StageError, TransientError, read_record, stage

MDPS = 400
JOB: dict[str, Any] = {
    "actions": ["left", "right"],
    "seed": 3,
    # With so little to learn by, the job's own learning rate leaves the policy as it began.
    "algorithm": {"dqn": {"hiddenLayers": [16], "learningRate": 1e-6}},
    "training": {"batchSize": 64, "epochs": 2, "stepsPerEpoch": 60},
    "export": {"temperature": 0.1},
    "evaluation": {
        "bootstrapSamples": 100, "fittedQSteps": 30, "gate": {"metric": "reward", "estimator": "stepwise_doubly_robust"}
    },
    "sweep": {
        "trials": 3,
        "epochs": 1,
        "parameters": {"algorithm.dqn.learningRate": {"choices": ["0.000001", "0.02"]}},
    },
}  # fmt: skip
SPEC = JobSpec.model_validate(JOB)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, write_stages: Callable[..., None]) -> Path:
    """One decision for each MDP; right is right where x is positive."""
    root, rng = tmp_path_factory.mktemp("stages"), np.random.default_rng(0)
    x, action = rng.normal(size=MDPS), rng.integers(2, size=MDPS)
    write_stages(root, 1, [SPEC.actions[a] for a in action], action == (x > 0), x)
    return root


@pytest.fixture(scope="module")
def swept(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("swept") / "training"
    sweep_and_train(SPEC, stages / "features", stages / "normalization", output)
    return output


def test_a_log_that_evaluation_cannot_read_is_refused_before_any_trial(stages: Path, tmp_path: Path) -> None:
    rows = pq.read_table(stages / "features" / "training")
    at = rows.schema.get_field_index("ordinal")
    second = pa.array([2] * len(rows), rows.schema.field("ordinal").type)
    with stage("features", tmp_path / "features") as (directory, facts):
        (directory / "training").mkdir()
        pq.write_table(rows.set_column(at, "ordinal", second), directory / "training" / "part.parquet")
        facts |= {"features": ["x"]}
    with pytest.raises(StageError, match="every held-out MDP has quarantined decisions"):
        sweep_and_train(SPEC, tmp_path / "features", stages / "normalization", tmp_path / "training")
    assert not (tmp_path / "training.sweep").exists()


def test_the_policy_is_trained_with_the_settings_that_were_judged_best(swept: Path) -> None:
    record = read_record(swept)
    found = record["sweep"]
    assert found["settings"] == {"algorithm.dqn.learningRate": 0.02}
    assert found["low"] > found["own_low"]
    assert (found["trials"], found["failed"]) == (3, 0)
    bundle = json.loads((swept / "policy" / "bundle.json").read_text())
    assert bundle["algorithm"]["dqn"]["learningRate"] == 0.02
    assert bundle["digest"] == record["digest"]
    assert len(list((swept / "epochs").iterdir())) == 2  # those of the job, not of the trials


def test_what_was_tried_is_told_the_jobs_own_settings_first(swept: Path) -> None:
    report = json.loads((swept / "sweep.json").read_text())
    assert report["parameters"] == {"algorithm.dqn.learningRate": {"log": False, "choices": ["0.000001", "0.02"]}}
    first, *_ = report["trials"]
    assert first["settings"] == {"algorithm.dqn.learningRate": 1e-6}
    assert all(t["low"] <= t["value"] <= t["high"] for t in report["trials"])
    html = (swept / "sweep.html").read_text()
    assert "3 of 3 trials could be judged, by the stepwise doubly robust estimate" in html
    assert html.count("<svg") == 1
    assert not swept.with_name("training.sweep").exists()


def test_no_trial_sees_an_mdp_that_the_gate_is_judged_on(stages: Path, tmp_path: Path) -> None:
    training_mdps(SPEC, stages / "features", tmp_path / "features")
    whole = load_transitions(stages / "features", SPEC)
    gate = {m for m, out in zip(whole.mdp_ids, held_out(whole.mdp_ids, SPEC), strict=True) if out}
    kept = load_transitions(tmp_path / "features", SPEC)
    assert set(kept.mdp_ids) == set(whole.mdp_ids) - gate
    judging = SPEC.model_copy(update={"seed": SPEC.seed + 1})
    train, judged = kept.split(judging)
    assert 0.2 < judged.mdp.size / (train.mdp.size + judged.mdp.size) < 0.4


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Trials whose value is known without any training; a small learning rate cannot be judged."""
    asked: list[dict[str, Any]] = []

    def train(
        spec: JobSpec, features: Path, normalization: Path, output: Path, warm_start: str, part: str, laid_out: Path
    ) -> None:
        to_learn_from, _ = load_transitions(features, spec).split(spec)
        np.testing.assert_array_equal(open_columns(laid_out)[0].state, to_learn_from.state)
        asked.append(
            {
                "rate": spec.algorithm.learning_rate, "epochs": spec.training.epochs, "warm_start": warm_start,
                "bounds": spec.action_bounds,
            }
        )  # fmt: skip
        if spec.algorithm.learning_rate < 1e-4:
            raise StageError("training diverges")

    def evaluate(spec: JobSpec, features: Path, training: Path, output: Path, last_only: bool) -> None:
        output.mkdir(parents=True)
        value = -((np.log10(spec.algorithm.learning_rate) + 2) ** 2)
        found = {"reward": {"value": value, "low": value - 1, "high": value + 1, "relative": None}}
        document = {"final": {"stepwise_doubly_robust": found}, "diagnostics": {"held_out_mdps": 100}}
        (output / "report.json").write_text(json.dumps(document))

    monkeypatch.setattr(module, "train", train)
    monkeypatch.setattr(module, "evaluate", evaluate)
    return asked


def ranged(trials: int, **changes: Any) -> JobSpec:
    parameters = {"algorithm.dqn.learningRate": {"low": 1e-6, "high": 1.0, "log": True} | changes}
    return JobSpec.model_validate(JOB | {"sweep": {"trials": trials, "parameters": parameters}})


def test_a_trial_whose_workers_are_lost_is_tried_once_more(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trains, rates, parts = module.train, [], []

    def train(spec: JobSpec, *arguments: Any, **more: Any) -> None:
        rates.append(spec.algorithm.learning_rate)
        parts.append(more["part"])
        if len(rates) in (1, 3, 4):
            raise TransientError("training: the workers ended as FAILED\n  look there")
        trains(spec, *arguments, **more)

    monkeypatch.setattr(module, "train", train)
    spec = ranged(3, low=1e-3)
    _, tried = search(spec, stages / "features", stages / "normalization", tmp_path / "work")
    lost = "training: the workers ended as FAILED"
    assert [trial["failed"] for trial in tried] == ["training diverges", lost, None]
    assert rates[0] == rates[1] != rates[2] == rates[3] != rates[4]
    assert parts == ["-t0", "-t0b", "-t1", "-t1b", "-t2"], "by its name, a cluster would find what has failed"


def test_a_trial_whose_workers_were_lost_is_tried_again_on_other_machines_and_others_are_not(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    trains, small = module.train, ranged(3, low=1e-3)
    roomy = small.training.resources.model_copy(update={"memory": "8Gi"})
    large = small.model_copy(update={"training": small.training.model_copy(update={"resources": roomy})})

    def train(spec: JobSpec, *arguments: Any, **more: Any) -> None:
        if spec.training.resources != roomy and more["part"].startswith("-t2"):
            raise TransientError("training: the workers ended as FAILED")
        trains(spec, *arguments, **more)

    monkeypatch.setattr(module, "train", train)
    given = stages / "features", stages / "normalization", tmp_path / "work"
    failed = [[trial["failed"] for trial in search(spec, *given)[1]] for spec in (small, large)]
    assert failed == [
        ["training diverges", None, "training: the workers ended as FAILED"],
        ["training diverges", None, None],
    ]
    assert len(judged) == 3, "what was found of the other two is known"


def test_trials_begin_where_the_job_does(stages: Path, tmp_path: Path, judged: list[dict[str, Any]]) -> None:
    given = ranged(2, low=1e-3), stages / "features", stages / "normalization", tmp_path / "work"
    for name in ("first", "second"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "bundle.json").write_text(name)
        search(*given, str(tmp_path / name))
    search(*given, str(tmp_path / "gone"))
    assert [Path(each["warm_start"]).name for each in judged] == ["first"] * 2 + ["second"] * 2 + ["gone"] * 2


def test_a_policy_of_other_actions_ends_a_sweep_before_its_first_trial(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    states, others = NormalizationSpec.read(stages / "normalization" / "spec.json"), Actions(["up", "down"])
    network = build_network(SPEC.algorithm, states, others)
    write_bundle(tmp_path / "policy", network, SPEC.algorithm, states, others, PolicyHead(), {})
    with pytest.raises(StageError, match=r"no warm start: .*actions are up, down, this job's are left, right"):
        search(SPEC, stages / "features", stages / "normalization", tmp_path / "work", str(tmp_path / "policy"))
    assert not judged


def test_a_policy_of_other_layers_ends_no_sweep(stages: Path, tmp_path: Path, judged: list[dict[str, Any]]) -> None:
    """Training begins anew with it, and says so."""
    states = NormalizationSpec.read(stages / "normalization" / "spec.json")
    wider, same = Algorithm.model_validate({"dqn": {"hiddenLayers": [32]}}), Actions(list(SPEC.actions))
    write_bundle(tmp_path / "policy", build_network(wider, states, same), wider, states, same, PolicyHead(), {})
    spec = ranged(2, low=1e-3)
    search(spec, stages / "features", stages / "normalization", tmp_path / "work", str(tmp_path / "policy"))
    assert len(judged) == 2


def test_numbers_have_one_range_for_all_trials_and_the_policy(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    """Of the training MDPs, those too that a trial has not seen; or the policy before would fit one, not the other."""
    parameters = {"algorithm.iql.learningRate": {"low": 1e-3, "high": 1.0, "log": True}}
    changes = {"actions": [], "actionSpace": "continuous", "algorithm": {"iql": {}}, "sweep": {"trials": 2}}
    changes["sweep"]["parameters"] = parameters
    spec = JobSpec.model_validate(JOB | changes)
    rows = pq.read_table(stages / "features" / "training")
    ids = rows["mdp_id"].to_pylist()
    of_gate, of_trials = (held_out(ids, spec.model_copy(update={"seed": spec.seed + by})) for by in (0, 1))
    price = np.linspace(0, 1, len(ids))
    price[np.flatnonzero(of_gate)[0]], price[np.flatnonzero(of_trials & ~of_gate)[0]] = -50, 50
    with stage("features", tmp_path / "features") as (directory, facts):
        (directory / "training").mkdir()
        numbers = rows.append_column("action_feature_price", pa.array(price))
        pq.write_table(numbers, directory / "training" / "part.parquet")
        facts |= {"features": ["x"], "action_features": ["price"]}
    low = float(np.float32(price[~of_gate].min()))
    states, actions = NormalizationSpec.read(stages / "normalization" / "spec.json"), Actions(["price"], [(low, 50.0)])
    network = build_network(spec.algorithm, states, actions)
    write_bundle(tmp_path / "policy", network, spec.algorithm, states, actions, PolicyHead(), {})
    chosen, _ = search(
        spec, tmp_path / "features", stages / "normalization", tmp_path / "work", str(tmp_path / "policy")
    )
    assert [each["bounds"] for each in judged] == [{"price": Bounds(low=low, high=50.0)}] * 2
    assert chosen.action_bounds == judged[0]["bounds"]


def test_a_bandit_that_begins_anew_each_time_is_told_of_no_policy_of_other_actions(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    states, others = NormalizationSpec.read(stages / "normalization" / "spec.json"), Actions(["up", "down"])
    policy = tmp_path / "policy"
    write_bundle(
        policy, build_network(SPEC.algorithm, states, others), SPEC.algorithm, states, others, PolicyHead(), {}
    )
    parameters = {"algorithm.linUcb.alpha": {"low": 0.1, "high": 2.0}}
    spec = JobSpec.model_validate(JOB | {"algorithm": {"linUcb": {}}, "sweep": {"trials": 2, "parameters": parameters}})
    with pytest.raises(StageError, match="no trial of 2 could be judged; the last: training diverges"):
        search(spec, stages / "features", stages / "normalization", tmp_path / "work", str(policy))
    assert len(judged) == 2


def test_a_trial_that_few_mdps_could_judge_is_none(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "FEWEST_MDPS", 101)
    with pytest.raises(StageError, match="100 MDPs to judge a trial by are too few for an interval"):
        search(ranged(9, low=1e-3), stages / "features", stages / "normalization", tmp_path / "work")
    assert len(judged) == 2, "after the first that could be evaluated, no other would fare better"


def test_a_range_is_searched_where_it_pays(stages: Path, tmp_path: Path, judged: list[dict[str, Any]]) -> None:
    chosen, tried = search(ranged(25), stages / "features", stages / "normalization", tmp_path / "work")
    assert chosen.algorithm.learning_rate == pytest.approx(0.01, rel=1.0)
    assert chosen.sweep is None
    assert chosen.seed == SPEC.seed
    assert tried[0]["failed"] == "training diverges"
    assert len(judged) == 25
    late = [t["low"] for t in tried[15:] if not t["failed"]]
    early = [t["low"] for t in tried[:8] if not t["failed"]]
    assert np.mean(late) > np.mean(early)


def test_finished_trials_are_not_repeated_after_a_kill(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ranged(8), stages / "features", stages / "normalization"
    whole = search(*given, tmp_path / "undisturbed")
    real, left = module.train, [5]

    def killed(*arguments: Any, **named: Any) -> None:
        left[0] -= 1
        if left[0] < 0:
            raise KeyboardInterrupt
        real(*arguments, **named)

    monkeypatch.setattr(module, "train", killed)
    with pytest.raises(KeyboardInterrupt):
        search(*given, tmp_path / "work")
    monkeypatch.setattr(module, "train", real)
    before = len(judged)
    again = search(*given, tmp_path / "work")
    assert len(judged) - before == 3
    assert again[0] == whole[0]
    assert [t["settings"] for t in again[1]] == [t["settings"] for t in whole[1]]


def test_trials_of_another_job_are_not_taken_for_this_ones(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    given = stages / "features", stages / "normalization", tmp_path / "work"
    search(ranged(4), *given)
    search(ranged(4, high=0.5), *given)
    assert len(judged) == 8


def test_a_sweep_of_which_nothing_can_be_judged_says_why(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    spec = ranged(3, low=1e-6, high=1e-5)
    with pytest.raises(StageError, match="no trial of 3 could be judged; the last: training diverges"):
        search(spec, stages / "features", stages / "normalization", tmp_path / "work")


def test_settings_that_do_not_go_together_are_a_failed_trial(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    parameters = {
        "training.batchSize": {"low": 64.0, "high": 512.0},
        "algorithm.dqn.learningRate": {"low": 0.01, "high": 0.1},
    }
    training = JOB["training"] | {"workers": {"max": 2}}
    spec = JobSpec.model_validate(JOB | {"training": training, "sweep": {"trials": 8, "parameters": parameters}})
    _, tried = search(spec, stages / "features", stages / "normalization", tmp_path / "work")
    failed = [each["failed"] for each in tried[1:] if each["failed"]]
    assert failed
    assert all("must be a multiple of workers.max" in each for each in failed)


def test_the_jobs_own_settings_are_tried_wherever_they_lie(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]]
) -> None:
    _, tried = search(ranged(3, low=0.01, high=0.02), stages / "features", stages / "normalization", tmp_path / "work")
    assert tried[0]["settings"] == {"algorithm.dqn.learningRate": 1e-6}
    assert all(0.01 <= each["settings"]["algorithm.dqn.learningRate"] <= 0.02 for each in tried[1:])


def test_a_sweep_ends_as_the_training_stage_would(
    stages: Path, tmp_path: Path, judged: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("BLUEWHALE_ERROR_FILE", str(tmp_path / "error.json"))
    monkeypatch.setenv("BLUEWHALE_TERMINATION_LOG", str(tmp_path / "termination"))
    spec = ranged(3, low=1e-6, high=1e-5)
    with pytest.raises(StageError):
        sweep_and_train(spec, stages / "features", stages / "normalization", tmp_path / "training")
    for file in ("error.json", "termination"):
        told = json.loads((tmp_path / file).read_text())
        assert told["stage"] == "training"
        assert "no trial of 3 could be judged" in (told.get("error") or told["message"])

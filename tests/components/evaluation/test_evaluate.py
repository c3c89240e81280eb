"""The evaluation stage: the gate's verdict, what is refused, and what is left out."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.columns import load_transitions
from components.evaluation.evaluate import _whole_mdps, evaluate, judge, propensities, sampled
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.build import build_network
from components.training.bundle import read_bundle, write_bundle
from components.transitions import Transitions
from contracts.hashing import unit_interval
from contracts.job import DQN, ESTIMATORS, Algorithm, Gate, JobSpec, PolicyHead
from contracts.stage import StageError, read_record, stage
from tests.components.evaluation.tabular_mdp import TabularMdp

MODEL = TabularMdp.small()
METRICS = ("gain", "cost", "reward")
SPEC = JobSpec.model_validate(
    {
        "actions": ["first", "second"],
        "reward": {"metricWeights": {"gain": 2.0, "cost": -0.5}, "discount": 0.9},
        "data": {"holdoutFraction": 0.5},
        "evaluation": {"bootstrapSamples": 100, "fittedQSteps": 50, "gate": {"metric": "gain"}},
    }
)


def estimates(low: float | None) -> dict[str, Any]:
    return {"weighted_sequential_doubly_robust": {"reward": {"relative_low": low}, "clicks": {"relative_low": 9.0}}}


class TestTheGate:
    def test_a_lower_bound_at_the_minimum_passes(self) -> None:
        verdict = judge(Gate(minimumRelative=1.1), estimates(1.1), 10)
        assert verdict["verdict"] == "pass"
        assert "at least the minimum 1.1" in verdict["reason"]
        assert "weighted sequential doubly robust estimate of reward" in verdict["reason"]

    def test_a_lower_bound_under_the_minimum_fails(self) -> None:
        verdict = judge(Gate(minimumRelative=1.1), estimates(1.099), 10)
        assert verdict["verdict"] == "fail"
        assert "1.099" in verdict["reason"]
        assert "under the minimum 1.1" in verdict["reason"]

    def test_the_asked_metric_is_judged_and_no_other(self) -> None:
        assert judge(Gate(metric="clicks"), estimates(0.5), 10)["verdict"] == "pass"

    def test_an_estimate_that_cannot_be_had_is_inconclusive(self) -> None:
        refused = {"weighted_sequential_doubly_robust": {"refused": "the log has no propensities"}}
        verdict = judge(Gate(), refused, 10)
        assert verdict["verdict"] == "inconclusive"
        assert "the log has no propensities" in verdict["reason"]

    def test_nothing_is_relative_to_a_value_that_is_not_positive(self) -> None:
        verdict = judge(Gate(), estimates(None), 10)
        assert verdict["verdict"] == "inconclusive"
        assert "not positive" in verdict["reason"]

    def test_an_interval_from_too_few_mdps_is_none(self) -> None:
        verdict = judge(Gate(), estimates(1.1), 9)
        assert verdict["verdict"] == "inconclusive"
        assert "9 held-out MDPs are too few for an interval; 10 are needed" in verdict["reason"]

    def test_a_gate_that_is_off_judges_nothing(self) -> None:
        assert judge(Gate(enabled=False, metric="unknown"), {}, 10)["verdict"] == "disabled"

    def test_an_unknown_metric_is_refused_with_those_there_are(self) -> None:
        with pytest.raises(StageError, match=r"evaluation\.gate\.metric: no metric 'sales'.*clicks, reward"):
            judge(Gate(metric="sales"), estimates(1.0), 10)


def rows(mdp: list[int], truncated: list[int], ordinal: list[int]) -> Transitions:
    n = len(mdp)
    last = np.append(np.diff(mdp) != 0, True)
    cut = np.isin(np.arange(n), truncated)
    return Transitions(
        features=["x"],
        actions=["first", "second"],
        metric_names=["gain"],
        state=np.arange(n, dtype=np.float32)[:, None],
        action=np.zeros(n, np.int64),
        propensity=np.full(n, 0.5),
        possible=np.ones((n, 2), bool),
        metrics=np.ones((n, 1), np.float32),
        time_diff=np.ones(n),
        terminal=last & ~cut,
        truncated=cut,
        ordinal=np.array(ordinal),
        mdp=np.array(mdp),
        mdp_ids=[str(m) for m in range(max(mdp) + 1)],
    )


def test_mdps_with_a_hole_are_left_out_and_those_cut_at_their_end_are_kept() -> None:
    kept, excluded = _whole_mdps(
        rows([0, 0, 0, 2, 2, 3, 3, 5, 6], truncated=[1, 4], ordinal=[1, 2, 4, 1, 2, 2, 3, 1, 2])
    )
    assert excluded == 3
    assert kept.mdp.tolist() == [2, 2, 5]
    assert kept.state[:, 0].tolist() == [3, 4, 7]


def test_nothing_left_but_holes_is_refused() -> None:
    with pytest.raises(StageError, match="quarantined decisions before its last"):
        _whole_mdps(rows([0, 0], truncated=[0], ordinal=[1, 3]))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features and training stages of a log of the small MDP, with a policy that is no good yet."""
    root = tmp_path_factory.mktemp("stages")
    log = MODEL.simulate(300, np.random.default_rng(0))
    last = log.ends()
    ordinal = log.step + 1
    metrics = [[("gain", g), ("cost", 100.0 * a)] for g, a in zip(log.metric, log.action, strict=True)]
    table = pa.table(
        {
            "mdp_id": [f"mdp-{m:04}" for m in log.mdp],
            "ordinal": ordinal,
            "action": [SPEC.actions[a] for a in log.action],
            "action_probability": MODEL.behaviour[log.state, log.action],
            "possible_actions": pa.nulls(len(log.mdp), pa.list_(pa.string())),
            "metrics": pa.array(metrics, pa.map_(pa.string(), pa.float64())),
            "returns": pa.array(metrics, pa.map_(pa.string(), pa.float64())),
            "time_diff": np.ones(len(last), np.int64),
            "terminal": last,
            "truncated": np.zeros(len(last), bool),
            "state_place": log.state.astype(float),
        }
    )
    for name, changed in {
        "features": table,
        "without_propensities": table.set_column(3, "action_probability", pa.nulls(len(table), pa.float64())),
    }.items():
        with stage("features", root / name) as (directory, facts):
            (directory / "training").mkdir()
            pq.write_table(changed, directory / "training" / "part.parquet")
            facts["features"] = ["place"]
    place = FeatureNormalization(name="place", type="enum", values=[0, 1, 2], how="by hand", evidence={})
    normalization = NormalizationSpec(inputs=["place"], features=[place])
    with stage("training", root / "training") as (directory, _):
        for epoch in (1, 2):
            torch.manual_seed(epoch)
            algorithm = Algorithm(dqn=DQN(hiddenLayers=[8]))
            network = build_network(algorithm, normalization, Actions(SPEC.actions))
            write_bundle(
                directory / "epochs" / f"{epoch:03}",
                network,
                algorithm,
                normalization,
                Actions(SPEC.actions),
                PolicyHead(),
                {},
            )
    return root


@pytest.fixture(scope="module")
def report(stages: Path) -> dict[str, Any]:
    evaluate(SPEC, stages / "features", stages / "training", stages / "evaluation")
    return json.loads((stages / "evaluation" / "report.json").read_text())


def held_out(stages: Path, spec: JobSpec = SPEC) -> Transitions:
    return load_transitions(stages / "features", spec).split(spec)[1]


def test_every_estimator_estimates_every_metric_and_the_reward_at_every_epoch(report: dict[str, Any]) -> None:
    assert [e["epoch"] for e in report["epochs"]] == [1, 2]
    assert report["final"] == report["epochs"][-1]["estimates"]
    for epoch in report["epochs"]:
        assert sorted(epoch["estimates"]) == sorted(ESTIMATORS)
        for found in epoch["estimates"].values():
            assert sorted(found) == ["cost", "gain", "reward"]
            assert all(e["low"] <= e["value"] <= e["high"] for e in found.values())


def test_the_reward_is_the_weighted_sum_of_the_metrics(report: dict[str, Any]) -> None:
    for found in [*report["final"].values(), report["logged"]["per_step"], report["logged"]["per_mdp"]]:
        gain, cost, reward = (f["value"] if isinstance(f, dict) else f for f in (found[m] for m in METRICS))
        assert reward == pytest.approx(2.0 * gain - 0.5 * cost)


def test_an_estimate_is_relative_to_the_logged_value_of_its_kind(report: dict[str, Any]) -> None:
    for estimator, kind in {
        "stepwise_doubly_robust": "per_step",
        "weighted_sequential_doubly_robust": "per_mdp",
    }.items():
        gain = report["final"][estimator]["gain"]
        assert gain["relative"] == pytest.approx(gain["value"] / report["logged"][kind]["gain"])
        assert gain["relative_low"] < gain["relative"] < gain["relative_high"]


def test_a_logged_value_that_is_not_positive_gives_nothing_relative(report: dict[str, Any]) -> None:
    assert report["logged"]["per_step"]["reward"] < 0
    for found in report["final"].values():
        assert found["reward"]["relative"] is found["reward"]["relative_low"] is None


def test_estimates_are_made_on_the_held_out_mdps_alone(stages: Path, report: dict[str, Any]) -> None:
    ids = [f"mdp-{m:04}" for m in range(300)]
    expected = sum(unit_interval("holdout-0", m) < 0.5 for m in ids)
    assert report["diagnostics"]["held_out_mdps"] == expected
    assert report["diagnostics"]["held_out_decisions"] == len(held_out(stages))
    assert report["diagnostics"]["unread_mdps"] == 0
    assert report["logged"]["per_step"]["gain"] == pytest.approx(held_out(stages).metrics[:, 1].mean(), rel=1e-5)


def test_of_many_rows_a_sample_of_whole_mdps_is_read_and_the_rest_counted(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("components.evaluation.evaluate.SAMPLED_MDPS", 1)
    evaluation = SPEC.evaluation.model_copy(update={"sample_rows": 200, "fitted_q_steps": 1})
    spec = SPEC.model_copy(update={"evaluation": evaluation})
    evaluate(spec, stages / "features", stages / "training", tmp_path / "out", last_only=True)
    found = json.loads((tmp_path / "out" / "report.json").read_text())["diagnostics"]
    whole = held_out(stages)
    assert 200 <= found["held_out_decisions"] < 200 + MODEL.horizon < len(whole)
    assert found["held_out_mdps"] + found["unread_mdps"] == len(np.unique(whole.mdp))
    whole = load_transitions(stages / "features", spec)
    read = load_transitions(stages / "features", spec, sampled(spec))
    for side, all_of in zip(read.split(spec), whole.split(spec), strict=True):
        assert 200 <= len(side) < 200 + MODEL.horizon
        lengths = np.bincount(all_of.mdp, minlength=len(all_of.mdp_ids))
        taken = np.bincount(side.mdp, minlength=len(side.mdp_ids))
        np.testing.assert_array_equal(taken[taken > 0], lengths[taken > 0])


def test_no_few_mdps_stand_for_all_however_long_they_are(stages: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("components.evaluation.evaluate.SAMPLED_MDPS", 100)
    spec = SPEC.model_copy(update={"evaluation": SPEC.evaluation.model_copy(update={"sample_rows": 100})})
    for side in load_transitions(stages / "features", spec, sampled(spec)).split(spec):
        assert len(np.unique(side.mdp)) == 100


def test_an_evaluation_is_repeatable(stages: Path, report: dict[str, Any], tmp_path: Path) -> None:
    evaluate(SPEC, stages / "features", stages / "training", tmp_path / "again")
    assert json.loads((tmp_path / "again" / "report.json").read_text()) == report


def test_the_verdict_is_in_the_record(stages: Path, report: dict[str, Any]) -> None:
    assert read_record(stages / "evaluation")["gate"] == report["gate"]
    assert report["gate"]["verdict"] in ("pass", "fail")


def test_without_propensities_only_the_direct_methods_are_left(stages: Path, tmp_path: Path) -> None:
    evaluate(SPEC, stages / "without_propensities", stages / "training", tmp_path / "out")
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    for estimator in ESTIMATORS:
        found = report["final"][estimator]
        if estimator.endswith("direct_method"):
            assert sorted(found) == ["cost", "gain", "reward"]
        else:
            assert list(found) == ["refused"]
            assert "action_probability" in found["refused"]
    assert report["gate"]["verdict"] == "inconclusive"
    assert "action_probability" in report["gate"]["reason"]


def test_a_gate_on_an_unknown_metric_leaves_no_evaluation(stages: Path, tmp_path: Path) -> None:
    evaluation = SPEC.evaluation.model_copy(update={"gate": Gate(metric="sales"), "fitted_q_steps": 1})
    with pytest.raises(StageError, match="no metric 'sales'"):
        evaluate(
            SPEC.model_copy(update={"evaluation": evaluation}),
            stages / "features",
            stages / "training",
            tmp_path / "out",
        )
    with pytest.raises(StageError):
        read_record(tmp_path / "out")


def test_the_served_policy_is_a_softmax_over_the_possible_actions(stages: Path) -> None:
    bundle = read_bundle(stages / "training" / "epochs" / "001")
    data = held_out(stages)
    possible = data.possible.copy()
    possible[::2, 0] = False
    found = propensities(replace(bundle, head=PolicyHead(temperature=0.5)), replace(data, possible=possible))
    with torch.no_grad():
        q = bundle.network(torch.from_numpy(data.state)).double().numpy()
    wanted = 1 / (1 + np.exp((q[:, 1] - q[:, 0]) / 0.5))
    np.testing.assert_allclose(found[1::2, 0], wanted[1::2], rtol=1e-5)
    np.testing.assert_array_equal(found[::2], np.tile([0.0, 1.0], (len(found[::2]), 1)))
    np.testing.assert_allclose(found.sum(1), 1)

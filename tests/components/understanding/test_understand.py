"""The understanding stage: what it says of processes whose nature is known."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.transitions import Lists, Transitions, held_out
from components.understanding.dynamics import Outcomes, likely_action, outcomes
from components.understanding.page import figure, read_understanding
from components.understanding.understand import _examine, judge, shares, training_sample, understand
from contracts.job import JobSpec
from contracts.stage import RECORD, StageError, read_record, stage

SPEC = JobSpec.model_validate({"actions": ["left", "right"], "understanding": {"modelSteps": 300}})
LENGTH = 20
CONTINUOUS = NormalizationSpec(
    inputs=["x"], features=[FeatureNormalization(name="x", type="continuous", how="by hand", evidence={})]
)


def process(mdps: int, seed: int, action: float = 1.0, memory: float = 0.0, state: float = 0.6) -> Transitions:
    """x' = state * x + action * (+-1) + memory * the x before + a standard normal; the reward is x + noise."""
    generator = np.random.default_rng(seed)
    side = generator.integers(0, 2, (mdps, LENGTH))
    x = np.zeros((mdps, LENGTH))
    for t in range(1, LENGTH):
        earlier = x[:, t - 2] if t > 1 else 0.0
        x[:, t] = state * x[:, t - 1] + action * (2 * side[:, t - 1] - 1) + memory * earlier
        x[:, t] += generator.normal(size=mdps)
    last = np.tile(np.arange(LENGTH) == LENGTH - 1, mdps)
    reward = x.reshape(-1, 1) + generator.normal(size=(mdps * LENGTH, 1))
    return Transitions(
        features=["x"],
        actions=["left", "right"],
        metric_names=["reward"],
        state=x.reshape(-1, 1).astype(np.float32),
        action=side.ravel(),
        propensity=np.full(mdps * LENGTH, 0.5),
        possible=np.ones((mdps * LENGTH, 2), bool),
        metrics=reward.astype(np.float32),
        time_diff=np.ones(len(last)),
        terminal=np.zeros_like(last),
        truncated=last,
        ordinal=np.tile(np.arange(LENGTH) + 1, mdps),
        mdp=np.repeat(np.arange(mdps), LENGTH),
        mdp_ids=[f"mdp-{m}" for m in range(mdps)],
    )


def examined(data: Transitions, seed: int = 0, steps: int = 300) -> dict[str, Any]:
    return _examine(outcomes(data, CONTINUOUS, data.reward({"reward": 1.0})), data.mdp_ids, steps, seed)


def verdicts(document: dict[str, Any]) -> dict[str, str]:
    return {name: check["verdict"] for name, check in document["checks"].items()}


class TestTheChecks:
    def test_a_markov_process_that_actions_steer_passes_all(self) -> None:
        assert set(verdicts(examined(process(400, 1))).values()) == {"pass"}

    @pytest.mark.parametrize("seed", range(3))
    def test_actions_without_effect_are_never_found_to_have_one(self, seed: int) -> None:
        found = verdicts(examined(process(400, seed, action=0.0), seed))
        assert found["action_effect"] == "fail"
        assert found["state_effect"] == "pass"

    @pytest.mark.parametrize("seed", range(2))
    @pytest.mark.parametrize("logged", [True, False])
    def test_an_action_that_only_repeats_what_the_state_says_has_no_effect(self, seed: int, logged: bool) -> None:
        data, generator = process(400, seed, action=0.0), np.random.default_rng(seed)
        x = data.state[:, 0]
        # Fitted probabilities blur a sharp edge; logged ones do not.
        right = np.where(x > 0.3, 0.95, 0.05) if logged else 1 / (1 + np.exp(-3 * x))
        data.action[:] = generator.random(len(data)) < right
        data.propensity[:] = np.where(data.action == 1, right, 1 - right) if logged else np.nan
        data.metrics[:, 0] = x > 0.3
        assert verdicts(examined(data, seed))["action_effect"] != "pass"

    def test_a_stand_in_action_is_as_frequent_as_the_logged_one_in_every_state(self) -> None:
        data, generator = process(800, 3), np.random.default_rng(3)
        probability = np.where(data.state < 0, [[0.7, 0.2, 0.1]], [[0.1, 0.3, 0.6]])
        action = (generator.random((len(data), 1)) > probability.cumsum(1)).sum(1)
        taken = np.arange(len(data)), action
        possible = np.ones((len(data), 3), bool)
        possible[generator.random(len(data)) < 0.1, 2] = False
        possible[taken] = True
        data = replace(data, actions=["a", "b", "c"], action=action, propensity=probability[taken], possible=possible)
        made = outcomes(data, CONTINUOUS, data.reward({"reward": 1.0}))
        drawn = likely_action(made, np.arange(len(made.mdp)), 300, 0)
        for below in (True, False):
            rows = (made.state[:, 0] < 0) == below
            expected = torch.tensor([0.7, 0.2, 0.1] if below else [0.1, 0.3, 0.6])
            assert torch.allclose(drawn[rows].mean(0), expected, atol=0.04)
        assert made.possible is not None
        assert made.possible[drawn > 0].all(), "it could have been taken"

    def test_items_that_differ_by_which_features_they_have_are_told_apart(self) -> None:
        data = process(400, 1)
        one_hot = np.array([[1.0, np.nan], [np.nan, 1.0]], np.float32)
        lists = Lists(
            ["left", "right"], one_hot, offsets=np.arange(0, 2 * len(data) + 1, 2),
            items=np.tile([0, 1], len(data)), logged=np.ones(len(data), bool),
        )  # fmt: skip
        data = replace(data, actions=[], possible=lists)
        assert verdicts(examined(data))["action_effect"] == "pass"

    def test_one_action_alone_tells_nothing_of_actions(self) -> None:
        data = process(100, 1)
        data.action[:] = 0
        found = examined(data, steps=50)["checks"]["action_effect"]
        assert found["verdict"] == "inconclusive"
        assert "nothing else was tried" in found["reason"]

    @pytest.mark.parametrize("mdps", [120, 400])
    def test_features_of_noise_do_not_make_a_memory(self, mdps: int) -> None:
        """Models that learn their rows by heart must not take that for knowledge."""
        noise = np.random.default_rng(0).normal(size=(mdps * LENGTH, 8))
        data = process(mdps, 10)
        data = replace(
            data,
            features=[f"x{i}" for i in range(9)],
            state=np.concatenate([data.state, noise], 1).astype(np.float32),
        )
        spec = NormalizationSpec(
            inputs=data.features,
            features=[CONTINUOUS.features[0].model_copy(update={"name": name}) for name in data.features],
        )
        made = outcomes(data, spec, data.reward({"reward": 1.0}))
        assert verdicts(_examine(made, data.mdp_ids, 1000, 0))["markov"] != "fail"

    def test_features_may_be_called_action_and_before(self) -> None:
        data = replace(process(800, 1, action=0.0), features=["action"])
        spec = NormalizationSpec(
            inputs=["action"], features=[CONTINUOUS.features[0].model_copy(update={"name": "action"})]
        )
        document = _examine(outcomes(data, spec, data.reward({"reward": 1.0})), data.mdp_ids, 300, 0)
        assert verdicts(document) == {"state_effect": "pass", "action_effect": "fail", "markov": "pass"}
        assert document["importance"]["action"] > 0.1 > document["importance"]["the action"]

    def test_a_state_that_tells_nothing_fails(self) -> None:
        data = process(400, 2, state=0.0)
        data.metrics[:] = np.random.default_rng(0).normal(size=data.metrics.shape)
        found = examined(data)["checks"]
        assert found["state_effect"]["verdict"] == "fail"
        assert "log others" in found["state_effect"]["reason"]
        assert found["action_effect"]["verdict"] == "pass"

    def test_a_process_with_memory_is_not_markov_and_the_reason_says_what_to_do(self) -> None:
        found = examined(process(400, 3, memory=-0.5))["checks"]["markov"]
        assert found["verdict"] == "fail"
        assert "'next x'" in found["reason"]
        assert "add what the step before tells" in found["reason"]

    def test_too_few_mdps_to_tell_are_said_to_be_so(self) -> None:
        document = examined(process(15, 1))
        assert set(verdicts(document).values()) == {"inconclusive"}
        assert "10 are needed" in document["checks"]["markov"]["reason"]
        assert figure(document) == ""

    def test_where_nothing_varies_there_is_nothing_to_explain(self) -> None:
        data = process(60, 1)
        data.state[:] = 0.0
        data.metrics[:] = 1.0
        document = examined(data)
        assert "nothing that follows a decision ever varies" in document["checks"]["state_effect"]["reason"]

    def test_an_examination_is_repeatable(self) -> None:
        assert examined(process(80, 4), steps=20) == examined(process(80, 4), steps=20)


class TestTheShares:
    def test_are_those_of_the_process(self) -> None:
        # Stationary variance of x: (1 + 1) / (1 - 0.36); of it the state explains 0.36, the action half of the rest.
        document = examined(process(1500, 5), steps=600)
        found = {outcome["name"]: outcome for outcome in document["outcomes"]}
        assert found["next x"]["state_effect"]["share"] == pytest.approx(0.36, abs=0.05)
        assert found["next x"]["action_effect"]["share"] == pytest.approx(0.32, abs=0.04)
        assert abs(found["reward"]["action_effect"]["share"]) < 0.01
        assert document["importance"]["x"] > 0.1 < document["importance"]["the action"]

    def test_intervals_hold_the_truth_as_often_as_they_say(self) -> None:
        generator = np.random.default_rng(0)
        held = 0
        for _ in range(300):
            sizes = generator.integers(1, 30, 60)
            mdp = np.repeat(np.arange(60), sizes)
            level = np.repeat(generator.gamma(2.0, 0.5, 60), sizes)  # MDPs differ in how much there is to gain
            whole = level * generator.chisquare(1, len(mdp))
            gain = whole * 0.3 + level * generator.normal(0, 0.5, len(mdp))
            [found] = shares(torch.tensor(gain)[:, None], torch.tensor(whole)[:, None], mdp)
            held += found["low"] <= 0.3 <= found["high"]
        assert 0.91 <= held / 300 <= 0.985

    def test_what_only_a_few_mdps_show_proves_nothing(self) -> None:
        whole = torch.zeros(2000, 1)
        whole[7] = 1.0
        [found] = shares(whole * 0.5, whole, np.repeat(np.arange(100), LENGTH))
        assert (found["low"], found["high"]) == (-1.0, 1.0)


class TestTheVerdict:
    names = ("next x", "reward")

    def judged(self, check: str, *ends: tuple[float, float]) -> dict[str, str]:
        gains = [{"share": (low + high) / 2, "low": low, "high": high} for low, high in ends]
        return judge(check, gains, list(self.names))

    @pytest.mark.parametrize(
        ("check", "ends", "verdict"),
        [
            ("action_effect", (0.003, 0.006), "pass"),
            ("action_effect", (0.001, 0.003), "fail"),
            ("action_effect", (-0.004, 0.004), "fail"),
            ("action_effect", (-0.03, 0.04), "inconclusive"),
            ("markov", (-0.004, 0.004), "pass"),
            ("markov", (0.01, 0.04), "pass"),
            ("markov", (0.06, 0.2), "fail"),
            ("markov", (-0.03, 0.2), "inconclusive"),
        ],
    )
    def test_goes_by_the_ends_of_the_interval(self, check: str, ends: tuple[float, float], verdict: str) -> None:
        assert self.judged(check, ends, (-0.001, 0.001))["verdict"] == verdict

    def test_is_found_in_any_one_outcome(self) -> None:
        assert self.judged("action_effect", (0.003, 0.006), (-0.005, 0.009))["verdict"] == "pass"
        said = self.judged("markov", (0.0, 0.01), (-0.1, 0.3))
        assert said["verdict"] == "inconclusive"
        assert "'reward'" in said["reason"]

    def test_names_the_outcome_that_speaks_loudest(self) -> None:
        assert "'reward'" in self.judged("state_effect", (0.1, 0.2), (0.5, 0.9))["reason"]


class TestWhatIsKnownAndWhatFollows:
    def test_ends_and_cuts(self) -> None:
        data = process(2, 6)
        data.terminal[LENGTH - 1], data.truncated[LENGTH - 1] = True, False
        data.truncated[LENGTH + 4] = True
        made: Outcomes = outcomes(data, CONTINUOUS, data.reward({"reward": 1.0}))
        assert made.names == ["next x", "reward", "goes on"]
        assert len(made.mdp) == 2 * LENGTH - 2, "cut decisions have nothing known to follow"
        assert made.present[LENGTH - 1].tolist() == [False, True, True], "an end has no next state"
        first_of_second, after_the_cut = LENGTH, LENGTH + 4
        assert np.flatnonzero(made.before[:, -1] == 0).tolist() == [0, first_of_second, after_the_cut]
        assert made.before[1, 0] == made.state[0, 0]

    def test_an_enum_has_an_outcome_for_each_value(self) -> None:
        data = process(2, 6)
        data.state[:] = np.where(data.state < 0, -1, 1)
        x = FeatureNormalization(name="x", type="enum", values=[-1.0, 1.0], how="by hand", evidence={})
        made = outcomes(data, NormalizationSpec(inputs=["x"], features=[x]), data.reward({"reward": 1e-5}))
        assert made.names == ["next x = -1", "next x = 1", "reward"], "a small reward varies too"

    def test_what_is_missing_before_or_after_breaks_nothing(self) -> None:
        data = process(60, 7)
        data.state[::3] = np.nan
        assert "inconclusive" not in verdicts(examined(data, steps=50))["state_effect"]

    def test_a_sample_is_of_training_mdps_and_about_as_large_as_asked(self) -> None:
        ids, lengths = [f"mdp-{i}" for i in range(1000)], np.full(1000, 7)
        settings = {"actions": ["a", "b"], "understanding": {"sampleRows": 500}}
        spec = JobSpec.model_validate(settings)
        out = held_out(ids, spec)
        chosen = training_sample(spec)(ids, lengths)
        assert chosen.sum() == 72
        assert not (chosen & out).any()
        whole = JobSpec.model_validate(settings | {"understanding": {"sampleRows": 10**6}})
        assert (training_sample(whole)(ids, lengths) == ~out).all()


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The features and normalization stages of a process that no action moves."""
    root, data = tmp_path_factory.mktemp("stages"), process(800, 9, action=0.0)
    rewards = [[("reward", float(r))] for r in data.metrics[:, 0]]
    table = pa.table(
        {
            "mdp_id": [f"mdp-{m}" for m in data.mdp],
            "ordinal": data.ordinal,
            "action": [SPEC.actions[a] for a in data.action],
            "action_probability": data.propensity,
            "possible_actions": pa.nulls(len(data), pa.list_(pa.string())),
            "metrics": pa.array(rewards, pa.map_(pa.string(), pa.float64())),
            "returns": pa.array(rewards, pa.map_(pa.string(), pa.float64())),
            "time_diff": data.time_diff,
            "terminal": data.terminal,
            "truncated": data.truncated,
            "state_x": data.state[:, 0].astype(float),
        }
    )
    with stage("features", root / "features") as (directory, facts):
        (directory / "training").mkdir()
        pq.write_table(table, directory / "training" / "part.parquet")
        facts["features"] = ["x"]
    with stage("normalization", root / "normalization") as (directory, _):
        CONTINUOUS.write(directory / "spec.json")
    return root


def test_the_stage_leaves_its_findings_its_record_and_a_page(stages: Path, tmp_path: Path) -> None:
    understand(SPEC, stages / "features", stages / "normalization", tmp_path / "out")
    document = read_understanding(tmp_path / "out")
    record = read_record(tmp_path / "out")
    assert document["checks"] == record["checks"]
    assert document["steady"] == ["goes on"]
    json.dumps(document, allow_nan=False)
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("<svg") == 1
    for outside in ("<script", "<link", "<img", "src=", "@import"):
        assert outside not in page
    for said in ("action effect", "fail", "next to nothing", "Never varying, and so left out: goes on", "next x"):
        assert said in page


def test_a_required_check_that_does_not_pass_stops_the_job(stages: Path, tmp_path: Path) -> None:
    spec = SPEC.model_copy(
        update={"understanding": SPEC.understanding.model_copy(update={"require": ["action_effect"]})}
    )
    with pytest.raises(StageError, match=r"understanding\.require: action_effect: fail: .*no policy is better"):
        understand(spec, stages / "features", stages / "normalization", tmp_path / "out")
    assert not (tmp_path / "out" / RECORD).exists()
    assert read_understanding(tmp_path / "out")["checks"]["action_effect"]["verdict"] == "fail"


def test_a_gate_on_a_metric_that_was_never_logged_is_refused_before_training(stages: Path, tmp_path: Path) -> None:
    spec = JobSpec.model_validate({"actions": SPEC.actions, "evaluation": {"gate": {"metric": "sales"}}})
    with pytest.raises(StageError, match=r"evaluation\.gate\.metric: no metric 'sales' in the log; there are reward"):
        understand(spec, stages / "features", stages / "normalization", tmp_path / "out")

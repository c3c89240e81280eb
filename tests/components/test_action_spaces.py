"""From training data to an exported graph where actions are described, slates, or numbers: learned, judged, served."""

import dataclasses
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file

from components.columns import load_transitions, write_columns
from components.evaluation.acted import Plan, plan, taken_probability
from components.evaluation.evaluate import evaluate
from components.evaluation.slates import fit_choices, plan_slates, slate_probability
from components.export.onnx_policy import served
from components.export.policy import export_policy
from components.export.repository import MODEL, read_policies
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions, find_actions
from components.training.algorithms.build import build_network
from components.training.bundle import Bundle, read_bundle
from components.training.fits import check_fits
from components.training.store import build_store
from components.training.warm_start import start_from
from components.transitions import Lists, Transitions
from components.understanding.understand import understand
from contracts.job import Algorithm, JobSpec, PolicyHead
from contracts.stage import StageError, read_record, stage

ROOT = Path(__file__).parents[2]
STEPS, MDPS = 3, 900
N = STEPS * MDPS
COMMON: dict[str, Any] = {
    "seed": 1,
    "reward": {"metricWeights": {"earned": 1.0}, "discount": 0.9},
    "evaluation": {
        "bootstrapSamples": 200,
        "fittedQSteps": 800,
        "gate": {"metric": "earned", "estimator": "sequential_direct_method"},
    },
    "understanding": {"modelSteps": 200},
}
NUMBERS: dict[str, Any] = COMMON | {
    "actionSpace": "continuous",
    "algorithm": {"td3Bc": {"hiddenLayers": [64, 64], "learningRate": 0.003, "alpha": 30.0}},
    "training": {"batchSize": 128, "epochs": 2, "stepsPerEpoch": 700},
    "actionBounds": {"price": {"low": 0.0, "high": 4.0}},
}
LISTS: dict[str, Any] = COMMON | {
    "actionSpace": "parametric",
    "algorithm": {"dqn": {"hiddenLayers": [64, 64], "learningRate": 0.003, "targetUpdateRate": 0.02}},
    "training": {"batchSize": 128, "epochs": 2, "stepsPerEpoch": 500},
    "export": {"policy": "greedy"},
}
SLATES: dict[str, Any] = LISTS | {
    "actionSpace": "slate",
    "slate": {"size": 2},
    "algorithm": {"slateQ": {"hiddenLayers": [64, 64], "learningRate": 0.003, "targetUpdateRate": 0.02}},
    "training": {"batchSize": 128, "epochs": 2, "stepsPerEpoch": 700},
}


def features_stage(
    root: Path,
    states: dict[str, np.ndarray],
    columns: dict[str, Any],
    actions: list[str],
    more: dict[str, np.ndarray] | None = None,
) -> None:
    """What the features stage leaves: three decisions for each MDP, and normalization specs of standard features."""
    earned = columns.pop("earned")
    returns = np.zeros(N)
    for row in reversed(range(N)):
        returns[row] = earned[row] + (0.9 * returns[row + 1] if row % STEPS < STEPS - 1 else 0)
    named = {"earned": earned} | (more or {})
    metrics = [list(zip(named, each, strict=True)) for each in np.stack(list(named.values()), 1).tolist()]
    table = pa.table(
        {
            "mdp_id": [f"mdp-{row // STEPS:04}" for row in range(N)],
            "ordinal": [row % STEPS + 1 for row in range(N)],
            "metrics": pa.array(metrics, pa.map_(pa.string(), pa.float64())),
            "returns": pa.array([[("earned", x)] for x in returns.tolist()], pa.map_(pa.string(), pa.float64())),
            "time_diff": np.ones(N, np.int64),
            "terminal": [row % STEPS == STEPS - 1 for row in range(N)],
            "truncated": np.zeros(N, bool),
            **{f"state_{name}": values for name, values in states.items()},
            **columns,
        }
    )
    with stage("features", root / "features") as (directory, facts):
        (directory / "training").mkdir()
        pq.write_table(table, directory / "training" / "part.parquet")
        facts |= {"features": sorted(states), "action_features": actions}
    with stage("normalization", root / "normalization") as (directory, _):
        for file, names in {"spec.json": sorted(states), "action_spec.json": actions}.items():
            found = [FeatureNormalization(name=n, type="continuous", how="by hand", evidence={}) for n in names]
            NormalizationSpec(inputs=names, features=found).write(directory / file)


def run(root: Path, job: dict[str, Any]) -> JobSpec:
    """Every stage from understanding to export."""
    spec = JobSpec.model_validate(job)
    understand(spec, root / "features", root / "normalization", root / "understanding")
    write_columns(root / "features", spec, root / "columns")
    with stage("training", root / "training") as (directory, _):
        train(root, spec, directory)
    evaluate(spec, root / "features", root / "training", root / "evaluation")
    export_policy(spec, root / "features", root / "training", root / "export")
    return spec


def start(root: Path, spec: JobSpec, directory: Path, workers: int = 1) -> list[subprocess.Popen[bytes]]:
    directory.mkdir(exist_ok=True)
    (directory / "job.json").write_text(spec.model_dump_json(by_alias=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if workers > 1 else 0
        address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers)}
    command = [
        sys.executable, "-m", "components.training.worker", "--job", directory / "job.json",
        "--columns", root / "columns", "--normalization", root / "normalization", "--output", directory,
    ]  # fmt: skip
    return [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | address | {"RANK": str(i), "LOCAL_RANK": str(i)})
        for i in range(workers)
    ]


def train(root: Path, spec: JobSpec, directory: Path) -> None:
    [worker] = start(root, spec, directory)
    assert worker.wait() == 0


def session(root: Path) -> onnxruntime.InferenceSession:
    ((version, _),) = read_policies(root / "export" / "model_repository").items()
    return onnxruntime.InferenceSession(root / "export" / "model_repository" / MODEL / str(version) / "model.onnx")


@pytest.fixture(scope="module")
def prices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A price is best at 2 + demand; nothing that is done changes the demand to come."""
    root, rng = tmp_path_factory.mktemp("prices"), np.random.default_rng(0)
    demand, price = rng.uniform(-1, 1, N), rng.uniform(0, 4, N)
    columns = {
        "action_feature_price": price,
        "action": pa.array([[("price", p)] for p in price.tolist()], pa.map_(pa.string(), pa.float64())),
        "possible_actions": pa.nulls(N, pa.list_(pa.map_(pa.string(), pa.float64()))),
        "action_probability": pa.nulls(N, pa.float64()),
        "earned": 3 - (price - 2 - demand) ** 2,
    }
    features_stage(root, {"demand": demand}, columns, ["price"])
    run(root, NUMBERS)
    return root


def test_a_price_is_learned_and_served_in_its_own_units(prices: Path) -> None:
    demand = np.linspace(-0.9, 0.9, 10, dtype=np.float32)[:, None]
    (price,) = session(prices).run(["action"], {"state": demand})
    np.testing.assert_allclose(price, 2 + demand, atol=0.3)
    assert (prices / "export" / "model_repository" / MODEL / "config.pbtxt").read_text().count("TYPE_FP32") == 2


def test_a_policy_over_numbers_is_judged_by_models_alone(prices: Path) -> None:
    report = json.loads((prices / "evaluation" / "report.json").read_text())["final"]
    found = report["sequential_direct_method"]["earned"]
    # Of three decisions that earn 3 each, discounted; the logged prices earn 1.33 each.
    best = 3 * (1 + 0.9 + 0.81)
    assert found["value"] == pytest.approx(best, rel=0.06)
    assert found["relative_low"] > 1.5
    assert "no propensities" in report["weighted_sequential_doubly_robust"]["refused"]
    checks = json.loads((prices / "understanding" / "understanding.json").read_text())["checks"]
    assert checks["action_effect"]["verdict"] == "pass"


def test_bounds_are_those_of_the_job_or_of_the_log(prices: Path) -> None:
    spec = JobSpec.model_validate(NUMBERS)
    data = load_transitions(prices / "features", spec)
    assert find_actions(data, spec, prices / "normalization", print) == Actions(["price"], bounds=[(0.0, 4.0)])
    free = JobSpec.model_validate(NUMBERS | {"actionBounds": {}})
    ((low, high),) = find_actions(data, free, prices / "normalization", print).bounds or []
    assert (low, high) == pytest.approx((0, 4), abs=0.02)
    other = JobSpec.model_validate(NUMBERS | {"actionBounds": {"cost": {"low": 0.0, "high": 1.0}}})
    with pytest.raises(StageError, match=r"actionBounds\.cost: the log's actions have price"):
        find_actions(data, other, prices / "normalization", print)


def test_numbers_outside_of_the_bounds_are_not_learned_from(prices: Path) -> None:
    spec = JobSpec.model_validate(NUMBERS | {"actionBounds": {"price": {"low": 1.0, "high": 3.0}}})
    data = load_transitions(prices / "features", spec)
    warned: list[str] = []
    actions = find_actions(data, spec, prices / "normalization", warned.append)
    network = build_network(spec.algorithm, NormalizationSpec.read(prices / "normalization" / "spec.json"), actions)
    ones = np.ones(N, np.float32)
    store = build_store(data, network, ones, ones)
    inside = (data.action[:, 0] >= 1) & (data.action[:, 0] <= 3)
    assert store.usable.tolist() == np.flatnonzero(inside).tolist()
    assert 0.4 < inside.mean() < 0.6
    assert warned == [f"actionBounds.price: {N - inside.sum():,} logged values lie outside, and are not learned from"]


@pytest.fixture(scope="module")
def shelf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of two to six items one is shown; it earns as far as its topic meets the taste, and more where it is good."""
    root, rng = tmp_path_factory.mktemp("shelf"), np.random.default_rng(1)
    taste = rng.uniform(-1, 1, N)
    offered = [rng.uniform(-1, 1, (int(size), 2)).round(1) for size in rng.integers(2, 7, N)]
    shown = np.array([rng.integers(len(items)) for items in offered])
    chosen = np.stack([items[i] for items, i in zip(offered, shown, strict=True)])
    as_map = pa.map_(pa.string(), pa.float64())
    columns = {
        "action_feature_topic": chosen[:, 0],
        "action_feature_quality": chosen[:, 1],
        "action": pa.array([[("topic", t), ("quality", q)] for t, q in chosen.tolist()], as_map),
        "possible_actions": pa.array(
            [[[("topic", t), ("quality", q)] for t, q in items.tolist()] for items in offered], pa.list_(as_map)
        ),
        "action_probability": np.array([1 / len(items) for items in offered]),
        "earned": earned(taste, chosen),
    }
    features_stage(root, {"taste": taste}, columns, ["quality", "topic"])
    run(root, LISTS)
    return root


def earned(taste: np.ndarray, item: np.ndarray) -> np.ndarray:
    return 2 + item[..., 1] - np.abs(item[..., 0] - taste)


def test_lists_are_read_as_they_were_logged_each_item_held_once(shelf: Path) -> None:
    data = load_transitions(shelf / "features", JobSpec.model_validate(LISTS))
    lists = data.possible
    assert isinstance(lists, Lists)
    assert lists.names == ["quality", "topic"]
    assert len(np.unique(lists.described, axis=0)) == len(lists.described) <= 21 * 21
    table = pq.read_table(shelf / "features" / "training").to_pylist()
    for row in (0, 17, N - 1):
        mine = lists.select(np.array([row]))
        listed = [dict(zip(lists.names, v, strict=True)) for v in mine.described[mine.items].astype(float).round(3)]
        assert listed == [{k: pytest.approx(v) for k, v in item} for item in table[row]["possible_actions"]]
        assert listed[data.action[row]] == {k: pytest.approx(v) for k, v in table[row]["action"]}


def test_the_best_of_a_list_is_shown(shelf: Path) -> None:
    graph, rng, gained = session(shelf), np.random.default_rng(5), []
    for _ in range(200):
        taste, items = rng.uniform(-1, 1), rng.uniform(-1, 1, (rng.integers(2, 9), 2))
        given = {
            "state": np.array([[taste]], np.float32),
            "action": items[:, ::-1].astype(np.float32),  # quality comes first
            "uniform": np.array([[rng.random()]], np.float32),
        }
        found = dict(zip((o.name for o in graph.get_outputs()), graph.run(None, given), strict=True))
        assert found["propensities"].shape == found["q_values"].shape == (len(items),)
        assert found["propensities"].sum() == pytest.approx(1)
        assert found["sampled_action"] == found["greedy_action"] == found["q_values"].argmax()
        values = earned(np.array(taste), items)
        gained.append(values[int(found["greedy_action"][0])] - values.max())
    assert np.mean(gained) > -0.1


def test_every_estimator_judges_a_policy_over_lists(shelf: Path) -> None:
    spec = JobSpec.model_validate(LISTS)
    report = json.loads((shelf / "evaluation" / "report.json").read_text())
    _, held_out = load_transitions(shelf / "features", spec).split(spec)
    lists = held_out.possible
    assert isinstance(lists, Lists)
    row = np.repeat(np.arange(len(held_out)), np.diff(lists.offsets))
    values = earned(held_out.state[row, 0], lists.described[lists.items][:, ::-1])
    most = np.maximum.reduceat(values, lists.offsets[:-1]).mean()
    for estimator in ("stepwise_importance_sampling", "stepwise_direct_method", "stepwise_doubly_robust"):
        found = report["final"][estimator]["earned"]
        assert found["value"] == pytest.approx(most, rel=0.1), estimator
    for estimator in ("sequential_direct_method", "weighted_sequential_doubly_robust"):
        assert report["final"][estimator]["earned"]["value"] == pytest.approx(2.71 * most, rel=0.12), estimator
    assert 1 < report["diagnostics"]["largest_weight"] <= 6


@pytest.mark.parametrize("algorithm", ["dqn", "bcq"])
def test_a_policy_over_lists_is_judged_alike_however_many_are_scored_at_a_time(
    shelf: Path, monkeypatch: pytest.MonkeyPatch, algorithm: str
) -> None:
    spec, items = JobSpec.model_validate(LISTS), NormalizationSpec.read(shelf / "normalization" / "action_spec.json")
    states = NormalizationSpec.read(shelf / "normalization" / "spec.json")
    made, actions = Algorithm.model_validate({algorithm: {}}), Actions([], described=items)
    torch.manual_seed(0)
    network = build_network(made, states, actions).eval()
    bundle = Bundle(network, states, actions, made, PolicyHead(), {}, "")
    data = load_transitions(shelf / "features", spec)
    whole = plan(bundle, data)
    monkeypatch.setattr("components.evaluation.acted.PAIRS", 5)  # Some lists are longer.
    torch.testing.assert_close(plan(bundle, data).probability, whole.probability)
    lists = data.possible
    assert isinstance(lists, Lists)
    np.testing.assert_allclose(np.add.reduceat(whole.probability.numpy(), lists.offsets[:-1]), 1, atol=1e-5)


def test_the_best_next_action_is_not_known_without_lists(shelf: Path) -> None:
    spec = JobSpec.model_validate(LISTS)
    data = load_transitions(shelf / "features", spec)
    lists = data.possible
    assert isinstance(lists, Lists)
    alone = Lists(lists.names, lists.described, np.arange(N + 1), lists.taken(data.action), np.zeros(N, bool))
    without = dataclasses.replace(data, possible=alone, action=np.zeros(N, np.int64))
    with pytest.raises(StageError, match=r"no possible_actions .* algorithm\.dqn\.nextAction: logged"):
        check_fits(without, spec, np.zeros(N))
    by_logged = JobSpec.model_validate(LISTS | {"algorithm": {"dqn": {"nextAction": "logged"}}})
    assert check_fits(without, by_logged, np.zeros(N)) == []
    for kind in ("cql", "bcq"):
        also = JobSpec.model_validate(LISTS | {"algorithm": {kind: {"nextAction": "logged"}}})
        with pytest.raises(StageError, match=r"nothing of the log's choice; log them$"):
            check_fits(without, also, np.zeros(N))
    some = dataclasses.replace(data, possible=dataclasses.replace(lists, logged=np.arange(N) > 0))
    [warning] = check_fits(some, spec, np.zeros(N))
    assert warning.startswith(f"possible_actions: 1 of {N:,} decisions have none")


def without_lists(shelf: Path, to: Path, rows: np.ndarray) -> dict[str, Any]:
    """What evaluation reports where the log does not tell what could be chosen at these rows, nor how likely."""
    table = pq.read_table(shelf / "features" / "training")
    for name in ("possible_actions", "action_probability"):
        at = table.schema.get_field_index(name)
        kept = [None if out else each for out, each in zip(rows, table[name].to_pylist(), strict=True)]
        table = table.set_column(at, name, pa.array(kept, table.schema.field(name).type))
    with stage("features", to / "features") as (directory, facts):
        (directory / "training").mkdir()
        pq.write_table(table, directory / "training" / "part.parquet")
        facts |= {"features": ["taste"], "action_features": ["quality", "topic"]}
    evaluate(JobSpec.model_validate(LISTS), to / "features", shelf / "training", to / "evaluation", last_only=True)
    return dict(json.loads((to / "evaluation" / "report.json").read_text()))


@pytest.mark.parametrize("without", [np.arange(N) % STEPS == 1, np.ones(N, bool)], ids=["some", "all"])
def test_a_policy_over_lists_is_not_judged_where_decisions_before_an_end_have_none(
    shelf: Path, tmp_path: Path, without: np.ndarray
) -> None:
    report = without_lists(shelf, tmp_path, without)
    assert {tuple(found) for found in report["final"].values()} == {("refused",)}
    assert "have no possible_actions to choose among, and are not the last of several" in report["gate"]["reason"]


def test_at_an_end_without_a_list_a_policy_is_taken_to_do_what_was_logged(shelf: Path, tmp_path: Path) -> None:
    whole = json.loads((shelf / "evaluation" / "report.json").read_text())
    report = without_lists(shelf, tmp_path, np.arange(N) % STEPS == STEPS - 1)
    diagnostics = report["diagnostics"]
    assert diagnostics["as_logged_decisions"] == diagnostics["held_out_decisions"] / STEPS
    for estimator in ("stepwise_importance_sampling", "stepwise_direct_method", "stepwise_doubly_robust"):
        before, now = (document["final"][estimator]["earned"]["value"] for document in (whole, report))
        assert now == pytest.approx(before, rel=0.05), estimator
    most = whole["final"]["stepwise_direct_method"]["earned"]["value"]
    expected = 1.9 * most + 0.81 * whole["logged"]["per_step"]["earned"]
    assert 1.1 * expected < 2.71 * most, "so that one is not taken for the other"
    for estimator in ("sequential_direct_method", "weighted_sequential_doubly_robust"):
        assert report["final"][estimator]["earned"]["value"] == pytest.approx(expected, rel=0.1), estimator


def test_items_that_are_described_alike_share_their_probability() -> None:
    lists = Lists(["x"], np.array([[0.0], [1.0]], np.float32), np.array([0, 3]), np.array([1, 1, 0]), np.ones(1, bool))
    chosen = Plan(torch.zeros(2, 1), torch.tensor([1, 1, 0]), lists.offsets, torch.tensor([0.5, 0.3, 0.2]))
    nothing = np.zeros((1, 0), np.float32)
    data = Transitions(
        [], [], [], state=nothing, action=np.array([1]), propensity=np.ones(1), possible=lists, metrics=nothing,
        time_diff=np.ones(1), terminal=np.ones(1, bool), truncated=np.zeros(1, bool),
        ordinal=np.ones(1, np.int64), mdp=np.zeros(1, np.int64), mdp_ids=["a"],
    )  # fmt: skip
    assert taken_probability(chosen, data).tolist() == pytest.approx([0.8])


@pytest.fixture(scope="module")
def row_of_two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of three to five items two are shown; which is chosen, if any, depends on the taste, what it earns on quality."""
    root, rng = tmp_path_factory.mktemp("slates"), np.random.default_rng(2)
    taste = rng.uniform(-1, 1, N)
    offered = [rng.uniform(-1, 1, (int(size), 2)).round(1) for size in rng.integers(3, 6, N)]
    places = [rng.choice(len(items), 2, replace=False) for items in offered]
    shown = np.stack([items[at] for items, at in zip(offered, places, strict=True)])
    share = chances(taste, shown)
    choice = (rng.random((N, 1)) > share.cumsum(1)).sum(1)
    gained = np.append(2 + shown[:, :, 1], np.zeros((N, 1)), 1)[np.arange(N), choice]
    as_map = pa.map_(pa.string(), pa.float64())

    def as_items(items: np.ndarray) -> list[list[tuple[str, float]]]:
        return [[("topic", t), ("quality", q)] for t, q in items.tolist()]

    drawn = np.stack([items[0] for items in offered])
    columns = {
        "action_feature_topic": drawn[:, 0],
        "action_feature_quality": drawn[:, 1],
        "action": pa.array([as_items(items) for items in shown], pa.list_(as_map)),
        "possible_actions": pa.array([as_items(items) for items in offered], pa.list_(as_map)),
        "action_probability": np.array([1 / len(items) / (len(items) - 1) for items in offered]),
        "earned": gained,
    }
    features_stage(root, {"taste": taste}, columns, ["quality", "topic"], {"choice": (choice + 1.0) % 3})
    run(root, SLATES)
    return root


def chances(taste: np.ndarray, shown: np.ndarray) -> np.ndarray:
    """Of items [..., k, 2] and of nothing: [..., k + 1]."""
    mass = np.exp(1 - 3 * np.abs(shown[..., 0] - taste[..., None]))
    mass = np.append(mass, np.ones((*mass.shape[:-1], 1)), -1)
    return mass / mass.sum(-1, keepdims=True)


def slate_worth(taste: np.ndarray, shown: np.ndarray) -> np.ndarray:
    return (chances(taste, shown)[..., :-1] * (2 + shown[..., 1])).sum(-1)


def test_the_slate_that_is_worth_most_is_shown(row_of_two: Path) -> None:
    graph, rng, reached = session(row_of_two), np.random.default_rng(5), []
    for _ in range(200):
        taste, items = rng.uniform(-1, 1), rng.uniform(-1, 1, (rng.integers(2, 8), 2))
        given = {
            "state": np.array([[taste]], np.float32),
            "action": items[:, ::-1].astype(np.float32),  # quality comes first
            "uniform": rng.random(3, np.float32),
        }
        found = dict(zip((o.name for o in graph.get_outputs()), graph.run(None, given), strict=True))
        assert found["gains"].shape == found["q_values"].shape == (len(items),)
        assert found["propensity"].tolist() == [1]
        assert found["sampled_action"].tolist() == found["greedy_action"].tolist()
        every = [slate_worth(np.array(taste), items[list(at)]) for at in itertools.combinations(range(len(items)), 2)]
        reached.append(slate_worth(np.array(taste), items[found["greedy_action"]]) / max(every))
    assert np.mean(reached) > 0.96


def test_every_estimator_judges_a_policy_over_slates(row_of_two: Path) -> None:
    spec = JobSpec.model_validate(SLATES)
    report = json.loads((row_of_two / "evaluation" / "report.json").read_text())
    _, held_out = load_transitions(row_of_two / "features", spec).split(spec)
    lists, graph, worths = held_out.possible, session(row_of_two), []
    assert isinstance(lists, Lists)
    for i, state in enumerate(held_out.state):
        items = lists.described[lists.items[lists.offsets[i] : lists.offsets[i + 1]]]
        given = {"state": state[None], "action": items, "uniform": np.zeros(3, np.float32)}
        (greedy,) = graph.run(["greedy_action"], given)
        worths.append(slate_worth(state[0], items[greedy][:, ::-1]))
    truth = np.mean(worths)
    assert truth > 1.2 * report["logged"]["per_step"]["earned"]
    assert report["final"]["stepwise_direct_method"]["earned"]["value"] == pytest.approx(truth, rel=0.08)
    for estimator in ("stepwise_importance_sampling", "stepwise_doubly_robust"):
        found = report["final"][estimator]["earned"]
        assert found["low"] < truth < found["high"], estimator
    assert report["final"]["sequential_direct_method"]["earned"]["value"] == pytest.approx(2.71 * truth, rel=0.1)
    # Of three random slates in a row hardly any are the policy's own.
    assert report["diagnostics"]["effective_sample_size_mdps"] < 5
    assert "choice" not in report["final"]["stepwise_direct_method"]
    assert 6 <= report["diagnostics"]["largest_weight"] <= 20


@pytest.mark.parametrize("head", [{"policy": "softmax", "temperature": 0.5}, {"policy": "epsilonGreedy"}])
def test_a_policy_that_draws_slates_has_the_probability_that_its_graph_tells(
    row_of_two: Path, head: dict[str, Any]
) -> None:
    spec = JobSpec.model_validate(SLATES)
    made = read_bundle(row_of_two / "training" / "policy")
    bundle = dataclasses.replace(made, head=PolicyHead.model_validate(head))
    data = load_transitions(row_of_two / "features", spec)
    graph = served(bundle.network, bundle.head, "slate")
    lists, rng = data.possible, np.random.default_rng(3)
    assert isinstance(lists, Lists)
    different = [len(set(lists.items[lists.offsets[row] : lists.offsets[row + 1]])) for row in range(len(data))]
    # Those with items that are described alike are among them.
    rows = np.concatenate([np.arange(60), np.flatnonzero(different < np.diff(lists.offsets))])
    assert len(rows) > 70
    rows.sort()
    slates, told = [], []
    for row in rows:
        items = torch.from_numpy(lists.described[lists.items[lists.offsets[row] : lists.offsets[row + 1]]])
        uniform = torch.from_numpy(rng.random(3, np.float32))
        with torch.no_grad():
            *_, propensity, slate = graph(torch.from_numpy(data.state[row : row + 1]), items, uniform)
        slates.append(slate.numpy())
        told.append(propensity.item())
    shown = dataclasses.replace(data.select(rows), action=np.stack(slates))
    np.testing.assert_allclose(slate_probability(bundle, shown), told, rtol=1e-4)
    planned = plan_slates(bundle, shown, fit_choices(bundle, shown, 5, 0))
    np.testing.assert_allclose(planned.probability.view(len(rows), -1).sum(1), 1, rtol=1e-5)


def test_two_workers_learn_what_one_does(shelf: Path, tmp_path: Path) -> None:
    spec = JobSpec.model_validate(LISTS | {"training": {"batchSize": 128, "epochs": 1, "stepsPerEpoch": 30}})
    # Side by side: most of what they take is to begin.
    processes = [process for n in (1, 2) for process in start(shelf, spec, tmp_path / str(n), n)]
    assert [process.wait() for process in processes] == [0] * 3
    one, two = (load_file(tmp_path / each / "policy" / "weights.safetensors") for each in ("1", "2"))
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-5)


def test_slates_are_learned_on_from_the_day_before(row_of_two: Path) -> None:
    spec, before = JobSpec.model_validate(SLATES), row_of_two / "training" / "policy"
    normalization = NormalizationSpec.read(row_of_two / "normalization" / "spec.json")
    actions = find_actions(load_transitions(row_of_two / "features", spec), spec, row_of_two / "normalization", print)
    network = build_network(spec.algorithm, normalization, actions)
    optimizer = torch.optim.Adam(network.parameters())
    assert start_from(str(before), network, optimizer, normalization, actions, spec.algorithm, {})
    theirs = load_file(before / "weights.safetensors")
    assert all(torch.equal(weights, theirs[name]) for name, weights in network.named_parameters())


def test_a_log_that_tells_of_no_choice_is_refused(row_of_two: Path) -> None:
    spec = JobSpec.model_validate(SLATES | {"slate": {"size": 2, "choice": "clicked"}})
    data = load_transitions(row_of_two / "features", spec)
    with pytest.raises(StageError, match=r"slate\.choice: the metric clicked tells of no decision"):
        check_fits(data, spec, np.zeros(N))


def test_the_records_say_what_was_exported(prices: Path, shelf: Path, row_of_two: Path) -> None:
    continuous, described, slates = (read_record(root / "export") for root in (prices, shelf, row_of_two))
    assert (slates["action_space"], slates["slate"]) == ("slate", 2)
    assert (continuous["action_space"], continuous["actions"]) == ("continuous", ["price"])
    assert continuous["bounds"] == [[0.0, 4.0]]
    assert (described["action_space"], described["actions"]) == ("parametric", [])
    assert described["action_features"] == ["quality", "topic"]

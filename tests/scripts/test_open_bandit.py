"""The example on real data: what is fetched becomes a log and a feature repository that the stages take."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from components.features.point_in_time import join_features
from components.timeline.build import build_timeline
from contracts.job import JobSpec, load_job
from contracts.stage import RECORD
from scripts import open_bandit

ROOT = Path(__file__).parent.parent.parent
JOB = ROOT / "manifests" / "examples" / "open-bandit.yaml"


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A working directory of its own, with the data prepared in it."""
    before, root = Path.cwd(), tmp_path_factory.mktemp("open-bandit")
    os.chdir(root)
    open_bandit.prepare()
    yield root
    os.chdir(before)


def job() -> JobSpec:
    return load_job(JOB).spec


def test_the_log_is_that_of_a_policy_that_chose_at_random(directory: Path) -> None:
    log = pq.read_table(directory / "data" / "open-bandit" / "decisions.parquet").to_pylist()
    assert len(log) == 10_000
    assert {row["action"] for row in log} == set(job().actions)
    assert [row["action_probability"] for row in log] == pytest.approx([1 / 34] * 10_000)
    assert sum(dict(row["metrics"])["click"] for row in log) == 46


def test_user_and_item_features_join_every_decision(directory: Path) -> None:
    spec = job().model_copy(update={"data": job().data.placed(directory)})
    build_timeline(spec, str(spec.data.decision_log), None, directory / "timeline")
    join_features(spec, directory / "timeline", directory / "features")
    record = json.loads((directory / "features" / RECORD).read_text())
    assert record["rows"] == 10_000
    assert {"position", "user_0", "user_3", "affinity", "affinity_33"} <= set(record["features"])
    assert record["action_features"] == ["item_0", "item_1", "item_2", "item_3"]
    assert set(record["missing_fraction"].values()) == {0.0}
    training = pq.read_table(directory / "features" / "training").to_pandas()
    assert (training.groupby("action")["action_feature_item_0"].nunique() == 1).all(), "an item's own"
    assert training["action_feature_item_0"].nunique() > 20


def test_the_estimate_of_the_other_policy_holds_what_it_got(directory: Path) -> None:
    estimate, low, high = open_bandit.estimate_bts()
    got, *_ = open_bandit.clicks("bts")
    assert got == pytest.approx(69 / 10_000)
    assert low < got < high
    assert np.isclose(estimate, 0.0057, atol=2e-4)


def test_estimates_are_set_beside_what_both_policies_really_got(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluation = directory / "runs" / "open-bandit" / "evaluation"
    evaluation.mkdir(parents=True)
    names = ("stepwise_importance_sampling", "stepwise_direct_method", "stepwise_doubly_robust")
    final = {name: {"click": {"value": 0.006 + i, "low": 0.001 + i, "high": 0.015 + i}} for i, name in enumerate(names)}
    (evaluation / "report.json").write_text(json.dumps({"final": final}))
    open_bandit.compare(directory / "runs")
    rows = json.loads((directory / "runs" / "open-bandit" / "comparison.json").read_text())
    for policy, clicks in (("random", 46), ("bts", 69)):
        value, low, high = rows[f"{policy}, as it was"]
        assert value == pytest.approx(clicks / 10_000)
        assert low < value < high
    assert rows["bts, estimated from random's log"] == open_bandit.estimate_bts()
    for i, name in enumerate(("importance sampling", "direct method", "doubly robust")):
        assert rows[f"the new policy, {name}"] == [0.006 + i, 0.001 + i, 0.015 + i]
    printed = capsys.readouterr().out
    assert "6.90" in printed
    assert "1.00 to 15.00" in printed

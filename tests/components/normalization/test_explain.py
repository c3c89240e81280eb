"""Why a feature has its type: what is told of it."""

from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from components.normalization.explain import BINS, explain
from components.normalization.identify import identify
from components.normalization.spec import NormalizationSpec
from contracts.job import Normalization
from contracts.stage import StageError, stage


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root, generator = tmp_path_factory.mktemp("stages"), np.random.default_rng(0)
    columns = {
        "speed": np.where(generator.random(5000) < 0.5, np.nan, generator.normal(3, 2, 5000)),
        "rank": generator.integers(-2, 3, 5000).astype(float),
    }
    with stage("features", root / "features") as (directory, facts):
        (directory / "training").mkdir()
        table = pa.table({f"state_{n}": pa.array(v, pa.float64(), from_pandas=True) for n, v in columns.items()})
        pq.write_table(table, directory / "training" / "part.parquet")
        facts["features"] = list(columns)
    with stage("normalization", root / "normalization") as (directory, _):
        found = [identify(n, v[~np.isnan(v)], {}, Normalization()) for n, v in columns.items()]
        spec = NormalizationSpec(inputs=[*columns, "stale"], features=found, dropped={"stale": "constant at 4"})
        spec.write(directory / "spec.json")
    return root


def test_a_feature_is_told_with_its_evidence_and_its_values_before_and_after(stages: Path) -> None:
    found = explain(stages / "features", stages / "normalization", "speed")
    assert (found["name"], found["type"]) == ("speed", "continuous")
    assert "K^2" in found["how"]
    assert found["evidence"]["box_cox_lambda"] == pytest.approx(1.0, abs=0.15)
    assert sum(found["before"]["counts"]) == sum(found["after"]["counts"]) > 2000, "of the rows that have it"
    assert len(found["before"]["edges"]) == BINS + 1
    centre = np.average(found["after"]["edges"][:-1], weights=found["after"]["counts"])
    assert abs(centre) < 0.3


def test_values_beyond_a_network_s_floats_are_drawn_at_the_ends(stages: Path, tmp_path: Path) -> None:
    table = pa.table({"state_speed": [1.0, 2.0, 1e39, -1e39], "state_rank": [0.0, 1.0, 0.0, 1.0]})
    with stage("features", tmp_path / "features") as (directory, _):
        (directory / "training").mkdir()
        pq.write_table(table, directory / "training" / "part.parquet")
    found = explain(tmp_path / "features", stages / "normalization", "speed")
    assert (sum(found["before"]["counts"]), found["before"]["edges"][-1]) == (4, pytest.approx(3e38))


def test_an_enum_is_told_by_its_values_negative_ones_too(stages: Path) -> None:
    found = explain(stages / "features", stages / "normalization", "rank")
    assert found["type"] == "enum"
    assert found["after"]["values"] == [-2, -1, 0, 1, 2]
    assert sum(found["after"]["counts"]) == 5000


def test_a_dropped_feature_has_its_reason(stages: Path) -> None:
    found = explain(stages / "features", stages / "normalization", "stale")
    assert found == {"name": "stale", "dropped": "constant at 4"}


def test_an_unknown_feature_is_refused_with_those_there_are(stages: Path) -> None:
    with pytest.raises(StageError, match="no feature 'size'; there are speed, rank, stale"):
        explain(stages / "features", stages / "normalization", "size")


def test_it_needs_a_finished_stage(stages: Path, tmp_path: Path) -> None:
    with pytest.raises(StageError, match="no finished stage here"):
        explain(stages / "features", tmp_path, "speed")

"""What the components' tests share."""

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyspark.sql import SparkSession

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.spark import spark_session
from contracts.stage import stage


@pytest.fixture(scope="module")
def spark() -> Iterator[SparkSession]:
    """One session for all stages of a file, as what Spark has compiled for one it has for the next."""
    with spark_session("test") as session:
        yield session


@pytest.fixture(scope="session")
def write_stages() -> Callable[..., None]:
    """Leaves what the features and normalization stages leave of MDPs of `steps` decisions each, by one feature x."""

    def write(root: Path, steps: int, action: list[str], reward: np.ndarray, x: np.ndarray) -> None:
        row = np.arange(len(x))
        metrics = pa.array([[("reward", float(value))] for value in reward], pa.map_(pa.string(), pa.float64()))
        table = pa.table(
            {
                "mdp_id": [f"mdp-{mdp:04}" for mdp in row // steps], "ordinal": row % steps + 1, "action": action,
                "action_probability": np.full(len(x), 0.5), "possible_actions": pa.nulls(len(x), pa.list_(pa.string())),
                "metrics": metrics, "returns": metrics,
                "time_diff": pa.array(np.ones(len(x), np.int64), mask=row % steps == steps - 1),
                "terminal": row % steps == steps - 1, "truncated": np.zeros(len(x), bool), "state_x": x,
            }
        )  # fmt: skip
        with stage("features", root / "features") as (directory, facts):
            (directory / "training").mkdir()
            pq.write_table(table, directory / "training" / "part.parquet")
            facts["features"] = ["x"]
        with stage("normalization", root / "normalization") as (directory, _):
            scale = {"mean": float(x.mean()), "stddev": float(x.std())}
            column = FeatureNormalization(name="x", type="continuous", **scale, how="by hand", evidence={})
            NormalizationSpec(inputs=["x"], features=[column]).write(directory / "spec.json")

    return write

"""The Open Bandit Dataset's small sample as a decision log and a Feast repository, and what its policies really got.

    python scripts/open_bandit.py prepare     # download, write data/open-bandit/
    bluewhale run manifests/examples/open-bandit.yaml
    python scripts/open_bandit.py compare     # estimates from the random log beside the other policy's own log

The data are real impressions of a fashion shop with the true propensities of the two policies that chose the items
(Saito et al. 2021, arXiv 2008.07146); the package `obp` carries 10,000 impressions of each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from components.evaluation import estimators as cpe
from contracts.decision_log import SCHEMA

PACKAGE = "obp==0.5.7"
CAMPAIGN = "men"
JOB = Path("manifests/examples/open-bandit.yaml")
DATA = Path("data/open-bandit")
REPOSITORY = DATA / "features"
CATEGORIES = 4
RESAMPLES = 2000


def read(policy: str, file: str = CAMPAIGN) -> pa.Table:
    """A table of the sample: `random` or `bts`, the impressions or their `item_context`."""
    package = DATA / "package"
    if not package.exists():
        # It asks for an older Python than ours and for libraries of its own; only its files are wanted.
        options = ["-qq", "--no-deps", "--ignore-requires-python", "--target", str(package)]
        subprocess.run([sys.executable, "-m", "pip", "install", *options, PACKAGE], check=True)
    return csv.read_csv(package / "obp" / "dataset" / "obd" / policy / CAMPAIGN / f"{file}.csv")


def codes(column: pa.ChunkedArray) -> pa.Array:
    """Numbers in place of categories' hashes, the same ones whenever they are made."""
    return pc.index_in(column, pa.array(sorted(pc.unique(column).to_pylist()))).cast(pa.float64())


def prepare() -> None:
    """Write the log of the policy `random`, and a Feast repository with its users' and the items' features."""
    log, items = read("random"), read("random", "item_context")
    n = len(log)
    mdp = pa.array([f"impression-{i:05}" for i in range(n)])
    time = log["timestamp"].cast(pa.timestamp("us", tz="UTC"))
    columns = {
        "mdp_id": mdp,
        "sequence_number": pa.array(np.zeros(n, np.int64)),
        "event_time": time,
        "state_features": pa.array(
            [[("position", float(p))] for p in log["position"].to_pylist()], SCHEMA.field("state_features").type
        ),
        "action": log["item_id"].cast(pa.string()),
        "action_probability": log["propensity_score"],
        "possible_actions": pa.nulls(n, SCHEMA.field("possible_actions").type),
        "metrics": pa.array([[("click", float(c))] for c in log["click"].to_pylist()], SCHEMA.field("metrics").type),
        "truncated": pa.nulls(n, pa.bool_()),
        "policy_version": pa.array(["random"] * n),
    }
    DATA.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns, schema=SCHEMA), DATA / "decisions.parquet")

    # The sample names no users: each impression's user is one of its own.
    users = {"mdp_id": mdp, "seen_at": time}
    users |= {f"user_{i}": codes(log[f"user_feature_{i}"]) for i in range(CATEGORIES)}
    affinities = {f"affinity_{i}": log[f"user-item_affinity_{i}"].cast(pa.float64()) for i in range(len(items))}
    total = np.sum([a.to_numpy() for a in affinities.values()], axis=0)
    users |= affinities | {"affinity": pa.array(total)}
    since = pc.min(time).as_py() - timedelta(days=1)
    described = {
        "item_id": items["item_id"].cast(pa.string()),
        "since": pa.array([since] * len(items), pa.timestamp("us", tz="UTC")),
        "item_0": items["item_feature_0"],
    }
    described |= {f"item_{i}": codes(items[f"item_feature_{i}"]) for i in range(1, CATEGORIES)}
    REPOSITORY.mkdir(exist_ok=True)
    pq.write_table(pa.table(users), REPOSITORY / "users.parquet")
    pq.write_table(pa.table(described), REPOSITORY / "items.parquet")
    apply(list(users)[2:], list(described)[2:])
    print(f"{DATA / 'decisions.parquet'}: {n:,} decisions; {REPOSITORY}: the feature service open_bandit")


def apply(users: list[str], items: list[str]) -> None:
    """Register the views `user` and `item` and the service over both."""
    from feast import Entity, FeatureService, FeatureStore, FeatureView, Field
    from feast.infra.offline_stores.contrib.spark_offline_store.spark_source import SparkSource
    from feast.types import Float64
    from feast.value_type import ValueType

    warnings.filterwarnings("ignore", category=RuntimeWarning, message="The spark")
    config = {
        "project": "open_bandit",
        "provider": "local",
        "registry": "registry.db",
        "offline_store": {"type": "spark"},
        "online_store": {"type": "sqlite", "path": "online.db"},
        "entity_key_serialization_version": 3,
    }
    (REPOSITORY / "feature_store.yaml").write_text(yaml.safe_dump(config, sort_keys=False))

    def view(name: str, key: str, stamp: str, features: list[str], ttl: timedelta) -> FeatureView:
        path = str((REPOSITORY / f"{name}s.parquet").absolute())
        return FeatureView(
            name=name,
            entities=[Entity(name=name, join_keys=[key], value_type=ValueType.STRING)],
            ttl=ttl,
            schema=[Field(name=feature, dtype=Float64) for feature in features],
            source=SparkSource(name=name, path=path, file_format="parquet", timestamp_field=stamp),
        )

    views = [
        view("user", "mdp_id", "seen_at", users, timedelta(hours=1)),
        view("item", "item_id", "since", items, timedelta(0)),
    ]
    entities = [
        Entity(name=n, join_keys=[k], value_type=ValueType.STRING) for n, k in (("user", "mdp_id"), ("item", "item_id"))
    ]
    store = FeatureStore(repo_path=str(REPOSITORY))
    store.apply([*entities, *views, FeatureService(name="open_bandit", features=[*views])])


def interval(samples: np.ndarray) -> list[float]:
    """The value from the log itself, and the ends of the replicates' 95 % interval."""
    return [float(samples[0]), *map(float, np.quantile(samples[1:], [0.025, 0.975]))]


def clicks(policy: str) -> list[float]:
    """What a policy really got: clicks per impression of its own log."""
    found = read(policy)["click"].to_numpy().astype(float)
    mdp = np.arange(len(found))
    return interval(cpe.logged_per_step(found, mdp, cpe.bootstrap(mdp, RESAMPLES, seed=0)))


def estimate_bts() -> list[float]:
    """Clicks per impression of `bts`, by importance sampling from the log of `random`.

    The log of `bts` tells only the propensity of what it chose, and that changed within minutes: how often it showed
    each item over the week stands for it.
    """
    random, bts = read("random"), read("bts")
    shares = np.zeros((4, len(read("random", "item_context"))))
    np.add.at(shares, (bts["position"].to_numpy(), bts["item_id"].to_numpy()), 1)
    shares /= np.maximum(shares.sum(1, keepdims=True), 1)
    place, item = random["position"].to_numpy(), random["item_id"].to_numpy()
    weight = shares[place, item] / random["propensity_score"].to_numpy()
    mdp = np.arange(len(random))
    found = random["click"].to_numpy().astype(float)
    return interval(cpe.stepwise_importance_sampling(found, weight, mdp, cpe.bootstrap(mdp, RESAMPLES, seed=0)))


def compare(runs: Path) -> None:
    """Print, and write beside the run's report, what was estimated from the log of `random` and what `bts` got."""
    report = json.loads((runs / "open-bandit" / "evaluation" / "report.json").read_text())
    rows = {
        "random, as it was": clicks("random"),
        "bts, as it was": clicks("bts"),
        "bts, estimated from random's log": estimate_bts(),
    }
    for name in ("stepwise_importance_sampling", "stepwise_direct_method", "stepwise_doubly_robust"):
        found = report["final"][name]["click"]
        rows[f"the new policy, {name.removeprefix('stepwise_').replace('_', ' ')}"] = [
            found["value"], found["low"], found["high"],
        ]  # fmt: skip
    table = Table("clicks in 1,000 impressions", "", "95 % interval", title=f"Open Bandit, campaign {CAMPAIGN}")
    for name, (value, low, high) in rows.items():
        table.add_row(name, f"{1000 * value:.2f}", f"{1000 * low:.2f} to {1000 * high:.2f}")
    Console().print(table)
    (runs / "open-bandit" / "comparison.json").write_text(json.dumps(rows, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "compare"])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of all runs")
    arguments = parser.parse_args()
    prepare() if arguments.step == "prepare" else compare(arguments.runs)


if __name__ == "__main__":
    main()

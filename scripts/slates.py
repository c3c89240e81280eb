"""RecSim's interest evolution as a log of random slates, and what the slates learned from it really bring.

python scripts/slates.py prepare          # write data/slates/decisions.parquet
bluewhale run manifests/examples/slates.yaml
python scripts/slates.py compare          # the estimate beside what the exported graph earns in the environment
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import onnxruntime
import pyarrow.parquet as pq
from rich.console import Console
from rich.table import Table

from components.export.repository import MODEL, read_policies
from simulation.slates import DISCOUNT, Observation, play

ENVIRONMENT = "interest evolution"
DATA = Path("data/slates")
EPISODES, FRESH_EPISODES, FRESH_SEED = 1500, 400, 10_000


def prepare() -> None:
    """Write the log."""
    DATA.mkdir(parents=True, exist_ok=True)
    log = play(ENVIRONMENT, None, EPISODES, 0)
    pq.write_table(log.decisions(), DATA / "decisions.parquet")
    print(f"{DATA / 'decisions.parquet'}: {len(log.reward):,} decisions of {EPISODES:,} users")


class Exported:
    """A policy over slates as it would be served."""

    def __init__(self, repository: Path) -> None:
        ((version, self.policy),) = read_policies(repository).items()
        self.session = onnxruntime.InferenceSession(repository / MODEL / str(version) / "model.onnx")
        self.generator = np.random.default_rng(0)

    def __call__(self, seen: Observation) -> np.ndarray:
        user, item = ([int(name.split("_")[1]) for name in self.policy[of]] for of in ("features", "action_features"))
        uniform = self.generator.random(self.policy["slate"] + 1, np.float32)
        given = {"state": seen["user"][None, user], "action": seen["items"][:, item], "uniform": uniform}
        slate: np.ndarray = self.session.run(["sampled_action"], given)[0]
        return slate


def interval(values: np.ndarray) -> list[float]:
    """Their mean, and the ends of its 95 % interval."""
    half = 1.96 * values.std(ddof=1) / np.sqrt(len(values))
    return [float(values.mean()), float(values.mean() - half), float(values.mean() + half)]


def compare(runs: Path) -> None:
    """Print, and write beside the run's report, what was estimated and what is so."""
    run = runs / "slates"
    report = json.loads((run / "evaluation" / "report.json").read_text())
    estimate = report["final"]["sequential_direct_method"]["reward"]
    random = play(ENVIRONMENT, None, FRESH_EPISODES, FRESH_SEED)
    learned = play(ENVIRONMENT, Exported(run / "export" / "model_repository"), FRESH_EPISODES, FRESH_SEED)
    rows: dict[str, list[list[float]]] = {
        name: [interval(log.returns), interval(log.discounted(DISCOUNT))]
        for name, log in (("random slates", random), ("the learned slates", learned))
    }
    rows["the learned slates, estimated from the log"] = [[], [estimate["value"], estimate["low"], estimate["high"]]]
    table = Table("minutes that people stay", "in all", f"discounted by {DISCOUNT}", title=f"RecSim, {ENVIRONMENT}")
    for name, columns in rows.items():
        table.add_row(name, *("{:.0f} [{:.0f}, {:.0f}]".format(*each) if each else "" for each in columns))
    Console().print(table)
    (run / "comparison.json").write_text(json.dumps(rows, indent=2))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["prepare", "compare"])
    parser.add_argument("--runs", type=Path, default=Path("runs"), help="directory of all runs")
    arguments = parser.parse_args()
    prepare() if arguments.step == "prepare" else compare(arguments.runs)


if __name__ == "__main__":
    main()

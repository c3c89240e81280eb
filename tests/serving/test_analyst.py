"""What the arms earned: read from logs that several replicas write, and shown to Prometheus."""

from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from prometheus_client import CollectorRegistry

from serving.analyst import SETTLE_SECONDS, Analyst, Ledger

START = datetime(2026, 5, 4, 12, 0, tzinfo=UTC)


class Log:
    """Rows as the models `policy` and `feedback` of a replica write them."""

    def __init__(self, directory: Path, replica: str = "pod-0") -> None:
        self.directory, self.replica = directory, replica

    def decide(self, mdp: str, at: float, arm: str = "stable", rollout: str | None = "r1", **row: object) -> None:
        row = {"arm": arm, "fallback": False, "policy_version": f"{arm}-policy", "rollout": rollout, **row}
        self._write("decisions", at, {"mdp_id": mdp, "sequence_number": 0, "action": "left", **row})

    def end(self, mdp: str, at: float, reward: float, step: int = 0, ended: bool = True, name: str = "reward") -> None:
        row = {"mdp_id": mdp, "sequence_number": step, "metrics": {name: reward}, "ended": ended}
        self._write("outcomes", at, row)

    def _write(self, kind: str, at: float, row: dict[str, object]) -> None:
        moment = (START + timedelta(seconds=at)).isoformat(timespec="microseconds")
        with (self.directory / f"{kind}-{self.replica}.jsonl").open("a") as stream:
            stream.write(json.dumps(row | {"event_time": moment}) + "\n")


class Reader:
    """An analyst, and what Prometheus sees of it."""

    def __init__(self, directory: Path, weights: dict[str, float] | None = None) -> None:
        self.analyst = Analyst(directory, Ledger("reward", weights or {}), "team/shop")
        self.registry = CollectorRegistry()
        self.registry.register(self.analyst)

    def read(self, at: float = 100.0) -> None:
        self.analyst.read((START + timedelta(seconds=at)).timestamp())

    def figure(self, name: str, rollout: str = "r1", arm: str | None = None) -> float | None:
        labels = {"policy_service": "team/shop", "metric": "reward", "rollout": rollout}
        labels |= {"arm": arm, "policy_version": f"{arm}-policy"} if arm else {}
        return self.registry.get_sample_value(f"bluewhale_{name}", labels)


@pytest.fixture
def log(tmp_path: Path) -> Log:
    return Log(tmp_path)


@pytest.fixture
def reader(tmp_path: Path) -> Reader:
    return Reader(tmp_path)


def test_returns_are_added_up_by_arm(log: Log, reader: Reader) -> None:
    for number, reward in enumerate((1.0, 3.0)):
        log.decide(f"c{number}", number, "candidate")
        log.end(f"c{number}", number, reward)
    log.decide("s", 5)
    log.end("s", 6, 2.0, ended=False)
    log.end("s", 6, 5.0, step=1)
    reader.read()
    assert reader.figure("arm_mdps", arm="candidate") == 2
    assert reader.figure("arm_return_sum", arm="candidate") == 4
    assert reader.figure("arm_return_squared_deviations_sum", arm="candidate") == 2
    assert reader.figure("arm_return_sum", arm="stable") == 7
    assert reader.figure("metric_reported") == 3


def test_an_mdp_counts_for_an_arm_only_when_the_arm_answered_all_of_it(log: Log, reader: Reader) -> None:
    log.decide("moved", 0)
    log.decide("moved", 1, "candidate")
    log.decide("helped", 1, "stable", fallback=True)
    log.decide("before", 0, rollout=None)
    log.decide("before", 1)
    for name in ("moved", "helped", "before"):
        log.end(name, 2, 9.0)
    reader.read()
    assert reader.figure("mixed_mdps") == 3
    assert reader.figure("arm_mdps", arm="stable") is None, "an arm without an MDP has no policy yet"


def test_what_replicas_wrote_is_merged_by_time(tmp_path: Path, reader: Reader) -> None:
    # The episode goes on at another replica, whose file is read first.
    first, second = Log(tmp_path, "z"), Log(tmp_path, "a")
    first.decide("m", 0)
    second.decide("m", 1)
    second.end("m", 2, 1.0)
    reader.read()
    assert reader.figure("arm_mdps", arm="stable") == 1
    assert reader.figure("mixed_mdps") == 0


def test_an_mdp_is_added_up_once_it_has_settled(tmp_path: Path, log: Log, reader: Reader) -> None:
    log.decide("m", 0)
    log.end("m", 1, 1.0)
    reader.read(at=1 + SETTLE_SECONDS / 2)
    assert reader.figure("arm_mdps", arm="stable") is None
    # Seen late, from another replica: the candidate had answered, too.
    Log(tmp_path, "other").decide("m", 0.5, "candidate")
    reader.read(at=1 + SETTLE_SECONDS)
    assert reader.figure("mixed_mdps") == 1


def test_started_anew_it_comes_to_the_same_figures(tmp_path: Path, log: Log, reader: Reader) -> None:
    for number in range(20):
        log.decide(f"m{number}", number, "candidate" if number % 3 else "stable")
        log.end(f"m{number}", number, float(number))
        reader.read(at=number)
    reader.read()
    again = Reader(tmp_path)
    again.read()
    for name in ("arm_mdps", "arm_return_sum", "arm_return_squared_deviations_sum"):
        assert again.figure(name, arm="candidate") == reader.figure(name, arm="candidate")


def test_an_outcome_reported_twice_counts_once(log: Log, reader: Reader) -> None:
    log.decide("m", 0)
    log.end("m", 1, 1.0, ended=False)
    log.end("m", 2, 4.0)
    log.end("m", 20, 4.0)
    reader.read()
    assert (reader.figure("arm_mdps", arm="stable"), reader.figure("arm_return_sum", arm="stable")) == (1, 4)


def test_reward_is_made_of_other_metrics_by_their_weights(tmp_path: Path, log: Log) -> None:
    log.decide("m", 0)
    log.end("m", 1, 3.0, name="clicks")
    reader = Reader(tmp_path, {"clicks": 2.0})
    reader.read()
    assert reader.figure("arm_return_sum", arm="stable") == 6


def test_a_metric_that_nobody_reports_is_known_to_be_missing(log: Log, reader: Reader) -> None:
    log.decide("m", 0)
    log.end("m", 1, 3.0, name="clicks")
    reader.read()
    assert (reader.figure("arm_mdps", arm="stable"), reader.figure("metric_reported")) == (1, 0)


def test_lines_that_cannot_be_read_are_counted_and_passed_over(tmp_path: Path, log: Log, reader: Reader) -> None:
    (tmp_path / "decisions-pod-0.jsonl").write_text('not json\n{"event_time": "never"}\n[]\n')
    log.decide("m", 0)
    log.end("m", 1, 3.0)
    reader.read()
    assert reader.figure("arm_mdps", arm="stable") == 1
    found = reader.registry.get_sample_value("bluewhale_unreadable_log_lines", {"policy_service": "team/shop"})
    assert found == 3


def test_without_any_log_there_are_no_figures_but_an_analyst(tmp_path: Path) -> None:
    reader = Reader(tmp_path / "nothing")
    reader.read()
    assert reader.figure("mixed_mdps") is None
    assert reader.registry.get_sample_value("bluewhale_unreadable_log_lines", {"policy_service": "team/shop"}) == 0

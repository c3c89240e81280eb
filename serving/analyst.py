"""What the arms of a rollout have earned, for Prometheus: follows the logs of all replicas and exports running figures.

An MDP counts for an arm when every one of its decisions came under one rollout, from that arm, and none from stable in
the candidate's place. So an MDP that was under way when the rollout began, or whose arm changed, counts for neither.
Started anew, the analyst reads the logs from their beginning and comes to the same figures.
"""

from __future__ import annotations

import argparse
import contextlib
import heapq
import json
import math
import signal
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from serving.analysis import ARMS, ArmReturns, Tail, with_reward

POLL_SECONDS = 1.0
SETTLE_SECONDS = 5.0
"""An MDP is added up this long after its end: what other replicas wrote may be seen late."""
MOST_OPEN = 1_000_000
"""MDPs under way that are kept in memory; beyond that, those not heard of for longest are forgotten."""
ROLLOUTS_KEPT = 10
MALFORMED = (KeyError, TypeError, ValueError, AttributeError)


@dataclass
class _Mdp:
    answered: set[tuple[str, str, str]] = field(default_factory=set)
    """Arm, policy and rollout of its decisions."""
    rewards: dict[int, float] = field(default_factory=dict)
    """By decision, so that an outcome reported twice counts once, the later report."""
    reported: bool = False


@dataclass
class Rollout:
    """The figures of one rollout."""

    arms: dict[str, ArmReturns] = field(default_factory=lambda: {arm: ArmReturns() for arm in ARMS})
    policies: dict[str, str] = field(default_factory=lambda: dict.fromkeys(ARMS, ""))
    mixed: int = 0
    reporting: int = 0
    """MDPs whose outcomes name the metric."""


class Ledger:
    """Takes rows in the order of time, and adds up finished MDPs."""

    def __init__(self, metric: str, metric_weights: dict[str, float], settle_seconds: float = SETTLE_SECONDS) -> None:
        self.metric, self.metric_weights, self.settle_seconds = metric, metric_weights, settle_seconds
        self.rollouts: dict[str, Rollout] = {}
        self._open: dict[str, _Mdp] = {}
        self._ended: deque[tuple[float, str]] = deque()

    def take(self, when: float, row: dict[str, Any]) -> None:
        """A decision or an outcome; raises one of `MALFORMED` when the row is neither."""
        self.settle(when)
        name = row["mdp_id"]
        # Put in anew, so that those not heard of for longest come first.
        mdp = self._open[name] = self._open.pop(name) if name in self._open else _Mdp()
        if "action" in row:
            arm = "mixed" if row["fallback"] else row["arm"]
            mdp.answered.add((arm, row["policy_version"], row.get("rollout") or ""))
        else:
            metrics = with_reward(row["metrics"], self.metric, self.metric_weights)
            mdp.rewards[row["sequence_number"]] = float(metrics.get(self.metric, 0.0))
            mdp.reported |= self.metric in metrics
            if row["ended"]:
                self._ended.append((when, name))
        if len(self._open) > MOST_OPEN:
            del self._open[next(iter(self._open))]

    def settle(self, now: float) -> None:
        """Add up the MDPs that ended long enough before `now`."""
        while self._ended and self._ended[0][0] <= now - self.settle_seconds:
            if mdp := self._open.pop(self._ended.popleft()[1], None):
                self._count(mdp)

    def _count(self, mdp: _Mdp) -> None:
        for name in {rollout for _, _, rollout in mdp.answered if rollout}:
            rollout = self.rollouts.setdefault(name, Rollout())
            rollout.reporting += mdp.reported
            arm, policy, _ = next(iter(mdp.answered))
            if len(mdp.answered) == 1 and arm in ARMS:
                rollout.arms[arm].add(math.fsum(mdp.rewards.values()))
                rollout.policies[arm] = policy
            else:
                rollout.mixed += 1
        while len(self.rollouts) > ROLLOUTS_KEPT:
            del self.rollouts[next(iter(self.rollouts))]


class Analyst(Collector):
    """Reads `decisions*.jsonl` and `outcomes*.jsonl` of a directory, and shows Prometheus what is in the ledger."""

    def __init__(self, log: Path, ledger: Ledger, service: str = "") -> None:
        self.log, self.ledger, self.service = log, ledger, service
        self.unreadable = 0
        self._tails: dict[Path, Tail] = {}
        self._shown: list[GaugeMetricFamily] = []

    def read(self, now: float) -> None:
        """Take in what was written since the last call."""
        for kind in ("decisions", "outcomes"):
            for path in self.log.glob(f"{kind}*.jsonl"):
                self._tails.setdefault(path, Tail(path))
        # Each file is in the order of time: merged, they show every MDP as it went, also over several replicas.
        for when, row in heapq.merge(*map(self._dated, self._tails.values()), key=lambda dated: dated[0]):
            try:
                self.ledger.take(when, row)
            except MALFORMED:
                self.unreadable += 1
        self.ledger.settle(now)
        self._shown = self._families()

    def collect(self) -> Iterable[GaugeMetricFamily]:
        return self._shown

    def _dated(self, tail: Tail) -> Iterator[tuple[float, dict[str, Any]]]:
        for row in tail.rows():
            try:
                yield datetime.fromisoformat(row["event_time"]).timestamp(), row
            except MALFORMED:
                self.unreadable += 1

    def _families(self) -> list[GaugeMetricFamily]:
        service = {"policy_service": self.service} if self.service else {}
        common = {**service, "metric": self.ledger.metric}

        def family(name: str, text: str, values: list[tuple[dict[str, str], float]]) -> GaugeMetricFamily:
            made = GaugeMetricFamily(f"bluewhale_{name}", text, labels=list(values[0][0]) if values else [])
            for labels, value in values:
                made.add_metric(list(labels.values()), value)
            return made

        rollouts = [({**common, "rollout": name}, rollout) for name, rollout in self.ledger.rollouts.items()]
        arms = [
            ({**labels, "arm": arm, "policy_version": rollout.policies[arm]}, returns)
            for labels, rollout in rollouts
            for arm, returns in rollout.arms.items()
        ]
        unreadable = self.unreadable + sum(tail.unreadable for tail in self._tails.values())
        return [
            family("arm_mdps", "Finished MDPs of an arm in a rollout", [(n, r.count) for n, r in arms]),
            family("arm_return_sum", "Sum of their returns", [(n, r.mean * r.count) for n, r in arms]),
            family(
                "arm_return_squared_deviations_sum",
                "Sum of squared deviations of their returns from the arm's mean",
                [(n, r.deviations) for n, r in arms],
            ),
            family("mixed_mdps", "Finished MDPs that count for neither arm", [(n, r.mixed) for n, r in rollouts]),
            family("metric_reported", "Finished MDPs that report the metric", [(n, r.reporting) for n, r in rollouts]),
            family("unreadable_log_lines", "Lines of the log that could not be read", [(service, unreadable)]),
        ]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="serving.analyst", description="Export what the arms of a rollout earned.")
    parser.add_argument("--log", type=Path, required=True, help="directory of the decision log, of all replicas")
    parser.add_argument("--metric", required=True, help="whose total per MDP is compared")
    parser.add_argument("--metric-weights", type=json.loads, default={}, help="JSON; makes `reward` of other metrics")
    parser.add_argument("--service", default="", help="label of all figures: NAMESPACE/NAME")
    parser.add_argument("--port", type=int, default=9102)
    parser.add_argument("--settle-seconds", type=float, default=SETTLE_SECONDS)
    options = parser.parse_args(arguments)
    ending = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: ending.set())
    analyst = Analyst(
        options.log, Ledger(options.metric, options.metric_weights, options.settle_seconds), options.service
    )
    # Nobody is shown figures before the whole log is in them.
    analyst.read(time.time())
    registry = CollectorRegistry()
    registry.register(analyst)
    server, _ = start_http_server(options.port, registry=registry)
    with contextlib.closing(server.socket):
        while not ending.wait(POLL_SECONDS):
            analyst.read(time.time())
        server.shutdown()


if __name__ == "__main__":
    main()

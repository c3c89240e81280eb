"""`bluewhale simulate`: episodes whose every action is asked of the policy service, as a live product would."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from dataclasses import dataclass, field

import gymnasium

from serving.client import PolicyClient, ServiceError
from simulation.cartpole import FEATURES, metrics_of


@dataclass
class Traffic:
    """Clients that play episodes until told to stop; what came of it is in `counts`."""

    address: str
    seed: int
    clients: int = 4
    episodes: int | None = None
    counts: Counter[str] = field(default_factory=Counter)
    last_error: str | None = None
    # Traffic played twice on one service must not continue the MDPs of the first time.
    token: str = field(default_factory=lambda: uuid.uuid4().hex[:8])
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def __enter__(self) -> Traffic:
        self._threads = [threading.Thread(target=self._play, args=(i,), daemon=True) for i in range(self.clients)]
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self.wait()

    def wait(self) -> None:
        """Until every client has finished its episodes."""
        for thread in self._threads:
            while thread.is_alive():
                thread.join(0.2)  # a plain join would not let Ctrl-C through

    def _play(self, number: int) -> None:
        environment = gymnasium.make("CartPole-v1")
        try:
            connection = PolicyClient(self.address)
        except ServiceError as error:
            with self._lock:
                self.counts["failed_requests"] += 1
                self.last_error = str(error)
            return
        with connection as client:
            for episode in range(number, self.episodes or 10**9, self.clients):
                if self._stop.is_set():
                    return
                self._episode(client, environment, f"live-{self.token}-{episode:06d}", episode)

    def _episode(self, client: PolicyClient, environment: gymnasium.Env, mdp_id: str, episode: int) -> None:
        state, _ = environment.reset(seed=self.seed * 1_000_003 + episode)
        metrics: list[dict[str, float]] = []
        counts: Counter[str] = Counter()
        over = truncated = False
        try:
            while not over and not self._stop.is_set():
                counts["requests"] += 1
                decision = client.decide(mdp_id, len(metrics), dict(zip(FEATURES, map(float, state), strict=True)))
                counts["fallbacks"] += decision.fallback
                state, _, terminated, truncated, _ = environment.step(decision.action_index)
                over = terminated or truncated
                metrics.append(metrics_of(state, terminated))
            if over:
                client.report(mdp_id, metrics, ended=True, truncated=truncated and not terminated)
                counts["episodes"] += 1
        except ServiceError as error:
            counts["failed_requests"] += 1
            self.last_error = str(error)
            self._stop.wait(0.05)
        with self._lock:
            self.counts += counts

"""Triton model `policy`: which arm answers an MDP, its answer or stable's in its place, and the decision log.

The rollout's state (stable, candidate, weight, salt) is a small file, read again when it changes: a weight step takes
effect at the next request and drops none.
"""

import contextlib
import datetime
import json
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from concurrent.futures import TimeoutError as Late

import numpy as np
import triton_python_backend_utils as triton
from hashing import unit_interval

ARMS = ("stable", "candidate")
RESULTS = ("answered", "failed", "late", "shed")
BUCKETS = [0.0005, 0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.25, 0.5, 1.0]
MOST_IN_FLIGHT = 2  # late calls of the candidate that may still run before it is passed over


class TritonPythonModel:
    def initialize(self, args):
        parameters = {k: v["string_value"] for k, v in json.loads(args["model_config"])["parameters"].items()}
        self.features = json.loads(parameters["features"])
        self.actions = json.loads(parameters["actions"])
        self.state_file = parameters["state_file"]
        self.state_seen = None
        self.state_lock = threading.Lock()
        self.log = os.open(parameters["decision_log"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        self.pool = ThreadPoolExecutor(MOST_IN_FLIGHT + 2)
        self.in_flight = []
        self.labels = json.loads(parameters["labels"])
        family = triton.MetricFamily
        decisions = family(
            "bluewhale_decisions_total", "Decisions by arm and what came of the arm's call", family.COUNTER
        )
        # Every series starts at zero, or Prometheus would miss its first increments.
        self.decisions = {
            (a, r): decisions.Metric(labels={**self.labels, "arm": a, "result": r}) for a in ARMS for r in RESULTS
        }
        seconds = family("bluewhale_decision_seconds", "Time of an arm's call", family.HISTOGRAM)
        self.seconds = {a: seconds.Metric(labels={**self.labels, "arm": a}, buckets=BUCKETS) for a in ARMS}
        weight = family("bluewhale_candidate_weight", "Share of MDPs that the candidate answers", family.GAUGE)
        self.weight = weight.Metric(labels=self.labels)
        loaded = family(
            "bluewhale_candidate_loaded",
            "1: this replica has loaded the rollout's candidate; 0: it cannot",
            family.GAUGE,
        )
        self.loaded = {}
        self.families = decisions, seconds, weight, loaded  # a metric dies with its family
        self.read_state()
        # Without traffic, too, a replica says what it has loaded.
        self.ending = threading.Event()
        self.follower = threading.Thread(target=self.follow_state)
        self.follower.start()

    def finalize(self):
        self.ending.set()
        self.follower.join()
        os.close(self.log)

    def follow_state(self):
        while not self.ending.wait(0.5):
            with contextlib.suppress(OSError, ValueError):  # the next request will say so
                self.weight.set(_weight(self.read_state()))

    def read_state(self):
        with self.state_lock:
            info = os.stat(self.state_file)
            seen = (info.st_mtime_ns, info.st_ino)
            if seen != self.state_seen:
                with open(self.state_file) as stream:
                    self.state = json.load(stream)
                self.state_seen = seen
                self.weight.set(_weight(self.state))
                self.show_loaded()
            return self.state

    def show_loaded(self):
        rollout = self.state["salt"]
        given_up = self.state.get("given_up") == rollout
        if not (self.state["candidate"] or given_up):
            return  # the last rollout's series stays: Triton lets go of a metric only with its family
        if rollout not in self.loaded:
            self.loaded[rollout] = self.families[-1].Metric(labels={**self.labels, "rollout": rollout})
        self.loaded[rollout].set(0.0 if given_up else 1.0)

    def execute(self, requests):
        responses = [None] * len(requests)
        rows = []
        for i, request in enumerate(requests):
            try:
                rows += [(i, row) for row in self.read(request)]
            except ValueError as error:
                responses[i] = _refusal(str(error))
        try:
            if rows:
                self.decide([row for _, row in rows])
                self.write_log([row for _, row in rows])
        except Exception as error:  # stable itself has failed: say so to every caller, and go on
            for i, _ in rows:
                responses[i] = triton.InferenceResponse(error=triton.TritonError(str(error)))
        for i in range(len(requests)):
            if responses[i] is None:
                responses[i] = _response([row for j, row in rows if j == i])
        return responses

    def read(self, request):
        columns = [
            triton.get_input_tensor_by_name(request, name).as_numpy()
            for name in ("mdp_id", "sequence_number", "state", "possible")
        ]
        rows = []
        for mdp_id, sequence_number, state, possible in zip(*columns):
            row = {"mdp_id": mdp_id[0].decode(), "sequence_number": int(sequence_number[0])}
            if not row["mdp_id"]:
                raise ValueError("mdp_id: empty; name the episode that this decision belongs to")
            if np.isinf(state).any():
                name = self.features[int(np.isinf(state).argmax())]
                raise ValueError(f"state feature {name}: infinite; send a finite number, or NaN when it is missing")
            if not possible.any():
                raise ValueError("possible: no action is possible; at least one must be")
            rows.append(row | {"state": state, "possible": possible})
        return rows

    def decide(self, rows):
        state = self.read_state()
        head = state.get("head", "sampled")
        for row in rows:
            row["rollout"] = state["salt"] if state["candidate"] else None
        arms = {"stable": [], "candidate": []}
        weight = _weight(state)
        for row in rows:
            chosen = unit_interval(state["salt"], row["mdp_id"]) < weight
            arms["candidate" if chosen else "stable"].append(row)
        pending = None
        if arms["candidate"]:
            self.in_flight = [f for f in self.in_flight if not f.done()]
            if len(self.in_flight) < MOST_IN_FLIGHT:
                started = time.perf_counter()
                pending = self.pool.submit(self.ask, "candidate", state["candidate"], arms["candidate"], head)
                self.in_flight.append(pending)
        if arms["stable"]:
            answer = self.ask("stable", state["stable"], arms["stable"], head)
            self.fill(arms["stable"], "stable", state["stable"], answer)
        if not arms["candidate"]:
            return
        result = "shed"
        if pending:
            left = state["deadline_ms"] / 1000 - (time.perf_counter() - started)
            try:
                self.fill(arms["candidate"], "candidate", state["candidate"], pending.result(max(0.0, left)))
                return
            except Late:
                result = "late"
            except Exception:
                result = "failed"
        self.decisions["candidate", result].increment(len(arms["candidate"]))
        answer = self.ask("stable", state["stable"], arms["candidate"], head)
        self.fill(arms["candidate"], "stable", state["stable"], answer, fallback=True)

    def ask(self, arm, policy, rows, head):
        """The action [B] of the arm's version, and its probability [B]."""
        # The random number is the request's own: asked again, it is answered alike.
        uniform = [[unit_interval(policy["digest"], r["mdp_id"], r["sequence_number"])] for r in rows]
        inputs = [
            triton.Tensor("state", np.stack([r["state"] for r in rows])),
            triton.Tensor("uniform", np.array(uniform, np.float32)),
            triton.Tensor("possible", np.stack([r["possible"] for r in rows])),
        ]
        call = triton.InferenceRequest(
            model_name="arm",
            model_version=policy["version"],
            requested_output_names=["propensities", f"{head}_action"],
            inputs=inputs,
        )
        started = time.perf_counter()
        response = call.exec()
        self.seconds[arm].observe(time.perf_counter() - started)
        if response.has_error():
            raise RuntimeError(response.error().message())
        outputs = {tensor.name(): tensor.as_numpy() for tensor in response.output_tensors()}
        propensities, action = outputs["propensities"], outputs[f"{head}_action"][:, 0]
        if not np.isfinite(propensities).all():
            raise RuntimeError(f"policy {policy['digest'][:12]} gave probabilities that are not finite")
        if head == "greedy":
            return action, np.ones(len(action))
        return action, propensities[np.arange(len(action)), action]

    def fill(self, rows, arm, policy, answer, fallback=False):
        self.decisions[arm, "answered"].increment(len(rows))
        for row, action, probability in zip(rows, *answer):
            row |= {
                "action": self.actions[action],
                "action_index": int(action),
                "action_probability": float(probability),
                "policy_version": policy["digest"],
                "arm": arm,
                "fallback": fallback,
            }

    def write_log(self, rows):
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="microseconds")
        lines = []
        for row in rows:
            decision = {
                "mdp_id": row["mdp_id"],
                "sequence_number": row["sequence_number"],
                "event_time": now,
                "state_features": {n: float(v) for n, v in zip(self.features, row["state"]) if not np.isnan(v)},
                "action": row["action"],
                "action_probability": row["action_probability"],
                "possible_actions": [a for a, p in zip(self.actions, row["possible"]) if p],
                "metrics": {},
                "policy_version": row["policy_version"],
                "arm": row["arm"],
                "fallback": row["fallback"],
                "rollout": row["rollout"],
            }
            lines.append(json.dumps(decision))
        # One write of whole lines: appends of several processes do not mix.
        os.write(self.log, ("\n".join(lines) + "\n").encode())


def _weight(state):
    """A rollout renews its weight at every look; one that is gone leaves no candidate unwatched."""
    held = state["candidate"] and time.time() < state.get("weight_until", float("inf"))
    return state["weight"] if held else 0.0


def _refusal(message):
    return triton.InferenceResponse(error=triton.TritonError(message, triton.TritonError.INVALID_ARG))


def _response(rows):
    def column(name, kind):
        return triton.Tensor(name, np.array([[row[name]] for row in rows], kind))

    return triton.InferenceResponse(
        [
            column("action", object),
            column("action_index", np.int64),
            column("action_probability", np.float32),
            column("policy_version", object),
            column("arm", object),
            column("fallback", bool),
        ]
    )

"""How the workers share out the rows, begin with another policy's weights, and go on where others were killed."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from components.columns import write_columns
from components.training import worker
from components.training.batches import Shuffled
from components.training.trainer import missing_to_compile
from components.training.worker import CHECKPOINTS, _most, _remedy, check_converges, rewards_to_learn_from, valued_by
from components.transitions import Transitions
from contracts.job import Algorithm, JobSpec
from contracts.stage import StageError

ROOT = Path(__file__).parents[3]
ROWS = np.arange(100, 160)


def permuted_batches(rows: np.ndarray, batch: int, steps: int, seed: int, rank: int, workers: int) -> np.ndarray:
    shuffled = Shuffled(rows, batch, seed, rank, workers)
    return np.concatenate([shuffled.at(step) for step in range(steps)])


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_all_workers_together_see_each_row_exactly_once_per_pass(workers: int) -> None:
    passes, batch = 3, 12
    shares = [permuted_batches(ROWS, batch, passes * len(ROWS) // batch, 5, r, workers) for r in range(workers)]
    assert all(share.shape == (15, batch // workers) for share in shares)
    together = np.concatenate(shares, axis=1).reshape(passes, len(ROWS))
    for one_pass in together:
        assert sorted(one_pass) == ROWS.tolist()


def test_passes_come_in_different_orders() -> None:
    first, second = permuted_batches(ROWS, 12, 10, 5, 0, 1).reshape(2, len(ROWS))
    assert first.tolist() != second.tolist()
    assert first.tolist() != ROWS.tolist()


@pytest.mark.parametrize("workers", [2, 4])
def test_a_global_batch_is_the_same_however_many_workers_share_it(workers: int) -> None:
    alone = permuted_batches(ROWS, 8, 20, 5, 0, 1)
    shared = np.concatenate([permuted_batches(ROWS, 8, 20, 5, r, workers) for r in range(workers)], axis=1)
    np.testing.assert_array_equal(shared, alone)


def test_a_pass_that_is_no_multiple_of_the_batch_goes_on_in_the_next() -> None:
    stream = permuted_batches(ROWS, 16, 15, 5, 0, 1).reshape(-1)
    assert len(stream) == 4 * len(ROWS)
    for one_pass in stream.reshape(4, -1):
        assert sorted(one_pass) == ROWS.tolist()


def test_the_order_depends_on_the_seed_alone() -> None:
    np.testing.assert_array_equal(permuted_batches(ROWS, 12, 7, 5, 0, 2), permuted_batches(ROWS, 12, 7, 5, 0, 2))
    assert (permuted_batches(ROWS, 12, 7, 5, 0, 2) != permuted_batches(ROWS, 12, 7, 6, 0, 2)).any()


def test_more_steps_do_not_change_the_first() -> None:
    np.testing.assert_array_equal(permuted_batches(ROWS, 12, 20, 5, 0, 1)[:7], permuted_batches(ROWS, 12, 7, 5, 0, 1))


def test_any_step_can_be_the_first() -> None:
    going_on = Shuffled(ROWS, 16, 5)
    for step in (9, 3, 14):
        np.testing.assert_array_equal(going_on.at(step)[0], permuted_batches(ROWS, 16, 15, 5, 0, 1)[step])


@pytest.mark.parametrize("workers", [1, 3])
def test_several_steps_are_drawn_at_once_as_one_by_one(workers: int) -> None:
    one_by_one = permuted_batches(ROWS, 16, 15, 5, 0, workers)
    at_once = Shuffled(ROWS, 16, 5, 0, workers)
    np.testing.assert_array_equal(np.concatenate([at_once.at(0, 4), at_once.at(4, 11)]), one_by_one)


@pytest.mark.parametrize("batch", [12, 16, 25, 60])
def test_an_epoch_ends_when_every_row_was_seen_once_more(batch: int) -> None:
    ends = Shuffled(ROWS, batch, 5).ends(4)
    stream = permuted_batches(ROWS, batch, ends[-1], 5, 0, 1).reshape(-1)
    for epoch, end in enumerate(ends, 1):
        assert np.bincount(stream[: end * batch] - 100).min() == epoch
        assert np.bincount(stream[: (end - 1) * batch] - 100, minlength=len(ROWS)).min() == epoch - 1


def test_a_batch_may_be_larger_than_a_pass() -> None:
    seen = Shuffled(ROWS[:10], 25, 5).at(0)[0]
    assert np.bincount(seen - 100, minlength=10).tolist().count(2) == 5
    assert sorted(seen[:10]) == sorted(seen[10:20]) == ROWS[:10].tolist()


@pytest.mark.parametrize(("batch", "workers"), [(12, 5), (8, 3), (7, 7)])
def test_shares_that_cannot_be_equal_still_make_up_the_batch(batch: int, workers: int) -> None:
    alone = permuted_batches(ROWS, batch, 9, 5, 0, 1)
    shares = [permuted_batches(ROWS, batch, 9, 5, r, workers) for r in range(workers)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), alone)
    assert max(s.shape[1] for s in shares) - min(s.shape[1] for s in shares) <= 1


SPEC = JobSpec.model_validate(
    {
        "actions": ["left", "right"],
        "seed": 3,
        "algorithm": {"dqn": {"hiddenLayers": [8]}},
        "training": {"batchSize": 15, "epochs": 4, "stepsPerEpoch": 40},
    }
)


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory, write_stages: Callable[..., None]) -> Path:
    """The features and normalization stages of a small random log."""
    root, n = tmp_path_factory.mktemp("stages"), 400
    generator = np.random.default_rng(0)
    action = [SPEC.actions[a] for a in generator.integers(2, size=n)]
    write_stages(root, 4, action, generator.normal(size=n), generator.normal(size=n))
    write_columns(root / "features", SPEC, root / "columns")
    return root


def started(
    stages: Path, output: Path, workers: int = 1, spec: JobSpec = SPEC, program: str = "", **training: Any
) -> list[subprocess.Popen[bytes]]:
    """Worker processes as torchrun starts them."""
    output.mkdir(exist_ok=True)
    spec = spec.model_copy(update={"training": spec.training.model_copy(update=training)})
    (output / "job.json").write_text(spec.model_dump_json(by_alias=True))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1] if workers > 1 else 0
    command = [
        sys.executable, *(["-c", program] if program else ["-m", "components.training.worker"]),
        "--job", output / "job.json",
        "--columns", stages / "columns", "--normalization", stages / "normalization", "--output", output,
    ]  # fmt: skip
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(workers)}
    return [
        subprocess.Popen(command, cwd=ROOT, env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(workers)
    ]


def trained(stages: Path, output: Path, workers: int = 1, **training: Any) -> dict[str, torch.Tensor]:
    """The weights that so many workers end with."""
    processes = started(stages, output, workers, **training)
    assert [process.wait(240) for process in processes] == [0] * workers
    return load_file(output / "policy" / "weights.safetensors")


@pytest.fixture(scope="module")
def alone(stages: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    """What one worker makes that nobody disturbs."""
    output = tmp_path_factory.mktemp("alone")
    return output, trained(stages, output)


def test_workers_with_unequal_shares_learn_what_one_alone_learns(
    stages: Path, alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    together = trained(stages, tmp_path, workers=2)
    for name, weights in alone[1].items():
        torch.testing.assert_close(together[name], weights, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(bool(missing_to_compile()), reason=f"there is no {missing_to_compile()}")
def test_compiled_steps_learn_the_same_on_any_number_of_workers(
    stages: Path, alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"compile": True})})
    for workers in (1, 2):
        found = trained(stages, tmp_path / str(workers), workers, spec=spec)
        for name, weights in alone[1].items():
            torch.testing.assert_close(found[name], weights, rtol=1e-3, atol=1e-4)


def test_without_a_compiler_nothing_is_compiled(
    stages: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CXX", "no-such-compiler")
    spec = SPEC.model_copy(update={"training": SPEC.training.model_copy(update={"compile": True})})
    (worker,) = started(stages, tmp_path, spec=spec)
    assert worker.wait(60) != 0
    assert "training.compile: there is no C++ compiler no-such-compiler: install it" in capfd.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_gpus_that_are_asked_for_and_not_there_are_told_of(
    stages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    trained(stages, tmp_path, resources=SPEC.training.resources.model_copy(update={"gpus": 1}))
    said = "training.resources.gpus 1: torch finds no GPU, and training takes the CPU"
    assert said in capfd.readouterr().err
    (warning,) = json.loads((tmp_path / "policy" / "bundle.json").read_text())["provenance"]["warnings"]
    assert said in warning


def test_bfloat16_is_warned_of_where_it_is_slower(
    stages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    gain = worker.peak("bfloat16") / worker.peak("float32")
    if 0.8 < gain < 1.25:
        pytest.skip("it is about as fast here")
    trained(stages, tmp_path, precision="bfloat16", epochs=1)
    assert ("times as fast as in float32" in capfd.readouterr().err) == (gain < 1)


def test_scores_of_a_clone_are_not_held_against_returns(stages: Path, tmp_path: Path) -> None:
    clone = JobSpec.model_validate(SPEC.model_dump(by_alias=True) | {"algorithm": {"behaviourCloning": {}}})
    (worker,) = started(stages, tmp_path, spec=clone, epochs=1, steps_per_epoch=50)
    assert worker.wait(240) == 0
    lines = [json.loads(line) for line in (tmp_path / "losses.jsonl").read_text().splitlines()]
    assert lines
    assert not any("mc_loss" in line for line in lines)


KILLED = """
import os, signal
from components.training import worker
save_checkpoint = worker.save_checkpoint
def save_and_die(*arguments):
    save_checkpoint(*arguments)
    os.kill(os.getpid(), signal.SIGKILL)
worker.save_checkpoint = save_and_die
worker.main()
"""


def test_a_killed_worker_s_successor_ends_where_it_would_have_ended(
    stages: Path, alone: tuple[Path, dict[str, torch.Tensor]], tmp_path: Path
) -> None:
    (victim,) = started(stages, tmp_path, program=KILLED)
    assert victim.wait(240) == -signal.SIGKILL
    assert [int(path.name) for path in (tmp_path / CHECKPOINTS).glob("[0-9]*")] == [SPEC.training.steps_per_epoch]
    (tmp_path / "epochs" / "002").mkdir(exist_ok=True)  # as if it was killed while it wrote
    resumed = trained(stages, tmp_path)
    for name, weights in alone[1].items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=0)
    assert sorted(path.name for path in (tmp_path / "epochs").iterdir()) == ["001", "002", "003", "004"]
    logs = [[json.loads(line) for line in (d / "losses.jsonl").read_text().splitlines()] for d in (tmp_path, alone[0])]
    assert logs[0] == logs[1]


LONG = {"batch_size": 200, "epochs": 1, "steps_per_epoch": 3000, "checkpoint_seconds": 0}


def test_within_a_short_epoch_no_checkpoint_is_written(stages: Path, tmp_path: Path) -> None:
    trained(stages, tmp_path, **LONG | {"checkpoint_seconds": 3600})
    assert [place.name for place in (tmp_path / CHECKPOINTS).iterdir()] == ["000000003000"]


def test_within_a_long_epoch_two_workers_go_on_from_the_last_checkpoint(stages: Path, tmp_path: Path) -> None:
    whole = trained(stages, tmp_path / "whole", workers=2, **LONG)
    output = tmp_path / "killed"
    victims = started(stages, output, workers=2, **LONG)
    while not list((output / CHECKPOINTS).glob("[0-9]*")) and victims[0].poll() is None:
        time.sleep(0.001)
    for victim in victims:
        victim.kill()
    assert [victim.wait(10) for victim in victims] == [-signal.SIGKILL] * 2
    assert all(0 < int(place.name) < 3000 for place in (output / CHECKPOINTS).glob("[0-9]*"))
    losses = output / "losses.jsonl"
    first, *others = losses.read_text().splitlines(keepends=True)
    losses.write_text(first.replace("{", '{"before": 1, ', 1) + "".join(others))
    resumed = trained(stages, output, workers=2, **LONG)
    for name, weights in whole.items():
        torch.testing.assert_close(resumed[name], weights, rtol=0, atol=0)
    found, wanted = (
        [json.loads(line) for line in (place / "losses.jsonl").read_text().splitlines()]
        for place in (output, tmp_path / "whole")
    )
    assert found[0].pop("before"), "it did not begin anew"
    assert found == wanted


def test_what_came_after_the_checkpoint_that_training_goes_on_from_goes(tmp_path: Path) -> None:
    """A later one that was passed over could be taken for the newest once it can be read again."""
    for name in (
        f"{CHECKPOINTS}/000000000512",
        f"{CHECKPOINTS}/000000001024",
        f"{CHECKPOINTS}/.000000000600",
        "epochs/001",
        "epochs/002",
        "policy",
    ):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "losses.jsonl").write_text('{"step": 512}\n{"step": 700}\n{"st')
    worker._clear_up(tmp_path, done=512, finished=1, epochs=3)
    assert sorted(str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*")) == [
        f"{CHECKPOINTS}/000000000512",
        "epochs/001",
    ]
    assert not (tmp_path / "policy").exists()
    assert (tmp_path / "losses.jsonl").read_text() == '{"step": 512}\n'


def test_workers_that_come_when_all_is_done_change_nothing(
    stages: Path, alone: tuple[Path, dict[str, torch.Tensor]]
) -> None:
    again = trained(stages, alone[0])
    assert all(torch.equal(again[name], weights) for name, weights in alone[1].items())


@pytest.mark.parametrize(
    ("training", "wanted"),
    [
        ({}, [-2.0, 0.5, 3.0]),
        ({"rewardClip": {"low": -1.0, "high": 1.0}}, [-1.0, 0.5, 1.0]),
        ({"rewardScale": 10.0}, [-20.0, 5.0, 30.0]),
        ({"rewardClip": {"low": 0.0, "high": 1.0}, "rewardScale": 2.0}, [0.0, 1.0, 2.0]),
    ],
)
def test_rewards_are_clipped_then_scaled_to_be_learned_from(training: dict[str, Any], wanted: list[float]) -> None:
    n, metrics = 3, np.array([[-2.0], [0.5], [3.0]], np.float32)
    data = Transitions(
        ["x"], ["left", "right"], ["reward"], state=np.zeros((n, 1), np.float32), action=np.zeros(n, int),
        propensity=np.ones(n), possible=np.ones((n, 2), bool), metrics=metrics, time_diff=np.ones(n),
        terminal=np.ones(n, bool), truncated=np.zeros(n, bool), ordinal=np.ones(n, int), mdp=np.arange(n), mdp_ids=[],
    )  # fmt: skip
    spec = JobSpec.model_validate({"actions": ["left", "right"], "training": training})
    assert rewards_to_learn_from(data, spec).tolist() == wanted


@pytest.mark.parametrize(
    ("score", "spread", "loss"),
    [(301.0, 0.0, 1.0), (-301.0, 0.0, 1.0), (0.0, 301.0, 1.0), (5.0, 1.0, float("nan")), (float("inf"), 1.0, 1.0)],
)
def test_values_that_run_away_are_told_with_a_remedy(score: float, spread: float, loss: float) -> None:
    with pytest.raises(StageError, match=r"training diverges: at step 50 .* choose cql or bcq"):
        check_converges(score, spread, [loss], 100.0, 50, "or choose cql or bcq")


def test_values_within_what_rewards_can_sum_to_go_on() -> None:
    check_converges(250.0, 290.0, [1e6], 100.0, 50, "")
    check_converges(1e9, 1e9, [1e6], float("inf"), 50, "")


def test_a_loss_that_rises_without_end_is_told_where_nothing_bounds_values() -> None:
    rising = [2.0**n for n in range(11)]
    with pytest.raises(StageError, match=r"training diverges: at step 50 .* the loss is 1\.02e\+03\. Choose cql"):
        check_converges(1.0, 1.0, rising, float("inf"), 50, "Choose cql")
    check_converges(1.0, 1.0, rising, 100.0, 50, "")  # there values tell
    check_converges(1.0, 1.0, [*rising[:5], 1.0, *rising[5:]], float("inf"), 50, "")  # it fell meanwhile
    check_converges(1.0, 1.0, [1e-6 * loss for loss in rising], float("inf"), 50, "")  # from nothing


def test_training_that_diverges_ends_at_once_and_is_not_tried_again(
    stages: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    wild = {"dqn": {"hiddenLayers": [8], "learningRate": 1e5, "targetUpdateRate": 1.0}}
    spec = SPEC.model_copy(update={"algorithm": Algorithm.model_validate(wild)})
    (worker,) = started(stages, tmp_path, spec=spec)
    assert worker.wait(60) != 0
    assert "training diverges: at step" in capfd.readouterr().err
    assert not (tmp_path / "policy").exists()
    (again,) = started(stages, tmp_path, spec=spec)
    assert again.wait(60) != 0
    assert "components/training/worker.py" in (said := capfd.readouterr().err)
    assert "in run_worker" not in said, "it refuses before it begins"


@pytest.mark.parametrize("name", ["cql", "bcq", "sac", "iql", "td3Bc", "slateQ", "behaviourCloning"])
def test_the_remedy_is_not_what_the_job_does_already(name: str) -> None:
    words = re.findall(r"\w+", _remedy(Algorithm.model_validate({name: {}})))
    assert name not in words
    assert ("targetUpdateRate" in words) == (name != "behaviourCloning")


def test_cql_may_lift_values_beyond_what_rewards_sum_to() -> None:
    n = 4
    data = Transitions(
        ["x"], ["left", "right"], ["reward"], state=np.zeros((n, 1), np.float32), action=np.zeros(n, int),
        propensity=np.ones(n), possible=np.ones((n, 2), bool), metrics=np.zeros((n, 1), np.float32),
        time_diff=np.ones(n), terminal=np.arange(n) == n - 1, truncated=np.zeros(n, bool), ordinal=np.arange(n) + 1,
        mdp=np.zeros(n, int), mdp_ids=["m"],
    )  # fmt: skip
    discounts, rewards = np.full(n, 0.9, np.float32), np.full(n, 0.01, np.float32)
    assert _most(data, discounts, rewards) == pytest.approx(0.1, rel=1e-4)
    assert _most(data, discounts, rewards, moved=1.0) == pytest.approx(10.1, rel=1e-4)


def test_values_of_slates_are_of_the_choice_that_the_job_names() -> None:
    job = {"actionSpace": "slate", "algorithm": {"slateQ": {}}}
    clicked, bought = (
        valued_by(JobSpec.model_validate(job | {"slate": {"size": 2, "choice": choice}}))
        for choice in ("clicked", "bought")
    )
    assert {name for name in clicked if clicked[name] != bought[name]} == {"slate_choice"}
    assert "slate_choice" not in valued_by(SPEC), "of others there is none"


def test_the_first_scores_of_a_network_are_no_divergence_where_rewards_are_tiny() -> None:
    check_converges(0.05, 0.05, [0.1], 1e-4, 50, "")
    check_converges(0.05, 0.05, [0.1], 0.0, 50, "")

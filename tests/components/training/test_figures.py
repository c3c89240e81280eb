"""What people watch while a policy is trained."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training.actions import Actions
from components.training.algorithms.learner import Batch, Listed
from components.training.algorithms.values import DQNLearner
from components.training.figures import Figures
from components.training.network import QNetwork
from contracts.job import DQN

SEEN = {name: torch.tensor(value) for name, value in {"td_loss": 0.5, "reward": 1.5, "q_mean": 2.0}.items()}


def learner() -> DQNLearner:
    torch.manual_seed(0)
    return DQNLearner(QNetwork(3, 2, [8]), DQN())


def probe(rows: int = 16) -> Batch:
    generator = torch.Generator().manual_seed(1)
    state, ones = torch.randn(rows, 3, generator=generator), torch.ones(rows)
    action = torch.randint(2, (rows,), generator=generator)
    return Batch(state, action, None, ones, state, action, None, ones)


def curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    board = EventAccumulator(str(directory / "tensorboard"))
    board.Reload()
    return {tag: [(event.step, event.value) for event in board.Scalars(tag)] for tag in board.Tags()["scalars"]}


def test_the_board_shows_losses_values_gradients_actions_and_the_reward(tmp_path: Path) -> None:
    made, batch, returns = learner(), probe(), torch.full((16,), 3.0)
    figures = Figures(tmp_path, made, batch, returns, Actions(["left", "right"]))
    made(batch)[0].backward()
    figures.write(figures.look(50, 1, False, SEEN), 200)
    figures.write(figures.look(100, 1, True, SEEN | {"td_loss": torch.tensor(0.25)}), 200)
    figures.close()
    found = curves(tmp_path)
    assert found["td_loss"] == [(50, 0.5), (100, 0.25)]
    assert [value for _, value in found["reward"]] == [1.5, 1.5]
    with torch.no_grad():
        scores = made.network(batch.state)
    logged = scores[range(16), batch.action]
    gradients = torch.cat([p.grad.flatten() for p in made.network.parameters()])
    for tag, value in {
        "mc_loss": (logged - returns).abs().mean(), "q_mean": 2.0, "q_stddev": logged.std(correction=0),
        "q_maximum": scores.max(), "gradient_norm": gradients.norm(),
    }.items():  # fmt: skip
        assert found[tag][0][1] == pytest.approx(float(value), rel=1e-5)
    share = float((scores.argmax(1) == 1).float().mean())
    assert found["greedy_action/right"] == [(100, pytest.approx(share))]
    assert found["greedy_action/left"] == [(100, pytest.approx(1 - share))]


def test_values_are_held_against_the_returns_that_are_known(tmp_path: Path) -> None:
    made, returns = learner(), torch.full((16,), 3.0)
    for known in (4, 0):
        returns[known:] = torch.nan
        figures = Figures(tmp_path / str(known), made, probe(), returns, Actions(["left", "right"]))
        figures.write(figures.look(50, 1, False, SEEN), 200)
        figures.close()
    with torch.no_grad():
        logged = made.network(probe().state)[range(16), probe().action]
    [(_, distance)] = curves(tmp_path / "4")["mc_loss"]
    assert distance == pytest.approx(float((logged[:4] - 3).abs().mean()), rel=1e-5)
    assert "mc_loss" not in curves(tmp_path / "0")
    assert "mc_loss" not in (tmp_path / "0" / "losses.jsonl").read_text()


def test_of_a_single_decision_all_figures_are_numbers(tmp_path: Path) -> None:
    figures = Figures(tmp_path, learner(), probe(1), torch.zeros(1), Actions(["left", "right"]))
    figures.write(figures.look(50, 1, False, SEEN), 50)
    figures.close()
    (line,) = (tmp_path / "losses.jsonl").read_text().splitlines()
    assert np.isfinite(list(json.loads(line).values())).all()


def test_a_training_that_goes_on_has_each_step_once(tmp_path: Path) -> None:
    made = learner()
    for first, steps in ((1, (50, 100, 150)), (101, (150, 200))):
        figures = Figures(tmp_path, made, probe(), torch.zeros(16), Actions(["left", "right"]), first)
        for step in steps:
            figures.write(figures.look(step, 1, False, SEEN), 200)
        figures.close()
    assert [step for step, _ in curves(tmp_path)["td_loss"]] == [50, 100, 150, 200]


@pytest.mark.parametrize("action", [[1, 2], [[1, 0], [2, 4]]])
def test_of_items_it_shows_what_those_are_like_that_the_policy_takes(tmp_path: Path, action: list[object]) -> None:
    topic = FeatureNormalization(name="topic", type="enum", values=[3.0, 5.0], how="by hand", evidence={})
    price = FeatureNormalization(name="price", type="continuous", how="by hand", evidence={})
    described = NormalizationSpec(inputs=["topic", "price"], features=[topic, price])
    items = torch.tensor([[1.0, 1, 0, 0], [2, 0, 1, 0], [4, 1, 0, 0], [8, 0, 0, 1], [16, 0, 0, 1]])
    batch = replace(probe(2), possible=Listed(items, torch.tensor([0, 0, 1, 1, 1]), 2, 3))
    taken, made = torch.tensor(action), learner()
    made.examine = lambda _: (torch.zeros(2), torch.zeros(2), taken)  # type: ignore[method-assign]
    figures = Figures(tmp_path, made, batch, torch.zeros(2), Actions([], described=described))
    figures.write(figures.look(50, 1, True, SEEN), 50)
    figures.close()
    means = items[taken.flatten()].mean(0)
    names = ("price", "topic value 3", "topic value 5", "topic other value")
    found = {name: curves(tmp_path)[f"greedy_action/{name}"] for name in names}
    assert found == {name: [(50, mean)] for name, mean in zip(names, means.tolist(), strict=True)}


def test_of_numbers_it_shows_what_the_policy_sets_them_to(tmp_path: Path) -> None:
    made, batch = learner(), probe()
    made.examine = lambda _: (torch.zeros(16), torch.zeros(16), torch.full((16, 1), 2.5))  # type: ignore[method-assign]
    figures = Figures(tmp_path, made, batch, torch.zeros(16), Actions(["price"], [(0.0, 4.0)]))
    figures.write(figures.look(50, 1, True, SEEN), 50)
    figures.close()
    assert curves(tmp_path)["greedy_action/price"] == [(50, pytest.approx(2.5))]
    assert np.isfinite([value for events in curves(tmp_path).values() for _, value in events]).all()

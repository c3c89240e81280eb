"""SlateQ: the best slate of all, a step by hand, and choices learned as people make them."""

import itertools

import numpy as np
import pytest
import torch

from components.training.algorithms.slate import SlateBatch, SlateNetwork, SlateQ, SlateQLearner, best_slate, worth
from components.training.trainer import Trainer

B, N, K = 50, 7, 3


def judged(seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(B, N + 1, generator=generator) * 3 for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("seed", range(5))
def test_no_slate_is_worth_more_than_the_best(seed: int) -> None:
    value, appeal = judged(seed)
    found = worth(value, appeal, best_slate(value, appeal, K))
    every = [worth(value, appeal, torch.tensor([slate] * B)) for slate in itertools.combinations(range(N), K)]
    torch.testing.assert_close(found, torch.stack(every).amax(0))


def test_a_slate_shows_different_items() -> None:
    value, appeal = judged(9)
    for slate in best_slate(value, appeal, K).tolist():
        assert len(set(slate)) == K


def batch(terminal: bool, chosen: int = 0) -> SlateBatch:
    items = torch.tensor([[[0.0], [1.0], [2.0]]])
    return SlateBatch(
        state=torch.zeros(1, 1), items=items, slate=torch.tensor([[2, 0]]), chosen=torch.tensor([chosen]),
        reward=torch.tensor([1.0]), next_state=torch.zeros(1, 1), next_items=items, next_slate=torch.tensor([[0, 1]]),
        discount=torch.tensor([0.0 if terminal else 0.5]),
    )  # fmt: skip


class Given(SlateNetwork):
    """Items are worth 10 times their feature and appeal by it; nothing is worth 1."""

    def judge(self, state: torch.Tensor, items: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        value = torch.cat([10 * items[:, :, 0], torch.ones(len(items), 1)], 1) + 0 * self.bias[0]
        return value, torch.cat([items[:, :, 0], torch.zeros(len(items), 1)], 1)


@pytest.mark.parametrize(("next_slate", "chosen", "q"), [("logged", 0, 20.0), ("logged", 1, 0.0), ("best", 2, 1.0)])
def test_the_value_of_what_was_chosen_moves_towards_the_next_slates_worth(
    next_slate: str, chosen: int, q: float
) -> None:
    learner = SlateQLearner(Given(1, 1, 2, [4]), SlateQ.model_validate({"nextSlate": next_slate}))
    shown = {"logged": [0, 1], "best": [2, 0]}[next_slate]
    mass = np.exp([*shown, 0])
    ahead = (mass * [10 * shown[0], 10 * shown[1], 1]).sum() / mass.sum()
    appeal = np.exp([2, 0, 0])[chosen] / np.exp([2, 0, 0]).sum()
    loss, mean = learner(batch(terminal=False, chosen=chosen))
    assert mean.item() == q
    assert loss.item() == pytest.approx((q - 1 - 0.5 * ahead) ** 2 - np.log(appeal), rel=1e-4)
    ended, _ = learner(batch(terminal=True, chosen=chosen))
    assert ended.item() == pytest.approx((q - 1) ** 2 - np.log(appeal), rel=1e-4)


def test_choices_are_learned_as_people_make_them() -> None:
    torch.manual_seed(0)
    learner = SlateQLearner(SlateNetwork(1, 1, 2, [32]), SlateQ(hiddenLayers=[32], learningRate=0.01))
    trainer, rng = Trainer(learner, 0.01), np.random.default_rng(0)  # type: ignore[arg-type]

    def chances(items: np.ndarray, slate: np.ndarray) -> np.ndarray:
        shown = np.take_along_axis(items[:, :, 0], slate, 1)
        mass = np.concatenate([np.exp(shown), np.ones((len(items), 1))], 1)
        return mass / mass.sum(1, keepdims=True)

    for _ in range(400):
        items = rng.normal(size=(256, 4, 1)).astype(np.float32)
        slate = rng.permuted(np.tile(np.arange(4), (256, 1)), axis=1)[:, :2]
        chosen = (rng.random((256, 1)) > chances(items, slate).cumsum(1)).sum(1)
        columns = [np.zeros((256, 1), np.float32), items, slate, chosen, np.zeros(256, np.float32)]
        given = [*columns, columns[0], items, slate, np.zeros(256, np.float32)]
        trainer.step(SlateBatch(*map(torch.from_numpy, given)))  # type: ignore[arg-type]
    items = rng.normal(size=(200, 4, 1)).astype(np.float32)
    slate = np.tile([0, 1], (200, 1))
    with torch.no_grad():
        _, appeal = learner.network.judge(torch.zeros(200, 1), torch.from_numpy(items))
        found = torch.softmax(torch.cat([appeal[:, :2], appeal[:, -1:]], 1), 1)
    np.testing.assert_allclose(found, chances(items, slate), atol=0.06)

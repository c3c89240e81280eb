"""SlateQ: the best slate of all, a step by hand, choices learned as people make them, and policies over slates."""

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn import functional

from components.training.algorithms.learner import Batch, Listed
from components.training.algorithms.slate import (
    SlateHead,
    SlateNetwork,
    SlateQLearner,
    best_slate,
    gains,
    judge_lists,
    judge_slates,
    most,
    on_slates,
    worth,
)
from components.training.trainer import Trainer
from contracts.job import PolicyHead, SlateQ

B, N, K = 50, 7, 3


def judged(seed: int, spread: float = 3.0) -> Tensor:
    return torch.randn(B, N + 1, 2, generator=torch.Generator().manual_seed(seed)) * spread


def apart(gain: Tensor, slate: Tensor) -> Tensor:
    """That no two items are described alike."""
    return functional.one_hot(slate, gain.shape[1]).bool()


def lists(*features: list[float]) -> Listed:
    row = torch.repeat_interleave(torch.arange(len(features)), torch.tensor([len(each) for each in features]))
    return Listed(
        torch.tensor([x for each in features for x in each])[:, None], row, len(features), max(map(len, features))
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("spread", [3.0, 10.0])
def test_no_slate_is_worth_more_than_the_best(seed: int, spread: float) -> None:
    items = judged(seed, spread)
    found = worth(on_slates(items, best_slate(items, K)))
    every = [worth(on_slates(items, torch.tensor([slate] * B))) for slate in itertools.combinations(range(N), K)]
    torch.testing.assert_close(found, torch.stack(every).amax(0))


def test_a_slate_shows_different_items() -> None:
    for slate in best_slate(judged(9), K).tolist():
        assert len(set(slate)) == K


def test_a_gain_is_what_an_item_adds_to_the_worth_of_the_slate() -> None:
    items = judged(3)
    gain, best = gains(items, K), best_slate(items, K)
    assert (gain.gather(1, best).diff(dim=1) <= 0).all()
    mass = items[:, :, 1].exp()
    whole = worth(on_slates(items, best))
    share = on_slates(items, best)[:, :, 1].exp().sum(1)
    expected = mass[:, :-1] * (items[:, :-1, 0] - whole[:, None]) / share[:, None]
    torch.testing.assert_close(gain, expected.double(), rtol=1e-3, atol=1e-4)


def test_of_items_that_add_the_same_the_first_are_shown() -> None:
    for width in (5, 12, 64):
        assert most(torch.zeros(1, width), 3).tolist() == [[0, 1, 2]]


def test_lists_of_any_length_are_judged_as_by_themselves() -> None:
    network, state = SlateNetwork(1, 1, 2, [8]), torch.randn(3, 1)
    given = [0.1, -2.0], [1.0, 0.5, -0.3, 2.0], [0.0, 0.7, 1.1]
    together = judge_lists(network, state, lists(*given))
    assert together.shape == (3, 5, 2)
    for i, items in enumerate(given):
        alone = judge_lists(network, state[i : i + 1], lists(items))
        torch.testing.assert_close(together[i, : len(items)], alone[0, :-1])
        torch.testing.assert_close(together[i, -1], alone[0, -1])
        assert (best_slate(together, 2)[i] < len(items)).all()
        torch.testing.assert_close(gains(together, 2)[i, : len(items)], gains(alone, 2)[0], rtol=1e-5, atol=1e-6)


def test_a_slate_is_judged_as_its_list_is() -> None:
    network, state, listed = SlateNetwork(1, 1, 2, [8]), torch.randn(2, 1), lists([0.1, -2.0, 0.4], [1.0, 0.5])
    of_lists = on_slates(judge_lists(network, state, listed), torch.tensor([[2, 0], [1, 0]]))
    torch.testing.assert_close(judge_slates(network, state, torch.tensor([[2, 0], [4, 3]]), listed), of_lists)


def batch(terminal: bool, chosen: int = 0) -> Batch:
    return Batch(
        state=torch.zeros(1, 1), action=torch.tensor([[2, 0]]), possible=lists([0.0, 1.0, 2.0]),
        reward=torch.tensor([1.0]), next_state=torch.zeros(1, 1), next_action=torch.tensor([[0, 1]]),
        next_possible=lists([0.0, 1.0, 2.0]), discount=torch.tensor([0.0 if terminal else 0.5]),
        chosen=torch.tensor([chosen]),
    )  # fmt: skip


class Given(SlateNetwork):
    """Items are worth 10 times their feature and appeal by it; nothing is worth 1."""

    def forward(self, pairs: Tensor) -> Tensor:
        return torch.stack([10 * pairs[:, 1], pairs[:, 1]], 1) + 0 * self.bias

    def nothing(self, state: Tensor) -> Tensor:
        return torch.tensor([[1.0, 0.0]]).expand(len(state), 2)


@pytest.mark.parametrize(("next_slate", "chosen", "q"), [("logged", 0, 20.0), ("logged", 1, 0.0), ("best", 2, 1.0)])
def test_the_value_of_what_was_chosen_moves_towards_the_next_slates_worth(
    next_slate: str, chosen: int, q: float
) -> None:
    learner = SlateQLearner(Given(1, 1, 2, [4]), SlateQ.model_validate({"nextSlate": next_slate}))
    shown = {"logged": [0, 1], "best": [2, 0]}[next_slate]
    mass = np.exp([*shown, 0])
    ahead = (mass * [10 * shown[0], 10 * shown[1], 1]).sum() / mass.sum()
    appeal = np.exp([2, 0, 0])[chosen] / np.exp([2, 0, 0]).sum()
    loss, mean, _ = learner(batch(terminal=False, chosen=chosen))
    assert mean.item() == q
    assert loss.item() == pytest.approx((q - 1 - 0.5 * ahead) ** 2 - np.log(appeal), rel=1e-4)
    ended, *_ = learner(batch(terminal=True, chosen=chosen))
    assert ended.item() == pytest.approx((q - 1) ** 2 - np.log(appeal), rel=1e-4)


def test_what_was_chosen_and_the_best_slate_are_examined() -> None:
    logged, own, slate = SlateQLearner(Given(1, 1, 2, [4]), SlateQ()).examine(batch(terminal=False, chosen=1))
    assert (logged.item(), slate.tolist()) == (0.0, [[2, 0]])
    mass = np.exp([2, 0, 0])
    assert own.item() == pytest.approx((mass * [20, 0, 1]).sum() / mass.sum(), rel=1e-5)


def test_each_decisions_best_slate_is_of_its_own_list() -> None:
    listed, nothing = lists([0.0, 1, 2], [2, 0, 1, 1]), torch.zeros(2)
    both = Batch(torch.zeros(2, 1), torch.tensor([[0, 1], [3, 4]]), listed, nothing, torch.zeros(2, 1),
                 torch.tensor([[0, 1], [3, 4]]), listed, nothing, torch.tensor([0, 0]))  # fmt: skip
    _, _, slate = SlateQLearner(Given(1, 1, 2, [4]), SlateQ()).examine(both)
    assert slate[0].tolist() == [2, 0]
    assert slate[1, 0] == 3
    assert ((slate >= 3) == torch.tensor([[False], [True]])).all()


def test_choices_are_learned_as_people_make_them() -> None:
    torch.manual_seed(0)
    learner = SlateQLearner(SlateNetwork(1, 1, 2, [32]), SlateQ(hiddenLayers=[32], learningRate=0.01))
    trainer, rng = Trainer(learner, 0.01), np.random.default_rng(0)

    def chances(items: np.ndarray, slate: np.ndarray) -> np.ndarray:
        shown = np.take_along_axis(items, slate, 1)
        mass = np.concatenate([np.exp(shown), np.ones((len(items), 1))], 1)
        return mass / mass.sum(1, keepdims=True)

    for _ in range(400):
        items = rng.normal(size=(256, 4)).astype(np.float32)
        slate = rng.permuted(np.tile(np.arange(4), (256, 1)), axis=1)[:, :2]
        chosen = (rng.random((256, 1)) > chances(items, slate).cumsum(1)).sum(1)
        listed, nothing = lists(*items.tolist()), torch.zeros(256)
        action = torch.from_numpy(slate + 4 * np.arange(256)[:, None])
        given = (nothing[:, None], action, listed, nothing, nothing[:, None], action, listed, nothing)
        trainer.step(Batch(*given, torch.from_numpy(chosen)))
    items = rng.normal(size=(200, 4)).astype(np.float32)
    slate = np.tile([0, 1], (200, 1))
    with torch.no_grad():
        of_lists = judge_lists(learner.network, torch.zeros(200, 1), lists(*items.tolist()))
        found = torch.softmax(on_slates(of_lists, torch.from_numpy(slate))[:, :, 1], 1)
    np.testing.assert_allclose(found, chances(items, slate), atol=0.06)


HEADS = [{"policy": "greedy"}, {"policy": "softmax", "temperature": 0.7}, {"policy": "epsilonGreedy", "epsilon": 0.4}]
GAIN = torch.tensor([[0.5, -1.0, 0.2, 1.5, -torch.inf]]).double()


@pytest.mark.parametrize("head", HEADS)
def test_probabilities_of_all_slates_sum_to_one_and_are_those_of_what_is_shown(head: dict[str, object]) -> None:
    made = SlateHead(PolicyHead.model_validate(head), 2)
    slates = torch.tensor(list(itertools.permutations(range(4), 2)))
    gain = GAIN.expand(len(slates), -1)
    probability = made.probability(gain, slates, apart(gain, slates))
    assert probability.sum().item() == pytest.approx(1)
    n = 20_000
    uniform = torch.rand(n, 3, generator=torch.Generator().manual_seed(0))
    shown, best = made(GAIN.expand(n, -1), uniform)
    assert (best == torch.tensor([3, 0])).all()
    often = (shown[:, None] == slates).all(2).double().mean(0)
    error = (probability * (1 - probability) / n).sqrt()
    assert ((often - probability).abs() <= 4.5 * error + 1e-9).all()


@pytest.mark.parametrize("head", HEADS)
def test_samples_stand_for_the_policy(head: dict[str, object]) -> None:
    made = SlateHead(PolicyHead.model_validate(head), 2)
    n = 4000
    slates, counts = made.samples(GAIN.expand(n, -1), 4, torch.Generator().manual_seed(1))
    assert counts.sum().item() == pytest.approx(1)
    every = torch.tensor(list(itertools.permutations(range(4), 2)))
    often = ((slates[:, :, None] == every).all(3) * counts[:, None]).sum(1).mean(0)
    gain = GAIN.expand(12, -1)
    torch.testing.assert_close(often, made.probability(gain, every, apart(gain, every)), atol=0.02, rtol=0)


def test_items_that_are_described_alike_share_a_slates_probability() -> None:
    gain, slate = torch.tensor([[1.0, 1.0, 0.0]]).double(), torch.tensor([[1, 2]])
    alike = torch.tensor([[[True, True, False], [False, False, True]]])
    for head in ({"policy": "softmax"}, {"policy": "epsilonGreedy", "epsilon": 1.0}):
        made = SlateHead(PolicyHead.model_validate(head), 2)
        alone = made.probability(gain, slate, apart(gain, slate)).item()
        assert made.probability(gain, slate, alike).item() == pytest.approx(2 * alone)
    greedy = SlateHead(PolicyHead.model_validate({"policy": "greedy"}), 1)
    assert greedy.probability(gain, slate[:, :1], alike[:, :1]).item() == 1
    assert greedy.probability(gain, slate[:, 1:], alike[:, 1:]).item() == 0


def test_one_item_that_leaves_the_others_no_chance_is_still_followed_by_others() -> None:
    made = SlateHead(PolicyHead.model_validate({"policy": "softmax", "temperature": 1e-3}), 3)
    gain = torch.tensor([[1e4, 0.0, -1e4]])
    slate, _ = made(gain, torch.tensor([[0.99, 0.99, 0.99, 0.0]]))
    assert slate.tolist() == [[0, 1, 2]]
    assert made.probability(gain, slate, apart(gain, slate)).item() == pytest.approx(1)

"""The report's pictures say what they show."""

import pytest

from contracts.job import Algorithm
from pipelines.report import _losses


@pytest.mark.parametrize(
    ("algorithm", "more", "titles"),
    [
        ("dqn", {"mc_loss": 0.5}, ["Temporal-difference loss", "Monte-Carlo loss", "Mean Q-value"]),
        # No return is known where every MDP is cut off.
        ("dqn", {}, ["Temporal-difference loss", "Mean Q-value"]),
        ("behaviourCloning", {}, ["Negative log-likelihood", "Mean score of logged actions"]),
        ("linUcb", {"mc_loss": 0.5}, ["Squared error of the expected reward", "Mean expected reward"]),
        ("logisticBandit", {"mc_loss": 0.5}, ["Cross-entropy of the reward", "Mean expected reward"]),
    ],
)
def test_losses_are_called_what_the_algorithm_minimizes(
    algorithm: str, more: dict[str, float], titles: list[str]
) -> None:
    losses = [{"step": step, "td_loss": 1 / step, "q_mean": step, **more} for step in (50, 100)]
    drawn = _losses(losses, Algorithm.model_validate({algorithm: {}}))
    assert [title for title in titles if f"<!-- {title} -->" in drawn] == titles
    assert drawn.count('id="axes_') == len(titles)

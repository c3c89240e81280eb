"""The report's pictures say what they show."""

import pytest

from pipelines.report import _losses


@pytest.mark.parametrize(
    ("more", "of_clone", "titles"),
    [
        ({"mc_loss": 0.5}, False, ["Temporal-difference loss", "Monte-Carlo loss", "Mean Q-value"]),
        # No return is known where every MDP is cut off.
        ({}, False, ["Temporal-difference loss", "Mean Q-value"]),
        ({}, True, ["Negative log-likelihood", "Mean score of logged actions"]),
    ],
)
def test_losses_are_called_what_the_algorithm_minimizes(
    more: dict[str, float], of_clone: bool, titles: list[str]
) -> None:
    drawn = _losses([{"step": step, "td_loss": 1 / step, "q_mean": step, **more} for step in (50, 100)], of_clone)
    assert [title for title in titles if f"<!-- {title} -->" in drawn] == titles
    assert drawn.count('id="axes_') == len(titles)

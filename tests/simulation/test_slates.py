"""RecSim's environments as they are published, and what SlateQ makes of a log of random slates."""

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from contracts.job import SlateQ
from simulation.slates import ENVIRONMENTS, InterestEvolution, LongTermSatisfaction, learn_from, play


@pytest.mark.parametrize("name", ENVIRONMENTS)
def test_it_is_a_gymnasium_environment(name: str) -> None:
    with pytest.warns(UserWarning, match="different from the unwrapped"):
        check_env(Distinct(ENVIRONMENTS[name]()), skip_render_check=True)


class Distinct(gymnasium.Wrapper):  # type: ignore[type-arg]
    """Slates that the checker draws may show an item twice."""

    def step(self, action: np.ndarray):  # type: ignore[no-untyped-def]
        first = int(action[0])
        return self.env.step(np.array([first, (first + 1) % 10]))


@pytest.mark.parametrize(
    ("name", "low", "high"), [("long-term satisfaction", 930, 950), ("interest evolution", 153, 155)]
)
def test_random_slates_earn_what_is_published(name: str, low: float, high: float) -> None:
    returns = play(name, None, 1500, 0).returns
    error = returns.std() / np.sqrt(len(returns))
    assert low - 3 * error <= returns.mean() <= high + 3 * error


def test_the_same_seed_gives_the_same_episodes() -> None:
    first, again, other = (play("interest evolution", None, 3, seed) for seed in (1, 1, 2))
    for column in vars(first):
        np.testing.assert_array_equal(getattr(first, column), getattr(again, column))
    assert not np.array_equal(first.user[0], other.user[0])


def test_chocolate_lowers_what_follows_and_the_first_is_always_taken() -> None:
    environment = LongTermSatisfaction()
    environment.reset(seed=0)
    after = {}
    for clickbait in (0.0, 1.0):
        environment.exposure = 0.5
        environment.items[:, 0] = clickbait
        chosen, _ = environment.show(np.array([3, 4]))
        assert chosen == 0
        after[clickbait] = environment.exposure
    assert after[0.0] == pytest.approx(1.35, abs=0.25)
    assert after[1.0] == pytest.approx(-0.65, abs=0.25)


def test_a_liked_topic_is_chosen_more_and_good_videos_give_time_back() -> None:
    environment = InterestEvolution()
    environment.reset(seed=0)
    chosen = np.zeros(3)
    spent = {}
    for _ in range(4000):
        environment.begin()
        environment.interests[:] = 0.0
        environment.interests[[0, 19]] = [-1.0, 0.5]
        environment.topics[:2] = [0, 19]
        before = environment.time
        which, reward = environment.show(np.array([0, 1]))
        chosen[which] += 1
        spent.setdefault(which, []).append(before - environment.time)
        assert reward == (4.0 if which < 2 else 0.0)
    assert chosen[0] == 0
    assert chosen[1] / 4000 == pytest.approx(1.5 / 3.5, abs=0.03)
    assert np.mean(spent[2]) == 0.5
    assert np.mean(spent[1]) == pytest.approx(4 - 4 * 0.9 * 3 / 3.4, abs=0.02)


def test_an_item_twice_on_a_slate_is_refused() -> None:
    environment = InterestEvolution()
    environment.reset(seed=0)
    with pytest.raises(ValueError, match="2 different items"):
        environment.step(np.array([3, 3]))


def test_a_log_is_what_a_product_would_write_propensities_of_items_alike_together() -> None:
    log = play("interest evolution", None, 20, 0)
    decisions = log.decisions().to_pylist()
    assert [row["mdp_id"] for row in decisions[:1]] == ["user-000000"]
    assert sum(row["sequence_number"] == 0 for row in decisions) == 20
    for row, chosen, reward in zip(decisions, log.chosen.tolist(), log.reward.tolist(), strict=True):
        listed = [dict(item) for item in row["possible_actions"]]
        first, second = (dict(item) for item in row["action"])
        wanted = listed.count(first) / 10 * (listed.count(second) - (first == second)) / 9
        assert row["action_probability"] == pytest.approx(wanted)
        assert dict(row["metrics"]) == {"reward": pytest.approx(reward), "choice": (chosen + 1) % 3}


@pytest.mark.parametrize(
    ("name", "next_slate"),
    [("long-term satisfaction", "best"), ("long-term satisfaction", "logged"), ("interest evolution", "best")],
)
def test_slates_learned_from_a_log_of_random_ones_keep_people_longer(name: str, next_slate: str) -> None:
    log, config = play(name, None, 150, 0), SlateQ(hiddenLayers=[64, 64], targetUpdateRate=0.02, nextSlate=next_slate)
    network = learn_from(log, config, 800, 0)
    learned, by_chance = (play(name, policy, 100, 1).returns for policy in (network, None))
    error = np.sqrt(learned.var() / len(learned) + by_chance.var() / len(by_chance))
    assert learned.mean() > by_chance.mean() + 3 * error

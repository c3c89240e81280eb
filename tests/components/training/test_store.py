"""Transitions over several decisions, by hand, and batches from memory and from disk."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from components.normalization.graph import NormalizationGraph
from components.normalization.spec import FeatureNormalization, NormalizationSpec
from components.training import store as stores
from components.training.batches import Shuffled
from components.training.network import Normalized
from components.training.store import Offers, Store, build_store, memory_for_states, over_steps
from components.transitions import Transitions

# Two MDPs: one of four decisions that ends, one of three that breaks off.
REWARD = np.array([1.0, 2.0, 4.0, 8.0, 1.0, 2.0, 4.0], np.float32)
NEXT = np.array([1, 2, 3, 3, 5, 6, 6])
TERMINAL = np.array([0, 0, 0, 1, 0, 0, 0], bool)
TRUNCATED = np.array([0, 0, 0, 0, 0, 0, 1], bool)
HALF = np.full(7, 0.5, np.float32)


X = FeatureNormalization(name="x", type="continuous", mean=1.0, stddev=2.0, how="by hand", evidence={})
NORMALIZED = Normalized(NormalizationGraph(NormalizationSpec(inputs=["x"], features=[X])), torch.nn.Identity())


def transitions(n: int, truncated: list[int], state: np.ndarray | None = None) -> Transitions:
    """One MDP of n decisions between the actions a and b."""
    return Transitions(
        ["x"], ["a", "b"], ["reward"], state=np.ones((n, 1), np.float32) if state is None else state,
        action=np.arange(n) % 2, propensity=np.ones(n), possible=np.ones((n, 2), bool),
        metrics=np.ones((n, 1), np.float32), time_diff=np.ones(n),
        terminal=np.zeros(n, bool), truncated=np.isin(np.arange(n), truncated), ordinal=np.arange(1, n + 1),
        mdp=np.zeros(n, int), mdp_ids=["m"],
    )  # fmt: skip


@pytest.mark.parametrize(
    ("steps", "reward", "following", "discount"),
    [
        (1, REWARD, NEXT, [0.5, 0.5, 0.5, 0, 0.5, 0.5, 0.5]),
        # The last row is no transition; nothing is known of what came after it, so that the value at it stands in.
        (
            2,
            [2, 4, 8, 8, 2, 2, 4],
            [2, 3, 3, 3, 6, 6, 6],
            [0.25, 0.25, 0, 0, 0.25, 0.5, 0.5],
        ),
        (
            9,
            [4, 6, 8, 8, 2, 2, 4],
            [3, 3, 3, 3, 6, 6, 6],
            [0, 0, 0, 0, 0.25, 0.5, 0.5],
        ),
    ],
)
def test_rewards_are_summed_to_the_end_or_to_where_the_log_breaks_off(
    steps: int, reward: list[float], following: list[int], discount: list[float]
) -> None:
    found = over_steps(REWARD, HALF, NEXT, TERMINAL, TRUNCATED, steps)
    for got, wanted in zip(found, (reward, following, discount), strict=True):
        np.testing.assert_allclose(got, wanted)


def test_a_batch_has_what_follows_each_row() -> None:
    possible = torch.tensor([[True, True]] * 6 + [[True, False]])
    parts = [torch.from_numpy(part) for part in (REWARD, NEXT, HALF)]
    store = Store(torch.arange(7.0)[:, None], torch.arange(7), possible, *parts, np.flatnonzero(~TRUNCATED))
    batch = store.batch(torch.tensor([5, 0]))
    assert batch.state.tolist() == [[5.0], [0.0]]
    assert batch.next_state.tolist() == [[6.0], [1.0]]
    assert batch.next_action.tolist() == [6, 1]
    assert batch.next_possible.tolist() == [[True, False], [True, True]]
    assert batch.reward.tolist() == [2.0, 1.0]


def test_a_clone_learns_from_decisions_of_which_nothing_more_is_known() -> None:
    n = 3
    data = transitions(n, truncated=[1, 2])
    ones = np.ones(n, np.float32)
    usable = [build_store(data, NORMALIZED, ones, ones, everything=every).usable for every in (False, True)]
    assert [rows.tolist() for rows in usable] == [[0], [0, 1, 2]]
    assert build_store(data, NORMALIZED, ones, ones).possible is None


def test_lists_of_any_length_take_no_more_room_than_their_items() -> None:
    """One decision lists a hundred thousand items, and 999 list two."""
    lengths = np.full(1000, 2)
    lengths[500] = 100_000
    offsets = torch.from_numpy(np.concatenate([[0], lengths.cumsum()]))
    items = torch.arange(int(offsets[-1])) % 70_000
    offers = Offers(torch.arange(70_000.0)[:, None].expand(-1, 3), items, offsets)
    listed, begins = offers.at(torch.tensor([3, 500, 999]))
    assert listed.features.shape == (100_004, 3)
    assert listed.row.bincount().tolist() == [2, 100_000, 2]
    assert listed.longest == 100_000
    assert begins.tolist() == listed.begins().tolist() == [0, 2, 100_002]
    assert listed.features[:3, 0].tolist() == [6.0, 7.0, float(offsets[500] % 70_000)]


def test_a_discount_of_its_own_for_each_decision() -> None:
    discount = np.array([0.5, 0.1, 1, 1, 1, 1, 1], np.float32)
    reward, _, factor = over_steps(REWARD, discount, NEXT, TERMINAL, TRUNCATED, 3)
    assert reward[0] == pytest.approx(1 + 0.5 * 2 + 0.05 * 4)
    assert factor[0] == pytest.approx(0.05)


@pytest.fixture
def mapped(tmp_path: Path) -> Transitions:
    """500 states in a file, where some actions are not possible, and something was chosen each time."""
    rng = np.random.default_rng(0)
    np.save(tmp_path / "state.npy", rng.normal(size=(500, 1)).astype(np.float32))
    data = transitions(500, truncated=[499], state=np.load(tmp_path / "state.npy", mmap_mode="c"))
    return replace(data, possible=rng.random((500, 2)) < 0.8, chosen=rng.integers(3, size=500))


@pytest.mark.parametrize("workers", [1, 3])
@pytest.mark.parametrize("at_once", [1, 1700, 1 << 19])  # one step, five (fifteen of a third), or all at a time
def test_batches_from_disk_are_those_from_memory(
    mapped: Transitions, workers: int, at_once: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rewards, discounts = np.arange(500, dtype=np.float32), np.full(500, 0.5, np.float32)
    in_memory = build_store(mapped, NORMALIZED, rewards, discounts, steps=2)
    monkeypatch.setattr(stores, "memory_for_states", lambda _: 1999.0)
    on_disk = build_store(mapped, NORMALIZED, rewards, discounts, steps=2)
    assert "the states, 500 of 1 numbers, do not fit into memory" in capsys.readouterr().err
    assert on_disk.state.data_ptr() == mapped.state.ctypes.data
    monkeypatch.setattr(stores, "AT_ONCE", at_once)
    shuffled = Shuffled(in_memory.usable, 32, 0, workers - 1, workers)
    one_by_one = [in_memory.batch(torch.from_numpy(shuffled.at(step)[0])) for step in range(3, 40)]
    for found in (list(each.batches(shuffled, 3, 40)) for each in (in_memory, on_disk)):
        assert len(found) == 37
        for batch, wanted in zip(found, one_by_one, strict=True):
            for name, value in vars(wanted).items():
                assert torch.equal(getattr(batch, name), value), name


def test_an_error_behind_the_reading_ahead_is_told(mapped: Transitions, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stores, "memory_for_states", lambda _: 0.0)
    ones = np.ones(500, np.float32)
    store = build_store(mapped, NORMALIZED, ones, ones)
    with pytest.raises(IndexError):
        list(store.batches(Shuffled(np.array([0, 5_000]), 2, 0), 0, 3))


@pytest.mark.parametrize(
    ("limit", "free"), [("max", None), ("3000000", 1_500_000), ("1000000", 500_000), ("nonsense", None)]
)
def test_a_containers_limit_counts_and_its_file_cache_does_not(
    limit: str, free: float | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, text in {"max": limit, "current": "900000", "stat": "anon 1\ninactive_file 900000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    monkeypatch.setattr(stores, "CGROUP", tmp_path)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    alone = memory_for_states(torch.device("cpu"))
    assert alone == free if free else alone > 10_000_000
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert memory_for_states(torch.device("cpu")) == pytest.approx(alone / 2, rel=0.05)

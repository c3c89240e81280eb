"""The same training in another library, by its own sampling and its own step; a line in, transitions a second out.

    python benchmarks/training_others.py d3rlpy DIRECTORY --batch 256

DIRECTORY holds `state`, `action`, `reward` and `terminal` as `.npy`, rows of whole episodes one after another. Where a
library leaves the choice, it gets what ours has: Huber's loss, fused Adam, a target that follows slowly.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HIDDEN, ACTIONS, DISCOUNT, RATE, FOLLOWS, SECONDS = (256, 256), 2, 0.99, 1e-3, 0.005, 0.5
Data = dict[str, np.ndarray]


def d3rlpy(data: Data, batch: int) -> Callable[[], object]:
    import d3rlpy
    from d3rlpy.constants import ActionSpace

    log = d3rlpy.dataset.MDPDataset(
        data["state"], data["action"][:, None], data["reward"][:, None], data["terminal"].astype(np.float32),
        action_space=ActionSpace.DISCRETE, action_size=ACTIONS,
    )  # fmt: skip
    learner = d3rlpy.algos.DoubleDQNConfig(
        batch_size=batch,
        learning_rate=RATE,
        gamma=DISCOUNT,
        encoder_factory=d3rlpy.models.VectorEncoderFactory(list(HIDDEN)),
    ).create(device="cpu:0")
    learner.build_with_dataset(log)
    return lambda: learner.update(log.sample_transition_batch(batch))


def tianshou(data: Data, batch: int) -> Callable[[], object]:
    import gymnasium
    from tianshou.algorithm import DQN
    from tianshou.algorithm.modelfree.dqn import DiscreteQLearningPolicy
    from tianshou.algorithm.optim import TorchOptimizerFactory
    from tianshou.data import ReplayBuffer
    from tianshou.utils.net.common import Net
    from tianshou.utils.torch_utils import policy_within_training_step

    features = data["state"].shape[1]
    policy = DiscreteQLearningPolicy(
        model=Net(state_shape=features, action_shape=ACTIONS, hidden_sizes=HIDDEN),
        action_space=gymnasium.spaces.Discrete(ACTIONS),
    )
    learner = DQN(
        policy=policy, optim=TorchOptimizerFactory(torch.optim.Adam, lr=RATE, fused=True), gamma=DISCOUNT,
        target_update_freq=1000, is_double=True, huber_loss_delta=1.0,
    )  # fmt: skip
    following = np.concatenate([data["state"][1:], data["state"][-1:]])
    ends = data["terminal"]
    buffer = ReplayBuffer.from_data(
        obs=data["state"], act=data["action"], rew=data["reward"], terminated=ends, truncated=np.zeros_like(ends),
        done=ends, obs_next=following,
    )  # fmt: skip

    def step() -> None:
        with policy_within_training_step(policy):
            learner.update(buffer=buffer, sample_size=batch)

    return step


def torchrl(data: Data, batch: int) -> Callable[[], object]:
    from tensordict import TensorDict
    from torchrl.data import LazyTensorStorage, OneHot, TensorDictReplayBuffer
    from torchrl.data.replay_buffers.samplers import SamplerWithoutReplacement
    from torchrl.modules import MLP, QValueActor
    from torchrl.objectives import DQNLoss, SoftUpdate

    n, features = data["state"].shape
    network = MLP(in_features=features, out_features=ACTIONS, num_cells=list(HIDDEN), activation_class=torch.nn.ReLU)
    actor = QValueActor(network, in_keys=["observation"], spec=OneHot(ACTIONS), action_space="one-hot")
    loss_of = DQNLoss(actor, loss_function="smooth_l1", delay_value=True, double_dqn=True, action_space="one-hot")
    loss_of.make_value_estimator(gamma=DISCOUNT)
    slow = SoftUpdate(loss_of, eps=1 - FOLLOWS)
    optimizer = torch.optim.Adam(loss_of.parameters(), lr=RATE, fused=True)
    state, ends = torch.from_numpy(data["state"]), torch.from_numpy(data["terminal"])[:, None]
    buffer = TensorDictReplayBuffer(storage=LazyTensorStorage(n), sampler=SamplerWithoutReplacement(), batch_size=batch)
    buffer.extend(
        TensorDict(
            {
                "observation": state,
                "action": torch.nn.functional.one_hot(torch.from_numpy(data["action"]), ACTIONS),
                "next": {
                    "observation": torch.cat([state[1:], state[-1:]]),
                    "reward": torch.from_numpy(data["reward"])[:, None],
                    "done": ends,
                    "terminated": ends,
                },
            },
            [n],
        ),
        update_priority=False,
    )

    def step() -> None:
        loss = loss_of(buffer.sample())["loss"]
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        slow.step()

    return step


LIBRARIES = {"d3rlpy": d3rlpy, "tianshou": tianshou, "torchrl": torchrl}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("library", choices=LIBRARIES)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--batch", type=int, required=True)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    names = ("state", "action", "reward", "terminal")
    data = {name: np.load(arguments.directory / f"{name}.npy") for name in names}
    step = LIBRARIES[arguments.library](data, arguments.batch)
    for _ in range(20):
        step()
    print("ready", flush=True)
    for _ in sys.stdin:
        started, done = time.perf_counter(), 0
        while (passed := time.perf_counter() - started) < SECONDS:
            step()
            done += arguments.batch
        print(f"rate {done / passed}", flush=True)


if __name__ == "__main__":
    main()

"""The RLTrainingJob: the one file that a user writes.

The same types check a job on one machine and in a cluster. Every model refuses fields that it does not know, and
`load_job` turns what is wrong into one message that names each field's path and what is allowed there.
"""

from __future__ import annotations

import difflib
import re
import types
import typing
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic.alias_generators import to_camel
from pydantic_core import ErrorDetails

API_VERSION = "bluewhale.io/v1alpha1"
SEQUENTIAL_ESTIMATORS = ("sequential_direct_method", "weighted_sequential_doubly_robust")
STEP_WISE_ESTIMATORS = (
    "stepwise_importance_sampling",
    "stepwise_direct_method",
    "stepwise_doubly_robust",
)
ESTIMATORS = STEP_WISE_ESTIMATORS + SEQUENTIAL_ESTIMATORS

REWARD = "reward"
"""The weighted sum of the metrics, judged under this name unless a metric has it."""

Fraction = Annotated[float, Field(gt=0, lt=1)]
Positive = Annotated[float, Field(gt=0)]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=52)]


class JobError(ValueError):
    """A job file that cannot be used; the message names every field at fault."""


class Model(BaseModel):
    model_config = ConfigDict(alias_generator=to_camel, extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class Metadata(Model):
    """Kubernetes object metadata, as far as a job file carries it."""

    name: Name
    namespace: str | None = None
    labels: dict[str, str] = {}
    annotations: dict[str, str] = {}


class BehaviourPolicy(Model):
    """A logistic behaviour policy over two actions, mixed with uniform exploration.

    P(second action | s) = exploration / 2 + (1 - exploration) * sigmoid(weights . s)
    """

    weights: dict[str, float] = Field(description="Weight of each state feature in the logit of the second action.")
    exploration: float = Field(0.0, ge=0, le=1, description="Probability of a uniformly random action.")


class Simulation(Model):
    """A Gymnasium environment that stands in for the product: it makes the log and plays the live traffic."""

    environment: Literal["CartPole-v1"] = Field(description="The Gymnasium environment's id.")
    behaviour_policy: BehaviourPolicy = Field(description="The policy that makes the log.")
    episodes: int = Field(500, ge=2, description="Episodes to log with the behaviour policy.")
    truth_episodes: int = Field(200, ge=2, description="Fresh episodes that measure a policy's true return.")


class Columns(Model):
    """The log's own names of columns, where they are others than ours."""

    mdp_id: str | None = Field(None, description="Column of the MDP's id.")
    sequence_number: str | None = Field(None, description="Column that orders an MDP's decisions: numbers or times.")
    event_time: str | None = Field(None, description="Column of the time of the decision.")
    state_features: str | None = Field(None, description="Column of the state's features, a map of numbers.")
    action: str | None = Field(None, description="Column of the action taken.")
    action_probability: str | None = Field(None, description="Column of the action's propensity.")
    possible_actions: str | None = Field(None, description="Column of the actions that were possible, a list.")
    metrics: str | None = Field(None, description="Column of the metrics, a map of numbers.")
    reward: str | None = Field(None, description="Column of a number that is taken as the metric `reward`.")
    truncated: str | None = Field(None, description="Column that tells whether the MDP was cut off after the step.")
    policy_version: str | None = Field(None, description="Column of the policy that acted.")


class OutcomeColumns(Model):
    """The outcomes' own names of columns, where they are others than ours."""

    mdp_id: str | None = Field(None, description="Column of the MDP's id.")
    sequence_number: str | None = Field(None, description="Column of the decision's place in its MDP, as in the log.")
    event_time: str | None = Field(None, description="Column of the time at which the outcome was reported.")
    metrics: str | None = Field(None, description="Column of the metrics, a map of numbers.")
    reward: str | None = Field(None, description="Column of a number that is taken as the metric `reward`.")
    truncated: str | None = Field(None, description="Column that tells whether the MDP was cut off after the step.")
    ended: str | None = Field(None, description="Column that tells whether the step was its MDP's last.")


class Partition(Model):
    """The partitions of a log to read, both ends included, compared as text; of a day like 2026-01-31 all hours."""

    column: str = Field("ds", min_length=1, description="The column that the log is partitioned by.")
    first: str = Field(min_length=1, description="The first value to read.")
    last: str = Field(min_length=1, description="The last value to read.")

    @model_validator(mode="after")
    def _ordered(self) -> Partition:
        if self.first > self.last:
            raise ValueError(f"first {self.first!r} must not come after last {self.last!r}")
        return self


def split_paths(text: str) -> list[str]:
    """The paths of a log: several are separated by commas, those within braces of a pattern not among them."""
    return [path for path in (part.strip() for part in re.split(r",(?![^{]*})", text)) if path]


def place_paths(text: str, root: str | PurePath) -> str:
    """The same paths, relative ones below `root`; URIs stay as they are."""
    return ",".join(path if "://" in path else str(PurePath(root) / path) for path in split_paths(text))


class OnlineStore(Model):
    """Feast's online store; any further keys of that store's configuration are passed on as they are."""

    model_config = ConfigDict(extra="allow")
    type: str = Field("sqlite", description="Feast's name of the store: `sqlite`, `redis`, ...")


class Features(Model):
    """State features by Feast: the user's own feature service, or one made of the state in the log."""

    repository: str | None = Field(
        None, description="Directory of a Feast repository (feature_store.yaml and definitions) that holds `service`."
    )
    service: str | None = Field(
        None, description="Feature service whose values are joined to each decision, as they were known at its time."
    )
    keys: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        [], max_length=16, description="Columns of the log that are join keys of the service, besides `mdp_id`."
    )
    action_key: str | None = Field(
        None, description="Join key that stands for the action taken: features joined by it describe the action."
    )
    ttl_seconds: int = Field(
        86_400, ge=1, description="Of the log's own state: a value older than this at the decision is missing."
    )
    project: str = Field(
        "bluewhale",
        pattern="^[A-Za-z0-9][A-Za-z0-9_]*$",
        max_length=63,
        description="Feast's project of the log's own state: jobs that share an online store and are not of one "
        "service need one each.",
    )
    online_store: OnlineStore = Field(
        OnlineStore(), description="Where Feast keeps the newest values of the log's own state."
    )

    @model_validator(mode="after")
    def _whole(self) -> Features:
        if bool(self.repository) != bool(self.service):
            raise ValueError("repository and service go together: set both, or neither to use the log's own state")
        if (self.keys or self.action_key) and not self.service:
            raise ValueError("keys and actionKey are join keys of a service: set repository and service too")
        if len(set(self.keys)) != len(self.keys):
            raise ValueError(f"keys {self.keys} must be distinct")
        return self


Format = Literal["auto", "parquet", "json", "csv", "orc", "table"]


class Data(Model):
    """The logged decisions, and what of them is used."""

    decision_log: str | None = Field(
        None,
        description="Path, glob or object-store URI of the decision log; several are separated by commas. Left out "
        "when a simulation makes it.",
    )
    format: Format = Field(
        "auto",
        description="How the log is stored: by its files' suffixes, else Parquet; `json` means JSON lines, `table` a "
        "name in Spark's catalog.",
    )
    columns: Columns = Columns()
    state_columns: list[str] = Field(
        [], max_length=4096, description="Columns that are state features each, in place of the map `state_features`."
    )
    partition: Partition | None = Field(None, description="Read only these partitions; all when left out.")
    outcomes: str | None = Field(
        None,
        description="Path, or name of a table, of metrics reported after the decision, joined by its key; in any of "
        "the log's formats.",
    )
    outcome_format: Format = Field("auto", description="How the outcomes are stored, as `format` says of the log.")
    outcome_columns: OutcomeColumns = OutcomeColumns()
    outcome_wait_seconds: int | None = Field(
        None, ge=0, description="An outcome reported later than this after its decision is not used, but counted."
    )
    sample_fraction: float = Field(
        1.0, gt=0, le=1, description="Share of MDPs to use, chosen by the hash of their ids: the same ones every day."
    )
    min_length: int = Field(1, ge=1, description="MDPs of fewer decisions are left out, and counted.")
    max_length: int | None = Field(None, ge=1, description="MDPs of more decisions are left out, and counted.")
    max_length_percentile: Fraction | None = Field(
        None, description="The same limit as a share of MDPs: 0.99 leaves out the longest hundredth."
    )
    n_steps: list[Annotated[int, Field(ge=1, le=2**31 - 1)]] = Field(
        [], max_length=16, description="Return over the next n decisions, a column `returns_n` for each."
    )
    reward_timeline_steps: int = Field(
        0, ge=0, le=1000, description="Metrics of this many decisions from each on, in the column `reward_timeline`."
    )
    last_step: Literal["terminal", "truncated", "column"] | None = Field(
        None,
        description="What an MDP's last logged step is: its end, a cut by the log's window, or what the log's own "
        "boolean column `truncated` says. Left out, it is taken for the end, with a warning.",
    )
    full_rows: bool = Field(
        False,
        description="Write the next state with every row, in columns `next_state_<feature>`: twice the bytes, for "
        "tools that read single rows. Training finds it in the next row.",
    )
    max_quarantine_fraction: float = Field(
        0.01, ge=0, le=1, description="Fail when more rows than this, or outcomes, are rejected."
    )
    holdout_fraction: Fraction = Field(0.3, description="Share of MDPs kept out of training, for evaluation.")
    features: Features = Features()

    def placed(self, root: str | PurePath) -> Data:
        """The same with its relative paths below `root`; a table's name is no path."""
        formats = {"decision_log": self.format, "outcomes": self.outcome_format}
        paths = {name: getattr(self, name) for name, form in formats.items() if form != "table"}
        changed: dict[str, Any] = {name: place_paths(text, root) for name, text in paths.items() if text}
        if self.features.repository:
            changed["features"] = self.features.model_copy(
                update={"repository": place_paths(self.features.repository, root)}
            )
        return self.model_copy(update=changed)


class Reward(Model):
    """What the policy is to earn."""

    metric_weights: dict[str, float] = Field(
        {"reward": 1.0}, min_length=1, description="Reward = dot product of these and the logged metrics."
    )
    discount: float = Field(0.99, ge=0, le=1, description="Discount per step, or per `discountInterval`.")
    discount_interval: Positive | None = Field(
        None,
        description="Discount by time, not by step: discount ^ (time_diff / interval), in units of sequence_number; in "
        "microseconds where that is a time, and in millionths where it has fractions.",
    )


FeatureType = Literal["binary", "probability", "continuous", "box_cox", "quantile", "enum"]


class Normalization(Model):
    """Thresholds of the paper's Algorithm 1 (arXiv 1811.00260), with its reference values as defaults."""

    max_enum_values: int = Field(10, ge=2, description="Most distinct values of an enum.")
    normality_bound: Positive = Field(1000.0, description="D'Agostino K^2 below which a feature is taken as normal.")
    box_cox_gain: Positive = Field(10.0, description="Box-Cox must lower K^2 by this factor to be used.")
    box_cox_lambda_margin: float = Field(
        0.1, ge=0, description="Box-Cox is used only where its lambda is further from 1, where it changes nothing."
    )
    probability_clamp: float = Field(
        1e-5,
        ge=1e-6,
        lt=0.5,
        description="Probabilities are kept this far from 0 and 1, before their logits are taken.",
    )
    quantiles: int = Field(20, ge=2, description="Quantiles that a feature of no simple shape is mapped by.")
    max_missing_fraction: float = Field(
        0.999, ge=0, le=1, description="A feature that is missing in more of the rows is dropped, and reported."
    )
    sample_rows: int = Field(100_000, ge=100, description="Rows sampled for the tests of normality.")
    presence: bool = Field(
        False, description="Tell the network, by one more input each, of features that are missing in some rows."
    )
    overrides: dict[str, FeatureType] = Field({}, description="Types set by hand, by feature.")


UNDERSTANDING_CHECKS = ("state_effect", "action_effect", "markov")


class Understanding(Model):
    """Whether the data is that of a Markov decision process at all, asked of a model of what follows a decision."""

    sample_rows: int = Field(
        50_000, ge=100, description="Transitions to fit models to and to try them on, about: whole MDPs."
    )
    model_steps: int = Field(1000, ge=1, description="Optimizer steps of each fitted model.")
    require: list[Literal[UNDERSTANDING_CHECKS]] = Field(  # type: ignore[valid-type]
        [],
        max_length=3,
        description="Checks that must pass before a policy is trained: what follows depends on the state "
        "(`state_effect`), on the action (`action_effect`), and on nothing before them (`markov`).",
    )


class LearnerConfig(Model):
    """What a network has, and the optimizer that trains it."""

    hidden_layers: list[Annotated[int, Field(ge=1)]] = Field(
        [128, 128], min_length=1, max_length=16, description="Units of each hidden layer."
    )
    learning_rate: Positive = Field(1e-3, description="Adam's.")


class QLearning(LearnerConfig):
    """What all learners of action values have."""

    double: bool = Field(
        True, description="Let the online network choose the next action, the target network value it."
    )
    dueling: bool = Field(True, description="Learn the state's value apart from the actions' advantages.")
    noisy: bool = Field(False, description="Noise on the heads' weights in training, whose size is learned with them.")
    next_action: Literal["best", "logged"] = Field(
        "best", description="Whose value a target adds: that of the best possible action, or of the logged one (SARSA)."
    )
    steps: int = Field(
        1, ge=1, le=1000, description="Logged rewards that a target sums before it adds a value (multi-step learning)."
    )
    target_update_rate: float = Field(0.005, gt=0, le=1, description="Share of the new weights per target update.")


class DQN(QLearning):
    """Deep Q-learning (Mnih et al. 2015), double (van Hasselt et al. 2016), dueling (Wang et al. 2016)."""


class C51(QLearning):
    """The distribution of returns over fixed atoms (Bellemare et al. 2017, arXiv 1707.06887)."""

    atoms: int = Field(51, ge=2, le=255, description="Returns that a distribution is over, equally far apart.")
    lowest_return: float = Field(description="The first atom: no discounted return should be lower.")
    highest_return: float = Field(description="The last atom: no discounted return should be higher.")

    @model_validator(mode="after")
    def _ordered(self) -> C51:
        if self.lowest_return >= self.highest_return:
            raise ValueError(f"lowestReturn {self.lowest_return} must be below highestReturn {self.highest_return}")
        return self


class QRDQN(QLearning):
    """Quantiles of the distribution of returns (Dabney et al. 2018, arXiv 1710.10044)."""

    quantiles: int = Field(51, ge=1, le=255, description="Quantiles, equally far apart.")


class CQL(QLearning):
    """Conservative Q-learning (Kumar et al. 2020, arXiv 2006.04779): actions that the log lacks are held down."""

    alpha: float = Field(1.0, ge=0, description="Weight of what holds values down, against the temporal difference.")


class BCQ(QLearning):
    """Batch-constrained Q-learning (Fujimoto et al. 2019, arXiv 1910.01708): only actions that the log would take."""

    threshold: float = Field(
        0.3,
        ge=0,
        le=1,
        description="An action counts where it is at least this likely, relative to the likeliest of those possible.",
    )


class BehaviourCloning(LearnerConfig):
    """The logged policy itself, learned: the baseline to beat."""


class ActorCritic(LearnerConfig):
    """What all learners of continuous actions have: an actor that chooses, and critics that value what it chooses."""

    hidden_layers: list[Annotated[int, Field(ge=1)]] = Field(
        [256, 256], min_length=1, max_length=16, description="Units of each hidden layer, of actor and critics alike."
    )
    target_update_rate: float = Field(0.005, gt=0, le=1, description="Share of the new weights per target update.")


class DDPG(ActorCritic):
    """Deep deterministic policy gradient (Lillicrap et al. 2016, arXiv 1509.02971)."""


class TD3(ActorCritic):
    """Twin delayed DDPG (Fujimoto et al. 2018, arXiv 1802.09477)."""

    target_noise: float = Field(0.2, ge=0, description="Deviation of the noise on a target's action, of half a range.")
    noise_limit: float = Field(0.5, ge=0, description="The most that such noise may be.")
    policy_delay: int = Field(2, ge=1, le=100, description="Steps of the critics to each step of the actor.")


class TD3BC(TD3):
    """TD3 with behaviour cloning, for logs (Fujimoto and Gu 2021, arXiv 2106.06860)."""

    alpha: float = Field(2.5, gt=0, description="Weight of values against being like the log; low clones.")


class SAC(ActorCritic):
    """Soft actor-critic with a learned temperature (Haarnoja et al. 2018, arXiv 1812.05905)."""

    target_entropy: float | None = Field(
        None, description="Entropy that the temperature is learned for; minus the number of actions' dimensions."
    )


class IQL(ActorCritic):
    """Implicit Q-learning, for logs (Kostrikov et al. 2022, arXiv 2110.06169): never asks of an action not logged."""

    expectile: float = Field(0.7, gt=0.5, lt=1, description="High is nearer to the best logged action's value.")
    inverse_temperature: float = Field(3.0, ge=0, description="High takes better actions, low clones the log.")


class SlateQ(LearnerConfig):
    """What a choice from a slate is worth and how likely it is (Ie et al. 2019, arXiv 1905.12767)."""

    next_slate: Literal["best", "logged"] = Field(
        "best", description="Whose worth a target adds: that of the best slate, or of the logged one (SARSA)."
    )
    target_update_rate: float = Field(0.005, gt=0, le=1, description="Share of the new weights per target update.")


class LinearBandit(Model):
    """A linear model of each action's reward, and how sure it is: what comes after the decision does not count."""

    regularization: Positive = Field(1.0, description="Of ridge regression: decisions that weigh against any weight.")


class LinUCB(LinearBandit):
    """Upper confidence bounds (Li et al. 2010, arXiv 1003.0146); to be served greedily."""

    alpha: float = Field(1.0, ge=0, description="Deviations that are added to what is expected: high explores.")


class LinearThompson(LinearBandit):
    """Thompson sampling (Agrawal and Goyal 2013, arXiv 1209.3352); to be served by softmax at temperature 1."""

    deviation: Positive = Field(1.0, description="Of the reward's noise: high explores.")


class LogisticBandit(Model):
    """A logistic model of each action's reward, which lies in [0, 1]; to be served by epsilonGreedy."""

    learning_rate: Positive = Field(1e-2, description="Adam's.")


class Algorithm(Model):
    """The learning algorithm: exactly one."""

    dqn: DQN | None = Field(None, description="Deep Q-learning.")
    c51: C51 | None = Field(None, description="Distributional, over fixed atoms.")
    qr_dqn: QRDQN | None = Field(None, description="Distributional, by quantiles.")
    cql: CQL | None = Field(None, description="Conservative Q-learning.")
    bcq: BCQ | None = Field(None, description="Batch-constrained Q-learning.")
    behaviour_cloning: BehaviourCloning | None = Field(None, description="The logged policy, learned.")
    ddpg: DDPG | None = Field(None, description="Deep deterministic policy gradient, for continuous actions.")
    td3: TD3 | None = Field(None, description="Twin delayed DDPG, for continuous actions.")
    td3_bc: TD3BC | None = Field(None, description="TD3 held near the log, for continuous actions.")
    sac: SAC | None = Field(None, description="Soft actor-critic, for continuous actions.")
    iql: IQL | None = Field(None, description="Implicit Q-learning, for continuous actions.")
    slate_q: SlateQ | None = Field(None, description="Values and likelihoods of choices, for slates.")
    lin_ucb: LinUCB | None = Field(None, description="Contextual bandit: linear upper confidence bounds.")
    linear_thompson: LinearThompson | None = Field(None, description="Contextual bandit: linear Thompson sampling.")
    logistic_bandit: LogisticBandit | None = Field(None, description="Contextual bandit: logistic regression.")

    @model_validator(mode="before")
    @classmethod
    def _filled_in(cls, given: Any) -> Any:
        if isinstance(given, dict) and all(value is None for value in given.values()):
            return given | {"dqn": DQN()}
        return given

    @model_validator(mode="after")
    def _one(self) -> Algorithm:
        given = [to_camel(name) for name, value in self if value is not None]
        if len(given) != 1:
            raise ValueError(f"set exactly one: found {' and '.join(given)}")
        return self

    @property
    def name(self) -> str:
        """Of the field that is set."""
        return next(to_camel(name) for name, value in self if value is not None)

    @property
    def config(self) -> LearnerConfig | LinearBandit | LogisticBandit:
        """What that field says."""
        config: LearnerConfig | LinearBandit | LogisticBandit = next(value for _, value in self if value is not None)
        return config

    @property
    def learning_rate(self) -> float:
        """Of the optimizer; 0 where nothing is learned by steps."""
        return 0.0 if isinstance(self.config, LinearBandit) else self.config.learning_rate


OF_VALUES = ("dqn", "c51", "qrDqn", "cql", "bcq")
ALGORITHMS = {
    "discrete": (*OF_VALUES, "behaviourCloning", "linUcb", "linearThompson", "logisticBandit"),
    "parametric": (*OF_VALUES, "behaviourCloning"),
    "continuous": ("ddpg", "td3", "td3Bc", "sac", "iql"),
    "slate": ("slateQ",),
}
"""Those that learn from each action space."""

OPTIONAL_SETTINGS = ("training.stepsPerEpoch", "algorithm.sac.targetEntropy")
"""What a sweep may set though a job need not."""

Quantity = Annotated[str, Field(pattern=r"^[0-9]+(\.[0-9]+)?(m|k|Ki|M|Mi|G|Gi|T|Ti)?$")]


class Resources(Model):
    """What a pod asks for and is held to."""

    cpu: Quantity = Field("1", description="CPU cores, as a Kubernetes quantity.")
    memory: Quantity = Field("2Gi", description="Memory, as a Kubernetes quantity.")
    gpus: int = Field(0, ge=0, le=16, description="GPUs (nvidia.com/gpu) of each pod; a process trains on each.")


class Toleration(Model):
    """A taint that pods may be placed in spite of, as in a pod's own spec."""

    key: str | None = Field(None, description="Taint key; left out, every key matches.")
    operator: Literal["Exists", "Equal"] = Field("Equal", description="How the value is compared.")
    value: str | None = Field(None, description="Taint value to equal.")
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = Field(
        None, description="Taint effect; left out, every effect matches."
    )


class Volume(Model):
    """A persistent volume claim that training pods mount."""

    claim_name: str = Field(min_length=1, description="The claim, in the job's namespace.")
    mount_path: str = Field(pattern="^/", description="Where the pods see it.")
    sub_path: str = Field("", description="Directory of the volume to mount; its root when empty.")


class Bounds(Model):
    """Between which a number lies."""

    low: float = Field(description="The least.")
    high: float = Field(description="The most.")

    @model_validator(mode="after")
    def _ordered(self) -> Bounds:
        if self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        return self


class Slate(Model):
    """Items shown together, of which people choose one or none."""

    size: int = Field(ge=1, le=64, description="Items that each slate shows.")
    choice: str = Field(
        "choice",
        min_length=1,
        description="Metric that tells what was chosen: 1 for the first item shown, 2 for the second; 0, or no value, "
        "for nothing.",
    )


class Workers(Model):
    """Data-parallel training workers: training goes on with `min`, and uses up to `max`."""

    min: int = Field(1, ge=1, le=1024, description="Fewest workers to train with.")
    max: int = Field(1, ge=1, le=1024, description="Most workers; a run on one machine starts this many.")

    @model_validator(mode="after")
    def _ordered(self) -> Workers:
        if self.min > self.max:
            raise ValueError(f"min {self.min} must not exceed max {self.max}")
        return self


class Training(Model):
    """How the policy is learned, and on what."""

    workers: Workers = Field(Workers(), description="Data-parallel workers, elastic between two numbers.")
    epochs: int = Field(10, ge=1, description="Each ends with a snapshot of the policy that evaluation follows.")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="Optimizer steps per epoch; one pass over the data when left out."
    )
    checkpoint_seconds: int = Field(
        300,
        ge=0,
        description="A checkpoint is written after each epoch, and within a long one when the last is so old: at the "
        "first look (after 50 steps or 102,400 transitions, whichever are more) from then on.",
    )
    batch_size: int = Field(512, ge=1, description="Transitions per optimizer step, over all workers together.")
    reward_clip: Bounds | None = Field(
        None, description="Learn from rewards held between these; evaluation judges by what was logged."
    )
    reward_scale: Positive = Field(1.0, description="Learn from rewards times this, after clipping; likewise.")
    precision: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="Of hidden layers in training; on GPUs and some CPUs bfloat16 is faster for wide layers and large "
        "batches: training warns where it is not.",
    )
    compile: bool = Field(
        False,
        description="Turn a step into machine code first, which takes seconds and a C++ compiler: faster from then on, "
        "most of all in bfloat16. For algorithms over named actions, except bandits.",
    )
    scheduler: Literal["kubernetes_indexed_job", "kubernetes"] = Field(
        "kubernetes_indexed_job",
        description="TorchX scheduler for several workers in a cluster: plain Indexed Jobs, or `kubernetes`, which "
        "needs Volcano.",
    )
    resources: Resources = Field(Resources(), description="Of each worker's pod.")
    node_selector: dict[str, str] = Field({}, description="Labels of the nodes that may run the workers.")
    tolerations: list[Toleration] = Field([], max_length=16, description="Taints that the workers tolerate.")
    volumes: list[Volume] = Field([], max_length=16, description="Further claims that the workers mount.")

    @model_validator(mode="after")
    def _divides(self) -> Training:
        if self.batch_size % self.workers.max:
            raise ValueError(f"batchSize {self.batch_size} must be a multiple of workers.max {self.workers.max}")
        if self.batch_size % (processes := self.workers.max * max(1, self.resources.gpus)):
            raise ValueError(
                f"batchSize {self.batch_size} must be a multiple of {processes}, workers.max times resources.gpus"
            )
        return self


class SweepParameter(Model):
    """What a setting is tried with: numbers from `low` to `high`, or some choices."""

    low: float | None = Field(None, description="The least.")
    high: float | None = Field(None, description="The most.")
    log: bool = Field(False, description="Try orders of magnitude alike: 0.1 to 1 as often as 1 to 10.")
    choices: list[str] = Field(
        [], max_length=32, description="Each as it would stand in the job: `[64, 64]`, `true`, `0.5`."
    )

    @model_validator(mode="after")
    def _whole(self) -> SweepParameter:
        ranged = self.low is not None and self.high is not None
        if ranged == bool(self.choices) or (self.low is None) != (self.high is None):
            raise ValueError("set low and high, or choices")
        if self.low is not None and self.high is not None and self.low >= self.high:
            raise ValueError(f"low {self.low} must be below high {self.high}")
        if self.log and (self.low is None or self.low <= 0):
            raise ValueError("log needs a low above 0")
        try:
            self.values()
        except yaml.YAMLError as error:
            raise ValueError(f"choices: not valid YAML: {' '.join(str(error).split())}") from None
        return self

    def values(self) -> list[Any]:
        """The choices, or both ends."""
        return [yaml.safe_load(text) for text in self.choices] or [self.low, self.high]


class Sweep(Model):
    """Search settings by training with them and judging by the gate's estimate, on MDPs that the gate does not see."""

    parameters: dict[str, SweepParameter] = Field(
        min_length=1, max_length=16, description="By path in the job, such as `algorithm.cql.alpha`."
    )
    trials: int = Field(20, ge=2, le=1000, description="Settings to try; the first are the job's own.")
    epochs: int | None = Field(None, ge=1, description="Of each trial; the job's own when left out.")


class Gate(Model):
    """Let a policy pass only when the lower bound of an estimate, relative to the logged policy, is high enough."""

    enabled: bool = Field(True, description="False lets every policy pass.")
    metric: str = Field("reward", description="The reward, or one of the logged metrics.")
    estimator: Literal[ESTIMATORS] = Field(  # type: ignore[valid-type]
        "weighted_sequential_doubly_robust", description="Whose estimate is judged."
    )
    minimum_relative: float = Field(1.0, description="Smallest accepted lower bound; 1 is the logged policy's value.")


class Evaluation(Model):
    """Counterfactual policy evaluation on held-out MDPs."""

    confidence: Fraction = Field(0.95, description="Level of the bootstrap intervals.")
    bootstrap_samples: int = Field(1000, ge=100, description="Resamples of the held-out MDPs.")
    sample_rows: int = Field(
        1_000_000,
        ge=100,
        description="Most decisions to estimate from, about, and as many others to fit models to: whole MDPs.",
    )
    fitted_q_steps: int = Field(
        1500,
        ge=1,
        description="Optimizer steps of each fitted model. Values over several decisions, of the first epoch and of "
        "the last, take more where discount and MDPs reach further; a model of choices may take fewer.",
    )
    gate: Gate = Field(Gate(), description="What a policy must be shown to reach before it is exported to a rollout.")


class PolicyHead(Model):
    """How the served policy chooses among actions by their scores."""

    policy: Literal["softmax", "greedy", "epsilonGreedy", "threshold"] = Field(
        "softmax",
        description="Sample from a softmax at `temperature`; take the best; explore with probability `epsilon`; or, of "
        "two actions, take the second where the sigmoid of its advantage reaches `threshold`.",
    )
    temperature: Positive = Field(1.0, description="Of the softmax over scores; high is near uniform.")
    epsilon: float = Field(0.05, ge=0, le=1, description="Share of decisions that are uniform over possible actions.")
    threshold: Fraction = Field(0.5, description="Above a half the second action must promise more than the first.")

    @property
    def decisive(self) -> dict[str, Any]:
        """All of it that the policy depends on."""
        uses = {"softmax": "temperature", "epsilonGreedy": "epsilon", "threshold": "threshold"}
        return self.model_dump(by_alias=True, include={"policy", uses.get(self.policy, "policy")})


class Export(PolicyHead):
    """The form in which the policy is served."""

    backend: Literal["python", "onnxruntime"] = Field(
        "python", description="Triton backend of the exported model; onnxruntime needs a server that has it."
    )


class Canary(Model):
    """Move MDPs to the candidate in steps, each on evidence."""

    weights: list[Annotated[float, Field(gt=0, le=1)]] = Field(
        [0.1, 0.5, 1.0],
        min_length=1,
        max_length=32,
        description="Share of MDPs that the candidate answers, step by step; it must rise.",
    )
    metric: str = Field("reward", description="Metric whose total per MDP the arms are compared by.")
    minimum_relative: float = Field(
        1.0, description="The candidate's mean must be shown to reach this share of the stable policy's."
    )
    minimum_mdps: int = Field(
        30, ge=2, description="Finished MDPs of the candidate in each step, and of stable, before the metric is judged."
    )
    significance: Fraction = Field(0.05, description="Error rate of the sequential test over the whole rollout.")
    max_error_fraction: float = Field(0.01, ge=0, le=1, description="Candidate calls that may fail or come late.")
    max_latency_ms: float = Field(
        100.0, gt=0, lt=1000, description="Largest accepted 99th percentile of the candidate's latency."
    )
    deadline_ms: Positive = Field(250.0, description="A candidate slower than this is answered for by stable.")
    step_timeout_seconds: Positive = Field(120.0, description="A step that has not passed by then is rolled back.")

    @model_validator(mode="after")
    def _rises(self) -> Canary:
        if sorted(set(self.weights)) != self.weights:
            raise ValueError(f"weights {self.weights} must rise from step to step")
        return self


class Deploy(Model):
    """Where the policy goes once the gate has let it pass."""

    service: Name | None = Field(None, description="The PolicyService to roll out on; the job's own name if left out.")
    canary: Canary = Field(Canary(), description="How traffic moves to the policy.")


class Spark(Model):
    """The Spark engine of timeline, features and normalization in a cluster."""

    executors: int = Field(0, ge=0, le=1000, description="Executor pods; 0 runs Spark inside the stage's own pod.")
    executor_cores: int = Field(1, ge=1, le=64, description="Cores of each executor.")
    executor_memory: Quantity = Field("2Gi", description="Memory of each executor.")
    driver: Resources = Field(Resources(), description="Of the stage's pod, which is Spark's driver.")


class Storage(Model):
    """The ReadWriteMany volume that the pods of a namespace share: logs, work in progress, served policies."""

    claim_name: str = Field("bluewhale", min_length=1, description="The claim, in the job's namespace.")
    mount_path: str = Field("/var/bluewhale", pattern="^/", description="Where every pod sees the volume.")


class Images(Model):
    """Container images, and the secrets to pull them with."""

    spark: str | None = Field(None, description="Of timeline, features and normalization; the operator's default.")
    training: str | None = Field(None, description="Of all stages from understanding on; likewise.")
    pull_policy: Literal["Always", "IfNotPresent", "Never"] = Field("IfNotPresent", description="As in a pod's spec.")
    pull_secrets: list[str] = Field([], max_length=16, description="Names of secrets in the job's namespace.")


class Schedule(Model):
    """Run the job again and again: each time a child RLTrainingJob is made, warm-started from the promoted policy."""

    cron: str = Field(
        pattern=r"^\S+( +\S+){4}$",
        max_length=100,
        description="Five fields: minute, hour, day, month, weekday.",
    )
    time_zone: str = Field("UTC", description="IANA name of the time zone that the fields are in.")
    concurrency_policy: Literal["Allow", "Forbid", "Replace"] = Field(
        "Forbid", description="What to do when the run before is still at work: start, skip, or end that one first."
    )
    starting_deadline_seconds: int = Field(
        3600, ge=10, description="A run missed by more than this is skipped; of several missed ones the last is made."
    )
    successful_runs_history_limit: int = Field(3, ge=0, le=100, description="Succeeded children kept.")
    failed_runs_history_limit: int = Field(3, ge=0, le=100, description="Failed children kept.")


class JobSpec(Model):
    """What to learn from, how, and where the policy goes."""

    action_space: Literal["discrete", "parametric", "continuous", "slate"] = Field(
        "discrete",
        description="What an action is: one of `actions`; one of a list of the decision's own, each described by "
        "numbers; numbers that are chosen freely; or a slate of several of such a list, from which people choose.",
    )
    actions: list[Annotated[str, Field(min_length=1, max_length=128)]] = Field(
        [], max_length=256, description="The discrete actions, two or more; none in another action space."
    )
    action_bounds: dict[str, Bounds] = Field(
        {}, description="Of a continuous action's numbers; what the log has as least and most when left out."
    )
    slate: Slate | None = Field(None, description="What a slate is; needed in that action space, and only there.")
    seed: int = Field(0, ge=0, lt=2**31, description="Of everything random; the same seed gives the same weights.")
    simulation: Simulation | None = None
    data: Data = Data()
    reward: Reward = Reward()
    normalization: Normalization = Normalization()
    understanding: Understanding = Understanding()
    algorithm: Algorithm = Algorithm()
    training: Training = Training()
    sweep: Sweep | None = None
    evaluation: Evaluation = Evaluation()
    export: Export = Export()
    deploy: Deploy = Deploy()
    spark: Spark = Spark()
    storage: Storage = Storage()
    images: Images = Images()
    schedule: Schedule | None = None
    suspend: bool = Field(False, description="True stops the run and keeps what is finished; false goes on from there.")
    active_deadline_seconds: int | None = Field(
        None, ge=1, description="The job fails when it has been at work for longer; a resumed job starts anew."
    )
    backoff_limit: int = Field(2, ge=0, le=20, description="Retries of each stage after a failure that may pass.")
    ttl_seconds_after_finished: int | None = Field(
        None, ge=0, description="Delete the job this long after its end; kept when left out."
    )
    managed_by: str = Field(
        "bluewhale.io/operator",
        max_length=63,
        description="The controller that runs the job; BlueWhale's leaves other names alone.",
    )

    @model_validator(mode="after")
    def _consistent(self) -> JobSpec:
        if self.action_space == "discrete" and len(self.actions) < 2:
            raise ValueError("actions must name two or more discrete actions, or actionSpace be another")
        if self.action_space != "discrete" and self.actions:
            raise ValueError(f"actions are discrete: leave them out where actionSpace is {self.action_space}")
        if self.action_space != "discrete" and self.data.features.action_key:
            raise ValueError("data.features.actionKey stands for a discrete action's name: actionSpace has none")
        if self.action_space != "continuous" and self.action_bounds:
            raise ValueError(f"actionBounds are those of continuous actions: actionSpace is {self.action_space}")
        if (self.action_space == "slate") != (self.slate is not None):
            raise ValueError("slate and actionSpace slate go together: set slate.size, the items that a slate shows")
        if self.action_space != "discrete" and self.deploy.service:
            raise ValueError(f"deploy.service: a policy over {self.action_space} actions is exported, not rolled out")
        if len(set(self.actions)) != len(self.actions):
            raise ValueError(f"actions {self.actions} must be distinct")
        if self.training.compile and (
            self.action_space != "discrete" or isinstance(self.algorithm.config, LinearBandit | LogisticBandit)
        ):
            raise ValueError("training.compile is for algorithms over named actions, except bandits: leave it out")
        if self.export.policy == "threshold" and len(self.actions) != 2:
            raise ValueError("export.policy threshold is for two actions: choose another where there are more")
        for path, parameter in (self.sweep.parameters if self.sweep else {}).items():
            for value in parameter.values():
                self._check_setting(path, value)
        if self.simulation and self.data.decision_log:
            raise ValueError("set either simulation or data.decisionLog: a simulation makes its own log")
        return self

    def _check_setting(self, path: str, value: Any) -> None:
        if not path.startswith(("algorithm.", "training.")):
            raise ValueError(f"sweep.parameters.{path}: only settings of algorithm and training are searched")
        if path == "training.epochs" or path.startswith("training.workers"):
            raise ValueError(f"sweep.parameters.{path}: not searched; sweep.epochs are those of a trial")
        try:
            self.with_settings({path: value})
        except (KeyError, TypeError):
            raise ValueError(f"sweep.parameters.{path}: this job has no such setting") from None
        except ValidationError as error:
            raise ValueError(f"sweep.parameters.{path}: {value!r} is refused: {explain(error.errors()[0])}") from None

    def with_settings(self, settings: dict[str, Any]) -> JobSpec:
        """The same job, without its sweep, some of whose settings are others; a whole float serves as an integer.

        Raises `KeyError` for a path that is not there and `ValidationError` for a value that is refused.
        """
        document = self.model_dump(by_alias=True, exclude={"sweep"}, exclude_none=True)
        for path, value in settings.items():
            *outer, last = path.split(".")
            level: Any = document
            for part in outer:
                level = level[part]
            if not isinstance(level, dict):
                raise KeyError(last)
            known = level.get(last)
            if last not in level and path not in OPTIONAL_SETTINGS:
                raise KeyError(last)
            whole = isinstance(value, float) and value.is_integer() and not isinstance(known, float)
            level[last] = int(value) if whole else value
        return JobSpec.model_validate(document)

    def deciding(self) -> str:
        """All that decides what is learned, as JSON: how often training is kept, and what it runs on, do not."""
        runs_on = {"workers", "scheduler", "resources", "node_selector", "tolerations", "volumes"}
        return self.model_dump_json(exclude={"training": {"checkpoint_seconds", *runs_on}})

    def only(self, *sections: str) -> str:
        """The named sections, what an action is, and the seed as JSON: what a stage reads, lest others make it stale.

        A dot leads into a section: `evaluation.gate.metric`.
        """
        kept: dict[str, Any] = {}
        for path in ("action_space", "actions", "slate", "seed", *sections):
            *outer, last = path.split(".")
            level = kept
            for part in outer:
                level = level.setdefault(part, {})
            level[last] = True
        return self.model_dump_json(by_alias=True, include=kept)


SCHEDULED_NAME_LENGTH = 41
SCHEDULED_NAME_TOO_LONG = "metadata.name of a job with a schedule must have at most 41 characters: its runs add 11"


class RLTrainingJob(Model):
    api_version: Literal["bluewhale.io/v1alpha1"]
    kind: Literal["RLTrainingJob"]
    metadata: Metadata
    spec: JobSpec

    @model_validator(mode="after")
    def _whole(self) -> RLTrainingJob:
        if not (self.spec.simulation or self.spec.data.decision_log):
            raise ValueError("spec.data.decisionLog is missing: name the log's path, or a spec.simulation to make one")
        space, algorithm = self.spec.action_space, self.spec.algorithm.name
        if algorithm not in (fit := ALGORITHMS[space]):
            raise ValueError(
                f"spec.algorithm.{algorithm} cannot learn from {space} actions: set one of {', '.join(fit)}, "
                "or another actionSpace"
            )
        slate, gate = self.spec.slate, self.spec.evaluation.gate
        # Not asked of a part of a job, which is given to a stage without what it rewards.
        if slate and slate.choice in self.spec.reward.metric_weights:
            raise ValueError(
                f"spec.reward.metricWeights.{slate.choice}: slate.choice is a place in the slate, and earns nothing"
            )
        if space == "continuous" and (gate.enabled or self.spec.sweep) and "direct_method" not in gate.estimator:
            raise ValueError(
                "spec.evaluation.gate.estimator: a policy over continuous actions has no propensities: set "
                "sequential_direct_method or stepwise_direct_method, or gate.enabled false"
            )
        if self.spec.schedule and len(self.metadata.name) > SCHEDULED_NAME_LENGTH:
            raise ValueError(SCHEDULED_NAME_TOO_LONG)
        return self


def load_job(path: str | Path) -> RLTrainingJob:
    """Read and check a job file; raises `JobError` with one line per field at fault."""
    path = Path(path)
    try:
        document = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise JobError(f"{path}: no such job file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise JobError(f"{path}: cannot be read as a job file: {error}") from None
    except yaml.YAMLError as error:
        raise JobError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise JobError(f"{path}: expected an RLTrainingJob, found {type(document).__name__}")
    try:
        return RLTrainingJob.model_validate(document)
    except ValidationError as error:
        lines = "\n".join(f"  {explain(e)}" for e in error.errors())
        raise JobError(f"{path}: not a valid RLTrainingJob\n{lines}") from None


def explain(error: ErrorDetails) -> str:
    """One line for a field at fault: its path, what is wrong, and what is allowed there."""
    path = ".".join(str(part) for part in error["loc"]) or "job"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        allowed = sorted(_fields_at(error["loc"][:-1]))
        close = difflib.get_close_matches(str(error["loc"][-1]), allowed, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        return f"{path}: unknown field; {hint}Allowed here: {', '.join(allowed)}"
    if error["type"] == "missing":
        return f"{path}: required, but missing"
    found = "" if error["type"] == "value_error" else f", found {error['input']!r}"
    return f"{path}: {message[0].lower()}{message[1:]}{found}"


def _fields_at(loc: tuple[Any, ...]) -> list[str]:
    model: Any = RLTrainingJob
    for part in loc:
        field = next((f for f in model.model_fields.values() if f.alias == part), None)
        if field is None:
            return []
        model = _model_in(field.annotation)
    return [field.alias for field in model.model_fields.values()]


def _model_in(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation

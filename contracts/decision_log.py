"""The decision log: what the product or serving writes, and the timeline reads. One row per decision."""

import pyarrow as pa

SCHEMA_VERSION = 1

SCHEMA = pa.schema(
    [
        pa.field("mdp_id", pa.string(), nullable=False),  # the episode: a user, a session, a game
        pa.field("sequence_number", pa.int64(), nullable=False),  # orders the decisions of an MDP
        pa.field("event_time", pa.timestamp("us", tz="UTC")),  # when the decision was made
        pa.field("state_features", pa.map_(pa.string(), pa.float64())),  # what was known then; absent = missing
        pa.field("action", pa.string()),
        pa.field("action_probability", pa.float64()),  # propensity under the policy that acted, in (0, 1]
        pa.field("possible_actions", pa.list_(pa.string())),  # null: all of the job's actions
        pa.field("metrics", pa.map_(pa.string(), pa.float64())),  # what the decision brought
        pa.field("truncated", pa.bool_()),  # true: the MDP was cut off after this step, it did not end
        pa.field("policy_version", pa.string()),  # digest of the policy that acted
    ],
    metadata={"bluewhale.decision_log.version": str(SCHEMA_VERSION)},
)

_FEATURES = pa.map_(pa.string(), pa.float64())


def schema(action_space: str = "discrete") -> pa.Schema:
    """The log's columns where actions are `discrete` (a name), `parametric` or `continuous` (numbers by name).

    A `slate` is a list of the items shown, first to last, each as numbers by name.
    """
    if action_space == "discrete":
        return SCHEMA
    action = pa.list_(_FEATURES) if action_space == "slate" else _FEATURES
    described = {"action": action, "possible_actions": pa.list_(_FEATURES)}
    return pa.schema([f.with_type(described.get(f.name, f.type)) for f in SCHEMA], metadata=SCHEMA.metadata)


OUTCOMES_SCHEMA = pa.schema(
    [
        SCHEMA.field("mdp_id"),
        SCHEMA.field("sequence_number"),
        SCHEMA.field("event_time"),  # when it was reported: of a metric reported twice the later value counts
        SCHEMA.field("metrics"),
        SCHEMA.field("truncated"),
        pa.field("ended", pa.bool_()),  # true: no decision of this MDP follows
    ]
)
"""What is reported of a decision after it was made, by its key."""

_SPARK_TYPES = {
    pa.string(): "string",
    pa.int64(): "bigint",
    pa.float64(): "double",
    pa.bool_(): "boolean",
    pa.timestamp("us", tz="UTC"): "timestamp",
    _FEATURES: "map<string,double>",
    pa.list_(pa.string()): "array<string>",
    pa.list_(_FEATURES): "array<map<string,double>>",
}


def spark_ddl(schema: pa.Schema) -> str:
    """The schema in Spark's DDL, all columns nullable."""
    return ", ".join(f"{field.name} {_SPARK_TYPES[field.type]}" for field in schema)

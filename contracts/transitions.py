"""Names of columns in transitions and training data that stand for one feature each."""

STATE_PREFIX = "state_"
NEXT_STATE_PREFIX = "next_state_"
ACTION_PREFIX = "action_feature_"
FEAST_NAME_TAG = "bluewhale.io/feature"
"""Of a field in a Feast view whose feature has a name that Feast does not take: its own name."""

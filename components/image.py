"""The container images that the components run in on a cluster."""

import os

SPARK_IMAGE = os.environ.get("BLUEWHALE_SPARK_IMAGE", "ghcr.io/bluewhale-rl/spark:0.1.0")
TRAINING_IMAGE = os.environ.get("BLUEWHALE_TRAINING_IMAGE", "ghcr.io/bluewhale-rl/training:0.1.0")

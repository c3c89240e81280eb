"""The container image that every component runs in on a cluster."""

import os

IMAGE = os.environ.get("BLUEWHALE_IMAGE", "ghcr.io/bluewhale-rl/python-training:0.1.0")

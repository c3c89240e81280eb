"""What all tests share."""

import os

import pytest

# Two processes share the cores already, and the networks here are small: threads would only wait for one another, and
# what is learned would hang on their number. Read when torch is imported, here and in what tests start.
os.environ["OMP_NUM_THREADS"] = "1"
# Spark is started for a few rows each time: to make its code fast takes longer than to run it as it is.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1 -XX:+UseSerialGC")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first, so that of two processes neither waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")

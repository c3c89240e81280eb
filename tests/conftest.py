"""What all tests share."""

import os
from collections.abc import Iterator

import pytest
import torch

# Spark is started for a few rows each time: to make its code fast takes longer than to run it as it is.
os.environ.setdefault("SPARK_SUBMIT_OPTS", "-XX:TieredStopAtLevel=1")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes longest first, so that of two processes neither waits for it in the end."""
    items.sort(key=lambda item: item.path.name != "test_end_to_end.py")


@pytest.fixture(autouse=True, scope="package")
def _one_thread() -> Iterator[None]:
    """The networks here are small: threads would only wait for one another, and what is learned would hang on them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)

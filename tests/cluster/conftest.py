"""What the tests of pods of ours share."""

import os
from collections.abc import Iterator

import pytest
from kubernetes import client, config


@pytest.fixture(scope="module")
def core() -> client.CoreV1Api:
    return client.CoreV1Api(config.new_client_from_config(os.environ["KUBECONFIG"]))


@pytest.fixture(scope="module")
def namespace(core: client.CoreV1Api) -> Iterator[str]:
    """A new one that takes only restricted pods."""
    labels = {"pod-security.kubernetes.io/enforce": "restricted"}
    metadata = client.V1ObjectMeta(generate_name="bluewhale-test-", labels=labels)
    name: str = core.create_namespace(client.V1Namespace(metadata=metadata)).metadata.name
    yield name
    core.delete_namespace(name)

"""A cluster over real HTTP, and the plugin in front of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from pipelines.client import ClusterClient
from pipelines.client.kubectl import bluewhale
from tests.operator.bluewhale_operator.servers import Servers, servers


@pytest.fixture
def world() -> Iterator[Servers]:
    with servers() as found:
        yield found


@pytest.fixture
def client(world: Servers) -> ClusterClient:
    return ClusterClient("team", api=world.cluster().client)


@pytest.fixture
def kubeconfig(world: Servers, tmp_path: Path) -> Path:
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "team"}}],
        "clusters": [{"name": "test", "cluster": {"server": world.url}}],
        "users": [{"name": "test", "user": {}}],
    }
    path = tmp_path / "kubeconfig"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def run(kubeconfig: Path) -> Callable[..., Result]:
    """Invoke the plugin over the world."""
    return lambda verb, *arguments: CliRunner().invoke(
        bluewhale, [verb, *map(str, arguments), *([] if verb == "lint" else ["--kubeconfig", str(kubeconfig)])]
    )

"""The client: a job's verbs for programs and, as `kubectl bluewhale`, for people."""

from pipelines.client.cluster import ClusterClient
from pipelines.client.lint import Problem
from pipelines.client.local import LocalClient
from pipelines.client.protocol import (
    Asked,
    Client,
    ClientError,
    Job,
    NotApplicableError,
    NotFoundError,
    UnavailableError,
)

__all__ = [
    "Asked",
    "Client",
    "ClientError",
    "ClusterClient",
    "Job",
    "LocalClient",
    "NotApplicableError",
    "NotFoundError",
    "Problem",
    "UnavailableError",
]

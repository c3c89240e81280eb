"""Prometheus beside the policy service, and the questions that the canary asks it."""

from __future__ import annotations

import json
import math
import shutil
import urllib.parse
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import yaml

from serving.processes import Server, ServerError, free_ports

SCRAPE_SECONDS = 1


class PrometheusServer(Server):
    """A Prometheus on a free port of 127.0.0.1 that scrapes a service's pods, or the one Triton beside it."""

    def __init__(self, directory: Path, scrape: dict[str, Any], log: Path) -> None:
        """`scrape`: what to scrape, as one of Prometheus's `scrape_configs` without its name."""
        program = shutil.which("prometheus")
        if not program:
            raise ServerError("no prometheus on PATH: install it, on Debian with `apt-get install prometheus`")
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(parents=True)
        config = {
            "global": {"scrape_interval": f"{SCRAPE_SECONDS}s", "scrape_timeout": f"{SCRAPE_SECONDS}s"},
            "scrape_configs": [{"job_name": "triton", **scrape}],
        }
        (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
        (port,) = free_ports(1)
        self.url = f"http://127.0.0.1:{port}"
        command = [
            program,
            f"--config.file={directory / 'prometheus.yml'}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            # With one scrape a second, a value older than this belongs to a server that is gone.
            "--query.lookback-delta=10s",
            "--log.level=warn",
        ]
        super().__init__("Prometheus", command, log)

    def wait_until_ready(self) -> None:
        """Until it has scraped once, which takes it some seconds."""
        self.wait_ready(lambda: query(self.url, "min(up)") == 1.0)


def query(url: str, expression: str) -> float | None:
    """The value of an instant query with at most one result; None when there is none, or no number.

    Raises `ServerError` when Prometheus cannot be reached or refuses the expression.
    """
    address = f"{url}/api/v1/query?{urllib.parse.urlencode({'query': expression})}"
    try:
        with urllib.request.urlopen(address, timeout=5) as response:
            result = json.load(response)["data"]["result"]
    except (OSError, HTTPException, ValueError, KeyError) as error:
        raise ServerError(f"Prometheus at {url} did not answer {expression!r}: {error}") from None
    if not result:
        return None
    value = float(result[0]["value"][1])
    return value if math.isfinite(value) else None

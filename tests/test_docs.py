"""What the documents list is what there is."""

import re
from pathlib import Path

import pytest
from prometheus_client import REGISTRY

from bluewhale_operator import metrics
from contracts.status import Reason

DOCS = Path(__file__).parent.parent / "docs"


def test_the_conditions_table_has_every_reason() -> None:
    table = re.findall(r"^\| `.*\|$", (DOCS / "operator.md").read_text(), re.MULTILINE)
    words = set(re.findall(r"`(\w+)`", "\n".join(table)))
    assert {reason.value for reason in Reason} <= words


def test_the_metrics_table_has_every_metric_of_the_operator() -> None:
    assert metrics.QUEUE
    told = set(re.findall(r"^\| `(bluewhale_\w+)", (DOCS / "operator.md").read_text(), re.MULTILINE))
    given = {m.name + ("_total" if m.type == "counter" else "") for m in REGISTRY.collect()}
    assert told == {name for name in given if name.startswith("bluewhale_")}


@pytest.mark.parametrize("page", sorted([*DOCS.rglob("*.md"), *DOCS.parent.glob("*.md")]), ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    targets = re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text())
    assert [t for t in targets if not (page.parent / t).exists()] == []

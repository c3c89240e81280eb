"""The evaluation's page for people and figures for machines."""

from pathlib import Path
from typing import Any

import pytest

from components.evaluation.page import judged, scalars, write_page
from contracts.job import ESTIMATORS, Gate, JobSpec

SPEC = JobSpec.model_validate({"actions": ["left", "right"], "evaluation": {"gate": {"metric": "clicks"}}})
JUDGED = SPEC.evaluation.gate.estimator


def estimate(value: float, relative: float | None) -> dict[str, Any]:
    ends = {"low": value - 1, "high": value + 1}
    if relative is None:
        return {"value": value, **ends, "relative": None, "relative_low": None, "relative_high": None}
    return {"value": value, **ends, "relative": relative, "relative_low": relative - 0.1, "relative_high": relative + 1}


@pytest.fixture
def report() -> dict[str, Any]:
    final = {name: {"clicks": estimate(12.0, 1.5), "cost": estimate(-3.0, None)} for name in ESTIMATORS}
    final[ESTIMATORS[0]] = {"refused": "the log has no propensities"}
    logged = {"clicks": 8.0, "cost": -2.0}
    return {
        "final": final,
        "epochs": [{"epoch": 1, "estimates": final}],
        "logged": {"per_step": logged, "per_mdp": logged},
        "diagnostics": {"held_out_mdps": 1234, "effective_sample_size": 99.5},
        "gate": {"verdict": "pass", "reason": "at least <1>"},
    }


def test_the_page_needs_nothing_from_elsewhere_and_says_all(report: dict[str, Any], tmp_path: Path) -> None:
    write_page(SPEC, report, tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert page.count("<svg") == 1
    for outside in ("<script", "<link", "<img", "src=", "@import"):
        assert outside not in page
    for said in ("at least &lt;1&gt;", "1,234 held-out MDPs", "12 [11, 13]", "× 1.5 [1.4, 2.5]", "refused"):
        assert said in page
    assert page.count('class="judged"') == 1


@pytest.mark.parametrize("verdict", ["pass", "disabled", "fail", "inconclusive"])
def test_every_verdict_has_a_page(report: dict[str, Any], tmp_path: Path, verdict: str) -> None:
    report["gate"]["verdict"] = verdict
    write_page(SPEC, report, tmp_path / "page.html")
    assert f">{verdict}</b>" in (tmp_path / "page.html").read_text()


def test_the_judged_estimate_is_relative_and_has_its_interval(report: dict[str, Any]) -> None:
    assert judged(SPEC.evaluation.gate, report) == {
        "estimator": JUDGED, "metric": "clicks", "value": 1.5, "lower": 1.4, "upper": 2.5, "verdict": "pass",
    }  # fmt: skip
    unknown = judged(Gate(estimator=ESTIMATORS[0]), report)
    assert (unknown["value"], unknown["lower"], unknown["upper"]) == (None, None, None)


def test_scalars_are_what_has_been_estimated(report: dict[str, Any]) -> None:
    found = scalars(report)
    assert found[f"{JUDGED}/clicks"] == 12.0
    assert found[f"{JUDGED}/clicks/relative"] == 1.5
    assert found[f"{JUDGED}/cost"] == -3.0
    assert f"{JUDGED}/cost/relative" not in found
    assert not any(name.startswith(ESTIMATORS[0]) for name in found)

"""Progress travels as marked lines of output, or to a listener in the same process."""

import pytest

from contracts import progress


@pytest.fixture(autouse=True)
def _nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "listener", None)
    monkeypatch.delenv(progress.VARIABLE, raising=False)


def test_a_reported_line_is_understood_again(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(progress.VARIABLE, "1")
    progress.report(3, 10, 'epoch 1 "loss" 0.5\nnext')
    lines = capsys.readouterr().out.splitlines()
    assert [progress.parse(line) for line in lines] == [(3.0, 10.0, 'epoch 1 "loss" 0.5\nnext')]


def test_a_line_is_found_behind_what_a_runner_puts_before_it() -> None:
    assert progress.parse('worker/0 @progress [1, 2, "half"]') == (1.0, 2.0, "half")


@pytest.mark.parametrize(
    "line",
    [
        "",
        "an ordinary line",
        "[1, 2, 3]",
        "@progress ",
        "@progress nonsense",
        "@progress [1, 2",
        "@progress [1, 2]",
        '@progress [1, 2, "a", "b"]',
    ],
)
def test_other_lines_are_no_progress(line: str) -> None:
    assert progress.parse(line) is None


@pytest.mark.parametrize(
    "line", ["@progress 5", "@progress null", '@progress ["a", 1, ""]', '@progress {"a": 1, "b": 2, "c": 3}']
)
def test_json_of_another_shape_is_no_progress(line: str) -> None:
    assert progress.parse(line) is None


def test_nothing_is_printed_unless_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    progress.report(1, 2, "half")
    assert capsys.readouterr().out == ""


def test_a_listener_hears_and_nothing_is_printed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    heard: list[tuple[float, float, str]] = []
    monkeypatch.setenv(progress.VARIABLE, "1")
    monkeypatch.setattr(progress, "listener", lambda *what: heard.append(what))
    progress.report(1, 2, "half")
    assert heard == [(1, 2, "half")]
    assert capsys.readouterr().out == ""

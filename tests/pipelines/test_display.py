"""A person sees how far the stage at work is and how long it will take yet; a log file gets a line for each stage."""

import io
import re

from rich.console import Console

from pipelines.display import Display


def screen(terminal: bool) -> Console:
    """Wherever the tests run: a terminal that calls itself dumb is shown no bars."""
    environment = {"TERM": "xterm"}
    return Console(file=io.StringIO(), force_terminal=terminal, width=100, color_system=None, _environ=environment)


def written(console: Console) -> str:
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_bar_tells_how_long_the_stage_will_take_yet() -> None:
    console, now = screen(terminal=True), [0.0]
    with Display(console) as display:
        display._progress.get_time = lambda: now[0]
        display.start("training")
        for done in (0, 10, 20, 30):
            now[0] = float(done)
            display.progress("training", done, 100, f"loss 0.{done}")
        display._progress.refresh()
    assert re.search(r"training .* 0:00:30 0:01:10 left loss 0.30", written(console))


def test_nothing_is_said_of_the_time_left_before_it_can_be_told() -> None:
    console = screen(terminal=True)
    with Display(console) as display:
        display._progress.get_time = lambda: 0.0
        display.start("training", "begins")
        display._progress.refresh()
    assert re.search(r"training .* 0:00:00 +begins", written(console))
    assert "left" not in written(console)


def test_elsewhere_than_on_a_terminal_each_finished_stage_is_one_line() -> None:
    console = screen(terminal=False)
    with Display(console) as display:
        display.start("timeline", "reading")
        display.progress("timeline", 1, 2, "4,656 rows")
        display.finish("timeline", 12.34)
        display.finish("timeline", 99.0)
        display.finish("features", 0.0, "5 features", cached=True)
        display.start("training")
        display.fail("training")
    lines = [re.sub(r" +", " ", line).strip() for line in written(console).splitlines()]
    assert lines == ["timeline ✓ 12.3 s 4,656 rows", "features ✓ finished before 5 features", "training ✗"]

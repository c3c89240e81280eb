"""What a person sees while a job runs: a line for each stage, with a bar for the one at work."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.text import Text


class _TimeLeft(TimeRemainingColumn):
    """How long it will take yet, once that can be told."""

    def render(self, task: Task) -> Text:
        return Text(f"{super().render(task)} left" if task.time_remaining else "", style="cyan")


class Display:
    """Live bars on a terminal, one plain line per finished stage elsewhere."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self._progress = Progress(
            TextColumn("{task.description:>14}"),
            BarColumn(20),
            TimeElapsedColumn(),
            _TimeLeft(),
            TextColumn("[dim]{task.fields[text]}", markup=True),
            console=console,
            transient=True,
            disable=not console.is_terminal,
        )
        self._tasks: dict[str, TaskID] = {}
        self._texts: dict[str, str] = {}
        self._done: set[str] = set()

    def __enter__(self) -> Display:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def start(self, stage: str, text: str = "") -> None:
        self._close()
        self._texts[stage] = text
        self._tasks[stage] = self._progress.add_task(stage, total=None, text=text)

    def progress(self, stage: str, done: float, total: float, text: str) -> None:
        self._texts[stage] = text
        if stage in self._tasks:
            self._progress.update(self._tasks[stage], completed=done, total=total, text=text)

    def finish(self, stage: str, seconds: float, text: str = "", cached: bool = False) -> None:
        """Say that a stage is finished, once."""
        self._close()
        if stage in self._done:
            return
        self._done.add(stage)
        text = text or self._texts.get(stage, "")
        state = "[dim]finished before[/]" if cached else f"{seconds:7.1f} s"
        self.console.print(f"{stage:>14} [green]✓[/] {state}  [dim]{text}[/]", highlight=False)

    def fail(self, stage: str) -> None:
        self._close()
        self.console.print(f"{stage:>14} [red]✗[/]", highlight=False)

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)

    def _close(self) -> None:
        """A new stage begins only when the one before it is over."""
        for stage, task in list(self._tasks.items()):
            self._progress.remove_task(task)
            del self._tasks[stage]

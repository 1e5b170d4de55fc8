"""What a long piece of work tells of itself: a bar on a terminal, plain lines everywhere else.

A log file (a batch job, `> log`) takes no bar: it gets a line now and then, with the time that is
left. Both are written to standard output by rich, so that a full disk behind it is noticed.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

_QUIET_SECONDS = 5.0  # of work that is over sooner, a log file learns nothing
_LINE_SECONDS = 30.0


def console_of_output() -> Console:
    """Standard output as it is now, without markup and colours of numbers."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def duration_text(seconds: float) -> str:
    """A duration for people, in two units at most: `45 s`, `12 min`, `3 h 05 min`, `2 d 04 h`."""
    if seconds < 99.5:
        return f"{max(seconds, 0.0):.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 48:
        return f"{hours} h {minutes:02d} min"
    return f"{hours // 24} d {hours % 24:02d} h"


class Pace:
    """How long the rest of some work will take, from how long it has taken since `start`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done, self._since = 0.0, clock()

    def start(self, done: float) -> None:
        """Count from here on, where `done` units of the work are behind."""
        self._done, self._since = done, self._clock()

    def seconds(self) -> float:
        return self._clock() - self._since

    def seconds_left(self, done: float, total: float) -> float | None:
        """None as long as nothing has been done since `start`."""
        if done <= self._done:
            return None
        return self.seconds() / (done - self._done) * (total - done)


@contextmanager
def telling(description: str, total: float) -> Iterator[Callable[[float], object]]:
    """Show how much of `total` units of work is done; the value takes how many more have been.

    On a terminal this is a bar that is gone when the work is done. A log file gets a line after a
    few seconds and every half a minute, and nothing of work that is over sooner.
    """
    console = console_of_output()
    if not console.is_terminal:
        yield _Lines(description, total, console)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
    )
    bar = Progress(*columns, console=console, transient=True)
    task = bar.add_task(description, total=total)

    def advance(count: float) -> None:
        bar.start()  # only now: there may be nothing to do
        bar.advance(task, count)

    try:
        yield advance
    finally:
        bar.stop()


class _Lines:
    """Lines that tell how far work is, for a log file."""

    def __init__(self, description: str, total: float, console: Console) -> None:
        self._what, self._total, self._console = description, total, console
        self._done, self._pace, self._due = 0.0, Pace(), _QUIET_SECONDS

    def __call__(self, count: float) -> None:
        self._done += count
        seconds = self._pace.seconds()
        if seconds < self._due:
            return
        self._due = seconds + _LINE_SECONDS
        seconds_left = self._pace.seconds_left(self._done, self._total)
        estimate = "" if seconds_left is None else f", {duration_text(seconds_left)} left"
        share = self._done / max(self._total, 1)
        self._console.print(f"{self._what}: {share:.0%} in {duration_text(seconds)}{estimate}")

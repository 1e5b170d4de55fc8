"""Shows the progress of long work: a bar on a terminal, plain lines everywhere else. Tells how long
a large output will take and how large it becomes, and refuses it if the disk has no room for it.
Notes on what a user may not expect go beside the output.

A log file (a batch job, `> log`) takes no bar: it gets a line now and then, with the time that is
left. Both are written to standard output by rich, so that a full disk behind it is noticed.
"""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeRemainingColumn

QUIET_SECONDS = 5.0  # of work that is over sooner, a log file learns nothing
LINE_SECONDS = 30.0  # from line to line in a log file
_LEAST_SECONDS = 20.0  # of a whole output, for a line to be worth reading


def console_of_output() -> Console:
    """Standard output as it is now, without markup and colours of numbers."""
    return Console(markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Print a note in one line beside the output, on what a user may not expect."""
    console = Console(stderr=True)
    console.print(f"note: {text}", markup=False, highlight=False, soft_wrap=True)


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


def counted(number: int, noun: str) -> str:
    """A number of things: `1 time`, `3 times`."""
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def size_text(num_bytes: float) -> str:
    """A size for people: `12 MiB`, `3.4 GiB`."""
    mib = num_bytes / 2**20
    return (
        f"{mib / 1024:,.1f} GiB"
        if mib >= 1024
        else f"{mib:,.0f} MiB"
        if mib >= 10
        else f"{mib:.1f} MiB"
    )


class Pace:
    """Estimates how long the rest of some work will take, from the time that it has taken since
    `start`."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._done, self._since = 0.0, clock()

    def start(self, done: float) -> None:
        """Start counting, with `done` units of the work behind."""
        self._done, self._since = done, self._clock()

    def seconds(self) -> float:
        return self._clock() - self._since

    def seconds_left(self, done: float, total: float) -> float | None:
        """The seconds until all is done; None as long as nothing has been done since `start`."""
        if done <= self._done:
            return None
        return self.seconds() / (done - self._done) * (total - done)


class Advance(Protocol):
    """Takes how many units of work more are done; `say` prints a line meanwhile."""

    def __call__(self, count: float) -> None: ...

    @property
    def say(self) -> Callable[[str], None]: ...


@contextmanager
def telling(description: str, total: float) -> Iterator[Advance]:
    """Show how much of `total` units of work is done. The context gives a function that takes how
    many more units are done.

    On a terminal this is a bar that is gone when the work is done. A log file gets a line after a
    few seconds and every half a minute, and nothing of work that is over sooner.
    """
    console = console_of_output()
    if not console.is_terminal:
        yield _Lines(description, total, console)
        return
    bar = _Bar(description, total, console)
    try:
        yield bar
    finally:
        bar.stop()


class _Bar:
    """Shows progress as a bar on a terminal."""

    def __init__(self, description: str, total: float, console: Console) -> None:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._task = self._progress.add_task(description, total=total)
        self.say, self.stop = self._progress.console.print, self._progress.stop

    def __call__(self, count: float) -> None:
        self._progress.start()  # only now: there may be nothing to do
        self._progress.advance(self._task, count)


class _Lines:
    """Shows progress as lines, for a log file."""

    def __init__(self, description: str, total: float, console: Console) -> None:
        self._what, self._total, self._console = description, total, console
        self._done, self._pace, self._due = 0.0, Pace(), QUIET_SECONDS
        self.say = console.print

    def __call__(self, count: float) -> None:
        self._done += count
        seconds = self._pace.seconds()
        if seconds < self._due:
            return
        self._due = seconds + LINE_SECONDS
        seconds_left = self._pace.seconds_left(self._done, self._total)
        estimate = "" if seconds_left is None else f", {duration_text(seconds_left)} left"
        share = self._done / max(self._total, 1)
        self._console.print(f"{self._what}: {share:.0%} in {duration_text(seconds)}{estimate}")


class NoRoomError(ValueError):
    """An output that its disk cannot hold."""


def check_free(output: Path, num_bytes: float, smaller: str) -> None:
    """Raise NoRoomError if so many bytes more do not fit on the disk of an output.

    smaller: what would make the output smaller.
    """
    free = free_bytes(output)
    if num_bytes > free:
        raise NoRoomError(
            f"output={output}: needs some {size_text(num_bytes)} more, but its disk has "
            f"{size_text(free)} free; {smaller}"
        )


def free_bytes(output: Path) -> int:
    """Bytes that are free on the disk of an output."""
    return shutil.disk_usage(output.absolute().parent).free


@dataclass
class EarlyEstimate:
    """Passes on how far an output is (`advance`), and tells once what all of it will take.

    cases: how many there are. parts: that a case is written in, of equal work; first_differs:
    but for the first one, as in a rollout, whose later passes have a state for every member.
    size_now: bytes that are written so far. at_end: bytes that are written beside them at the end.
    smaller: what makes the output smaller, for the refusal.
    """

    advance: Advance
    output: Path
    cases: int
    parts: int
    size_now: Callable[[], int]
    smaller: str
    first_differs: bool = False
    at_end: int = 0
    clock: Callable[[], float] = time.monotonic

    def __post_init__(self) -> None:
        self._begun, self._done = 0.0, 0.0
        self._times: list[float] = []

    def __call__(self, share: float) -> None:
        """The first call tells what share of a case was there before, each later one what a part
        has added: 0 of streams that are written beside others."""
        self.advance(share)
        if len(self._times) == 3 or (self._times and share == 0):
            return
        self._times.append(self.clock())
        if len(self._times) == 1:
            self._begun = share
            return
        self._done += share
        if len(self._times) == 3:
            self._tell()

    def _tell(self) -> None:
        start, first, second = self._times
        each = second - first
        begins = first - start if self.first_differs else each
        seconds = (self.cases - self._begun) * (begins + (self.parts - 1) * each)
        written = self.size_now()
        size = written * self.cases / (self._begun + self._done) + self.at_end
        check_free(self.output, size - written, self.smaller)
        if seconds >= _LEAST_SECONDS:
            self.advance.say(
                f"some {duration_text(seconds)} and {size_text(size)} on the disk, where "
                f"{size_text(free_bytes(self.output))} are free"
            )

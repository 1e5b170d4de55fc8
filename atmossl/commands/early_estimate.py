"""How long a large output will take and how large it becomes, told from its first two parts, and
refused if the disk has no room for it."""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from atmossl.progress import Advance, duration_text, size_text

_LEAST_SECONDS = 20.0  # of a whole output, for a line to be worth reading


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

"""One way to try again what a remote store failed at: opening it, its metadata, its chunks."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

T = TypeVar("T")
_FINAL = (FileNotFoundError, NotADirectoryError, PermissionError, ImportError)


@dataclass(frozen=True)
class Retries:
    """count: further tries, the first after `wait_s` seconds, then twice as long each time."""

    count: int
    wait_s: float

    @classmethod
    def of(cls, location: str, count: int, wait_s: float) -> "Retries":
        """Of a store: a local one fails for good, and so does what is not there or forbidden."""
        return cls(count if "://" in location else 0, wait_s)

    def call(self, action: Callable[[], T]) -> T:
        """What the action returns, at the first try that does not fail."""
        wait = self.wait_s
        for _ in range(self.count):
            try:
                return action()
            except _FINAL:
                raise
            except Exception:
                time.sleep(wait)
                wait *= 2
        return action()

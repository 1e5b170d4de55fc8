"""Memory that is used again once nobody views it. Fresh memory costs as much as a copy of what is
put into it: the system clears it page by page."""

import weakref
from collections import deque
from collections.abc import Callable

import numpy as np

_MOST_KEPT = 2  # pieces of memory that wait to be used again


def lent(memory: np.ndarray, give_back: Callable[[], object]) -> np.ndarray:
    """The same bytes; `give_back` is called when no array or tensor views them any longer.

    Views of an array keep its outermost owner alive, which must not be the memory itself here:
    through a buffer, numpy takes what is handed out for the owner.
    """
    handed_out = np.frombuffer(memory.data, np.uint8)
    weakref.finalize(handed_out, give_back).atexit = False
    return handed_out


class Pool:
    """Pieces of memory for one process. It may be used by several threads: pieces come back
    whenever their last view dies, so there is no lock to wait for then."""

    def __init__(self) -> None:
        self._free: deque[np.ndarray] = deque(maxlen=_MOST_KEPT)

    def take(self, size: int) -> np.ndarray:
        """So many bytes, at most half of a piece unused; what they hold is not defined."""
        memory = self._reused(size)
        if memory is None:
            memory = np.empty(size, np.uint8)
        return lent(memory, lambda: self._free.append(memory))[:size]

    def _reused(self, size: int) -> np.ndarray | None:
        for _ in range(_MOST_KEPT):
            try:
                memory = self._free.popleft()
            except IndexError:
                return None
            if size <= len(memory) <= 2 * size:
                return memory
            self._free.append(memory)
        return None

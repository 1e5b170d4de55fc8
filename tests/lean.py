"""Runs without what they measure and draw beside their training, which takes a third of the time of
a tiny run."""

from collections.abc import Iterable
from typing import Any

from atmossl.training import callbacks, throughput

_PLACES = (
    (callbacks, "plot_curves"),
    (throughput, "matmul_rate"),
    (throughput, "_COUNTED_BATCHES"),
)
_WHOLE = [getattr(module, name) for module, name in _PLACES]
_LEAN: tuple[Any, ...] = (lambda *_: [], lambda *_: 1e11, 1)


def _put(values: Iterable[Any]) -> None:
    for (module, name), value in zip(_PLACES, values, strict=True):
        setattr(module, name, value)


def lean_runs() -> None:
    """From now on no curves are drawn, the machine's rate is a number, and the operations of the
    first batch alone are counted."""
    _put(_LEAN)


def whole_runs() -> None:
    """The opposite, for a process of its own."""
    _put(_WHOLE)

"""Values that cannot be where they are: other units, fill values that are not marked as missing,
differences of which the units stayed, chunks that were never written.

`Limits` are what one variable of a record may be at each of its levels. Whatever reads values for
training, prediction or scores shows them to these, which refuse, warn, or do not look.
"""

import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import Any, Literal

import numpy as np

from atmossl.data.variables import VARIABLES, physical_range

InputLimits = Literal["refuse", "warn", "off"]


class InputWarning(UserWarning):
    """Values that a model is shown and that are not what it should be shown."""


@dataclass
class Notices:
    """Warns of each variable once."""

    told: set[str] = field(default_factory=set)

    def tell(self, variable: str, text: str) -> None:
        if variable not in self.told:
            self.told.add(variable)
            warnings.warn(text, InputWarning, stacklevel=2)


@dataclass(frozen=True)
class Limits:
    """Of one variable on levels in hPa, (0,) at the surface. low, high: [level], in its units.

    everywhere: what can be at each of the levels; the first is the larger where nothing can.
    place: where and when the values are, for messages.
    """

    variable: str
    levels: tuple[int, ...]
    low: np.ndarray
    high: np.ndarray
    everywhere: tuple[float, float]
    mode: InputLimits
    notices: Notices
    place: Callable[[], str]

    @classmethod
    def physical(
        cls,
        variable: str,
        levels: tuple[int, ...],
        *,
        pressure_levels: bool,
        mode: InputLimits,
        notices: Notices,
        place: Callable[[], str],
    ) -> "Limits | None":
        """What an atmosphere can have; None if that is not known, or nobody is to look."""
        if mode == "off" or variable not in VARIABLES:
            return None
        pressures = [level if pressure_levels else 0 for level in levels]
        low, high, everywhere = _ranges(variable, tuple(pressures))
        return cls(variable, levels, low, high, everywhere, mode, notices, place)

    def hold(self, lowest: float, highest: float) -> bool:
        """Whether values from the lowest to the highest can be at every level. NaN cannot."""
        return self.everywhere[0] <= lowest and highest <= self.everywhere[1]

    def check(self, values: np.ndarray, levels: slice = slice(None)) -> None:
        """values: [level time lat lon], of some levels; those that are missing are not looked at.

        Raises:
            ValueError: values outside of the limits, which are to be refused.
        """
        by_level = zip(values, self.low[levels], self.high[levels], strict=True)
        if all(field.min() >= low and field.max() <= high for field, low, high in by_level):
            return
        observed = np.isfinite(values)
        lowest = values.min(axis=(1, 2, 3), where=observed, initial=np.inf)
        highest = values.max(axis=(1, 2, 3), where=observed, initial=-np.inf)
        low, high = self.low[levels], self.high[levels]
        outside = (lowest < low) | (highest > high)
        if outside.any():
            row = int(np.argmax(outside))
            extremes = (float(lowest[row]), float(highest[row]))
            self._tell(self.levels[levels][row], extremes, (float(low[row]), float(high[row])))

    def _tell(self, level: int, extremes: tuple[float, float], limits: tuple[float, float]) -> None:
        units = VARIABLES[self.variable].units
        text = (
            f"{self.place()}: {self.variable}{f' at {level} hPa' if level else ''} goes from "
            f"{extremes[0]:.4g} to {extremes[1]:.4g} {units}, an atmosphere's "
            f"from {limits[0]:.4g} to {limits[1]:.4g}: other units, a fill value that is not "
            "marked, differences, or a chunk that was never written?"
        )
        if self.mode == "refuse":
            raise ValueError(f"{text} input_limits=warn takes the values as they are")
        self.notices.tell(self.variable, text)


@cache
def _ranges(
    variable: str, levels: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray, tuple[float, float]]:
    low, high = np.array([physical_range(variable, level) for level in levels]).T
    return low, high, (float(low.max()), float(high.min()))


def show_in_one_line() -> None:
    """Print the warnings of this module as a note of one line, without a place in the source."""
    usual = warnings.showwarning

    def show(message: Any, category: type[Warning], *place: Any, **more: Any) -> None:
        if issubclass(category, InputWarning):
            sys.stderr.write(f"note: {message}\n")
        else:
            usual(message, category, *place, **more)

    warnings.showwarning = show

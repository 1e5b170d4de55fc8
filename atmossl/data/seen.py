"""Where and when the records of a training lie: what a network saw beside values and masks."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np

from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.segment import Segment
from atmossl.geometry import Grid

DAYS = 365  # equal parts of a year of any calendar
_PERIOD = re.compile(r"(\d{4}-\d\d-\d\dT\d\d) to (\d{4}-\d\d-\d\dT\d\d)")


@dataclass(frozen=True)
class Seen:
    """Dates and places of a training's records; what is None or empty is not known.

    days: of the year, from 0 to 364. cell: degrees of latitude and of longitude. latitudes: the
    southernmost and northernmost. longitudes: the westernmost, and how many degrees eastwards the
    last one lies; 360 where they close the circle.
    """

    days: tuple[int, ...] = ()
    calendar: str | None = None
    cell: tuple[float, float] | None = None
    latitudes: tuple[float, float] | None = None
    longitudes: tuple[float, float] | None = None

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Self:
        grid, calendar = segments[0].grid, segments[0].calendar
        days = {day for segment in segments for day in days_of(segment.times, calendar)}
        return cls(
            days=tuple(sorted(days)),
            calendar=calendar.name,
            cell=(grid.latitude_spacing, grid.longitude_spacing),
            latitudes=(float(grid.latitude[0]), float(grid.latitude[-1])),
            longitudes=(float(grid.longitude[0]), eastward_extent(grid)),
        )

    @classmethod
    def of_period(cls, text: str) -> Self:
        """The record of an older checkpoint, which tells the period alone."""
        days: set[int] = set()
        for first, last in _PERIOD.findall(text):
            try:
                start, end = (np.datetime64(date, "ns") for date in (first, last))
            except ValueError:  # a date of another calendar
                return cls()
            days.update(days_of(np.arange(start, end, np.timedelta64(6, "h")), STANDARD))
        return cls(days=tuple(sorted(days)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


def seen_by_data(segments: Sequence[Segment]) -> dict[str, Seen]:
    """Dates and places of the records of every source, by the `data` of the streams that read
    it."""
    names = segments[0].sources
    return {name: Seen.of([s.sources[name].segment for s in segments]) for name in names}


def days_of(times: np.ndarray, calendar: Calendar) -> list[int]:
    """The days of the year of times, each once."""
    days = (calendar.year_share(times) * DAYS).astype(int)
    return [int(day) for day in np.unique(np.minimum(days, DAYS - 1))]


def eastward_extent(grid: Grid) -> float:
    """Degrees from the first longitude eastwards to the last; 360 if the longitudes close the
    circle."""
    return 360.0 if grid.periodic else float(grid.longitude[-1] - grid.longitude[0])

"""Calendars of climate models beside the standard one: dates, years and the sun's clock.

Inside the package a time is a `datetime64`, which knows the standard calendar alone. Times of any
other calendar are kept as the time elapsed since 1970-01-01T00 of that calendar, also written as
`datetime64`, in microseconds: steps, hours of the day and differences are right, and only here
become dates.
"""

import re
from dataclasses import dataclass
from typing import Any, Literal

import cftime
import numpy as np

from atmossl.batch import YEAR_HOURS

_EPOCH_UNITS = "microseconds since 1970-01-01T00:00:00"
_DAY = np.timedelta64(86_400_000_000, "us")
_LENGTHS = {  # of what a date names by the number of its parts, from days to seconds
    3: _DAY,
    4: np.timedelta64(1, "h"),
    5: np.timedelta64(1, "m"),
    6: np.timedelta64(1, "s"),
}
_GREGORIAN = {"standard", "gregorian", "proleptic_gregorian"}  # alike since 1582
_DAYS = {  # of a year, where every year has as many
    "noleap": 365,
    "365_day": 365,
    "all_leap": 366,
    "366_day": 366,
    "360_day": 360,
}
_YEAR_HOURS = {name: 24.0 * days for name, days in _DAYS.items()} | {"julian": 24.0 * 365.25}
_PLAIN_DATE = re.compile(r"\d{4}(-\d\d(-\d\d([T ]\d\d(:\d\d(:\d\d(\.\d+)?)?)?)?)?)?")
_FIRST_YEAR, _LAST_YEAR = 1678, 2261  # of nanoseconds in 64 bits
_DATE = re.compile(
    r"(-?\d{1,6})(?:-(\d\d?)(?:-(\d\d?)(?:[T ](\d\d?)(?::(\d\d))?(?::(\d\d)(?:\.0+)?)?)?)?)?"
)


@dataclass(frozen=True)
class Calendar:
    """A calendar of the CF conventions by its name.

    plain: its times are `datetime64` of the standard calendar, and nothing has to be translated.
    """

    name: str
    plain: bool = False

    @property
    def year_hours(self) -> float:
        """Mean length of a year in hours."""
        return _YEAR_HOURS.get(self.name, YEAR_HOURS)

    @classmethod
    def of(cls, values: np.ndarray) -> "Calendar | None":
        """The calendar of a time axis; None if its values are no dates."""
        if np.issubdtype(values.dtype, np.datetime64):
            return STANDARD if _fit_nanoseconds(values) else cls("proleptic_gregorian")
        first: Any = values.flat[0] if values.size else None
        return cls(str(first.calendar)) if isinstance(first, cftime.datetime) else None

    def knows(self, date: object) -> bool:
        """Whether a date of any type may be one of this calendar; only those of cftime tell."""
        name = str(getattr(date, "calendar", "") or self.name)
        return name == self.name or {name, self.name} <= _GREGORIAN

    def encode(self, dates: np.ndarray) -> np.ndarray:
        """Times of the dates of a store."""
        if self.plain:
            return dates.astype("datetime64[ns]")
        if np.issubdtype(dates.dtype, np.datetime64):  # in years that nanoseconds do not reach
            return dates.astype("datetime64[us]")
        elapsed = cftime.date2num(dates, _EPOCH_UNITS, self.name)
        return np.asarray(elapsed, np.int64).astype("datetime64[us]")

    def dates(self, times: np.ndarray) -> np.ndarray:
        """Dates of times: `datetime64`, or objects of cftime."""
        if self.plain:
            return times
        elapsed = times.astype("datetime64[us]").astype(np.int64)
        return np.asarray(cftime.num2date(elapsed, _EPOCH_UNITS, self.name))

    def parse(self, text: str | np.datetime64) -> np.datetime64:
        """The time of an ISO date, of which the end may lack, or of a date of numpy.

        Raises:
            ValueError: it is no date of this calendar.
        """
        if isinstance(text, np.datetime64):
            text = str(text) if self.plain else str(text.astype("datetime64[s]"))
        if self.plain:
            return _plain_date(text)
        match = _DATE.fullmatch(str(text).strip())
        try:
            if match is None:
                raise ValueError("needed: year-month-day, such as 1850-01-01T06")
            year, month, day, *clock = (None if x is None else int(x) for x in match.groups())
            date = cftime.datetime(
                year, month or 1, day or 1, *(x or 0 for x in clock), calendar=self.name
            )
        except ValueError as error:
            raise ValueError(f"{text!r} is no date of calendar {self.name}: {error}") from error
        return self.encode(np.array([date]))[0]

    def parse_end(self, text: str) -> np.datetime64:
        """The last moment of what an ISO date names: of the day for 2018-12-31, of the year for
        2018.

        Raises:
            ValueError: it is no date of this calendar.
        """
        first = self.parse(text)
        if self.plain:
            named = np.datetime64(text)
            return (named + 1).astype(first.dtype) - np.timedelta64(1, "ns")
        (date,) = self.dates(np.array([first]))
        match = _DATE.fullmatch(text.strip())
        given = [part for part in match.groups() if part] if match else []
        year, month = date.year, date.month + 1
        if len(given) > 2:
            length = _LENGTHS[len(given)]
            return first + length - np.timedelta64(1, "us")
        if len(given) == 1 or month > 12:
            year, month = year + 1, 1
        after = cftime.datetime(year, month, 1, calendar=self.name)
        return self.encode(np.array([after]))[0] - np.timedelta64(1, "us")

    def show(self, time: np.datetime64, unit: Literal["h", "m", "s"] = "h") -> str:
        """A time as an ISO date, to the hour, minute (m) or second (s)."""
        if self.plain:
            return str(np.datetime_as_string(time, unit))
        (date,) = self.dates(np.array([time]))
        end = {"h": "T%H", "m": "T%H:%M", "s": "T%H:%M:%S"}[unit]
        return f"{date.year:04d}-{date.month:02d}-{date.day:02d}{date.strftime(end)}"

    def year_share(self, times: np.ndarray) -> np.ndarray:
        """How much of its own year has gone by, from 0 to 1."""
        start, length = self._years(times)
        return (times - start) / length

    def _years(self, times: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Start and length of the year of every time."""
        if self.plain:
            years = times.astype("datetime64[Y]")
            bounds = [(years + n).astype(times.dtype) for n in (0, 1)]
        else:
            years = [date.year for date in self.dates(times)]
            bounds = [self._new_years([year + n for year in years]) for n in (0, 1)]
        return bounds[0], bounds[1] - bounds[0]

    def _new_years(self, years: list[int]) -> np.ndarray:
        return self.encode(
            np.array([cftime.datetime(year, 1, 1, calendar=self.name) for year in years])
        )

    def on_earth(self, times: np.ndarray, *, by_hour: bool = True) -> np.ndarray:
        """Times of the standard calendar at the same share of the year; by_hour: and at the same
        hour of the day, which takes the day that the share falls into, as for the sun's place."""
        if self.plain:
            return times
        years = np.array([date.year - 1970 for date in self.dates(times)]).astype("datetime64[Y]")
        first, after = ((years + n).astype("datetime64[us]") for n in (0, 1))
        if not by_hour:
            return first + (self.year_share(times) * (after - first)).astype("timedelta64[us]")
        start, length = self._years(times)
        share = ((times - start) // _DAY + 0.5) / (length / _DAY)
        days = np.floor(share * ((after - first) / _DAY)).astype(np.int64)
        return first + days * _DAY + (times - start) % _DAY


def _fit_nanoseconds(dates: np.ndarray) -> bool:
    """Whether all dates lie in the years that 64 bits hold in nanoseconds; missing ones do."""
    years = dates[~np.isnat(dates)].astype("datetime64[Y]").astype(np.int64) + 1970
    return bool(((years >= _FIRST_YEAR) & (years <= _LAST_YEAR)).all())


def integer_units(dates: np.ndarray) -> str:
    """Units in which whole numbers hold the dates exactly: seconds, or as much finer as needed.

    Other calendars than the standard one count from the first date: xarray decodes them by way of
    floating point, which loses microseconds far from the origin.
    """
    calendar = Calendar.of(dates)
    assert calendar is not None, dates.dtype
    times = calendar.encode(dates)
    origin = "1970-01-01" if calendar.plain else calendar.show(times[0], "m")[:-6]
    for name, code in (("seconds", "s"), ("microseconds", "us")):
        if (times.astype(f"datetime64[{code}]") == times).all():
            return f"{name} since {origin}"
    return f"nanoseconds since {origin}"


def _plain_date(text: str) -> np.datetime64:
    try:
        if not _PLAIN_DATE.fullmatch(text):  # numpy takes 20010131 for a year
            raise ValueError("needed: year-month-day")
        if not _FIRST_YEAR <= int(text[:4]) <= _LAST_YEAR:  # numpy overflows without a word
            raise ValueError(f"years from {_FIRST_YEAR} to {_LAST_YEAR} are known")
        return np.datetime64(text, "ns")
    except ValueError as error:
        raise ValueError(f"{text!r} is no date ({error}); valid: such as 2001-01-31T06") from error


STANDARD = Calendar("standard", plain=True)

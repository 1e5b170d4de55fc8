"""Coordinates without their rounding errors, calendars, and which dimension of a file is which.

Files store coordinates with rounding errors: hourly times as days with six decimals are some 30 ms
off, latitudes in float32 differ from the same ones in float64, and a pressure of 500 hPa may read
499.99997. Every way in (catalog, Python, `atmossl data ingest`, references of `atmossl evaluate`)
calls the functions here. Times move by a second at most, and never across a gap; degrees and levels
by a hundredth of the spacing and a hundred-thousandth of the largest value at most.
"""

import re
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import cftime
import numpy as np
import xarray as xr

from atmossl.batch import YEAR_HOURS
from atmossl.data.metadata import is_pressure, is_start, says

# Calendars of climate models beside the standard one: dates, years and the sun's clock.
#
# Inside the package a time is a `datetime64`, which knows the standard calendar alone. Times of
# any other calendar are kept as the time elapsed since 1970-01-01T00 of that calendar, also
# written as `datetime64`, in microseconds: steps, hours of the day and differences are right,
# and only here become dates.

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
    year_hours: the mean length of a year in hours, which follows from the name.
    """

    name: str
    plain: bool = False
    year_hours: float = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "year_hours", _YEAR_HOURS.get(self.name, YEAR_HOURS))

    @classmethod
    def of(cls, values: np.ndarray) -> "Calendar | None":
        """The calendar of a time axis; None if its values are no dates."""
        if np.issubdtype(values.dtype, np.datetime64):
            return STANDARD if _fit_nanoseconds(values) else cls("proleptic_gregorian")
        first: Any = values.flat[0] if values.size else None
        return cls(str(first.calendar)) if isinstance(first, cftime.datetime) else None

    def knows(self, date: object) -> bool:
        """Whether a date may be one of this calendar; only dates of cftime say to which they
        belong."""
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
        """The time of a date: one of numpy, or ISO text, which may end with the year, month or day.

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
        date_parts = [part for part in match.groups() if part] if match else []
        year, month = date.year, date.month + 1
        if len(date_parts) > 2:
            length = _LENGTHS[len(date_parts)]
            return first + length - np.timedelta64(1, "us")
        if len(date_parts) == 1 or month > 12:
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
        """How much of its year has gone by at every time, from 0 to 1."""
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
        """Times of the standard calendar at the same share of the year, for the position of the
        sun. by_hour: keep the hour of the day, and take the day that the share falls into."""
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
    """Whether all dates lie in the years that 64 bits hold in nanoseconds; missing dates count
    as if they do."""
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
        return _numpy_date(text)
    except ValueError as error:
        raise ValueError(f"{text!r} is no date ({error}); valid: such as 2001-01-31T06") from error


def _numpy_date(text: str) -> np.datetime64:
    try:
        return np.datetime64(text, "ns")
    except ValueError as error:  # numpy speaks of its own strings
        raise ValueError("no calendar has such a month, day or time of day") from error


STANDARD = Calendar("standard", plain=True)


_HOUR = np.timedelta64(1, "h")
_MOSTLY = 4  # a record is even, with gaps, where fewer than one step in so many is another
_SHARE = 1e-5  # of the largest value of an axis, or of a level's own
_PART = 100  # a coordinate moves by this part of a step at most
_TIME_TOLERANCE_NS = 1_000_000_000
_LARGEST_MOVE = 0.01  # of a label, whatever its axis: dates as 20200101 are a whole one apart
_CLOSED_DEG = 1e-3  # as `Grid.periodic` takes it
_UNITS_NS = (60_000_000_000, 1_000_000_000, 1_000_000, 1_000, 1)  # from minutes to nanoseconds


def read_times(dates: np.ndarray, location: str) -> tuple[np.ndarray, Calendar]:
    """Times of the dates of a store without their rounding errors, and their calendar.

    Raises:
        ValueError: they are no dates, or some are missing.
    """
    calendar = Calendar.of(dates)
    if calendar is None:
        raise ValueError(f"{location}: time has type {dates.dtype}; needed: dates of a calendar")
    times = calendar.encode(dates)
    if np.isnat(times).any():
        raise ValueError(
            f"{location}: {int(np.isnat(times).sum())} of {len(times)} dates are missing (NaT)"
        )
    return regular_times(times), calendar


def with_regular_axes(dataset: xr.Dataset, location: str) -> xr.Dataset:
    """A canonical dataset with its times and levels without their rounding errors."""
    changed = {}
    for name in {"time", "init_time"} & set(dataset.dims):
        dates = dataset[name].values
        times, calendar = read_times(dates, location)
        if not np.array_equal(times, calendar.encode(dates)):
            changed[name] = dataset[name].copy(data=calendar.dates(times))
    if "level" in dataset.dims and dataset["level"].dtype.kind == "f":
        levels = regular_levels(dataset["level"].values)
        if not np.array_equal(levels, dataset["level"].values):
            changed["level"] = dataset["level"].copy(data=levels)
    return dataset.assign_coords(changed) if changed else dataset


def usual_step(times: np.ndarray) -> tuple[np.timedelta64, np.ndarray]:
    """The most frequent step of ascending times, and the positions of all steps that are
    another."""
    steps = np.diff(times)
    lengths, counts = np.unique(steps, return_counts=True)
    usual = lengths[counts.argmax()]
    return usual, np.flatnonzero(steps != usual)


DROP_DUPLICATES = "keep one of each, with xarray: dataset.drop_duplicates('time')"


def check_order(times: np.ndarray, calendar: Calendar, location: str) -> None:
    """Raise ValueError for times that do not ascend, or of which one is there twice."""
    steps = np.diff(times) / _HOUR
    if (steps == 0).any():
        twice = calendar.show(times[1:][steps == 0][0], "s")
        raise ValueError(f"{location}: time {twice} is duplicate; {DROP_DUPLICATES}")
    if (steps < 0).any():
        at = int(np.flatnonzero(steps < 0)[0])
        raise ValueError(
            f"{location}: times are not in ascending order after {calendar.show(times[at], 's')}; "
            "`atmossl data ingest` sorts them"
        )


def unlike_gaps(times: np.ndarray) -> bool:
    """Whether some step between ascending times is no whole number of usual ones."""
    steps, usual = np.diff(times), usual_step(times)[0]
    return bool((steps % usual != np.timedelta64(0)).any())


def why_uneven(times: np.ndarray, calendar: Calendar) -> str | None:
    """Why training refuses the steps between ascending times, and what to do about it; None if
    the steps are even."""
    usual, breaks = usual_step(times)
    if not len(breaks):
        return None
    steps = np.diff(times) / _HOUR
    at = int(breaks[0])
    fault = (
        f"time steps are not uniform: {steps[at]:g} h instead of {usual / _HOUR:g} h after "
        f"{calendar.show(times[at], 's')}"
    )
    if len(breaks) * _MOSTLY < len(steps) or not unlike_gaps(times):
        return (
            f"{fault}, the first of {len(breaks)} gaps; `gaps: split` in the catalog entry leaves "
            "them out"
        )
    return (
        f"{fault}; steps vary from {steps.min():g} to {steps.max():g} h, {len(breaks)} of "
        f"{len(steps)} are not the usual one. Resample to even steps first, with xarray or cdo "
        "for example"
    )


def regular_times(times: np.ndarray) -> np.ndarray:
    """Ascending times without their rounding errors.

    Every unbroken part becomes start + number * step, with one step for all parts, if that moves
    no time by more than a second or a hundredth of the step. Gaps keep their length. Times that
    are even already, or are not even within the tolerance, come back as they are.
    """
    steps = np.diff(times)
    if len(steps) < 2 or (steps == steps[0]).all() or (steps <= np.timedelta64(0)).any():
        return times
    unit_ns = 1 if times.dtype == np.dtype("datetime64[ns]") else 1000
    start = times[0].astype("datetime64[D]").astype(times.dtype)
    elapsed = (times - start).astype(np.int64)
    usual = float(np.median(np.diff(elapsed)))
    tolerance = min(_TIME_TOLERANCE_NS / unit_ns, usual / _PART)
    breaks = np.flatnonzero(np.abs(np.diff(elapsed) - usual) > 2 * tolerance) + 1
    parts = np.split(elapsed, breaks)
    roundings = [ns // unit_ns for ns in _UNITS_NS if ns >= unit_ns]
    for rounding in roundings:
        step = _common_step(parts, rounding)
        longest = _on_axis(max(parts, key=len), step, roundings, tolerance) if step else None
        if longest is None:
            continue
        first = int(longest[0])
        placed = [_on_axis(part, step, roundings, tolerance, first) for part in parts]
        regular = [part for part in placed if part is not None]
        if len(regular) == len(parts):
            return start + np.concatenate(regular).astype(steps.dtype)
    return times


def _common_step(parts: list[np.ndarray], rounding: int) -> int:
    """Mean step of all unbroken parts, rounded; 0 if no part has two times."""
    count = sum(len(part) - 1 for part in parts)
    span = sum(int(part[-1] - part[0]) for part in parts)
    return round(span / count / rounding) * rounding if count else 0


def _on_axis(
    part: np.ndarray, step: int, roundings: list[int], tolerance: float, other: int | None = None
) -> np.ndarray | None:
    """start + number * step; None if some time would move further than the tolerance. The start is
    a whole number of steps from that of another part, since single times tell too little, else as
    round as the tolerance allows."""
    numbers = np.arange(len(part)) * step
    middle = float(np.median(part - numbers))
    starts = [round(middle / rounding) * rounding for rounding in roundings]
    if other is not None:
        starts.insert(0, other + round((middle - other) / step) * step)
    for start in starts:
        placed = start + numbers
        if np.abs(placed - part).max() <= tolerance:
            return placed
    return None


def regular_levels(levels: np.ndarray) -> np.ndarray:
    """Pressures in hPa; a pressure that is a whole number but for rounding becomes that number."""
    levels = np.asarray(levels, np.float64)
    whole = np.round(levels)
    return np.where(np.abs(levels - whole) <= _SHARE * np.abs(levels), whole, levels)


def regular_longitudes(longitude: np.ndarray) -> np.ndarray:
    """Ascending longitudes; those that close the circle but for rounding get an even spacing."""
    spacing = 360.0 / len(longitude)
    even = longitude[0] + spacing * np.arange(len(longitude))
    closed = len(longitude) > 1 and abs(longitude[1] - even[1]) * len(longitude) < _CLOSED_DEG
    if closed and np.ptp(np.diff(longitude)) < _CLOSED_DEG:
        return longitude
    for placed in (even, even + np.median(longitude - even)):
        if np.abs(placed - longitude).max() <= min(spacing / _PART, _SHARE * 360.0):
            return placed
    return longitude


class SharedLabels:
    """The coordinates of all files of one record, made equal where they differ by rounding alone.

    xarray joins files by the very values of their coordinates. A latitude in float32 beside the
    same one in float64 would be a second row, with missing values in all other files.
    """

    def __init__(self) -> None:
        self._labels: dict[Hashable, np.ndarray] = {}

    def applied(self, dataset: xr.Dataset) -> xr.Dataset:
        """The dataset with the coordinates of earlier files where these are within the
        tolerance."""
        changed = {}
        for name in dataset.dims:
            values = dataset[name].values if name in dataset.coords else np.empty(0)
            if values.dtype.kind not in "iuf" or not len(values):
                continue
            values = np.asarray(values, np.float64)
            labels = self._labels.get(name, np.empty(0))
            moved = _nearest(values, labels)
            self._labels[name] = np.union1d(labels, moved)
            if not np.array_equal(moved, dataset[name].values):
                changed[name] = dataset[name].copy(data=moved.astype(np.float64))
        return dataset.assign_coords(changed) if changed else dataset


def _nearest(values: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """The nearest of the ascending labels to each value; the value itself where no label is
    near."""
    if not len(labels):
        return values
    spacings = np.concatenate([np.diff(np.sort(values)), np.diff(labels), [np.inf]])
    largest = max(np.abs(values).max(), np.abs(labels).max())
    after = np.minimum(np.searchsorted(labels, values), len(labels) - 1)
    neighbours = labels[np.stack([np.maximum(after - 1, 0), after])]
    nearest = neighbours[np.abs(neighbours - values).argmin(0), np.arange(len(values))]
    tolerance = min(spacings.min() / _PART, _SHARE * largest, _LARGEST_MOVE)
    return np.where(np.abs(nearest - values) <= tolerance, nearest, values)


# Dates that files hold as integers, such as 20200101, as dates.

_DIGITS = {6: "month", 8: "day", 10: "hour"}
_CDO = re.compile(r"day as %Y%m%d\.%f", re.I)


def with_dates(dataset: xr.Dataset, location: str) -> xr.Dataset:
    """A dataset with dates, where `time` held integers YYYYMM, YYYYMMDD or YYYYMMDDHH, or days as
    %Y%m%d.%f, as cdo writes them; anything else is left as it is.

    Raises:
        ValueError: integers of that length that are no dates.
    """
    if "time" not in dataset.coords or dataset["time"].dtype.kind not in "iuf":
        return dataset
    time = dataset["time"]
    values = time.values
    fractions = np.zeros(len(values))
    if _CDO.fullmatch(str(time.attrs.get("units", "")).strip()):
        fractions, values = np.modf(np.asarray(values, np.float64))
    elif values.dtype.kind == "f" or "since" in str(time.attrs.get("units", "")):
        return dataset
    lengths = {len(str(int(value))) for value in values}
    if len(lengths) != 1 or not lengths <= _DIGITS.keys():
        return dataset
    try:
        dates = np.array([_date(str(int(value))) for value in values], "datetime64[us]")
    except ValueError as error:
        raise ValueError(f"{location}: time: {error}") from error
    seconds = np.round(fractions * 86_400).astype(np.int64)
    dates = dates + seconds * np.timedelta64(1_000_000, "us")
    attributes = {key: value for key, value in time.attrs.items() if key != "units"}
    return dataset.assign_coords(time=("time", dates, attributes))


def _date(digits: str) -> np.datetime64:
    """The date of YYYYMM, YYYYMMDD or YYYYMMDDHH."""
    year, month, day, hour = digits[:4], digits[4:6], digits[6:8] or "01", digits[8:] or "00"
    try:
        return np.datetime64(f"{year}-{month}-{day}T{hour}", "us")
    except ValueError as error:
        raise ValueError(f"{digits} is no date; valid: such as 20200131") from error


# Which dimension of a file is which, by what its coordinates say of themselves.
#
# Usual names come first, in `atmossl.data.store`; here are those whose units, standard name or
# type tell, and those that are known to be something else, so that no advice leads to them.

START_NAMES = re.compile(r"init|reference|reftime|base_?time|run_?time|analysis_time|start", re.I)
_NORTH, _EAST = r"deg(ree)?s?[-_ ]?n(orth)?", r"deg(ree)?s?[-_ ]?e(ast)?"


def dimensions_like(axis: str, dataset: xr.Dataset, named_dims: set[str]) -> list[str]:
    """The dimensions that are `axis` (time, level, latitude or longitude) by their attributes or
    type, apart from `named_dims`."""
    used = {str(dim) for array in dataset.data_vars.values() for dim in array.dims}
    return [
        name
        for name in sorted(used - named_dims)
        if name in dataset.coords and _is_like(axis, dataset[name])
    ]


def _is_like(axis: str, coordinate: xr.DataArray) -> bool:
    standard, units = (says(coordinate.attrs, key) for key in ("standard_name", "units"))
    if axis == "level":
        return coordinate.dtype.kind in "iuf" and is_pressure(coordinate)
    if axis == "time":
        dates = coordinate.dtype.kind == "M" or isinstance(
            coordinate.values.flat[0], cftime.datetime
        )
        return (dates and not is_start(coordinate)) or standard == "time"
    return standard == axis or bool(
        re.fullmatch(_NORTH if axis == "latitude" else _EAST, units, re.I)
    )


def projected_dimensions(dataset: xr.Dataset) -> list[str]:
    """The dimensions that belong to a rotated or projected grid by their names or attributes."""
    said = {
        str(name): says(dataset[name].attrs, "standard_name")
        for name in dataset.dims
        if name in dataset.coords
    }
    projected = {"rlat", "rlon", "x", "y", "south_north", "west_east", "i", "j", "nx", "ny", "cell"}
    return sorted(
        str(name)
        for name in dataset.dims
        if re.match("grid_|projection_", said.get(str(name), "")) or str(name) in projected
    )


def start_dimensions(dataset: xr.Dataset) -> list[str]:
    """Dimensions that hold the dates at which forecasts start."""
    return sorted(
        str(name)
        for name in dataset.dims
        if START_NAMES.search(str(name)) or (name in dataset.coords and is_start(dataset[name]))
    )


def check_names(names: Mapping[str, str], location: str) -> None:
    """Check that the dimension taken for time is not named after the start of forecasts.

    names: name in the store -> canonical name.
    """
    for stored, canonical in names.items():
        if canonical == "time" and START_NAMES.search(stored):
            raise ValueError(
                f"{location}: {stored} has the name of the start of forecasts; needed for time: "
                "the dates at which fields are valid, which are these plus the lead time"
            )

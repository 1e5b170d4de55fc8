"""Coordinates put onto the axis that they were meant to be on, within a stated tolerance.

Files store coordinates with rounding errors: hourly times as days with six decimals are some 30 ms
off, latitudes in float32 differ from the same ones in float64, and a pressure of 500 hPa may read
499.99997. Every way in (catalog, Python, `atmossl data ingest`, references of `atmossl evaluate`)
calls the functions here. Times move by a second at most, and never across a gap; degrees and levels
by a hundredth of the spacing and a hundred-thousandth of the largest value at most.
"""

from collections.abc import Hashable

import numpy as np
import xarray as xr

from atmossl.data.calendars import Calendar

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
    """The most frequent step of ascending times, and the numbers of the steps that are another."""
    steps = np.diff(times)
    lengths, counts = np.unique(steps, return_counts=True)
    usual = lengths[counts.argmax()]
    return usual, np.flatnonzero(steps != usual)


def unlike_gaps(times: np.ndarray) -> bool:
    """Whether some step between ascending times is no whole number of usual ones."""
    steps, usual = np.diff(times), usual_step(times)[0]
    return bool((steps % usual != np.timedelta64(0)).any())


def why_uneven(times: np.ndarray, calendar: Calendar) -> str | None:
    """Why training refuses the steps between ascending times, and what to do; None if it takes
    them."""
    usual, breaks = usual_step(times)
    if not len(breaks):
        return None
    steps = np.diff(times) / _HOUR
    at = int(breaks[0])
    what = (
        f"time steps are not uniform: {steps[at]:g} h instead of {usual / _HOUR:g} h after "
        f"{calendar.show(times[at], 's')}"
    )
    if len(breaks) * _MOSTLY < len(steps) or not unlike_gaps(times):
        return (
            f"{what}, the first of {len(breaks)} gaps; `gaps: split` in the catalog entry leaves "
            "them out"
        )
    return (
        f"{what}; steps vary from {steps.min():g} to {steps.max():g} h, {len(breaks)} of "
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
        placed = [_on_axis(part, step, roundings, tolerance) for part in parts] if step else []
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
    part: np.ndarray, step: int, roundings: list[int], tolerance: float
) -> np.ndarray | None:
    """start + number * step, its start as round as the tolerance allows; None if some time would
    move further."""
    numbers = np.arange(len(part)) * step
    middle = float(np.median(part - numbers))
    for rounding in roundings:
        placed = round(middle / rounding) * rounding + numbers
        if np.abs(placed - part).max() <= tolerance:
            return placed
    return None


def regular_levels(levels: np.ndarray) -> np.ndarray:
    """Pressures in hPa, those that are a whole number but for rounding as that number."""
    levels = np.asarray(levels, np.float64)
    whole = np.round(levels)
    return np.where(np.abs(levels - whole) <= _SHARE * np.abs(levels), whole, levels)


def regular_longitudes(longitude: np.ndarray) -> np.ndarray:
    """Ascending longitudes; those that close the circle but for rounding with an even spacing."""
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
    """Coordinates of the files of one record, those that differ by rounding made the same.

    xarray joins files by the very values of their coordinates. A latitude in float32 beside the
    same one in float64 would be a second row, with missing values in all other files.
    """

    def __init__(self) -> None:
        self._labels: dict[Hashable, np.ndarray] = {}

    def applied(self, dataset: xr.Dataset) -> xr.Dataset:
        """The dataset with the labels of earlier files where they are within the tolerance."""
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
    """The nearest of ascending labels to each value, the value itself where none is near."""
    if not len(labels):
        return values
    spacings = np.concatenate([np.diff(np.sort(values)), np.diff(labels), [np.inf]])
    largest = max(np.abs(values).max(), np.abs(labels).max())
    after = np.minimum(np.searchsorted(labels, values), len(labels) - 1)
    neighbours = labels[np.stack([np.maximum(after - 1, 0), after])]
    nearest = neighbours[np.abs(neighbours - values).argmin(0), np.arange(len(values))]
    tolerance = min(spacings.min() / _PART, _SHARE * largest, _LARGEST_MOVE)
    return np.where(np.abs(nearest - values) <= tolerance, nearest, values)

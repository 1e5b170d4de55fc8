"""Dates, steps and coordinates with rounding: equal to those of the input, or refused."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from benchmarks.hostile.inputs.metadata import same, stats
from benchmarks.hostile.inputs.rows import Row
from benchmarks.hostile.stores import dataset, wave, write_catalog

T2M = "2m_temperature"
LAT, LON = (np.arange(8) + 0.5) * 22.5 - 90, np.arange(16) * 22.5
VALUES = wave(T2M, 24, 1, LAT, LON)[:, 0]


def record(
    numbers: np.ndarray, units: str, calendar: str = "proleptic_gregorian", **more: Any
) -> Callable[[Path], None]:
    """A maker of `in.nc` whose times are numbers in units of CF, and of a catalog."""

    def make(folder: Path) -> None:
        time = ("time", numbers, {"units": units, "calendar": calendar})
        coords = {"time": time, "latitude": LAT, "longitude": LON} | more
        values = VALUES[: len(numbers)]
        fields = {T2M: (("time", "latitude", "longitude"), values, {"units": "K"})}
        xr.Dataset(fields, coords).to_netcdf(folder / "in.nc")
        write_catalog(folder, {"all": str(folder / "in.nc")}, {T2M: T2M})

    return make


def dates_of(start: str, count: int, step: np.timedelta64) -> np.ndarray:
    return np.datetime64(start, "ns") + np.arange(count) * step


def check(expected: np.ndarray) -> Callable[[Path], str]:
    """That `out.zarr` has these dates, to the nanosecond, and the values as they were."""

    def compare(folder: Path) -> str:
        store = xr.open_zarr(folder / "out.zarr", consolidated=False)
        dates = store["time"].values
        if not np.array_equal(dates.astype("M8[ns]"), expected):
            off = np.abs(dates.astype("M8[ns]") - expected).max()
            return f"dates are off by up to {off / np.timedelta64(1, 's')} s"
        return same(store[T2M].values, VALUES[: len(expected)])

    return compare


def check_written(year: str) -> Callable[[Path], str]:
    """That the first date in `out.zarr` is in a year, whatever the calendar."""

    def compare(folder: Path) -> str:
        store = xr.open_zarr(folder / "out.zarr", consolidated=False)
        first = str(store["time"].values[0])
        return "" if first.startswith(year) else f"the first date is {first}"

    return compare


INGEST = ("data", "ingest", "input=in.nc", "output=out.zarr")


def both(
    name: str, expect: str, words: tuple[str, ...], make: Callable, compare: Callable | None = None
) -> list[Row]:
    """The two ways in: ingest, and statistics of a catalog entry."""
    return [
        Row(f"{name}, ingest", expect, INGEST, words, make, compare),
        Row(f"{name}, catalog", expect, stats(Path(), T2M, ()), words, make),
    ]


def rows() -> list[Row]:
    return [*_steps(), *_rounding(), *_calendars(), *_wrong()]


def _steps() -> list[Row]:
    rows: list[Row] = []
    for minutes in (5, 7, 10, 20, 40, 60, 90):
        numbers = np.arange(24) * minutes
        make = record(numbers, "minutes since 2020-01-01")
        compare = check(dates_of("2020-01-01", 24, np.timedelta64(minutes, "m")))
        rows.append(Row(f"steps of {minutes} minutes", "right", INGEST, (), make, compare))

    def again(place: Any) -> Any:
        """What ingest wrote is read by statistics."""
        first = place.run(INGEST)
        if first.code:
            return first
        write_catalog(place.folder, {"all": str(place.folder / "out.zarr")}, {T2M: T2M})
        return place.run(stats(Path(), T2M, ()))

    ten = record(np.arange(24) * 10, "minutes since 2020-01-01")
    twenty = record(np.arange(24) * 20, "minutes since 2020-01-01")
    return [
        *rows,
        Row("a store of 10 minutes is used", "right", make=ten, act=again),
        Row("a store of 20 minutes is used", "right", make=twenty, act=again),
    ]


def _rounding() -> list[Row]:
    zero = (np.datetime64("2023-11-16") - np.datetime64("0001-01-01")).astype(int)
    days = np.round(zero + 0.25 + np.arange(24) / 24, 6)
    hourly = dates_of("2023-11-16T06", 24, np.timedelta64(1, "h"))
    hours = (np.arange(24) * 6).astype(np.float32) / 24
    single = ("latitude", LAT.astype(np.float32) + np.float32(1e-5))
    noisy = record(days, "days since 0001-01-01")
    plain = "days since 2020-01-01"
    return [
        *both("days with six decimals", "right", (), noisy, check(hourly)),
        *both("days of single precision", "right", (), record(hours, plain),
              check(dates_of("2020-01-01", 24, np.timedelta64(6, "h")))),
        *both("a latitude of single precision", "right", (),
              record(np.arange(24) / 4, plain, latitude=single)),
    ]  # fmt: skip


def _calendars() -> list[Row]:
    late = record(np.arange(24) * 6, "hours since 3000-01-01")
    early = record(np.arange(24) * 6, "hours since 0850-01-01")
    noleap = record(np.arange(24) * 6, "hours since 2001-02-27", "noleap")
    thirty = record(np.arange(24) * 6, "hours since 2001-02-28", "360_day")
    return [
        *both("the year 3000", "right|refused", ("3000",), late, check_written("3000")),
        *both("the year 850", "right|refused", ("850",), early, check_written("0850")),
        *both("a calendar without leap days", "right", (), noleap, check_written("2001-02-27")),
        *both("a calendar of 360 days", "right", (), thirty, check_written("2001-02-28")),
    ]


def _wrong() -> list[Row]:
    hours = "hours since 2020-01-01"
    steps = np.arange(24) * 6.0
    gap, twice, back = steps.copy(), steps.copy(), steps[::-1].copy()
    gap[12:] += 6
    twice[12:] -= 6
    missing = steps.copy()
    missing[3] = np.nan
    monthly = np.cumsum([0, 31, 29, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31, 31, 28, 31, 30, 31,
                         30, 31, 31, 30, 31, 30], dtype=float)  # fmt: skip

    def inspected(folder: Path) -> None:
        record(monthly, "days since 2020-01-15")(folder)

    def no_units(folder: Path) -> None:
        dataset((T2M,), levels=()).assign_coords(time=np.arange(24)).to_netcdf(folder / "in.nc")
        write_catalog(folder, {"all": str(folder / "in.nc")}, {T2M: T2M})

    inspect = ("data", "inspect", "waves", "data.catalog=catalog.yaml")
    catalog = stats(Path(), T2M, ())
    return [
        Row("a gap", "refused", catalog, ("gap",), record(gap, hours)),
        Row("a gap is inspected", "told", inspect, ("gap",), record(gap, hours)),
        Row("uneven months", "refused", catalog, ("uniform|uneven|step",), inspected),
        Row("uneven months are inspected", "told", inspect, ("uneven|not uniform|refuse",),
            inspected),
        Row("a date twice, ingest", "refused", INGEST, ("twice|duplicate|more than once",),
            record(twice, hours)),
        Row("a date twice, catalog", "refused", catalog, ("twice|duplicate|more than once",),
            record(twice, hours)),
        Row("dates that go back, catalog", "refused|right", catalog, ("ascend|order|sort",),
            record(back, hours)),
        *both("a missing date", "refused", ("time|date",), record(missing, hours)),
        *both("times without units", "refused", ("time|date",), no_units),
        Row("a single date, catalog", "refused", catalog, ("time|step|window",),
            record(steps[:1], hours)),
        *both("months since", "refused", ("month|time",),
              record(np.arange(24.0), "months since 2020-01-01")),
    ]  # fmt: skip

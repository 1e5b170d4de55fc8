"""Coordinates with rounding errors come back as the axis that they were meant to be on."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr
from hypothesis import example, given, settings
from hypothesis import strategies as st

from atmossl.data.axes import (
    STANDARD,
    Calendar,
    SharedLabels,
    integer_units,
    regular_levels,
    regular_longitudes,
    regular_times,
    why_uneven,
)
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers, ingest
from atmossl.data.inputs import open_input
from atmossl.data.inspect import time_advice, time_axis
from atmossl.data.store import open_parts, open_segment
from tests.synthetic import dataset

NAMES = ("temperature",)
CALENDARS = ("standard", "proleptic_gregorian", "noleap", "360_day", "all_leap", "julian")


@settings(deadline=None, max_examples=40)
@given(
    step_s=st.sampled_from([1, 90, 300, 600, 1200, 2400, 3600, 10800, 21600, 86400]),
    removed=st.sets(st.integers(1, 58), max_size=6),
    noise=st.floats(0.0, 0.99),
    seed=st.integers(0, 99),
    unit=st.sampled_from(["ns", "us"]),
)
@example(step_s=90, removed={1, 2, 34, 36}, noise=0.875, seed=0, unit="ns")
def test_noise_of_times_goes_and_gaps_stay(step_s, removed, noise, seed, unit) -> None:
    """Noise up to a second or a hundredth of a step."""
    axis = np.datetime64("1999-12-31T18:00", unit) + np.arange(60) * np.timedelta64(step_s, "s")
    axis = np.delete(axis, sorted(removed))
    largest_ns = noise * min(1e9, step_s * 1e9 / 100)
    errors = np.random.default_rng(seed).uniform(-largest_ns, largest_ns, len(axis))
    noisy = axis + errors.astype("timedelta64[ns]").astype(f"timedelta64[{unit}]")
    found = regular_times(noisy)
    assert np.abs(found - noisy).max() <= np.timedelta64(1, "s")
    np.testing.assert_array_equal(found, axis)


def test_times_that_are_no_axis_stay_as_they_are() -> None:
    monthly = np.arange("2001-01", "2004-01", dtype="datetime64[M]").astype("datetime64[ns]")
    np.testing.assert_array_equal(regular_times(monthly), monthly)
    thirds = np.datetime64("2001-01-01", "ns") + np.arange(50) * np.timedelta64(86400 * 10**9 // 7)
    assert regular_times(thirds) is thirds
    late = np.datetime64("2001-01-01", "ns") + np.array([0, 60, 120, 183, 243]) * np.timedelta64(
        60, "s"
    )
    np.testing.assert_array_equal(regular_times(late), late)


@pytest.mark.filterwarnings("ignore:Unable to decode time axis")  # into datetime64
@settings(deadline=None, max_examples=15)
@given(
    calendar=st.sampled_from(CALENDARS),
    step_us=st.sampled_from([10**6, 5 * 60 * 10**6, 20 * 60 * 10**6, 86_400 * 10**6])
    | st.integers(1, 10**11),
    year=st.sampled_from([1, 1700, 1999, 2000, 3000]),
)
def test_whole_numbers_hold_dates_of_any_step_and_calendar(calendar, step_us, year) -> None:
    dates = xr.date_range(
        f"{year:04d}-02-27", periods=4, freq=f"{step_us}us", calendar=calendar, use_cftime=True
    )
    if calendar == "standard" and 1678 < year < 2262:
        dates = dates.to_datetimeindex(time_unit="ns")
    stored = xr.Dataset(coords={"time": dates})
    encoding = {"time": {"units": integer_units(stored["time"].values), "dtype": "int64"}}
    store: dict = {}
    stored.to_zarr(store, encoding=encoding, consolidated=False)
    opened = xr.open_zarr(store, consolidated=False)["time"].values
    calendars = [Calendar.of(values) for values in (opened, stored["time"].values)]
    assert calendars[0] is not None and calendars[1] is not None
    times = [c.encode(v) for c, v in zip(calendars, (opened, stored["time"].values), strict=True)]
    np.testing.assert_array_equal(times[0], times[1])


@pytest.mark.parametrize("unit", ["days", "hours"])
@pytest.mark.parametrize("calendar", ["standard", "noleap", "360_day"])
def test_noisy_times_are_read_alike_on_every_way_in(unit, calendar, tmp_path: Path) -> None:
    """As GrADS and NOMADS servers write them: days since the year 1 with six decimals."""
    hours = (367.0 * 24 + np.arange(24) / 3) / (24 if unit == "days" else 1)
    store = dataset(variables=NAMES, steps=24).drop_vars("time")
    attributes = {"units": f"{unit} since 2000-01-01 00:00:00", "calendar": calendar}
    store["time"] = ("time", np.round(hours, 6), attributes)
    store.to_netcdf(tmp_path / "noisy.nc")
    opened = open_store(SegmentEntry(location=str(tmp_path / "noisy.nc")))
    expected = xr.date_range(
        "2000-01-01", periods=24, freq="20min", calendar=calendar, use_cftime=calendar != "standard"
    ).shift(367 * 24, "h")
    ingest(
        IngestInput(str(tmp_path / "noisy.nc")),
        tmp_path / "out.zarr",
        ChunkLayout(24, 0, 0, 0, 0, 1),
        Workers("threads", 1), max,
    )  # fmt: skip
    ingested = xr.open_zarr(tmp_path / "out.zarr")
    for source in (opened, opened.dataset, ingested):
        segment = open_segment("s", source, "here", variables=NAMES, levels=[])
        np.testing.assert_array_equal(segment.calendar.dates(segment.times), expected.values)
        np.testing.assert_array_equal(segment.dataset["time"].values, expected.values)
    assert time_axis(opened.dataset["time"].values).gaps == ()


def test_inspect_and_training_agree_on_uneven_steps() -> None:
    start = np.datetime64("2001-01-01", "ns")
    monthly = np.arange("2001-01", "2004-01", dtype="datetime64[M]").astype("datetime64[ns]")
    gappy = start + np.delete(np.arange(40), [5, 20, 21]) * np.timedelta64(6, "h")
    moved = gappy + np.where(np.arange(37) > 20, 1, 0) * np.timedelta64(30, "m")
    even = start + np.arange(10) * np.timedelta64(6, "h")
    for times, advice in ((monthly, "Resample"), (gappy, "gaps: split"), (moved, "gaps: split"),
                          (even, None)):  # fmt: skip
        why = why_uneven(times, STANDARD)
        assert (why is None) == (advice is None) and time_axis(times).refused == why
        store = dataset(variables=NAMES, steps=len(times)).assign_coords(time=times)
        if why is None:
            assert open_segment("s", store, "here", variables=NAMES, levels=[])
            continue
        assert advice in why
        with pytest.raises(ValueError, match="not uniform"):
            open_parts("s", store, "here", variables=NAMES, levels=[])
    assert time_axis(monthly).step_range_hours == (672.0, 744.0)
    assert "gaps: split" in time_advice(time_axis(gappy))[0]
    assert time_advice(time_axis(gappy), "split") == []


def test_longitudes_close_the_circle_in_spite_of_rounding() -> None:
    for count, decimals in ((512, 3), (640, 3), (1080, 4)):
        exact = np.arange(count) * 360.0 / count
        found = regular_longitudes(np.round(exact, decimals))
        np.testing.assert_allclose(found, exact, atol=1e-9)
    exact = np.arange(64) * 5.625
    assert regular_longitudes(exact) is exact
    part = np.round(np.arange(100) * 0.703125, 3)
    assert regular_longitudes(part) is part


def test_levels_are_whole_but_for_rounding() -> None:
    found = regular_levels(np.array([499.99997, 850.0000001, 0.5, 300.5, 1.0]))
    assert found.tolist() == [500.0, 850.0, 0.5, 300.5, 1.0]


@pytest.mark.parametrize("way", ["folder", "ingest"])
def test_files_whose_coordinates_differ_by_rounding_join(way: str, tmp_path: Path) -> None:
    whole = dataset(variables=NAMES, num_lat=30, num_lon=60)
    whole = whole.assign_coords(
        latitude=-87.0 + 5.9 * np.arange(30), longitude=np.arange(60) * 6.0 - 180,
        level=("level", np.array([300.0, 500.0, 850.0]), {"units": "hPa"}),
    )  # fmt: skip
    for number, dtype in enumerate((np.float32, np.float64, np.float32)):
        part = whole.isel(time=slice(8 * number, 8 * number + 8))
        noise = 1 + 1e-7 * (number == 2)
        axes = {n: (n, (part[n].values * noise).astype(dtype), part[n].attrs)
                for n in ("latitude", "longitude", "level")}  # fmt: skip
        part.assign_coords(axes).to_netcdf(tmp_path / f"{number}.nc")
    if way == "folder":
        joined = open_store(SegmentEntry(location=str(tmp_path))).dataset
    else:
        joined = open_input(str(tmp_path), {}, {}, {})
    assert dict(joined.sizes) == dict(whole.sizes)
    segment = open_segment("s", joined, "here", variables=NAMES, levels=[300, 500, 850])
    values = segment.read("temperature", (300, 500, 850), 0, 24, segment.whole())
    order = np.argsort(whole["longitude"].values % 360)
    expected = whole["temperature"].values[..., order].swapaxes(0, 1)
    np.testing.assert_array_equal(values, expected)


def test_labels_of_another_axis_stay_apart() -> None:
    labels = SharedLabels()
    first = xr.Dataset(coords={"latitude": [0.0, 1.0, 2.0]})
    labels.applied(first)
    other = xr.Dataset(coords={"latitude": [0.02, 1.02, 2.02, 3.0]})
    np.testing.assert_array_equal(labels.applied(other)["latitude"], other["latitude"])

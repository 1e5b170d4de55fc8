"""Predictions from records of other calendars, and from records with gaps."""

import warnings
from dataclasses import replace
from datetime import UTC, datetime
from operator import attrgetter
from pathlib import Path

import cftime
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from atmossl.data.store import open_parts
from atmossl.inference.cases import predict_fields
from atmossl.inference.grib import check_grib
from atmossl.inference.plan import chosen_times
from atmossl.inference.writer import write
from atmossl.masking.tasks import Forecast, TemporalInterpolation
from tests.inference.oracle_models import NAMES, STORE, Known, predictor

DATES = xr.date_range("0001-02-27", periods=12, freq="6h", calendar="noleap", use_cftime=True)
MODEL = STORE.assign_coords(time=DATES)


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
@pytest.mark.parametrize("task", [Forecast(24, rollout_hours=12), TemporalInterpolation(6)])
def test_predictions_are_dated_in_the_records_calendar(task, suffix: str, tmp_path: Path) -> None:
    used = predictor(task, Known(attrgetter("guess"), (0.0, 0.0)), store=MODEL)
    times = chosen_times(used, ["0001-02-28T18", "0001-03-01T00"])
    write(used, times, tmp_path / f"out.{suffix}")
    opened = xr.open_zarr if suffix == "zarr" else xr.open_dataset
    more = {"consolidated": False} if suffix == "zarr" else {}
    with opened(tmp_path / f"out.{suffix}", decode_timedelta=True, **more) as store:
        dim = "init_time" if "init_time" in store.dims else "time"
        assert store[dim].values.tolist() == [
            cftime.DatetimeNoLeap(1, 2, 28, 18), cftime.DatetimeNoLeap(1, 3, 1),
        ]  # fmt: skip
        if dim == "init_time":  # the guess is the state at the init time, at all lead times
            now = MODEL["temperature"].isel(time=[7, 8]).values
            for step in range(4):
                found = store["temperature"].isel(lead_time=step, member=0).values
                np.testing.assert_allclose(found, now, atol=2e-5)


@pytest.mark.parametrize("store", [STORE, MODEL])
def test_a_range_names_the_dates_within_both_its_ends(store: xr.Dataset) -> None:
    used = predictor(TemporalInterpolation(6), Known(attrgetter("target")), store=store)
    show = used.segment.calendar.show
    every = [show(time) for time in used.segment.times]
    possible = [show(time) for time in used.possible_times()]
    first, last = possible[0], possible[-1]

    def chosen(*names: str) -> list[str]:
        return [show(time) for time in chosen_times(used, list(names))]

    assert chosen(f"{every[0]}/{every[-1]}") == possible
    assert chosen(f"{first}/{last}/12h") == possible[::2]
    assert chosen(f"{first[:10]}/{first[:10]}") == [t for t in possible if t[:10] == first[:10]]
    assert chosen(last, f"{first}/{first}/1d") == [first, last]
    for text, message in (
        (f"{every[0]}/{every[-1]}/6h", "lacks steps around it"),
        (f"{last}/{first}/6h", "lies after"),
        (f"{first}/{last}/6", "6. is no duration"),
        (f"{first}/{last}/0h", "step 0h"),
        (f"{first}/{last}/6h/1", "START/END/STEP"),
    ):
        with pytest.raises(ValueError, match=message):
            chosen(text)


def test_the_part_of_a_record_that_holds_the_dates_is_predicted() -> None:
    gappy = STORE.isel(time=[0, 1, 2, 3, 4, 7, 8, 9, 10, 11])
    parts = open_parts("waves", gappy, "memory", variables=NAMES, levels=(300, 500, 850),
                       gaps="split")  # fmt: skip
    used = predictor(TemporalInterpolation(6), Known(attrgetter("target")))
    used = replace(used, segments=tuple(parts))
    times = used.possible_times()
    np.testing.assert_array_equal(times, STORE.time.values[[2, 9]])
    for time, fields in zip(times, predict_fields(used, list(times)), strict=True):
        truth = STORE["temperature"].sel(time=time).values
        np.testing.assert_allclose(fields["temperature"].mean(axis=1)[0], truth, atol=2e-5)
    with pytest.raises(ValueError, match="lacks steps around it"):
        chosen_times(used, str(STORE.time.values[8]))


def test_dates_that_do_not_exist_are_named() -> None:
    used = predictor(Forecast(12), Known(attrgetter("target")), store=MODEL)
    for date in ("0001-02-29", "soon"):
        with pytest.raises(ValueError, match=f"init_time=.*{date}.*noleap"):
            chosen_times(used, date)
    with pytest.raises(ValueError, match="0001-02-27T00 is not there or lacks steps around it"):
        chosen_times(used, "0001-02-27")
    with pytest.raises(ValueError, match=r"\.grib2 has no calendar noleap"):
        check_grib(used)


@pytest.mark.parametrize("year", [1, 1600, 3000])
@pytest.mark.parametrize("unit", ["s", "us"])
def test_dates_that_nanoseconds_do_not_reach_keep_their_year(year, unit, tmp_path) -> None:
    dates = np.datetime64(f"{year:04d}-02-27", unit) + np.arange(12) * np.timedelta64(6, "h")
    used = predictor(TemporalInterpolation(6), Known(attrgetter("target")),
                     store=STORE.assign_coords(time=dates))  # fmt: skip
    expected = cftime.DatetimeProlepticGregorian(year, 2, 28, 6)
    asked = [dates[5], str(dates[5]), expected, xr.DataArray(dates[5:6])]
    if year == 3000:
        asked += [pd.Timestamp(str(dates[5])).as_unit("s"), datetime(3000, 2, 28, 6)]
    for times in asked:
        chosen = chosen_times(used, times)
        assert used.segment.calendar.dates(chosen).tolist() == [expected]
    write(used, chosen_times(used, dates[5]), tmp_path / "out.zarr")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unable to decode time axis")
        with xr.open_zarr(tmp_path / "out.zarr", consolidated=False) as store:
            assert [str(t)[:13].replace(" ", "T") for t in store["time"].values] == [
                f"{year:04d}-02-28T06"
            ]


@pytest.mark.parametrize(
    "date",
    [
        np.datetime64("3000-01-01", "s"),
        np.array(["0001-01-01", "2001-01-01"], "datetime64[s]"),
        np.datetime64("2262-06-01", "us"),
        pd.Timestamp("3000-01-01"),
        datetime(3000, 1, 1),
        datetime(2001, 1, 2, tzinfo=UTC),
        pd.Timestamp("2001-01-02", tz="Europe/Berlin"),
        "2001-01-02T00:00+01:00",
        "3000-01-01",
        cftime.DatetimeGregorian(3000, 1, 1),
        cftime.Datetime360Day(2001, 1, 2),
        np.datetime64("NaT"),
    ],
)
def test_dates_that_the_record_cannot_hold_are_refused(date) -> None:
    """Year 3000 in nanoseconds would be 1830."""
    used = predictor(TemporalInterpolation(6), Known(attrgetter("target")))
    with pytest.raises(ValueError, match=r"init_time="):
        chosen_times(used, date)


def test_all_dates_of_hidden_steps_with_known_ones_between_come_once(tmp_path: Path) -> None:
    """Steps 1 and 3 of five: the next case begins behind the second of them."""
    used = predictor(TemporalInterpolation(6, (1, 3)), Known(attrgetter("target")))
    write(used, chosen_times(used, None), tmp_path / "out.zarr")
    with xr.open_zarr(tmp_path / "out.zarr", consolidated=False) as store:
        numbers = np.searchsorted(STORE["time"].values, store["time"].values)
    assert numbers.tolist() == [1, 3, 4, 6, 7, 9]
    with pytest.raises(ValueError, match="come twice or out of order; choose times 18 h apart"):
        write(used, used.segment.times[1:3], tmp_path / "other.zarr")

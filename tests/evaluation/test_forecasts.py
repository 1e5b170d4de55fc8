"""Forecast stores in the layouts that are published, and what they have in common."""

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.forecasts import (
    canonical_forecast,
    check_same_units,
    common_ground,
    parts_of,
    read_part,
)
from tests.evaluation.conftest import make_dataset

STEP = np.timedelta64(6, "h").astype("timedelta64[ns]")


def forecast_of(
    truth: xr.Dataset, *, leads: tuple[int, ...] = (1, 2), shift: float = 0.0
) -> xr.Dataset:
    """The truth of later times plus a constant, dims (init_time, lead_time, ...)."""
    count = truth.sizes["time"] - max(leads)
    parts = [
        truth.isel(time=slice(lead, lead + count))
        .rename(time="init_time")
        .assign_coords(init_time=truth["time"].to_numpy()[:count])
        for lead in leads
    ]
    lead_time = xr.DataArray(np.array(leads) * STEP, dims="lead_time", name="lead_time")
    return (xr.concat(parts, lead_time) + shift).transpose("init_time", "lead_time", ...)


def weatherbench2(forecast: xr.Dataset) -> xr.Dataset:
    """As WeatherBench 2 writes it: time, prediction_timedelta, latitudes from the north,
    longitude before latitude."""
    renamed = forecast.rename(init_time="time", lead_time="prediction_timedelta")
    renamed = renamed.isel(latitude=slice(None, None, -1))
    return renamed.transpose("time", "prediction_timedelta", "level", "longitude", "latitude")


def test_weatherbench_2_and_x_layouts_are_the_same_forecast():
    forecast = forecast_of(make_dataset())
    found = canonical_forecast(weatherbench2(forecast), "theirs.zarr")
    xr.testing.assert_equal(found.transpose(*forecast["temperature"].dims), forecast)
    xr.testing.assert_equal(canonical_forecast(forecast, "ours.zarr"), forecast)


def test_lead_times_as_hours_and_members_by_other_names_are_understood():
    forecast = forecast_of(make_dataset()).expand_dims(number=[1, 2, 3])
    hours = (forecast["lead_time"] / np.timedelta64(1, "h")).astype(int)
    hours.attrs["units"] = "hours"
    found = canonical_forecast(forecast.assign_coords(lead_time=hours), "theirs.zarr")
    assert found.sizes["member"] == 3
    np.testing.assert_array_equal(found["lead_time"], [STEP, 2 * STEP])


def test_units_are_converted_where_they_are_known_and_refused_elsewhere():
    forecast = forecast_of(make_dataset())
    celsius = forecast.assign(temperature=forecast["temperature"] - 273.15)
    celsius["temperature"].attrs["units"] = "degC"
    found = canonical_forecast(celsius, "theirs.zarr")["temperature"]
    assert found.chunks is not None and found.attrs["units"] == "K"
    np.testing.assert_allclose(found, forecast["temperature"], atol=1e-4)
    celsius["temperature"].attrs["units"] = "furlong"
    with pytest.raises(ValueError, match=r"theirs\.zarr: variable temperature .* furlong"):
        canonical_forecast(celsius, "theirs.zarr")


def test_units_of_a_variable_that_is_not_known_are_those_of_the_truth():
    truth = make_dataset().rename(temperature="rain")
    forecast = forecast_of(truth)
    check_same_units({"theirs": forecast}, truth)
    forecast["rain"].attrs["units"] = "mm"
    with pytest.raises(ValueError, match="theirs: rain is in 'mm', the truth in 'K'"):
        check_same_units({"theirs": forecast}, truth)


def test_labels_that_come_twice_are_named():
    forecast = forecast_of(make_dataset())
    for dim in ("init_time", "level"):
        twice = xr.concat([forecast, forecast.isel({dim: [0]})], dim)
        with pytest.raises(ValueError, match=rf"theirs\.zarr: {dim} .* is there twice"):
            canonical_forecast(twice, "theirs.zarr")


def test_what_covers_a_part_of_the_globe_is_compared_there():
    """A region across Greenwich, whose columns go on past 360 degrees."""
    truth = make_dataset(num_times=12)
    part = truth.isel(latitude=slice(2, 6), longitude=[14, 15, 0, 1, 2])
    stores = {
        "ours": canonical_forecast(forecast_of(truth), "ours"),
        "theirs": canonical_forecast(weatherbench2(forecast_of(part)), "theirs"),
    }
    common = common_ground(stores, truth)
    np.testing.assert_array_equal(common.grid.latitude, part["latitude"])
    np.testing.assert_array_equal(common.grid.longitude, [315.0, 337.5, 360.0, 382.5, 405.0])
    whole, region = read_part(stores, common, parts_of(stores, common)[0]).values()
    xr.testing.assert_allclose(whole, region.transpose(*whole["temperature"].dims))
    elsewhere = stores["ours"].isel(longitude=slice(5, 9))
    with pytest.raises(ValueError, match="no area in common; .*theirs"):
        common_ground({**stores, "far": elsewhere}, truth)


def test_a_store_without_times_is_named():
    with pytest.raises(ValueError, match=r"theirs\.zarr: no dimension for time; it has"):
        canonical_forecast(make_dataset().isel(time=0), "theirs.zarr")


def test_starts_without_lead_times_are_told_what_is_missing():
    starts = make_dataset().rename(time="init_time")
    with pytest.raises(ValueError, match=r"theirs\.zarr: no dimension for lead times .*lead_time"):
        canonical_forecast(starts, "theirs.zarr")


def test_common_ground_is_the_intersection_that_the_truth_covers():
    truth = make_dataset(num_times=12)
    ours = forecast_of(truth, leads=(1, 2, 3)).isel(init_time=slice(0, 8))
    theirs = forecast_of(truth[["temperature"]], leads=(2, 3, 4)).isel(init_time=slice(2, 8, 2))
    theirs = theirs.sel(level=[850.0])
    common = common_ground({"ours": ours, "theirs": theirs}, truth.isel(time=slice(0, 9)))
    assert common.variables == ("temperature",)
    np.testing.assert_array_equal(common.levels, [850.0])
    np.testing.assert_array_equal(common.lead_times, [2 * STEP, 3 * STEP])
    # the truth ends at step 8: inits 2 and 4 have both of their valid times
    np.testing.assert_array_equal(common.cases, truth["time"].to_numpy()[[2, 4]])


def test_nothing_in_common_says_what_each_has():
    truth = make_dataset(num_times=12)
    ours, theirs = forecast_of(truth, leads=(1,)), forecast_of(truth, leads=(2,))
    with pytest.raises(ValueError, match=r"lead_time: nothing in common; ours has .*theirs has"):
        common_ground({"ours": ours, "theirs": theirs}, truth)
    with pytest.raises(ValueError, match=r"time: the truth covers 2021-01-01"):
        common_ground({"ours": ours}, make_dataset(start="2021-01-01"))


def test_parts_on_the_common_grid_hold_every_case_once(monkeypatch):
    truth = make_dataset(num_times=12)
    coarse = make_dataset(num_times=12, num_lat=4, num_lon=8)
    stores = {"fine": forecast_of(truth), "coarse": forecast_of(coarse)}
    common = common_ground(stores, truth)
    assert common.grid.shape == (4, 8)
    case_bytes = 4 * 2 * 2 * 8 * 16
    monkeypatch.setattr("atmossl.evaluation.forecasts._CHUNK_BYTES", 3 * case_bytes)
    parts = parts_of(stores, common)
    assert [len(part.cases) for part in parts] == [3, 3, 3, 1] * 2
    read = [read_part(stores, common, part) for part in parts[:4]]
    whole = xr.concat([part["coarse"] for part in read], "init_time")
    xr.testing.assert_equal(whole, stores["coarse"][["temperature"]])
    assert read[0]["fine"]["temperature"].shape[-2:] == (4, 8)

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.baselines import (
    climatology,
    climatology_at,
    climatology_forecast,
    linear_in_time,
    persistence,
)
from atmossl.evaluation.regions import REGIONS, area_mean

STEP = np.timedelta64(6, "h").astype("timedelta64[ns]")
LEADS = np.array([6, 12], dtype="timedelta64[h]").astype("timedelta64[ns]")


def _travelling_wave(dataset, *, cells_per_step: float, num_lon: int = 16) -> xr.Dataset:
    shell = dataset(num_times=9, num_lon=num_lon, variables=("temperature",)) * 0.0
    step = xr.DataArray(np.arange(9), {"time": shell["time"]}, ("time",))
    moved = shell["longitude"] - cells_per_step * 360.0 / num_lon * step
    return shell + np.sin(np.deg2rad(moved))


def test_persistence_error_of_a_travelling_wave(dataset):
    truth = _travelling_wave(dataset, cells_per_step=1.0)
    forecast = persistence(truth, truth["time"][:6], LEADS)
    for lead in (1, 2):
        later = truth["temperature"].isel(time=slice(lead, 6 + lead)).to_numpy()
        ours = forecast["temperature"].isel(lead_time=lead - 1)
        error = area_mean((ours - later) ** 2, REGIONS["global"]).mean()
        # sin(a) - sin(a + d) has a mean square of 2 sin(d / 2)^2, d the shift in radians.
        shift = 2 * np.pi * lead / 16
        assert float(error) == pytest.approx(2 * np.sin(shift / 2) ** 2, rel=1e-5)


def test_linear_interpolation_is_exact_for_a_linear_trend(dataset):
    shell = dataset(num_times=9) * 0.0
    trend = shell + xr.DataArray(np.arange(9.0), {"time": shell["time"]}, ("time",))
    hidden = trend["time"][3:6]
    line = linear_in_time(trend, hidden, before=STEP, after=2 * STEP)
    np.testing.assert_allclose(line["temperature"], trend["temperature"][3:6], rtol=1e-6)


def test_linear_interpolation_ignores_the_hidden_state(dataset):
    truth = dataset(num_times=5)
    spoiled = truth.copy(deep=True)
    spoiled["temperature"][2] = 1e6
    hidden = truth["time"][2:3]
    first, second = (
        linear_in_time(run, hidden, before=STEP, after=STEP) for run in (truth, spoiled)
    )
    xr.testing.assert_equal(first, second)


def test_linear_interpolation_needs_both_sides(dataset):
    truth = dataset(num_times=5)
    with pytest.raises(ValueError, match="known state before.*lacks 2019-12-31T18"):
        linear_in_time(truth, truth["time"][:1], before=STEP, after=STEP)


def test_climatology_is_the_mean_of_each_month_of_all_segments(dataset):
    # 20 January days and 10 February days in one run, more January in another.
    runs = [dataset(num_times=120, start="2020-01-12"), dataset(num_times=8, start="2021-01-03")]
    normal = climatology(runs)
    january = xr.concat([run.sel(time=run["time"].dt.month == 1) for run in runs], "time")
    np.testing.assert_allclose(
        normal["temperature"].sel(month=1), january["temperature"].mean("time"), atol=1e-6
    )
    assert bool(normal["temperature"].sel(month=[3, 12]).isnull().all())


def test_climatology_never_looks_at_the_target(dataset):
    normal = climatology([dataset(num_times=40, start="2020-01-01")])
    test_run = dataset(num_times=8, start="2021-01-05", seed=5)
    ours = climatology_at(normal, test_run["time"])
    first = normal["temperature"].sel(month=1)
    for moment in ours["temperature"]:
        np.testing.assert_array_equal(moment, first)


def test_climatology_forecast_uses_the_month_of_the_valid_time(dataset):
    normal = climatology([dataset(num_times=160, start="2020-01-12")])
    init = np.array(["2021-01-31T18"], dtype="datetime64[ns]")
    forecast = climatology_forecast(normal, init, LEADS)["temperature"]
    assert forecast.dims[:2] == ("init_time", "lead_time")
    np.testing.assert_array_equal(forecast[0, 0], normal["temperature"].sel(month=2))


def test_month_without_training_data_is_an_error(dataset):
    runs = [dataset(num_times=8, start="2020-01-01")]
    july = np.array(["2020-07-01"], dtype="datetime64[ns]")
    with pytest.raises(ValueError, match="month: the climatology .*lacks 7"):
        climatology_at(climatology(runs), july)
    overall = climatology_at(climatology(runs, monthly=False), july)["temperature"]
    np.testing.assert_allclose(overall[0], runs[0]["temperature"].mean("time"), atol=1e-6)


def test_climatology_without_segments_is_an_error():
    with pytest.raises(ValueError, match="segments"):
        climatology([])

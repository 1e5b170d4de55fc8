import numpy as np
import pytest

from atmossl.evaluation.alignment import match_baseline, truth_for
from atmossl.evaluation.baselines import persistence

LEADS = np.array([6, 12], dtype="timedelta64[h]").astype("timedelta64[ns]")


def test_truth_lies_beside_each_valid_time(dataset):
    truth = dataset(num_times=8)
    forecast = persistence(truth, truth["time"][:4], LEADS)
    beside = truth_for(forecast, truth)
    for init in range(4):
        for lead in range(2):
            found = beside["temperature"].isel(init_time=init, lead_time=lead)
            expected = truth["temperature"].isel(time=init + lead + 1)
            np.testing.assert_array_equal(found, expected)
    assert beside["temperature"].dims == forecast["temperature"].dims


def test_missing_dates_are_listed(dataset):
    truth = dataset(num_times=8)
    forecast = persistence(truth, truth["time"][6:], LEADS)
    with pytest.raises(ValueError, match=r"time: the truth lacks 2020-01-03T00.*it has 2020-01-01"):
        truth_for(forecast, truth)


def test_other_grid_is_an_error(dataset):
    truth = dataset(num_times=8)
    forecast = persistence(truth, truth["time"][:4], LEADS)
    with pytest.raises(ValueError, match="latitude, longitude"):
        truth_for(forecast, dataset(num_times=8, num_lat=4))


def test_missing_variable_or_level_is_an_error(dataset):
    truth = dataset(num_times=8)
    forecast = persistence(truth, truth["time"][:4], LEADS)
    with pytest.raises(ValueError, match=r"variables: the truth lacks temperature; it has"):
        truth_for(forecast, truth.drop_vars("temperature"))
    with pytest.raises(ValueError, match="level: the truth lacks 500"):
        truth_for(forecast, truth.sel(level=[850.0]))


def test_coordinates_off_by_rounding_lose_no_cells(dataset):
    truth = dataset(num_times=8)
    forecast = persistence(truth, truth["time"][:4], LEADS)
    rounded = truth.assign_coords(longitude=truth["longitude"] + 1e-5)
    error = forecast - truth_for(forecast, rounded)
    assert error.sizes["longitude"] == truth.sizes["longitude"]


def test_baseline_lacking_a_case_is_named(dataset):
    truth = dataset(num_times=8)
    forecast = persistence(truth, truth["time"][:4], LEADS)
    with pytest.raises(ValueError, match="init_time: baseline slow lacks 2020-01-01T00"):
        match_baseline(forecast.isel(init_time=slice(1, None)), forecast, "slow")


def test_a_time_twice_is_an_error(dataset):
    truth = dataset(num_times=8)
    with pytest.raises(ValueError, match="the same time twice"):
        persistence(truth.isel(time=[0, 0, 1]), truth["time"][:1], LEADS)

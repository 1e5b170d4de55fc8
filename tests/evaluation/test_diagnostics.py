"""Rank histograms, reliability, outliers and spectra against libraries and closed forms."""

import numpy as np
import pytest
import scores.probability
import xarray as xr
import xskillscore

from atmossl.evaluation.climate import Climate
from atmossl.evaluation.diagnostics import (
    Outliers,
    RankHistogram,
    Reliability,
    ZonalSpectrum,
    zonal_power,
)
from atmossl.evaluation.regions import REGIONS, area_weights_like, boxes, stacked_weights
from atmossl.evaluation.scores import Case
from tests.evaluation.conftest import make_dataset


def exchangeable(num_members: int = 4, num_times: int = 30, spread: float = 1.0) -> Case:
    truth = make_dataset(num_times=num_times, seed=1, variables=("temperature",))
    members = [
        spread * make_dataset(num_times=num_times, seed=9 + m)["temperature"]
        for m in range(num_members)
    ]
    climate = Climate.of([truth], quantiles=(0.3, 0.7))
    quantiles = climate.quantiles["temperature"]
    return Case(xr.concat(members, "member"), truth["temperature"], quantiles=quantiles)


def value(statistic, case: Case) -> xr.Dataset:
    weights = area_weights_like(case.truth, REGIONS["global"])
    return statistic.value(statistic.per_time(case, weights).mean("time"))


def test_rank_histogram_equals_the_library_s():
    case = exchangeable()
    found = value(RankHistogram(), case)["frequency"]
    weights = area_weights_like(case.truth, REGIONS["global"])
    expected = scores.probability.rank_histogram(
        case.prediction, case.truth, "member", preserve_dims="level", weights=weights
    )
    np.testing.assert_allclose(found.transpose("level", "rank"), expected, atol=1e-6)


def test_ties_share_their_case_among_the_open_ranks():
    truth = make_dataset(num_times=1)["temperature"] * 0.0
    members = xr.concat([truth - 1, truth, truth, truth + 1], "member")
    found = value(RankHistogram(), Case(members, truth))["frequency"]
    np.testing.assert_allclose(found.isel(level=0), [0, 1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(("spread", "expected"), [(1.0, 1.0), (0.3, 1.9), (3.0, 0.4)])
def test_outliers_tell_narrow_ensembles_from_wide_ones(spread, expected):
    found = value(Outliers(), exchangeable(spread=spread))
    np.testing.assert_allclose(found, expected, atol=0.12)


def test_reliability_equals_the_library_s():
    case = exchangeable()
    level = Case(
        case.prediction.isel(level=0),
        case.truth.isel(level=0),
        quantiles=case.quantiles.isel(level=0),
    )
    equator = xr.where(abs(level.truth["latitude"]) < 12, 1.0, 0.0)  # two rows of one weight
    found = Reliability(0.7).value(Reliability(0.7).per_time(level, equator).mean("time"))
    threshold = level.quantile(0.7)
    rows = {"latitude": np.flatnonzero(equator)}
    event = (level.truth > threshold).isel(rows)
    probability = (level.prediction > threshold).mean("member").isel(rows)
    edges = np.array([-0.125, 0.125, 0.375, 0.625, 0.875, 1.125])
    expected = xskillscore.reliability(
        event, probability, dim=["time", "latitude", "longitude"], probability_bin_edges=edges
    )
    np.testing.assert_allclose(found["observed_frequency"], expected, rtol=1e-6)
    np.testing.assert_allclose(found["share"], expected["samples"] / event.size, rtol=1e-6)
    np.testing.assert_allclose(found["forecast_probability"], [0, 0.25, 0.5, 0.75, 1])


def test_power_of_a_wave_is_its_variance_at_its_wavenumber():
    shell = make_dataset(num_times=1, variables=("temperature",))["temperature"] * 0.0
    wave = shell + 5.0 + 3.0 * np.sin(np.deg2rad(4 * shell["longitude"]) + 0.3)
    power = zonal_power(wave).isel(time=0, level=0, latitude=0)
    expected = np.zeros(9)
    expected[0], expected[4] = 25.0, 4.5
    np.testing.assert_allclose(power, expected, atol=1e-5)


def test_spectrum_sums_to_the_zonal_variance_of_each_region():
    case = exchangeable(num_times=3)
    weights = stacked_weights(case.truth, [REGIONS["global"], REGIONS["tropics"]])
    found = (
        ZonalSpectrum().per_time(case, weights).isel(wavenumber=slice(1, None)).sum("wavenumber")
    )
    variance = case.truth.var("longitude", dtype=np.float64)
    expected = xr.dot(variance, weights, dim="latitude") / weights.sum("latitude")
    np.testing.assert_allclose(found["truth"].transpose(*expected.dims), expected, rtol=1e-6)
    assert (found["ensemble_mean"] < found["members"]).all()


def test_a_box_has_no_zonal_spectrum_and_a_gap_none_at_all():
    case = exchangeable(num_times=2)
    regions = [REGIONS["global"], *boxes({"pacific": (-30, 30, 150, 250)})]
    found = ZonalSpectrum().per_time(case, stacked_weights(case.truth, regions))
    assert found["truth"].isel(region=1).isnull().all()
    assert found["truth"].isel(region=0).notnull().all()
    assert not ZonalSpectrum().applies(Case(case.prediction, case.truth.where(case.truth > 0)))

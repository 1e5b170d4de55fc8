"""Scores of events, tails, quantiles and rain against the definitions, worked out by numpy."""

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.climate import Climate
from atmossl.evaluation.events import Brier, QuantileScore, Seeps, TailCrps
from atmossl.evaluation.regions import REGIONS, area_weights_like
from atmossl.evaluation.scores import Case
from tests.evaluation.conftest import make_dataset


@pytest.fixture(scope="module")
def case() -> Case:
    truth = make_dataset(num_times=6, seed=1, variables=("temperature",))
    members = [make_dataset(num_times=6, seed=9 + m)["temperature"] for m in range(5)]
    climate = Climate.of([make_dataset(num_times=40, seed=3)], quantiles=(0.1, 0.9))
    quantiles = climate.quantiles["temperature"]
    return Case(xr.concat(members, "member"), truth["temperature"], quantiles=quantiles)


def equator(case: Case) -> xr.DataArray:
    """All cells of two rows, which have the same area, so that plain means are the reference."""
    return xr.where(abs(case.truth["latitude"]) < 12, 1.0, 0.0)


def value(score, case: Case) -> np.ndarray:
    return score.value(score.per_time(case, equator(case)).mean("time")).to_numpy()


def arrays(case: Case, level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Members [member time level lat lon], truth and threshold at the two rows, float64."""
    rows = np.flatnonzero(equator(case))
    found = (case.prediction, case.truth, case.quantile(level))
    return tuple(x.isel(latitude=rows).to_numpy().astype(np.float64) for x in found)


def test_quantiles_are_those_of_the_training_record_at_every_cell(case):
    record = make_dataset(num_times=40, seed=3)["temperature"].to_numpy()
    np.testing.assert_allclose(case.quantile(0.9), np.quantile(record, 0.9, axis=0), rtol=1e-5)


@pytest.mark.parametrize(("level", "tail"), [(0.9, "upper"), (0.1, "lower")])
def test_fair_brier_score_of_an_exceedance(case, level, tail):
    members, truth, threshold = arrays(case, level)
    sign = 1 if tail == "upper" else -1
    events = sign * (truth - threshold) >= 0
    count = (sign * (members - threshold) >= 0).sum(axis=0)
    fair = (count / 5 - events) ** 2 - count * (5 - count) / (25 * 4)
    np.testing.assert_allclose(value(Brier(level, tail), case), fair.mean((0, 2, 3)), rtol=1e-6)


def test_brier_score_of_one_member_is_the_share_of_wrong_answers(case):
    single = Case(case.prediction.isel(member=0), case.truth, quantiles=case.quantiles)
    members, truth, threshold = arrays(single, 0.9)
    wrong = (members >= threshold) != (truth >= threshold)
    np.testing.assert_allclose(value(Brier(0.9), single), wrong.mean((0, 2, 3)), rtol=1e-6)


def test_tail_crps_is_the_crps_of_what_exceeds(case):
    members, truth, threshold = arrays(case, 0.9)
    x, y = np.maximum(members, threshold), np.maximum(truth, threshold)
    spread = np.abs(x[:, None] - x[None]).sum((0, 1)) / (2 * 5 * 4)
    expected = np.abs(x - y).mean(0) - spread
    np.testing.assert_allclose(value(TailCrps(0.9), case), expected.mean((0, 2, 3)), rtol=1e-6)


def test_quantile_score_is_the_pinball_loss(case):
    members, truth, _ = arrays(case, 0.9)
    error = truth - np.quantile(members, 0.9, axis=0)
    expected = np.where(error > 0, 0.9 * error, -0.1 * error).mean((0, 2, 3))
    np.testing.assert_allclose(value(QuantileScore(0.9), case), expected, rtol=1e-6)


def rain(seed: int, num_times: int = 200) -> xr.Dataset:
    """Six-hourly rain in m: dry in half of the cases, else exponential with 2 mm in the mean."""
    shell = make_dataset(num_times=num_times, num_lat=4, num_lon=8, variables=("temperature",))
    shell = shell.isel(level=0, drop=True)["temperature"]
    rng = np.random.default_rng(seed)
    amount = rng.exponential(2e-3, shell.shape) * (rng.random(shell.shape) < 0.5)
    return xr.Dataset({"total_precipitation_6hr": shell.copy(data=amount).assign_attrs(units="m")})


def rain_value(predicted: xr.DataArray, truth: xr.Dataset, climate: Climate) -> float:
    name = "total_precipitation_6hr"
    case = Case(predicted, truth[name], rain=climate.rain[name])
    weights = area_weights_like(case.truth, REGIONS["global"])
    return float(Seeps().value(Seeps().per_time(case, weights).mean("time")))


def test_seeps_is_zero_for_truth_and_one_for_chance_and_for_always_dry():
    truth, chance, climate = rain(1), rain(2), Climate.of([rain(0)], quantiles=(0.1, 0.9))
    name = "total_precipitation_6hr"
    assert rain_value(truth[name], truth, climate) == 0.0
    # Equitable: no-skill forecasts have 1 in expectation (Rodwell et al. 2010, section 3).
    assert rain_value(chance[name], truth, climate) == pytest.approx(1.0, abs=0.05)
    assert rain_value(truth[name] * 0.0, truth, climate) == pytest.approx(1.0, abs=0.05)


def test_rain_in_unknown_units_is_named():
    name = "total_precipitation_6hr"
    strange = rain(0)
    strange[name].attrs["units"] = "in"
    with pytest.raises(ValueError, match=rf"{name}: units 'in' of precipitation"):
        Climate.of([strange], quantiles=(0.1, 0.9))

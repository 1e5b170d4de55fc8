from dataclasses import replace

import numpy as np
import properscoring
import pytest
import xarray as xr
import xskillscore
from scipy.stats import norm
from scores.continuous import rmse
from scores.probability import crps_for_ensemble

from atmossl.evaluation.regions import REGIONS, area_weights_like
from atmossl.evaluation.scores import (
    AnomalyCorrelation,
    Bias,
    Case,
    Crps,
    Mae,
    Rmse,
    SpreadSkill,
)
from atmossl.geometry import area_weights

GLOBAL = REGIONS["global"]


def _random_case(dataset, *, num_members: int = 5, num_times: int = 6) -> Case:
    truth = dataset(num_times=num_times, seed=1)["temperature"]
    members = [
        dataset(num_times=num_times, seed=10 + member)["temperature"]
        for member in range(num_members)
    ]
    normal = dataset(num_times=num_times, seed=2)["temperature"].astype(np.float64)
    return Case(xr.concat(members, "member"), truth, normal)


def _value(score, case: Case, region=GLOBAL) -> xr.DataArray:
    weights = area_weights_like(case.truth, region)
    return score.value(score.per_time(case, weights).mean("time"))


def test_rmse_equals_scores_library_over_times_and_cells(dataset):
    case = _random_case(dataset)
    mean = case.prediction.mean("member").astype(np.float64)
    weights = area_weights_like(mean, GLOBAL)
    expected = rmse(mean, case.truth, preserve_dims="level", weights=weights)
    np.testing.assert_allclose(_value(Rmse(), case), expected, rtol=1e-6)


def test_rmse_of_sine_of_latitude_has_its_closed_form(dataset):
    truth = dataset(num_times=3, num_lat=90, num_lon=8)["temperature"] * 0.0
    error = 3.0 * np.sin(np.deg2rad(truth["latitude"]))
    case = Case(truth + error, truth)
    np.testing.assert_allclose(_value(Rmse(), case), 3.0 / np.sqrt(3.0), rtol=1e-3)


def test_rmse_takes_the_root_after_the_mean_over_times(dataset):
    truth = dataset(num_times=2)["temperature"] * 0.0
    error = xr.DataArray([3.0, 4.0], {"time": truth["time"]}, ("time",))
    np.testing.assert_allclose(_value(Rmse(), Case(truth + error, truth)), np.sqrt(12.5), rtol=1e-6)


def test_rmse_of_regions_adds_up_to_the_global_one(dataset):
    case = _random_case(dataset)
    latitude = case.truth["latitude"].to_numpy()
    weights = area_weights(latitude)
    share = {
        name: weights[REGIONS[name].contains(case.truth["latitude"])].sum() for name in REGIONS
    }
    parts = ("tropics", "northern_extratropics", "southern_extratropics")
    squared = sum(_value(Rmse(), case, REGIONS[name]) ** 2 * share[name] for name in parts)
    np.testing.assert_allclose(squared / share["global"], _value(Rmse(), case) ** 2, rtol=1e-6)


def test_mae_and_bias_match_numpy(dataset):
    case = _random_case(dataset)
    error = (case.prediction.mean("member") - case.truth).to_numpy().astype(np.float64)
    weights = np.broadcast_to(area_weights(case.truth["latitude"].to_numpy())[:, None], error.shape)
    by_level = [
        (
            np.average(np.abs(error[:, k]), weights=weights[:, k]),
            np.average(error[:, k], weights=weights[:, k]),
        )
        for k in range(2)
    ]
    np.testing.assert_allclose(_value(Mae(), case), [pair[0] for pair in by_level], rtol=1e-5)
    np.testing.assert_allclose(_value(Bias(), case), [pair[1] for pair in by_level], atol=1e-6)


@pytest.mark.parametrize("centred_on", [0.0, 50.0])
def test_acc_is_the_weighted_correlation_of_anomalies(dataset, centred_on):
    case = _random_case(dataset)
    # A constant added to the prediction changes nothing: the correlation is centred.
    case = Case(case.prediction + centred_on, case.truth, case.climatology)
    predicted = (case.prediction.mean("member", dtype=np.float64) - case.climatology)[0, 0]
    observed = (case.truth - case.climatology)[0, 0]
    weights = np.repeat(area_weights(case.truth["latitude"].to_numpy()), 16)
    covariance = np.cov(predicted.to_numpy().ravel(), observed.to_numpy().ravel(), aweights=weights)
    expected = covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])
    means = AnomalyCorrelation().per_time(case, area_weights_like(case.truth, GLOBAL))["acc"]
    assert float(means[0, 0]) == pytest.approx(expected, abs=1e-6)
    assert case.climatology is not None
    anomalies = [x.astype(np.float64) - case.climatology for x in (case.ensemble_mean, case.truth)]
    everywhere = area_weights_like(case.truth, GLOBAL) * xr.ones_like(case.truth[0, 0])
    cells = ["latitude", "longitude"]
    by_library = xskillscore.pearson_r(*anomalies, dim=cells, weights=everywhere.transpose(*cells))
    np.testing.assert_allclose(means, by_library.transpose(*means.dims), atol=1e-6)


def test_acc_is_one_for_truth_and_missing_for_climatology(dataset):
    case = _random_case(dataset)
    perfect = Case(case.truth, case.truth, case.climatology)
    np.testing.assert_allclose(_value(AnomalyCorrelation(), perfect), 1.0, rtol=1e-9)
    no_anomaly = Case(case.climatology, case.truth, case.climatology)
    assert bool(_value(AnomalyCorrelation(), no_anomaly).isnull().all())


def test_fair_crps_matches_three_libraries(dataset):
    case = _random_case(dataset)
    members = case.prediction.transpose(..., "member").to_numpy().astype(np.float64)
    # The empirical CRPS over-counts spread by (M - 1) / M: correct the reference to fair.
    empirical = properscoring.crps_ensemble(case.truth.to_numpy(), members)
    half_spread = np.abs(members[..., :, None] - members[..., None, :]).mean((-1, -2)) / 2
    np.testing.assert_allclose(case.crps, empirical - half_spread / 4.0, atol=1e-6)
    ours = Crps().per_time(case, area_weights_like(case.truth, GLOBAL))["mean"]
    weights = area_weights_like(case.truth, GLOBAL)
    theirs = crps_for_ensemble(
        case.prediction,
        case.truth,
        "member",
        method="fair",
        preserve_dims=["time", "level"],
        weights=weights,
    )
    np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    other = xskillscore.crps_ensemble(
        case.truth, case.prediction, member_dim="member", dim=[], issorted=False
    )
    np.testing.assert_allclose(other, empirical, atol=1e-5)
    np.testing.assert_allclose(replace(case, are_draws=False).crps, empirical, atol=1e-6)


def test_crps_of_gaussian_sample_is_the_closed_form_one(dataset):
    rng = np.random.default_rng(0)
    truth = dataset(num_times=1, levels=(500.0,))["temperature"] * 0 + 0.7
    members = rng.standard_normal((400, *truth.shape))
    case = Case(xr.DataArray(members, truth.coords, ("member", *truth.dims)), truth)
    z = 0.7
    # Gneiting and Raftery (2007), equation 21, for mean 0 and deviation 1.
    expected = z * (2 * norm.cdf(z) - 1) + 2 * norm.pdf(z) - 1 / np.sqrt(np.pi)
    assert _value(Crps(), case).item() == pytest.approx(expected, rel=0.01)


def test_crps_of_one_member_is_the_absolute_error(dataset):
    case = _random_case(dataset, num_members=1)
    np.testing.assert_allclose(_value(Crps(), case), _value(Mae(), case))


def test_spread_skill_is_one_for_exchangeable_members(dataset):
    case = _random_case(dataset, num_members=4, num_times=40)
    np.testing.assert_allclose(_value(SpreadSkill(), case), 1.0, atol=0.03)
    narrow = Case(case.prediction * 0.5, case.truth)
    assert float(_value(SpreadSkill(), narrow).max()) < 0.7


def test_missing_truth_is_left_out_of_every_score(dataset):
    case = _random_case(dataset)
    here = case.truth["longitude"] < 180.0
    half = Case(case.prediction, case.truth.where(here), case.climatology)
    parts = (case.prediction, case.truth, case.climatology)
    cut = Case(*(part.where(here, drop=True) for part in parts if part is not None))
    for score in (Rmse(), Mae(), Bias(), Crps(), SpreadSkill()):
        np.testing.assert_allclose(_value(score, half), _value(score, cut), rtol=1e-6)
    acc = AnomalyCorrelation()
    np.testing.assert_allclose(_value(acc, half), _value(acc, cut), rtol=1e-6)


def test_scores_with_gaps_are_those_of_the_library_over_what_is_known(dataset):
    """Weights of missing cells count neither above nor below the line, whatever their number."""
    case = _random_case(dataset)
    rng = np.random.default_rng(0)
    known = case.truth.copy(data=rng.random(case.truth.shape)) > 0.4
    truth = case.truth.where(known)
    truth[1] = np.nan  # a date without any truth
    gappy = Case(case.prediction, truth, case.climatology)
    weights = area_weights_like(truth, GLOBAL)
    for time in (0, 2, 3):
        for level in range(truth.sizes["level"]):
            where = {"time": time, "level": level}
            cells = known.isel(where).to_numpy()
            own = weights.broadcast_like(truth).isel(where).transpose("latitude", "longitude")
            weight = xr.DataArray(own.to_numpy()[cells], dims="cell")
            weight = weight / weight.mean()
            flat = {}
            for name, field in (("truth", case.truth), ("members", case.prediction)):
                values = field.isel(where).transpose(..., "latitude", "longitude").to_numpy()
                dims = ("member", "cell")[2 - (values.ndim - 1) :]
                flat[name] = xr.DataArray(values[..., cells], dims=dims)
            mean = flat["members"].mean("member").astype(np.float64)
            crps = crps_for_ensemble(
                flat["members"], flat["truth"], "member", method="fair", weights=weight
            )
            expected = {
                Rmse(): rmse(mean, flat["truth"], weights=weight),
                Crps(): crps if isinstance(crps, xr.DataArray) else crps["temperature"],
                AnomalyCorrelation(): _correlation(case, where, cells, own.to_numpy()),
            }
            for score, reference in expected.items():
                means = score.per_time(gappy, weights).isel(where)
                np.testing.assert_allclose(score.value(means), reference, rtol=1e-5)
    assert np.isnan(Rmse().per_time(gappy, weights)["mean"].isel(time=1)).all()


def _correlation(case: Case, where: dict, cells: np.ndarray, weights: np.ndarray) -> float:
    anomalies = [
        (field.isel(where) - case.climatology.isel(where)).transpose("latitude", "longitude")
        for field in (case.prediction.mean("member").astype(np.float64), case.truth)
    ]
    covariance = np.cov([a.to_numpy()[cells] for a in anomalies], aweights=weights[cells], ddof=0)
    return covariance[0, 1] / np.sqrt(covariance[0, 0] * covariance[1, 1])

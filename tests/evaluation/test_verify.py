import numpy as np
import pandas as pd
import pytest
import xarray as xr
from scores.stats.statistical_tests import diebold_mariano

from atmossl.evaluation.baselines import (
    climatology_forecast,
    linear_in_time,
    persistence,
)
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.diagnostics import RankHistogram, ZonalSpectrum
from atmossl.evaluation.regions import REGIONS
from atmossl.evaluation.verify import Tally, verify
from atmossl.geometry import area_weights

LEADS = np.array([6, 12], dtype="timedelta64[h]").astype("timedelta64[ns]")
STEP = LEADS[0]
FAST = BlockBootstrap(num_resamples=100)


def _noisy_forecast(truth: xr.Dataset, num_inits: int, noise: float) -> xr.Dataset:
    """Truth plus independent noise in each of five members."""
    rng = np.random.default_rng(4)
    perfect = xr.concat(
        [
            truth.isel(time=slice(lead, lead + num_inits))
            .rename(time="init_time")
            .assign_coords(init_time=truth["time"][:num_inits].to_numpy())
            for lead in (1, 2)
        ],
        xr.DataArray(LEADS, dims="lead_time", name="lead_time"),
    )
    members = perfect.expand_dims(member=np.arange(5))
    noisy = members.map(lambda field: field + noise * rng.standard_normal(field.shape))
    return noisy.transpose("init_time", "lead_time", "member", ...)


def _table(dataset, **options) -> pd.DataFrame:
    truth = dataset(num_times=16, seed=1)
    forecast = _noisy_forecast(truth, 12, noise=0.5)
    history = [dataset(num_times=20, start="2019-01-01")]
    climate = Climate.of(history, quantiles=(0.05, 0.95))
    init = forecast["init_time"]
    baselines = {
        "persistence": persistence(truth, init, LEADS),
        "climatology": climatology_forecast(climate.mean, init, LEADS),
    }
    settings = {"task": "forecast", "rng": np.random.default_rng(0), "bootstrap": FAST}
    return verify(forecast, truth, baselines, climate, **(settings | options))


def _one(table: pd.DataFrame, **labels) -> pd.Series:
    rows = table
    for column, wanted in labels.items():
        rows = rows[rows[column] == wanted]
    assert len(rows) == 1, rows
    return rows.iloc[0]


def test_scores_of_known_noise(dataset):
    labels = {"variable": "temperature", "level": 500.0, "lead_hours": 12.0}
    table = _table(dataset)
    ours = _one(table, source="model", score="rmse", **labels)
    assert ours["value"] == pytest.approx(0.5 / np.sqrt(5), rel=0.03)
    assert ours["low"] < ours["value"] < ours["high"]
    assert ours["units"] == "K"
    # White noise of variance 1: persistence misses by sqrt(2).
    theirs = _one(table, source="persistence", score="rmse", **labels)
    assert theirs["value"] == pytest.approx(np.sqrt(2), rel=0.06)
    ratio = _one(table, score="rmse_ratio_vs_persistence", **labels)
    assert ratio["value"] == pytest.approx(ours["value"] / theirs["value"], rel=1e-6)
    assert ratio["source"] == "model"
    assert ratio["low"] < ratio["value"] < ratio["high"]
    # Members have the truth at their centre and are not exchangeable with it.
    spread = _one(table, source="model", score="spread_skill", **labels)
    assert spread["value"] == pytest.approx(np.sqrt(6), rel=0.03)


def test_every_source_has_every_score_it_can_have(dataset):
    table = _table(dataset, regions=(REGIONS["global"], REGIONS["tropics"]))
    count = table.groupby(["source", "score"]).size()
    per_score = 2 * 2 * 2 * 2  # variables, levels, leads, regions
    assert set(count) == {per_score}
    assert ("persistence", "spread_skill") not in count
    assert ("model", "rmse_ratio_vs_climatology") in count
    assert (
        table[(table["source"] == "climatology") & (table["score"] == "acc")]["value"].isna().all()
    )


def test_same_seed_gives_the_same_table(dataset):
    pd.testing.assert_frame_equal(_table(dataset), _table(dataset))


def test_no_interval_from_less_than_two_blocks(dataset):
    table = _table(dataset, bootstrap=BlockBootstrap(block_length=8, num_resamples=10))
    assert table[["low", "high"]].isna().all(axis=None)
    assert (table["num_times"] == 12).all()


def test_tasks_without_lead_time_and_surface_variables(dataset):
    truth = dataset(num_times=16)
    truth = truth.assign(sea_level=truth["temperature"].isel(level=0, drop=True))
    hidden = truth["time"][1:15]
    line = linear_in_time(truth, hidden, before=STEP, after=STEP)
    table = verify(
        truth.sel(time=hidden).expand_dims(member=[0]),
        truth,
        {"linear": line},
        task="temporal_interpolation",
        rng=np.random.default_rng(0),
        bootstrap=FAST,
    )
    assert table["lead_hours"].isna().all()
    assert table[table["variable"] == "sea_level"]["level"].isna().all()
    assert "acc" not in set(table["score"])
    assert "spread_skill" not in set(table["score"])
    assert _one(table, variable="sea_level", source="model", score="rmse")["value"] == 0.0


def test_wrong_input_is_named(dataset):
    truth = dataset(num_times=16)
    forecast = persistence(truth, truth["time"][:12], LEADS)
    settings = {"task": "forecast", "rng": np.random.default_rng(0), "bootstrap": FAST}
    with pytest.raises(ValueError, match="time: the truth lacks 2020-01-03T06"):
        verify(forecast, truth.isel(time=slice(9)), {}, **settings)
    with pytest.raises(ValueError, match="baselines: 'model'"):
        verify(forecast, truth, {"model": forecast}, **settings)
    with pytest.raises(ValueError, match="baseline late lacks"):
        verify(forecast, truth, {"late": forecast.isel(init_time=slice(2, None))}, **settings)


def test_cases_in_any_pieces_give_the_same_table(dataset):
    truth = dataset(num_times=16, seed=1)
    forecast = _noisy_forecast(truth, 12, noise=0.5)
    still = persistence(truth, forecast["init_time"], LEADS)
    climate = Climate.of([dataset(num_times=20, start="2019-01-01")], quantiles=(0.05, 0.95))
    tables = []
    for pieces in ([slice(0, 12)], [slice(0, 5), slice(5, 6), slice(6, 12)]):
        tally = Tally(task="forecast", diagnostics=(RankHistogram(),))
        for piece in pieces:
            part = {"init_time": piece}
            tally.add(forecast.isel(part), truth, {"persistence": still.isel(part)}, climate)
        tables.append(tally.table(FAST, np.random.default_rng(0)))
    pd.testing.assert_frame_equal(*tables)


def test_ensembles_of_any_size_and_gaps_stand_side_by_side(dataset):
    """A baseline of four members with a case and a cell missing is scored as if they were not."""
    truth = dataset(num_times=16, seed=1)
    ours = _noisy_forecast(truth, 12, noise=0.5)
    theirs = ours.isel(member=slice(4)).copy(deep=True)
    theirs["temperature"].values[3] = np.nan
    theirs["temperature"].values[5, :, 0, :, 2, 4] = np.nan  # in one member, of both lead times
    tally = Tally(task="forecast", diagnostics=(RankHistogram(), ZonalSpectrum()))
    tally.add(ours, truth, {"theirs": theirs})
    found = tally.diagnosed()["rank_histogram", "temperature"]["frequency"]
    assert found.sizes["rank"] == 6 and bool(found.sel(source="theirs", rank=5).isnull().all())
    np.testing.assert_allclose(found.sum("rank"), 1.0)
    gappy = Tally(task="forecast", diagnostics=(RankHistogram(), ZonalSpectrum()))
    alone = ours.isel(member=slice(4))
    gappy.add(alone.isel(init_time=[0, 1, 2, 4, *range(6, 12)]), truth, {})
    spectra = [t.diagnosed()["zonal_spectrum", "temperature"] for t in (tally, gappy)]
    xr.testing.assert_allclose(
        spectra[0].sel(source="theirs", drop=True), spectra[1].isel(source=0, drop=True)
    )


def test_seasons_are_scored_apart(dataset):
    truth = dataset(num_times=16, start="2020-02-28", seed=1)
    forecast = persistence(truth, truth["time"][:12], LEADS)
    table = verify(
        forecast, truth, {}, task="forecast", rng=np.random.default_rng(0), bootstrap=FAST
    )
    labels = {"variable": "temperature", "level": 500.0, "lead_hours": 6.0, "score": "rmse"}
    assert set(table["season"]) == {"all", "DJF", "MAM"}
    valid = forecast["init_time"] + LEADS[0]
    beside = truth["temperature"].sel(time=valid.to_numpy(), level=500.0).to_numpy()
    error = forecast["temperature"].sel(level=500.0, lead_time=LEADS[0]).to_numpy() - beside
    weights = np.repeat(area_weights(truth["latitude"].to_numpy())[:, None], 16, axis=1)
    spring = (valid.dt.month == 3).to_numpy()
    expected = np.sqrt(np.average((error[spring] ** 2).mean(axis=0), weights=weights))
    assert _one(table, season="MAM", **labels)["value"] == pytest.approx(expected, rel=1e-5)


def test_overall_scores_are_the_means_of_the_table_s(dataset):
    truth = dataset(num_times=16, seed=1)
    forecast = _noisy_forecast(truth, 12, noise=0.5)
    tally = Tally(task="forecast")
    still = persistence(truth, forecast["init_time"], LEADS)
    tally.add(forecast, truth, {"persistence": still})
    overall = tally.overall(FAST, np.random.default_rng(0))
    assert list(overall["baseline"]) == ["persistence", "persistence", ""]
    table = tally.table(FAST, np.random.default_rng(0)).query("source == 'model'")
    for row, score in zip(
        overall.to_dict("records"),
        ("rmse_ratio_vs_persistence", "crps_ratio_vs_persistence", "spread_skill"),
        strict=True,
    ):
        assert row["score"] in score
        values = table[table["score"] == score]["value"]
        assert row["value"] == pytest.approx(values.mean())
        assert row["low"] < row["value"] < row["high"]
        assert row["high"] < 1 or score == "spread_skill"  # of members all around the truth: 2.5
        assert row["p_value"] == pytest.approx(2 / 101)


def test_p_value_agrees_with_diebold_and_mariano(dataset):
    """Two forecasts of equal skill are not told apart, two of unequal skill are."""
    truth = dataset(num_times=90, seed=1, num_lat=4, num_lon=8)[["temperature"]]
    inits = 60
    first = _noisy_forecast(truth, inits, noise=0.5).isel(member=0, lead_time=[0])
    for noise, differs in ((0.5, False), (0.6, True)):
        second = _noisy_forecast(truth, inits, noise=noise).isel(member=1, lead_time=[0])
        table = verify(
            first, truth, {"other": second}, task="f", rng=np.random.default_rng(0),
            bootstrap=BlockBootstrap(block_length=1, num_resamples=500),
        )  # fmt: skip
        ours = _one(table, score="rmse_ratio_vs_other", level=500.0)["p_value"]
        valid = truth["temperature"].sel(level=500.0)[1 : inits + 1].to_numpy()
        errors = [
            ((f["temperature"].sel(level=500.0).squeeze().to_numpy() - valid) ** 2).mean((1, 2))
            for f in (first, second)
        ]
        series = xr.DataArray(
            [errors[1] - errors[0]], dims=("lead", "time"), coords={"h": ("lead", [1])}
        )
        lower = float(diebold_mariano(series, "lead", "h")["ci_lower"][0])
        assert (lower > 0) == differs == (ours < 0.05)

"""`atmossl evaluate forecasts=[..]` on stores in WeatherBench 2's layout, written here."""

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import scores.continuous
import xarray as xr

from atmossl.cli import compose_config
from atmossl.commands.evaluate import evaluate
from atmossl.data.store import open_segment
from atmossl.evaluation.forecasts import canonical_forecast
from atmossl.evaluation.verify import rows_where
from atmossl.geometry import area_weights
from atmossl.schema import EvaluateConfig, parse
from atmossl.scorecard.forecasts import (
    _check_some_scored,
    _where_all_have,
    score_forecasts,
)
from tests.evaluation.test_forecasts import forecast_of, weatherbench2
from tests.synthetic import catalog
from tests.synthetic import dataset as waves


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A catalog, our forecast with three members, and theirs, on a finer grid and with a bias."""
    folder = tmp_path_factory.mktemp("compare")
    truth = waves(steps=40, start="2001-02-20")
    catalog(folder, train=waves(steps=40, seed=1), validation=truth, test=truth)
    rng = np.random.default_rng(0)
    ours = forecast_of(truth).expand_dims(member=3)
    ours = ours.map(lambda field: field + 0.1 * rng.standard_normal(field.shape))
    ours.transpose("init_time", "lead_time", "member", ...).astype("float32").to_zarr(
        folder / "ours.zarr", consolidated=False
    )
    theirs = weatherbench2(forecast_of(finer(truth), leads=(1, 2, 3), shift=0.5))
    theirs.astype("float32").to_zarr(folder / "theirs.zarr", consolidated=False)
    return folder


def finer(coarse: xr.Dataset) -> xr.Dataset:
    """Every cell cut into 2 x 2 with the same value, so that its block means are the coarse."""
    fine = coarse.isel(latitude=np.repeat(np.arange(8), 2), longitude=np.repeat(np.arange(16), 2))
    latitude = -90 + 11.25 * (np.arange(16) + 0.5)
    longitude = coarse["longitude"].to_numpy()[0] - 5.625 + 11.25 * np.arange(32)
    return fine.assign_coords(latitude=latitude, longitude=longitude)


def run(folder: Path, output: str, *overrides: str) -> Path:
    values = compose_config(
        "evaluate",
        [
            "data=waves",
            f"data.catalog={folder / 'catalog.yaml'}",
            f"output={folder / output}",
            *overrides,
        ],
    )
    return evaluate(values, "atmossl evaluate forecasts=[..]")


@pytest.fixture(scope="module")
def report(folder: Path) -> Path:
    stores = f"forecasts=[{folder / 'ours.zarr'},{folder / 'theirs.zarr'}]"
    (folder / "report").mkdir()  # an empty folder is no output
    return run(folder, "report", stores, "bootstrap=50", "boxes={pacific: [-30, 30, 150, 250]}")


def test_both_are_scored_on_common_ground_as_the_library_does(report: Path, folder: Path):
    table = pd.read_csv(report / "scores.csv")
    assert {"ours", "theirs", "persistence", "climatology"} == set(table["source"])
    assert set(table["lead_hours"]) == {6.0, 12.0}  # only theirs has 18 h
    assert {"pacific", "tropics", "poles"} < set(table["region"])
    assert {"all", "DJF", "MAM"} == set(table["season"])  # from 20 February on
    truth = forecast_of(xr.open_zarr(folder / "test.zarr", consolidated=False).load())
    ours = xr.open_zarr(folder / "ours.zarr", consolidated=False).load()
    init = ours["init_time"][:37]  # theirs has no later one
    rows = table.query("region == 'global' and season == 'all' and score == 'rmse'")
    weights = truth["latitude"].copy(data=area_weights(truth["latitude"].to_numpy()))
    expected = scores.continuous.rmse(
        ours["temperature"].mean("member", dtype=float).sel(init_time=init),
        truth["temperature"].sel(init_time=init),
        preserve_dims=["level", "lead_time"],
        weights=weights,
    )
    found = rows.query("source == 'ours' and variable == 'temperature'")
    found = found.set_index(["level", "lead_hours"])["value"].to_xarray()
    np.testing.assert_allclose(found, expected.transpose("level", "lead_time"), rtol=1e-5)
    theirs = rows.query("source == 'theirs'")["value"]
    np.testing.assert_allclose(theirs, 0.5, rtol=1e-4)  # a pure bias, regridded exactly


def test_the_better_of_two_models_is_told_with_significance(report: Path):
    table = pd.read_csv(report / "scores.csv")
    ratio = table.query(
        "score == 'rmse_ratio_vs_theirs' and region == 'global' and season == 'all'"
    )
    np.testing.assert_allclose(ratio["value"], 0.1 / np.sqrt(3) / 0.5, rtol=0.05)
    assert (ratio["high"] < 1).all()
    assert (ratio["p_value"] <= 2 / 51 + 1e-9).all()  # none of 50 resamples on the other side


def test_the_page_refers_to_nothing_outside_itself(report: Path):
    page = (report / "index.html").read_text()
    assert "atmossl evaluate forecasts=[..]" in page
    assert page.count("<img") >= 10
    sources = re.findall(r'(?:src|href)="([^"]{0,12})', page)
    assert all(source.startswith(("data:image/", "#")) for source in sources)


def test_numbers_are_the_same_in_zarr_as_in_the_table(report: Path):
    table = pd.read_csv(report / "scores.csv")
    tree = xr.open_datatree(report / "scores.zarr", engine="zarr")
    arrays = tree["forecasts/scores"].to_dataset()
    row = table.query("source == 'theirs' and score == 'crps' and region == 'tropics'").iloc[3]
    labels = {name: row[name] for name in arrays["value"].dims}
    assert float(arrays["value"].sel(labels)) == pytest.approx(row["value"])
    histogram = tree["forecasts/rank_histogram/temperature"]["frequency"]
    np.testing.assert_allclose(histogram.sum("rank"), 1.0, rtol=1e-6)
    assert histogram.sizes["rank"] == 4


@pytest.mark.usefixtures("report")
def test_bad_input_is_named_before_any_work(folder: Path):
    ours = folder / "ours.zarr"
    with pytest.raises(ValueError, match="exists"):
        run(folder, "report", f"forecasts=[{ours}]")
    with pytest.raises(ValueError, match=r"nowhere\.zarr does not exist"):
        run(folder, "other", f"forecasts=[{ours},nowhere.zarr]")
    with pytest.raises(ValueError, match="the name ours is taken"):
        run(folder, "other", f"forecasts=[{ours},{ours}]")
    with pytest.raises(ValueError, match="regions=moon: unknown; valid: global, "):
        run(folder, "other", f"forecasts=[{ours}]", "regions=[moon]")
    with pytest.raises(ValueError, match=r"boxes\.line=.* has no cell"):
        run(folder, "other", f"forecasts=[{ours}]", "boxes={line: [1, 2, 0, 9]}")
    with pytest.raises(ValueError, match=r"boxes.a=\[1,2\]: needed: south, north"):
        run(folder, "other", f"forecasts=[{ours}]", "boxes={a: [1, 2]}")
    with pytest.raises(ValueError, match="tails"):
        run(folder, "other", f"forecasts=[{ours}]", "tails=[0.9,0.1]")
    assert not (folder / "other").exists()


def test_all_are_scored_where_all_have_values():
    ours = forecast_of(waves(steps=6)[["temperature"]])
    theirs = ours.copy(deep=True).expand_dims(member=2).copy(deep=True)
    theirs["temperature"].values[1, 2, 0, 0, 3, 4] = np.nan
    one, others, share = _where_all_have(ours, {"theirs": theirs, "persistence": ours})
    assert share == pytest.approx(1 / ours["temperature"].size)
    for found in (one, *others.values()):
        lacks = found["temperature"].isnull()
        assert set(np.argwhere(lacks.values)[:, -1]) == {4}
        assert bool((lacks.sum(("latitude", "longitude", "level")) <= 1).all())
    assert _where_all_have(ours, {"persistence": ours})[0] is ours


def test_a_forecast_is_held_against_one_segment_of_the_truth(dataset):
    """The truth in two segments, the second another run: cases that run from one into the next are
    left out, and those of each have its errors."""
    truth = dataset(num_times=40, variables=["temperature"], levels=[500.0])
    first, second = (
        open_segment(name, part, "memory", variables=["temperature"], levels=[500])
        for name, part in (
            ("first", truth.isel(time=slice(0, 18))),
            ("second", truth.isel(time=slice(18, 40)) + 1),
        )
    )
    values = compose_config("evaluate", ["output=_", "bootstrap=5", "regions=[]"])
    config: EvaluateConfig = parse(EvaluateConfig, values)
    forecasts = {"ours": canonical_forecast(forecast_of(truth), "ours")}
    report = score_forecasts(config, forecasts, [second, first], [first])
    mae = rows_where(report.table, score="mae", season="all", lead_hours=6.0)
    assert set(mae["source"]) == {"ours", "persistence", "climatology"}
    assert set(mae["num_times"]) == {16 + 20}  # init times 0 to 15 and 18 to 37, of two leads
    np.testing.assert_allclose(rows_where(mae, source="ours")["value"], 20 / 36, rtol=1e-5)
    with pytest.raises(ValueError, match=r"first, again overlap in time"):
        again = replace(second, times=second.times - np.timedelta64(6, "h"), name="again")
        score_forecasts(config, forecasts, [first, again], [first])


def test_forecasts_without_any_value_are_named_in_one_line() -> None:
    with pytest.raises(ValueError, match=r"^forecasts=\[a,b\]: no value of \[temperature\] can be"):
        _check_some_scored({"a": xr.Dataset(), "b": xr.Dataset()}, {"temperature"})

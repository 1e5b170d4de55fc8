"""Tiling, blending and dating, with networks whose prediction is known."""

from dataclasses import replace
from operator import attrgetter

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from atmossl.batch import PRIMARY, Prediction, View
from atmossl.inference.cases import predict_fields
from atmossl.inference.out_of_training_warnings import untrained_window
from atmossl.inference.plan import Plan
from atmossl.inference.writer import write
from atmossl.masking.tasks import Downscaling, Forecast, Task, TemporalInterpolation
from tests.inference.oracle_models import NAMES, STORE, Known, Oracle, run_at
from tests.inference.oracle_models import predictor as known
from tests.synthetic import spec


def predictor(task: Task, source: str = "target", **changes) -> Plan:
    return known(task, Known(attrgetter(source)), **changes)


@pytest.mark.parametrize("task", [TemporalInterpolation(6), Downscaling(2)])
@pytest.mark.parametrize(
    "changes",
    [{}, {"overlap": 0.0}, {"overlap": 0.7, "lon_shift": 2}, {"tilings": 2}, {"batch_size": 100}],
)
def test_tiles_of_the_truth_blend_to_the_truth(task: Task, changes: dict) -> None:
    used = predictor(task, **changes)
    fields = run_at(used, 6)
    scale = used.trained.normaliser.statistics[PRIMARY].std
    for row, name in enumerate(NAMES):
        truth = STORE[name].values[6]  # [level lat lon]
        found = fields[name]  # [step member level lat lon]
        assert found.shape == (1, 2, *truth.shape)
        np.testing.assert_allclose(found.mean(axis=1)[0], truth, atol=1e-4)
        spread = (found[:, 1] - found[:, 0])[0] / 2
        expected = np.broadcast_to(scale[row][:, None, None], spread.shape)
        np.testing.assert_allclose(spread, expected, rtol=1e-4)


def test_a_region_smaller_than_the_windows_of_the_training_is_predicted_in_whole_tokens() -> None:
    """7 x 9 cells across Greenwich, in tiles of 6 x 8."""
    region = STORE.isel(latitude=slice(1, 8), longitude=[12, 13, 14, 15, 0, 1, 2, 3, 4])
    for window in ((5, 8, 16), (5, 8, 0)):
        used = predictor(TemporalInterpolation(6), store=region, window=window)
        assert (used.tiles.lat_size, used.tiles.lon_size) == (6, 8)
        truth = region["temperature"].values[6]
        np.testing.assert_allclose(run_at(used, 6)["temperature"].mean(axis=1)[0], truth, atol=2e-5)
        (said,) = untrained_window(used.tiles, used.trained.window)
        assert "windows of 6 x 8 cells; training had 8 x " in said
    whole = predictor(TemporalInterpolation(6))
    assert untrained_window(whole.tiles, whole.trained.window) == []
    tall = (spec(token=(1, 8, 2)),)
    with pytest.raises(ValueError, match="7 rows, fewer than the 8 of a token"):
        predictor(TemporalInterpolation(6), store=region, specs=tall)


class Columns(Oracle):
    """Gives every point the number of its column within its token, 0 or 1."""

    def forward(self, view: View) -> Prediction:
        truth = Known(attrgetter("target"))(view).streams[0]
        column = torch.arange(truth.members.shape[-1]) % 2
        members = column.to(truth.members).expand(truth.members.shape)
        return Prediction((replace(truth, members=members),))


@pytest.mark.parametrize(("tilings", "columns"), [(1, [0, 1]), (2, [0.5, 0.5])])
def test_tilings_average_what_depends_on_the_place_in_a_token(
    tilings: int, columns: list[float]
) -> None:
    used = known(TemporalInterpolation(6), Columns(), tilings=tilings, window=(5, 8, 16))
    field = run_at(used, 6)["temperature"][0, 0, 0]
    statistics = used.trained.normaliser.statistics[PRIMARY]
    number = list(statistics.variables).index("temperature")
    normal = (field - statistics.mean[number][0]) / statistics.std[number][0]
    np.testing.assert_allclose(normal, np.tile(columns, (8, 8)), atol=1e-5)


def test_coarse_cells_stay_where_they_are_in_every_tiling() -> None:
    used = predictor(Downscaling(2), tilings=2)
    assert {tile.lon_start % 2 for tile in used.tiles.tiles} == {0}


@pytest.mark.parametrize("source", ["target", "guess"])
def test_a_forecast_reads_nothing_after_its_init_time(source: str) -> None:
    """Whatever the network passes on, it is the state at the init time, to the last step."""
    last = len(STORE.time) - 1
    fields = run_at(predictor(Forecast(12), source), last)
    for name in NAMES:
        assert fields[name].shape[:2] == (2, 2)
        for step in range(2):
            now = STORE[name].values[last]
            np.testing.assert_allclose(fields[name][step].mean(axis=0), now, atol=2e-5)


@pytest.mark.parametrize(
    ("task", "step", "message"),
    [
        (Forecast(12), 1, "lacks steps around it"),
        (TemporalInterpolation(6), 11, "lacks steps around it"),
    ],
)
def test_a_time_without_its_steps_is_named(task, step: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run_at(predictor(task), step)
    with pytest.raises(ValueError, match="1999"):
        next(predict_fields(predictor(task), [np.datetime64("1999-01-01", "ns")]))


@pytest.mark.parametrize("suffix", ["zarr", "nc"])
def test_what_is_written_is_dated_and_whole(tmp_path, suffix: str) -> None:
    used = predictor(Forecast(12))
    times = used.segment.times[4:7]
    path = tmp_path / f"out.{suffix}"
    if suffix == "zarr":
        path.mkdir()  # an empty folder is no output
    write(used, times, path)
    with (
        xr.open_zarr(path, consolidated=False)
        if suffix == "zarr"
        else xr.open_dataset(path, decode_timedelta=True) as store
    ):
        np.testing.assert_array_equal(store["init_time"].values, times)
        hours = store["lead_time"].values / np.timedelta64(1, "h")
        np.testing.assert_array_equal(hours, [6, 12])
        found = store["temperature"].sel(lead_time=np.timedelta64(6, "h")).mean("member")
        expected = STORE["temperature"].values[4:7]
        np.testing.assert_allclose(found.transpose("init_time", "level", ...), expected, atol=2e-5)
        assert store["temperature"].attrs["standard_name"] == "air_temperature"
    assert [p.name for p in tmp_path.iterdir()] == [path.name]
    with pytest.raises(ValueError, match="exists"):
        write(used, times, path)


def test_a_failure_leaves_no_output(tmp_path) -> None:
    used = predictor(Forecast(12))
    broken = replace(used, trained=replace(used.trained, model=nn.Identity()))
    with pytest.raises(AttributeError):
        write(broken, used.segment.times[4:5], tmp_path / "out.zarr")
    assert not (tmp_path / "out.zarr").exists()

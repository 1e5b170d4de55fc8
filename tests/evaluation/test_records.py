"""Long records are scored part by part: the same numbers, without holding them."""

import weakref
from operator import attrgetter

import dask
import numpy as np
import pandas as pd
import pytest
import xarray as xr

from atmossl.cli import compose_config
from atmossl.data.segment import Segment
from atmossl.data.store import open_parts
from atmossl.evaluation.verify import rows_where
from atmossl.schema import EvaluateConfig, parse
from atmossl.scorecard import records, score_tasks
from atmossl.scorecard.records import record_of
from tests.inference.oracle_models import Known, predictor, segment
from tests.synthetic import dataset

TASKS = [
    {"_target_": "forecast", "lead_time": "12h"},
    {"_target_": "temporal_interpolation", "hidden_time": "6h"},
    {"_target_": "downscaling", "factor": 2},
    {"_target_": "inpainting", "boxes": [[-30, 30, 0, 90]]},
]


def table(
    test: Segment | list[Segment], train: Segment, tasks: list[dict], **changes
) -> pd.DataFrame:
    """Scores of a network that answers the first guess, with two members."""
    tests = [test] if isinstance(test, Segment) else test
    values = compose_config("evaluate", ["output=_", "bootstrap=5", "regions=[]"])
    config: EvaluateConfig = parse(EvaluateConfig, values | {"tasks": tasks} | changes)
    known = Known(attrgetter("guess"), (-0.1, 0.1))
    trained = predictor(config.tasks[0], known).trained
    reports = score_tasks(config, trained, tests, [train], "cpu")
    return pd.concat([report.table for report in reports])


def test_blocks_hold_what_the_record_does(monkeypatch) -> None:
    store = dataset(steps=11)
    store = store.assign(u_component_of_wind=store["u_component_of_wind"].isel(level=0, drop=True))
    whole = record_of(segment(store))
    monkeypatch.setattr(records, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 20_000)  # of 2 kB for each step
    parts = record_of(segment(store))
    assert parts["temperature"].chunks is not None
    assert parts["temperature"].data.numblocks[0] > 1
    xr.testing.assert_identical(parts.load(), whole)


@pytest.mark.e2e
def test_numbers_do_not_depend_on_what_is_in_memory(monkeypatch) -> None:
    test, train = (segment(dataset(steps=24, seed=seed)) for seed in (1, 2))
    first = table(test, train, TASKS[::3], every=8)
    monkeypatch.setattr(records, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 20_000)
    pd.testing.assert_frame_equal(first, table(test, train, TASKS[::3], every=8))


def test_segments_are_scored_each_by_itself_in_one_table() -> None:
    """Two runs of the same dates: their mean square errors weighed by their cases, as if no other
    run were there; one that is too short for the task has none."""
    train = segment(dataset(steps=24, seed=3))
    runs = [segment(dataset(steps=steps, seed=seed), name=str(seed)) for steps, seed in
            ((14, 1), (21, 2), (3, 4))]  # fmt: skip
    given = {"tasks": TASKS[1:2], "ridge": False, "every": 4, "tilings": 1}
    keys = ["source", "variable", "level", "lead_hours"]
    both, first, second = (
        rows_where(table(tests, train, **given), score="rmse", season="all").set_index(keys)
        for tests in (runs, runs[:1], [runs[1], runs[2]])
    )
    assert set(first["num_times"]) == {3} and set(second["num_times"]) == {5}
    expected = (3 * first["value"] ** 2 + 5 * second["value"] ** 2) / 8
    np.testing.assert_allclose(both["value"] ** 2, expected, rtol=1e-6)
    with pytest.raises(ValueError, match=r"segment=x is not in split=test; valid: '1', '2', '4'$"):
        table(runs, train, TASKS[:1], segment="x")


def test_no_forecast_is_scored_across_a_gap() -> None:
    """Persistence over the unbroken parts of a record that lacks days, worked out by hand."""
    store, train = dataset(steps=40, seed=1), segment(dataset(steps=24, seed=3))
    gappy = store.isel(time=np.r_[0:14, 18:20, 26:40])  # the middle part is shorter than a window
    names, levels = [str(name) for name in store.data_vars], store["level"].to_numpy().tolist()
    parts = open_parts("waves", gappy, "memory", variables=names, levels=levels, gaps="split")
    scored = table(list(parts), train, TASKS[:1], ridge=False)
    found = rows_where(
        scored, source="persistence", score="rmse", season="all", region="global"
    ).set_index(["variable", "level", "lead_hours"])
    assert set(found["num_times"]) == {20} and len(found) == 12
    starts = np.r_[2:12, 28:38]  # two known steps and two to come, of one part
    area = xr.DataArray(np.cos(np.deg2rad(store["latitude"])), dims="latitude")
    for name in names:
        values = store[name].astype(float)
        for steps in (1, 2):
            change = values.isel(time=starts + steps).drop_vars("time") - values.isel(
                time=starts
            ).drop_vars("time")
            exact = np.sqrt((change**2).weighted(area).mean(("time", "latitude", "longitude")))
            rows = found.loc[[(name, level, 6.0 * steps) for level in levels], "value"]
            np.testing.assert_allclose(rows, exact, rtol=1e-5)


@pytest.mark.e2e
def test_memory_does_not_grow_with_the_record(monkeypatch) -> None:
    """Of what is read, no more is alive at a time if there are three times as many dates."""
    monkeypatch.setattr(records, "IN_MEMORY_BYTES", 0)
    monkeypatch.setattr(records, "_BLOCK_BYTES", 20_000)
    monkeypatch.setattr("atmossl.evaluation.baselines._BLOCK_BYTES", 20_000)
    monkeypatch.setattr("atmossl.evaluation.climate._QUANTILE_TIMES", 10)
    monkeypatch.setattr("atmossl.scorecard.zero_shot._CHUNK_BYTES", 1)
    alive, total, peak = 0, 0, 0
    read = records._read

    def forget(size: int) -> None:
        nonlocal alive
        alive -= size

    def counted(*arguments) -> np.ndarray:
        nonlocal alive, total, peak
        values = read(*arguments)
        alive, total = alive + values.nbytes, total + values.nbytes
        peak = max(peak, alive)
        weakref.finalize(values, forget, values.nbytes)
        return values

    monkeypatch.setattr(records, "_read", counted)
    peaks, totals = [], []
    with dask.config.set(scheduler="synchronous"):  # threads would hold blocks as it happens
        for steps in (40, 120):
            alive = total = peak = 0
            record = segment(dataset(steps=steps))
            table(record, record, TASKS[:1], ridge=False, every=20)
            peaks.append(peak)
            totals.append(total)
    assert totals[1] > 2 * totals[0]
    assert peaks[1] <= peaks[0] < 0.2 * totals[0]

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
from atmossl.schema import EvaluateConfig, parse
from atmossl.scorecard import records, score_tasks
from atmossl.scorecard.records import record_of
from tests.inference.known import Known, predictor, segment
from tests.synthetic import dataset

TASKS = [
    {"name": "forecast", "lead_time": "12h"},
    {"name": "temporal_interpolation", "hidden_time": "6h"},
    {"name": "downscaling", "factor": 2},
    {"name": "inpainting", "boxes": [[-30, 30, 0, 90]]},
]


def table(test: Segment, train: Segment, tasks: list[dict], **changes) -> pd.DataFrame:
    """Scores of a network that answers the first guess, with two members."""
    values = compose_config("evaluate", ["output=_", "bootstrap=5", "regions=[]"])
    config: EvaluateConfig = parse(EvaluateConfig, values | {"tasks": tasks} | changes)
    known = Known(attrgetter("guess"), (-0.1, 0.1))
    trained = predictor(config.tasks[0].sampler(), known).trained
    reports = score_tasks(config, trained, [test], [train], "cpu")
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
            table(record, record, TASKS[:1], ridge=False, every=10)
            peaks.append(peak)
            totals.append(total)
    assert totals[1] > 2.5 * totals[0]
    assert peaks[1] <= peaks[0] < 0.2 * totals[0]

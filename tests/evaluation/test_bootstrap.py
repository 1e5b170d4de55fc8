import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.bootstrap import (
    BlockBootstrap,
    ratio_samples,
    resampled_means,
)
from atmossl.evaluation.scores import Rmse


def _series(values: np.ndarray) -> xr.Dataset:
    return xr.Dataset({"mean": (("time",), values)})


def _plain_mean(means: xr.Dataset) -> xr.DataArray:
    return means["mean"]


def _ar1(num_times: int, memory: float, rng: np.random.Generator) -> np.ndarray:
    noise = rng.standard_normal(num_times) * np.sqrt(1 - memory**2)
    state = np.empty(num_times)
    state[0] = rng.standard_normal()
    for t in range(1, num_times):
        state[t] = memory * state[t - 1] + noise[t]
    return state


def _coverage(block_length: int, num_records: int = 300) -> float:
    rng = np.random.default_rng(3)
    bootstrap = BlockBootstrap(block_length=block_length, num_resamples=200, confidence=0.9)
    hits = 0
    for _ in range(num_records):
        counts = bootstrap.draw([200], rng)
        record = _ar1(200, 0.7, rng)
        low, high = np.quantile(counts @ record / 200, [0.05, 0.95])
        hits += low <= 0.0 <= high
    return hits / num_records


def test_blocks_cover_the_mean_of_an_autocorrelated_record():
    assert 0.80 < _coverage(block_length=16) < 0.95
    assert _coverage(block_length=1) < 0.65  # single cases ignore the memory and are too sure


def test_each_case_is_drawn_equally_often_and_rows_are_full():
    counts = BlockBootstrap(block_length=4, num_resamples=4000).draw([10], np.random.default_rng(0))
    np.testing.assert_array_equal(counts.sum(axis=1), 10)
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.06)


def test_blocks_are_consecutive_on_the_circle():
    counts = BlockBootstrap(block_length=5, num_resamples=50).draw([10], np.random.default_rng(0))
    # Two blocks of five: at most four changes between drawn and not drawn around the circle.
    changes = np.abs(np.diff(counts, axis=1, append=counts[:, :1])) > 0
    assert changes.sum(axis=1).max() <= 4


def test_same_generator_state_gives_same_draws():
    bootstrap = BlockBootstrap()
    first, second = (bootstrap.draw([20], np.random.default_rng(7)) for _ in range(2))
    np.testing.assert_array_equal(first, second)


def test_interval_of_independent_cases_is_the_normal_one():
    rng = np.random.default_rng(0)
    record = _series(rng.standard_normal(2000))
    bootstrap = BlockBootstrap(block_length=1)
    counts = bootstrap.draw([2000], rng)
    low, high = bootstrap.limits(_plain_mean(resampled_means(record, "time", counts)))
    assert float(high - low) == pytest.approx(2 * 1.96 / np.sqrt(2000), rel=0.12)


def test_paired_ratio_is_exact_when_errors_are_proportional():
    rng = np.random.default_rng(0)
    baseline = rng.gamma(1.0, size=60)
    bootstrap = BlockBootstrap()
    counts = bootstrap.draw([60], rng)
    samples = ratio_samples(
        _series(0.25 * baseline), _series(baseline), Rmse().value, "time", counts
    )
    limits = bootstrap.limits(samples)
    np.testing.assert_allclose([float(limit) for limit in limits], 0.5)


def test_missing_cases_count_for_nothing():
    values = np.array([1.0, np.nan, 1.0, 1.0, np.nan, 1.0])
    counts = BlockBootstrap(block_length=1, num_resamples=200).draw([6], np.random.default_rng(0))
    means = resampled_means(_series(values), "time", counts)["mean"]
    np.testing.assert_allclose(means[means.notnull()], 1.0)
    assert int(means.notnull().sum()) > 190


@pytest.mark.parametrize(
    "setting", [{"block_length": 0}, {"num_resamples": 0}, {"confidence": 1.0}]
)
def test_setting_out_of_range_is_named(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        BlockBootstrap(**setting)


def test_no_block_runs_from_one_series_into_the_next():
    """Blocks as long as the shortest series fill it evenly, and every case is as likely."""
    bootstrap = BlockBootstrap(block_length=4, num_resamples=3000)
    counts = bootstrap.draw([4, 8], np.random.default_rng(0))
    assert (counts.sum(axis=1) == 12).all()
    np.testing.assert_array_equal(np.ptp(counts[:, :4], axis=1), 0)
    np.testing.assert_allclose(counts.mean(axis=0), 1.0, atol=0.07)

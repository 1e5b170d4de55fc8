"""The ratios of `benchmarks.finetune` are those of their definitions; its targets are what they are
said to be."""

from pathlib import Path

import numpy as np
import pytest
import xarray as xr

from benchmarks.finetune import fields_of, num_samples, ratio, square_error, written_catalog


def test_ratios_are_roots_of_mean_losses_and_paired_by_date() -> None:
    rng = np.random.default_rng(0)
    over = rng.uniform(0.5, 2.0, 26)
    assert ratio(0.25 * over, over) == {"value": 0.5, "interval": [0.5, 0.5]}
    loss = rng.uniform(0.5, 2.0, 26)
    found = ratio(loss, over)
    assert found["value"] == pytest.approx(np.sqrt(loss.sum() / over.sum()), abs=1e-4)
    assert found["interval"][0] < found["value"] < found["interval"][1]


def test_errors_are_weighted_by_area() -> None:
    latitude = [-60.0, 0.0, 60.0]
    one = xr.Dataset({"a": (("latitude", "longitude"), np.zeros((3, 2)))}, {"latitude": latitude})
    other = one + xr.DataArray([2.0, 0.0, 0.0], {"latitude": latitude}, ("latitude",))
    assert float(square_error(one, other)["a"]) == pytest.approx(4.0 * 0.5 / 2.0)


def test_targets_hold_other_runs_and_coarse_means(tmp_path: Path) -> None:
    catalog = written_catalog(tmp_path)
    (fine,) = fields_of("test", "climate", catalog).values()
    (coarse,) = fields_of("test", "resolution", catalog).values()
    assert coarse.sizes["latitude"] == fine.sizes["latitude"] // 2
    cell = fine["temperature"][0, 0, :2, :2].mean()
    assert float(coarse["temperature"][0, 0, 0, 0]) == pytest.approx(float(cell), rel=1e-6)
    runs = {name: set(fields_of("train", name, catalog)) for name in ("before", "climate")}
    assert runs == {"before": {"run_0", "run_1"}, "climate": {"run_2", "run_3"}}
    assert (num_samples(1.0), num_samples(0.1), num_samples(0.01)) == (316, 30, 1)

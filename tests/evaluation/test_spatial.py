import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.regions import REGIONS, area_mean
from atmossl.evaluation.spatial import (
    bicubic,
    bilinear,
    coarsen,
    conservative,
    lagrange_matrix,
)
from atmossl.geometry import area_weights


def _smooth(dataset, num_lat: int = 32, num_lon: int = 64) -> xr.Dataset:
    """Low-order waves that are smooth on the sphere, poles included."""
    shell = dataset(
        num_times=1, num_lat=num_lat, num_lon=num_lon, variables=("temperature",), levels=(500.0,)
    )
    lat, lon = np.deg2rad(shell["latitude"]), np.deg2rad(shell["longitude"])
    wave = np.sin(2 * lat) * np.cos(lat) * np.cos(lon) + np.cos(lat) ** 2 * np.sin(2 * lon)
    return shell * 0.0 + wave


def _error(prediction: xr.Dataset, truth: xr.Dataset) -> float:
    squared = (prediction - truth)["temperature"] ** 2
    return float(np.sqrt(area_mean(squared, REGIONS["global"]).mean()))


def test_coarsening_keeps_the_global_mean(dataset):
    fine = dataset(num_lat=16, num_lon=32)
    before = area_mean(fine["temperature"].astype(float), REGIONS["global"])
    after = area_mean(coarsen(fine, 4)["temperature"].astype(float), REGIONS["global"])
    np.testing.assert_allclose(after, before, atol=1e-6)


def test_conservative_refinement_keeps_each_block_mean(dataset):
    fine = dataset(num_lat=16, num_lon=32)
    coarse = coarsen(fine, 4)
    again = coarsen(conservative(coarse, fine), 4)
    np.testing.assert_allclose(again["temperature"], coarse["temperature"], atol=1e-6)


def test_smoother_interpolation_is_closer_on_smooth_fields(dataset):
    fine = _smooth(dataset)
    coarse = coarsen(fine, 4)
    constant, linear, cubic = (
        _error(refine(coarse, fine), fine) for refine in (conservative, bilinear, bicubic)
    )
    assert cubic < 0.7 * linear < 0.5 * constant


def test_bicubic_is_as_good_at_poles_and_date_line_as_elsewhere(dataset):
    fine = _smooth(dataset)
    error = np.abs(bicubic(coarsen(fine, 4), fine) - fine)["temperature"].squeeze()
    inside = float(error.isel(latitude=slice(8, 24), longitude=slice(8, 56)).max())
    assert float(error.isel(latitude=slice(None, 4)).max()) < 1.5 * inside
    assert float(error.isel(longitude=[0, 1, 62, 63]).max()) < 1.5 * inside


@pytest.mark.parametrize("refine", [conservative, bilinear, bicubic])
def test_constant_fields_stay_constant_and_carry_labels(dataset, refine):
    fine = dataset(num_times=2, variables=("temperature",)) * 0.0 + 3.0
    refined = refine(coarsen(fine, 4), fine)
    np.testing.assert_allclose(refined["temperature"], 3.0, rtol=1e-6)
    xr.testing.assert_equal(refined["longitude"], fine["longitude"])
    assert refined["temperature"].dims == ("time", "level", "latitude", "longitude")


def test_lagrange_reproduces_cubics_on_uneven_points():
    source = np.array([0.0, 1.0, 2.5, 3.0, 4.2, 5.0])
    target = np.linspace(0.2, 4.8, 17)
    matrix = lagrange_matrix(source, target, 4)
    np.testing.assert_allclose(matrix @ (source**3 - source), target**3 - target, atol=1e-10)


def test_factor_that_does_not_divide_names_its_choices(dataset):
    with pytest.raises(ValueError, match=r"factor 3 .*1, 2, 4, 8"):
        coarsen(dataset(), 3)


def test_foreign_coarse_grid_is_an_error(dataset):
    with pytest.raises(ValueError, match="is not made of blocks"):
        bilinear(dataset(num_lat=4, num_lon=4), dataset())


def test_means_and_lines_are_over_what_is_there(dataset):
    """Block means against a loop; a constant stays constant, and far from gaps nothing changes."""
    fine = dataset(num_times=2, num_lat=16, num_lon=32, variables=("temperature",))
    gappy = fine.copy(deep=True)
    gappy["temperature"][..., 4:9, 6:13] = np.nan
    gappy["temperature"][0, :, 12, 20] = np.nan
    values = gappy["temperature"].values.astype(float)
    area = np.broadcast_to(area_weights(fine["latitude"].values)[:, None], values.shape)
    means = coarsen(gappy, 4)["temperature"].values
    for row, column in np.ndindex(4, 8):
        block = (..., slice(4 * row, 4 * row + 4), slice(4 * column, 4 * column + 4))
        there = np.isfinite(values[block])
        weight = np.where(there, area[block], 0.0)
        total = np.where(there, values[block], 0.0) * weight
        with np.errstate(invalid="ignore"):
            expected = total.sum((-2, -1)) / weight.sum((-2, -1))
        np.testing.assert_allclose(means[..., row, column], expected, rtol=1e-5)
    assert np.isnan(means[..., 1, 2]).all() and np.isfinite(means[..., 1, 1]).all()
    flat = gappy["temperature"].notnull().where(gappy["temperature"].notnull()) * 7.5
    coarse = coarsen(flat.astype("float32").to_dataset(name="temperature"), 4)
    for refine in (bilinear, bicubic):
        constant = refine(coarse, fine)["temperature"]
        near = np.isfinite(constant.values)
        np.testing.assert_allclose(constant.values[near], 7.5, rtol=1e-6)
        assert near[gappy["temperature"].notnull().values].all()
        ours, whole = (refine(coarsen(each, 4), fine)["temperature"] for each in (gappy, fine))
        far = {"time": 1, "longitude": slice(24, 30), "latitude": slice(6, 10)}
        np.testing.assert_array_equal(ours.isel(far), whole.isel(far))

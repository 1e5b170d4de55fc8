"""Harmonic infill and ridge on neighbours against closed forms and plain loops."""

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.alignment import grid_of
from atmossl.evaluation.infill import HarmonicInfill, LocalRidge, nearest_visible
from atmossl.masking.infill import laplacian
from tests.evaluation.conftest import make_dataset


def box(dataset: xr.Dataset, rows: slice, columns: slice) -> np.ndarray:
    hidden = np.zeros(grid_of(dataset).shape, bool)
    hidden[rows, columns] = True
    return hidden


def test_zonal_harmonic_functions_are_filled_exactly():
    # d/dlat (cos lat df/dlat) = 0 is solved by f = ln tan(45 degrees + lat / 2).
    fields = make_dataset(num_times=2, num_lat=90, num_lon=8, variables=("temperature",))
    latitude = np.deg2rad(fields["latitude"])
    harmonic = fields * 0.0 + np.log(np.tan(np.pi / 4 + latitude / 2))
    hidden = box(fields, slice(30, 70), slice(None))
    spoiled = harmonic.where(~xr.DataArray(hidden, dims=("latitude", "longitude")), 1e6)
    filled = HarmonicInfill(grid_of(fields), hidden)(spoiled)
    np.testing.assert_allclose(filled["temperature"], harmonic["temperature"], atol=2e-4)


def test_missing_cells_are_no_part_of_what_is_filled():
    """A zonal harmonic function with gaps, other ones at each time: exact, and still gappy."""
    fields = make_dataset(num_times=3, num_lat=90, num_lon=8, variables=("temperature",))
    latitude = np.deg2rad(fields["latitude"])
    harmonic = fields * 0.0 + np.log(np.tan(np.pi / 4 + latitude / 2))
    hidden = box(fields, slice(30, 50), slice(None))
    gappy = harmonic["temperature"].copy(deep=True)
    gappy[1:, ..., 50:55, :] = np.nan
    gappy[2, ..., 20:30, :] = np.nan
    filled = HarmonicInfill(grid_of(fields), hidden)(gappy.to_dataset())["temperature"]
    there = gappy.notnull() | xr.DataArray(hidden, dims=("latitude", "longitude"))
    np.testing.assert_allclose(
        filled.values[there.values], harmonic["temperature"].values[there.values], atol=2e-4
    )
    assert bool((filled.notnull() == there).all())


def test_filled_values_are_bounded_by_the_visible_ones_and_leave_them_alone():
    fields = make_dataset(num_times=3)
    hidden = box(fields, slice(2, 6), slice(13, 16)) | box(fields, slice(3, 5), slice(0, 2))
    filled = HarmonicInfill(grid_of(fields), hidden)(fields)
    for name in fields.data_vars:
        inside, outside = filled[name].values[..., hidden], fields[name].values[..., ~hidden]
        assert (inside <= outside.max(-1, keepdims=True)).all()
        assert (inside >= outside.min(-1, keepdims=True)).all()
        np.testing.assert_array_equal(filled[name].values[..., ~hidden], outside)


def test_laplacian_wraps_and_links_each_cell_to_its_neighbours():
    grid = grid_of(make_dataset(num_times=1, num_lat=4, num_lon=8))
    matrix = laplacian(grid.latitude, 8, grid.longitude_spacing, periodic=True).toarray()
    np.testing.assert_allclose(matrix.sum(axis=1), 0.0, atol=1e-12)
    np.testing.assert_allclose(matrix, matrix.T)
    middle = matrix.reshape(4, 8, 4, 8)[1, 0]
    assert {(int(i), int(j)) for i, j in np.argwhere(middle < 0)} == {
        (0, 0),
        (2, 0),
        (1, 1),
        (1, 7),
    }


def linear_record(num_times: int, seed: int) -> xr.Dataset:
    """Two visible columns are noise; the hidden one between them is their weighted sum."""
    record = make_dataset(num_times=num_times, seed=seed, variables=("temperature",))
    values = record["temperature"].to_numpy()
    values[..., 5] = 280.0 + 0.7 * values[..., 4] - 0.2 * values[..., 6]
    return record


def test_ridge_finds_a_linear_law_and_never_looks_at_hidden_cells():
    history = [linear_record(200, 1), linear_record(200, 2)]
    test = linear_record(4, 3)
    hidden = box(test, slice(2, 6), slice(5, 6))
    spoiled = test.where(~xr.DataArray(hidden, dims=("latitude", "longitude")), -1e4)
    model = LocalRidge.fit(history, hidden, num_neighbours=8)
    filled = model(spoiled)["temperature"]
    np.testing.assert_allclose(filled, test["temperature"], atol=0.02)


def test_ridge_of_unrelated_cells_falls_back_to_the_mean():
    history = [make_dataset(num_times=400, seed=4, variables=("temperature",)) + 5.0]
    test = make_dataset(num_times=50, seed=5, variables=("temperature",)) + 5.0
    hidden = box(test, slice(2, 6), slice(5, 8))
    filled = LocalRidge.fit(history, hidden)(test)["temperature"].values[..., hidden]
    assert abs(filled - 5.0).max() < 0.9
    error = ((filled - test["temperature"].values[..., hidden]) ** 2).mean()
    assert error == pytest.approx(1.0, abs=0.12)


def test_neighbours_are_near_on_the_sphere_not_on_the_map():
    grid = grid_of(make_dataset(num_times=1, num_lat=8, num_lon=16))
    hidden = np.zeros(grid.shape, bool)
    hidden[7, 0] = True  # next to the pole: the cell across it is nearer than most of its row
    found = nearest_visible(grid, hidden, 13)[0]
    assert set(found) <= {7 * 16 + column for column in range(1, 16)}


def test_hiding_everything_is_an_error():
    fields = make_dataset(num_times=1)
    with pytest.raises(ValueError, match="hides every cell"):
        HarmonicInfill(grid_of(fields), np.ones(grid_of(fields).shape, bool))

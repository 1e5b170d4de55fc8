"""Grids, area weights and the tile plan against closed forms and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from scipy import special

from atmossl.geometry import (
    Grid,
    TilePlan,
    area_weights,
    check_window_fits,
    degrees_east_of,
    latitude_edges,
    nearest_cells,
    random_box,
)
from atmossl.masking.places import LatLonBox


def global_grid(num_lat: int, num_lon: int) -> Grid:
    spacing = 180 / num_lat
    latitude = -90 + spacing * (np.arange(num_lat) + 0.5)
    return Grid(latitude, np.arange(num_lon) * 360 / num_lon)


@pytest.mark.parametrize("num_lat", [4, 32, 181])
def test_area_weights_of_a_regular_grid_are_proportional_to_the_cosine(num_lat: int) -> None:
    # sin(a + h/2) - sin(a - h/2) = 2 cos(a) sin(h/2)
    latitude = global_grid(num_lat, 4).latitude
    ratio = area_weights(latitude) / np.cos(np.deg2rad(latitude))
    np.testing.assert_allclose(ratio, ratio[0], rtol=1e-10)
    assert area_weights(latitude).mean() == pytest.approx(1.0)


def gaussian(num_lat: int) -> np.ndarray:
    """Latitudes of a Gaussian grid, in the precision of a file."""
    nodes, _ = np.polynomial.legendre.leggauss(num_lat)
    return np.rad2deg(np.arcsin(nodes)).astype(np.float32).astype(np.float64)


@pytest.mark.parametrize("num_lat", [4, 32, 73, 320])
def test_weights_of_a_gaussian_grid_integrate_polynomials_exactly(num_lat: int) -> None:
    """The mean of x^k over [-1, 1], where x is the sine of the latitude, is 1 / (k + 1) or 0."""
    latitude = gaussian(num_lat)
    weights, x = area_weights(latitude), np.sin(np.deg2rad(latitude))
    assert weights.mean() == pytest.approx(1.0) and (weights > 0).all()
    np.testing.assert_array_equal(area_weights(latitude[::-1]), weights)
    for degree in range(min(2 * num_lat, 24)):
        exact = 0.0 if degree % 2 else 1 / (degree + 1)
        assert np.mean(weights * x**degree) == pytest.approx(exact, abs=2e-6)


@pytest.mark.parametrize("order", [0, 1, 3])
def test_spherical_harmonics_are_orthonormal_on_a_gaussian_grid(order: int) -> None:
    latitude, longitude = gaussian(32), np.deg2rad(np.arange(64) * 360 / 64)
    weights = np.repeat(area_weights(latitude)[:, None], 64, axis=1)
    polar = np.deg2rad(90 - latitude)[:, None]
    found = [special.sph_harm_y(n, order, polar, longitude) for n in range(order, 16)]
    for row, one in enumerate(found):
        for column, other in enumerate(found):
            product = 4 * np.pi * np.mean(weights * one * other.conj())
            assert product == pytest.approx(float(row == column), abs=1e-5)


def test_part_of_a_gaussian_grid_has_bands_between_midpoints() -> None:
    latitude = gaussian(32)[4:12]
    bands = np.diff(np.sin(np.deg2rad(latitude_edges(latitude))))
    np.testing.assert_allclose(area_weights(latitude), bands / bands.mean(), rtol=1e-12)
    whole = area_weights(gaussian(32))[5:11]
    inner = area_weights(latitude)[1:-1]
    np.testing.assert_allclose(inner / inner.mean(), whole / whole.mean(), rtol=2e-3)


def test_boxes_and_tiles_on_a_gaussian_grid() -> None:
    """Rows at both poles, columns across Greenwich and the dateline."""
    grid = Grid(gaussian(32), np.arange(64) * 360 / 64)
    assert grid.periodic and grid.shape == (32, 64)
    drawn = [random_box(grid, 8, 16, np.random.default_rng(seed)) for seed in range(300)]
    assert {box.lat_start for box in drawn} == set(range(25))
    assert {box.lon_start for box in drawn} == set(range(64))
    plan = TilePlan(grid, 8, 16)
    total = np.zeros(grid.shape)
    for box, weight in zip(plan.tiles, plan.weights, strict=True):
        total[np.ix_(box.lat_index(), box.lon_index(64))] += weight
    np.testing.assert_allclose(total, 1.0, atol=1e-12)
    across = LatLonBox(80, 90, 170, 190).contains(grid.latitude, grid.longitude)
    rows, columns = np.nonzero(across.any(axis=1))[0], np.nonzero(across.any(axis=0))[0]
    assert rows.tolist() == [30, 31] and columns.tolist() == [31, 32, 33]
    pole = LatLonBox(-90, -85, 350, 10).contains(grid.latitude, grid.longitude)
    assert np.nonzero(pole.any(axis=1))[0].tolist() == [0]
    assert np.nonzero(pole.any(axis=0))[0].tolist() == [0, 1, 63]
    with pytest.raises(ValueError, match="does not nest"):
        grid.refined(2)


def test_points_on_the_poles_own_half_a_cell() -> None:
    latitude = np.linspace(-90, 90, 19)
    weights = area_weights(latitude)
    pole, next_row = 1 - np.sin(np.deg2rad(85)), np.sin(np.deg2rad(85)) - np.sin(np.deg2rad(75))
    assert weights[-1] / weights[-2] == pytest.approx(pole / next_row)


@settings(max_examples=60, deadline=None)
@given(
    num_lat=st.integers(4, 20),
    num_lon=st.integers(4, 30),
    data=st.data(),
    overlap=st.floats(0, 0.9),
    shift=st.integers(0, 30),
)
def test_tiles_cover_the_globe_as_a_partition_of_unity(
    num_lat: int, num_lon: int, data: st.DataObject, overlap: float, shift: int
) -> None:
    lat = data.draw(st.integers(2, num_lat))
    lon = data.draw(st.integers(2, num_lon))
    plan = TilePlan(global_grid(num_lat, num_lon), lat, lon, overlap, (0, shift))
    total = np.zeros((num_lat, num_lon))
    for tile, weight in zip(plan.tiles, plan.weights, strict=True):
        total[np.ix_(tile.lat_index(), tile.lon_index(num_lon))] += weight
        assert 0 <= tile.lat_start <= num_lat - lat
    np.testing.assert_allclose(total, 1.0, atol=1e-12)


def test_aligned_tiles_start_at_multiples() -> None:
    plan = TilePlan(global_grid(16, 32), 8, 16, 0.5, align=4)
    assert all(tile.lat_start % 4 == 0 and tile.lon_start % 4 == 0 for tile in plan.tiles)


def test_random_windows_start_at_every_longitude_and_stay_inside() -> None:
    rng = np.random.default_rng(0)
    boxes = [random_box(global_grid(8, 12), 3, 5, rng) for _ in range(600)]
    assert {box.lon_start for box in boxes} == set(range(12))
    assert {box.lat_start for box in boxes} == set(range(6))


def test_a_regional_window_never_wraps() -> None:
    grid = Grid(np.arange(10.0), np.arange(20.0))
    rng = np.random.default_rng(0)
    assert not grid.periodic
    assert all(random_box(grid, 4, 7, rng).lon_start <= 13 for _ in range(200))


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="larger than"):
        check_window_fits(global_grid(8, 12), 9, 4)
    with pytest.raises(ValueError, match="ascend"):
        Grid(np.array([1.0, 0.0]), np.arange(3.0))
    with pytest.raises(ValueError, match="even spacing"):
        Grid(np.arange(3.0), np.array([0.0, 1.0, 3.0]))
    with pytest.raises(ValueError, match="overlap"):
        TilePlan(global_grid(8, 12), 4, 4, 1.0)


@given(
    hnp.arrays(np.float64, st.integers(1, 9), elements=st.floats(-180, 360)),
    st.floats(-90, 90),
    st.floats(-180, 360),
)
def test_the_nearest_cell_has_the_least_angle_along_each_axis(meridians, latitude, longitude):
    """The angle between directions is that of the complex numbers exp(i longitude)."""
    parallels = np.linspace(-80.0, 80.0, len(meridians))
    row, column = nearest_cells(parallels, meridians, np.array(latitude), np.array(longitude))
    turned = np.exp(1j * np.deg2rad(meridians)) / np.exp(1j * np.deg2rad(longitude))
    angles = np.rad2deg(np.abs(np.angle(turned)))
    assert angles[column] <= angles.min() + 1e-6
    assert abs(parallels[row] - latitude) == np.abs(parallels - latitude).min()
    east = degrees_east_of(longitude, meridians)
    assert ((east >= -180) & (east < 180)).all()
    np.testing.assert_allclose(np.exp(1j * np.deg2rad(east)), turned, atol=1e-9)

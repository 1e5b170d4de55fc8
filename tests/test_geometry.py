"""Grids, area weights and the tile plan against closed forms and properties."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.geometry import Grid, TilePlan, area_weights, check_window_fits, random_box


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

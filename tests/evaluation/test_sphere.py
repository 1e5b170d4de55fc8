import numpy as np
import pytest

from atmossl.evaluation.sphere import Halo, polar_sign
from atmossl.geometry import Grid


def _grid(num_lat: int = 8, num_lon: int = 16, *, with_poles: bool = False) -> Grid:
    spacing = 180.0 / num_lat
    latitude = -90 + spacing * (np.arange(num_lat) + 0.5)
    latitude = np.linspace(-90, 90, num_lat) if with_poles else latitude
    return Grid(latitude, np.arange(num_lon) * 360.0 / num_lon)


def _cartesian(latitude: np.ndarray, longitude: np.ndarray) -> np.ndarray:
    """Unit vectors [xyz, row, column]: smooth functions of the place on the sphere."""
    lat, lon = np.deg2rad(latitude)[:, None], np.deg2rad(longitude)[None, :]
    return np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat) + 0 * lon])


@pytest.mark.parametrize("with_poles", [False, True])
def test_halo_of_a_scalar_is_the_same_place_on_the_sphere(with_poles):
    grid = _grid(9, 16, with_poles=with_poles)
    halo = Halo(grid, 2, 3)
    extended = halo.extend(_cartesian(grid.latitude, grid.longitude), 1.0)
    # Latitude 95 at longitude 0 is 85 at 180: the formula for unit vectors knows that.
    expected = _cartesian(halo.latitude, halo.longitude)
    np.testing.assert_allclose(extended, expected, atol=1e-12)


def test_halo_of_a_wind_component_continues_smoothly_across_the_pole():
    grid = _grid(16, 32)
    halo = Halo(grid, 2, 0)
    # A uniform flow along x across the pole: eastward component is -sin(lon) at all latitudes.
    u = np.repeat(-np.sin(np.deg2rad(grid.longitude))[None, :], 16, axis=0)
    extended = halo.extend(u, polar_sign("u_component_of_wind"))
    np.testing.assert_allclose(extended, np.repeat(u[:1], 20, axis=0), atol=1e-12)
    assert polar_sign("temperature") == 1.0
    assert polar_sign("10m_v_component_of_wind") == -1.0


def test_halo_off_the_poles_repeats_the_last_row_and_column():
    grid = Grid(np.array([10.0, 20.0, 30.0]), np.array([0.0, 10.0, 20.0, 30.0]))
    fields = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(
        Halo(grid, 1, 1).extend(fields, -1.0), np.pad(fields, 1, mode="edge")
    )


def test_halo_larger_than_the_grid_is_an_error():
    with pytest.raises(ValueError, match="halo of 9 x 0"):
        Halo(_grid(), 9, 0)

"""Small synthetic datasets for the evaluation tests."""

from collections.abc import Callable, Sequence

import numpy as np
import pytest
import xarray as xr

STEP = np.timedelta64(6, "h").astype("timedelta64[ns]")
UNITS = {
    "temperature": "K",
    "u_component_of_wind": "m s**-1",
    "v_component_of_wind": "m s**-1",
    "geopotential": "m**2 s**-2",
    "specific_humidity": "kg kg**-1",
}


def regular_grid(num_lat: int, num_lon: int) -> tuple[np.ndarray, np.ndarray]:
    """Cell centres of a global grid without rows on the poles."""
    spacing = 180.0 / num_lat
    return -90.0 + spacing * (np.arange(num_lat) + 0.5), np.arange(num_lon) * 360.0 / num_lon


def make_dataset(
    *,
    num_times: int = 12,
    num_lat: int = 8,
    num_lon: int = 16,
    variables: Sequence[str] = ("temperature", "u_component_of_wind"),
    levels: Sequence[float] = (500.0, 850.0),
    start: str = "2020-01-01",
    seed: int = 0,
) -> xr.Dataset:
    """White noise with CF names, units and the coordinates of the truth contract."""
    rng = np.random.default_rng(seed)
    latitude, longitude = regular_grid(num_lat, num_lon)
    time = np.datetime64(start, "ns") + np.arange(num_times) * STEP
    coords = {
        "time": time,
        "level": np.asarray(levels),
        "latitude": latitude,
        "longitude": longitude,
    }
    shape = tuple(len(c) for c in coords.values())
    fields = {
        name: xr.DataArray(
            rng.standard_normal(shape, dtype=np.float32),
            coords,
            tuple(coords),
            attrs={"units": UNITS[name]},
        )
        for name in variables
    }
    return xr.Dataset(fields)


@pytest.fixture(scope="session")
def dataset() -> Callable[..., xr.Dataset]:
    return make_dataset

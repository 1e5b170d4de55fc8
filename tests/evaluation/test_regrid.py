import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.evaluation.regrid import ConservativeRegridder, coarsest
from atmossl.evaluation.spatial import coarsen
from atmossl.geometry import Grid, area_weights
from tests.evaluation.conftest import make_dataset, regular_grid


def grid(num_lat: int, num_lon: int, *, poles: bool = False, west: float = 0.0) -> Grid:
    latitude = np.linspace(-90, 90, num_lat) if poles else regular_grid(num_lat, num_lon)[0]
    return Grid(latitude, west + np.arange(num_lon) * 360.0 / num_lon)


def field(on: Grid, seed: int = 0) -> xr.Dataset:
    values = np.random.default_rng(seed).standard_normal((2, *on.shape)).astype(np.float32)
    coords = {"time": [0, 1], "latitude": on.latitude, "longitude": on.longitude}
    return xr.Dataset({"temperature": (tuple(coords), values)}, coords)


def mean(dataset: xr.Dataset) -> np.ndarray:
    weights = dataset["latitude"].copy(data=area_weights(dataset["latitude"].to_numpy()))
    return dataset["temperature"].weighted(weights).mean(["latitude", "longitude"]).to_numpy()


@settings(deadline=None, max_examples=25)
@given(
    source=st.tuples(st.integers(3, 20), st.integers(4, 24), st.booleans(), st.floats(0, 7)),
    target=st.tuples(st.integers(3, 12), st.integers(4, 16), st.booleans()),
)
def test_the_global_mean_is_kept_and_a_constant_stays(source, target):
    num_lat, num_lon, poles, west = source
    here, there = grid(num_lat, num_lon, poles=poles, west=west), grid(*target[:2], poles=target[2])
    regrid = ConservativeRegridder(here, there)
    fine = field(here)
    np.testing.assert_allclose(mean(regrid(fine)), mean(fine), atol=2e-6)
    np.testing.assert_allclose(regrid(fine * 0 + 3)["temperature"], 3.0, rtol=1e-6)


def test_nested_grids_give_block_means():
    fine = make_dataset(num_times=2)
    blocks = coarsen(fine, 2)
    target = Grid(blocks["latitude"].to_numpy(), blocks["longitude"].to_numpy())
    source = Grid(fine["latitude"].to_numpy(), fine["longitude"].to_numpy())
    found = ConservativeRegridder(source, target)(fine)
    np.testing.assert_allclose(found["temperature"], blocks["temperature"], atol=1e-6)


def test_a_region_does_not_cover_the_globe():
    region = Grid(np.arange(30.0, 60.0, 5.0), np.arange(0.0, 60.0, 5.0))
    with pytest.raises(ValueError, match="does not cover"):
        ConservativeRegridder(region, grid(8, 16))


def test_coarsest_has_the_largest_cells():
    assert coarsest([grid(32, 64), grid(8, 16), grid(16, 32)]).shape == (8, 16)

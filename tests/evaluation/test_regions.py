import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.regions import REGIONS, area_mean, boxes, find_regions


def _sine_of_latitude(num_lat: int = 90) -> xr.DataArray:
    latitude = -90 + 180 / num_lat * (np.arange(num_lat) + 0.5)
    values = np.repeat(np.sin(np.deg2rad(latitude))[:, None], 4, axis=1)
    coords = {"latitude": latitude, "longitude": np.arange(4) * 90.0}
    return xr.DataArray(values, coords, ("latitude", "longitude"))


def test_area_mean_of_squared_sine_is_one_third():
    # The integral of sin^2 over the sphere is a third of its area.
    assert float(area_mean(_sine_of_latitude() ** 2, REGIONS["global"])) == pytest.approx(
        1 / 3, abs=2e-4
    )


def test_area_mean_over_a_belt_matches_its_integral():
    # Cells of 2 degrees: the tropics end on edges at exactly 20 degrees.
    south, north = 0.0, np.sin(np.deg2rad(90.0))
    sine_20 = np.sin(np.deg2rad(20.0))
    expected = (north**2 - sine_20**2) / 2 / (north - sine_20)
    mean = float(area_mean(_sine_of_latitude(), REGIONS["northern_extratropics"]))
    assert mean == pytest.approx(expected, abs=2e-4)
    assert float(area_mean(_sine_of_latitude(), REGIONS["tropics"])) == pytest.approx(south)


def test_area_mean_leaves_out_missing_cells():
    field = _sine_of_latitude() * 0 + 2.0
    field[10:20] = np.nan
    assert float(area_mean(field, REGIONS["global"])) == pytest.approx(2.0)


def test_a_box_of_a_whole_turn_is_the_belt_and_edges_hold_rounded_centres():
    lon = xr.DataArray(np.arange(0.0, 360.0, 0.9, dtype=np.float32), dims="longitude")
    (turn, part) = boxes({"turn": (-30, 30, 0, 360), "part": (-30, 30, 0.9, 9.9)})
    assert turn.contains_longitude(lon).all()
    assert int(part.contains_longitude(lon).sum()) == 11


def test_unknown_region_is_named_with_choices():
    with pytest.raises(ValueError, match="regions=atlantis: unknown; valid: .*tropics"):
        find_regions(["global", "atlantis"])


def test_region_outside_the_grid_is_an_error():
    field = _sine_of_latitude().isel(latitude=slice(40, 50))
    with pytest.raises(ValueError, match="poles"):
        area_mean(field, REGIONS["poles"])

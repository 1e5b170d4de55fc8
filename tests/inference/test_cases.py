"""What the model saw, against the record: at the nearest step, blank where it was hidden."""

from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from atmossl.geometry import area_weights
from atmossl.inference.cases import VisibleInput, visible_inputs
from atmossl.masking.combined import Combined
from atmossl.masking.places import CrossVariable, Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Task, TemporalInterpolation
from tests.inference.oracle_models import STORE, Known, predictor
from tests.synthetic import spec

HOUR = np.timedelta64(1, "h")
TIME = STORE["time"].values[6]
LEVELS = {"temperature": 500, "u_component_of_wind": 300}
BOX = LatLonBox(south=-46.0, north=1.0, west=85.0, east=185.0)
INSIDE = np.ix_(range(2, 4), range(4, 9))  # cells of 22.5 degrees whose centres lie in the box


def seen(task: Task, lead_hours: int = 0, levels: dict = LEVELS, **more) -> dict[str, VisibleInput]:
    plan = predictor(task, Known(lambda stream: stream.guess), **more)
    return visible_inputs(plan, TIME, lead_hours * HOUR, levels)


def truth(name: str, level: int, hours: int) -> np.ndarray:
    return STORE[name].sel(time=TIME + hours * HOUR, level=level).values


def equal(found: VisibleInput, expected: np.ndarray, hours: int) -> None:
    assert found.offset / HOUR == hours
    np.testing.assert_allclose(found.values, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("lead", [6, 12])
def test_a_forecast_saw_the_state_at_its_init_time(lead: int) -> None:
    for name, found in seen(Forecast(12), lead).items():
        equal(found, truth(name, LEVELS[name], 0), -lead)


def test_an_interpolation_saw_the_step_before() -> None:
    for name, found in seen(TemporalInterpolation(6)).items():
        equal(found, truth(name, LEVELS[name], -6), -6)


def test_downscaling_saw_means_by_area() -> None:
    area = area_weights(STORE["latitude"].values).reshape(4, 2, 1, 1)
    for name, found in seen(Downscaling(2)).items():
        blocks = truth(name, LEVELS[name], 0).reshape(4, 2, 8, 2)
        means = (blocks * area).sum((1, 3)) / (2 * area.sum(1)[:, :, 0])
        equal(found, means.repeat(2, 0).repeat(2, 1), 0)


def test_inpainting_saw_nothing_in_its_box() -> None:
    single = (spec(token=(1, 1, 1)),)
    for name, found in seen(Inpainting((BOX,)), specs=single).items():
        expected = truth(name, LEVELS[name], 0).copy()
        expected[INSIDE] = np.nan
        equal(found, expected, 0)


def test_a_union_saw_the_init_time_with_its_gap() -> None:
    union = Combined((Forecast(6), Inpainting((BOX,))))
    for name, found in seen(union, 6, specs=(spec(token=(1, 1, 1)),)).items():
        expected = truth(name, LEVELS[name], 0).copy()
        expected[INSIDE] = np.nan
        equal(found, expected, -6)


def test_a_hidden_variable_has_another_one_beside_it() -> None:
    both = tuple(spec(name, variables=(name,), token=(1, 2, 2)) for name in LEVELS)
    found = seen(CrossVariable(variables=("temperature",)), specs=both)
    assert found["temperature"].variable == "u_component_of_wind"
    equal(found["temperature"], truth("u_component_of_wind", 500, 0), 0)
    equal(found["u_component_of_wind"], truth("u_component_of_wind", 300, 0), 0)


def test_a_hidden_level_has_another_one_beside_it() -> None:
    found = seen(CrossVariable(levels=(500,)))
    assert (found["temperature"].variable, found["temperature"].level) == ("temperature", 300)
    equal(found["temperature"], truth("temperature", 300, 0), 0)


def test_what_was_never_observed_is_blank() -> None:
    gappy = STORE.copy()
    gappy["temperature"] = STORE["temperature"].where(STORE["longitude"] > 30)
    streams = (
        spec("a", variables=("temperature",), token=(1, 2, 2)),
        spec("b", variables=("u_component_of_wind",), token=(1, 2, 2)),
    )
    streams = (replace(streams[0], missing="mask"), streams[1])
    found = seen(Forecast(6), 6, specs=streams, store=gappy)["temperature"]
    west = (xr.ones_like(STORE["latitude"]) * STORE["longitude"] <= 30).values
    np.testing.assert_array_equal(np.isnan(found.values), west)

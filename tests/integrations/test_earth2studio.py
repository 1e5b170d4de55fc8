"""A checkpoint behind Earth2Studio's protocols, against its own predictions. The protocols are
restated here, and asked of the package itself where it is installed."""

from collections import OrderedDict
from itertools import islice
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import pytest
import torch
import xarray as xr

import atmossl
from atmossl.api import Model
from atmossl.integrations.earth2studio import Diagnostic, Prognostic
from tests.synthetic import dataset

SMALL = Path(__file__).parents[1] / "checkpoints" / "format_2.ckpt"
pytestmark = pytest.mark.filterwarnings("ignore:this checkpoint was not trained for")


@runtime_checkable
class DiagnosticModel(Protocol):
    def __call__(self, x: torch.Tensor, coords: OrderedDict) -> tuple: ...
    def input_coords(self) -> OrderedDict: ...
    def output_coords(self, input_coords: OrderedDict) -> OrderedDict: ...
    def to(self, device: Any) -> Any: ...


@runtime_checkable
class PrognosticModel(DiagnosticModel, Protocol):
    def create_iterator(self, x: torch.Tensor, coords: OrderedDict) -> Any: ...


@pytest.fixture(scope="module")
def model() -> Model:
    return atmossl.load(SMALL, device="cpu")


@pytest.fixture(scope="module")
def store(model: Model) -> xr.Dataset:
    trained = model.trained
    names, levels = trained.variables, trained.levels
    return dataset(variables=names, levels=levels, num_lat=8, num_lon=16, start="1959-01-20")


def tensor_of(
    store: xr.Dataset, wrapper: Any, times: list[np.datetime64]
) -> tuple[torch.Tensor, OrderedDict]:
    """Fields as Earth2Studio fetches them, from north to south, with a leading dimension."""
    coords = wrapper.input_coords()
    del coords["batch"]
    coords["time"] = np.array(times)
    fields = [
        [
            [store[name].sel(level=level, time=time + lead) for name, level in wrapper.inputs]
            for lead in coords["lead_time"]
        ]
        for time in times
    ]
    stacked = np.stack([[np.stack(rows) for rows in of_time] for of_time in fields])
    stacked = stacked[..., ::-1, :].copy()
    return torch.from_numpy(stacked)[None], OrderedDict({"ensemble": np.array([0]), **coords})


def wrapped(model: Model, store: xr.Dataset, kind: type, *task: str, **choices: Any) -> Any:
    grid = (store["latitude"].values[::-1], store["longitude"].values)
    return kind(model, *grid, *task, **choices)


def test_wrappers_follow_the_protocols(model: Model, store: xr.Dataset) -> None:
    forecast = wrapped(model, store, Prognostic)
    gaps = wrapped(model, store, Diagnostic, "inpainting")
    assert isinstance(forecast, PrognosticModel) and isinstance(gaps, DiagnosticModel)
    assert not isinstance(gaps, PrognosticModel)
    assert next(iter(forecast.input_coords())) == "batch"
    assert list(forecast.output_coords(forecast.input_coords())) == [
        "batch", "time", "lead_time", "variable", "lat", "lon",
    ]  # fmt: skip
    assert forecast.to("cpu") is forecast
    try:
        from earth2studio.models.dx.base import DiagnosticModel as TheirDiagnostic
        from earth2studio.models.px.base import PrognosticModel as TheirPrognostic
    except ImportError:
        return
    assert isinstance(forecast, TheirPrognostic) and isinstance(gaps, TheirDiagnostic)


def expected(
    model: Model, store: xr.Dataset, wrapper: Any, task: str, time: np.datetime64, **choices: Any
) -> np.ndarray:
    """[lead variable lat lon], from north to south."""
    predicted = model.predict(task, store, time, **choices).mean("member")
    predicted = predicted.sortby("latitude", ascending=False)
    predicted = predicted.isel(init_time=0) if "init_time" in predicted.dims else predicted
    along = "lead_time" if "lead_time" in predicted.dims else "time"
    rows = [
        predicted[name].sel(level=level).transpose(along, "latitude", "longitude").values
        for name, level in wrapper.outputs
    ]
    return np.stack(rows, axis=1)


def test_a_call_is_a_forecast_of_every_time(model: Model, store: xr.Dataset) -> None:
    wrapper = wrapped(model, store, Prognostic)
    times = [store["time"].values[n] for n in (8, 13)]
    x, coords = tensor_of(store, wrapper, times)
    values, coords_out = wrapper(x, coords)
    assert list(coords_out["lead_time"]) == [np.timedelta64(6, "h")]
    assert values.shape == tuple(map(len, coords_out.values()))
    for number, time in enumerate(times):
        by_hand = expected(model, store, wrapper, "forecast", time, lead_time="6h")
        np.testing.assert_allclose(values[0, number], by_hand, rtol=1e-5, atol=1e-5)


def test_iteration_goes_on_from_what_was_predicted(model: Model, store: xr.Dataset) -> None:
    wrapper = wrapped(model, store, Prognostic)
    x, coords = tensor_of(store, wrapper, [store["time"].values[8]])
    initial, first, second = islice(wrapper.create_iterator(x, coords), 3)
    torch.testing.assert_close(initial[0], x[:, :, -1:])
    leads = [int(c["lead_time"][0] / np.timedelta64(1, "h")) for _, c in (initial, first, second)]
    assert leads == [0, 6, 12]
    moved = OrderedDict({**coords, "lead_time": coords["lead_time"] + np.timedelta64(6, "h")})
    again, _ = wrapper(torch.cat([x[:, :, 1:], first[0]], dim=2), moved)
    torch.testing.assert_close(second[0], again)


def test_hooks_stand_before_and_after_every_step(model: Model, store: xr.Dataset) -> None:
    wrapper = wrapped(model, store, Prognostic)
    wrapper.rear_hook = lambda x, coords: (x + 1.0, coords)
    x, coords = tensor_of(store, wrapper, [store["time"].values[8]])
    _, (values, _) = islice(wrapper.create_iterator(x, coords), 2)
    torch.testing.assert_close(values, wrapper(x, coords)[0] + 1.0)


def test_a_diagnostic_fills_boxes(model: Model, store: xr.Dataset) -> None:
    boxes = [[-45.0, 45.0, 60.0, 180.0]]
    wrapper = wrapped(model, store, Diagnostic, "inpainting", boxes=boxes)
    time = store["time"].values[8]
    x, coords = tensor_of(store, wrapper, [time])
    values, coords_out = wrapper(x, coords)
    reference = time + coords_out["lead_time"][0]
    by_hand = expected(model, store, wrapper, "inpainting", reference, boxes=boxes)
    np.testing.assert_allclose(values[0, 0], by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("variable", np.array(["z500"]), "variable"),
        ("lead_time", np.array([np.timedelta64(0, "h")]), "lead_time"),
        ("lat", np.linspace(90, -90, 8), "lat"),
    ],
)
def test_other_coordinates_are_refused(
    model: Model, store: xr.Dataset, key: str, value: np.ndarray, words: str
) -> None:
    wrapper = wrapped(model, store, Prognostic)
    with pytest.raises(ValueError, match=f"^{words}: .*; needed: "):
        wrapper.output_coords(OrderedDict({**wrapper.input_coords(), key: value}))


def test_tasks_of_other_grids_and_passes_are_refused(model: Model, store: xr.Dataset) -> None:
    for choices in ({"lead_time": "24h", "rollout_time": "6h"},):
        with pytest.raises(ValueError, match="one pass on the grid"):
            wrapped(model, store, Prognostic, **choices)

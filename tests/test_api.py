"""The Python API, its documentation and its notebook."""

import re
import warnings
from datetime import datetime
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
import pandas as pd
import pytest
import xarray as xr
from nbclient import NotebookClient

import atmossl
from atmossl.api import Model, find_task
from atmossl.inference.out_of_training_warnings import unseen, untrained_step
from atmossl.inference.plan import chosen_times
from atmossl.inference.tiles import first_view
from atmossl.masking.random import RandomMasking, TimeBlockMasking
from atmossl.masking.tasks import Downscaling, Forecast, TemporalInterpolation
from tests.inference.oracle_models import NAMES, STORE, Known, predictor
from tests.synthetic import spec

DOCS = Path(__file__).resolve().parents[1] / "docs"


def guess(stream):
    return stream.guess


def model() -> Model:
    return Model(predictor(Forecast(6), Known(guess)).trained, "cpu")


def test_predict_takes_and_returns_xarray(tmp_path: Path) -> None:
    shuffled = STORE.isel(latitude=slice(None, None, -1)).transpose("longitude", ...)
    found = model().predict("forecast", shuffled, ["2001-01-02T06", "2001-01-02"], lead_time="6h")
    assert found["temperature"].dims == (
        "init_time", "lead_time", "member", "level", "latitude", "longitude",
    )  # fmt: skip
    now = STORE["temperature"].sel(time=found.init_time.values).values
    mean = found["temperature"].mean("member").isel(lead_time=0)
    np.testing.assert_allclose(mean, now, atol=2e-5)
    output = tmp_path / "out.zarr"
    written = model().predict(Forecast(6), shuffled, ["2001-01-02", "2001-01-02T06"], output=output)
    xr.testing.assert_equal(written.load(), found)
    assert output.exists()


def test_times_are_all_possible_ones_by_default() -> None:
    found = model().predict("temporal_interpolation", STORE)
    np.testing.assert_array_equal(found["time"], STORE["time"][2:-2])


@pytest.mark.parametrize(
    ("task", "choices", "message"),
    [
        ("weather", {}, "valid: .*forecast"),
        ("none.yaml", {}, "no file none.yaml"),
        ("forecast", {"lead": "6h"}, "unknown key task.lead; did you mean task.lead_time"),
        ("forecast", {"lead_time": "soon"}, "task.lead_time=soon"),
        ({"_target_": "oracle"}, {}, "task._target_=oracle: .*valid: .*forecast"),
        ({"lead_time": "6h"}, {}, "task: needs the key _target_; valid: .*forecast"),
        (
            {"_target_": "inpainting", "boxes": [50, 20, 0, 9]},
            {},
            r"task.boxes=\[50.*a list of boxes",
        ),
        (
            {"_target_": "combined", "parts": [{"_target_": "forecast"}]},
            {},
            "task.parts.0.lead_time",
        ),
        ({"_target_": "inpainting", "boxes": [[50, 20, 0, 9]]}, {}, "south < north"),
    ],
)
def test_what_is_no_task_is_named(task, choices: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        find_task(task, choices)


def test_choices_that_would_be_dropped_or_mistaken_are_named() -> None:
    for task, more, message in (
        (Forecast(6), {"lead_time": "12h"}, "change keys of a task by name"),
        ("forecast", {"layout": "wb2"}, "layout='wb2'; valid: .*weatherbench2"),
        ("forecast", {"tilings": 0}, "tilings=0"),
        ("forecast", {"batch_size": 0}, "batch_size=0"),
    ):
        with pytest.raises(ValueError, match=message):
            model().predict(task, STORE, "2001-01-02", **more)
    with pytest.raises(ValueError, match="dataset is a DataArray"):
        model().predict("forecast", STORE["temperature"])
    with pytest.raises(ValueError, match="device='tpu9'"):
        atmossl.load(device="tpu9")


def test_dates_of_any_library_are_understood() -> None:
    used = predictor(Forecast(6), Known(guess))
    wanted = np.array(["2001-01-02T06"], "datetime64[ns]")
    for times in (pd.Timestamp(wanted[0]), datetime(2001, 1, 2, 6), pd.DatetimeIndex(wanted),
                  xr.DataArray(wanted), wanted[0], [datetime(2001, 1, 2, 6)]):  # fmt: skip
        np.testing.assert_array_equal(chosen_times(used, times), wanted)


def test_dates_outside_and_none_are_named() -> None:
    for times, message in (("1990-01-01", "not in segment"), ([], "names no date"),
                           ("tomorrow", "ISO dates"), (5, "5 is no date")):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            model().predict("forecast", STORE, times)


@pytest.mark.parametrize(
    ("task", "sampler", "expected"),
    [
        (Forecast(12), TimeBlockMasking((1, 2)), None),
        (Forecast(18), TimeBlockMasking((1, 2)), "3 whole steps hidden; training hid 2 at most"),
        (TemporalInterpolation(6), TimeBlockMasking((1, 1)), None),
        (Downscaling(2), TimeBlockMasking((1, 1)), r"tokens as coarsen;"),
        (Downscaling(2), Downscaling(4), r"coarsened by 2; training had 4"),
        (Forecast(6), RandomMasking((0.2, 0.3)), "1 whole steps hidden; training hid 0 at most"),
    ],
)
def test_what_training_never_hid_is_said(task, sampler, expected: str | None) -> None:
    used = predictor(task, Known(guess), window=(5, 8, 16))
    view = first_view(used, STORE["time"].values[6])
    found = unseen(view, sampler, getattr(task, "factor", None))
    assert (found == []) == (expected is None)
    assert expected is None or re.search(expected, found[0])


@pytest.mark.parametrize(("steps", "num_tokens"), [(1, 4), (2, 2)])
def test_hidden_steps_are_counted_as_steps_and_not_as_tokens(steps: int, num_tokens: int) -> None:
    streams = (spec(variables=NAMES, token=(steps, 2, 2)),)
    used = predictor(Forecast(12), Known(guess), specs=streams, window=(4, 8, 16))
    view = first_view(used, STORE["time"].values[6])
    assert view.streams[0].corruption.shape[1] == num_tokens
    (found,) = unseen(view, RandomMasking((0.2, 0.3)))
    assert found == "2 whole steps hidden; training hid 0 at most"


def test_training_masks_are_drawn_at_the_steps_of_the_training() -> None:
    """At steps of 1.5 h they would not fit the window."""
    used = predictor(TemporalInterpolation(6, refine=4), Known(guess), window=(5, 8, 16))
    view = first_view(used, STORE["time"].values[6])
    (found,) = unseen(view, TemporalInterpolation(6), stretch=4.0)
    assert "3 whole steps hidden; training hid 1 at most" in found


def test_steps_of_another_length_are_said() -> None:
    assert untrained_step(6.0, 6.0) == [] == untrained_step(3.0, None)
    assert "steps of 3 h; training had 6 h" in untrained_step(3.0, 6.0)


@pytest.mark.e2e
def test_tiling_changes_the_result_by_less_than_the_spread() -> None:
    """Of the reference checkpoint: other tiles, other seams, if there were any."""
    from atmossl.data.store import open_segment
    from atmossl.inference.cases import predict_fields
    from atmossl.inference.plan import Options, plan_prediction

    trained = atmossl.load(device="cpu").trained
    segment = open_segment(
        "sample", atmossl.open_data("sample"), "sample",
        variables=sorted(trained.variables), levels=trained.levels,
    )  # fmt: skip
    found = []
    for shift in (0, 3):
        options = Options(overlap=0.5, batch_size=16, device="cpu", lon_shift=shift)
        used = plan_prediction(trained, TemporalInterpolation(6), [segment], options)
        (fields,) = predict_fields(used, [np.datetime64("1959-02-12T00", "ns")])
        found.append(fields)
    weight = segment.grid.weights[:, None]
    for name in found[0]:
        one, two = (fields[name][0].astype(np.float64) for fields in found)  # member level lat lon
        difference = (((one.mean(0) - two.mean(0)) ** 2) * weight).mean(axis=(1, 2))
        variance = (one.var(0, ddof=1) * weight).mean(axis=(1, 2))
        assert (difference < 0.25 * variance).all(), name  # half the spread
        assert (difference > 0).all()


NOTEBOOK = DOCS / "notebooks" / "zero_shot.ipynb"
FEW_DATES = """
checkpoint = "default"
dates = ["1959-02-12T00"]
speed = {"overlap": 0.0, "tilings": 1}
"""


def outputs(notebook: Any, kind: str) -> list[str]:
    """What the cells of a notebook show, of one kind: `image/jpeg`, `text/plain`, `stdout`."""
    shown = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    assert not [output for output in shown if output.output_type == "error"]
    printed = [output.text for output in shown if output.get("name") == kind]
    return printed + [output.data[kind] for output in shown if kind in output.get("data", {})]


def persistence_rmse(dates: list[str]) -> dict[str, str]:
    """Of all variables of the sample over 12 hours, as the notebook prints it."""
    sample = atmossl.open_data("sample").load()
    init = np.array(dates, "datetime64[ns]")
    weight = np.cos(np.deg2rad(sample.latitude.values))[:, None]
    rmse = {}
    for name, field in sample.items():
        field = field.transpose("time", "level", "latitude", "longitude")
        later = field.sel(time=init + np.timedelta64(12, "h")).values.astype(float)
        squares = (later - field.sel(time=init).values) ** 2
        rmse[str(name)] = f"{np.sqrt((squares * weight).mean() / weight.mean()):.4g}"
    return rmse


def forecast_scores(notebook: Any) -> dict[str, list[str]]:
    """Model, baseline and ratio by variable, of the notebook's first table."""
    table = next(text for text in outputs(notebook, "text/plain") if "ratio" in text)
    return {name: numbers for name, *numbers in map(str.split, table.splitlines()[1:])}


@pytest.mark.e2e
def test_notebook_runs_on_fewer_dates() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [c for c in notebook.cells if "parameters" in c.metadata.get("tags", [])]
    stored = {line.partition(" =")[0] for line in parameters.source.splitlines()}
    assert stored == {line.partition(" =")[0] for line in FEW_DATES.strip().splitlines()}
    parameters.source = FEW_DATES
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the kernel's machinery
        NotebookClient(notebook, timeout=300, kernel_name="python3").execute()
    assert len(outputs(notebook, "image/jpeg")) == 4
    scores = forecast_scores(notebook)
    for name, rmse in persistence_rmse(["1959-02-12T00"]).items():
        ours, baseline, ratio = scores[name]
        assert float(baseline) == pytest.approx(float(rmse), rel=1e-3)
        assert float(ratio) == pytest.approx(float(ours) / float(baseline), rel=1e-3)
        assert float(ratio) < 1


def test_notebook_is_stored_with_its_outputs() -> None:
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 400_000
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert len(outputs(notebook, "image/jpeg")) == 4
    facts, *_, note = outputs(notebook, "stdout")
    assert "not trained for dates in August" in note
    assert re.search(r"train +run_0, run_1, run_2, run_3\n", facts)
    assert re.search(r"test +run_5\n", facts) and "from 1959-01-10 to 1959-02-19" in facts
    dates = re.findall(r"\d{4}-\d\d-\d\dT\d\d", facts.partition("scored on")[2])
    scores = forecast_scores(notebook)
    assert {name: baseline for name, (_, baseline, _) in scores.items()} == persistence_rmse(dates)
    assert all(float(ratio) < 1 for _, _, ratio in scores.values())
    assert not re.search(r"/(home|root|work|tmp|usr)/", NOTEBOOK.read_text())


@pytest.mark.e2e
def test_the_task_of_the_documentation_runs() -> None:
    text = (DOCS / "tasks.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    (own,) = [block for block in blocks if "class Poles" in block]
    names: dict = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that it was not trained for this
        exec(own, names)  # noqa: S102
    filled = names["filled"]
    truth = atmossl.open_data("sample")["temperature"].sel(time=filled.time)
    given = filled["temperature"].sel(latitude=slice(-55, 55))
    np.testing.assert_allclose(
        given.isel(member=0).transpose(*truth.dims), truth.sel(latitude=slice(-55, 55)), atol=1e-3
    )
    polar = filled["temperature"].sel(latitude=slice(65, None)).std("member")
    assert (polar > 0).mean() > 0.9


def test_a_model_prints_as_three_lines() -> None:
    first, second, third = repr(atmossl.load(device="cpu")).splitlines()
    assert first == (
        "Model(5 variables, 3 levels, 8.1 M parameters, trained on sample, "
        "1959-01-10 to 1959-02-19;"
    )
    assert "temperature, u_component_of_wind" in second and "on cpu, digest " in third

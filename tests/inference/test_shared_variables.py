"""A variable in several streams: on different levels it is one variable, twice it is refused."""

import re
from dataclasses import replace
from itertools import product
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import atmossl
from atmossl.batch import PRIMARY, StreamSpec, TokenSize, shared_fields
from atmossl.cli import main
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment, paired
from atmossl.inference.cases import predict_fields
from atmossl.inference.checkpoint import load_checkpoint, spec_to_dict
from atmossl.inference.plan import Options, plan_prediction
from atmossl.masking.tasks import Forecast, Hindcast, Task, TemporalInterpolation
from atmossl.model.multiformer import Multiformer
from tests.inference.oracle_models import NAMES, Known, predictor, run_at, segment, trained_on
from tests.inference.test_command import MODEL
from tests.synthetic import catalog, dataset, spec

LEVELS = (300, 500, 850)
STORE = dataset(steps=12, variables=NAMES)
TASKS = (Forecast(12), Forecast(18, 6), Hindcast(12), TemporalInterpolation(12))


def split_streams(groups: list[int], wind: list[int]) -> tuple[StreamSpec, ...]:
    """Streams of temperature and of wind; a level lies in the stream of its group."""
    return tuple(
        spec(f"{name}{group}", variables=(name,), levels=levels, token=(1, 2, 2))
        for name, own in zip(NAMES, (groups, wind), strict=True)
        for group in sorted(set(own), reverse=True)
        if (levels := tuple(v for v, g in zip(LEVELS, own, strict=True) if g == group))
    )


@settings(max_examples=6, deadline=None)
@given(
    groups=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    wind=st.lists(st.integers(0, 2), min_size=3, max_size=3),
    task=st.sampled_from(TASKS),
)
def test_however_levels_are_spread_over_streams_the_prediction_is_the_same(
    groups: list[int], wind: list[int], task: Task
) -> None:
    model = Known(attrgetter("guess"))
    one = run_at(predictor(task, model), 5)
    several = run_at(predictor(task, model, specs=split_streams(groups, wind)), 5)
    assert set(several) == set(one) == set(NAMES)
    for name in NAMES:
        np.testing.assert_array_equal(several[name], one[name])


FINE = dataset(num_lat=16, num_lon=32, levels=LEVELS, steps=20, variables=NAMES)
COARSE = FINE.coarsen(latitude=2, longitude=2).mean()[["temperature"]]


@pytest.mark.parametrize(
    ("fine", "coarse"),
    [(LEVELS, (850,)), ((500,), (300, 850))],
    ids=repr,
)
def test_streams_of_two_stores_roll_out_whatever_their_levels(
    fine: tuple[int, ...], coarse: tuple[int, ...]
) -> None:
    """A first guess that goes on unchanged: persistence of the last state, at every level."""
    specs = (
        StreamSpec("fine", NAMES, fine, TokenSize(1, 2, 2)),
        StreamSpec("coarse", NAMES[:1], coarse, TokenSize(1, 2, 2), data="reduced"),
    )
    records = {
        data: open_segment("waves", store, "memory", variables=list(store), levels=levels)
        for data, store, levels in ((PRIMARY, FINE, fine), ("reduced", COARSE, coarse))
    }
    trained = trained_on(records, Known(attrgetter("guess")), specs, (6, 8, 8))
    (own,) = paired({data: [record] for data, record in records.items()})
    options = Options(overlap=0.5, batch_size=8, device="cpu")
    used = plan_prediction(trained, Forecast(24, 12), [own], options)
    time = own.times[9]
    for data, store, levels in ((PRIMARY, FINE, fine), ("reduced", COARSE, coarse)):
        (fields,) = predict_fields(used, [time], data)
        for name, values in fields.items():
            expected = store[name].sel(time=time, level=list(levels)).values
            for step in values.mean(axis=1):
                np.testing.assert_allclose(step, expected, atol=2e-4)


def stream(name: str, **changes: Any) -> StreamSpec:
    values = {"variables": ("temperature",), "levels": (500,), "token_size": TokenSize(1, 2, 2)}
    return StreamSpec(name, **(values | changes))


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ({}, {}, "both hold .*temperature.* at 500 hPa"),
        ({"levels": (300, 500)}, {"levels": (500, 850)}, "at 500 hPa"),
        ({"levels": ()}, {"levels": ()}, "both hold"),
        ({}, {"variables": NAMES}, "both hold"),
        ({}, {"role": "input"}, "role input"),
        ({}, {"role": "static"}, "role static"),
        ({}, {"token_size": TokenSize(1, 4, 4)}, "both hold"),
        ({"data": "other"}, {"data": "other"}, "both hold"),
        ({}, {"name": "a", "levels": (850,)}, "stream.a is there twice"),
    ],
    ids=repr,
)
def test_a_field_that_is_predicted_stands_in_one_stream(first, second, message: str) -> None:
    (fault,) = shared_fields([stream("a", **first), stream(**({"name": "b"} | second))])
    assert re.search(message, fault), fault


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({}, {"levels": (300, 850)}),
        ({}, {"variables": ("u_component_of_wind",)}),
        ({}, {"data": "other"}),
        ({}, {"levels": (850,), "role": "input"}),
        ({"role": "static"}, {"role": "static"}),
        ({"role": "forcing"}, {"role": "input"}),
    ],
    ids=repr,
)
def test_streams_that_share_no_predicted_field_are_accepted(first, second) -> None:
    assert shared_fields([stream("a", **first), stream("b", **second)]) == []


@pytest.mark.parametrize(
    ("key", "values"), [("variables", ("temperature", "temperature")), ("levels", (500, 850, 500))]
)
def test_a_stream_names_everything_once(key: str, values: tuple) -> None:
    with pytest.raises(ValueError, match=f"stream.a.{key}=.* twice"):
        stream("a", **{key: values})


def save(path: Path, specs: tuple[StreamSpec, ...], **changes: Any) -> Path:
    """A checkpoint of random weights. changes: of the first stream's record."""
    torch.manual_seed(0)
    weights = Multiformer(streams=specs, **MODEL).state_dict()
    streams = [spec_to_dict(spec) for spec in specs]
    record = {
        "atmossl": "0.1.0",
        "torch": "2",
        "streams": [{**streams[0], **changes}, *streams[1:]],
        "model": MODEL,
        "statistics": compute_statistics([segment(STORE)]).to_dict(),
        "window": {"time": 5, "lat": 4, "lon": 8},
        "first_guess": True,
        "data": "waves",
        "step": 1,
        "step_hours": 6.0,
        "config": {"masking": {"_target_": "atmossl.masking.random.TimeBlockMasking"}},
    }
    state = {f"ema.module.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": state, "atmossl": record}, path)
    return path


@pytest.mark.parametrize(
    "changes",
    [{"variables": ["temperature"] * 2}, {"levels": [500, 500]}, {"levels": [300, 850]},
     {"name": "temperature0"}],
    ids=repr,
)  # fmt: skip
def test_checkpoints_of_such_streams_are_refused(tmp_path: Path, changes: Any, capsys) -> None:
    path = save(tmp_path / "old.ckpt", split_streams([0, 1, 1], [0, 0, 0]), **changes)
    with pytest.raises(ValueError, match="old.ckpt.*twice|old.ckpt.*both hold"):
        load_checkpoint(str(path))
    assert main(["predict", f"checkpoint={path}", f"output={tmp_path}/o.zarr"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


@pytest.mark.usefixtures("undrawn")
def test_one_variable_of_two_streams_through_every_command(tmp_path: Path) -> None:
    """Written on all levels in every format, calibrated, rolled out, scored, and from Python."""
    file = catalog(tmp_path, train=STORE, validation=STORE, test=STORE)
    checkpoint = save(tmp_path / "two.ckpt", split_streams([0, 0, 1], [0, 1, 0]))
    common = [f"checkpoint={checkpoint}", f"data.catalog={file}", "accelerator=cpu"]
    fields = {}
    for ending in ("zarr", "nc", "grib2"):
        output = tmp_path / f"o.{ending}"
        assert (
            main(
                [
                    "predict",
                    *common,
                    "task=forecast",
                    "task.lead_time=12h",
                    "task.rollout_time=6h",
                    "init_time=2001-01-02T06",
                    f"output={output}",
                ]
            )
            == 0
        )
        engine = {"zarr": "zarr", "nc": "netcdf4", "grib2": "cfgrib"}[ending]
        with xr.open_dataset(output, engine=engine, decode_timedelta=True) as found:
            fields[ending] = found.load()
    for name in NAMES:
        values = fields["zarr"][name]
        assert values.level.values.tolist() == list(LEVELS)
        assert bool(values.notnull().all())
        np.testing.assert_array_equal(values, fields["nc"][name])
    grib = fields["grib2"]["t"].sortby(["latitude", "isobaricInhPa"])
    ours = fields["zarr"]["temperature"].isel(init_time=0)
    grib = grib.transpose("step", "number", "isobaricInhPa", "latitude", "longitude")
    np.testing.assert_allclose(grib.values, ours.values, atol=1e-4)
    calibrated = tmp_path / "calibrated.ckpt"
    assert (
        main(["calibrate", *common, "task=forecast", "task.lead_time=12h", f"output={calibrated}"])
        == 0
    )
    factors = load_checkpoint(str(calibrated)).checkpoint_record["spread"]["Forecast"]["factors"]
    assert {name: np.shape(values) for name, values in factors.items()} == {
        name: (1, 1, 2, 3)
        for name in NAMES  # zone, band, step, level
    }
    assert (
        main(
            [
                "evaluate",
                *common,
                "tasks=[temporal_interpolation]",
                "ridge=false",
                "every=3",
                "bootstrap=5",
                "regions=[]",
                f"output={tmp_path}/report",
            ]
        )
        == 0
    )
    scores = pd.read_csv(tmp_path / "report" / "scores.csv")
    rmse = scores[(scores.score == "rmse") & (scores.source == "model")]
    assert set(zip(rmse.variable, rmse.level, strict=True)) == set(product(NAMES, LEVELS))
    assert rmse.value.notna().all()
    known = atmossl.load(str(checkpoint), device="cpu").predict(
        "forecast", STORE, "2001-01-02T06", lead_time="12h", rollout_time="6h"
    )
    np.testing.assert_array_equal(known.temperature, fields["zarr"].temperature)


def test_grib_holds_each_variable_on_its_own_levels(tmp_path: Path) -> None:
    """Levels that only another stream has are left out, single missing cells stay missing."""
    gappy = STORE.copy(deep=True)
    gappy["u_component_of_wind"][:, 2, 3, 4] = np.nan
    file = catalog(tmp_path, train=gappy, validation=gappy, test=gappy)
    first = spec("t", variables=NAMES[:1], levels=LEVELS[:2], token=(1, 2, 2))
    second = replace(first, name="u", variables=NAMES[1:], levels=LEVELS[2:], missing="mask")
    checkpoint = save(tmp_path / "two.ckpt", (first, second))
    output = tmp_path / "o.grib2"
    assert main(["predict", f"checkpoint={checkpoint}", f"data.catalog={file}", "accelerator=cpu",
                 "task=forecast", "init_time=2001-01-02T06", f"output={output}"]) == 0  # fmt: skip
    import eccodes  # after the libraries that it would disturb otherwise

    found = set()
    with output.open("rb") as file:
        while (message := eccodes.codes_grib_new_from_file(file)) is not None:
            keys = ("shortName", "level", "numberOfMissing")
            found.add(tuple(eccodes.codes_get(message, key) for key in keys))
            eccodes.codes_release(message)
    assert found == {("t", 300, 0), ("t", 500, 0), ("u", 850, 1)}

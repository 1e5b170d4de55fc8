"""Predictions with a stream of a coarser store beside the one that is written."""

from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
from torch import nn

from atmossl.batch import PRIMARY, StreamSpec, TokenSize, View, detokenise
from atmossl.data.segment import HOUR, Segment
from atmossl.data.store import open_segment, paired
from atmossl.inference.cases import predict_fields
from atmossl.inference.plan import Options, Plan, plan_prediction
from atmossl.inference.tiles import first_view
from atmossl.inference.writer import write
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from tests.inference.oracle_models import NAMES, Known, Oracle, run_at, trained_on
from tests.synthetic import dataset

LEVELS = (300, 850)
FINE = dataset(num_lat=16, num_lon=32, levels=LEVELS, steps=20)
# coarse cells begin at every second fine one from number 1 on: the last lies across Greenwich
HALF = FINE.roll(longitude=-1).coarsen(latitude=2, longitude=2).mean()
HALF = HALF.assign_coords(longitude=16.875 + 22.5 * np.arange(16))
COARSE = HALF.isel(time=slice(1, None, 2))
SPECS = (
    StreamSpec("fine", NAMES, LEVELS, TokenSize(1, 2, 2)),
    StreamSpec("coarse", NAMES[:1], LEVELS, TokenSize(1, 2, 2), data="reduced"),
)


def opened(store: xr.Dataset) -> Segment:
    names = [str(v) for v in store.data_vars]
    return open_segment("waves", store, "memory", variables=names, levels=LEVELS)


def predictor(
    task: Task, model: nn.Module, fine: xr.Dataset = FINE, coarse: xr.Dataset = COARSE, **changes
) -> Plan:
    records = {PRIMARY: opened(FINE), "reduced": opened(COARSE)}
    trained = trained_on(records, model, changes.pop("specs", SPECS), (6, 8, 8))
    (segment,) = paired({PRIMARY: [opened(fine)], "reduced": [opened(coarse)]})
    options = Options(**{"overlap": 0.5, "batch_size": 3, "device": "cpu"} | changes)
    return plan_prediction(trained, task, [segment], options)


class Spy(Oracle):
    """Returns the truth, and keeps what it was shown."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[torch.Tensor] = []
        self.known = Known(attrgetter("target"))

    def forward(self, view: View):
        for stream in view.streams:
            self.seen += [stream.source, stream.guess, stream.grid.time_hours, stream.grid.lon]
        return self.known(view)


@pytest.mark.parametrize("task", [TemporalInterpolation(6), Downscaling(4)], ids=repr)
@pytest.mark.parametrize("step", [8, 9])
def test_tiles_of_the_truth_blend_to_the_truth(task: Task, step: int) -> None:
    fields = run_at(predictor(task, Known(attrgetter("target"))), step)
    assert set(fields) == set(NAMES)
    for name in NAMES:
        truth = FINE[name].values[step]
        np.testing.assert_allclose(fields[name].mean(axis=1)[0], truth, atol=2e-5)


@pytest.mark.parametrize(
    ("task", "hidden"),
    [
        (Forecast(12), slice(10, None)),
        (Hindcast(12), slice(None, 9)),
        (TemporalInterpolation(12), slice(9, 11)),
    ],
    ids=repr,
)
def test_nothing_hidden_is_seen_in_either_resolution(task: Task, hidden: slice) -> None:
    """Other values where the task hides leave all that the network sees as it is."""
    spies, changed = [], FINE.copy(deep=True)
    for name in NAMES:
        changed[name][hidden] += 1.0
    times = changed.time.values[hidden]
    reduced = COARSE.copy(deep=True)
    reduced["temperature"][np.isin(COARSE.time.values, times)] += 1.0
    for fine, coarse in ((FINE, COARSE), (changed, reduced)):
        spies.append(Spy())
        run_at(predictor(task, spies[-1], fine, coarse), 9)
    for before, after in zip(spies[0].seen, spies[1].seen, strict=True):
        assert torch.equal(before, after)


def test_the_network_is_shown_the_same_air_of_both() -> None:
    """The coarse values of a tile are the means of its fine ones, at the steps they share."""
    used = predictor(TemporalInterpolation(6), Spy(), coarse=HALF)
    scale = used.trained.normaliser
    view = first_view(used, used.segment.times[9])
    fine, coarse = (scale.inverse(_fields(stream), stream.spec)[0] for stream in view.streams)
    means = fine.unflatten(-1, (-1, 2)).mean(-1).unflatten(-2, (-1, 2)).mean(-2)
    torch.testing.assert_close(means, coarse, atol=1e-5, rtol=1e-5)
    assert torch.equal(view.streams[0].grid.time_hours, view.streams[1].grid.time_hours)


def _fields(stream) -> torch.Tensor:
    return detokenise(stream.target, stream.spec)


def test_what_is_written_lies_on_the_fine_grid(tmp_path) -> None:
    used = predictor(Forecast(12), Known(attrgetter("target")))
    write(used, used.segment.times[6:8], tmp_path / "out.zarr")
    with xr.open_zarr(tmp_path / "out.zarr", consolidated=False) as store:
        assert set(store.data_vars) == set(NAMES)
        assert store.sizes["latitude"] == 16 and store.sizes["longitude"] == 32
        now = FINE["temperature"].isel(time=slice(6, 8)).values
        np.testing.assert_allclose(
            store["temperature"].isel(lead_time=0).mean("member").values, now, atol=2e-5
        )


def test_streams_of_another_store_come_on_its_cells_at_its_steps() -> None:
    """The truth of both resolutions, over all tiles; at an even step the coarse store has none."""
    used = predictor(TemporalInterpolation(12), Known(attrgetter("target")))
    times = used.segment.times
    even, odd = predict_fields(used, times[8:10], "reduced")
    for fields, step in ((even, 9), (odd, 9)):  # of the two hidden ones after each
        truth = COARSE["temperature"].sel(time=times[step]).values
        assert set(fields) == {"temperature"}
        np.testing.assert_allclose(fields["temperature"].mean(axis=1)[0], truth, atol=2e-5)
    single = predictor(TemporalInterpolation(6), Known(attrgetter("target")))
    assert [set(fields) for fields in predict_fields(single, times[8:10], "reduced")] == [
        set(),
        set(NAMES[:1]),
    ]


@pytest.mark.parametrize("suffix", [".zarr", ".nc"])
def test_groups_hold_the_streams_of_other_stores(tmp_path: Path, suffix: str) -> None:
    """Lead times are those of any case; where a case has no step, nothing is made up."""
    used, output = predictor(Forecast(24), Known(attrgetter("target"))), tmp_path / f"o{suffix}"
    write(used, used.segment.times[6:9], output)
    engine = "zarr" if suffix == ".zarr" else "netcdf4"
    opened = {"decode_timedelta": True, "engine": engine}
    with xr.open_dataset(output, group="reduced", **opened) as store:
        assert set(store.data_vars) == {"temperature"}
        np.testing.assert_array_equal(store["longitude"], np.sort(COARSE["longitude"]))
        np.testing.assert_array_equal(store["latitude"], COARSE["latitude"])
        hours = (store["lead_time"].values / HOUR).tolist()
        assert hours == [6, 12, 18, 24]
        valid = store["init_time"].values[:, None] + store["lead_time"].values
        there = store["temperature"].notnull()
        assert (there.all(("member", "level", "latitude", "longitude"))
                == np.isin(valid, COARSE["time"].values)).all()  # fmt: skip
        last = COARSE["temperature"].sortby("longitude").sel(
            time=store["init_time"].values[1]).values  # fmt: skip
        written = store["temperature"].isel(init_time=1, lead_time=[1, 3]).mean("member")
        np.testing.assert_allclose(written, [last, last], atol=2e-5)
    with xr.open_dataset(output, **opened) as store:
        assert store.sizes["longitude"] == 32 and set(store.data_vars) == set(NAMES)


def test_a_region_of_a_global_companion_is_written_where_it_lies(tmp_path: Path) -> None:
    """Across Greenwich, where the coarse grid's columns start anew."""
    columns = np.arange(23, 23 + 16) % 32
    region = FINE.isel(longitude=columns, latitude=slice(4, 16))
    used = predictor(TemporalInterpolation(6), Known(attrgetter("target")), region)
    write(used, used.segment.times[9:10], tmp_path / "out.zarr")
    with xr.open_zarr(tmp_path / "out.zarr", group="reduced") as store:
        assert store.sizes["latitude"] == 6 and store.sizes["longitude"] == 8
        longitude = store["longitude"].values
        truth = COARSE["temperature"].sel(
            time=used.segment.times[9], latitude=store["latitude"], longitude=longitude % 360
        )
        written = store["temperature"].isel(time=0).mean("member")
        np.testing.assert_allclose(written.values, truth.values, atol=2e-5)


@pytest.mark.parametrize(("step", "pass_hours"), [(9, 12), (8, 12), (9, 6)])
def test_rollouts_go_on_in_both_resolutions(step: int, pass_hours: int) -> None:
    """Every pass adds one standard deviation to the last state of each store that it knows; the
    coarse one stays where it is in passes that hold none of its steps."""
    model = Known(attrgetter("guess"), (1.0, 1.0))
    used = predictor(Forecast(24, rollout_hours=pass_hours), model, overlap=0.0)
    time = used.segment.times[step]
    for data, record in ((PRIMARY, FINE), ("reduced", COARSE.sortby("longitude"))):
        (fields,) = predict_fields(used, [time], data)
        leads = used.leads_of(data, time, used.leads) / HOUR
        assert fields["temperature"].shape[0] == len(leads) == (2 if data != PRIMARY else 4)
        spec = used.trained.specs[1 if data != PRIMARY else 0]
        std = used.trained.normaliser.values(spec, "std")[0].numpy()  # [level 1 1 1]
        start = record["temperature"].sel(time=record["time"] <= time)[-1].values
        passes = np.ceil(leads / pass_hours)
        if pass_hours == 6 and data != PRIMARY:  # every second pass has a step
            passes = np.arange(2) + 1
        for values, number in zip(fields["temperature"], passes, strict=True):
            expected = start + number * std.reshape(-1, 1, 1)
            np.testing.assert_allclose(values[0], expected, atol=1e-4)


def test_an_input_stream_of_which_nothing_is_given_is_named() -> None:
    """A forecast from an odd step, of which the coarse store has only later ones."""
    inputs = (SPECS[0], replace(SPECS[1], role="input"))
    used = predictor(Forecast(30), Known(attrgetter("target")), specs=inputs)
    run_at(used, 9)
    with pytest.raises(ValueError, match="reads no step of stream coarse"):
        run_at(used, 8)


@pytest.mark.parametrize(
    "task", [TemporalInterpolation(6, refine=2), Downscaling(2, coarse_input=True)], ids=repr
)
def test_what_needs_one_grid_is_refused(task: Task) -> None:
    with pytest.raises(ValueError, match="reduced"):
        run_at(predictor(task, Known(attrgetter("target"))), 9)

"""Places, dates, calendars, levels and values that a checkpoint never saw are told, each in one
line, and nothing is told where all is as in training or its record does not say."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

import atmossl
from atmossl.api import Model
from atmossl.batch import PRIMARY
from atmossl.data.axes import STANDARD
from atmossl.data.store import StoreRequest, open_segment
from atmossl.geometry import Grid
from atmossl.inference.out_of_training_warnings import (
    Seen,
    days_of,
    out_of_training_warnings,
    seen_in_training,
    unseen_dates,
    unseen_place,
)
from atmossl.inference.plan import Options, plan_prediction
from atmossl.masking.tasks import Forecast
from atmossl.schema import trained_sampler
from tests.synthetic import dataset

TIME = np.datetime64("1959-02-12T00", "ns")


@pytest.fixture(scope="module")
def model() -> Model:
    return atmossl.load("default", device="cpu")


@pytest.fixture(scope="module")
def sample() -> xr.Dataset:
    return atmossl.open_data("sample").sel(time=slice("1959-02-10", "1959-02-14")).load()


def told(model: Model, store: xr.Dataset, time=TIME, task=None) -> list[str]:
    needs = StoreRequest.of(model.trained.specs)
    segment = open_segment(
        "dataset", store, "memory", variables=needs.variables, levels=needs.levels
    )
    options = Options(overlap=0.0, batch_size=1, device="cpu")
    plan = plan_prediction(model.trained, task or Forecast(12), [segment], options)
    sampler = trained_sampler(model.trained.checkpoint_record, model.trained.plugins)
    return out_of_training_warnings(plan, np.atleast_1d(time).astype(segment.times.dtype), sampler)


def finer(store: xr.Dataset) -> xr.Dataset:
    """At half the spacing."""
    around = xr.concat(
        [store, store.isel(longitude=[0]).assign_coords(longitude=[360.0])], "longitude"
    )
    latitude = store.latitude.values
    half = np.sort(np.concatenate([latitude, (latitude[1:] + latitude[:-1]) / 2]))[:-1]
    fine = around.interp(latitude=half, longitude=np.arange(128) * 2.8125)
    return fine.astype(np.float32).assign(
        {name: fine[name].astype(np.float32).assign_attrs(store[name].attrs) for name in store}
    )


def warmer(store: xr.Dataset) -> xr.Dataset:
    air = store["temperature"]
    return store.assign(temperature=(air + 30).assign_attrs(air.attrs))


SUMMER = np.timedelta64(182, "D").astype("timedelta64[ns]")
CHANGES = {
    "cells of": (finer, TIME),
    "dates in August": (lambda s: s.assign_coords(time=s.time + SUMMER), TIME + SUMMER),
    "temperature at": (warmer, TIME),
}


def test_what_is_as_in_training_is_not_told(model, sample) -> None:
    assert told(model, sample) == []
    assert seen_in_training(model.trained)[PRIMARY].calendar == "standard"


@pytest.mark.parametrize("words", CHANGES)
def test_what_the_reference_checkpoint_never_saw_is_told(model, sample, words: str) -> None:
    change, time = CHANGES[words]
    lines = told(model, change(sample), time)
    assert sum(words in line and "training had" in line for line in lines) == 1


def test_another_calendar_is_told(model, sample) -> None:
    store = sample.convert_calendar("noleap", use_cftime=True)
    time = STANDARD.encode(np.array([TIME]))[0]
    segment_time = open_segment(
        "a", store, "memory", variables=["temperature"], levels=[500]
    ).calendar.parse(str(time)[:13])
    assert any("calendar noleap" in line for line in told(model, store, segment_time))


def test_the_summer_and_the_levels_of_a_counterfactual_are_told(model, sample) -> None:
    from atmossl.masking.combined import Counterfactual

    summer = told(model, sample, task=Counterfactual(Forecast(12), shift_hours=182 * 24.0))
    assert any("dates in August; training had January, February" in line for line in summer)
    levels = told(model, sample, task=Counterfactual(Forecast(12), levels=((850, 700),)))
    assert any("levels of" in line for line in levels)


def test_checkpoints_that_lack_the_record_tell_what_follows_from_their_period(
    model, sample
) -> None:
    record = {k: v for k, v in model.trained.checkpoint_record.items() if k != "seen"}
    other = replace(
        model, trained=replace(model.trained, checkpoint_record=record, data="elsewhere")
    )
    assert not any("cells" in line for line in told(other, finer(sample)))
    later = sample.assign_coords(time=sample.time + SUMMER)
    assert any("dates in August" in line for line in told(other, later, TIME + SUMMER))
    silent = replace(
        other, trained=replace(other.trained, checkpoint_record={**record, "statistics": {}})
    )
    assert not any("dates" in line for line in told(silent, later, TIME + SUMMER))


def test_a_record_survives_the_checkpoint(tmp_path) -> None:
    segment = open_segment(
        "waves", dataset(steps=40), "memory", variables=["temperature"], levels=[500]
    )
    seen = Seen.of([segment])
    torch.save(seen.to_dict(), tmp_path / "seen.pt")
    assert Seen.from_dict(torch.load(tmp_path / "seen.pt", weights_only=True)) == seen
    assert seen.days == tuple(range(10)) and seen.cell == (22.5, 22.5)
    assert seen.longitudes == (0.0, 360.0)


def region(south: float, north: float, west: float, east: float, cell: float = 2.5) -> Grid:
    lat, lon = np.arange(south, north + 0.1, cell), np.arange(west, east + 0.1, cell)
    return Grid(lat, lon)


SEEN = Seen(cell=(2.5, 2.5), latitudes=(30.0, 70.0), longitudes=(345.0, 55.0))  # 15 W to 40 E


@pytest.mark.parametrize(
    ("grid", "words"),
    [
        (region(30, 70, 345, 400), []),
        (region(40, 60, 0, 30), []),
        (region(-70, -30, 345, 400), ["latitudes"]),
        (region(40, 60, 100, 140), ["longitudes"]),
        (region(40, 60, 30, 60), ["longitudes"]),
        (region(-87.5, 87.5, 0, 357.5), ["latitudes", "longitudes"]),
        (region(40, 60, 0, 30, 1.25), ["cells"]),
    ],
)  # fmt: skip
def test_places_beyond_those_of_the_training_are_told(grid: Grid, words: list[str]) -> None:
    assert [line.split()[0] for line in unseen_place(SEEN, grid)] == words
    assert unseen_place(Seen(), grid) == []


def test_dates_are_told_beyond_half_a_month_around_the_year() -> None:
    january = tuple(days_of(np.arange("2001-01-01", "2001-02-01", dtype="M8[D]").astype("M8[ns]"),
                            STANDARD))  # fmt: skip
    for date, far in (("12-20", False), ("12-10", True), ("02-10", False), ("07-01", True)):
        day = days_of(np.array([f"2003-{date}"], "datetime64[ns]"), STANDARD)
        assert bool(unseen_dates(Seen(days=january), day)) == far, date
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert unseen_dates(Seen(), [3]) == []

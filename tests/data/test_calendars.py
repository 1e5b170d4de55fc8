"""Calendars of climate models against cftime itself; leap years; records with gaps."""

from pathlib import Path

import cftime
import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.batch import PRIMARY, YEAR_HOURS, StreamSpec, TokenSize
from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.backends import open_store
from atmossl.data.catalog import CatalogEntry, SegmentEntry
from atmossl.data.climatology import months_of
from atmossl.data.fingerprint import fingerprint
from atmossl.data.loader import SampleKey, WindowDataset
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import only_segment, open_parts, open_segment, open_split, paired
from atmossl.data.windows import Normaliser, WindowSize
from atmossl.masking.tasks import Forecast
from atmossl.model.embedding import absolute_features
from tests.synthetic import dataset, spec

CALENDARS = ("noleap", "360_day", "all_leap", "julian", "proleptic_gregorian")
NAMES = ("temperature",)


def store(calendar: str, start: str = "2000-02-20", *, steps: int = 60, freq: str = "6h", **sizes):
    times = xr.date_range(start, periods=steps, freq=freq, calendar=calendar, use_cftime=True)
    return dataset(variables=NAMES, steps=steps, **sizes).assign_coords(time=times)


def opened(data: xr.Dataset, **more) -> Segment:
    return open_segment("waves", data, "memory", variables=NAMES, levels=[500], **more)


@settings(deadline=None, max_examples=40)
@given(
    calendar=st.sampled_from(CALENDARS),
    year=st.integers(1, 2400),
    month=st.integers(1, 12),
    day=st.integers(1, 28),
    hour=st.integers(0, 23),
)
def test_dates_are_those_of_cftime(calendar, year: int, month: int, day: int, hour: int) -> None:
    date = cftime.datetime(year, month, day, hour, calendar=calendar)
    own = Calendar(calendar)
    (time,) = own.encode(np.array([date]))
    assert own.dates(np.array([time]))[0] == date
    text = f"{year:04d}-{month:02d}-{day:02d}T{hour:02d}"
    assert own.show(time) == text and own.parse(text) == time
    new_year = cftime.datetime(year, 1, 1, calendar=calendar)
    length = (cftime.datetime(year + 1, 1, 1, calendar=calendar) - new_year) / (date - new_year) \
        if date > new_year else np.inf  # fmt: skip
    assert own.year_share(np.array([time]))[0] == pytest.approx(1 / length, abs=1e-12)
    (earthly,) = own.on_earth(np.array([time]))
    assert str(earthly.astype("datetime64[h]"))[-2:] == f"{hour:02d}"
    assert abs(STANDARD.year_share(np.array([earthly]))[0] - 1 / length) < 1.01 / 365
    (by_year,) = own.on_earth(np.array([time]), by_hour=False)
    assert STANDARD.year_share(np.array([by_year]))[0] == pytest.approx(1 / length, abs=1e-9)


@pytest.mark.parametrize("calendar", CALENDARS)
@pytest.mark.parametrize("freq", ["D", "6h", "h"])
def test_a_record_goes_through_leap_days_as_its_calendar_does(calendar: str, freq: str) -> None:
    """From 20 February of a year that is a leap year in some calendars."""
    data = store(calendar, steps=240, freq=freq)
    segment = opened(data)
    assert segment.step_hours == {"D": 24.0, "6h": 6.0, "h": 1.0}[freq]
    dates = segment.calendar.dates(segment.times)
    np.testing.assert_array_equal(dates, data.time.values)
    part = segment.between("2000-02-27", "2000-03-01")
    inside = [d for d in data.time.values if cftime_in(d, (2, 27), (3, 1))]
    assert part.calendar.dates(part.times).tolist() == inside
    assert segment.find_time(segment.calendar.parse("2000-02-28")) == dates.tolist().index(
        cftime.datetime(2000, 2, 28, calendar=calendar)
    )
    with pytest.raises(ValueError, match="init_time=1999-12-01T00 is not in segment"):
        segment.find_time(segment.calendar.parse("1999-12"))


def cftime_in(date: cftime.datetime, first: tuple[int, int], last: tuple[int, int]) -> bool:
    at = (date.month, date.day, date.hour)
    return (*first, 0) <= at <= (*last, 24)


@pytest.mark.parametrize(
    ("calendar", "text"), [("noleap", "2000-02-29"), ("360_day", "2000-01-31"), ("noleap", "now")]
)
def test_a_date_that_does_not_exist_is_named(calendar: str, text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is no date of calendar {calendar}"):
        Calendar(calendar).parse(text)


@pytest.mark.parametrize("text", ["20010131", "1500-01-01", "2001-1-31", "now", "NaT", "20"])
def test_what_numpy_would_take_for_another_date_is_named(text: str) -> None:
    with pytest.raises(ValueError, match=f"'{text}' is no date"):
        STANDARD.parse(text)


@pytest.mark.parametrize(
    ("text", "after"),
    [
        ("1850", "1851-01-01"),
        ("1850-02", "1850-03-01"),
        ("1850-12", "1851-01-01"),
        ("1850-02-28", "1850-03-01"),
        ("1850-02-28T18", "1850-02-28T19"),
        ("1850-02-28T18:00", "1850-02-28T18:01"),
    ],
)
@pytest.mark.parametrize("calendar", [STANDARD, Calendar("noleap")])
def test_the_end_of_a_date_is_that_of_all_it_names(calendar, text: str, after: str) -> None:
    end, following = calendar.parse_end(text), calendar.parse(after)
    assert following - np.timedelta64(1, "us") <= end < following


@pytest.mark.parametrize("calendar", CALENDARS)
def test_the_months_of_a_record_are_those_of_its_own_calendar(calendar: str) -> None:
    """Times are kept as if all calendars were one, whose months are others."""
    segment = opened(store(calendar, "1850-04-28", steps=20))  # five days
    assert months_of([segment]) == {4, 5}
    later = opened(store(calendar, "2150-12-03", steps=4))
    assert months_of([segment, later]) == {4, 5, 12}


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
@pytest.mark.parametrize("year", [1, 1850, 2000])
def test_the_network_is_told_the_share_of_the_calendars_own_year(calendar: str, year: int) -> None:
    data = store(calendar, f"{year:04d}-06-20", steps=8)
    segment = opened(data)
    normaliser = Normaliser({PRIMARY: compute_statistics([segment])})
    stream = spec(variables=NAMES, levels=(500,), token=(1, 4, 8))
    data_set = WindowDataset(
        segments=[segment], specs=[stream], normaliser=normaliser, window=WindowSize(4, 8, 16),
        sampler=Forecast(6), seed=0,
    )  # fmt: skip
    ((view,), _) = data_set[SampleKey(0, 3)]
    grid = view.streams[0].grid
    batched = type(grid)(**{k: v[None] if torch.is_tensor(v) else v for k, v in vars(grid).items()})
    features = absolute_features(batched)[0].unflatten(0, grid.shape)[0, :, 0, 0]
    days = {"noleap": 365, "360_day": 360}[calendar]
    passed = {"noleap": 31 + 28 + 31 + 30 + 31 + 19, "360_day": 5 * 30 + 19}[calendar]
    hours = passed * 24 + 6 * np.arange(3, 7)
    angle = 2 * np.pi * hours / (24 * days)
    told = features.numpy()
    for wanted in (np.sin(angle), np.cos(angle)):
        assert np.abs(told - wanted[:, None]).max(axis=0).min() < 1e-5
    assert data_set.identity(3) == f"waves {year:04d}-06-20T18"


def test_standard_years_are_as_before() -> None:
    assert STANDARD.year_hours == YEAR_HOURS == 24 * 365.2425
    data = dataset(variables=NAMES)
    assert opened(data).calendar is STANDARD
    data = data.assign_coords(time=data.time + np.timedelta64(1, "D"))
    assert fingerprint([opened(data)]) != fingerprint([opened(store("noleap", steps=24))])


def test_leap_years_of_the_standard_calendar() -> None:
    data = dataset(variables=NAMES, start="2000-02-28", steps=3, step_hours=24)
    assert str(opened(data).times[1])[:10] == "2000-02-29"
    shares = STANDARD.year_share(np.array(["2000-12-31", "2001-12-31"], "datetime64[ns]"))
    np.testing.assert_allclose(shares, [365 / 366, 364 / 365], rtol=1e-12)


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_computed_streams_follow_the_calendar(calendar: str) -> None:
    segment = open_segment(
        "waves", store(calendar, "1850-01-01", steps=12, freq="D"), "memory",
        variables=["sin_year", "toa_incident_solar_radiation"], levels=[],
    )  # fmt: skip
    days = {"noleap": 365, "360_day": 360}[calendar]
    found = segment.read("sin_year", (0,), 0, 12, segment.whole())[0, :, 0, 0]
    np.testing.assert_allclose(found, np.sin(2 * np.pi * np.arange(12) / days), atol=1e-6)
    sun = segment.read("toa_incident_solar_radiation", (0,), 0, 1, segment.whole())[0, 0]
    assert int(sun.sum(axis=0).argmax()) == 8  # at 180 degrees east it is noon


@pytest.mark.parametrize("calendar", ["noleap", "360_day"])
def test_a_store_on_disk_keeps_its_calendar(calendar: str, tmp_path: Path) -> None:
    data = store(calendar, "0001-02-20")
    data.to_zarr(tmp_path / "model.zarr", consolidated=False)
    entry = CatalogEntry(
        description="", licence="", citation="", variables={"temperature": "temperature"},
        levels=(500,), segments={"run": SegmentEntry(location=str(tmp_path / "model.zarr"))},
        splits={"train": [{"segment": "run", "end": "0001-02-28T18"}],
                "validation": [{"segment": "run", "start": "0001-03-01"}]},
    )  # fmt: skip
    (train,), (rest,) = (
        open_split(entry, split, variables=NAMES, levels=[500]) for split in ("train", "validation")
    )
    assert train.calendar.show(train.times[-1]) == "0001-02-28T18"
    assert rest.calendar.show(rest.times[0]) == "0001-03-01T00"
    assert len(train.times) + len(rest.times) == (60 if calendar == "noleap" else 52)
    statistics = compute_statistics([train])
    assert statistics.period == "run 0001-02-20T00 to 0001-02-28T18"
    values = rest.read("temperature", (500,), 0, 4, rest.whole())
    assert np.isfinite(values).all()
    opened_store = open_store(SegmentEntry(location=str(tmp_path / "model.zarr")))
    assert Calendar.of(opened_store.dataset["time"].values) == train.calendar


def test_calendars_do_not_mix() -> None:
    with pytest.raises(ValueError, match="has calendar 360_day; needed: that of memory, noleap"):
        paired({PRIMARY: [opened(store("noleap"))], "other": [opened(store("360_day"))]})


GAPPY = [*range(0, 9), *range(11, 15), 17, *range(20, 24)]


def test_no_window_spans_a_gap() -> None:
    whole = dataset(variables=NAMES, levels=(500,))
    gappy = whole.isel(time=GAPPY)
    with pytest.raises(ValueError, match="gaps: split"):
        opened(gappy)
    parts = open_parts("waves", gappy, "memory", variables=NAMES, levels=[500], gaps="split")
    assert [len(part.times) for part in parts] == [9, 4, 4]
    names = ["waves@2001-01-01T00", "waves@2001-01-03T18", "waves@2001-01-06T00"]
    assert [part.name for part in parts] == names
    assert [only_segment(parts, name, "test") for name in names] == list(parts)
    assert all(part.is_called("waves") for part in parts)
    with pytest.raises(ValueError, match="choose one of them") as refused:
        only_segment(parts, "waves", "test")
    assert all(name in str(refused.value) for name in names)
    statistics = compute_statistics(parts)
    values = np.concatenate([whole["temperature"].values[p] for p in
                             (slice(0, 9), slice(11, 15), slice(20, 24))])  # fmt: skip
    weight = parts[0].grid.weights[:, None] * np.ones((1, 16))
    mean = (values.astype(float) * weight).sum() / (weight.sum() * len(values))
    assert statistics.mean[0, 0] == pytest.approx(mean, rel=1e-9)
    windows = WindowDataset(
        segments=parts, specs=[StreamSpec("air", NAMES, (500,), TokenSize(1, 4, 4))],
        normaliser=Normaliser({PRIMARY: statistics}), window=WindowSize(4, 8, 16),
        sampler=Forecast(6), seed=0,
    )  # fmt: skip
    assert len(windows) == 6 + 1 + 1
    seen = set()
    for number in range(len(windows)):
        ((view,), _) = windows[SampleKey(0, number)]
        hours = view.streams[0].grid.time_hours
        assert torch.equal(torch.diff(hours), torch.full((3,), 6.0, dtype=torch.float64))
        first = int((hours[0] - view.streams[0].grid.time_hours.new_tensor(271752.0)) / 6)
        truth = whole["temperature"].values[first : first + 4, 0]
        found = windows.normaliser.inverse(
            view.streams[0].target.new_tensor(0.0) + _fields(view), windows.specs[0]
        )[0, 0]
        np.testing.assert_allclose(found, np.roll(truth, -_west(view), axis=-1), atol=1e-4)
        seen.add(first)
    assert seen == {0, 1, 2, 3, 4, 5, 11, 20}


def _fields(view) -> torch.Tensor:
    from atmossl.batch import detokenise

    return detokenise(view.streams[0].target, view.streams[0].spec)


def _west(view) -> int:
    """First column of the window."""
    grid = view.streams[0].grid
    return round(float(grid.lon[0] - 1.5 * 22.5) / 22.5) % 16


def test_parts_too_short_for_a_window_are_told(caplog: pytest.LogCaptureFixture) -> None:
    gappy = dataset(variables=NAMES, levels=(500,)).isel(time=GAPPY)
    parts = open_parts("waves", gappy, "memory", variables=NAMES, levels=[500], gaps="split")
    assert "1 steps have a gap on either side" in caplog.text
    arguments = {
        "segments": parts, "specs": [StreamSpec("air", NAMES, (500,), TokenSize(1, 4, 4))],
        "normaliser": Normaliser({PRIMARY: compute_statistics(parts)}),
        "sampler": Forecast(6), "seed": 0,
    }  # fmt: skip
    windows = WindowDataset(window=WindowSize(5, 8, 16), **arguments)
    windows.tell_short_segments()
    assert len(windows) == 5
    assert "2 of 3 unbroken parts" in caplog.text
    with pytest.raises(ValueError, match="longest unbroken part of memory with 9 steps"):
        WindowDataset(window=WindowSize(10, 8, 16), **arguments)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([0, 1, 1, 2], "duplicate; keep one"),
        ([3, 2, 1, 0], "not in ascending order.*ingest. sorts"),
    ],
)
def test_splitting_leaves_other_faults(times: list[int], message: str) -> None:
    faulty = dataset(variables=NAMES, levels=(500,)).isel(time=times)
    with pytest.raises(ValueError, match=message):
        open_parts("waves", faulty, "memory", variables=NAMES, levels=[500], gaps="split")

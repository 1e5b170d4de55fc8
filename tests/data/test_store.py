"""Stores in any usual form read the same; what does not fit is named at open."""

import numpy as np
import pytest
import xarray as xr

from atmossl.data.catalog import load_catalog
from atmossl.data.store import open_segment
from atmossl.geometry import Box
from tests.synthetic import dataset

NAMES = ("temperature", "u_component_of_wind")


def opened(store: xr.Dataset, **changes):
    arguments = {"variables": NAMES, "levels": (300, 850)} | changes
    return open_segment("waves", store, "memory", **arguments)


@pytest.mark.parametrize(
    "change",
    [
        lambda d: d.isel(latitude=slice(None, None, -1)),
        lambda d: d.assign_coords(longitude=(d.longitude + 180) % 360 - 180).sortby("longitude"),
        lambda d: d.transpose("longitude", "level", "latitude", "time"),
        lambda d: d.isel(level=[2, 0, 1]),
        lambda d: d.rename(latitude="lat", longitude="lon", level="plev"),
        lambda d: d.assign_coords(level=100.0 * d.level.assign_attrs(units="Pa")),
    ],
)
def test_every_usual_order_reads_the_same(change) -> None:
    store = dataset()
    box = Box(1, 13, 4, 6)  # across Greenwich
    plain, other = opened(store), opened(change(store))
    values = other.read("temperature", (300, 850), 3, 5, box)
    np.testing.assert_array_equal(values, plain.read("temperature", (300, 850), 3, 5, box))
    expected = (
        store["temperature"].isel(time=slice(3, 8), latitude=slice(1, 5)).sel(level=[300, 850])
    )
    expected = expected.isel(longitude=[13, 14, 15, 0, 1, 2]).transpose("level", "time", ...)
    np.testing.assert_array_equal(values, expected)
    np.testing.assert_array_equal(values, other.loaded().read("temperature", (300, 850), 3, 5, box))


def drop_time(store: xr.Dataset) -> xr.Dataset:
    return store.isel(time=[0, 1, 2, 4, 5])


def twice(store: xr.Dataset) -> xr.Dataset:
    return store.isel(time=[0, 1, 1, 2])


def celsius(store: xr.Dataset) -> xr.Dataset:
    store["temperature"].attrs["units"] = "degC"
    return store


@pytest.mark.parametrize(
    ("change", "arguments", "message"),
    [
        (lambda d: d.drop_vars("temperature"), {}, "temperature"),
        (
            lambda d: d,
            {"variable_names": {"temperature": "tt"}},
            r"temperature \(called tt\).* missing",
        ),
        (lambda d: d, {"levels": (300, 925)}, "925"),
        (
            lambda d: d.rename(temperature="t"),
            {},
            r'temperature are missing.*dataset\.rename\(t="temperature"\)',
        ),
        (drop_time, {}, "not uniform"),
        (twice, {}, "duplicate"),
        (celsius, {}, "degC"),
        (lambda d: d.isel(time=[0]), {}, "time steps"),
        (lambda d: d.rename(latitude="y"), {}, "latitude"),
        (lambda d: d.isel(longitude=[0, 1, 2, 4]), {}, "longitude"),
        (lambda d: d.isel(longitude=[0]), {}, "8 latitudes and 1 longitudes"),
        (lambda d: d.drop_vars("latitude"), {}, r"dimensions latitude have no coordinates"),
        (
            lambda d: d.assign(temperature=d["temperature"].expand_dims("m")),
            {},
            r"further dimensions m;",
        ),
        (lambda d: d.assign_coords(level=d.level + 0.5), {}, r"has 300.5, 500.5, 850.5"),
        (
            lambda d: d.assign_coords(level=d.level * 100),
            {},
            r"85000 are no hPa.*dataset\.level\.attrs",
        ),
        (lambda d: d.isel(level=[0, 0, 2]), {}, "300, 300, 850 are there more than once"),
    ],
)
def test_a_misfit_is_named(change, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        opened(change(dataset()), **arguments)


def test_missing_values_and_unknown_times_are_named() -> None:
    store = dataset()
    store["temperature"][5, 0, 0, 0] = np.nan
    segment = opened(store)
    with pytest.raises(ValueError, match="missing values"):
        segment.read("temperature", (300,), 4, 3, segment.whole())
    with pytest.raises(ValueError, match="init_time=1999"):
        segment.find_time(np.datetime64("1999-01-01", "ns"))


def test_a_period_has_both_ends() -> None:
    record = opened(dataset())
    assert len(record.between("2001-01-02", "2001-01-03").times) == 8  # days as a whole
    assert len(record.between("2001-01-02", "2001-01-03T00").times) == 5
    assert len(record.between("2001", "2001").times) == len(record.times)
    with pytest.raises(ValueError, match="fewer than two"):
        opened(dataset()).between("2005-01-01", "")


def test_steps_of_one_place_are_shared() -> None:
    record = opened(dataset(steps=24))
    first, second = record.between("", "2001-01-04"), record.between("2001-01-03", "")
    assert first.shared_steps(second) == 8
    assert first.shared_steps(record.between("2001-01-05", "")) == 0
    assert (
        first.shared_steps(open_segment("w", dataset(), "other", variables=NAMES, levels=())) == 0
    )


ENTRY = """waves:
  description: ""
  segments: {run: {location: run.zarr}}
  splits: {train: [{segment: run}]}
  variables: {temperature: t}
  licence: ""
  citation: ""
"""


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("[{segment: run}]", "[]", r"waves.splits.train=\[\]: valid: at least one value"),
        ("segment: run}", "segment: two}", r"waves: splits.train names segment 'two'; valid: run"),
        (
            "variables:",
            "coordinates: {lattitude: y}\n  variables:",
            r"coordinates lattitude do not exist",
        ),
        (
            "licence:",
            "license:",
            "waves.licence: is missing; waves.license: unknown key; did you mean licence?",
        ),
        (
            "{location: run.zarr}",
            "{locaton: run.zarr, location: run.zarr}",
            "waves.segments.run.locaton: unknown key; did you mean location?",
        ),
        (
            "[{segment: run}]",
            "[{segment: run, strat: 2001-01-01}]",
            "waves.splits.train.0.strat: unknown key; did you mean start?",
        ),
        ("segments: {", "segments: {[", "not a catalog"),
        ("licence:", "\udcff:", "not a catalog"),  # a byte that is no text
    ],
)
def test_a_wrong_catalog_is_one_line(tmp_path, old: str, new: str, message: str) -> None:
    path = tmp_path / "catalog.yaml"
    path.write_text(ENTRY)
    assert list(load_catalog(path)) == ["waves"]
    path.write_text(ENTRY.replace(old, new, 1), errors="surrogateescape")
    with pytest.raises(ValueError, match=message) as caught:
        load_catalog(path)
    assert str(caught.value).startswith(str(path)) and "\n" not in str(caught.value)

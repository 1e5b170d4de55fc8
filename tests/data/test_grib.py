"""GRIB files: every message in its own place, every value in its own cell, or one refusal."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from atmossl.data.inputs import open_input

eccodes = pytest.importorskip("eccodes")
LATITUDE, LONGITUDE = np.arange(60.0, 29.0, -10.0), np.arange(340.0, 390.0, 10.0)
FIELD = 250.0 + LATITUDE[:, None] + (LONGITUDE - 340.0)[None, :] / 10.0  # exact in 24 bits


def message(values: np.ndarray, keys: dict[str, Any], sample: str = "regular_ll_pl_grib2") -> bytes:
    """One message; keys are set in their order, over those of a regional grid across Greenwich."""
    grid = {
        "Ni": 5,
        "Nj": 4,
        "iDirectionIncrementInDegrees": 10,
        "jDirectionIncrementInDegrees": 10,
    }
    grid |= {"latitudeOfFirstGridPointInDegrees": 60, "latitudeOfLastGridPointInDegrees": 30}
    grid |= {"longitudeOfFirstGridPointInDegrees": 340, "longitudeOfLastGridPointInDegrees": 20}
    handle = eccodes.codes_grib_new_from_samples(sample)
    try:
        general = {"dataDate": 20200101, "dataTime": 0, "bitsPerValue": 24}
        for key, value in (grid | general | keys).items():
            eccodes.codes_set(handle, key, value)
        eccodes.codes_set_values(handle, np.asarray(values, np.float64).ravel())
        return eccodes.codes_get_message(handle)
    finally:
        eccodes.codes_release(handle)


def scanned(values: np.ndarray, mode: int) -> np.ndarray:
    """A field [row column], from north and from west, in the order of a scanning mode as the WMO's
    tables define it."""
    values = values[:, ::-1] if mode & 128 else values
    values = values[::-1] if mode & 64 else values
    values = (values.T if mode & 32 else values).copy()
    if mode & 16:
        values[1::2] = values[1::2, ::-1]
    return values


def scanning(mode: int) -> dict[str, Any]:
    south_north, west_east = ((30, 60), (340, 20))
    first_last = south_north if mode & 64 else south_north[::-1]
    ends = west_east[::-1] if mode & 128 else west_east
    return {
        "scanningMode": mode,
        "latitudeOfFirstGridPointInDegrees": first_last[0],
        "latitudeOfLastGridPointInDegrees": first_last[1],
        "longitudeOfFirstGridPointInDegrees": ends[0],
        "longitudeOfLastGridPointInDegrees": ends[1],
    }


def points_of(path: Path) -> np.ndarray:
    """Latitude, longitude and value of every point as ecCodes lists them."""
    with path.open("rb") as file:
        handle = eccodes.codes_grib_new_from_file(file)
    keys = ("latitudes", "longitudes", "values")
    points = np.stack([eccodes.codes_get_array(handle, key) for key in keys], axis=1)
    eccodes.codes_release(handle)
    return points


@pytest.mark.parametrize("edition", [1, 2])
@pytest.mark.parametrize("mode", range(0, 256, 16))
def test_every_scanning_mode_gives_each_value_its_cell(tmp_path, mode: int, edition: int) -> None:
    path = tmp_path / "in.grib"
    keys = {"shortName": "t", "level": 500, **scanning(mode)}
    fields = [scanned(FIELD + day, mode) for day in range(2)]
    days = [{**keys, "dataDate": 20200101 + day} for day in range(2)]
    sample = f"regular_ll_pl_grib{edition}"
    path.write_bytes(b"".join(message(f, d, sample) for f, d in zip(fields, days, strict=True)))
    if edition == 1 and mode & 16:
        with pytest.raises(ValueError, match=rf"scanningMode={mode} has bits"):
            open_input(str(path), {}, {}, {})
        return
    found = open_input(str(path), {}, {}, {})["temperature"].isel(level=0)
    for day in range(2):
        values = found.isel(time=day).sel(latitude=LATITUDE, longitude=LONGITUDE % 360.0)
        np.testing.assert_allclose(values, FIELD + day, atol=1e-4)
    if not mode & 16:  # ecCodes lists the points of those as if all rows ran alike
        for latitude, longitude, value in points_of(path):
            cell = found.isel(time=0).sel(latitude=latitude, longitude=longitude % 360.0)
            assert abs(float(cell) - value) < 1e-4


@pytest.mark.parametrize("edition", [1, 2])
@pytest.mark.parametrize("mode", range(0, 256, 32))
def test_gaussian_grids_are_read_as_eccodes_lists_them(tmp_path, mode: int, edition: int) -> None:
    path = tmp_path / "in"
    handle = eccodes.codes_grib_new_from_samples(f"regular_gg_pl_grib{edition}")
    points = eccodes.codes_get(handle, "Ni") * eccodes.codes_get(handle, "Nj")
    for first, last, bit in (("latitudeOfFirst", "latitudeOfLast", 64),
                             ("longitudeOfFirst", "longitudeOfLast", 128)):  # fmt: skip
        names = [f"{name}GridPointInDegrees" for name in (first, last)]
        ends = [eccodes.codes_get(handle, name) for name in names]
        for name, value in zip(names, ends[::-1] if mode & bit else ends, strict=True):
            eccodes.codes_set(handle, name, value)
    eccodes.codes_set(handle, "scanningMode", mode)
    eccodes.codes_set(handle, "bitsPerValue", 24)
    eccodes.codes_set_values(handle, 200.0 + np.arange(points) / 64.0)
    path.write_bytes(eccodes.codes_get_message(handle))
    eccodes.codes_release(handle)
    if mode & 32:  # ecCodes knows Gaussian grids by rows alone, so nothing tells where points lie
        with pytest.raises(ValueError, match=rf"scanningMode={mode} on no axes"):
            open_input(str(path), {}, {}, {})
        return
    found = open_input(str(path), {}, {}, {})["temperature"].isel(level=0, time=0)
    listed = points_of(path)
    rows = np.searchsorted(found["latitude"], listed[:, 0] - 1e-6)
    columns = np.searchsorted(found["longitude"], listed[:, 1] % 360.0 - 1e-6)
    np.testing.assert_allclose(found.values[rows, columns], listed[:, 2], atol=1e-3)
    assert len(set(zip(rows, columns, strict=True))) == points


TP = {"productDefinitionTemplateNumber": 8, "shortName": "tp"}
T500 = {"shortName": "t", "level": 500}
SURFACE = "regular_ll_sfc_grib2"


def written(path: Path, *messages: bytes) -> str:
    path.write_bytes(b"".join(messages))
    return str(path)


def precipitation(step: str, value: float = 0.0, day: int = 1) -> bytes:
    return message(FIELD + value, {"dataDate": 20200100 + day, **TP, "stepRange": step}, SURFACE)


LOCAL = {"setLocalDefinition": 1, "localDefinitionNumber": 1}
CLASHES = {
    "accumulations": ([precipitation("0-12"), precipitation("6-12", 1)], "stepRange"),
    "expver": (
        [message(FIELD + n, LOCAL | {"expver": e} | T500) for n, e in enumerate(("0001", "0005"))],
        "expver",
    ),
    "expver of edition 1": (
        [
            message(FIELD + n, LOCAL | {"expver": e} | T500, "regular_ll_pl_grib1")
            for n, e in enumerate(("0001", "0005"))
        ],
        "expver",
    ),
    "analysis and forecast": (
        [message(FIELD + n, LOCAL | {"type": kind} | T500) for n, kind in enumerate(("an", "fc"))],
        "dataType",
    ),
    "kinds of levels": (
        [
            message(FIELD, T500),
            message(FIELD, {"shortName": "t", "typeOfLevel": "hybrid", "level": 5}),
        ],
        "typeOfLevel",
    ),
    "generating processes": (
        [message(FIELD + n, {**T500, "generatingProcessIdentifier": n + 1}) for n in range(2)],
        "generatingProcessIdentifier",
    ),
    "scanning modes": (
        [
            message(FIELD, {**T500, **scanning(64), "dataDate": 20200102}),
            message(FIELD, {**T500, **scanning(0)}),
        ],
        "scanningMode",
    ),
}


@pytest.mark.parametrize("case", CLASHES)
def test_messages_of_one_place_are_refused_by_the_key_that_differs(tmp_path, case: str) -> None:
    messages, key = CLASHES[case]
    place = written(tmp_path / "in.grib", *messages)
    with pytest.raises(ValueError, match=rf"in\.grib: \w+ \(\w+\).*{key}.*filters\.{key}=") as told:
        open_input(place, {}, {}, {})
    assert "\n" not in str(told.value)
    value = str(told.value).rpartition(f"filters.{key}=")[2].split(",")[0].split()[0]
    chosen = open_input(place, {}, {}, {key: value})
    assert chosen.sizes["time"] == 1 and not chosen.to_array().isnull().any()


def test_every_message_of_a_file_is_counted(tmp_path) -> None:
    lines: list[str] = []
    days = [message(FIELD + day, {**T500, "dataDate": 20200101 + day}) for day in range(3)]
    high = message(FIELD - 9, {**T500, "level": 300})
    wind = message(FIELD, {"shortName": "u", "level": 500})
    ozone = message(FIELD, {"shortName": "o3", "level": 500})
    place = written(tmp_path / "in", *days, high, days[1], wind, ozone)
    found = open_input(place, {}, {}, {}, lines.append)
    assert set(found) == {"temperature", "u_component_of_wind"}
    values = found["temperature"].sel(level=500, latitude=60.0, longitude=340.0)
    np.testing.assert_allclose(values, FIELD[0, 0] + np.arange(3), atol=1e-4)
    assert int(found["temperature"].isnull().sum()) == 2 * FIELD.size
    told = "\n".join(lines)
    assert "left out, as not known here: o3; variables.NAME=o3" in told
    assert "temperature (t) has no GRIB message for 2 of its 6 places" in told
    assert "1 GRIB messages are copies" in told
    lines.clear()
    open_input(place, {}, {}, {"shortName": ["t", "u"], "level": 500}, lines.append)
    assert lines == [
        "filters leave out 2 of 7 GRIB messages",
        "1 GRIB messages are copies of others, byte for byte, and are not read",
    ]


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (message(FIELD, T500)[:-1], "truncated or damaged"),
        (message(FIELD, T500) + message(FIELD, T500)[:90], "truncated or damaged"),
        (message(FIELD, T500) + message(FIELD, T500)[:6], "truncated or damaged"),
        (message(FIELD, T500) + b"\0RIB" + message(FIELD, T500)[4:], "byte .* damaged"),
        (message(FIELD, T500)[:100] + message(FIELD, T500), "truncated or damaged"),
        (b"\x1f\x8b" + message(FIELD, T500), "gzip: unpack"),
        (b"no data", "neither GRIB nor NetCDF"),
    ],
    ids=["empty", "end", "later", "head", "beginning", "middle", "gzip", "text"],
)
def test_damaged_and_foreign_files_are_refused(tmp_path, content: bytes, words: str) -> None:
    place = written(tmp_path / "in.grib", content)
    with pytest.raises(ValueError, match=words) as told:
        open_input(place, {}, {}, {})
    assert "in.grib" in str(told.value) and "\n" not in str(told.value)


def test_filters_and_selections_that_mean_nothing_are_refused(tmp_path) -> None:
    place = written(tmp_path / "in", message(FIELD, T500))
    for select, filters, words in (
        ({}, {"stepRange": "6-12"}, "filters.stepRange=6-12: valid: 0"),
        ({}, {"steprange": "0"}, "no message has that key"),
        ({"nubmer": 0}, {}, "select.nubmer=0: no variable has nubmer"),
        ({"step": "6h"}, {}, "leaves no data"),
    ):
        with pytest.raises(ValueError, match=words):
            open_input(place, {}, select, filters)


def minutes(count: int, edition: int) -> dict[str, Any]:
    key = "P1" if edition == 1 else "forecastTime"
    return {"indicatorOfUnitOfTimeRange": 0, key: count, "shortName": "2t"}


@pytest.mark.parametrize("edition", [1, 2])
def test_a_lead_time_in_minutes_is_chosen_and_dated(tmp_path, edition: int) -> None:
    sample = f"regular_ll_sfc_grib{edition}"
    fields = [message(FIELD + n, minutes(20 * n, edition), sample) for n in range(4)]
    place = written(tmp_path / "in", *fields)
    with pytest.raises(ValueError, match=r"4 lead times .* valid: 0h, 20min, 40min, 1h$"):
        open_input(place, {}, {}, {})
    lines: list[str] = []
    found = open_input(place, {}, {"step": "20min"}, {}, lines.append)
    assert found["time"].values.tolist() == [np.datetime64("2020-01-01T00:20", "ns").astype(int)]
    np.testing.assert_allclose(found["2m_temperature"].max(), FIELD.max() + 1, atol=1e-4)
    assert lines == ["select.step=20min leaves out 3 of 4 values of step: 0h, 20min, 40min, 1h"]


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"second": 30}, "dates with seconds"),
        ({"indicatorOfUnitOfTimeRange": 3, "forecastTime": 1}, "steps in months"),
    ],
)
def test_dates_that_would_be_rounded_are_refused(tmp_path, keys: dict, words: str) -> None:
    place = written(tmp_path / "in", message(FIELD, T500 | keys))
    with pytest.raises(ValueError, match=words):
        open_input(place, {}, {}, {})


def member(number: int, day: int = 1) -> bytes:
    keys = {"productDefinitionTemplateNumber": 1, "number": number, "dataDate": 20200100 + day}
    return message(FIELD + 10 * number + day, keys | T500)


def test_members_of_a_file_and_files_of_members_are_chosen(tmp_path) -> None:
    one_file = written(tmp_path / "in", *(member(n, day) for n in range(3) for day in (1, 2)))
    folder = tmp_path / "members"
    folder.mkdir()
    for n in range(3):
        written(folder / f"member_{n}", member(n, 1), member(n, 2))
    with pytest.raises(ValueError, match=r"dimensions number;.*number: 0, 1, 2"):
        open_input(one_file, {}, {}, {})
    with pytest.raises(ValueError, match=r"number 1 in member_1, 0 in member_0"):
        open_input(str(folder), {}, {}, {})
    for place in (one_file, str(folder)):
        lines: list[str] = []
        found = open_input(place, {}, {"number": 2}, {}, lines.append)
        highest = found["temperature"].max(["latitude", "longitude", "level"])
        np.testing.assert_allclose(highest, FIELD.max() + 20 + np.array([1, 2]), atol=1e-4)
        assert any(line.startswith("select.number=2 leaves out") for line in lines)


def test_fields_of_one_message_are_apart(tmp_path) -> None:
    """Two fields in one GRIB 2 message, as NCEP packs wind."""
    handle = eccodes.codes_grib_multi_new()
    for short, shift in (("u", 0.0), ("v", 7.0)):
        content = message(FIELD + shift, {"shortName": short, "level": 500})
        single = eccodes.codes_new_from_message(content)
        eccodes.codes_grib_multi_append(single, 4, handle)
        eccodes.codes_release(single)
    with (tmp_path / "in").open("wb") as file:
        eccodes.codes_grib_multi_write(handle, file)
    eccodes.codes_grib_multi_release(handle)
    found = open_input(str(tmp_path / "in"), {}, {}, {})
    for name, shift in (("u_component_of_wind", 0.0), ("v_component_of_wind", 7.0)):
        np.testing.assert_allclose(found[name].max(), FIELD.max() + shift, atol=1e-4)


def test_missing_values_of_a_bitmap_are_missing(tmp_path) -> None:
    field = np.full(FIELD.shape, 250.0)
    field[0] = 9999.0
    keys = {"bitmapPresent": 1, "missingValue": 9999}
    found = open_input(written(tmp_path / "in", message(field, T500 | keys)), {}, {}, {})
    assert found["temperature"].isnull().sum("longitude").values.ravel().tolist() == [0, 0, 0, 5]
    assert found["temperature"].min() == 250.0


def test_headers_are_read_once_and_before_any_value(tmp_path, monkeypatch) -> None:
    """As in a file of NCEP: a temperature on many kinds of levels, refused by its headers."""
    from cfgrib import dataset, messages

    kinds = ("isobaricInhPa", "hybrid", "sigma", "potentialVorticity", "isobaricInhPa")
    fields = [
        message(FIELD, {"shortName": "t", "typeOfLevel": kind, "level": 10 * n + 5})
        for n, kind in enumerate(kinds)
    ]
    scans, values = [], []
    scan, read = messages.FileStream.items, dataset.get_values_in_order
    monkeypatch.setattr(messages.FileStream, "items", lambda s: scans.append(s) or scan(s))
    monkeypatch.setattr(dataset, "get_values_in_order", lambda *a: values.append(a) or read(*a))
    place = written(tmp_path / "gfs.t00z.pgrb2.0p25.f006", *fields)
    with pytest.raises(
        ValueError, match=r"f006: .*typeOfLevel: .*filters.typeOfLevel=isobaricInhPa"
    ):
        open_input(place, {}, {}, {})
    assert (len(scans), len(values)) == (1, 0)
    found = open_input(place, {}, {}, {"typeOfLevel": "isobaricInhPa"})["temperature"]
    assert found["level"].values.tolist() == [5, 45] and len(scans) == 2
    np.testing.assert_allclose(found.isel(level=0).max(), FIELD.max(), atol=1e-4)
    assert len(values) > 0


def test_what_files_say_of_one_date_is_compared(tmp_path) -> None:
    """Two accumulations in two files; filters choose among files, too."""
    for name, content in (("a", precipitation("0-12")), ("b", precipitation("6-12", 1.0)),
                          ("c", precipitation("0-12", 2.0, day=2))):  # fmt: skip
        written(tmp_path / name, content)
    with pytest.raises(
        ValueError, match=r"overlap: total_precipitation of 2020-01-01T12:00 is in "
    ):
        open_input(str(tmp_path), {}, {}, {})
    lines: list[str] = []
    found = open_input(str(tmp_path), {}, {}, {"stepRange": "0-12"}, lines.append)
    highest = found["total_precipitation"].max(["latitude", "longitude"])
    np.testing.assert_allclose(highest, FIELD.max() + np.array([0, 2]), atol=1e-4)
    assert "filters match no message of a file, which is left out (in 1 files)" in lines
    with pytest.raises(ValueError, match=r"filters.stepRange=0-18: valid: "):
        open_input(str(tmp_path), {}, {}, {"stepRange": "0-18"})


def test_messages_above_8_mb_are_read(tmp_path) -> None:
    """GRIB 1 has three bytes for the length of a message; larger ones count otherwise."""
    grid = {"Ni": 3000, "Nj": 1500, "iDirectionIncrementInDegrees": 0.1}
    grid |= {"jDirectionIncrementInDegrees": 0.1, "latitudeOfFirstGridPointInDegrees": 75}
    grid |= {"latitudeOfLastGridPointInDegrees": -74.9, "longitudeOfFirstGridPointInDegrees": 0}
    grid |= {"longitudeOfLastGridPointInDegrees": 299.9, "bitsPerValue": 16}
    field = 200.0 + np.arange(1500 * 3000).reshape(1500, 3000) / 1e5
    days = [
        message(field, grid | T500 | {"dataDate": 20200101 + day}, "regular_ll_pl_grib1")
        for day in range(2)
    ]
    assert len(days[0]) > 2**23
    found = open_input(written(tmp_path / "in", *days), {}, {}, {})["temperature"]
    assert found.sizes["time"] == 2
    corners = found.isel(time=1, level=0, latitude=[-1, 0], longitude=[0, -1]).values
    np.testing.assert_allclose(corners, field[[0, -1]][:, [0, -1]], atol=1e-3)

"""AtmoRep's statistics of months, of the globe and of every grid point, in both forms of its files:
what the network is shown and what is written, against arithmetic by hand. The record crosses from
February 2004, a leap year, into March."""

import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import zarr

from atmossl.batch import PRIMARY, collate_views
from atmossl.cli import main
from atmossl.data.store import entries_of, open_records
from atmossl.data.windows import read_window
from atmossl.geometry import Box
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.training.pictures import reconstructions
from tests.inference.test_atmorep import (
    COLUMNS,
    FIELDS,
    LEVELS,
    ROWS,
    STEPS,
    STORE,
    VARIABLES,
    by_hand,
    feel_token_info,
    plain,
    train,
    write_catalog,
)
from tests.model.plain_atmorep import write_model

NAMES = ("temperature", "velocity_u")
MONTHS = 24  # 2003 and 2004
ALIKE = {"temperature": (250.0, 10.0), "velocity_u": (0.0, 1.0)}
LATS, LONS = 90 - 0.25 * np.arange(721), 0.25 * np.arange(1440)


def numbers_of_globe() -> np.ndarray:
    """[month, (mean, divisor), field, level]."""
    numbers = np.random.default_rng(0).uniform(0.5, 2, (MONTHS, 2, 2, 2)).astype(np.float32)
    for f, name in enumerate(NAMES):
        mean, divisor = ALIKE[name]
        numbers[:, 0, f] = mean + numbers[:, 0, f] * divisor
        numbers[:, 1, f] *= divisor
    return numbers


def place_factor(lat, lon):
    """What a mean or divisor of a grid point is, as a share of the globe's: plain to check."""
    return 1 + 0.1 * np.cos(np.deg2rad(lat))[:, None] * np.sin(np.deg2rad(lon))


def of_2024(folder: Path) -> None:
    """Of 15 degrees, from north to south, with latitudes counted from the pole."""
    numbers = numbers_of_globe()
    lats, lons = STORE["latitude"].values, STORE["longitude"].values
    group = zarr.open_group(folder, mode="w", zarr_format=3)
    group.attrs.update({"fields": list(NAMES), "levels": list(LEVELS)})
    group.create_array("lats", data=90.0 - lats)
    group.create_array("lons", data=lons)
    times = np.arange("2003-03-05", "2003-03-07", dtype="M8[D]").astype("M8[ns]")
    group.create_array("time", data=times.astype(np.int64))
    group.create_array("normalization/global_norm", data=numbers)
    local = numbers[..., None, None] * place_factor(lats, lons).astype(np.float32)
    group.create_array("normalization/norm", data=local)


def of_2023(folder: Path, months: range = range(MONTHS)) -> None:
    """Of 0.25 degrees, of which the store has few points; grid points of temperature alone."""
    numbers, folder = numbers_of_globe(), folder / "normalization"
    folder.mkdir(parents=True)
    for f, name in enumerate(NAMES):
        for v, level in enumerate(LEVELS):
            rows = [[2003 + n // 12, n % 12 + 1, *numbers[n, :, f, v]] for n in range(MONTHS)]
            file = folder / f"global_normalization_mean_var_{name}_ml{level}.bin"
            np.array(rows, np.float32).tofile(file)
    factor = place_factor(LATS, LONS)[..., None]
    for n in months:
        grid = (numbers[n, :, 0, LEVELS.index(137)] * factor).astype(np.float32)
        year, month = divmod(n, 12)
        name = f"normalization_mean_var_temperature_y{2003 + year}_m{month + 1:02d}_ml137.bin"
        grid.tofile(folder / name)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose temperature was normalised by grid point and whose wind was not."""
    folder = tmp_path_factory.mktemp("normalised")
    write_catalog(folder)
    fields = [FIELDS[0], [*FIELDS[1], "local"]]
    write_model(folder / "model", fields, ["velocity_u", "temperature"])
    feel_token_info(folder / "model" / "AtmoRep_idtest.mod")
    of_2024(folder / "of_2024")
    of_2023(folder / "of_2023", range(13, 15))  # February and March 2004
    return folder


def run(folder: Path, output: Path, norms: Path, *more: str) -> int:
    return main(
        ["import", "atmorep", str(folder / "model"), f"output={output}", "data=waves",
         f"data.catalog={folder / 'catalog.yaml'}", f"normalisation={norms}", *more]
    )  # fmt: skip


def expected_units(name: str, window: xr.DataArray, months: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and divisor [level time lat lon] of a window's points."""
    numbers = numbers_of_globe().astype(np.float64)
    f = NAMES.index(name)
    tables = []
    for time in pd.DatetimeIndex(window["time"].values):
        rows = [12 * (time.year - 2003) + time.month - 1]
        if months == "climatology":
            rows = [time.month - 1, 12 + time.month - 1]
        tables.append(numbers[rows][:, :, f].mean(axis=0))
    levels = [LEVELS.index(level) for level in window["level"].values]
    table = np.stack(tables)[:, :, levels]  # [time 2 level]
    table = table.transpose(1, 2, 0)[..., None, None]
    if name == "temperature":
        table = table * place_factor(window["latitude"].values, window["longitude"].values)
    shape = (2, *window.transpose("level", "time", "latitude", "longitude").shape)
    mean, divisor = np.broadcast_to(table, shape)
    return mean, divisor


@pytest.mark.parametrize(
    ("form", "months"),
    [("of_2024", "own"), ("of_2024", "climatology"), ("of_2023", "own")],
)
def test_predictions_are_those_of_the_plain_network_in_its_own_units(
    folder: Path, tmp_path: Path, form: str, months: str
) -> None:
    checkpoint, output, init = tmp_path / "own.ckpt", tmp_path / "out.zarr", "2004-02-29T23"
    assert run(folder, checkpoint, folder / form, f"normalisation.months={months}") == 0
    arguments = ["task=forecast", "task.lead_time=2h", f"init_time={init}", "overlap=0.0",
                 "tilings=1", f"checkpoint={checkpoint}", f"output={output}", "accelerator=cpu",
                 f"data.catalog={folder / 'catalog.yaml'}"]  # fmt: skip
    assert main(["predict", *arguments]) == 0
    predicted = xr.open_zarr(output, decode_timedelta=True).isel(init_time=0)
    start = STORE.get_index("time").get_loc(pd.Timestamp(init)) - 3
    store = STORE.isel(time=slice(start, start + STEPS))
    for north, west in [(0, 0), (6, 12)]:
        cells = {"latitude": slice(north, north + ROWS), "longitude": slice(west, west + COLUMNS)}
        windows, units = {}, {}
        for name, _, levels, *_ in FIELDS:
            window = store[VARIABLES[name]].sel(level=list(levels)).isel(cells)
            window = window.transpose("level", "time", "latitude", "longitude")
            units[name] = expected_units(name, window, months)
            windows[name] = (window - units[name][0]) / units[name][1]
        for name, members in by_hand(plain(folder), windows, 2).items():
            mean, divisor = (values[:, 4:] for values in units[name])
            window = windows[name]
            own = predicted[VARIABLES[name]].sel(
                latitude=window["latitude"], longitude=window["longitude"], level=window["level"]
            )
            own = own.transpose("member", "level", "lead_time", "latitude", "longitude").values
            own = np.sort((own - mean) / divisor, 0)
            np.testing.assert_allclose(own, np.sort(members[:, :, 4:], 0), atol=4e-5, rtol=0)


def test_climatology_has_no_month_of_its_own_and_serves_every_year(
    folder: Path, tmp_path: Path
) -> None:
    assert run(folder, tmp_path / "a.ckpt", folder / "of_2024") == 0  # the default
    trained = load_checkpoint(str(tmp_path / "a.ckpt"))
    normals = trained.normaliser.statistics[PRIMARY].normals
    assert {key: value.months for key, value in normals.items()} == {
        "temperature": tuple(range(12)), "u_component_of_wind": tuple(range(12)),
    }  # fmt: skip
    again = tmp_path / "again"  # by a folder for a hub, and as a mean with itself
    assert main(["export", f"checkpoint={tmp_path / 'a.ckpt'}", f"hub={again}"]) == 0
    both = f"checkpoint={tmp_path / 'a.ckpt'},{again}"
    assert main(["export", both, f"output={tmp_path / 'b.ckpt'}"]) == 0
    entries = entries_of(trained.specs, "waves", folder / "catalog.yaml")
    (segment,) = open_records(trained.specs, entries, "test")[PRIMARY]
    for other in (str(again), str(tmp_path / "b.ckpt")):
        for one, two in zip(
            read_window(segment, trained.specs, trained.normaliser, 3, 6, Box(0, 0, 6, 12)),
            read_window(
                segment, trained.specs, load_checkpoint(other).normaliser, 3, 6, Box(0, 0, 6, 12)
            ),
            strict=True,
        ):
            assert one.fields.equal(two.fields)


def test_training_goes_on_in_the_units_of_the_imported_network(
    folder: Path, tmp_path: Path
) -> None:
    assert run(folder, folder / "atmorep.ckpt", folder / "of_2024") == 0
    assert train(folder, tmp_path / "run") == 0
    before = load_checkpoint(str(folder / "atmorep.ckpt")).normaliser.statistics[PRIMARY]
    after = load_checkpoint(str(tmp_path / "run" / "checkpoints" / "last.ckpt"))
    normals = after.normaliser.statistics[PRIMARY].normals
    assert normals["temperature"].mean.equal(before.normals["temperature"].mean)
    (folder / "atmorep.ckpt").unlink()


def test_pictures_of_training_are_in_the_units_of_the_store(folder: Path, tmp_path: Path) -> None:
    assert run(folder, tmp_path / "a.ckpt", folder / "of_2024", "normalisation.months=own") == 0
    trained = load_checkpoint(str(tmp_path / "a.ckpt"))
    entries = entries_of(trained.specs, "waves", folder / "catalog.yaml")
    (segment,) = open_records(trained.specs, entries, "test")[PRIMARY]
    windows = read_window(segment, trained.specs, trained.normaliser, 3, 6, Box(6, 0, 6, 12))
    view = make_view(windows, RandomMasking((0.5, 0.5)), np.random.default_rng(0))
    batch = collate_views([(view,)], [0]).views[0]
    with torch.no_grad():
        prediction = trained.model(batch)
    for stream, predicted in zip(batch.streams, prediction.streams, strict=True):
        (row,) = reconstructions(stream, predicted, trained.normaliser)
        date = np.datetime64(row.date.removesuffix(" UTC"))
        stored = STORE[row.variable].sel(
            time=date, latitude=row.lat, longitude=row.lon, level=int(row.place.split()[0])
        )
        np.testing.assert_allclose(row.truth, stored.values, atol=1e-4)


def test_date_without_statistics_of_its_month_is_refused(
    folder: Path, tmp_path: Path, capsys
) -> None:
    of_2023(tmp_path / "norms", range(13, 14))  # no March
    checkpoint = tmp_path / "own.ckpt"
    assert run(folder, checkpoint, tmp_path / "norms", "normalisation.months=own") == 0
    arguments = ["task=forecast", "task.lead_time=2h", "init_time=2004-03-01T02",
                 f"checkpoint={checkpoint}", f"output={tmp_path / 'out.zarr'}", "accelerator=cpu",
                 f"data.catalog={folder / 'catalog.yaml'}"]  # fmt: skip
    capsys.readouterr()
    assert main(["predict", *arguments]) == 2
    said = capsys.readouterr().err
    assert "none of 2004-03" in said and "normalisation.months=climatology" in said


def rows(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda f: shutil.rmtree(f), "no such folder"),
        (lambda f: f.joinpath("global_normalization_mean_var_velocity_u_ml123.bin").unlink(),
         r"velocity_u\*123\.bin of statistics of the globe"),
        (lambda f: next(f.glob("*_y2004*")).unlink(), r"temperature\*137\.bin of .*grid point"),
        (lambda f: next(f.glob("global*u_ml123*")).write_bytes(b"1234" * 5), "5 numbers"),
        (lambda f: rows(*[40] * 8).tofile(next(f.glob("global*u_ml123*"))), "40 is no month"),
        (lambda f: rows(2000, 1, 3, 1).tofile(next(f.glob("global*u_ml123*"))),
         "no month that all"),
        (lambda f: [rows(2003, 1, 3, 0).tofile(file) for file in f.glob("global*u_ml*")],
         "velocity_u: .*positive divisors"),
        (lambda f: next(f.glob("*_y2004*")).write_bytes(b"1234"), r"no \(721, 1440, 2\) numbers"),
    ],
)  # fmt: skip
def test_normalisation_that_does_not_fit_is_named(
    folder: Path, tmp_path: Path, capsys, spoil, words: str
) -> None:
    of_2023(tmp_path / "norms", range(13, 14))
    spoil(tmp_path / "norms" / "normalization")
    norms = tmp_path / "norms"
    norms = norms if (norms / "normalization").exists() else norms / "normalization"
    assert run(folder, tmp_path / "own.ckpt", norms) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(words, said) and "\n" not in said, said
    assert not (tmp_path / "own.ckpt").exists()


@pytest.mark.parametrize("more", [["normalisation.months=mine"], ["normalisation.months=own"]])
def test_odd_choice_of_months_is_refused(tmp_path: Path, capsys, more: list[str]) -> None:
    given = ["normalisation=x"] if more[0].endswith("mine") else []
    line = ["import", "atmorep", "m", f"output={tmp_path / 'a.ckpt'}", "data=waves", *given, *more]
    assert main(line) == 2
    assert "valid: climatology or own, beside normalisation=FOLDER" in capsys.readouterr().err

"""A model of AtmoRep's form from its files to predictions of `atmossl`, against the plain network
run by hand on the same store."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

import atmossl
from atmossl.cli import main
from atmossl.inference.checkpoint import load_checkpoint
from tests.model.plain_atmorep import PlainAtmoRep, field, write_model
from tests.synthetic import catalog, dataset

LEVELS = (123, 137)
FIELDS = [
    field("velocity_u", 20, ("temperature",), LEVELS, (3, 2, 4), (2, 3, 3)),
    field("temperature", 12, ("velocity_u",), (137,), (3, 3, 2), (2, 2, 6)),
]
VARIABLES = {"velocity_u": "u_component_of_wind", "temperature": "temperature"}
ROWS, COLUMNS, STEPS = 6, 12, 6  # of a window; the store has 12 x 24 cells
# the 29th of February 2004, day 59 from 0, is among the dates
STORE = dataset(
    levels=LEVELS, num_lat=12, num_lon=24, steps=30, start="2004-02-29T18", step_hours=1
).isel(latitude=slice(None, None, -1))
STORE["temperature"] = 250 + 10 * (STORE["temperature"] - 250)  # float32 of 250 K rounds by 2e-5 K
STORE["level"].attrs = {"standard_name": "model_level_number", "long_name": "model level"}


def write_catalog(folder: Path, store: xr.Dataset = STORE, levels_are: str = "model") -> Path:
    path = catalog(folder, train=store, validation=store, test=store)
    lines = path.read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("  levels:"))
    lines.insert(place, f"  levels_are: {levels_are}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder `model`, a catalog with `waves`, and the imported `atmorep.ckpt`."""
    folder = tmp_path_factory.mktemp("atmorep")
    write_catalog(folder)
    write_model(folder / "model", FIELDS, ["velocity_u", "temperature"])
    feel_token_info(folder / "model" / "AtmoRep_idtest.mod")
    assert run(folder, folder / "atmorep.ckpt") == 0
    return folder


def feel_token_info(file: Path) -> None:
    """Scale the weights of what describes a token, so that every entry changes the prediction: a
    raw year would leave nothing of the others."""
    tensors = torch.load(file, weights_only=True)
    scales = torch.tensor([1e-3, 0.05, 0.1, 0.02, 0.02, 0.01, 0.02, 0.1])
    for name in tensors:
        if name.startswith("embeds_token_info") and name.endswith("weight"):
            tensors[name] *= scales
    torch.save(tensors, file)


def run(folder: Path, output: Path, model: str = "model") -> int:
    return main(
        ["import", "atmorep", str(folder / model), f"output={output}", "data=waves",
         f"catalog={folder / 'catalog.yaml'}"]
    )  # fmt: skip


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={folder / 'atmorep.ckpt'}", f"catalog={folder / 'catalog.yaml'}",
        "accelerator=cpu", f"output={output}", *more,
    ]  # fmt: skip


def plain(folder: Path) -> PlainAtmoRep:
    file = folder / "model" / "AtmoRep_idtest.mod"
    tensors = torch.load(file, weights_only=True)
    return PlainAtmoRep(folder / "model", {k: v.double().numpy() for k, v in tensors.items()})


def by_hand(network: PlainAtmoRep, windows: dict[str, xr.DataArray], hidden_step: int):
    """Members [member level time lat lon] of every field in a window of normalised values from
    north to south, one step of tokens hidden."""
    values, info = {}, {}
    for name, _, levels, (nt, nlat, nlon), (time, lat, lon), *_ in network.s["fields"]:
        window = windows[name]
        cut = window.values.reshape(len(levels), nt, time, nlat, lat, nlon, lon)
        values[name] = cut.transpose(0, 1, 3, 5, 2, 4, 6).copy()
        values[name][:, hidden_step] = 0.0
        info[name] = np.zeros((len(levels), nt * nlat * nlon, 8))
        for v, level in enumerate(levels):
            for token in range(nt * nlat * nlon):
                t, row, column = np.unravel_index(token, (nt, nlat, nlon))
                date = pd.Timestamp(window["time"].values[t * time + time - 1])
                info[name][v, token] = [
                    date.year, date.day_of_year - 1, date.hour, level,
                    90 - window["latitude"].values[row * lat + lat // 2],
                    window["longitude"].values[column * lon + lon // 2],
                    level, 15.0,
                ]  # fmt: skip
    found = {}
    for (name, members), entry in zip(
        network(values, info).items(), network.s["fields"], strict=True
    ):
        _, _, levels, (nt, nlat, nlon), (time, lat, lon), *_ = entry
        cut = members.reshape(len(levels), nt, nlat, nlon, -1, time, lat, lon)
        together = cut.transpose(4, 0, 1, 5, 2, 6, 3, 7)
        found[name] = together.reshape(-1, len(levels), nt * time, nlat * lat, nlon * lon)
    return found


@pytest.mark.parametrize(
    ("task", "time", "first_step", "hidden_step"),
    [
        (["task=temporal_interpolation", "task.hidden_time=2h"], "2004-03-01T01", -2, 1),
        (["task=forecast", "task.lead_time=2h"], "2004-03-01T01", -3, 2),
    ],
    ids=["interpolation", "forecast"],
)
def test_predictions_are_those_of_the_plain_network(
    folder: Path, tmp_path: Path, task: list[str], time: str, first_step: int, hidden_step: int
) -> None:
    output = tmp_path / "out.zarr"
    more = [*task, f"init_time={time}", "overlap=0.0", "tilings=1"]
    assert main(["predict", *arguments(folder, output, *more)]) == 0
    predicted = xr.open_zarr(output, decode_timedelta=True)
    assert predicted["level"].attrs["standard_name"] == "model_level_number"
    if "lead_time" in predicted.dims:
        predicted = predicted.isel(init_time=0).drop_vars("init_time").rename(lead_time="time")
    statistics = load_checkpoint(str(folder / "atmorep.ckpt")).normaliser.statistics
    start = STORE.get_index("time").get_loc(pd.Timestamp(time)) + first_step
    hidden = slice(2 * hidden_step, 2 * hidden_step + 2)
    store = STORE.isel(time=slice(start, start + STEPS))
    for north, west in [(0, 0), (6, 0), (0, 12), (6, 12)]:
        cells = {
            "latitude": slice(north, north + ROWS), "longitude": slice(west, west + COLUMNS),
        }  # fmt: skip
        windows, scales = {}, {}
        for name, _, levels, *_ in FIELDS:
            variable = VARIABLES[name]
            row = statistics.variables.index(variable)
            columns = [statistics.levels.index(level) for level in levels]
            mean, std = (
                getattr(statistics, kind)[row, columns][:, None, None, None]
                for kind in ("mean", "std")
            )
            window = store[variable].sel(level=list(levels)).isel(cells)
            windows[name] = (window.transpose("level", ...) - mean) / std
            scales[name] = mean, std
        for name, members in by_hand(plain(folder), windows, hidden_step).items():
            mean, std = scales[name]
            lat, lon = windows[name]["latitude"], windows[name]["longitude"]
            found = predicted[VARIABLES[name]].sel(
                latitude=lat, longitude=lon, level=windows[name]["level"]
            )
            found = found.transpose("member", "level", "time", "latitude", "longitude").values
            assert found.std() > 0.01 * std.mean()
            # `atmossl predict` orders the members of every token's cells alike
            own, expected = np.sort((found - mean) / std, 0), np.sort(members[:, :, hidden], 0)
            np.testing.assert_allclose(own, expected, atol=2e-5, rtol=0)

"""Forecasts of others that do not fit, and training records on several grids."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import xarray as xr

from benchmarks.hostile.inputs.rows import Row
from benchmarks.hostile.stores import dataset, training, write_catalog

BIAS_K = 2.0
LEADS = np.array([6, 12])


def forecasts(bias: float = BIAS_K) -> xr.Dataset:
    """The truth of the test period at its later dates, plus a bias: its RMSE is known."""
    truth = dataset(("temperature",), start="2001-05-01")
    inits = truth["time"].values[2:16]
    by_lead = []
    for hours in LEADS:
        at = truth.sel(time=inits + np.timedelta64(int(hours), "h"))
        by_lead.append(at.assign_coords(time=inits).rename(time="init_time") + bias)
    joined = xr.concat(by_lead, "lead_time")
    leads = LEADS * np.timedelta64(3600, "s").astype("m8[ns]")
    joined["temperature"].attrs["units"] = "K"
    return joined.assign_coords(lead_time=leads)


def written(change: Callable[[xr.Dataset], xr.Dataset]) -> Callable[[Path], None]:
    def make(folder: Path) -> None:
        change(forecasts()).to_zarr(folder / "theirs.zarr", consolidated=False)

    return make


def rmse_is(expected: float) -> Callable[[Path], str]:
    """That the root mean square error in the report is a known number."""

    def check(folder: Path) -> str:
        import pandas as pd

        table = pd.read_csv(folder / "report" / "scores.csv").query("score == 'rmse'")
        own = table[table["source"].str.contains("theirs") | (table["source"] == "model")]
        values = np.asarray(own["value"])
        if not len(values):
            return f"no RMSE of it among {sorted(set(table['source']))}"
        return "" if np.allclose(values, expected, rtol=1e-3) else f"RMSE {values[:4]}"

    return check


def _evaluate(*more: str) -> tuple[str, ...]:
    return (
        "evaluate", "checkpoint=fix/tiny.ckpt", "data=waves", "data.catalog=fix/catalog.yaml",
        "forecasts=[theirs.zarr]", "output=report", "bootstrap=5", "regions=[]", *more,
    )  # fmt: skip


def members(name: str) -> Callable[[xr.Dataset], xr.Dataset]:
    return lambda store: xr.concat([store - 1, store + 1], name)


def shifted(store: xr.Dataset) -> xr.Dataset:
    return store.assign_coords(longitude=store.longitude + 11.25)


def celsius(store: xr.Dataset) -> xr.Dataset:
    store["temperature"] = store["temperature"] - 273.15
    store["temperature"].attrs["units"] = "degC"
    return store


def in_units(units: str) -> Callable[[xr.Dataset], xr.Dataset]:
    def change(store: xr.Dataset) -> xr.Dataset:
        store["temperature"].attrs["units"] = units
        return store

    return change


def empty(store: xr.Dataset) -> xr.Dataset:
    store["temperature"].values[:] = np.nan
    return store


def permuted(store: xr.Dataset) -> xr.Dataset:
    dims = ("longitude", "level", "lead_time", "latitude", "init_time")
    return store.transpose(*dims).sortby("latitude", ascending=False)


def rows() -> list[Row]:
    right, refuse = ("right", ()), "refused"
    late = np.timedelta64(365, "D")
    table = [
        ("as they should be", *right, lambda store: store, rmse_is(BIAS_K)),
        ("with other orders of axes", *right, permuted, rmse_is(BIAS_K)),
        ("in degC", *right, celsius, rmse_is(BIAS_K)),
        ("of a dimension ensemble_member", refuse, ("ensemble_member",),
         members("ensemble_member"), None),
        ("of a dimension ens", refuse, ("ens",), members("ens"), None),
        ("of members called number", *right, members("number"), rmse_is(BIAS_K)),
        ("in furlongs", refuse, ("furlong",), in_units("furlong"), None),
        ("without any value", "refused|told", ("value|missing",), empty, None),
        ("of another year", refuse, ("init|date|time|common|case",),
         lambda store: store.assign_coords(init_time=store.init_time + late), None),
        ("of another variable", refuse, ("variable|common|ozone",),
         lambda store: store.rename(temperature="ozone"), None),
        ("without latitudes", refuse, ("latitude",),
         lambda store: store.isel(latitude=0, drop=True), None),
        ("of other levels", refuse, ("level",),
         lambda store: store.assign_coords(level=[100, 200]), None),
        ("half a cell away", "right|refused", ("longitude",), shifted, None),
        ("without lead times", refuse, ("lead_time|prediction_timedelta",),
         lambda store: store.isel(lead_time=0, drop=True), None),
        ("with lead times of no unit", "refused|right", ("lead_time",),
         lambda store: store.assign_coords(lead_time=LEADS), None),
    ]  # fmt: skip
    rows = [
        Row(f"forecasts {name}", expect, _evaluate(), words, written(change), check)
        for name, expect, words, change, check in table
    ]
    return [*rows, *_records()]


def _records() -> list[Row]:
    """Runs on two grids of one size are told apart before anything is worked out."""

    def other(**axes: np.ndarray) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            dataset().to_zarr(folder / "train.zarr", consolidated=False)
            later = dataset(start="2001-03-01").assign_coords(axes)
            later.to_zarr(folder / "validation.zarr", consolidated=False)
            places = {name: str(folder / f"{name}.zarr") for name in ("train", "validation")}
            places["test"] = places["validation"]
            names = {name: name for name in ("temperature", "u_component_of_wind")}
            splits = {"train": [{"segment": "train"}, {"segment": "validation"}],
                      "validation": [{"segment": "validation"}],
                      "test": [{"segment": "test"}]}  # fmt: skip
            write_catalog(folder, places, names, (500, 850), splits=splits)

        return make

    own = dataset()
    moved = {"longitude": own.longitude.values + 11.25}
    uneven = {"latitude": own.latitude.values * 0.99}
    train = tuple(training(Path(), "run"))
    return [
        Row("training runs whose longitudes differ", "refused", train, ("longitude",),
            other(**moved)),
        Row("training runs whose latitudes differ", "refused", train, ("latitude",),
            other(**uneven)),
        Row("training runs of different steps", "refused", train, ("step",), _other_steps),
    ]  # fmt: skip


def _other_steps(folder: Path) -> None:
    dataset().to_zarr(folder / "train.zarr", consolidated=False)
    dataset(start="2001-03-01", step_minutes=720).to_zarr(folder / "test.zarr", consolidated=False)
    places = {"train": str(folder / "train.zarr"), "test": str(folder / "test.zarr")}
    names = {name: name for name in ("temperature", "u_component_of_wind")}
    splits = {"train": [{"segment": "train"}, {"segment": "test"}],
              "validation": [{"segment": "test"}], "test": [{"segment": "test"}]}  # fmt: skip
    write_catalog(folder, places, names, (500, 850), splits=splits)

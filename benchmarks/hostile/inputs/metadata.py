"""Files whose metadata contradict what their names promise, on every way in.

Each is refused, naming what the file says, whether it is ingested, read through a catalog or given
to Python. Files whose metadata say what the names promise go in, with the same values.
"""

import sys
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import xarray as xr

from benchmarks.hostile.inputs.rows import Row
from benchmarks.hostile.stores import dataset, stream, training, write_catalog

Change = Callable[[xr.Dataset], xr.Dataset]


@dataclass(frozen=True)
class Contradiction:
    """variable: what the store is said to hold. change: what the file says instead. ways: in."""

    name: str
    variable: str
    words: str
    change: Change
    expect: str = "refused"
    levels: tuple[int, ...] = (500, 850)
    ways: tuple[str, ...] = ("ingest", "catalog", "python")


def says(**attributes: object) -> Change:
    """The variable's attributes; None removes one."""

    def change(store: xr.Dataset) -> xr.Dataset:
        (name,) = store.data_vars
        for key, value in attributes.items():
            store[name].attrs.pop(key, None)
            if value is not None:
                store[name].attrs[key] = value
        return store

    return change


def axis_says(axis: str, /, **attributes: object) -> Change:
    def change(store: xr.Dataset) -> xr.Dataset:
        store[axis].attrs.update(attributes)
        return store

    return change


def beside(name: str, value: object, /, **attributes: object) -> Change:
    """A scalar coordinate."""
    return lambda store: store.assign_coords({name: ((), value, attributes)})


def rotated(store: xr.Dataset) -> xr.Dataset:
    store["pole"] = ((), 0, {"grid_mapping_name": "rotated_latitude_longitude",
                             "grid_north_pole_latitude": 39.25,
                             "grid_north_pole_longitude": -162.0})  # fmt: skip
    for name in store.data_vars:
        if name != "pole":
            store[name].attrs["grid_mapping"] = "pole"
    return store


SURFACE = ()
OF_CHECKPOINT = ("temperature", "u_component_of_wind")
TABLE = [
    Contradiction("geopotential height", "geopotential", "geopotential_height",
                  says(standard_name="geopotential_height", units=None)),
    Contradiction("geopotential height by long_name", "geopotential", "height",
                  says(long_name="Geopotential height", units=None), "refused|told"),
    Contradiction("geopotential in gpm", "geopotential", "gpm|geopotential",
                  says(units="gpm"), "refused|told"),
    Contradiction("potential temperature", "temperature", "potential",
                  says(standard_name="air_potential_temperature")),
    Contradiction("dew point", "temperature", "dew_point",
                  says(standard_name="dew_point_temperature")),
    Contradiction("anomaly", "temperature", "anomaly",
                  says(standard_name="air_temperature_anomaly")),
    Contradiction("tendency", "temperature", "K s-1|tendency",
                  says(standard_name="tendency_of_air_temperature", units="K s-1")),
    Contradiction("relative humidity", "specific_humidity", "relative_humidity",
                  says(standard_name="relative_humidity", units="1")),
    Contradiction("mixing ratio", "specific_humidity", "mixing_ratio",
                  says(standard_name="humidity_mixing_ratio")),
    Contradiction("the other wind", "u_component_of_wind", "northward_wind",
                  says(standard_name="northward_wind")),
    Contradiction("wind along the grid", "u_component_of_wind", "x_wind",
                  says(standard_name="x_wind")),
    Contradiction("speed in knots", "u_component_of_wind", "knots|kt|units",
                  says(units="kt")),
    Contradiction("a maximum in time", "2m_temperature", "cell_methods|time: maximum",
                  says(cell_methods="time: maximum"), "refused|told", SURFACE),
    Contradiction("a standard deviation", "temperature", "standard_deviation",
                  says(cell_methods="time: standard_deviation"), "refused|told"),
    Contradiction("another height", "2m_temperature", "height",
                  beside("height", 100.0, units="m", standard_name="height"), levels=SURFACE),
    Contradiction("rotated grid", "temperature", "rotated|grid_mapping", rotated),
    Contradiction("rotated latitude", "temperature", "grid_latitude",
                  axis_says("latitude", standard_name="grid_latitude")),
    Contradiction("projection coordinate", "temperature", "projection_x_coordinate|km",
                  axis_says("longitude", standard_name="projection_x_coordinate", units="km")),
    Contradiction("latitude in radians", "temperature", "rad",
                  axis_says("latitude", units="radian")),
    Contradiction("height as level", "temperature", "height|units",
                  axis_says("level", standard_name="height", units="m", positive="up")),
    Contradiction("model levels", "temperature", "hybrid|model",
                  axis_says("level", units="1",
                            standard_name="atmosphere_hybrid_sigma_pressure_coordinate")),
    Contradiction("isentropic levels", "temperature", "potential|K|theta",
                  axis_says("level", standard_name="air_potential_temperature", units="K")),
    Contradiction("depth as level", "temperature", "depth",
                  axis_says("level", standard_name="depth", units="m", positive="down")),
    Contradiction("start of forecasts as time", "temperature", "forecast_reference_time",
                  axis_says("time", standard_name="forecast_reference_time")),
]  # fmt: skip
AGREEING = [
    Contradiction("names of CF", "temperature", "",
                  says(standard_name="air_temperature", long_name="Temperature"), "right"),
    Contradiction("axes of CF", "geopotential", "",
                  axis_says("level", standard_name="air_pressure", units="hPa", positive="down",
                            axis="Z"), "right"),
    Contradiction("height of 2 m", "2m_temperature", "",
                  beside("height", 2.0, units="m", standard_name="height"), "right", SURFACE),
    Contradiction("points in time", "temperature", "",
                  says(cell_methods="time: point"), "right"),
    Contradiction("a plain grid mapping", "u_component_of_wind", "",
                  says(standard_name="eastward_wind"), "right"),
]  # fmt: skip


def rows() -> list[Row]:
    return [
        WAYS[way](item)
        for item in (*TABLE, *AGREEING)
        for way in item.ways
        if way != "python" or item.variable in OF_CHECKPOINT
    ]


def write(item: Contradiction) -> Callable[[Path], None]:
    """`in.nc`, a catalog that calls it `waves`, and the true values in `truth.npy`."""

    def make(folder: Path) -> None:
        store = dataset((item.variable,), levels=item.levels)
        np.save(folder / "truth.npy", store[item.variable].values)
        item.change(store).to_netcdf(folder / "in.nc")
        names = {item.variable: item.variable}
        write_catalog(folder, {"all": str(folder / "in.nc")}, names, item.levels)

    return make


def _ingest(item: Contradiction) -> Row:
    arguments = ("data", "ingest", "input=in.nc", "output=out.zarr")

    def check(folder: Path) -> str:
        values = xr.open_zarr(folder / "out.zarr", consolidated=False)[item.variable].values
        return same(values, np.load(folder / "truth.npy"))

    return Row(f"{item.name}, ingest", item.expect, arguments, _words(item), write(item), check)


def _catalog(item: Contradiction) -> Row:
    arguments = stats(Path(), item.variable, item.levels)
    return Row(f"{item.name}, catalog", item.expect, arguments, _words(item), write(item))


def _python(item: Contradiction) -> Row:
    """The store is the context of a prediction with a checkpoint of the shared fixtures, so this
    way knows temperature and eastward wind alone."""

    def program(arguments: Sequence[str]) -> int:
        import atmossl

        del arguments
        opened = xr.open_dataset("in.nc")
        other = dataset(tuple({"temperature", "u_component_of_wind"} - set(opened.data_vars)))
        opened = opened.assign({name: other[name].variable for name in other.data_vars})
        return in_python(lambda: atmossl.load("fix/tiny.ckpt").predict(
            "forecast", opened, "2001-01-03T00", lead_time="6h"))  # fmt: skip

    return Row(f"{item.name}, python", item.expect, (), _words(item), write(item), program=program)


def in_python(work: Callable[[], object]) -> int:
    """Exit code and one line for what Python raises, as the command line has them."""
    warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
    try:
        work()
    except ValueError as error:
        print(f"python: {error}", file=sys.stderr)
        return 2
    return 0


def stats(folder: Path, variable: str, levels: Sequence[int]) -> tuple[str, ...]:
    """Statistics of what `catalog.yaml` names, as `train` computes them, with a cache beside."""
    streams = [stream("air", (variable,), levels)]
    given = training(folder, "run", "--force", streams=streams)[1:]
    return ("data", "stats", *given)


def same(values: np.ndarray, truth: np.ndarray, tolerance: float = 0.0) -> str:
    """What is wrong with values, empty if they are within a tolerance of the truth."""
    if values.shape != truth.shape:
        return f"shape {values.shape} instead of {truth.shape}"
    wrong = ~np.isclose(values, truth, rtol=0, atol=tolerance, equal_nan=True)
    if not wrong.any():
        return ""
    worst = np.nanmax(np.abs(values.astype(float) - truth))
    return f"{wrong.mean():.0%} of the values are off, by up to {worst:.4g}"


def _words(item: Contradiction) -> tuple[str, ...]:
    return (item.words,) if item.words else ()


WAYS = {"ingest": _ingest, "catalog": _catalog, "python": _python}

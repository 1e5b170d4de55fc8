"""Values that no atmosphere has, chunks that are not there, codecs, regions and units."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from benchmarks.hostile.inputs.metadata import in_python, same, stats
from benchmarks.hostile.inputs.rows import Place, Row
from benchmarks.hostile.processes import Ended
from benchmarks.hostile.stores import dataset, evaluating, predicting, write_catalog

FIXTURES = Path("fix")
NAMES = {name: name for name in ("temperature", "u_component_of_wind")}
_DATES = "init_time=2001-05-03T00"
_LIMITS = ("limit|physical|absent|missing|chunk|fill|units",)


def spoilt(change: Callable[[xr.Dataset], xr.Dataset], **options: Any) -> Callable[[Path], None]:
    """A maker of `test.zarr` with wrong values, and of a catalog of it and the sound ones."""

    def make(folder: Path) -> None:
        store = change(dataset(start="2001-05-01"))
        store.to_zarr(folder / "test.zarr", consolidated=False, **options)
        sound = {name: f"{folder}/fix/{name}.zarr" for name in ("train", "validation")}
        sound["test"] = str(folder / "test.zarr")
        write_catalog(folder, sound, NAMES, (500, 850))

    return make


def everywhere(store: xr.Dataset, value: float) -> xr.Dataset:
    """A wrong value in a box of every field of temperature."""
    store["temperature"].values[:, :, 2:4, 3:6] = value
    return store


def celsius(store: xr.Dataset) -> xr.Dataset:
    store["temperature"].values[:] -= 273.15
    return store


def infinite(store: xr.Dataset) -> xr.Dataset:
    return everywhere(store, np.inf)


def absent(folder: Path) -> None:
    """A chunk of temperature of the test period is not there, and reads as 0."""
    store = dataset(start="2001-05-01")
    encoding = {"temperature": {"chunks": (4, 2, 8, 16)}}
    store.to_zarr(folder / "test.zarr", consolidated=False, encoding=encoding, zarr_format=2)
    (folder / "test.zarr" / "temperature" / "2.0.0.0").unlink()
    for file in (folder / "test.zarr" / "temperature").glob(".zarray"):
        file.write_text(file.read_text().replace('"fill_value": NaN', '"fill_value": null')
                        .replace('"fill_value": "NaN"', '"fill_value": null'))  # fmt: skip
    sound = {name: f"{folder}/fix/{name}.zarr" for name in ("train", "validation")}
    write_catalog(folder, sound | {"test": str(folder / "test.zarr")}, NAMES, (500, 850))


WRONG = [
    ("fill value -9999", spoilt(lambda store: everywhere(store, -9999.0))),
    ("fill value 1e20", spoilt(lambda store: everywhere(store, 1e20))),
    ("zeros", spoilt(lambda store: everywhere(store, 0.0))),
    ("infinity", spoilt(infinite)),
    ("degC called K", spoilt(celsius)),
    ("an absent chunk", absent),
]


def rows() -> list[Row]:
    return [*_limits(), *_codecs(), *_regions(), *_units()]


def _limits() -> list[Row]:
    rows: list[Row] = []
    for name, make in WRONG:
        predict = tuple(predicting(FIXTURES, "out.zarr", "data.catalog=catalog.yaml", "every=4"))
        inspect = ("data", "inspect", "waves", "data.catalog=catalog.yaml")
        rows += [
            Row(f"{name}, predict", "told|refused", predict, _LIMITS, make),
            Row(f"{name}, inspect", "told|refused", inspect, ("outside|limit|chunk|inf",), make),
            Row(f"{name}, python", "told|refused", (), _LIMITS, make, program=_from_python),
        ]
    evaluate = tuple(evaluating(FIXTURES, "report", "data.catalog=catalog.yaml"))
    spoiled = spoilt(lambda store: everywhere(store, -9999.0))
    refusing = predicting(FIXTURES, "out.zarr", "data.catalog=catalog.yaml", "every=4")
    return [
        *rows,
        Row("fill value -9999, evaluate", "told|refused", evaluate, _LIMITS, spoiled),
        Row("an absent chunk, evaluate", "told|refused", evaluate, _LIMITS, absent),
        Row("input_limits=refuse", "refused", tuple([*refusing, "input_limits=refuse"]), _LIMITS,
            spoiled),
        Row("input_limits=off", "right", tuple([*refusing, "input_limits=off"]), (), spoiled),
        Row("sound values tell nothing", "right", act=_quiet),
    ]  # fmt: skip


def _from_python(arguments: object) -> int:
    import atmossl

    del arguments
    store = xr.open_zarr("test.zarr", consolidated=False)
    model = atmossl.load("fix/tiny.ckpt")
    return in_python(lambda: model.predict("forecast", store, "2001-05-03T12", lead_time="6h"))


def _quiet(place: Place) -> Ended:
    """No word of limits where all is well: a warning that always comes is none."""
    ended = place.run(predicting(FIXTURES, "out.zarr", _DATES, "task.lead_time=6h"))
    if ended.code == 0 and "limit" in ended.stderr:
        return Ended(2, ended.stdout, ended.stderr, ended.cpu_s, ended.wall_s)
    return ended


def _codecs() -> list[Row]:
    """Stores of every codec are read as zarr itself reads them."""
    import numcodecs
    import zarr.codecs as codecs

    kinds: dict[str, tuple[int, Callable[[], dict[str, Any]]]] = {
        "v2 zlib": (2, lambda: {"compressors": numcodecs.Zlib(level=1)}),
        "v2 lz4": (2, lambda: {"compressors": numcodecs.LZ4()}),
        "v2 delta": (2, lambda: {"filters": [numcodecs.Delta(dtype="f4")]}),
        "v2 bitround": (2, lambda: {"filters": [numcodecs.BitRound(keepbits=9)]}),
        "v2 scaled integers": (2, lambda: {"dtype": "i2", "scale_factor": 0.01,
                                           "add_offset": 250.0, "_FillValue": -32768}),
        "v3 gzip": (3, lambda: {"compressors": (codecs.GzipCodec(),)}),
        "v3 zstd with checksum": (3, lambda: {"compressors": (codecs.ZstdCodec(checksum=True),)}),
        "v3 crc32c": (3, lambda: {"compressors": (codecs.ZstdCodec(), codecs.Crc32cCodec())}),
        "v3 bitround": (3, lambda: {"filters": (_v3("BitRound", keepbits=9),)}),
        "v3 lz4": (3, lambda: {"compressors": (_v3("LZ4"),)}),
        "v3 sharded": (3, lambda: {"shards": (8, 2, 8, 16)}),
        "v3 float16": (3, lambda: {"dtype": "f2"}),
        "v3 float64": (3, lambda: {"dtype": "f8"}),
    }  # fmt: skip

    def written(version: int, how: Callable[[], dict[str, Any]]) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            store = dataset(("temperature",))
            encoding = {"temperature": {"chunks": (4, 2, 8, 16), **how()}}
            store.to_zarr(folder / "in.zarr", zarr_format=version, encoding=encoding,
                          consolidated=False)  # fmt: skip
            write_catalog(folder, {"all": str(folder / "in.zarr")}, {"temperature": "temperature"},
                          (500, 850))  # fmt: skip

        return make

    rows = []
    for name, (version, how) in kinds.items():
        make = written(version, how)
        rows.append(Row(f"codec {name}", "right", make=make, check=_as_zarr, act=_by_engines))
    return rows


def _v3(name: str, **settings: Any) -> Any:
    import zarr.codecs.numcodecs as of_numcodecs

    return getattr(of_numcodecs, name)(**settings)


def _by_engines(place: Place) -> Ended:
    """Statistics as `auto` and `zarr` read them, into a cache each."""
    for engine in ("zarr", "auto"):
        given = [*stats(Path(), "temperature", (500, 850)), f"data.read.engine={engine}"]
        cache = {"ATMOSSL_CACHE": str(place.folder / engine)}
        ended = place.run(given, environment=cache)
        if ended.code:
            return ended
    return ended


def _as_zarr(folder: Path) -> str:
    """That both engines' means are those of the values as xarray reads them."""
    import json

    values = xr.open_zarr(folder / "in.zarr", consolidated=False)["temperature"].values
    truth = values.astype(float).mean((0, 2, 3))
    weights = np.cos(np.deg2rad(dataset().latitude.values))
    weighted = np.average(values.astype(float).mean((0, 3)), axis=1, weights=weights)
    for engine in ("zarr", "auto"):
        (file,) = (folder / engine).glob("statistics-*.json")
        mean = np.ravel(json.loads(file.read_text())["mean"])
        if not any(np.allclose(mean, one, rtol=1e-4) for one in (truth, weighted)):
            return f"{engine}: means {mean} instead of {weighted}"
    return ""


def _regions() -> list[Row]:
    """Regions across Greenwich and the dateline: west to east, every value at its place."""
    lat = np.arange(30, 61, 5.0)
    places = {
        "Greenwich": np.arange(-10, 16, 5.0),
        "Greenwich in 0 to 360": np.array([350.0, 355, 0, 5, 10, 15]),
        "the dateline": np.arange(165, 196, 5.0),
        "the dateline in -180 to 180": np.array([165.0, 170, 175, -180, -175, -170]),
        "the globe from -180": np.arange(-180, 180, 22.5),
    }

    def made(lon: np.ndarray) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            store = dataset(("2m_temperature",), levels=(), lat=lat, lon=lon)
            store["2m_temperature"].values[:] = 250 + lat[:, None] + (lon % 360.0)[None] / 10
            store.to_netcdf(folder / "in.nc")

        return make

    def west_to_east(folder: Path) -> str:
        store = xr.open_zarr(folder / "out.zarr", consolidated=False)
        lon = store["longitude"].values
        steps = np.diff(lon) % 360.0
        if steps.max() - steps.min() > 1e-6 or steps.max() > 180:
            return f"longitudes {lon} do not go from west to east"
        array = store["2m_temperature"].isel(time=0)
        truth = 250 + array["latitude"].values[:, None] + (lon % 360.0)[None] / 10
        return same(array.values, truth.astype(np.float32), 1e-4)

    ingest = ("data", "ingest", "input=in.nc", "output=out.zarr")
    rows = [
        Row(f"a region across {name}", "right", ingest, (), made(lon), west_to_east)
        for name, lon in places.items()
    ]

    def cut(west: float, east: float) -> Callable[[Path], str]:
        def compare(folder: Path) -> str:
            lon = xr.open_zarr(folder / "out.zarr", consolidated=False)["longitude"].values
            inside = (lon - west) % 360 <= (east - west) % 360
            return west_to_east(folder) or ("" if inside.all() else f"longitudes {lon}")

        return compare

    globe = made(np.arange(0, 360, 10.0))
    for west, east in ((-20, 20), (170, -170), (350, 10), (90, 270)):
        rows.append(
            Row(f"region from {west} to {east}", "right",
                (*ingest, f"region=[30,60,{west},{east}]"), (), globe, cut(west, east))
        )  # fmt: skip
    return rows


def _units() -> list[Row]:
    """Units that are converted, and those that cannot be."""
    table = [
        ("temperature", "degC", 1.0, -273.15, "right"),
        ("temperature", "degF", 1.8, -459.67, "right"),
        ("temperature", "furlong", 1.0, 0.0, "refused"),
        ("mean_sea_level_pressure", "hPa", 0.01, 0.0, "right"),
        ("total_precipitation", "mm", 1000.0, 0.0, "right"),
        ("specific_humidity", "g kg-1", 1000.0, 0.0, "right"),
        ("specific_humidity", "%", 100.0, 0.0, "refused"),
        ("geopotential", "m", 1 / 9.80665, 0.0, "refused|told"),
        ("u_component_of_wind", "km h-1", 3.6, 0.0, "refused|right"),
    ]

    def row(variable: str, units: str, factor: float, offset: float, expect: str) -> Row:
        def make(folder: Path) -> None:
            store = dataset((variable,))
            np.save(folder / "truth.npy", store[variable].values)
            values = store[variable].values.astype(float) * factor + offset
            store[variable] = (store[variable].dims, values, {"units": units})
            store.to_netcdf(folder / "in.nc")

        def check(folder: Path) -> str:
            truth = np.load(folder / "truth.npy")
            values = xr.open_zarr(folder / "out.zarr", consolidated=False)[variable].values
            return same(values, truth, 1e-5 * np.abs(truth).max())

        ingest = ("data", "ingest", "input=in.nc", "output=out.zarr")
        return Row(f"{variable} in {units}", expect, ingest, (units,) if units != "%" else (),
                   make, check)  # fmt: skip

    return [row(*values) for values in table]

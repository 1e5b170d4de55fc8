"""GRIB whose points run another way, whose messages share their keys, or that is damaged.

Written with ecCodes message by message; every value has one place, so that values at a wrong place
show.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr

from benchmarks.hostile.inputs.metadata import same
from benchmarks.hostile.inputs.rows import Row

LAT, LON = np.arange(90, -91, -10.0), np.arange(0, 360, 10.0)
TRUTH = 280 + LAT[:, None] / 3 + LON[None, :] / 100
PACKING_K = 1e-3
GRAVITY = 9.80665  # m s-2; geopotential height times it is geopotential
MODES = range(0, 256, 16)
I_NEGATIVE, J_POSITIVE, J_CONSECUTIVE, ALTERNATIVE = 128, 64, 32, 16


def message(file: Any, values: np.ndarray, *, mode: int = 0, edition: int = 2, **keys: Any) -> None:
    """One field of values [north to south, west to east] in any scanning mode."""
    import eccodes

    i_neg, j_pos, j_cons, alt = (bool(mode & bit) for bit in
                                 (I_NEGATIVE, J_POSITIVE, J_CONSECUTIVE, ALTERNATIVE))  # fmt: skip
    points = values[::-1] if j_pos else values
    points = points[:, ::-1] if i_neg else points
    points = (points.T if j_cons else points).copy()
    if alt:
        points[1::2] = points[1::2, ::-1]
    north, south, east = float(LAT[0]), float(LAT[-1]), float(LON[-1])
    surface = "sfc" if keys.get("typeOfLevel", "") == "surface" else "pl"
    handle = eccodes.codes_grib_new_from_samples(f"regular_ll_{surface}_grib{edition}")
    every = {
        "Ni": 36, "Nj": 19, "iDirectionIncrementInDegrees": 10.0,
        "jDirectionIncrementInDegrees": 10.0, "iScansNegatively": int(i_neg),
        "jScansPositively": int(j_pos), "jPointsAreConsecutive": int(j_cons),
        "alternativeRowScanning": int(alt),
        "latitudeOfFirstGridPointInDegrees": south if j_pos else north,
        "latitudeOfLastGridPointInDegrees": north if j_pos else south,
        "longitudeOfFirstGridPointInDegrees": east if i_neg else 0.0,
        "longitudeOfLastGridPointInDegrees": 0.0 if i_neg else east,
        "dataDate": 20200101, "dataTime": 0, "shortName": "t", "level": 500, "bitsPerValue": 24,
    }  # fmt: skip
    if edition == 1:
        every.pop("alternativeRowScanning")
    if surface == "sfc":
        every.pop("level")
    for key, value in (every | keys).items():
        eccodes.codes_set(handle, key, value)
    eccodes.codes_set_values(handle, points.ravel())
    eccodes.codes_write(handle, file)
    eccodes.codes_release(handle)


def file_of(*messages: dict[str, Any], name: str = "in.grib2", end: bytes = b"") -> Callable:
    """A maker of a file: of each message its keys; `plus` is added to the values."""

    def make(folder: Path) -> None:
        with (folder / name).open("wb") as file:
            for keys in messages:
                keys = dict(keys)
                message(file, TRUTH + keys.pop("plus", 0.0), **keys)
            file.write(end)

    return make


def check(
    plus: Sequence[float] = (0.0,),
    variable: str = "temperature",
    dates: Sequence[str] = (),
    factor: float = 1.0,
) -> Callable[[Path], str]:
    """That `out.zarr` holds the truth plus one number for each date, times the factor."""

    def compare(folder: Path) -> str:
        store = xr.open_zarr(folder / "out.zarr", consolidated=False)
        array = store[variable].sortby("latitude", ascending=False)
        array = array.isel(level=0) if "level" in array.dims else array
        if dates and list(array["time"].values.astype("M8[s]").astype(str)) != list(dates):
            return f"dates {array['time'].values} instead of {dates}"
        expected = factor * np.stack([TRUTH + number for number in plus])
        return same(array.values, expected, factor * PACKING_K)

    return compare


def accumulated(start: int, end: int, plus: float, day: int = 1) -> dict[str, Any]:
    """Precipitation summed between two steps."""
    return {"typeOfLevel": "surface", "productDefinitionTemplateNumber": 8, "shortName": "tp",
            "dataDate": 20200100 + day, "stepRange": f"{start}-{end}", "plus": plus}  # fmt: skip


def rows() -> list[Row]:
    return [*_scanning(), *_same_keys(), *_damaged(), *_grids(), *_endings()]


def _ingest(name: str, *more: str) -> tuple[str, ...]:
    return ("data", "ingest", f"input={name}", "output=out.zarr", *more)


def _scanning() -> list[Row]:
    rows = [
        Row(f"scanning mode {mode}", "right|refused", _ingest("in.grib2"), ("scan|consecutive",),
            file_of({"mode": mode}), check())
        for mode in MODES
    ]  # fmt: skip
    rows += [
        Row(f"scanning mode {mode} of GRIB 1", "right|refused", _ingest("in.grib"),
            ("scan|consecutive",), file_of({"mode": mode, "edition": 1}, name="in.grib"), check())
        for mode in (0, J_POSITIVE, J_CONSECUTIVE, I_NEGATIVE)
    ]  # fmt: skip
    mixed = file_of({"mode": 0}, {"mode": J_POSITIVE, "dataDate": 20200102, "plus": 1.0})
    rows.append(Row("two scanning modes in a file", "right|refused", _ingest("in.grib2"), (),
                     mixed, check((0.0, 1.0))))  # fmt: skip
    return rows


def _same_keys() -> list[Row]:
    sums = file_of(*(accumulated(start, 12, 10 * day + start, day) for day in (1, 2)
                     for start in (0, 6)))  # fmt: skip
    kinds = file_of({"dataType": "an"}, {"dataType": "fc", "plus": 1.0})
    members = [{"productDefinitionTemplateNumber": 1, "number": n, "plus": float(n),
                "numberOfForecastsInEnsemble": 2} for n in (0, 1)]  # fmt: skip
    steps = [{"step": hours, "plus": float(hours)} for hours in (6, 12)]
    kept = check((16.0, 26.0), "total_precipitation")
    hole = file_of({}, {"level": 850, "plus": 2.0}, {"dataDate": 20200102})
    return [
        Row("two accumulations of a date", "refused", _ingest("in.grib2"), ("step",), sums),
        Row("one accumulation chosen", "right", _ingest("in.grib2", "filters.stepRange=6-12"), (),
            sums, kept),
        Row("analysis and forecast of a date", "refused", _ingest("in.grib2"), ("dataType",),
            kinds),
        Row("members", "refused", _ingest("in.grib2"), ("number",), file_of(*members)),
        Row("one member chosen", "right", _ingest("in.grib2", "select.number=1"), (),
            file_of(*members), check((1.0,))),
        Row("lead times", "refused", _ingest("in.grib2"), ("step",), file_of(*steps)),
        Row("one lead time chosen", "right", _ingest("in.grib2", "select.step=12h"), (),
            file_of(*steps), check((12.0,), dates=("2020-01-01T12:00:00",))),
        Row("a message twice", "refused|told|right", _ingest("in.grib2"), ("twice|more|dupl|same",),
            file_of({}, {}), check()),
        Row("other values under the same keys", "refused", _ingest("in.grib2"), (),
            file_of({}, {"plus": 5.0})),
        Row("a level missing at one date", "refused|told", _ingest("in.grib2"),
            ("missing|850",), hole),
        Row("temperature of the surface and of a level", "refused|told", _ingest("in.grib2"),
            ("typeOfLevel|surface|level",),
            file_of({}, {"typeOfLevel": "surface", "plus": 9.0})),
        Row("two files of one date", "refused", _ingest("*.grib2"), (), _two_files),
        Row("geopotential height by name", "refused|right",
            _ingest("in.grib2", "variables.geopotential=gh"), ("gpm|height|gh",),
            file_of({"shortName": "gh"}), check(variable="geopotential", factor=GRAVITY)),
        Row("nothing that is known", "refused", _ingest("in.grib2"), ("gh|known",),
            file_of({"shortName": "gh"})),
    ]  # fmt: skip


def _two_files(folder: Path) -> None:
    file_of({}, name="a.grib2")(folder)
    file_of({"plus": 5.0}, name="b.grib2")(folder)


def _damaged() -> list[Row]:
    def cut(folder: Path) -> None:
        file_of({}, {"dataDate": 20200102, "plus": 1.0})(folder)
        whole = (folder / "in.grib2").read_bytes()
        (folder / "in.grib2").write_bytes(whole[:-200])

    def no_magic(folder: Path) -> None:
        file_of({})(folder)
        whole = (folder / "in.grib2").read_bytes()
        (folder / "in.grib2").write_bytes(b"GRUB" + whole[4:])

    def no_end(folder: Path) -> None:
        file_of({})(folder)
        whole = (folder / "in.grib2").read_bytes()
        (folder / "in.grib2").write_bytes(whole[:-4] + b"0000")

    def text(folder: Path) -> None:
        (folder / "in.grib2").write_text("<html>404 not found</html>")

    second = {"dataDate": 20200102, "plus": 1.0}
    return [
        Row("the last message is cut", "refused", _ingest("in.grib2"), ("in.grib2",), cut),
        Row("no message begins", "refused", _ingest("in.grib2"), ("in.grib2",), no_magic),
        Row("a message without its end", "refused", _ingest("in.grib2"), ("in.grib2",), no_end),
        Row("a page of a server", "refused", _ingest("in.grib2"), ("in.grib2",), text),
        Row("an empty file", "refused", _ingest("in.grib2"), ("in.grib2",), file_of()),
        Row("zeros after the last message", "right|refused", _ingest("in.grib2"), ("in.grib2",),
            file_of({}, second, end=bytes(64)), check((0.0, 1.0))),
    ]  # fmt: skip


def _grids() -> list[Row]:
    def other_grid(folder: Path) -> None:
        with (folder / "in.grib2").open("wb") as file:
            message(file, TRUTH)
            message(
                file,
                TRUTH[:, :18],
                Ni=18,
                dataDate=20200102,
                iDirectionIncrementInDegrees=20.0,
                longitudeOfLastGridPointInDegrees=340.0,
            )

    def sample(name: str) -> Callable[[Path], None]:
        def make(folder: Path) -> None:
            import eccodes

            handle = eccodes.codes_grib_new_from_samples(name)
            for key, value in {"shortName": "t", "dataDate": 20200101}.items():
                eccodes.codes_set(handle, key, value)
            with (folder / "in.grib2").open("wb") as file:
                eccodes.codes_write(handle, file)

        return make

    def gaps(folder: Path) -> None:
        values = TRUTH.copy()
        values[3:5, 7:9] = 9999.0
        with (folder / "in.grib2").open("wb") as file:
            message(file, values, bitmapPresent=1, missingValue=9999.0)

    def check_gaps(folder: Path) -> str:
        values = TRUTH.copy()
        values[3:5, 7:9] = np.nan
        store = xr.open_zarr(folder / "out.zarr", consolidated=False)
        array = store["temperature"].sortby("latitude", ascending=False)
        return same(array.values.squeeze(), values, PACKING_K)

    def constant(folder: Path) -> None:
        with (folder / "in.grib2").open("wb") as file:
            message(file, np.full_like(TRUTH, 273.0))

    def check_constant(folder: Path) -> str:
        values = xr.open_zarr(folder / "out.zarr", consolidated=False)["temperature"].values
        return same(values.squeeze(), np.full_like(TRUTH, 273.0), PACKING_K)

    return [
        Row("two grids in a file", "refused", _ingest("in.grib2"), (), other_grid),
        Row("a reduced Gaussian grid", "refused", _ingest("in.grib2"), ("reduced_gg",),
            sample("reduced_gg_pl_32_grib2")),
        Row("a rotated grid", "refused", _ingest("in.grib2"), ("rotated_ll",),
            sample("rotated_ll_pl_grib2")),
        Row("spectral coefficients", "refused", _ingest("in.grib2"), ("sh",),
            sample("sh_pl_grib2")),
        Row("polar stereographic", "refused", _ingest("in.grib2"), ("polar",),
            sample("polar_stereographic_pl_grib2")),
        Row("missing values by bitmap", "right", _ingest("in.grib2"), (), gaps, check_gaps),
        Row("a constant field", "right", _ingest("in.grib2"), (), constant, check_constant),
    ]  # fmt: skip


def _endings() -> list[Row]:
    names = ("gfs.t00z.pgrb2.0p25.f006", "era5_pl_20200101", "old.grib1", "in.GRB2", "in.grb")
    rows = [
        Row(f"GRIB called {name}", "right", _ingest(name), (), file_of({}, name=name), check())
        for name in names
    ]

    def folder_of(folder: Path) -> None:
        (folder / "several").mkdir()
        file_of({}, name="several/one.f000")(folder)
        file_of({"dataDate": 20200102, "plus": 1.0}, name="several/two.f006")(folder)

    def passed_over(folder: Path) -> None:
        folder_of(folder)
        (folder / "several" / "notes.txt").write_text("not a field")
        file_of({}, name="several/three.grib2.idx")(folder)
        (folder / "several" / "three.grib2.idx").write_text("1:0:d=2020010100:TMP")

    return [
        *rows,
        Row("a folder of GRIB without endings", "right", _ingest("several"), (), folder_of,
            check((0.0, 1.0))),
        Row("a folder with other files", "told|refused", _ingest("several"), ("notes.txt|passed",),
            passed_over, check((0.0, 1.0))),
    ]  # fmt: skip

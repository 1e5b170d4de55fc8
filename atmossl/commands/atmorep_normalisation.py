"""AtmoRep's own normalisation, read for `atmossl import atmorep normalisation=PATH`.

AtmoRep takes values as (value - mean) / divisor. Both depend on the month: one pair for the globe,
or one for every grid point of fields whose settings end with "local". The divisor is used as it is,
though AtmoRep calls it a variance. AtmoRep takes the month of the date itself, which tells of the
target that is predicted; the climatology here is the mean over the years of every calendar month.

The files of 2024 are arrays of AtmoRep's zarr store, `normalization/global_norm[month, 2, field,
level]` and `normalization/norm[month, 2, field, level, lat, lon]`, and at the surface `..._sfc`
without levels. Those of 2023 are files of float32: one per field and level with rows (year, month,
mean, variance), or one per field, level and month with [lat, lon, 2], named after year and month.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import zarr

from atmossl.data.layouts import array_in, atmorep_latitudes, dates_in
from atmossl.data.monthly_normals import MonthlyNormals
from atmossl.data.segment import Segment
from atmossl.data.windows import Statistics
from atmossl.model.atmorep import AtmoRepField
from atmossl.model.atmorep_network import VARIABLE_OF_FIELD

Months = Literal["climatology", "own"]
_COLUMNS = 4  # of a row of 2023: year, month, mean, variance
_MONTHS, _FIRST_YEAR = 12, 1970
_ERA5 = (90.0 - 0.25 * np.arange(721), 0.25 * np.arange(1440))  # grid of the files of 2023
_DATE_IN_NAME = re.compile(r"(?<!\d)(\d{4})\D{1,3}(\d{1,2})(?!\d)")
_MOST_BYTES = 8 * 2**30
Rows = Mapping[int, Callable[[], np.ndarray]]  # [2 lat lon] by months since 1970-01


def with_atmorep_normalisation(
    statistics: Statistics,
    fields: Sequence[AtmoRepField],
    location: Path,
    segments: Sequence[Segment],
    months: Months,
) -> Statistics:
    """Statistics whose `normals` are AtmoRep's, at the fields' levels. months: `climatology`, over
    the years of the segments if the files have all of them, else over all years; or `own`.

    Raises:
        ValueError: files that are not there or damaged, a field, level or grid point that they
            lack, a divisor that is no positive number, or more numbers than memory holds.
    """
    if not location.is_dir():
        raise ValueError(f"normalisation={location}: no such folder")
    is_store = any((location / name).exists() for name in ("zarr.json", ".zgroup"))
    read = _Store if is_store else _Files
    normals = {}
    for field in fields:
        source = read(location, field.name, segments[0])
        rows = {level: source.rows(level, local=field.local) for level in field.levels}
        chosen = _chosen(field, rows, segments, months, location)
        places = (segments[0].grid.latitude, segments[0].grid.longitude)
        lat, lon = (torch.from_numpy(p.copy()) if field.local else torch.zeros(0) for p in places)
        numbers = np.stack([_table(rows[level], chosen) for level in field.levels], axis=2)
        where = f"normalisation={location}: {field.name}"
        if not np.isfinite(numbers).all() or (numbers[:, 1] <= 0).any():
            raise ValueError(f"{where}: needed: finite means and positive divisors of every month")
        mean, divisor = (torch.from_numpy(numbers[:, number].copy()) for number in (0, 1))
        keys, any_year = tuple(sorted(chosen)), months == "climatology"
        variable = VARIABLE_OF_FIELD[field.name]
        normals[variable] = MonthlyNormals(any_year, keys, field.levels, lat, lon, mean, divisor)
    return replace(statistics, normals=normals)


def _chosen(
    field: AtmoRepField,
    rows: Mapping[int, Rows],
    segments: Sequence[Segment],
    months: Months,
    location: Path,
) -> dict[int, list[int]]:
    """Months that are averaged, by what they are known by: themselves, or a month of any year."""
    first, *further = (set(of_level) for of_level in rows.values())
    common = sorted(first.intersection(*further))
    where = f"normalisation={location}: {field.name}"
    if not common:
        raise ValueError(f"{where}: no month that all of its levels have")
    if months == "climatology":
        dates = np.concatenate([segment.times[[0, -1]] for segment in segments])
        early, late = (int(n) for n in np.sort(dates.astype("datetime64[M]").astype(int))[[0, -1]])
        trained = [count for count in common if early <= count <= late]
        usable = trained if len({count % _MONTHS for count in trained}) == _MONTHS else common
        return {m: [n for n in usable if n % _MONTHS == m] for m in {n % _MONTHS for n in usable}}
    points = segments[0].grid.shape if field.local else (1, 1)
    size = 8 * len(common) * len(rows) * points[0] * points[1]
    if size > _MOST_BYTES:
        raise ValueError(
            f"{where}: {len(common)} months of every grid point take {size / 2**30:.0f} GiB; "
            "normalisation.months=climatology has 12"
        )
    return {count: [count] for count in common}


def _table(rows: Rows, chosen: Mapping[int, list[int]]) -> np.ndarray:
    """Means over what is averaged, [month 2 lat lon] in float32."""
    tables = []
    for key in sorted(chosen):
        tables.append(np.mean([rows[n]() for n in chosen[key]], axis=0, dtype=np.float64))
    return np.stack(tables).astype(np.float32)


def _months_since_1970(year: int, month: int, where: str) -> int:
    if not 1 <= month <= _MONTHS:
        raise ValueError(f"{where}: {month} is no month, 1 to 12")
    return _MONTHS * (year - _FIRST_YEAR) + month - 1


def _cut(lats: np.ndarray, lons: np.ndarray, segment: Segment, where: str) -> tuple:
    """Index of the grid points of a store among those of the statistics."""
    grid, slices = segment.grid, []
    for name, needed, have in (
        ("latitude", grid.latitude, lats), ("longitude", grid.longitude % 360, lons % 360),
    ):  # fmt: skip
        apart = np.abs(needed[:, None] - have)
        if apart.min(axis=1).max() > 1e-3:
            lost = needed[apart.min(axis=1).argmax()]
            raise ValueError(f"{where}: no {name} {lost:g}, which the data have")
        slices.append(apart.argmin(axis=1))
    return np.ix_(*slices)


class _Store:
    """Rows of a zarr store of 2024; level 0 is the surface."""

    def __init__(self, location: Path, field: str, segment: Segment) -> None:
        self.location, self.field, self.segment = location, field, segment
        self.group = zarr.open_group(location, mode="r")

    def rows(self, level: int, *, local: bool) -> Rows:
        end = "" if level else "_sfc"
        name = f"normalization/{'norm' if local else 'global_norm'}{end}"
        stored, fields = self.group.get(name), self.group.attrs.get(f"fields{end}")
        if not isinstance(stored, zarr.Array) or not isinstance(fields, list):
            raise ValueError(
                f"normalisation={self.location}: needed: the array {name} and the attribute "
                f"fields{end}"
            )
        levels = self.group.attrs.get("levels", []) if level else [level]
        for key, label, have in (("field", self.field, fields), ("level", level, levels)):
            if not isinstance(have, list) or label not in have:
                raise ValueError(f"normalisation={self.location}: no {key} {label}; have {have}")
        assert isinstance(levels, list)
        place = (fields.index(self.field), *([levels.index(level)] if level else []))
        grid = [len(axis) for axis in self._axes()] if local else []
        shape = (2, len(fields), *([len(levels)] if level else []), *grid)
        if stored.shape[1:] != shape:
            raise ValueError(
                f"normalisation={self.location}: {name} has shape {stored.shape}; needed: months "
                f"and {shape}"
            )
        cut = self._cut_of(name) if local else None
        first = self._first_month(name)

        def values(row: int) -> np.ndarray:
            numbers = np.asarray(stored[(row, slice(None), *place)])
            return numbers[:, None, None] if cut is None else np.stack([n[cut] for n in numbers])

        return {first + row: lambda row=row: values(row) for row in range(stored.shape[0])}

    def _cut_of(self, name: str) -> tuple:
        return _cut(*self._axes(), self.segment, f"normalisation={self.location}: {name}")

    def _axes(self) -> tuple[np.ndarray, np.ndarray]:
        lats, lons = (np.asarray(array_in(self.group, name)[:]) for name in ("lats", "lons"))
        return atmorep_latitudes(lats), lons

    def _first_month(self, name: str) -> int:
        """Rows begin in January of the first year of the store's dates."""
        if "time" not in self.group:
            raise ValueError(f"normalisation={self.location}: no array time, the years of {name}")
        year = int(dates_in(self.group, "time")[0].astype("datetime64[Y]").astype(np.int64))
        return _MONTHS * year


class _Files:
    """Rows of files of 2023."""

    def __init__(self, location: Path, field: str, segment: Segment) -> None:
        self.location, self.field, self.segment = location, field, segment

    def rows(self, level: int, *, local: bool) -> Rows:
        named = re.compile(rf"(?<![a-z]){re.escape(self.field)}(?![a-z]).*(?<!\d){level}(?!\d)")
        files = [
            file
            for file in sorted(self.location.rglob("*.bin"))
            if (_DATE_IN_NAME.search(file.stem) is not None) == local
            and named.search(_DATE_IN_NAME.sub("", file.stem))
        ]
        if not files or (len(files) > 1 and not local):
            kind = "every grid point, with year and month in the name," if local else "the globe"
            names = [file.name for file in files] or "none"
            raise ValueError(
                f"normalisation={self.location}: a file *{self.field}*{level}.bin of statistics of "
                f"{kind} is needed; there are {names}"
            )
        return self._of_months(files) if local else self._of_rows(files[0])

    def _of_rows(self, file: Path) -> Rows:
        values = np.fromfile(file, np.float32)
        if not len(values) or len(values) % _COLUMNS:
            raise ValueError(
                f"normalisation={file} has {len(values)} numbers, which are no rows of year, "
                "month, mean and variance"
            )
        where = f"normalisation={file}, second column"
        return {
            _months_since_1970(int(year), int(month), where): (
                lambda pair=pair: pair[:, None, None]
            )
            for (year, month), pair in zip(
                values.reshape(-1, _COLUMNS)[:, :2], values.reshape(-1, _COLUMNS)[:, 2:],
                strict=True,
            )
        }  # fmt: skip

    def _of_months(self, files: Sequence[Path]) -> Rows:
        cut = _cut(*_ERA5, self.segment, f"normalisation={self.location}")
        shape = (len(_ERA5[0]), len(_ERA5[1]), 2)

        def values(file: Path) -> np.ndarray:
            if file.stat().st_size != 4 * np.prod(shape):
                raise ValueError(f"normalisation={file} holds no {shape} numbers of float32")
            numbers = np.memmap(file, np.float32, "r", shape=shape)
            return np.stack([numbers[..., n][cut] for n in (0, 1)])

        rows = {}
        for file in files:
            match = _DATE_IN_NAME.search(file.stem)
            assert match is not None
            count = _months_since_1970(int(match[1]), int(match[2]), f"normalisation={file}")
            rows[count] = lambda file=file: values(file)
        return rows

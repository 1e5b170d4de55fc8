"""AtmoRep's own global normalisation, read for `atmossl import atmorep normalisation=PATH`.

AtmoRep takes values as (value - mean) / divisor with the mean and the divisor of the month that the
date lies in: that of the target itself, so that the target is partly known beforehand. Here both
are averaged over all months of the file, so nothing of a target is known. The divisor is used as it
is, though AtmoRep calls it a variance.

The files of 2024 are arrays of AtmoRep's zarr store, `normalization/global_norm[month, 2, field,
level]` and `global_norm_sfc[month, 2, field]`; those of 2023 are one file of float32 per field and
level, rows (year, month, mean, variance). Statistics of every grid point are not read.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import zarr

from atmossl.data.statistics import Statistics
from atmossl.model.atmorep import AtmoRepField
from atmossl.model.atmorep_network import VARIABLE_OF_FIELD

_COLUMNS = 4  # of a row of 2023: year, month, mean, variance


def with_atmorep_normalisation(
    statistics: Statistics, fields: Sequence[AtmoRepField], location: Path
) -> Statistics:
    """Statistics with mean and divisor of AtmoRep's files, at the fields' levels.

    Raises:
        ValueError: files that are not there or damaged, a field or level that they lack, a divisor
            that is no positive number.
    """
    if not location.is_dir():
        raise ValueError(f"normalisation={location}: no such folder")
    is_store = any((location / name).exists() for name in ("zarr.json", ".zgroup"))
    read = _of_store if is_store else _of_file
    mean, std = statistics.mean.copy(), statistics.std.copy()
    for field in fields:
        row = statistics.variables.index(VARIABLE_OF_FIELD[field.name])
        for level in field.levels:
            months = read(location, field.name, level)  # [month, (mean, divisor)]
            where = f"normalisation={location}: {field.name} at level {level}"
            if not len(months) or not np.isfinite(months).all() or (months[:, 1] <= 0).any():
                raise ValueError(f"{where}: needed: months of finite means and positive divisors")
            column = statistics.levels.index(level) if level else 0
            mean[row, column], std[row, column] = months.astype(np.float64).mean(axis=0)
    return replace(statistics, mean=mean, std=std)


def _of_store(location: Path, field: str, level: int) -> np.ndarray:
    """Rows of a zarr store; level 0 is the surface."""
    group = zarr.open_group(location, mode="r")
    end = "" if level else "_sfc"
    stored, fields = group.get(f"normalization/global_norm{end}"), group.attrs.get(f"fields{end}")
    if not isinstance(stored, zarr.Array) or not isinstance(fields, list):
        raise ValueError(
            f"normalisation={location}: needed: the array normalization/global_norm{end} and the "
            f"attribute fields{end}"
        )
    levels = group.attrs.get("levels", []) if level else [level]
    for key, label, have in (("field", field, fields), ("level", level, levels)):
        if not isinstance(have, list) or label not in have:
            raise ValueError(f"normalisation={location}: no {key} {label}; there are {have}")
    assert isinstance(levels, list)
    values, shape = np.asarray(stored[:]), (2, len(fields), len(levels))
    if values.shape[1:] != shape[: values.ndim - 1] or values.ndim != (4 if level else 3):
        raise ValueError(
            f"normalisation={location}: normalization/global_norm{end} has shape {values.shape}; "
            f"needed: months and {shape}"
        )
    of_field = values[:, :, fields.index(field)]
    return of_field[:, :, levels.index(level)] if level else of_field


def _of_file(location: Path, field: str, level: int) -> np.ndarray:
    """Rows of the only file that is named after the field and the level."""
    pattern = re.compile(rf"(?<![a-z]){re.escape(field)}(?![a-z]).*(?<!\d){level}(?!\d).*\.bin")
    files = sorted(file for file in location.rglob("*.bin") if pattern.search(file.name))
    if len(files) != 1:
        names = [file.name for file in files] or "none"
        raise ValueError(
            f"normalisation={location}: one file *{field}*{level}.bin of global statistics is "
            f"needed; there are {names}"
        )
    values = np.fromfile(files[0], np.float32)
    if not len(values) or len(values) % _COLUMNS:
        raise ValueError(
            f"normalisation={files[0]} has {len(values)} numbers, which are no rows of year, "
            "month, mean and variance"
        )
    rows = values.reshape(-1, _COLUMNS)
    if not np.isin(rows[:, 1], np.arange(1, 13)).all():
        raise ValueError(f"normalisation={files[0]}: its second column holds no months, 1 to 12")
    return rows[:, 2:]

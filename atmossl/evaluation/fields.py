"""Datasets as one array of fields and back."""

from dataclasses import dataclass

import numpy as np
import xarray as xr
from einops import rearrange


@dataclass(frozen=True)
class FieldTable:
    """The order of fields in an array: one entry per variable and level, with attributes."""

    levels: dict[str, np.ndarray | None]
    attributes: dict[str, dict]

    @classmethod
    def of(cls, dataset: xr.Dataset) -> "FieldTable":
        """All variables of a dataset; those without a `level` dim count as one field."""
        levels = {
            str(name): field["level"].values if "level" in field.dims else None
            for name, field in dataset.data_vars.items()
        }
        return cls(levels, {str(name): dataset[name].attrs for name in dataset.data_vars})

    @property
    def num_fields(self) -> int:
        return sum(1 if levels is None else len(levels) for levels in self.levels.values())

    def stack(self, dataset: xr.Dataset) -> np.ndarray:
        """Array [time, field, latitude, longitude] in the table's order.

        Raises:
            ValueError: a variable or level of the table is not in the dataset.
        """
        parts = []
        for name, levels in self.levels.items():
            if name not in dataset:
                raise ValueError(
                    f"variable {name!r} is not in the dataset, which has "
                    f"{', '.join(map(str, dataset.data_vars))}"
                )
            field = dataset[name]
            if levels is None:
                field = field.expand_dims("level")
            elif not np.isin(levels, field["level"].values).all():
                raise ValueError(
                    f"{name} needs the levels {levels.tolist()} hPa, the dataset has "
                    f"{field['level'].values.tolist()}"
                )
            else:
                field = field.sel(level=levels)
            parts.append(field.transpose("level", "time", "latitude", "longitude").values)
        return rearrange(np.concatenate(parts), "field time lat lon -> time field lat lon")

    def unstack(self, fields: np.ndarray, dims: tuple[str, ...]) -> xr.Dataset:
        """Dataset from `fields`, whose dims are `dims` with the word `level` at the field axis."""
        stacked = xr.DataArray(fields, dims=dims)
        variables, first = {}, 0
        for name, levels in self.levels.items():
            count = 1 if levels is None else len(levels)
            part = stacked.isel(level=slice(first, first + count))
            if levels is None:
                part = part.isel(level=0, drop=True)
            else:
                part = part.assign_coords(level=levels)
            variables[name] = part.assign_attrs(self.attributes[name])
            first += count
        return xr.Dataset(variables)

"""Converts datasets to arrays [time, channel, lat, lon] and back. A channel is a variable on one
level."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Float

from atmossl.evaluation.alignment import require_labels
from atmossl.evaluation.sphere import polar_sign


@dataclass(frozen=True)
class Channels:
    """Order of variables and levels; `levels` is empty for a surface variable.

    Attributes:
        attrs: the variables' attributes (units, standard names), handed on to predictions.
    """

    levels: Mapping[str, np.ndarray]
    attrs: Mapping[str, dict]

    @classmethod
    def of(cls, dataset: xr.Dataset) -> "Channels":
        levels = {
            str(name): field["level"].to_numpy() if "level" in field.dims else np.empty(0)
            for name, field in dataset.data_vars.items()
        }
        return cls(levels, {name: dict(dataset[name].attrs) for name in levels})

    @property
    def signs(self) -> Float[np.ndarray, " channel"]:
        """Sign of each channel across a pole."""
        signs = [np.full(max(1, len(lev)), polar_sign(name)) for name, lev in self.levels.items()]
        return np.concatenate(signs)

    def __len__(self) -> int:
        return len(self.signs)

    def stack(self, dataset: xr.Dataset) -> Float[np.ndarray, "time channel lat lon"]:
        """The dataset as an array in float64.

        Raises:
            ValueError: a variable or level is missing, or a value is not finite.
        """
        missing = sorted(set(self.levels) - set(dataset.data_vars))
        if missing:
            raise ValueError(f"variables: the dataset lacks {missing}, needs {list(self.levels)}")
        parts = [self._variable(dataset, name, levels) for name, levels in self.levels.items()]
        return np.concatenate(parts, axis=1)

    def _variable(self, dataset: xr.Dataset, name: str, levels: np.ndarray) -> np.ndarray:
        field = dataset[name]
        if len(levels):
            require_labels(levels, field["level"].to_numpy(), "level", name)
            field = field.sel(level=levels)
        else:
            field = field.expand_dims("level")
        values = field.transpose("time", "level", "latitude", "longitude").to_numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: ridge regression needs finite values, found missing ones")
        return values.astype(np.float64)

    def unstack(
        self,
        values: Float[np.ndarray, "*batch channel lat lon"],
        coords: Mapping[str, np.ndarray],
    ) -> xr.Dataset:
        """Dataset of float32; `coords` names the batch dims in order, then latitude, longitude."""
        batch_dims = [dim for dim in coords if dim not in ("latitude", "longitude")]
        fields, first = {}, 0
        for name, levels in self.levels.items():
            chosen = values[..., first : first + max(1, len(levels)), :, :].astype(np.float32)
            first += max(1, len(levels))
            dims = (*batch_dims, "level", "latitude", "longitude")
            field = xr.DataArray(chosen, coords, dims, attrs=self.attrs[name])
            has_level = len(levels) > 0
            fields[name] = (
                field.assign_coords(level=levels) if has_level else field.squeeze("level")
            )
        return xr.Dataset(fields)

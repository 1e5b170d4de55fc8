"""Means and divisors that depend on the month, and on the grid point if wanted.

A network that was trained on values normalised like that, as AtmoRep's are, needs them again.
Fields are read with one mean and one standard deviation first; `LocalUnits` lead from these on to
the month's and the place's, and back.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from atmossl.batch import StreamSpec
from atmossl.geometry import degrees_east_of

_MONTHS = 12
_NO_YEAR_ENDS = 2**40  # more months than there are
_MINUTES_PER_HOUR = 60


@dataclass(frozen=True)
class LocalUnits:
    """Fields in units of one mean and standard deviation times `scale` plus `shift` are fields in
    units of their month and place."""

    scale: Float[Tensor, "variable level time lat lon"]
    shift: Float[Tensor, "variable level time lat lon"]

    def into(self, fields: Tensor) -> Tensor:
        return fields * self.scale + self.shift

    def out_of(self, fields: Tensor) -> Tensor:
        return (fields - self.shift) / self.scale

    def at_steps(self, steps: list[int]) -> "LocalUnits":
        return LocalUnits(self.scale[:, :, steps], self.shift[:, :, steps])


@dataclass(frozen=True)
class MonthlyNormals:
    """Mean and divisor of one variable by month, [month level lat lon].

    months: 0 to 11 for months of any year, or counted from 1970-01, where every date takes its own.
    lat, lon: degrees of the grid points; empty where the numbers are those of the globe.
    """

    any_year: bool
    months: tuple[int, ...]
    levels: tuple[int, ...]
    lat: Float[Tensor, "lat"]
    lon: Float[Tensor, "lon"]
    mean: Float[Tensor, "month level row column"]
    divisor: Float[Tensor, "month level row column"]

    def to_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for a checkpoint."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in vars(self).items()}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        lists = {key: tuple(values[key]) for key in ("months", "levels")}
        return cls(**{**values, **lists})

    def at(
        self, levels: tuple[int, ...], hours: Tensor, lat: Tensor, lon: Tensor
    ) -> tuple[Float[Tensor, "level time lat lon"], Float[Tensor, "level time lat lon"]]:
        """Mean and divisor at some levels, hours since 1970-01-01T00 and places.

        Raises:
            ValueError: a month or a place that the numbers are not of.
        """
        month = self._places_of_months(hours)
        level = torch.tensor([self.levels.index(number) for number in levels])
        row, column = self._rows(lat), self._columns(lon)
        index = (month[None, :, None, None], level[:, None, None, None], row[:, None], column)
        return self.mean[index], self.divisor[index]

    def _places_of_months(self, hours: Tensor) -> Int[Tensor, "time"]:
        minutes = (hours.double() * _MINUTES_PER_HOUR).round().long().numpy()
        dates = minutes.astype("datetime64[m]").astype("datetime64[M]")
        months = dates.astype(np.int64) % (_MONTHS if self.any_year else _NO_YEAR_ENDS)
        places = np.searchsorted(self.months, months).clip(max=len(self.months) - 1)
        absent = np.asarray(self.months)[places] != months
        if absent.any():
            raise ValueError(
                f"the checkpoint's statistics have none of {dates[absent][0]}; import it with "
                "normalisation.months=climatology, which serves every date"
            )
        return torch.from_numpy(places)

    def _rows(self, lat: Tensor) -> Int[Tensor, "lat"]:
        if not len(self.lat):
            return torch.zeros(len(lat), dtype=torch.int64)
        return _nearest((lat.double()[:, None] - self.lat.double()).abs(), self.lat, "latitude")

    def _columns(self, lon: Tensor) -> Int[Tensor, "lon"]:
        if not len(self.lon):
            return torch.zeros(len(lon), dtype=torch.int64)
        apart = degrees_east_of(self.lon.double(), lon.double()[:, None])
        return _nearest(apart.abs(), self.lon, "longitude")


def _nearest(apart: Tensor, places: Tensor, name: str) -> Int[Tensor, "place"]:
    """Numbers of the nearest places; ValueError if one is farther off than the places' spacing."""
    distance, nearest = apart.min(dim=1)
    spacing = float(places.diff().abs().max()) if len(places) > 1 else 0.0
    if float(distance.max()) > spacing + 1e-3:
        raise ValueError(
            f"the checkpoint's statistics of every grid point have {name}s from "
            f"{float(places.min()):g} to {float(places.max()):g}; the data reach farther"
        )
    return nearest


def local_units(
    normals: Mapping[str, MonthlyNormals],
    spec: StreamSpec,
    mean: Float[Tensor, "variable level"],
    std: Float[Tensor, "variable level"],
    place: tuple[Tensor, Tensor, Tensor],
) -> LocalUnits | None:
    """The conversion from units of one mean and standard deviation to those of the months and
    places; None for a stream without such normals. place: hours since 1970-01-01T00, latitudes
    and longitudes."""
    if not any(name in normals for name in spec.variables):
        return None
    shape = (spec.num_levels, *map(len, place))
    scales, shifts = [], []
    for row, name in enumerate(spec.variables):
        scale, shift = torch.ones(shape), torch.zeros(shape)
        if name in normals:
            there, divisor = normals[name].at(spec.level_values, *place)
            own_mean, own_std = (x[row].double()[:, None, None, None] for x in (mean, std))
            scale = (own_std / divisor.double()).float()
            shift = ((own_mean - there.double()) / divisor.double()).float()
        scales.append(scale.expand(shape))
        shifts.append(shift.expand(shape))
    return LocalUnits(torch.stack(scales), torch.stack(shifts))

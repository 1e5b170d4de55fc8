"""Regions for scores: named belts and boxes, and means over their area."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.geometry import TOLERANCE_DEG, area_weights, within_longitudes
from atmossl.value_faults import as_written

_CELL = ("latitude", "longitude")


@dataclass(frozen=True)
class ScoreRegion:
    """A set of latitude belts, or one box.

    Attributes:
        belts: (south, north) in degrees, both ends inside.
        longitudes: (west, east) in degrees, both ends inside; a box may cross Greenwich. None is
            the whole circle.
    """

    name: str
    belts: tuple[tuple[float, float], ...]
    longitudes: tuple[float, float] | None = None

    def contains(self, latitude: xr.DataArray) -> xr.DataArray:
        """True for the latitudes of this region."""
        inside = [
            (latitude >= south - TOLERANCE_DEG) & (latitude <= north + TOLERANCE_DEG)
            for south, north in self.belts
        ]
        return xr.concat(inside, "belt").any("belt")

    def contains_longitude(self, longitude: xr.DataArray) -> xr.DataArray:
        """True for the longitudes of this region."""
        if self.longitudes is None:
            return xr.ones_like(longitude, dtype=bool)
        return within_longitudes(longitude, *self.longitudes)


# Tropics and extratropics as in WeatherBench 2 (Rasp et al. 2024): the belts meet at 20 degrees.
REGIONS = {
    region.name: region
    for region in (
        ScoreRegion("global", ((-90.0, 90.0),)),
        ScoreRegion("tropics", ((-20.0, 20.0),)),
        ScoreRegion("northern_extratropics", ((20.0, 90.0),)),
        ScoreRegion("southern_extratropics", ((-90.0, -20.0),)),
        ScoreRegion("poles", ((-90.0, -60.0), (60.0, 90.0))),
    )
}


def find_regions(names: Iterable[str]) -> list[ScoreRegion]:
    """Regions by name.

    Raises:
        ValueError: an unknown name.
    """
    names = list(names)
    unknown = [name for name in names if name not in REGIONS]
    if unknown:
        valid = ", ".join(sorted(REGIONS))
        raise ValueError(f"regions={','.join(unknown)}: unknown; valid: {valid}")
    if len(set(names)) < len(names):
        raise ValueError(f"regions={as_written(names)} names one twice")
    return [REGIONS[name] for name in names]


def boxes(limits: Mapping[str, Sequence[float]]) -> list[ScoreRegion]:
    """Boxes by name from south, north, west and east in degrees.

    Raises:
        ValueError: a name of a belt, or latitudes that enclose nothing.
    """
    regions = []
    for name, (south, north, west, east) in limits.items():
        if name in REGIONS:
            raise ValueError(f"boxes.{name} is the name of a belt; choose another")
        if not -90.0 <= south < north <= 90.0:
            raise ValueError(
                f"boxes.{name}={as_written([south, north, west, east])}: needed are south < north "
                "within -90..90, then west and east"
            )
        regions.append(ScoreRegion(name, ((south, north),), (west, east)))
    return regions


def area_weights_like(field: xr.DataArray | xr.Dataset, region: ScoreRegion) -> xr.DataArray:
    """Area weights [latitude], for a box [latitude, longitude]; zero outside the region.

    Raises:
        ValueError: no cell of the grid lies in the region.
    """
    latitude = field["latitude"]
    weights = latitude.copy(data=area_weights(np.asarray(latitude, dtype=np.float64)))
    weights = weights.where(region.contains(latitude), 0.0)
    if region.longitudes is not None:
        weights = weights * region.contains_longitude(field["longitude"])
    if not bool((weights > 0).any()):
        raise ValueError(_why_empty(field, region))
    return weights


def _why_empty(field: xr.DataArray | xr.Dataset, region: ScoreRegion) -> str:
    """A message on the axis of the grid on which a region has no cell, by the region's key."""
    latitude = field["latitude"]
    axis, first, last = "latitudes", float(latitude.min()), float(latitude.max())
    key = f"regions={region.name}"
    if region.longitudes is not None:
        limits = ",".join(f"{limit:g}" for limit in (*region.belts[0], *region.longitudes))
        key = f"boxes.{region.name}=[{limits}]"
        if bool(region.contains(latitude).any()):
            axis, (first, last) = "longitudes", field["longitude"].to_numpy()[[0, -1]]
    return (
        f"{key} has no cell of the grid, whose {axis} go from {first:g} to {last:g}; choose others "
        "or leave it out"
    )


def stacked_weights(
    field: xr.DataArray | xr.Dataset, regions: Sequence[ScoreRegion]
) -> xr.DataArray:
    """Area weights of several regions, [region, latitude], with boxes [.., longitude].

    A belt that the grid does not reach is left out; a box without cells is a ValueError.
    """
    weights = {}
    for region in regions:
        try:
            weights[region.name] = area_weights_like(field, region)
        except ValueError:
            if region.longitudes is not None:
                raise
    layers: list[xr.DataArray] = list(xr.broadcast(*weights.values()))
    return xr.concat(layers, dim=pd.Index(list(weights), name="region"))


def weighted_mean(field: xr.Variable, weights: xr.Variable) -> xr.Variable:
    """The mean over latitude and longitude, with the other dims of the weights at the end; missing
    values are left out.

    Plain numpy: xarray's own weighted mean takes ten times as long on fields of this size.
    """
    rest = [dim for dim in field.dims if dim not in _CELL]
    more = [dim for dim in weights.dims if dim not in _CELL]
    values = field.transpose(*rest, *_CELL).to_numpy()
    by_row = "longitude" not in weights.dims
    weight = weights.transpose(*more, "latitude", ...).to_numpy()
    valid = np.isfinite(values)
    if by_row:
        counts = valid.sum(axis=-1, dtype=np.float64)
        total = np.where(valid, values, 0.0).sum(axis=-1, dtype=np.float64)
        cells = ([-1], [-1])
    else:
        counts, total = valid.astype(np.float64), np.where(valid, values, 0.0)
        cells = ([-2, -1], [-2, -1])
    weighted, covered = (np.tensordot(x, weight, cells) for x in (total, counts))
    mean = np.divide(weighted, covered, out=np.full_like(weighted, np.nan), where=covered > 0)
    return xr.Variable((*rest, *more), mean)


def area_mean(field: xr.DataArray, region: ScoreRegion) -> xr.DataArray:
    """Mean over the area of one region; missing values are left out."""
    mean = weighted_mean(field.variable, area_weights_like(field, region).variable)
    labels = {dim: field[dim] for dim in mean.dims if dim in field.coords}
    return xr.DataArray(mean.data, labels, mean.dims)

"""Named latitude belts and the mean over their area."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import xarray as xr

from atmossl.geometry import area_weights

Field = TypeVar("Field", xr.DataArray, xr.Dataset)


@dataclass(frozen=True)
class Region:
    """A set of latitude belts; each belt is (south, north) in degrees, both ends inside."""

    name: str
    belts: tuple[tuple[float, float], ...]

    def contains(self, latitude: xr.DataArray) -> xr.DataArray:
        """True for the latitudes of this region."""
        inside = [(latitude >= south) & (latitude <= north) for south, north in self.belts]
        return xr.concat(inside, "belt").any("belt")


# Tropics and extratropics as in WeatherBench 2 (Rasp et al. 2024): the belts meet at 20 degrees.
REGIONS = {
    region.name: region
    for region in (
        Region("global", ((-90.0, 90.0),)),
        Region("tropics", ((-20.0, 20.0),)),
        Region("northern_extratropics", ((20.0, 90.0),)),
        Region("southern_extratropics", ((-90.0, -20.0),)),
        Region("poles", ((-90.0, -60.0), (60.0, 90.0))),
    )
}


def find_regions(names: Iterable[str]) -> list[Region]:
    """Regions by name.

    Raises:
        ValueError: an unknown name.
    """
    unknown = [name for name in names if name not in REGIONS]
    if unknown:
        raise ValueError(f"regions: unknown {unknown}; choices are {sorted(REGIONS)}")
    return [REGIONS[name] for name in names]


def area_weights_like(field: xr.DataArray, region: Region) -> xr.DataArray:
    """Area weights [latitude], zero outside the region.

    Raises:
        ValueError: no latitude of the grid lies in the region.
    """
    latitude = field["latitude"]
    weights = latitude.copy(data=area_weights(np.asarray(latitude, dtype=np.float64)))
    weights = weights.where(region.contains(latitude), 0.0)
    if not bool((weights > 0).any()):
        raise ValueError(
            f"region {region.name} {region.belts} has no cell on latitudes from "
            f"{float(latitude.min()):g} to {float(latitude.max()):g}"
        )
    return weights


def area_mean(field: xr.DataArray, region: Region) -> xr.DataArray:
    """Mean over latitude and longitude by cell area; missing values are left out."""
    weights = area_weights_like(field, region)
    return field.weighted(weights).mean(["latitude", "longitude"])

"""First-order conservative regridding between latitude-longitude grids.

Jones (1999), Monthly Weather Review 127, 2204-2210. On such grids the overlap of two cells is a
product of a latitude and a longitude overlap, so two small matrices do the work.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import xarray as xr
from jaxtyping import Float

from atmossl.evaluation.alignment import grid_of
from atmossl.geometry import TOLERANCE_DEG, Grid, ascending_longitudes, latitude_edges
from atmossl.value_faults import as_written

_FULL_COVER = 0.999


@dataclass(frozen=True)
class ConservativeRegridder:
    """Area means of a source grid over the cells of a target grid.

    Raises:
        ValueError: the source does not cover the target.
    """

    source: Grid
    target: Grid

    def __post_init__(self) -> None:
        for name, overlap in (("latitude", self._latitude), ("longitude", self._longitude)):
            if overlap.sum(axis=1).min() < _FULL_COVER:
                raise ValueError(
                    f"{name}: a grid of {self.source.shape} cells does not cover one of "
                    f"{self.target.shape}; choose forecasts on the same area"
                )

    @cached_property
    def _latitude(self) -> Float[np.ndarray, "target source"]:
        """Share of each target row's area that lies in each source row."""
        edges = [np.sin(np.deg2rad(latitude_edges(g.latitude))) for g in (self.source, self.target)]
        return _overlap(*edges)

    @cached_property
    def _longitude(self) -> Float[np.ndarray, "target source"]:
        """Share of each target column that lies in each source column, around the circle."""
        source, target = _longitude_edges(self.source), _longitude_edges(self.target)
        return np.sum([_overlap(source + turn, target) for turn in (-360.0, 0.0, 360.0)], axis=0)

    def __call__(self, fields: xr.Dataset) -> xr.Dataset:
        """Fields on the target grid; a cell with any missing part is missing."""
        return fields.map(self._regrid, keep_attrs=True).assign_coords(
            latitude=self.target.latitude, longitude=self.target.longitude
        )

    def _regrid(self, field: xr.DataArray) -> xr.DataArray:
        field = field.transpose(..., "latitude", "longitude")
        values = np.einsum(
            "yi,...ij,xj->...yx",
            self._latitude,
            field.to_numpy().astype(np.float64),
            self._longitude,
            optimize=True,
        )
        bare = field.isel(latitude=0, longitude=0, drop=True)
        template = bare.expand_dims(
            latitude=self.target.latitude, longitude=self.target.longitude
        ).transpose(*field.dims)
        return template.copy(data=values.astype(np.float32))


def coarsest(grids: Sequence[Grid]) -> Grid:
    """The grid with the largest cells; the first of those that are equal."""
    return max(grids, key=lambda grid: grid.latitude_spacing * grid.longitude_spacing)


def covered(grids: Mapping[str, Grid]) -> Grid:
    """The cells of the coarsest grid that lie in all other grids.

    Raises:
        ValueError: there are none, or fewer than two rows or columns.
    """
    target = coarsest(list(grids.values()))
    rows, columns = (np.ones(size, bool) for size in target.shape)
    edges, west = latitude_edges(target.latitude), _longitude_edges(target)[:-1]
    for grid in grids.values():
        south, north = latitude_edges(grid.latitude)[[0, -1]]
        rows &= (edges[:-1] >= south - TOLERANCE_DEG) & (edges[1:] <= north + TOLERANCE_DEG)
        if not grid.periodic:
            first, end = _longitude_edges(grid)[[0, -1]]
            from_first = (west - first + TOLERANCE_DEG) % 360.0
            columns &= from_first + target.longitude_spacing <= end - first + 2 * TOLERANCE_DEG
    if rows.sum() < 2 or columns.sum() < 2:
        where = {name: _extent(grid) for name, grid in grids.items()}
        raise ValueError(f"latitude, longitude: no area in common; {as_written(where)}")
    _, longitude = ascending_longitudes(target.longitude[columns])
    return target if columns.all() and rows.all() else Grid(target.latitude[rows], longitude)


def _extent(grid: Grid) -> str:
    (south, north), (west, east) = (x[[0, -1]] for x in (grid.latitude, grid.longitude))
    return f"{south:g} to {north:g} N, {west:g} to {east:g} E"


def _overlap(source: np.ndarray, target: np.ndarray) -> Float[np.ndarray, "target source"]:
    """Share of each target interval [edge, next edge] that lies in each source interval."""
    low = np.maximum(target[:-1, None], source[None, :-1])
    high = np.minimum(target[1:, None], source[None, 1:])
    return np.clip(high - low, 0.0, None) / np.diff(target)[:, None]


def _longitude_edges(grid: Grid) -> np.ndarray:
    spacing = grid.longitude_spacing
    return np.append(grid.longitude, grid.longitude[-1] + spacing) - spacing / 2


def regridder(fields: xr.Dataset, target: Grid) -> ConservativeRegridder | None:
    """A function that brings a dataset onto a grid; None if the dataset lies on it already."""
    source = grid_of(fields)
    return None if source.matches(target) else ConservativeRegridder(source, target)

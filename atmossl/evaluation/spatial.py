"""Area-weighted coarsening and interpolation back: the baselines of downscaling.

`conservative` repeats the block mean (its area mean over a block is exact); `bilinear` and
`bicubic` are Lagrange polynomials through the 2 or 4 nearest block centres along each axis, which
allow uneven latitudes. Edges are treated as `sphere` says: longitude wraps, rows are reflected
across the pole. Missing cells count for nothing: means and lines are over what is there.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import xarray as xr
from einops import rearrange, repeat
from jaxtyping import Float

from atmossl.evaluation.alignment import grid_of
from atmossl.evaluation.regrid import ConservativeRegridder
from atmossl.evaluation.sphere import Halo, polar_sign
from atmossl.geometry import Grid, area_weights
from atmossl.masking.cells import coarsen as coarsened
from atmossl.value_faults import listed

_LINEAR, _CUBIC = 2, 4
_NOTHING = 1e-9  # of a sum of weights that is 1


@dataclass(frozen=True)
class Coarsening:
    """Blocks of `factor` x `factor` cells of a fine grid.

    Raises:
        ValueError: factor does not divide both sizes of the grid.
    """

    fine: Grid
    factor: int

    def __post_init__(self) -> None:
        num_lat, num_lon = self.fine.shape
        if self.factor < 1 or num_lat % self.factor or num_lon % self.factor:
            common = np.gcd(num_lat, num_lon)
            choices = [f for f in range(1, common + 1) if common % f == 0]
            raise ValueError(
                f"factor {self.factor} does not divide a grid of {num_lat} x {num_lon} cells; "
                f"choices are {listed(choices)}"
            )

    @cached_property
    def coarse(self) -> Grid:
        """Grid of blocks; a block's coordinates are the means of its cells' coordinates."""
        return Grid(
            _mean_of_blocks(self.fine.latitude, self.factor),
            _mean_of_blocks(self.fine.longitude, self.factor),
        )

    def block_mean(
        self, fields: Float[np.ndarray, "*batch lat lon"]
    ) -> Float[np.ndarray, "*batch block_lat block_lon"]:
        """The area-weighted mean over the cells of every block that are not missing, in float64."""
        values = fields.astype(np.float64)
        there = np.isfinite(values)
        weights = torch.from_numpy(area_weights(self.fine.latitude))

        def mean(cells: np.ndarray) -> np.ndarray:
            return coarsened(torch.from_numpy(cells), weights, self.factor).numpy()

        if there.all():
            return mean(values)
        total, share = mean(np.where(there, values, 0.0)), mean(there.astype(np.float64))
        return np.divide(total, share, out=np.full_like(total, np.nan), where=share > 0)

    def repeat_blocks(
        self, fields: Float[np.ndarray, "*batch block_lat block_lon"]
    ) -> Float[np.ndarray, "*batch lat lon"]:
        """Each block's value in all of its cells."""
        return repeat(
            fields,
            "... block_lat block_lon -> ... (block_lat lat) (block_lon lon)",
            lat=self.factor,
            lon=self.factor,
        )

    def interpolate(
        self,
        fields: Float[np.ndarray, "*batch block_lat block_lon"],
        num_points: int,
        sign: float | np.ndarray,
    ) -> Float[np.ndarray, "*batch lat lon"]:
        """See `_interpolated`; the points are block centres."""
        lines = _Lines(self.coarse, self.fine.latitude, self.fine.longitude)
        return _interpolated(fields, lines, num_points, sign)

    def bicubic(
        self, fields: Float[np.ndarray, "*batch block_lat block_lon"], sign: float | np.ndarray
    ) -> Float[np.ndarray, "*batch lat lon"]:
        return self.interpolate(fields, _CUBIC, sign)


@dataclass(frozen=True)
class _Lines:
    """Weights of polynomials in latitude and in longitude, from a grid to other places.

    longitude: within the circle that begins one column west of the grid.
    """

    source: Grid
    latitude: Float[np.ndarray, " lat"]
    longitude: Float[np.ndarray, " lon"]

    def apply(
        self,
        fields: Float[np.ndarray, "*batch source_lat source_lon"],
        num_points: int,
        sign: float | np.ndarray,
        of_weights: Callable[[np.ndarray], np.ndarray] = np.asarray,
    ) -> Float[np.ndarray, "*batch lat lon"]:
        halo = Halo(self.source, num_points // 2, num_points // 2)
        along_lat = of_weights(lagrange_matrix(halo.latitude, self.latitude, num_points))
        along_lon = of_weights(lagrange_matrix(halo.longitude, self.longitude, num_points))
        wide = halo.extend(fields, sign)
        return np.einsum("yi,...ij,xj->...yx", along_lat, wide, along_lon, optimize=True)


def _interpolated(
    fields: Float[np.ndarray, "*batch source_lat source_lon"],
    lines: _Lines,
    num_points: int,
    sign: float | np.ndarray,
) -> Float[np.ndarray, "*batch lat lon"]:
    """Lagrange interpolation through `num_points` points along each axis. Where some of them are
    missing it is linear between those that are there, by their weights."""
    there = np.isfinite(fields)
    if there.all():
        return lines.apply(fields, num_points, sign)
    total = lines.apply(np.where(there, fields, 0.0), _LINEAR, sign)
    share = lines.apply(there.astype(float), _LINEAR, 1.0)
    linear = np.divide(total, share, out=np.full_like(total, np.nan), where=share > _NOTHING)
    if num_points == _LINEAR:
        return linear
    lacking = lines.apply((~there).astype(float), num_points, 1.0, np.abs)
    smooth = lines.apply(np.where(there, fields, 0.0), num_points, sign)
    return np.where(lacking > _NOTHING, linear, smooth)


def _mean_of_blocks(coordinate: np.ndarray, factor: int) -> np.ndarray:
    return np.mean(rearrange(coordinate, "(block cell) -> block cell", cell=factor), axis=-1)


def lagrange_matrix(
    source: Float[np.ndarray, " source"], target: Float[np.ndarray, " target"], num_points: int
) -> Float[np.ndarray, "target source"]:
    """Weights of the polynomial through the `num_points` source points nearest to each target.

    Rows sum to one; polynomials of degree below num_points are reproduced exactly.
    """
    first = np.searchsorted(source, target) - num_points // 2
    first = np.clip(first, 0, len(source) - num_points)
    matrix = np.zeros((len(target), len(source)))
    row = np.arange(len(target))
    for k in range(num_points):
        other_nodes = [j for j in range(num_points) if j != k]
        weight = np.ones(len(target))
        for j in other_nodes:
            node, other = source[first + k], source[first + j]
            weight *= (target - other) / (node - other)
        matrix[row, first + k] = weight
    return matrix


def coarsen(dataset: xr.Dataset, factor: int) -> xr.Dataset:
    """Block means by area over `factor` x `factor` cells, on the grid of blocks.

    Raises:
        ValueError: factor does not divide the grid.
    """
    blocks = Coarsening(grid_of(dataset), factor)
    return _map_fields(dataset, lambda values, _: blocks.block_mean(values), blocks.coarse)


def conservative(coarse: xr.Dataset, fine: xr.Dataset) -> xr.Dataset:
    """Block values repeated in their cells, on the grid of `fine`."""
    blocks = _blocks_between(coarse, fine)
    return _onto(coarse, fine, lambda values, _: blocks.repeat_blocks(values))


def bilinear(coarse: xr.Dataset, fine: xr.Dataset) -> xr.Dataset:
    """Linear interpolation along both axes, on the grid of `fine`."""
    blocks = _blocks_between(coarse, fine)
    return _onto(coarse, fine, lambda values, sign: blocks.interpolate(values, _LINEAR, sign))


def bicubic(coarse: xr.Dataset, fine: xr.Dataset) -> xr.Dataset:
    """Cubic interpolation along both axes, on the grid of `fine`."""
    blocks = _blocks_between(coarse, fine)
    return _onto(coarse, fine, blocks.bicubic)


def on_cells(dataset: xr.Dataset, grid: Grid) -> xr.Dataset:
    """Fields on the cells of a grid, wherever their own lie: cubic interpolation if these are as
    large or larger, area means if they are smaller.

    Raises:
        ValueError: smaller cells that do not cover those of the grid.
    """
    source = grid_of(dataset)
    if source.matches(grid):
        return dataset.assign_coords(latitude=grid.latitude, longitude=grid.longitude)
    if source.latitude_spacing < grid.latitude_spacing:
        return ConservativeRegridder(source, grid)(dataset)
    west = source.longitude[0] - source.longitude_spacing
    lines = _Lines(source, grid.latitude, west + (grid.longitude - west) % 360.0)
    return _map_fields(dataset, lambda values, s: _interpolated(values, lines, _CUBIC, s), grid)


def _blocks_between(coarse: xr.Dataset, fine: xr.Dataset) -> Coarsening:
    fine_grid, coarse_grid = grid_of(fine), grid_of(coarse)
    blocks = Coarsening(fine_grid, max(1, fine_grid.shape[0] // coarse_grid.shape[0]))
    if not blocks.coarse.matches(coarse_grid):
        raise ValueError(
            f"latitude, longitude: a coarse grid of {coarse_grid.shape} cells is not made of "
            f"blocks of the fine grid of {fine_grid.shape} cells; make it with coarsen()"
        )
    return blocks


_FieldFunction = Callable[[np.ndarray, float], np.ndarray]


def _onto(coarse: xr.Dataset, fine: xr.Dataset, function: _FieldFunction) -> xr.Dataset:
    result = _map_fields(coarse, function, grid_of(fine))
    return result.assign_coords(latitude=fine["latitude"], longitude=fine["longitude"])


def _map_fields(dataset: xr.Dataset, function: _FieldFunction, grid: Grid) -> xr.Dataset:
    """Apply function(values, polar sign) to each variable and put the result on `grid`."""

    def on_grid(field: xr.DataArray) -> xr.DataArray:
        field = field.transpose(..., "latitude", "longitude")
        values = function(field.to_numpy(), polar_sign(str(field.name))).astype(np.float32)
        coords = {name: c for name, c in field.coords.items() if not _horizontal(c)}
        coords |= {"latitude": grid.latitude, "longitude": grid.longitude}
        return xr.DataArray(values, coords, field.dims, attrs=field.attrs)

    mapped = {name: on_grid(field) for name, field in dataset.data_vars.items()}
    return xr.Dataset(mapped, attrs=dataset.attrs)


def _horizontal(coordinate: xr.DataArray) -> bool:
    return bool({"latitude", "longitude"} & set(coordinate.dims))

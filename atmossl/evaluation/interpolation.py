"""From a coarse grid to a fine one: block means and separable interpolation.

Longitude is periodic. Latitude is clamped: beyond the outermost coarse centre the outermost
coarse row is used. Positions are in units of coarse cells, from physical latitudes.
"""

from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from einops import einsum, rearrange, reduce, repeat

from atmossl.geometry import area_weights


class Weighting(Protocol):
    """Weights [fine, tap] and coarse cells [fine, tap] for positions [fine] in coarse cells."""

    def __call__(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]: ...


def nearest_taps(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Piecewise constant: the cell itself; conserves the block mean exactly."""
    cells = np.rint(positions).astype(int)
    return np.ones((len(cells), 1)), rearrange(cells, "fine -> fine 1")


def linear_taps(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The two neighbouring centres, weighted by nearness."""
    cells = np.floor(positions).astype(int)
    part = positions - cells
    return np.stack([1 - part, part], axis=-1), np.stack([cells, cells + 1], axis=-1)


def cubic_taps(positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Cubic convolution over four centres with a = -1/2.

    Exact for quadratics. Source: Keys (1981), IEEE Trans. ASSP 29, eq. 15.
    """
    cells = np.floor(positions).astype(int)
    part = positions - cells
    weights = [
        ((2 - part) * part - 1) * part / 2,
        ((3 * part - 5) * part**2 + 2) / 2,
        ((4 - 3 * part) * part + 1) * part / 2,
        (part - 1) * part**2 / 2,
    ]
    return np.stack(weights, axis=-1), rearrange(cells, "fine -> fine 1") + np.arange(-1, 3)


WEIGHTINGS: dict[str, Weighting] = {
    "conservative": nearest_taps,
    "bilinear": linear_taps,
    "bicubic": cubic_taps,
}


def _matrix(weights: np.ndarray, cells: np.ndarray, num_coarse: int) -> np.ndarray:
    """Dense operator [fine, coarse]; taps that fall on the same cell add up."""
    operator = np.zeros((len(weights), num_coarse))
    np.add.at(operator, (repeat(np.arange(len(weights)), "fine -> fine 1"), cells), weights)
    return operator


@dataclass(frozen=True)
class Coarsening:
    """Blocks of `factor` x `factor` cells of a grid and the way back.

    Raises:
        ValueError: `factor` does not divide the grid.
    """

    latitude: np.ndarray
    longitude: np.ndarray
    factor: int

    def __post_init__(self) -> None:
        sizes = {"latitude": len(self.latitude), "longitude": len(self.longitude)}
        for dim, size in sizes.items():
            if self.factor < 1 or size % self.factor:
                choices = [f for f in range(1, size + 1) if size % f == 0]
                raise ValueError(
                    f"factor={self.factor} does not divide the {size} values of {dim}; "
                    f"choose from {choices}"
                )

    @property
    def coarse_latitude(self) -> np.ndarray:
        """Centres [row] in degrees: means of the block's latitudes."""
        return reduce(self.latitude, "(row fine) -> row", "mean", fine=self.factor)

    def block_mean(self, fields: np.ndarray) -> np.ndarray:
        """Area-weighted block means [..., row, column] of fields [..., latitude, longitude]."""
        n = self.factor
        weights = rearrange(area_weights(self.latitude), "(row fine) -> row fine", fine=n)
        weights = weights / reduce(weights, "row fine -> row 1", "sum")
        columns = reduce(fields, "... lat (column fine) -> ... lat column", "mean", fine=n)
        rows = rearrange(columns, "... (row fine) column -> ... row fine column", fine=n)
        weights = weights.astype(fields.dtype)
        return einsum(rows, weights, "... row fine column, row fine -> ... row column")

    def refine(self, coarse: np.ndarray, weighting: Weighting) -> np.ndarray:
        """Fields [..., latitude, longitude] from coarse ones [..., row, column]."""
        num_rows, num_columns = coarse.shape[-2:]
        rows = np.interp(self.latitude, self.coarse_latitude, np.arange(num_rows))
        columns = (np.arange(len(self.longitude)) + 0.5) / self.factor - 0.5
        row_weights, row_cells = weighting(rows)
        column_weights, column_cells = weighting(columns)
        south_north = _matrix(row_weights, np.clip(row_cells, 0, num_rows - 1), num_rows)
        west_east = _matrix(column_weights, column_cells % num_columns, num_columns)
        along = partial(np.asarray, dtype=coarse.dtype)
        zonal = einsum(coarse, along(west_east), "... row column, lon column -> ... row lon")
        return einsum(zonal, along(south_north), "... row lon, lat row -> ... lat lon")

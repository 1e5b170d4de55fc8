"""Neighbours beyond the edge of a grid, across the pole and around the circle.

Past a pole the next row is the same row turned by half the circle, and the eastward and northward
components of a vector change sign there. Longitudes wrap. A grid that does not reach a pole, or
has an odd number of longitudes, repeats its last row; one that does not close the circle repeats
its last column.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Float

from atmossl.geometry import TOLERANCE_DEG, Grid, latitude_edges

_VECTOR_COMPONENTS = ("u_component_of_", "v_component_of_")


def polar_sign(variable: str) -> float:
    """-1 for a component of a horizontal vector (`10m_u_component_of_wind` too), else 1."""
    return -1.0 if any(word in variable for word in _VECTOR_COMPONENTS) else 1.0


@dataclass(frozen=True)
class Halo:
    """A grid with `rows` more rows on both ends and `columns` more columns on both sides."""

    grid: Grid
    rows: int
    columns: int

    def __post_init__(self) -> None:
        num_lat, num_lon = self.grid.shape
        on_pole = max(self._on_pole(0), self._on_pole(-1))
        if self.rows > num_lat - on_pole or self.columns > num_lon:
            raise ValueError(
                f"a halo of {self.rows} x {self.columns} cells does not fit a grid of "
                f"{num_lat} x {num_lon}"
            )

    @cached_property
    def latitude(self) -> Float[np.ndarray, " row"]:
        """Latitudes of all rows in degrees; they run on past a pole (95 is 85 across it)."""
        inner = self.grid.latitude
        south, north = self._beyond(0), self._beyond(-1)
        low = -180.0 - inner[south] if self._crosses(0) else inner[0] - self._steps(inner[:2])
        high = 180.0 - inner[north] if self._crosses(-1) else inner[-1] + self._steps(inner[-2:])
        return np.concatenate([low[::-1], inner, high])

    @cached_property
    def longitude(self) -> Float[np.ndarray, " column"]:
        """Longitudes of all columns in degrees; they run on past 0 and 360."""
        spacing = self.grid.longitude_spacing
        count = self.grid.shape[1] + 2 * self.columns
        return self.grid.longitude[0] + spacing * (np.arange(count) - self.columns)

    def extend(
        self, fields: Float[np.ndarray, "*batch lat lon"], sign: float | np.ndarray
    ) -> Float[np.ndarray, "*batch row column"]:
        """Fields with their halo; `sign` (broadcast against fields) is used across a pole."""
        south = self._across(fields, 0, sign)
        north = self._across(fields, -1, sign)
        tall = np.concatenate([south[..., ::-1, :], fields, north], axis=-2)
        num_lon = self.grid.shape[1]
        column = np.arange(-self.columns, num_lon + self.columns)
        inside = column % num_lon if self.grid.periodic else np.clip(column, 0, num_lon - 1)
        return tall[..., inside]

    def _steps(self, pair: np.ndarray) -> np.ndarray:
        return (pair[1] - pair[0]) * np.arange(1, self.rows + 1)

    def _crosses(self, end: int) -> bool:
        edge = latitude_edges(self.grid.latitude)[end]
        num_lon = self.grid.shape[1]
        return abs(abs(edge) - 90.0) < TOLERANCE_DEG and self.grid.periodic and num_lon % 2 == 0

    def _on_pole(self, end: int) -> int:
        return int(abs(abs(self.grid.latitude[end]) - 90.0) < TOLERANCE_DEG)

    def _beyond(self, end: int) -> np.ndarray:
        """Indices of the rows that lie beyond an end, nearest first."""
        num_lat = self.grid.shape[0]
        if not self._crosses(end):
            return np.full(self.rows, end % num_lat)
        # A row on the pole itself is its own mirror image: start one further in.
        steps = self._on_pole(end) + np.arange(self.rows)
        return steps if end == 0 else num_lat - 1 - steps

    def _across(self, fields: np.ndarray, end: int, sign: float | np.ndarray) -> np.ndarray:
        rows = fields[..., self._beyond(end), :]
        if not self._crosses(end):
            return rows
        turned = np.roll(rows, self.grid.shape[1] // 2, axis=-1)
        return (turned * sign).astype(fields.dtype, copy=False)

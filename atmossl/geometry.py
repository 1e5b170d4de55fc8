"""Grids on the sphere: periodic longitude, area weights, windows and the plan of tiles.

Floor 0: numpy only. Float coordinates become integer cells here, once.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from typing import Any

import numpy as np

EARTH_RADIUS_KM = 6371.0
TOLERANCE_DEG = 1e-3


def latitude_edges(latitude_deg: np.ndarray) -> np.ndarray:
    """Edges [lat + 1] of the latitude cells in degrees: midpoints, closed at a pole when the
    outermost cell reaches at least half way to it."""
    spacing = np.diff(latitude_deg)
    inner = latitude_deg[:-1] + spacing / 2
    first = latitude_deg[0] - spacing[0] / 2
    last = latitude_deg[-1] + spacing[-1] / 2
    first = -90.0 if first - spacing[0] / 2 < -90.0 else first
    last = 90.0 if last + spacing[-1] / 2 > 90.0 else last
    return np.concatenate([[first], inner, [last]])


@cache
def gaussian_latitudes(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Latitudes of a whole Gaussian grid, degrees ascending, and their Gauss-Legendre weights."""
    nodes, weights = np.polynomial.legendre.leggauss(count)
    return np.rad2deg(np.arcsin(nodes)), weights


def area_weights(latitude_deg: np.ndarray) -> np.ndarray:
    """Exact relative area [lat] of each latitude band, with mean 1.

    The area of a band is proportional to the difference of sin(latitude) at its edges. Bands of a
    whole Gaussian grid have the areas of Gauss-Legendre quadrature, which integrates spherical
    harmonics exactly.
    """
    if len(latitude_deg) == 1:
        return np.ones(1)
    if np.ptp(np.diff(latitude_deg)) > TOLERANCE_DEG:  # a Gaussian grid is never even
        gaussian, weights = gaussian_latitudes(len(latitude_deg))
        ascending = np.sort(latitude_deg)  # the weights are the same from both poles
        if np.allclose(ascending, gaussian, atol=TOLERANCE_DEG):
            return weights / weights.mean()
    weights = np.abs(np.diff(np.sin(np.deg2rad(latitude_edges(latitude_deg)))))
    return weights / weights.mean()


def ascending_longitudes(longitude_deg: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The order in which longitudes ascend, and the longitudes in this order, from 0 to 360
    degrees. Those of a region across Greenwich begin at its west and go on past 360."""
    order = np.argsort(longitude_deg % 360.0)
    ordered = longitude_deg[order] % 360.0
    gaps = np.diff(ordered)
    if len(gaps) and gaps.max() > 1.5 * np.median(gaps):
        first = int(gaps.argmax()) + 1
        order = np.roll(order, -first)
        ordered = np.concatenate([ordered[first:], ordered[:first] + 360.0])
    return order, ordered


def degrees_east_of(meridian: Any, longitude_deg: Any) -> Any:
    """Degrees by which longitudes lie east of a meridian, from -180 to below 180 (numbers, arrays
    or tensors)."""
    return (longitude_deg - meridian + 180.0) % 360.0 - 180.0


def nearest_cells(
    latitude_deg: np.ndarray, longitude_deg: np.ndarray, lat: np.ndarray, lon: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of the cells of a grid whose centres are nearest to places.

    latitude_deg, longitude_deg: the centres [row], [column]; lat, lon: of the places, of any
    shape, which their rows and columns then have. The nearest is that of each axis by itself.
    """
    rows = np.abs(latitude_deg - np.asarray(lat)[..., None]).argmin(axis=-1)
    apart = np.abs(degrees_east_of(np.asarray(lon)[..., None], longitude_deg))
    return rows, apart.argmin(axis=-1)


def within_longitudes(longitude_deg: Any, west: float, east: float) -> Any:
    """True for longitudes from west eastwards to east, also for centres that miss an edge by
    rounding."""
    width = 360.0 if east - west >= 360 else (east - west) % 360.0
    return (longitude_deg - west + TOLERANCE_DEG) % 360.0 <= width + 2 * TOLERANCE_DEG


def closes_circle(longitude: np.ndarray) -> bool:
    """Whether the last of evenly spaced longitudes lies beside the first."""
    spacing = float(longitude[1] - longitude[0])
    return abs(len(longitude) * spacing - 360.0) < TOLERANCE_DEG


@dataclass(frozen=True)
class Grid:
    """A latitude-longitude grid, latitudes ascending, longitudes ascending within one turn; those
    of a region across Greenwich go on past 360.

    Raises:
        ValueError: coordinates not ascending or longitudes not evenly spaced.
    """

    latitude: np.ndarray
    longitude: np.ndarray

    def __post_init__(self) -> None:
        if np.any(np.diff(self.latitude) <= 0):
            raise ValueError("latitude must ascend strictly; sort the store's latitude first")
        spacing = np.diff(self.longitude)
        if np.any(spacing <= 0) or np.ptp(spacing) > TOLERANCE_DEG:
            raise ValueError(
                f"longitude must ascend with even spacing, found steps of {spacing.min():g} to "
                f"{spacing.max():g} degrees"
            )

    @property
    def shape(self) -> tuple[int, int]:
        return len(self.latitude), len(self.longitude)

    @cached_property
    def longitude_spacing(self) -> float:
        return float(self.longitude[1] - self.longitude[0])

    @cached_property
    def latitude_spacing(self) -> float:
        return float(np.diff(self.latitude).mean())

    @cached_property
    def periodic(self) -> bool:
        """True if the longitudes close the circle."""
        return closes_circle(self.longitude)

    @cached_property
    def weights(self) -> np.ndarray:
        return area_weights(self.latitude)

    def refined(self, factor: int) -> "Grid":
        """The grid whose cells are `factor` times smaller along each axis, and nest in the cells of
        this one.

        Raises:
            ValueError: the latitude bands are not of one height, so no regular grid nests in them.
        """
        edges = latitude_edges(self.latitude)
        if np.ptp(np.diff(edges)) > TOLERANCE_DEG:
            raise ValueError(
                f"latitude bands of {np.diff(edges).min():g} to {np.diff(edges).max():g} degrees, "
                "as those of a Gaussian grid or of rows on the poles: a finer regular grid does "
                "not nest in them; regrid to bands of one height"
            )
        count = len(self.latitude) * factor
        height, width = (edges[-1] - edges[0]) / count, self.longitude_spacing / factor
        west = self.longitude[0] - self.longitude_spacing / 2
        columns = np.arange(len(self.longitude) * factor) + 0.5
        return Grid(edges[0] + height * (np.arange(count) + 0.5), west + width * columns)

    def part(self, box: "Box") -> "Grid":
        """The cells of a box, longitudes going on past 360 where it crosses the end of the grid."""
        columns = np.arange(box.lon_start, box.lon_start + box.lon_size)
        turns, index = np.divmod(columns, self.shape[1])
        return Grid(self.latitude[box.lat_index()], self.longitude[index] + 360.0 * turns)

    def matches(self, other: "Grid") -> bool:
        """True if both grids have the same cells within a thousandth of a degree."""
        return self.shape == other.shape and bool(
            np.allclose(self.latitude, other.latitude, atol=TOLERANCE_DEG)
            and np.allclose(self.longitude, other.longitude, atol=TOLERANCE_DEG)
        )

    def difference(self, other: "Grid") -> str:
        """How another grid differs, in words: in the number of latitudes or longitudes, or in
        which of them. Empty if the grids match."""
        differences = []
        for name in ("latitude", "longitude") if not self.matches(other) else ():
            ours, theirs = getattr(self, name), getattr(other, name)
            if len(ours) != len(theirs):
                differences.append(f"{_span(ours, name)}, not {_span(theirs, name)}")
                continue
            differs = np.flatnonzero(np.abs(ours - theirs) > TOLERANCE_DEG)
            if len(differs):
                at = int(differs[0])
                differences.append(
                    f"{len(differs)} of {len(ours)} {name}s differ, the first is {ours[at]:.6g}, "
                    f"not {theirs[at]:.6g}"
                )
        return "; ".join(differences)


def _span(degrees: np.ndarray, name: str) -> str:
    return f"{len(degrees)} {name}s from {degrees[0]:.6g} to {degrees[-1]:.6g}"


@dataclass(frozen=True)
class Box:
    """A rectangle of grid cells: `origin` (lat, lon) and `size` (lat, lon), in cells.

    Longitude cells run past the end of a periodic grid and wrap around.
    """

    lat_start: int
    lon_start: int
    lat_size: int
    lon_size: int

    def lat_index(self) -> np.ndarray:
        return np.arange(self.lat_start, self.lat_start + self.lat_size)

    def lon_index(self, num_lon: int) -> np.ndarray:
        return np.arange(self.lon_start, self.lon_start + self.lon_size) % num_lon


def check_window_fits(grid: Grid, lat_size: int, lon_size: int) -> None:
    """Raise ValueError if a window of that many cells is larger than the grid."""
    num_lat, num_lon = grid.shape
    if lat_size > num_lat or lon_size > num_lon:
        raise ValueError(
            f"data.window of {lat_size} x {lon_size} cells (latitude x longitude) is larger than "
            f"the store's grid of {num_lat} x {num_lon}"
        )


@dataclass(frozen=True)
class Alignment:
    """Where windows may start: rows at multiples of `cells`, columns at those plus `lon_shift`."""

    cells: int = 1
    lon_shift: int = 0

    def check(self, lat_size: int, lon_size: int) -> None:
        """Raise ValueError if a window of that many cells does not end where others may start."""
        for axis, size in (("lat", lat_size), ("lon", lon_size)):
            if size % self.cells:
                raise ValueError(
                    f"data.window.{axis}={size} is no multiple of the {self.cells} cells that the "
                    "windows of all streams have in common"
                )


@dataclass(frozen=True)
class _Blocks:
    """Along one axis, every `cells` cells of a grid share edges with `other_cells` of another.

    The block at cell `offset` of the grid starts at cell `first` of the other.
    """

    cells: int
    other_cells: int
    offset: int
    first: int


@dataclass(frozen=True)
class Nesting:
    """How windows of one grid are filled exactly by windows of another grid, which is coarser or
    finer."""

    grid: Grid
    other: Grid
    lat: _Blocks
    lon: _Blocks

    @classmethod
    def of(cls, grid: Grid, other: Grid) -> "Nesting":
        """The nesting of another grid in this one. Raises ValueError if the edges of one grid
        are not among those of the other, or the other grid does not cover this one."""
        lat, lon = _lat_blocks(grid, other), _lon_blocks(grid, other)
        if lat is None or lon is None:
            axis = "latitudes" if lat is None else "longitudes"
            raise ValueError(
                f"the {axis} of its grid ({_described(other)}) do not nest in those of the grid "
                f"({_described(grid)}): cells must have edges in common and cover it; regrid one "
                "of them conservatively"
            )
        return cls(grid, other, lat, lon)

    @classmethod
    def same(cls, grid: Grid) -> "Nesting":
        """The nesting of a grid in itself."""
        return cls(grid, grid, _Blocks(1, 1, 0, 0), _Blocks(1, 1, 0, 0))

    def box(self, box: Box) -> Box:
        """The cells of the other grid that fill a window of the grid."""
        columns = (box.lon_start - self.lon.offset) % self.grid.shape[1]
        for cells, blocks in (
            (box.lat_start, self.lat),
            (box.lat_size, self.lat),
            (columns, self.lon),
            (box.lon_size, self.lon),
        ):
            assert cells % blocks.cells == 0, f"{cells} is no multiple of {blocks.cells} cells"
        first = self.lon.first + columns // self.lon.cells * self.lon.other_cells
        return Box(
            self.lat.first + box.lat_start // self.lat.cells * self.lat.other_cells,
            first % self.other.shape[1],
            box.lat_size // self.lat.cells * self.lat.other_cells,
            box.lon_size // self.lon.cells * self.lon.other_cells,
        )


def common_alignment(nestings: Sequence[Nesting]) -> Alignment:
    """Where windows may start so that they have common edges with all of the other grids.

    Raises:
        ValueError: nowhere, as their edges never coincide.
    """
    cells = math.lcm(*(blocks.cells for n in nestings for blocks in (n.lat, n.lon)))
    for shift in range(cells):
        if all((shift - n.lon.offset) % n.lon.cells == 0 for n in nestings):
            return Alignment(cells, shift)
    raise ValueError("no longitude is an edge of the cells of all grids")


def _described(grid: Grid) -> str:
    (num_lat, num_lon), lat, lon = grid.shape, grid.latitude, grid.longitude
    return f"{num_lat} x {num_lon} cells with centres from {lat[0]:g} N, {lon[0]:g} E"


def _lat_blocks(grid: Grid, other: Grid) -> _Blocks | None:
    edges, all_other_edges = latitude_edges(grid.latitude), latitude_edges(other.latitude)
    first, last = (int(np.abs(all_other_edges - edge).argmin()) for edge in edges[[0, -1]])
    other_edges = all_other_edges[first : last + 1]
    count, num_others = len(edges) - 1, len(other_edges) - 1
    if num_others < 1 or max(count, num_others) % min(count, num_others):
        return None
    blocks = min(count, num_others)
    cells, other_cells = count // blocks, num_others // blocks
    if np.abs(edges[::cells] - other_edges[::other_cells]).max() > TOLERANCE_DEG:
        return None
    return _Blocks(cells, other_cells, 0, first)


def _lon_blocks(grid: Grid, other: Grid) -> _Blocks | None:
    width, its_width = grid.longitude_spacing, other.longitude_spacing
    cells, its_cells = max(1, round(its_width / width)), max(1, round(width / its_width))
    count, num_others = grid.shape[1], other.shape[1]
    if abs(cells * width - its_cells * its_width) * count > TOLERANCE_DEG or count % cells:
        return None
    west = grid.longitude[0] - width / 2 - (other.longitude[0] - its_width / 2)
    for offset in range(cells if grid.periodic else 1):
        start = ((west + offset * width + TOLERANCE_DEG) % 360.0 - TOLERANCE_DEG) / its_width
        first, needed = round(start), count // cells * its_cells
        if abs(start - first) * its_width > TOLERANCE_DEG:
            continue
        if other.periodic or first + needed <= num_others:
            return _Blocks(cells, its_cells, offset, first % num_others)
    return None


_ANYWHERE = Alignment()


def random_box(
    grid: Grid,
    lat_size: int,
    lon_size: int,
    rng: np.random.Generator,
    alignment: Alignment = _ANYWHERE,
) -> Box:
    """A window at a random place: at any longitude if the grid is periodic, at latitudes inside
    the grid."""
    (num_lat, num_lon), step = grid.shape, alignment.cells
    lat_start = int(rng.integers(0, (num_lat - lat_size) // step + 1)) * step
    lon_choices = num_lon // step if grid.periodic else (num_lon - lon_size) // step + 1
    lon_start = int(rng.integers(0, lon_choices)) * step + alignment.lon_shift
    return Box(lat_start, lon_start % num_lon, lat_size, lon_size)


def _starts(num_cells: int, size: int, stride: int, periodic: bool, align: int) -> list[int]:
    """The starts of tiles that cover every cell, at multiples of `align`. Gaps are even
    otherwise, so that the overlap is shared out."""
    if size >= num_cells:
        return [0]
    span = num_cells if periodic else num_cells - size
    count = -(-span // stride)
    starts = [i * span / count for i in range(count + (not periodic))]
    return sorted({int(start) // align * align for start in starts})


def _ramp(size: int, overlap: int) -> np.ndarray:
    """Positive weights [cell] that rise linearly over `overlap` cells from both ends."""
    distance = np.minimum(np.arange(size), np.arange(size)[::-1]) + 0.5
    return np.minimum(distance / max(overlap, 0.5), 1.0)


@dataclass(frozen=True)
class TilePlan:
    """Overlapping tiles that cover a grid, with blending weights that sum to one everywhere.

    A partition of unity (Melenk and Babuska 1996): each tile's ramp is divided by the sum of all
    ramps at the cell. `overlap` is the share of a tile that its neighbour covers as well. Tiles
    start at multiples of `align` cells; sizes must be multiples of it, too, unless it is 1.
    `shifts`: the tiling is laid once for each of these numbers of cells to the east, around a
    whole circle; elsewhere it stays where it is.
    """

    grid: Grid
    lat_size: int
    lon_size: int
    overlap: float = 0.5
    shifts: tuple[int, ...] = (0,)
    align: int = 1

    def __post_init__(self) -> None:
        check_window_fits(self.grid, self.lat_size, self.lon_size)
        if not 0.0 <= self.overlap < 1.0:
            raise ValueError(f"overlap must be in [0, 1), got {self.overlap}")
        num_lat, num_lon = self.grid.shape
        for key, size in (("lat", self.lat_size), ("lon", self.lon_size), ("grid", num_lat)):
            if size % self.align:
                raise ValueError(f"coarsening by {self.align} does not divide {key} size {size}")

    @property
    def _whole_circle(self) -> bool:
        return self.grid.periodic and self.lon_size == self.grid.shape[1]

    @property
    def _strides(self) -> tuple[int, int]:
        """Rows and columns from one tile to the next. A tile that closes the circle has no edge
        in longitude, so it needs no ramp there."""
        overlap = 0.0 if self._whole_circle else self.overlap
        sizes = ((self.lat_size, self.overlap), (self.lon_size, overlap))
        lat_stride, lon_stride = (max(1, round(size * (1 - share))) for size, share in sizes)
        return lat_stride, lon_stride

    @cached_property
    def tiles(self) -> tuple[Box, ...]:
        (num_lat, num_lon), (lat_stride, lon_stride) = self.grid.shape, self._strides
        lon_periodic = self.grid.periodic and not self._whole_circle
        return tuple(
            Box(lat, (lon + shift) % num_lon, self.lat_size, self.lon_size)
            for lat in _starts(num_lat, self.lat_size, lat_stride, False, self.align)
            for shift in (self.shifts if self.grid.periodic else (0,))
            for lon in _starts(num_lon, self.lon_size, lon_stride, lon_periodic, self.align)
        )

    def rows(self) -> tuple[tuple[int, ...], ...]:
        """The tiles by rows, south first: numbers of the tiles that share their latitudes."""
        starts = sorted({tile.lat_start for tile in self.tiles})
        return tuple(
            tuple(n for n, tile in enumerate(self.tiles) if tile.lat_start == start)
            for start in starts
        )

    @cached_property
    def weights(self) -> tuple[np.ndarray, ...]:
        """Blending weights [lat lon] of every tile, which sum to one over the tiles of a cell."""
        (num_lat, num_lon), (lat_stride, lon_stride) = self.grid.shape, self._strides
        ramp = np.outer(
            _ramp(self.lat_size, self.lat_size - lat_stride),
            _ramp(self.lon_size, self.lon_size - lon_stride),
        )
        total = np.zeros((num_lat, num_lon))
        for tile in self.tiles:
            total[np.ix_(tile.lat_index(), tile.lon_index(num_lon))] += ramp
        assert total.min() > 0, f"a hole in the tiling: smallest total weight {total.min()}"
        return tuple(
            ramp / total[np.ix_(tile.lat_index(), tile.lon_index(num_lon))] for tile in self.tiles
        )

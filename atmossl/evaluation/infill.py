"""Baselines for inpainting: harmonic infill, and ridge regression on neighbouring cells.

Both fill the same hidden cells at every time, from the visible cells of the same variable and
level at the same time alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from jaxtyping import Bool, Float, Int
from scipy.spatial import KDTree

from atmossl.evaluation.alignment import grid_of
from atmossl.geometry import Grid
from atmossl.masking.infill import laplacian, solve_hidden

STRENGTHS = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_FIT_TIMES = 2000
_BATCH_BYTES = 128 * 2**20


@dataclass(frozen=True)
class HarmonicInfill:
    """Fills hidden cells with the smoothest surface through the visible cells: Laplace's equation
    holds in the hidden ones.

    Raises:
        ValueError: nothing is visible.
    """

    grid: Grid
    hidden: Bool[np.ndarray, "lat lon"]

    def __post_init__(self) -> None:
        require_visible(self.hidden)

    def __call__(self, fields: xr.Dataset) -> xr.Dataset:
        """Fill the hidden cells of fields [..., latitude, longitude]; their values are not read.
        The surface goes through missing cells as through hidden ones, but missing cells stay
        missing."""
        grid, inside = self.grid, self.hidden.ravel()
        matrix = laplacian(
            grid.latitude, grid.shape[1], grid.longitude_spacing, periodic=grid.periodic
        )

        def fill(values: Float[np.ndarray, "field cell"]) -> Float[np.ndarray, "field hidden"]:
            filled = np.full((len(values), int(inside.sum())), np.nan)
            for rows, lacking in _alike(~np.isfinite(values) & ~inside):
                free = inside | lacking
                if not free.all():
                    filled[rows] = solve_hidden(matrix, free, values[rows])[:, inside[free]]
            return filled

        return _filled(fields, inside, fill)


def _alike(
    lacking: Bool[np.ndarray, "field cell"],
) -> Iterator[tuple[np.ndarray, Bool[np.ndarray, " cell"]]]:
    """Groups of fields that lack the same cells, by their numbers, with these cells."""
    packed = np.packbits(lacking, axis=1)
    if not packed.any():  # as most do
        yield np.arange(len(lacking)), lacking[0]
        return
    _, first, kind = np.unique(packed, axis=0, return_index=True, return_inverse=True)
    for number, example in enumerate(first):
        yield np.flatnonzero(kind.ravel() == number), lacking[example]


@dataclass(frozen=True)
class LocalRidge:
    """Predicts each hidden cell from its nearest visible ones, by a ridge regression fitted on the
    training record.

    Simple kriging with the record's own covariances instead of a model of them (Cressie 1993,
    section 3.2), and a ridge for what the record is too short to tell.

    Attributes:
        neighbour: [hidden, neighbour] flat cells.
        slope: by variable, [level, hidden, neighbour]; intercept: [level, hidden].
    """

    grid: Grid
    hidden: Bool[np.ndarray, "lat lon"]
    neighbour: Int[np.ndarray, "hidden neighbour"]
    slope: dict[str, np.ndarray]
    intercept: dict[str, np.ndarray]

    @classmethod
    def fit(
        cls,
        history: Sequence[xr.Dataset],
        hidden: Bool[np.ndarray, "lat lon"],
        *,
        num_neighbours: int = 24,
        held_out: float = 0.25,
    ) -> "LocalRidge":
        """Fit the regression. The strength for each variable and level is the one with the least
        error at the end of every run, a share `held_out` of it; slopes are then fitted to the
        whole run. Of a long record at most some 2000 evenly spaced times are used."""
        require_visible(hidden)
        grid = grid_of(history[0])
        neighbour = nearest_visible(grid, hidden, num_neighbours)
        every = -(-sum(run.sizes["time"] for run in history) // _FIT_TIMES)
        history = [run.isel(time=slice(None, None, every)) for run in history]
        slope, intercept = {}, {}
        for name in map(str, history[0].data_vars):
            runs = [_flat(run[name]) for run in history]
            fits = [
                _fit_level([run[level] for run in runs], hidden.ravel(), neighbour, held_out)
                for level in range(len(runs[0]))
            ]
            slope[name] = np.stack([fit[0] for fit in fits])
            intercept[name] = np.stack([fit[1] for fit in fits])
        return cls(grid, hidden, neighbour, slope, intercept)

    def __call__(self, fields: xr.Dataset) -> xr.Dataset:
        """Fill the hidden cells of fields [time, ..., latitude, longitude]."""
        inside = self.hidden.ravel()
        filled = {}
        for name in map(str, fields.data_vars):
            values = _flat(fields[name])
            for level, (slope, intercept) in enumerate(
                zip(self.slope[name], self.intercept[name], strict=True)
            ):
                near = values[level][:, self.neighbour]
                values[level][:, inside] = np.einsum("thk,hk->th", near, slope) + intercept
            filled[name] = _unflat(values, fields[name])
        return fields.assign(filled)


def nearest_visible(
    grid: Grid, hidden: Bool[np.ndarray, "lat lon"], count: int
) -> Int[np.ndarray, "hidden neighbour"]:
    """The visible neighbours of every hidden cell as flat cell numbers, nearest first on the
    sphere."""
    lat, lon = np.meshgrid(np.deg2rad(grid.latitude), np.deg2rad(grid.longitude), indexing="ij")
    place = np.stack([np.cos(lat) * np.cos(lon), np.cos(lat) * np.sin(lon), np.sin(lat)], axis=-1)
    place, inside = place.reshape(-1, 3), hidden.ravel()
    visible = np.flatnonzero(~inside)
    count = min(count, len(visible))
    _, neighbours = KDTree(place[visible]).query(place[inside], count)
    return visible[np.asarray(neighbours).reshape(-1, count)]


def _fit_level(
    runs: list[Float[np.ndarray, "time cell"]],
    inside: Bool[np.ndarray, " cell"],
    neighbour: Int[np.ndarray, "hidden neighbour"],
    held_out: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The slope [hidden, neighbour] and intercept [hidden] of one variable on one level."""
    cut = [round(len(run) * (1.0 - held_out)) for run in runs]
    first = np.concatenate([run[:n] for run, n in zip(runs, cut, strict=True)])
    rest = np.concatenate([run[n:] for run, n in zip(runs, cut, strict=True)])
    errors = []
    for strength in STRENGTHS:
        slope, intercept = _solve(first, inside, neighbour, strength)
        predicted = np.einsum("thk,hk->th", rest[:, neighbour], slope) + intercept
        errors.append(np.mean((predicted - rest[:, inside]) ** 2))
    best = STRENGTHS[int(np.argmin(errors))]
    return _solve(np.concatenate(runs), inside, neighbour, best)


def _solve(
    record: Float[np.ndarray, "time cell"],
    inside: Bool[np.ndarray, " cell"],
    neighbour: Int[np.ndarray, "hidden neighbour"],
    strength: float,
) -> tuple[np.ndarray, np.ndarray]:
    """The ridge regression of every hidden cell on its neighbours. The strength is a share of
    their variance."""
    mean = record.mean(axis=0)
    anomaly = record - mean
    target = anomaly[:, inside]
    slope = np.empty(neighbour.shape)
    step = max(1, _BATCH_BYTES // (8 * len(record) * neighbour.shape[1]))
    for start in range(0, len(neighbour), step):
        chosen = slice(start, start + step)
        near = anomaly[:, neighbour[chosen]]
        gram = np.einsum("thk,thl->hkl", near, near, optimize=True)
        cross = np.einsum("thk,th->hk", near, target[:, chosen], optimize=True)
        variance = np.einsum("hkk->h", gram) / gram.shape[-1]
        penalty = np.maximum(strength * variance, 1e-300)[:, None, None] * np.eye(gram.shape[-1])
        slope[chosen] = np.linalg.solve(gram + penalty, cross[..., None])[..., 0]
    intercept = mean[inside] - np.einsum("hk,hk->h", mean[neighbour], slope)
    return slope, intercept


def require_visible(hidden: np.ndarray) -> None:
    """Raise ValueError if no visible cell is left to fill from."""
    if hidden.all():
        raise ValueError("inpainting hides every cell; there is nothing to fill from")


def _flat(field: xr.DataArray) -> Float[np.ndarray, "level time cell"]:
    """A field as a copy in float64 with flat cells; a surface variable has one level."""
    if "level" not in field.dims:
        field = field.expand_dims("level")
    values = field.transpose("level", "time", "latitude", "longitude").to_numpy()
    return values.reshape(*values.shape[:2], -1).astype(np.float64)


def _unflat(values: Float[np.ndarray, "level time cell"], like: xr.DataArray) -> xr.DataArray:
    dims = [dim for dim in ("level", "time", "latitude", "longitude") if dim in like.dims]
    shape = [like.sizes[dim] for dim in dims]
    filled = like.transpose(*dims).copy(data=values.reshape(shape).astype(np.float32))
    return filled.transpose(*like.dims)


def _filled(fields: xr.Dataset, inside: np.ndarray, fill) -> xr.Dataset:
    filled = {}
    for name in map(str, fields.data_vars):
        values = _flat(fields[name])
        flat = values.reshape(-1, values.shape[-1])
        flat[:, inside] = fill(flat)
        filled[name] = _unflat(flat.reshape(values.shape), fields[name])
    return fields.assign(filled)

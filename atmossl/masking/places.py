"""Tasks that hide places (inpainting) or variables and levels (cross-variable), and the regions
that they hide."""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import repeat
from jaxtyping import Bool
from torch import Tensor

from atmossl.batch import Corruption, StreamMask, StreamSpec, StreamWindow
from atmossl.geometry import TOLERANCE_DEG, Grid, nearest_cells, within_longitudes
from atmossl.masking.base import (
    Points,
    StreamMasks,
    TokenLayout,
    TokenLayouts,
    mask_of_points,
    points_of,
    step_hours_of,
    steps_of,
)
from atmossl.masking.tasks import (
    Task,
    TimePlan,
    check_examples,
    given_steps,
    is_example,
    told_examples,
)
from atmossl.settings import NotNegative, Positive
from atmossl.value_faults import as_written, listed


@runtime_checkable
class HiddenCells(Protocol):
    """A set of cells to hide, the same for every window."""

    def contains(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        """True [lat lon] where the cell with this centre (degrees) is hidden."""
        ...

    def check(self, grid: Grid) -> None:
        """Raise ValueError if the region does not fit a store's grid."""
        ...


@dataclass(frozen=True)
class LatLonBox:
    """Cells with centres from south to north and from west eastwards to east, degrees."""

    south: float
    north: float
    west: float
    east: float

    def __post_init__(self) -> None:
        if not -90 <= self.south < self.north <= 90:
            raise ValueError(
                f"box of latitudes {self.south:g} to {self.north:g}; valid: "
                "[south, north, west, east] with -90 <= south < north <= 90"
            )

    def contains(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        rows = (lat >= self.south - TOLERANCE_DEG) & (lat <= self.north + TOLERANCE_DEG)
        return rows[:, None] & within_longitudes(lon, self.west, self.east)[None, :]

    def check(self, grid: Grid) -> None:
        if not self.contains(grid.latitude, grid.longitude).any():
            limits = [self.south, self.north, self.west, self.east]
            raise ValueError(
                f"task.boxes: {as_written(limits)} holds no centre of a cell of the store's grid"
            )


@dataclass(frozen=True)
class CellMask:
    """Hidden cells of one grid. source: the file that they come from, for messages."""

    grid: Grid
    hidden: np.ndarray
    source: str

    def __repr__(self) -> str:
        return described(self.source, self.hidden)

    def contains(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        return self.hidden[
            np.ix_(*nearest_cells(self.grid.latitude, self.grid.longitude, lat, lon))
        ]

    def check(self, grid: Grid) -> None:
        if not self.grid.matches(grid):
            raise ValueError(
                f"{self.source}: its cells are not those of the store: "
                f"{self.grid.difference(grid)}; regrid the mask"
            )
        if not self.hidden.any():
            raise ValueError(f"{self.source} hides no cell; needed: values other than 0 somewhere")


def described(source: str, *arrays: np.ndarray) -> str:
    """A file, by its name and a hash of what was read from it, for the records of requests."""
    digest = hashlib.sha256(b"".join(np.ascontiguousarray(array).tobytes() for array in arrays))
    return f"{source} (sha256 {digest.hexdigest()[:8]})"


@dataclass(frozen=True)
class AllButStations:
    """Every cell without a station, stations being a given share of all cells, drawn by seed."""

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.share < 1.0:
            raise ValueError(f"task.observed={self.share:g} must be a share between 0 and 1")

    def contains(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        rows, columns = _label(np.asarray(lat) + 90.0), _label(np.asarray(lon) % 360.0)
        key = (rows[:, None] << np.uint64(32)) + columns[None, :]
        return _uniform(key, self.seed) >= self.share

    def check(self, grid: Grid) -> None:
        del grid


def _label(degrees: np.ndarray) -> np.ndarray:
    """Coordinates as integers. The offset keeps the usual spacings (multiples of 1/64 and of 1/3
    degree) off the edge between two integers, where rounding would decide."""
    return np.floor(degrees.astype(np.float64) * 100 + 0.16).astype(np.uint64)


def _uniform(key: np.ndarray, seed: int) -> np.ndarray:
    """A number in [0, 1) for every key, always the same for the same key and seed (the mixer of
    SplitMix64, Steele, Lea and Flood 2014)."""
    with np.errstate(over="ignore"):
        state = key + np.uint64(seed + 1) * np.uint64(0x9E3779B97F4A7C15)
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
        state = state ^ (state >> np.uint64(31))
    return (state >> np.uint64(11)).astype(np.float64) / 2**53


@dataclass(frozen=True)
class Inpainting(Task):
    """Hide every cell that lies in one of the regions, in all variables and levels.

    A token with some cells hidden shows the mean of the others, as a coarse one; given cells are
    written as they are. hidden_hours: only so long in the middle of the window; at all its steps
    by default. missing: hide the store's missing values as well, each in its own variable.
    gaps: those of one window, by stream; see `with_gaps_of`. The middle step is written.
    """

    regions: Sequence[HiddenCells]
    hidden_hours: float | None = None
    missing: bool = False
    gaps: tuple[Points, ...] | None = None

    def __post_init__(self) -> None:
        if not self.regions and not self.missing:
            raise ValueError(
                "task.boxes, task.mask_file, task.observed and task.stations are empty and "
                "task.missing=false; give one"
            )

    @property
    def fills_missing(self) -> bool:
        return self.missing

    @property
    def hides_at_any_time(self) -> bool:
        return self.hidden_hours is None

    def with_gaps_of(self, windows: tuple[StreamWindow, ...]) -> Task:
        if not self.missing:
            return self
        nothing = (torch.zeros_like(window.fields, dtype=torch.bool) for window in windows)
        gaps = (
            none if window.valid is None or window.spec.role != "predict" else ~window.valid
            for window, none in zip(windows, nothing, strict=True)
        )
        return replace(self, gaps=tuple(gaps))

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        if self.hidden_hours is not None:
            count = steps_of("task.hidden_time", self.hidden_hours, step_hours)
            if count > num_steps:
                raise ValueError(
                    f"task.hidden_time={self.hidden_hours:g} h is longer than the window's "
                    f"{num_steps} steps of {step_hours:g} h; valid: up to all of them, null"
                )
        return TimePlan(num_steps // 2, (0,), tuple(range(num_steps)))

    def check(self, grid: Grid) -> None:
        for region in self.regions:
            region.check(grid)

    def hidden_points(self, layouts: TokenLayouts) -> tuple[Points, ...]:
        hidden = tuple(
            self._hidden(layout, step_hours_of(layouts))
            if layout.spec.role == "predict"
            else points_of(layout.nothing_hidden().hidden, layout.spec)
            for layout in layouts
        )
        if self.gaps is None:
            return hidden
        return tuple(points | gap for points, gap in zip(hidden, self.gaps, strict=True))

    def cells(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        """Hidden cells [lat lon] among those of the given centres, degrees, gaps apart."""
        hidden = np.zeros((len(lat), len(lon)), bool)
        for region in self.regions:
            hidden |= region.contains(lat, lon)
        return hidden

    def hidden_cells(self, grid: Grid) -> np.ndarray:
        return self.cells(grid.latitude, grid.longitude)

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        cells = self.hidden_cells(grid)
        share = (grid.weights[:, None] * cells).sum() / (cells.shape[1] * grid.weights.sum())
        start = given_steps(plan, step_hours)
        return f"{start} without {share:.1%} of the area, which alone is predicted and scored."

    def why_unscored(self) -> str | None:
        if not self.missing:
            return None
        return (
            "missing=true fills what has no truth; to score it, hide cells that are known: boxes, "
            "mask_file, observed or stations"
        )

    def _hidden(self, layout: TokenLayout, step_hours: float) -> Points:
        cells = self.cells(layout.point_lat().numpy(), layout.point_lon().numpy())
        times = layout.point_times().flatten()
        steps = torch.ones(len(times), dtype=torch.bool)
        if self.hidden_hours is not None:
            middle = times[len(times) // 2]
            if round(self.hidden_hours / step_hours) % 2 == 0:
                middle = middle - step_hours / 2  # of the middle step and the one before it
            steps = (times - middle).abs() < self.hidden_hours / 2
        where = steps[:, None, None] & torch.from_numpy(cells)
        return repeat(where, "time lat lon -> level time lat lon", level=layout.spec.num_levels)

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        return tuple(
            mask_of_points(hidden, layout.spec)
            for hidden, layout in zip(self.hidden_points(layouts), layouts, strict=True)
        )


@dataclass(frozen=True)
class CrossVariable(Task):
    """Hide whole variables, levels, or variables at levels, at all steps and places.

    variables: those of whole streams, all by default. levels: in hPa, all by default. The middle
    step is written. examples: so many steps before it are shown whole, as demonstrations.
    """

    variables: tuple[str, ...] = ()
    levels: tuple[Positive, ...] = ()
    examples: NotNegative = 0

    def __post_init__(self) -> None:
        if not self.variables and not self.levels:
            raise ValueError("task.variables and task.levels are empty; name what is to be hidden")

    @property
    def hides_at_any_time(self) -> bool:
        return not self.examples

    @property
    def scored_variables(self) -> tuple[str, ...]:
        return self.variables

    @property
    def scored_levels(self) -> tuple[int, ...]:
        return self.levels

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        names = ", ".join(name.replace("_", " ") for name in self.variables) or "all variables"
        where = f" at {', '.join(map(str, self.levels))} hPa" if self.levels else ""
        start = given_steps(plan, step_hours)
        shown = told_examples(self.examples)
        return f"{start}. Hidden at all of them{shown}, and predicted: {names}{where}."

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        check_examples(self.examples, num_steps)
        return TimePlan(num_steps // 2, (0,), tuple(range(num_steps)))

    def _check(self, specs: Sequence[StreamSpec]) -> None:
        predicted = [spec for spec in specs if spec.role == "predict"]
        for key, named, have in (
            ("variables", self.variables, {v for s in predicted for v in s.variables}),
            ("levels", self.levels, {level for s in predicted for level in s.level_values}),
        ):
            unknown = sorted(set(named) - have)
            if unknown:
                raise ValueError(
                    f"task.{key}={as_written(unknown)} are not predicted; valid: "
                    f"{listed(sorted(have))}"
                )

    def _hidden_levels(self, spec: StreamSpec) -> Bool[Tensor, "level"]:
        """Which token levels of a stream are hidden.

        Raises:
            ValueError: the stream's tokens hold other variables or levels as well.
        """
        inside = [name in self.variables or not self.variables for name in spec.variables]
        if any(inside) and not all(inside):
            raise ValueError(
                f"task.variables={as_written(self.variables)} share tokens of stream {spec.name} "
                f"with other variables ({listed(spec.variables)}), so they cannot be hidden alone; "
                "hide them all, or use a checkpoint with a stream of their own, such as "
                "checkpoint=default_streams"
            )
        levels = torch.tensor([level in self.levels or not self.levels for level in
                               spec.level_values])  # fmt: skip
        tokens = levels.view(-1, spec.token_size.level)
        if bool((tokens.any(dim=1) != tokens.all(dim=1)).any()):
            raise ValueError(
                f"task.levels={as_written(self.levels)} share tokens of stream {spec.name} with "
                f"other levels, so they cannot be hidden alone: a token holds "
                f"{spec.token_size.level} of {listed(spec.level_values)} hPa"
            )
        return tokens.all(dim=1) & all(inside)

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        self._check([layout.spec for layout in layouts])
        masks = []
        for layout in layouts:
            corruption = layout.nothing_hidden().corruption
            if layout.spec.role == "predict":
                corruption[self._hidden_levels(layout.spec)] = int(Corruption.MASK)
            if self.examples:
                shown = is_example(layout, layouts, self.examples)
                corruption[:, shown] = int(Corruption.VISIBLE)
            masks.append(StreamMask(corruption))
        if all(bool(mask.hidden.all()) for mask in masks):
            raise ValueError(
                "task.variables hides every stream; leave at least one of them visible"
            )
        return tuple(masks)

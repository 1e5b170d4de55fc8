"""Fits and applies one ridge regression per latitude row, on the neighbourhood of all fields.

Hoerl and Kennard (1970), Technometrics 12: slopes minimise mean squared error + strength * sum of
squared slopes of standardised inputs. The strength of each output is the one with the least error
on the held-out end of every training run; slopes are then fitted again to all of it.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr
from einops import rearrange
from jaxtyping import Float
from numpy.lib.stride_tricks import sliding_window_view
from scipy.linalg import cho_factor, cho_solve

from atmossl.evaluation.alignment import grid_of, require_labels
from atmossl.evaluation.ridge.moments import RidgeMoments, RowMoments
from atmossl.evaluation.ridge.predictors import Block, RidgeTask
from atmossl.evaluation.spatial import Coarsening
from atmossl.evaluation.sphere import Halo, polar_sign
from atmossl.geometry import Grid
from atmossl.value_faults import listed

STRENGTHS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)
_BLOCK_TIMES = 8
_HELD_OUT = 0.2


@dataclass(frozen=True)
class Channels:
    """Order of the channels: a channel is a variable on one level. `levels` is empty for a surface
    variable.

    Attributes:
        attrs: the variables' attributes (units, standard names), handed on to predictions.
    """

    levels: Mapping[str, np.ndarray]
    attrs: Mapping[str, dict]

    @classmethod
    def of(cls, dataset: xr.Dataset) -> "Channels":
        levels = {
            str(name): field["level"].to_numpy() if "level" in field.dims else np.empty(0)
            for name, field in dataset.data_vars.items()
        }
        return cls(levels, {name: dict(dataset[name].attrs) for name in levels})

    @property
    def signs(self) -> Float[np.ndarray, " channel"]:
        """Sign of each channel across a pole."""
        signs = [np.full(max(1, len(lev)), polar_sign(name)) for name, lev in self.levels.items()]
        return np.concatenate(signs)

    def __len__(self) -> int:
        return len(self.signs)

    def stack(self, dataset: xr.Dataset) -> Float[np.ndarray, "time channel lat lon"]:
        """The dataset as an array in float64.

        Raises:
            ValueError: a variable or level is missing, or a value is not finite.
        """
        missing = sorted(set(self.levels) - set(dataset.data_vars))
        if missing:
            raise ValueError(
                f"variables: the dataset lacks {listed(missing)}, needs {listed(self.levels)}"
            )
        parts = [self._variable(dataset, name, levels) for name, levels in self.levels.items()]
        return np.concatenate(parts, axis=1)

    def _variable(self, dataset: xr.Dataset, name: str, levels: np.ndarray) -> np.ndarray:
        field = dataset[name]
        if len(levels):
            require_labels(levels, field["level"].to_numpy(), "level", name)
            field = field.sel(level=levels)
        else:
            field = field.expand_dims("level")
        values = field.transpose("time", "level", "latitude", "longitude").to_numpy()
        if not np.isfinite(values).all():
            raise ValueError(f"{name}: ridge regression needs finite values, found missing ones")
        return values.astype(np.float64)

    def unstack(
        self, values: Float[np.ndarray, "*batch channel lat lon"], coords: Mapping[str, np.ndarray]
    ) -> xr.Dataset:
        """Dataset of float32; `coords` names the batch dims in order, then latitude, longitude."""
        batch_dims = [dim for dim in coords if dim not in ("latitude", "longitude")]
        fields, first = {}, 0
        for name, levels in self.levels.items():
            chosen = values[..., first : first + max(1, len(levels)), :, :].astype(np.float32)
            first += max(1, len(levels))
            dims = (*batch_dims, "level", "latitude", "longitude")
            field = xr.DataArray(chosen, coords, dims, attrs=self.attrs[name])
            has_level = len(levels) > 0
            fields[name] = (
                field.assign_coords(level=levels) if has_level else field.squeeze("level")
            )
        return xr.Dataset(fields)


@dataclass(frozen=True)
class _Frame:
    """One task on one grid: shapes, halos, and the residual in the layout of cells."""

    task: RidgeTask
    grid: Grid
    channels: Channels
    radius: int

    @property
    def input_grid(self) -> Grid:
        return Coarsening(self.grid, self.task.factor).coarse

    def anchors(self, num_times: int, *, with_targets: bool) -> np.ndarray:
        return _anchors(self.task, num_times, with_targets=with_targets)

    def inputs(self, block: Block) -> Float[np.ndarray, "anchor channel halo_row halo_col"]:
        """The visible channels of all input steps, with a halo; wide enough for lags of 2 *
        radius."""
        coarsening = Coarsening(self.grid, self.task.factor)
        halo = Halo(self.input_grid, self.radius, 2 * self.radius)
        signs = self.channels.signs[self.visible, None, None]
        steps = [block.at(offset)[:, self.visible] for offset in self.task.input_offsets]
        return np.concatenate(
            [halo.extend(coarsening.block_mean(step), signs) for step in steps], axis=1
        )

    @property
    def visible(self) -> list[int]:
        """The channels that are inputs."""
        return [n for n in range(len(self.channels)) if n not in self.task.hidden_channels]

    def to_cells(self, values: np.ndarray) -> Float[np.ndarray, "anchor output row col"]:
        return rearrange(
            values,
            "anchor target channel (row y) (col x) -> anchor (target channel y x) row col",
            y=self.task.factor,
            x=self.task.factor,
        )

    def from_cells(self, outputs: np.ndarray) -> np.ndarray:
        return rearrange(
            outputs,
            "anchor (target channel y x) row col -> anchor target channel (row y) (col x)",
            target=len(self.task.target_offsets),
            y=self.task.factor,
            x=self.task.factor,
        )

    def residual(self, block: Block) -> Float[np.ndarray, "anchor output row col"]:
        targets = np.stack([block.at(offset) for offset in self.task.target_offsets], axis=1)
        return self.to_cells(targets - self.task.trivial(block))

    def blocks(
        self, segment: xr.Dataset, anchors: np.ndarray, *, with_targets: bool
    ) -> Iterator[Block]:
        """The run in blocks of a few anchors, so that memory stays bounded."""
        offsets = (*self.task.input_offsets, *(self.task.target_offsets if with_targets else ()))
        for start in range(0, len(anchors), _BLOCK_TIMES):
            chosen = anchors[start : start + _BLOCK_TIMES]
            first = int(chosen[0]) + min(0, *offsets)
            times = slice(first, int(chosen[-1]) + max(0, *offsets) + 1)
            fields = self.channels.stack(segment.isel(time=times))
            yield Block(fields, chosen - first, self.grid, self.channels.signs)


@dataclass(frozen=True)
class RidgeModel:
    """A fitted ridge regression.

    Attributes:
        centre: taken off the inputs, for every halo row and input channel.
        slope, intercept: in the inputs' and outputs' units, one set per latitude row.
        strength: chosen penalty of every output.
        limits: smallest and largest value of the training runs.
    """

    frame: _Frame
    centre: Float[np.ndarray, "channel halo_row"]
    slope: Float[np.ndarray, "row feature output"]
    intercept: Float[np.ndarray, "row output"]
    strength: Float[np.ndarray, " output"]
    limits: Float[np.ndarray, "end channel lat"]

    def predict(
        self, dataset: xr.Dataset, times: np.ndarray | xr.DataArray | None = None
    ) -> xr.Dataset:
        """Predictions from one run at full resolution, without `member`.

        `times` are init times of a forecast, else hidden times; all possible ones by default.
        Only the task's inputs are read from the dataset, never its targets.

        Raises:
            ValueError: another grid, uneven time steps, or times without all their inputs.
        """
        anchors = self._anchors_at(dataset, times)
        blocks = self.frame.blocks(dataset, anchors, with_targets=False)
        values = np.concatenate([self._predict_block(block) for block in blocks])
        return _to_dataset(self.frame, values, dataset, anchors, self.frame.task.target_offsets)

    def roll_out(
        self, dataset: xr.Dataset, times: np.ndarray | xr.DataArray, num_steps: int
    ) -> xr.Dataset:
        """Forecasts of `num_steps` steps from the init times, without `member`, in passes of as
        many steps as the regression predicts; each pass goes on from the states of the one before.

        A regression that is fitted to one pass may grow without bound in many. So all states are
        kept within the smallest and largest value of the training runs by channel and latitude.

        Raises:
            ValueError: as `predict`.
        """
        leads = self.frame.task.target_offsets
        assert self.frame.task.is_forecast and leads == tuple(range(1, len(leads) + 1)), leads
        anchors = self._anchors_at(dataset, times)
        blocks = self.frame.blocks(dataset, anchors, with_targets=False)
        values = np.concatenate([self._pass_by_pass(block, num_steps) for block in blocks])
        return _to_dataset(self.frame, values, dataset, anchors, range(1, num_steps + 1))

    def _anchors_at(
        self, dataset: xr.Dataset, times: np.ndarray | xr.DataArray | None
    ) -> np.ndarray:
        """The steps of a run at some times, or all that have their inputs; ValueError as
        `predict`."""
        frame = self.frame
        _require_run(dataset, frame.grid)
        anchors = frame.anchors(dataset.sizes["time"], with_targets=False)
        if times is not None:
            dates, present = np.atleast_1d(np.asarray(times)), dataset["time"].to_numpy()
            require_labels(dates, present[anchors], "time", "the run (with its input steps)")
            anchors = np.searchsorted(present, dates)
        if len(anchors) == 0:
            raise ValueError(
                f"time: {dataset.sizes['time']} steps are too few for inputs at steps "
                f"{listed(frame.task.input_offsets)} around each prediction"
            )
        return anchors

    def _pass_by_pass(
        self, block: Block, num_steps: int
    ) -> Float[np.ndarray, "anchor step channel lat lon"]:
        inputs = [block.at(offset) for offset in self.frame.task.input_offsets]
        count = len(inputs)
        states = np.stack(inputs, axis=1)
        ends = count * np.arange(1, len(block.anchors) + 1) - 1  # the last state of every anchor
        while states.shape[1] < count + num_steps:
            fields = rearrange(states[:, -count:], "anchor step ... -> (anchor step) ...")
            last_states = replace(block, fields=fields, anchors=ends)
            predicted = np.clip(self._predict_block(last_states), *self.limits[..., None])
            states = np.concatenate([states, predicted], axis=1)
        return states[:, count : count + num_steps]

    def _predict_block(self, block: Block) -> np.ndarray:
        frame = self.frame
        inputs = frame.inputs(block) - self.centre[:, :, None]
        width = 2 * frame.radius + 1
        num_rows, num_cols = frame.input_grid.shape
        inner = inputs[..., frame.radius : frame.radius + num_cols + width - 1]
        shifted = sliding_window_view(inner, num_cols, axis=-1)
        outputs = []
        for row in range(num_rows):
            x = rearrange(shifted[:, :, row : row + width], "a c dy dx col -> a col (dy dx c)")
            outputs.append(x @ self.slope[row] + self.intercept[row])
        cells = rearrange(outputs, "row anchor col output -> anchor output row col")
        return frame.task.trivial(block) + frame.from_cells(cells)


def fit_ridge(
    segments: Sequence[xr.Dataset],
    task: RidgeTask,
    *,
    radius: int = 2,
    strengths: Sequence[float] = STRENGTHS,
    held_out: float = _HELD_OUT,
) -> RidgeModel:
    """Fit the regression on training runs only. held_out: the share at each run's end that chooses
    strengths.

    Raises:
        ValueError: no segments, different or non-global grids, or runs that are too short.
    """
    if not segments:
        raise ValueError("segments: ridge regression needs one training run or more, got none")
    frame = _Frame(task, grid_of(segments[0]), Channels.of(segments[0]), radius)
    for segment in segments:
        _require_run(segment, frame.grid)
    check_runs(frame.grid, [segment.sizes["time"] for segment in segments], task, held_out=held_out)
    centre = _first_block_mean(frame, segments[0])
    fit, held, limits = _accumulate(frame, segments, centre, held_out)
    num_rows = frame.input_grid.shape[0]
    error = np.zeros((len(strengths), fit.sum_y.shape[-1]))
    for row in range(num_rows):
        error += _held_out_error(fit.of_row(row), held.of_row(row), strengths) / num_rows
    strength = np.asarray(strengths)[error.argmin(axis=0)]
    whole = fit + held
    lines = [_solve_row(whole.of_row(row), strength) for row in range(num_rows)]
    slope, intercept = (np.stack(part) for part in zip(*lines, strict=True))
    return RidgeModel(frame, centre, slope, intercept, strength, limits)


def check_runs(
    grid: Grid, num_times: Sequence[int], task: RidgeTask, *, held_out: float = _HELD_OUT
) -> None:
    """Raise ValueError if `fit_ridge` cannot use training runs with these numbers of steps."""
    if not grid.periodic:
        raise ValueError("longitude: ridge regression needs a grid that closes the circle")
    counts = [len(_anchors(task, count, with_targets=True)) for count in num_times]
    if counts[0] == 0:
        raise ValueError(
            f"time: a run of {num_times[0]} steps is too short for inputs at steps "
            f"{listed(task.input_offsets)} and targets at {listed(task.target_offsets)}"
        )
    num_fit = sum(_num_fit(count, held_out) for count in counts)
    if num_fit in (0, sum(counts)):
        raise ValueError(
            f"time: runs of {listed(num_times)} steps are too short for a regression: of "
            f"{sum(counts)} samples {num_fit} are fitted, and the others choose its strength"
        )


def _anchors(task: RidgeTask, num_times: int, *, with_targets: bool) -> np.ndarray:
    """The steps of a run around which all inputs, and with targets all targets, lie inside it."""
    offsets = task.input_offsets
    offsets = (*offsets, *task.target_offsets) if with_targets else offsets
    return np.arange(max(0, -min(offsets)), num_times - max(0, *offsets))


def _num_fit(num_anchors: int, held_out: float) -> int:
    return round(num_anchors * (1.0 - held_out))


def _require_run(segment: xr.Dataset, grid: Grid) -> None:
    differs = grid_of(segment).difference(grid)
    if differs:
        raise ValueError(
            f"latitude, longitude: a run is on other cells than the first training run: {differs}"
        )
    steps = np.unique(np.diff(segment["time"].to_numpy()))
    if len(steps) > 1:
        raise ValueError(
            f"time: one run needs even steps, found steps from {steps[0]} to {steps[-1]}; "
            "pass independent runs apart"
        )


def _first_block_mean(frame: _Frame, segment: xr.Dataset) -> np.ndarray:
    """A rough centre of the inputs [channel, halo_row], so that sums of squares lose no digits."""
    anchors = frame.anchors(segment.sizes["time"], with_targets=True)
    block = next(frame.blocks(segment, anchors, with_targets=True))
    return frame.inputs(block).mean(axis=(0, -1))


def _accumulate(
    frame: _Frame, segments: Sequence[xr.Dataset], centre: np.ndarray, held_out: float
) -> tuple[RidgeMoments, RidgeMoments, Float[np.ndarray, "end channel lat"]]:
    """The moments of the fitted and of the held-out part, and the smallest and largest values."""
    task = frame.task
    num_targets = len(task.target_offsets) * len(frame.channels)
    parts = [
        RidgeMoments.zeros(
            radius=frame.radius,
            num_rows=frame.input_grid.shape[0],
            num_channels=len(task.input_offsets) * len(frame.visible),
            num_outputs=num_targets * task.factor**2,
        )
        for _ in range(2)
    ]
    low, high = np.inf, -np.inf
    for segment in segments:
        anchors = frame.anchors(segment.sizes["time"], with_targets=True)
        num_fit = _num_fit(len(anchors), held_out)
        for moments, chosen in zip(parts, np.split(anchors, [num_fit]), strict=True):
            for block in frame.blocks(segment, chosen, with_targets=True):
                moments.add(frame.inputs(block) - centre[:, :, None], frame.residual(block))
                low = np.minimum(low, block.fields.min(axis=(0, -1)))
                high = np.maximum(high, block.fields.max(axis=(0, -1)))
    return parts[0], parts[1], np.stack([low, high])


class _Standardised:
    """Centred and scaled normal equations of one row, solved for any strength."""

    def __init__(self, row: RowMoments) -> None:
        self.row = row
        gram = row.gram - np.outer(row.mean_x, row.mean_x)
        variance = np.diag(gram)
        constant = variance <= 1e-12 * np.diag(row.gram)  # left of rounding; takes no slope
        self.scale = np.where(constant, np.inf, np.sqrt(np.where(constant, 1.0, variance)))
        self.gram = gram / self.scale[:, None] / self.scale
        self.cross = (row.cross - np.outer(row.mean_x, row.mean_y)) / self.scale[:, None]

    def solve(self, strength: float, outputs: slice | np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The slope [feature, output] and intercept [output] in the inputs' units."""
        penalised = self.gram + strength * np.eye(len(self.gram))
        solution = cho_solve(cho_factor(penalised, lower=True), self.cross[:, outputs])
        slope = solution / self.scale[:, None]
        return slope, self.row.mean_y[outputs] - self.row.mean_x @ slope


def _held_out_error(
    fit: RowMoments, held: RowMoments, strengths: Sequence[float]
) -> Float[np.ndarray, "strength output"]:
    equations = _Standardised(fit)
    lines = [equations.solve(strength, slice(None)) for strength in strengths]
    return np.stack([held.squared_error(*line) for line in lines])


def _solve_row(row: RowMoments, strength: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    equations = _Standardised(row)
    slope, intercept = np.empty(row.cross.shape), np.empty(len(strength))
    for value in np.unique(strength):
        chosen = np.flatnonzero(strength == value)
        slope[:, chosen], intercept[chosen] = equations.solve(float(value), chosen)
    return slope, intercept


def _to_dataset(
    frame: _Frame,
    values: np.ndarray,
    dataset: xr.Dataset,
    anchors: np.ndarray,
    offsets: Sequence[int],
) -> xr.Dataset:
    time = dataset["time"].to_numpy()
    cells = {
        "latitude": dataset["latitude"].to_numpy(),
        "longitude": dataset["longitude"].to_numpy(),
    }
    if not frame.task.is_forecast:
        hidden_step = 0
        return frame.channels.unstack(values[:, hidden_step], {"time": time[anchors], **cells})
    lead = np.asarray(offsets) * (time[1] - time[0])
    return frame.channels.unstack(values, {"init_time": time[anchors], "lead_time": lead, **cells})

"""What the ridge regression reads and writes: steps, neighbourhoods and residuals of a task."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from einops import rearrange, reduce

from atmossl.evaluation.fields import FieldTable
from atmossl.evaluation.interpolation import Coarsening, cubic_taps

RADIUS = 2


@dataclass(frozen=True)
class RidgeTask:
    """Steps read and written relative to an origin, and the trivial prediction.

    `trivial_weights` has one weight per input step; with `factor` > 1 the inputs are block means
    and the trivial prediction is refined bicubically.
    """

    name: str
    input_steps: tuple[int, ...]
    target_steps: tuple[int, ...]
    trivial_weights: tuple[float, ...]
    factor: int = 1


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name}={number} must be at least 1")


def forecast_task(*, history: int = 2, lead_steps: tuple[int, ...] = (1, 2)) -> RidgeTask:
    """Forecast from the last `history` steps; falls back to persistence."""
    _at_least_one(history=history, lead_step=min(lead_steps))
    weights = (0.0,) * (history - 1) + (1.0,)
    return RidgeTask("forecast", tuple(range(1 - history, 1)), tuple(lead_steps), weights)


def temporal_interpolation_task(*, neighbours: int = 1) -> RidgeTask:
    """One hidden step from `neighbours` steps on each side; falls back to the straight line."""
    _at_least_one(neighbours=neighbours)
    steps = tuple(step for step in range(-neighbours, neighbours + 1) if step)
    weights = tuple(0.5 if abs(step) == 1 else 0.0 for step in steps)
    return RidgeTask("temporal_interpolation", steps, (0,), weights)


def downscaling_task(*, factor: int = 4, times: int = 1) -> RidgeTask:
    """Fine cells from coarse ones at `times` (odd) steps around; falls back to bicubic."""
    _at_least_one(factor=factor, times=times)
    if times % 2 == 0:
        raise ValueError(f"times={times} must be odd: the same step and as many on each side")
    steps = tuple(range(-(times // 2), times // 2 + 1))
    return RidgeTask("downscaling", steps, (0,), tuple(float(step == 0) for step in steps), factor)


@dataclass(frozen=True)
class Standardiser:
    """Mean and standard deviation [field, latitude] over training times and longitudes."""

    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, stacks: Sequence[np.ndarray]) -> "Standardiser":
        """Two passes in float64; constant fields get a deviation of one."""
        count = sum(len(stack) * stack.shape[-1] for stack in stacks)
        pattern = "time field lat lon -> field lat"
        mean = sum(reduce(stack.astype(np.float64), pattern, "sum") for stack in stacks) / count
        centre = rearrange(mean, "field lat -> field lat 1")
        squares = [reduce((stack - centre) ** 2, pattern, "sum") for stack in stacks]
        deviation = np.sqrt(sum(squares) / count)
        floor = 1e-6 * np.maximum(np.abs(mean), 1e-30)
        return cls(mean, np.where(deviation > floor, deviation, 1.0))

    def forward(self, fields: np.ndarray) -> np.ndarray:
        """Standardised fields [time, field, latitude, longitude]."""
        mean, deviation = (
            rearrange(each, "field lat -> field lat 1") for each in (self.mean, self.deviation)
        )
        return (fields - mean) / deviation


def neighbourhoods(fields: np.ndarray, row: int) -> np.ndarray:
    """Inputs [time, longitude, feature] around every cell of one row of [time, field, lat, lon].

    Features run over field, south-north and west-east offset.
    """
    rows = np.clip(np.arange(row - RADIUS, row + RADIUS + 1), 0, fields.shape[-2] - 1)
    columns = np.arange(-RADIUS, fields.shape[-1] + RADIUS) % fields.shape[-1]
    slab = fields[..., rows, :][..., columns]
    windows = np.lib.stride_tricks.sliding_window_view(slab, 2 * RADIUS + 1, axis=-1)
    return rearrange(windows, "time field dy lon dx -> time lon (field dy dx)")


@dataclass(frozen=True)
class RidgeProblem:
    """Everything needed to turn fields into regression inputs and residuals."""

    task: RidgeTask
    table: FieldTable
    blocks: Coarsening
    coarse_scale: Standardiser
    fine_deviation: np.ndarray

    @property
    def num_rows(self) -> int:
        return len(self.blocks.latitude) // self.task.factor

    @property
    def num_features(self) -> int:
        """Neighbourhoods of all fields at all input steps, and the constant."""
        num_steps = len(self.task.input_steps)
        return self.table.num_fields * num_steps * (2 * RADIUS + 1) ** 2 + 1

    @property
    def num_outputs(self) -> int:
        return self.table.num_fields * len(self.task.target_steps) * self.task.factor**2

    def standardise(self, fields: np.ndarray) -> np.ndarray:
        """Standardised inputs [time, field, row, column] of fine fields."""
        return self.coarse_scale.forward(self.blocks.block_mean(fields))

    def trivial(self, at_inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Trivial prediction [time, field, lat, lon] from the fine fields at each input step."""
        weighted = zip(self.task.trivial_weights, at_inputs, strict=True)
        mixed = sum(weight * fields.astype(np.float64) for weight, fields in weighted if weight)
        return self.blocks.refine(self.blocks.block_mean(mixed), cubic_taps)

    def inputs(self, standardised: Sequence[np.ndarray], row: int) -> np.ndarray:
        """Design matrix [sample, feature] of one row, the last feature being the constant."""
        steps = [neighbourhoods(fields, row) for fields in standardised]
        steps.append(np.ones((*steps[0].shape[:2], 1)))
        return rearrange(np.concatenate(steps, axis=-1), "time lon feature -> (time lon) feature")

    def outputs_of_row(self, residual: np.ndarray, row: int) -> np.ndarray:
        """Targets [sample, output] of one input row from [time, lead, field, lat, lon]."""
        south = row * self.task.factor
        band = residual[..., south : south + self.task.factor, :]
        pattern = "time lead field dy (column dx) -> (time column) (lead field dy dx)"
        return rearrange(band, pattern, dx=self.task.factor)

    def row_of_outputs(self, outputs: np.ndarray, num_times: int) -> np.ndarray:
        """The inverse of `outputs_of_row`: [time, lead, field, south-north, lon]."""
        return rearrange(
            outputs,
            "(time column) (lead field dy dx) -> time lead field dy (column dx)",
            time=num_times,
            lead=len(self.task.target_steps),
            dy=self.task.factor,
            dx=self.task.factor,
        )

    def residual(self, fields: np.ndarray, origins: np.ndarray) -> np.ndarray:
        """(truth - trivial) / deviation, [time, lead, field, lat, lon]."""
        trivial = self.trivial([fields[origins + step] for step in self.task.input_steps])
        truth = np.stack([fields[origins + step] for step in self.task.target_steps], axis=1)
        difference = truth - rearrange(trivial, "time field lat lon -> time 1 field lat lon")
        return difference / rearrange(self.fine_deviation, "field lat -> field lat 1")


def build_problem(
    segments: Sequence[xr.Dataset], task: RidgeTask
) -> tuple[RidgeProblem, list[np.ndarray]]:
    """The regression of a task on these segments, and their fields [time, field, lat, lon]."""
    first = segments[0]
    table = FieldTable.of(first)
    blocks = Coarsening(first["latitude"].values, first["longitude"].values, task.factor)
    stacks = [table.stack(segment) for segment in segments]
    coarse_scale = Standardiser.of([blocks.block_mean(stack) for stack in stacks])
    fine_deviation = Standardiser.of(stacks).deviation
    return RidgeProblem(task, table, blocks, coarse_scale, fine_deviation), stacks

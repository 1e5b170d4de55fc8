"""Ridge regression on 5 x 5 neighbourhoods of all fields: the linear baseline to beat.

One regression per latitude row of the input grid, samples pooled over longitude and time.
Inputs are all fields standardised per field and latitude row, at the input steps of the task, in
a neighbourhood that is periodic in longitude and clamped at the poles. The target is the residual
from the task's trivial prediction, so that strong regularisation falls back to that one exactly.

    W = argmin |X W - R|^2 / n + strength |W|^2,   R = (truth - trivial) / standard deviation

The normal equations are accumulated in float64 over blocks of times; the strength is chosen per
row and output on the last part of every training segment, then all of it is used for the fit.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr
from einops import rearrange

from atmossl.evaluation.baselines import as_prediction
from atmossl.evaluation.ridge_problem import RidgeProblem, RidgeTask, build_problem

STRENGTHS = (1e-8, 1e-6, 1e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, np.inf)


@dataclass
class NormalEquations:
    """Sums X'X [row, feature, feature], X'R [row, feature, output] and R'R [row, output]."""

    gram: np.ndarray
    cross: np.ndarray
    power: np.ndarray
    num_samples: int = 0

    @classmethod
    def zeros(cls, problem: RidgeProblem) -> "NormalEquations":
        rows, features, outputs = problem.num_rows, problem.num_features, problem.num_outputs
        return cls(
            np.zeros((rows, features, features)),
            np.zeros((rows, features, outputs)),
            np.zeros((rows, outputs)),
        )

    def add(self, row: int, inputs: np.ndarray, targets: np.ndarray) -> None:
        self.gram[row] += inputs.T @ inputs
        self.cross[row] += inputs.T @ targets
        self.power[row] += np.square(targets).sum(axis=0)

    def absorb(self, other: "NormalEquations") -> None:
        """Add the sums of another part of the record."""
        self.gram += other.gram
        self.cross += other.cross
        self.power += other.power
        self.num_samples += other.num_samples


@dataclass(frozen=True)
class RidgeModel:
    """A fitted regression: coefficients [row, feature, output], strength [row, output]."""

    problem: RidgeProblem
    coefficients: np.ndarray
    strength: np.ndarray
    step: np.timedelta64

    def predict(self, dataset: xr.Dataset, *, times: np.ndarray | None = None) -> xr.Dataset:
        """Prediction with one member at init times (forecast) or valid times `times`.

        Default: every time of the dataset whose input steps are all there. A hidden or future
        step is never read; for downscaling the dataset is fine and coarsened here.

        Raises:
            ValueError: input steps that the dataset lacks, or another grid.
        """
        self._check_grid(dataset)
        task = self.problem.task
        fields = self.problem.table.stack(dataset)
        times = self._complete_times(dataset) if times is None else np.asarray(times)
        at = {step: self._find(dataset, times, step) for step in task.input_steps}
        blocks = np.array_split(np.arange(len(times)), max(1, len(times) // 32))
        parts = [
            self._predict_block([fields[at[step][block]] for step in task.input_steps])
            for block in blocks
        ]
        return self._label(np.concatenate(parts).astype(np.float32), dataset, times)

    def _predict_block(self, at_inputs: Sequence[np.ndarray]) -> np.ndarray:
        problem = self.problem
        standardised = [problem.standardise(fields) for fields in at_inputs]
        rows = [
            problem.row_of_outputs(
                problem.inputs(standardised, row) @ self.coefficients[row], len(standardised[0])
            )
            for row in range(problem.num_rows)
        ]
        residual = rearrange(rows, "row time lead field dy lon -> time lead field (row dy) lon")
        trivial = problem.trivial(at_inputs)
        trivial = rearrange(trivial, "time field lat lon -> time 1 field lat lon")
        return trivial + residual * rearrange(problem.fine_deviation, "field lat -> field lat 1")

    def _complete_times(self, dataset: xr.Dataset) -> np.ndarray:
        times = dataset["time"].values
        wanted = [times + step * self.step for step in self.problem.task.input_steps]
        return times[np.all([np.isin(each, times) for each in wanted], axis=0)]

    def _find(self, dataset: xr.Dataset, times: np.ndarray, step: int) -> np.ndarray:
        positions = dataset.indexes["time"].get_indexer(times + step * self.step)
        if (positions < 0).any():
            first = (times + step * self.step)[positions < 0][0]
            raise ValueError(
                f"times={len(times)} given, but {(positions < 0).sum()} of their inputs at step "
                f"{step} are not in the dataset, the first being {first}"
            )
        return positions

    def _check_grid(self, dataset: xr.Dataset) -> None:
        blocks = self.problem.blocks
        grid = {"latitude": blocks.latitude, "longitude": blocks.longitude}
        for dim, values in grid.items():
            found = dataset[dim].values
            if found.shape != values.shape or not np.allclose(found, values, atol=1e-3):
                raise ValueError(f"{dim} has {len(found)} values unlike the {len(values)} fitted")

    def _label(self, fields: np.ndarray, dataset: xr.Dataset, times: np.ndarray) -> xr.Dataset:
        grid = {dim: dataset[dim] for dim in ("latitude", "longitude")}
        task = self.problem.task
        if task.name == "forecast":
            dims = ("init_time", "lead_time", "level", "latitude", "longitude")
            lead_time = (np.array(task.target_steps) * self.step).astype("timedelta64[ns]")
            axes = {"init_time": times, "lead_time": lead_time}
        else:
            dims, axes = ("time", "level", "latitude", "longitude"), {"time": times}
            fields = rearrange(fields, "time 1 field lat lon -> time field lat lon")
        return as_prediction(self.problem.table.unstack(fields, dims).assign_coords(axes | grid))


def _time_step(segments: Sequence[xr.Dataset]) -> np.timedelta64:
    steps = np.unique(np.concatenate([np.diff(segment["time"].values) for segment in segments]))
    if len(steps) != 1 or steps[0] <= np.timedelta64(0, "ns"):
        raise ValueError(f"segments have time steps {steps}; one positive step is needed")
    return steps[0]


def _origins(task: RidgeTask, num_times: int) -> np.ndarray:
    """Positions in a segment whose input and target steps all lie inside it."""
    steps = (*task.input_steps, *task.target_steps)
    return np.arange(max(0, -min(steps)), num_times - max(0, max(steps)))


def _accumulate(
    problem: RidgeProblem,
    stacks: Sequence[np.ndarray],
    origins_of_stacks: Sequence[np.ndarray],
    block_times: int,
) -> NormalEquations:
    sums = NormalEquations.zeros(problem)
    for fields, origins in zip(stacks, origins_of_stacks, strict=True):
        for start in range(0, len(origins), block_times):
            block = origins[start : start + block_times]
            standardised = [
                problem.standardise(fields[block + step]) for step in problem.task.input_steps
            ]
            residual = problem.residual(fields, block)
            for row in range(problem.num_rows):
                targets = problem.outputs_of_row(residual, row)
                sums.add(row, problem.inputs(standardised, row), targets)
            sums.num_samples += len(block) * standardised[0].shape[-1]
    return sums


class _Solver:
    """Ridge solutions of one row for any strength, from one eigendecomposition of X'X / n."""

    def __init__(self, sums: NormalEquations, row: int) -> None:
        self.values, self.vectors = np.linalg.eigh(sums.gram[row] / sums.num_samples)
        self.values = np.maximum(self.values, 0)
        self.projected = self.vectors.T @ (sums.cross[row] / sums.num_samples)

    def solve(self, strength: np.ndarray | float) -> np.ndarray:
        """Coefficients [feature, output]; `strength` is one number or one per output."""
        shrunk = rearrange(self.values, "feature -> feature 1") + strength
        return self.vectors @ (self.projected / shrunk)


def _choose_strength(
    fit: NormalEquations, held_out: NormalEquations, row: int, strengths: Sequence[float]
) -> np.ndarray:
    """Strength [output] of least squared error on the held-out part, from its sums alone."""
    solver, errors = _Solver(fit, row), []
    for strength in strengths:
        weights = solver.solve(strength)
        explained = 2 * held_out.cross[row] - held_out.gram[row] @ weights
        errors.append(held_out.power[row] - (weights * explained).sum(axis=0))
    return np.asarray(strengths)[np.argmin(errors, axis=0)]


def _check_arguments(segments: Sequence[xr.Dataset], held_out_fraction: float) -> None:
    if not segments:
        raise ValueError("segments is empty; the ridge needs at least one training segment")
    if not 0 < held_out_fraction < 1:
        raise ValueError(f"held_out_fraction={held_out_fraction} must lie strictly in (0, 1)")


def fit_ridge(
    segments: Sequence[xr.Dataset],
    task: RidgeTask,
    *,
    strengths: Sequence[float] = STRENGTHS,
    held_out_fraction: float = 0.2,
    block_times: int = 32,
) -> RidgeModel:
    """Fit one ridge regression per latitude row; no pair of steps spans two segments.

    Raises:
        ValueError: no segments, uneven time steps, segments too short for the task, or a
            fraction outside (0, 1).
    """
    _check_arguments(segments, held_out_fraction)
    step = _time_step(segments)
    problem, stacks = build_problem(segments, task)
    origins = [_origins(task, len(stack)) for stack in stacks]
    cuts = [round(len(each) * (1 - held_out_fraction)) for each in origins]
    if sum(cuts) == 0 or sum(map(len, origins)) == sum(cuts):
        raise ValueError(f"segments have {[len(s) for s in stacks]} times, too few for {task.name}")
    early = [each[:cut] for each, cut in zip(origins, cuts, strict=True)]
    late = [each[cut:] for each, cut in zip(origins, cuts, strict=True)]
    fit, held_out = (_accumulate(problem, stacks, part, block_times) for part in (early, late))
    strength = np.stack(
        [_choose_strength(fit, held_out, row, strengths) for row in range(problem.num_rows)]
    )
    fit.absorb(held_out)
    solutions = [_Solver(fit, row).solve(strength[row]) for row in range(problem.num_rows)]
    return RidgeModel(problem, np.stack(solutions), strength, step)

"""Calibrates the spread of ensembles after training: one factor per task, variable, level and lead
time.

The factor makes the mean variance of the members, times (M + 1) / M, equal to the mean square error
of their mean (Fortin et al. 2014), on dates that the model was not trained on. It is kept in the
checkpoint's record and applied around the ensemble mean, which stays as it is. In a rollout every
pass is inflated, so that members go on from calibrated states.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float

from atmossl.batch import PRIMARY
from atmossl.data.segment import HOUR
from atmossl.inference.plan import BlendedPart, Fields, Plan
from atmossl.masking.tasks import Task


@dataclass(frozen=True)
class SpreadInflation:
    """The factors of one kind of task. hours: [step] from the reference time. factors: [step
    level]."""

    hours: np.ndarray
    factors: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, checkpoint_record: Mapping[str, Any], kind: str) -> "SpreadInflation | None":
        """The factors in a checkpoint's record; None if it was not calibrated for this kind of
        task."""
        stored = checkpoint_record.get("spread", {}).get(kind)
        if stored is None:
            return None
        factors = {name: np.array(values) for name, values in stored["factors"].items()}
        return cls(np.array(stored["hours"]), factors)

    def at(self, name: str, hours: np.ndarray) -> np.ndarray:
        """The factors [step level] of a variable, linear between the calibrated lead times and
        constant beyond."""
        by_level = [np.interp(hours, self.hours, column) for column in self.factors[name].T]
        return np.stack(by_level, axis=1)


@dataclass(frozen=True)
class Calibration:
    """The calibrated spread of one task, from a checkpoint's record.

    A union takes at each cell the largest factor of those parts that hide something there, and
    what it was calibrated for itself on top of it.
    """

    checkpoint_record: Mapping[str, Any]
    task: Task

    def apply(self, fields: Fields, hours: np.ndarray, lat: np.ndarray, lon: np.ndarray) -> Fields:
        """Inflate fields [step member level lat lon] at the given hours from the reference time
        and the given cell centres, degrees."""
        inflated = {}
        for name, values in fields.items():
            factor = _factor(self.checkpoint_record, self.task, name, hours, lat, lon)
            if factor is None:
                inflated[name] = values
                continue
            mean = values.mean(axis=1, keepdims=True)
            inflated[name] = mean + factor[:, None].astype(np.float32) * (values - mean)
        return inflated

    def without_own(self) -> dict[str, Any]:
        """The record as if the task's kind had not been calibrated."""
        spread = self.checkpoint_record.get("spread", {})
        other_kinds = {kind: factors for kind, factors in spread.items() if kind != self.task.kind}
        return {**self.checkpoint_record, "spread": other_kinds}

    def replaced(self, inflation: SpreadInflation) -> dict[str, Any]:
        """The record with these factors for the task's kind; factors of other kinds stay."""
        stored = {
            "hours": inflation.hours.tolist(),
            "factors": {name: values.tolist() for name, values in inflation.factors.items()},
        }
        return {
            **self.checkpoint_record,
            "spread": {**self.checkpoint_record.get("spread", {}), self.task.kind: stored},
        }


def _factor(
    checkpoint_record: Mapping[str, Any],
    task: Task,
    name: str,
    hours: np.ndarray,
    lat: np.ndarray,
    lon: np.ndarray,
) -> Float[np.ndarray, "step level lat lon"] | None:
    """The factors of one variable [step level lat lon]; lat and lon have size 1 if factors are
    the same everywhere."""
    inflation = SpreadInflation.of(checkpoint_record, task.kind)
    task_factor = None if inflation is None else inflation.at(name, hours)[:, :, None, None]
    largest = None
    for part in task.components:
        factor = _factor(checkpoint_record, part, name, hours, lat, lon)
        if factor is not None:
            there = np.where(part.cells(lat, lon), factor, -np.inf)
            largest = there if largest is None else np.maximum(largest, there)
    if largest is None:
        return task_factor
    inherited = np.where(np.isfinite(largest), largest, 1.0)
    return inherited if task_factor is None else inherited * task_factor


@dataclass
class _Sums:
    """Sums over dates and predicted cells that have a truth, [step level]: square errors of the
    ensemble mean, and the variances that should equal them."""

    error: np.ndarray
    variance: np.ndarray

    def add(self, row: int, members: np.ndarray, truth: np.ndarray, weight: np.ndarray) -> None:
        """Add one step: members [member level lat lon], truth [level lat lon] and weight [lat
        1]."""
        predicted = np.ptp(members, axis=0) > 0  # given values are the same in all members
        share = np.where(predicted & np.isfinite(truth), weight, 0.0)
        finite_size = (len(members) + 1) / len(members)
        square = np.nan_to_num(members.mean(axis=0) - truth).astype(np.float64) ** 2
        variance = np.nan_to_num(members.var(axis=0, ddof=1)).astype(np.float64) * finite_size
        self.error[row] += (square * share).sum(axis=(1, 2))
        self.variance[row] += (variance * share).sum(axis=(1, 2))

    def factors(self) -> np.ndarray:
        """The factors; 1 where nothing was predicted."""
        ratio = np.divide(
            self.error, self.variance, out=np.ones_like(self.error), where=self.variance > 0
        )
        return np.sqrt(ratio)


def estimate_inflation(
    plan: Plan, times: np.ndarray, parts: Iterable[BlendedPart]
) -> SpreadInflation:
    """Estimate the factors from all given times. parts: the plan's predictions at these times.

    Raises:
        ValueError: a single member, or a task of whose prediction the store holds no truth.
    """
    check_calibrated(plan.task)
    if plan.trained.checkpoint_record.get("model", {}).get("num_members") == 1:
        raise ValueError("calibrate: the checkpoint has one member, so no spread")
    leads = plan.leads
    hours = leads / HOUR
    levels = plan.trained.level_values
    sums: dict[str, _Sums] = {}
    for part in parts:
        if part.data != PRIMARY:
            continue  # streams of other sources keep the spread that they have
        segment = plan.find(times[part.case]).segment
        weight = plan.grid.weights[part.rows][:, None]
        for name, values in part.fields.items():
            num_members, num_levels = values.shape[1:3]
            if num_members < 2:
                raise ValueError("calibrate: the checkpoint has one member, so no spread")
            shape = (len(leads), num_levels)
            spread_sums = sums.setdefault(name, _Sums(np.zeros(shape), np.zeros(shape)))
            for step, lead in enumerate(part.leads):
                row = int(np.flatnonzero(leads == lead)[0])
                valid = segment.find_time(times[part.case] + lead)
                truth = segment.read(
                    name, levels[name], valid, 1, segment.whole(), within_limits=True
                )[:, 0, part.rows]
                spread_sums.add(row, values[step], truth, weight)
    if not any(spread_sums.variance.any() for spread_sums in sums.values()):
        raise ValueError("calibrate: the store has no truth where the task predicts")
    order = np.argsort(hours)
    return SpreadInflation(
        hours[order], {name: spread_sums.factors()[order] for name, spread_sums in sums.items()}
    )


def check_calibrated(task: Task) -> None:
    """Raise ValueError for a task of whose prediction no store holds the truth."""
    why = None
    if task.true_task is not task:
        why = "a counterfactual has no truth; calibrate its task, whose factors it takes"
    elif task.coarse_factor > 1:
        why = "task.coarse_input=true has no truth; calibrate the task on a fine store"
    if why is not None:
        raise ValueError(f"calibrate: {why}")

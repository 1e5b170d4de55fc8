"""Post-hoc inflation of the spread: one factor per task, variable, level and lead time.

The factor makes the mean variance of the members, times (M + 1) / M, equal to the mean square error
of their mean (Fortin et al. 2014), on dates that the model was not trained on. It is kept in the
checkpoint's record and applied around the ensemble mean, which stays as it is.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from atmossl.inference.blend import Fields

if TYPE_CHECKING:
    from atmossl.inference.predict import Predictor

Record = dict[str, dict[str, Any]]  # by task: hours of the steps, and by variable [step][level]


@dataclass(frozen=True)
class SpreadInflation:
    """Factors of one task. hours: [step] from the reference time. factors: [step level]."""

    hours: np.ndarray
    factors: Mapping[str, np.ndarray]

    @classmethod
    def of(cls, record: Mapping[str, Any], task: str) -> "SpreadInflation | None":
        """From a checkpoint's record; None if it was not calibrated for the task."""
        own = record.get("spread", {}).get(task)
        if own is None:
            return None
        factors = {name: np.array(values) for name, values in own["factors"].items()}
        return cls(np.array(own["hours"]), factors)

    def apply(self, fields: Fields, hours: np.ndarray) -> Fields:
        """Fields [step member level lat lon] at the given hours; factors are linear between the
        calibrated lead times and constant beyond them."""
        inflated = {}
        for name, values in fields.items():
            by_level = [np.interp(hours, self.hours, column) for column in self.factors[name].T]
            factor = np.stack(by_level, axis=1)[:, None, :, None, None].astype(np.float32)
            mean = values.mean(axis=1, keepdims=True)
            inflated[name] = mean + factor * (values - mean)
        return inflated


def estimate_inflation(predictor: "Predictor", times: np.ndarray) -> SpreadInflation:
    """Factors from all given times, in one pass over their parts.

    Raises:
        ValueError: a single member, or a truth that the store does not hold.
    """
    plan = predictor.plan
    hours = np.array(plan.offsets) * float(predictor.step / np.timedelta64(1, "h"))
    levels = predictor.trained.level_values
    error: dict[str, np.ndarray] = {}
    variance: dict[str, np.ndarray] = {}
    for part in predictor.parts(list(times)):
        segment = predictor.find(times[part.case]).segment
        weight = predictor.grid.weights[part.rows][:, None]
        for name, values in part.fields.items():
            num_steps, num_members, num_levels = values.shape[:3]
            if num_members < 2:
                raise ValueError("calibrate: the checkpoint has one member, so no spread")
            mean = values.mean(axis=1)
            spread = values.var(axis=1, ddof=1) * (num_members + 1) / num_members
            for sums in (error, variance):
                sums.setdefault(name, np.zeros((len(plan.offsets), num_levels)))
            for step in range(num_steps):
                row = part.step + step
                valid = times[part.case] + plan.offsets[row] * predictor.step
                truth = segment.read(
                    name, levels[name], segment.find_time(valid), 1, segment.whole()
                )[:, 0, part.rows]
                square = (mean[step] - truth).astype(np.float64) ** 2
                error[name][row] += (square * weight).sum(axis=(1, 2))
                variance[name][row] += (spread[step] * weight).sum(axis=(1, 2))
    factors = {
        name: np.sqrt(error[name] / np.where(variance[name] > 0, variance[name], np.inf))
        for name in error
    }
    order = np.argsort(hours)
    return SpreadInflation(hours[order], {name: values[order] for name, values in factors.items()})


def with_inflation(record: Mapping[str, Any], task: str, found: SpreadInflation) -> dict[str, Any]:
    """The record of a checkpoint with the factors of one task, others kept."""
    own = {
        "hours": found.hours.tolist(),
        "factors": {name: values.tolist() for name, values in found.factors.items()},
    }
    return {**record, "spread": {**record.get("spread", {}), task: own}}

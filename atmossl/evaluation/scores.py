"""Scores of ensemble and deterministic predictions, as means per time that can be recombined.

A score has two steps, so that a bootstrap over times can stand between them:
`per_time` gives area means for each case (squared errors, not their root), and `value` turns
their mean over cases into the score. RMSE is thus the root of the mean over times of the
area-weighted squared error (as in WeatherBench 2), not a mean of roots.

Prediction and truth of a case have the same labels (times, levels, cells). All that is worked out
from them has dimensions but no labels (`xarray.Variable`): to compare the same labels again at
every step would take most of the time on small grids. `verify.Tally` labels the results.
"""

from collections.abc import Callable, Hashable, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import xarray as xr
from scores.probability import crps_for_ensemble

from atmossl.evaluation.climate import RainClimate
from atmossl.evaluation.regions import weighted_mean

_CELL = ["latitude", "longitude"]


def unlabelled(field: xr.DataArray | xr.Variable) -> xr.DataArray:
    """What the library `scores` takes: an array with dimensions alone."""
    return xr.DataArray(field.data, dims=field.dims)


def as_variable(score: object) -> xr.Variable:
    """The result of the library `scores`, which is an array if its inputs are."""
    assert isinstance(score, xr.DataArray), type(score)
    return score.variable


@dataclass(frozen=True)
class Case:
    """One variable's prediction beside its truth; pointwise errors are worked out once.

    Attributes:
        prediction: [time or init_time, ..., latitude, longitude], `member` if an ensemble.
        truth: the same without `member`, on the same labels in the same order.
        climatology: like truth, for the same valid times; only the anomaly correlation needs it.
        quantiles: of the training record at every cell, [quantile, ...]; events need them.
        rain: what SEEPS needs to know of precipitation.
        are_draws: members are random draws from the predicted distribution. Scores are then
            corrected to an ensemble without end (fair: Ferro 2014, QJRMS 140, 1917-1923). Members
            of a tail are a fixed set of values, which the correction would flatter: they are
            scored as the distribution that they are.
    """

    prediction: xr.DataArray
    truth: xr.DataArray
    climatology: xr.DataArray | None = None
    quantiles: xr.DataArray | None = None
    rain: RainClimate | None = None
    are_draws: bool = True
    _derived: dict[Hashable, "Case"] = field(default_factory=dict, repr=False, compare=False)

    def derived(self, quantity: Hashable, derive: Callable[["Case"], "Case"]) -> "Case":
        """The case of a derived quantity, computed at the first request and then kept."""
        if quantity not in self._derived:
            self._derived[quantity] = derive(self)
        return self._derived[quantity]

    def forget(self, quantities: Iterable[Hashable]) -> None:
        """Drop these derived quantities, which are as large as the fields."""
        for quantity in quantities:
            self._derived.pop(quantity, None)

    def on_cells(self, field: xr.Variable) -> xr.DataArray:
        """A field of this case with the labels of its cells alone."""
        labels = {dim: self.truth[dim] for dim in _CELL if dim in self.truth.coords}
        return xr.DataArray(field.data, labels, field.dims)

    @property
    def num_members(self) -> int:
        return self.prediction.sizes.get("member", 1)

    @property
    def is_fair(self) -> bool:
        """Whether scores are corrected for the number of members."""
        return self.are_draws and self.num_members > 1

    @cached_property
    def observed(self) -> xr.Variable:
        """The truth in double precision."""
        return self.truth.variable.astype(np.float64)

    @cached_property
    def valid(self) -> xr.Variable:
        """True where the truth is known."""
        return self.truth.variable.notnull()

    @cached_property
    def whole(self) -> xr.Variable:
        """True at the times, lead times and levels at which no cell is missing."""
        return self.valid.all(_CELL)

    @cached_property
    def members(self) -> xr.Variable:
        """The prediction in double precision, always with a dimension `member`."""
        members = self.prediction
        members = members if "member" in members.dims else members.expand_dims("member")
        return members.variable.astype(np.float64)

    @cached_property
    def ensemble_mean(self) -> xr.Variable:
        return self.members.mean("member")

    @cached_property
    def squared_error(self) -> xr.Variable:
        return self.error * self.error

    @cached_property
    def absolute_error(self) -> xr.Variable:
        return abs(self.error)

    @cached_property
    def error(self) -> xr.Variable:
        return self.ensemble_mean - self.observed

    @cached_property
    def ensemble_variance(self) -> xr.Variable:
        """Unbiased variance over members (needs two or more), at the truth's valid cells."""
        return self.members.var("member", ddof=1).where(self.valid)

    @cached_property
    def crps(self) -> xr.Variable:
        if self.num_members == 1:
            return self.absolute_error
        members, observed = unlabelled(self.members), unlabelled(self.observed)
        method = "fair" if self.is_fair else "ecdf"
        return as_variable(
            crps_for_ensemble(members, observed, "member", method=method, preserve_dims="all")
        )

    def ensemble_quantile(self, level: float) -> xr.Variable:
        if self.num_members == 1:
            return self.ensemble_mean
        return self.members.quantile(level, "member", skipna=False)

    def quantile(self, level: float) -> xr.Variable:
        """The training record's quantile at every cell."""
        assert self.quantiles is not None, "events need quantiles, got None"
        nearest = self.quantiles.sel(quantile=level, method="nearest", tolerance=1e-6)
        return nearest.variable


class Score(Protocol):
    """A score of cases over regions."""

    @property
    def name(self) -> str: ...

    def applies(self, case: Case) -> bool:
        """Whether a case has what the score needs: members, climatology, quantiles."""
        ...

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        """Area means per time, lead time and level, without labels; further dims are those of the
        weights."""
        ...

    def value(self, means: xr.Dataset) -> xr.DataArray:
        """The score, from the mean over times of the results of `per_time`."""
        ...


class PointwiseMean:
    """A score that is the mean of one pointwise field."""

    def applies(self, case: Case) -> bool:
        del case
        return True

    def pointwise(self, case: Case) -> xr.Variable:
        """The field, missing where nothing is scored."""
        raise NotImplementedError

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        return xr.Dataset({"mean": weighted_mean(self.pointwise(case), weights.variable)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["mean"]


@dataclass(frozen=True)
class Rmse(PointwiseMean):
    """Root mean squared error of the ensemble mean, in the variable's units."""

    name: str = "rmse"

    def pointwise(self, case: Case) -> xr.Variable:
        return case.squared_error

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["mean"] ** 0.5


@dataclass(frozen=True)
class Mae(PointwiseMean):
    """Mean absolute error of the ensemble mean, in the variable's units."""

    name: str = "mae"

    def pointwise(self, case: Case) -> xr.Variable:
        return case.absolute_error


@dataclass(frozen=True)
class Bias(PointwiseMean):
    """Mean of prediction minus truth (of the ensemble mean), in the variable's units."""

    name: str = "bias"

    def pointwise(self, case: Case) -> xr.Variable:
        return case.error


@dataclass(frozen=True)
class Crps(PointwiseMean):
    """Continuous ranked probability score, in the variable's units, fair for draws (see `Case`);
    one member gives MAE.

    Source: Hersbach (2000), Weather and Forecasting 15, 559-570; Ferro (2014), QJRMS 140,
    1917-1923.
    """

    name: str = "crps"

    def pointwise(self, case: Case) -> xr.Variable:
        return case.crps


@dataclass(frozen=True)
class SpreadSkill:
    """Ensemble spread over the error of the ensemble mean; 1 if members and truth are exchangeable.

    sqrt((M + 1) / M) * sqrt(mean variance) / RMSE, with the unbiased variance over M members.
    Source: Fortin et al. (2014), J. Hydrometeorology 15, 1708-1713, equation 15.
    """

    name: str = "spread_skill"

    def applies(self, case: Case) -> bool:
        return case.num_members > 1

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        finite_size = (case.num_members + 1) / case.num_members
        spread = finite_size * weighted_mean(case.ensemble_variance, weights.variable)
        error = weighted_mean(case.squared_error, weights.variable)
        return xr.Dataset({"squared_spread": spread, "squared_error": error})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        error = means["squared_error"].where(means["squared_error"] > 0)
        return (means["squared_spread"] / error) ** 0.5


@dataclass(frozen=True)
class AnomalyCorrelation:
    """Correlation over the region of predicted and true anomalies from the climatology.

    Centred as in WMO-No. 485: the regional mean of each anomaly is taken off first (WeatherBench 2
    does not). One correlation per time, then the plain mean over times. A prediction that equals
    the climatology has no anomaly: its value is missing, not zero.
    """

    name: str = "acc"

    def applies(self, case: Case) -> bool:
        return case.climatology is not None

    def per_time(self, case: Case, weights: xr.DataArray) -> xr.Dataset:
        assert case.climatology is not None, "acc needs a climatology, got None"
        normal, area = case.climatology.variable, weights.variable
        predicted, observed = case.ensemble_mean - normal, case.observed - normal
        valid = predicted.notnull() & observed.notnull()  # means and products of the same cells
        predicted, observed = predicted.where(valid), observed.where(valid)
        # Rounding leaves a prediction equal to the climatology with anomalies of about 1e-5.
        noise = 1e-6 * abs(normal).mean(_CELL)
        flat = predicted.std(_CELL) <= noise
        centre = [weighted_mean(anomaly, area) for anomaly in (predicted, observed)]
        covariance = weighted_mean(predicted * observed, area) - centre[0] * centre[1]
        variances = [
            weighted_mean(anomaly**2, area) - mean**2
            for anomaly, mean in zip((predicted, observed), centre, strict=True)
        ]
        product = variances[0] * variances[1]
        return xr.Dataset({"acc": (covariance / product.where(product > 0) ** 0.5).where(~flat)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["acc"]


DEFAULT_SCORES: tuple[Score, ...] = (
    Rmse(), Mae(), Bias(), Crps(), SpreadSkill(), AnomalyCorrelation(),
)  # fmt: skip

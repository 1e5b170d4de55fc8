"""Scores of ensemble and deterministic predictions, as means per time that can be recombined.

A score has two steps, so that a bootstrap over times can stand between them:
`per_time` gives area means for each case (squared errors, not their root), and `value` turns
their mean over cases into the score. RMSE is thus the root of the mean over times of the
area-weighted squared error (as in WeatherBench 2), not a mean of roots.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import xarray as xr
import xskillscore
from scores.continuous import mae, mean_error, mse
from scores.probability import crps_for_ensemble

from atmossl.evaluation.regions import Region, area_mean, area_weights_like

_CELL = ["latitude", "longitude"]


def _as_array(score: object) -> xr.DataArray:
    """The library's answer, which is an array if its inputs are."""
    assert isinstance(score, xr.DataArray), type(score)
    return score


@dataclass(frozen=True)
class Case:
    """One variable's prediction beside its truth; pointwise errors are worked out once.

    Attributes:
        prediction: [time or init_time, ..., latitude, longitude], `member` if an ensemble.
        truth: the same without `member`, on the same labels.
        climatology: like truth, for the same valid times; only the anomaly correlation needs it.
    """

    prediction: xr.DataArray
    truth: xr.DataArray
    climatology: xr.DataArray | None = None

    @property
    def num_members(self) -> int:
        return self.prediction.sizes.get("member", 1)

    @cached_property
    def ensemble_mean(self) -> xr.DataArray:
        if "member" not in self.prediction.dims:
            return self.prediction.astype(np.float64)
        return self.prediction.mean("member", dtype=np.float64)

    @cached_property
    def squared_error(self) -> xr.DataArray:
        return _as_array(mse(self.ensemble_mean, self.truth, preserve_dims="all"))

    @cached_property
    def absolute_error(self) -> xr.DataArray:
        return _as_array(mae(self.ensemble_mean, self.truth, preserve_dims="all"))

    @cached_property
    def error(self) -> xr.DataArray:
        return _as_array(mean_error(self.ensemble_mean, self.truth, preserve_dims="all"))

    @cached_property
    def ensemble_variance(self) -> xr.DataArray:
        """Unbiased variance over members (needs two or more), at the truth's valid cells."""
        variance = self.prediction.astype(np.float64).var("member", ddof=1)
        return variance.where(self.truth.notnull())

    @cached_property
    def fair_crps(self) -> xr.DataArray:
        if self.num_members == 1:
            return self.absolute_error
        members = self.prediction.astype(np.float64)
        return _as_array(
            crps_for_ensemble(members, self.truth, "member", method="fair", preserve_dims="all")
        )


class Score(Protocol):
    """A score of one case over one region."""

    @property
    def name(self) -> str: ...

    @property
    def min_members(self) -> int: ...

    @property
    def needs_climatology(self) -> bool: ...

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        """Area means per time, lead time and level."""
        ...

    def value(self, means: xr.Dataset) -> xr.DataArray:
        """The score from the mean over times of what `per_time` gave."""
        ...


@dataclass(frozen=True)
class _Deterministic:
    min_members: int = field(default=1, init=False)
    needs_climatology: bool = field(default=False, init=False)


@dataclass(frozen=True)
class Rmse(_Deterministic):
    """Root mean squared error of the ensemble mean, in the variable's units."""

    name: str = "rmse"

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        return xr.Dataset({"squared_error": area_mean(case.squared_error, region)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["squared_error"] ** 0.5


@dataclass(frozen=True)
class Mae(_Deterministic):
    """Mean absolute error of the ensemble mean, in the variable's units."""

    name: str = "mae"

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        return xr.Dataset({"absolute_error": area_mean(case.absolute_error, region)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["absolute_error"]


@dataclass(frozen=True)
class Bias(_Deterministic):
    """Mean of prediction minus truth (of the ensemble mean), in the variable's units."""

    name: str = "bias"

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        return xr.Dataset({"error": area_mean(case.error, region)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["error"]


@dataclass(frozen=True)
class FairCrps(_Deterministic):
    """Fair continuous ranked probability score, in the variable's units; one member gives MAE.

    Source: Ferro (2014), QJRMS 140, 1917-1923.
    """

    name: str = "crps"

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        return xr.Dataset({"crps": area_mean(case.fair_crps, region)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["crps"]


@dataclass(frozen=True)
class SpreadSkill:
    """Ensemble spread over the error of the ensemble mean; 1 if members and truth are exchangeable.

    sqrt((M + 1) / M) * sqrt(mean variance) / RMSE, with the unbiased variance over M members.
    Source: Fortin et al. (2014), J. Hydrometeorology 15, 1708-1713, equation 15.
    """

    name: str = "spread_skill"
    min_members: int = field(default=2, init=False)
    needs_climatology: bool = field(default=False, init=False)

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        finite_size = (case.num_members + 1) / case.num_members
        return xr.Dataset(
            {
                "squared_spread": finite_size * area_mean(case.ensemble_variance, region),
                "squared_error": area_mean(case.squared_error, region),
            }
        )

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
    min_members: int = field(default=1, init=False)
    needs_climatology: bool = field(default=True, init=False)

    def per_time(self, case: Case, region: Region) -> xr.Dataset:
        assert case.climatology is not None, "acc needs a climatology, got None"
        predicted = case.ensemble_mean - case.climatology
        observed = case.truth.astype(np.float64) - case.climatology
        # Rounding leaves a prediction equal to the climatology with anomalies of about 1e-5.
        noise = 1e-6 * abs(case.climatology).mean(_CELL)
        flat = predicted.std(_CELL) <= noise
        weights = area_weights_like(predicted, region)
        weights, predicted = xr.broadcast(weights, predicted)
        weights = weights.isel({d: 0 for d in weights.dims if d not in _CELL}, drop=True)
        with np.errstate(invalid="ignore", divide="ignore"):
            correlation = xskillscore.pearson_r(
                predicted, observed, dim=_CELL, weights=weights, skipna=True
            )
        return xr.Dataset({"acc": correlation.where(~flat)})

    def value(self, means: xr.Dataset) -> xr.DataArray:
        return means["acc"]


DEFAULT_SCORES: tuple[Score, ...] = (
    Rmse(),
    Mae(),
    Bias(),
    FairCrps(),
    SpreadSkill(),
    AnomalyCorrelation(),
)

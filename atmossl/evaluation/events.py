"""Scores of events, tails and quantiles, for users who act on thresholds.

Events are exceedances of a quantile of the training record at every cell, so that they are as
rare everywhere. Pointwise scores come from the library `scores`.
"""

import warnings
from dataclasses import dataclass
from typing import Any, Literal

import xarray as xr
from scores.categorical import seeps
from scores.continuous import quantile_score
from scores.probability import brier_score_for_ensemble, tail_tw_crps_for_ensemble

from atmossl.evaluation.scores import Case, PointwiseMean, Score, as_variable, unlabelled

Tail = Literal["upper", "lower"]


def _suffix(level: float, tail: Tail) -> str:
    return f"{'above' if tail == 'upper' else 'below'}_p{100 * level:g}"


@dataclass(frozen=True)
class _OfTail(PointwiseMean):
    """A score of what lies beyond a quantile of the training record."""

    level: float
    tail: Tail = "upper"

    def applies(self, case: Case) -> bool:
        return case.quantiles is not None


@dataclass(frozen=True)
class Brier(_OfTail):
    """Brier score of exceeding (or falling below) a quantile, fair for draws (see `Case`).

    Source: Ferro (2014), QJRMS 140, 1917-1923.
    """

    @property
    def name(self) -> str:
        return f"brier_{_suffix(self.level, self.tail)}"

    def pointwise(self, case: Case) -> xr.Variable:
        sign = 1.0 if self.tail == "upper" else -1.0
        threshold = case.quantile(self.level)
        zero: Any = 0.0  # floats are Real, but not to the type checker
        brier = brier_score_for_ensemble(
            unlabelled(sign * (case.members - threshold)),
            unlabelled(sign * (case.observed - threshold)),
            "member",
            zero,
            fair_correction=case.is_fair,
            preserve_dims="all",
        )
        return as_variable(brier).squeeze("threshold")


@dataclass(frozen=True)
class TailCrps(_OfTail):
    """CRPS of what lies beyond a quantile, fair for draws (see `Case`), in the variable's units.

    Source: Gneiting and Ranjan (2011), J. Business & Economic Statistics 29, 411-422.
    """

    @property
    def name(self) -> str:
        return f"tail_crps_{_suffix(self.level, self.tail)}"

    def pointwise(self, case: Case) -> xr.Variable:
        score = tail_tw_crps_for_ensemble(
            unlabelled(case.members),
            unlabelled(case.observed),
            "member",
            unlabelled(case.quantile(self.level)),
            tail=self.tail,
            method="fair" if case.is_fair else "ecdf",
            preserve_dims="all",
        )
        return as_variable(score)


@dataclass(frozen=True)
class QuantileScore(PointwiseMean):
    """Pinball loss of the ensemble's own quantile, in the variable's units.

    Source: Koenker and Machado (1999), JASA 94, 1296-1310.
    """

    level: float

    @property
    def name(self) -> str:
        return f"quantile_score_p{100 * self.level:g}"

    def pointwise(self, case: Case) -> xr.Variable:
        predicted = unlabelled(case.ensemble_quantile(self.level))
        loss = quantile_score(predicted, unlabelled(case.observed), self.level, preserve_dims="all")
        return as_variable(loss)


@dataclass(frozen=True)
class Seeps(PointwiseMean):
    """Stable equitable error in probability space of precipitation; 0 is perfect, 1 is no skill.

    The ensemble mean is scored, where it is neither almost always dry nor almost always wet.
    Source: Rodwell et al. (2010), QJRMS 136, 1344-1363.
    """

    name: str = "seeps"

    def applies(self, case: Case) -> bool:
        return case.rain is not None

    def pointwise(self, case: Case) -> xr.Variable:
        rain = case.rain
        assert rain is not None, "SEEPS needs the climate of rain, got None"
        with warnings.catch_warnings():
            # such cells have no score, which is meant
            warnings.filterwarnings("ignore", "`prob_dry` contains values that are exactly equal")
            penalty = seeps(
                unlabelled(case.ensemble_mean * rain.to_mm),
                unlabelled(case.truth.variable * rain.to_mm),
                unlabelled(rain.dry),
                unlabelled(rain.heavy_mm),
                preserve_dims="all",
            )
        return as_variable(penalty)


def event_scores(low: float, high: float) -> tuple[Score, ...]:
    """Brier score, tail CRPS and quantile score of both tails, and SEEPS."""
    return (
        Brier(low, "lower"),
        Brier(high, "upper"),
        TailCrps(low, "lower"),
        TailCrps(high, "upper"),
        QuantileScore(low),
        QuantileScore(high),
        Seeps(),
    )

"""Ridge regression on neighbourhoods of all fields: the linear baseline that a network must
beat."""

from atmossl.evaluation.ridge.model import Channels, RidgeModel, check_runs, fit_ridge
from atmossl.evaluation.ridge.predictors import (
    CrossVariable,
    RidgeCorrection,
    RidgeDownscaling,
    RidgeForecast,
    RidgeTask,
    TemporalInterpolation,
)

__all__ = [
    "Channels",
    "CrossVariable",
    "RidgeCorrection",
    "RidgeDownscaling",
    "RidgeForecast",
    "RidgeModel",
    "RidgeTask",
    "TemporalInterpolation",
    "check_runs",
    "fit_ridge",
]

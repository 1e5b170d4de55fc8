"""Predictions to report: zero-shot tasks or forecast stores, scored against baselines."""

from atmossl.scorecard.forecasts import compare_forecasts
from atmossl.scorecard.verified import provenance_of
from atmossl.scorecard.zero_shot import score_tasks

__all__ = ["compare_forecasts", "provenance_of", "score_tasks"]

"""The scorecard: zero-shot tasks of a checkpoint, or forecast stores, scored against baselines
for a report."""

from atmossl.scorecard.forecasts import compare_forecasts
from atmossl.scorecard.task_report import provenance_of
from atmossl.scorecard.zero_shot import check_tasks, score_tasks

__all__ = ["check_tasks", "compare_forecasts", "provenance_of", "score_tasks"]

"""What comes of a report in one line a task: the model beside the best baseline, and whether its
ensemble is calibrated. The best baseline is the one with the lowest RMSE."""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from atmossl.evaluation.calibration import CALIBRATED, calibration_table
from atmossl.evaluation.report.content import TaskReport
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.rows import rows_where

COLUMNS = ("task", "best baseline", "RMSE ratio", "CRPS ratio", "spread / skill", "verdict")


def verdicts(reports: Sequence[TaskReport]) -> pd.DataFrame:
    """A row of text for each task; see `COLUMNS`. Ratios and their 95 % intervals are means over
    variables, levels and lead times on the globe."""
    return pd.DataFrame([_row(report) for report in reports], columns=list(COLUMNS))


def _row(report: TaskReport) -> tuple[str, ...]:
    name = readable(report.task)
    spread = _overall(report, "spread_skill", "")
    if not report.ranked:
        return name, "", "", "", _text(spread), _of_ensemble(report)
    best = report.ranked[0]
    rmse, crps = (_overall(report, f"{score}_ratio", best) for score in ("rmse", "crps"))
    verdict = "; ".join(filter(None, (_against(best, rmse), _of_ensemble(report))))
    return name, best, _text(rmse), _text(crps), _text(spread), verdict


def _overall(report: TaskReport, score: str, baseline: str) -> Mapping[str, float]:
    """Value and interval of an overall score; missing if there is none."""
    rows = rows_where(report.overall, score=score, baseline=baseline)
    row = {} if rows.empty else rows.iloc[0].to_dict()
    return {name: row.get(name, np.nan) for name in ("value", "low", "high")}


def _text(score: Mapping[str, float]) -> str:
    if np.isnan(score["value"]):
        return "-"
    text = f"{score['value']:.2f}"
    has_ends = np.isfinite(score["low"]) and np.isfinite(score["high"])
    return f"{text} [{score['low']:.2f}, {score['high']:.2f}]" if has_ends else text


def _against(baseline: str, ratio: Mapping[str, float]) -> str:
    """The model's RMSE beside a baseline's, in words."""
    percent = 100.0 * abs(ratio["value"] - 1.0)
    size = f"{percent:.0f} %" if percent >= 1.0 else f"{percent:.1f} %"
    side = "below" if ratio["value"] < 1.0 else "above"
    apart = f"RMSE {size} {side} that of {baseline}"
    if np.isnan(ratio["low"]):
        return f"{apart} (too few cases for an interval)"
    if ratio["low"] <= 1.0 <= ratio["high"]:
        return f"no clear difference from {baseline}"
    return f"{'better' if ratio['value'] < 1.0 else 'worse'}: {apart}"


def _of_ensemble(report: TaskReport) -> str:
    """The number of variables, levels and lead times whose ensemble is calibrated, in words.

    Nothing where the cases are too few for intervals.
    """
    rows = rows_where(calibration_table(report.table), source=report.model_name)
    verdict = rows["verdict"]
    if rows["spread_skill_low"].isna().all():
        return ""
    faults = verdict[verdict != CALIBRATED]
    if faults.empty:
        return "ensemble calibrated"
    right = len(verdict) - len(faults)
    share = f"{right or 'none'} of {len(verdict)} fields"
    others = "others " if right else ""
    return f"ensemble calibrated in {share} ({others}mostly {faults.mode().iloc[0]})"

"""What comes of a report in one line a task: the model beside the best baseline, and whether its
ensemble is calibrated. The best baseline is the one with the lowest RMSE.

Two signs tell whether an ensemble is calibrated: spread over skill, which the mean and the variance
decide, and how often the truth lies outside all members, which the tails decide.
"""

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from atmossl.evaluation.report.content import TaskReport
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.verify import WHOLE_YEAR, rows_where

COLUMNS = ("task", "best baseline", "RMSE ratio", "CRPS ratio", "spread / skill", "verdict")
TOLERANCE = 0.1
CALIBRATED = "calibrated"
_KEYS = ["task", "source", "variable", "level", "lead_hours"]


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


def calibration_table(table: pd.DataFrame) -> pd.DataFrame:
    """A table with one row per ensemble, variable, level and lead time; empty without any ensemble.

    Columns: spread-skill and outlier ratio with their intervals, `inflation` (what the departures
    from the ensemble mean would have to be multiplied by, the inverse of spread-skill), and
    `verdict`: over- or under-dispersive if the whole interval of the spread-skill ratio lies more
    than a tenth from 1, else calibrated if the outlier ratio's interval comes that near to 1, too,
    else `tails too light` or `tails too heavy`.
    """
    rows = rows_where(table, region="global", season=WHOLE_YEAR)
    parts = []
    for score in ("spread_skill", "outlier_ratio"):
        chosen = rows_where(rows, score=score).set_index(_KEYS)[["value", "low", "high"]]
        names = {"value": score, "low": f"{score}_low", "high": f"{score}_high"}
        parts.append(chosen.rename(columns=names))
    both = pd.concat(parts, axis="columns").reset_index()
    both["inflation"] = 1.0 / both["spread_skill"]
    both["verdict"] = [_verdict(row) for row in both.to_dict("records")]
    return both


def _verdict(row: dict) -> str:
    spread_low, spread_high = _ends(row, "spread_skill")
    if spread_low > 1.0 + TOLERANCE:
        return "over-dispersive"
    if spread_high < 1.0 - TOLERANCE:
        return "under-dispersive"
    outliers_low, outliers_high = _ends(row, "outlier_ratio")
    if outliers_low > 1.0 + TOLERANCE:
        return "tails too light"
    if outliers_high < 1.0 - TOLERANCE:
        return "tails too heavy"
    return CALIBRATED


def _ends(row: dict, score: str) -> tuple[float, float]:
    """The ends of a score's interval; the value twice where the record is too short for an
    interval."""
    low, high = row[f"{score}_low"], row[f"{score}_high"]
    return (row[score], row[score]) if np.isnan(low) or np.isnan(high) else (low, high)

"""Tells whether an ensemble is calibrated, per variable, level and lead time.

Two signs are read together: spread over skill, which the mean and the variance decide, and how
often the truth lies outside all members, which the tails decide.
"""

import numpy as np
import pandas as pd

from atmossl.evaluation.rows import rows_where
from atmossl.evaluation.verify import WHOLE_YEAR

TOLERANCE = 0.1
CALIBRATED = "calibrated"
_KEYS = ["task", "source", "variable", "level", "lead_hours"]


def calibration_table(table: pd.DataFrame, region: str = "global") -> pd.DataFrame:
    """A table with one row per ensemble, variable, level and lead time; empty without any ensemble.

    Columns: spread-skill and outlier ratio with their intervals, `inflation` (what the departures
    from the ensemble mean would have to be multiplied by, the inverse of spread-skill), and
    `verdict`: over- or under-dispersive if the whole interval of the spread-skill ratio lies more
    than a tenth from 1, else calibrated if the outlier ratio's interval comes that near to 1, too,
    else `tails too light` or `tails too heavy`.
    """
    rows = rows_where(table, region=region, season=WHOLE_YEAR)
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

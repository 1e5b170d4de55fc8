"""Selects rows of the score table by their labels."""

from typing import Any

import pandas as pd


def rows_where(table: pd.DataFrame, **labels: Any) -> Any:
    """The rows (a data frame) with all of these labels; None stands for a missing one."""
    rows: Any = table
    for column, label in labels.items():
        rows = rows[rows[column].isna() if label is None else rows[column] == label]
    return rows


def rows_of_prefix(table: pd.DataFrame, prefix: str) -> Any:
    """The rows (a data frame) whose score begins with `prefix`; the rest of the score's name is
    the column `baseline`."""
    scores: Any = table["score"]
    rows: Any = table[scores.str.startswith(prefix)]
    return rows.assign(baseline=rows["score"].str.removeprefix(prefix))

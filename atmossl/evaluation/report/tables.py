"""The verification table in brief: on the console, as CSV and as Markdown."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from rich.console import Console
from rich.table import Table

from atmossl.evaluation.verify import RATIO_PREFIX, WHOLE_YEAR, rows_where

_KEYS = ["task", "region", "variable", "units", "level", "lead_hours"]
_MODEL_SCORES = ("rmse", "crps", "acc", "spread_skill")


def summarise(table: pd.DataFrame, *, model_name: str = "model") -> pd.DataFrame:
    """One row per task, variable, level and lead time, on the globe.

    Columns: the model's RMSE, each baseline's, their ratios with the interval's ends, CRPS, ACC
    and spread-skill ratio. What a source does not have is NaN.
    """
    rows = rows_where(table, region="global", season=WHOLE_YEAR)
    columns = [_column(rows, model_name, "rmse", f"rmse {model_name}")]
    for name in _baselines(rows, model_name):
        columns.append(_column(rows, name, "rmse", f"rmse {name}"))
    for name in _baselines(rows, model_name):
        ratio = RATIO_PREFIX + name
        columns.append(_column(rows, model_name, ratio, f"ratio {name}"))
        columns.append(_column(rows, model_name, ratio, f"ratio {name} low", "low"))
        columns.append(_column(rows, model_name, ratio, f"ratio {name} high", "high"))
    for score in _MODEL_SCORES[1:]:
        columns.append(_column(rows, model_name, score, score))
    return pd.concat(columns, axis="columns").reset_index()


def _baselines(rows: pd.DataFrame, model_name: str) -> list[str]:
    return [str(source) for source in rows["source"].unique() if source != model_name]


def _column(
    rows: pd.DataFrame, source: str, score: str, title: str, of: str = "value"
) -> pd.Series:
    chosen = rows.loc[(rows["source"] == source) & (rows["score"] == score)]
    # Missing levels and leads would not match as index labels in a join: NaN keys are kept here.
    return chosen.set_index(_KEYS)[of].rename(title)


def display_cells(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary as text: three digits, an interval beside its ratio, no column without values."""
    cells: dict[str, list[str]] = {}
    for name in summary.columns:
        values = summary[name]
        if bool(values.isna().all()) or name.endswith((" low", " high")):
            continue
        low, high = f"{name} low", f"{name} high"
        if low in summary and high in summary:
            triples = zip(values, summary[low], summary[high], strict=True)
            cells[name] = [_with_interval(*triple) for triple in triples]
        else:
            cells[name] = [_text(value) for value in values]
    return pd.DataFrame(cells)


def _text(value: object) -> str:
    if isinstance(value, float | np.floating):
        return "-" if np.isnan(value) else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)


def _with_interval(value: float, low: float, high: float) -> str:
    if np.isnan(low) or np.isnan(high):
        return _text(value)
    return f"{value:.3f} [{low:.3f}, {high:.3f}]"


def print_summary(summary: pd.DataFrame, console: Console, *, title: str = "") -> None:
    """Print the summary as a table, in which no word is cut: it is wider than the console if need
    be."""
    cells = display_cells(summary)
    table = Table(title=title or None)
    widths = _widths(cells, console.width)
    for name, width in zip(cells.columns, widths, strict=True):
        is_number = pd.api.types.is_numeric_dtype(summary[name])
        table.add_column(name, justify="right" if is_number else "left", width=width)
    for row in cells.itertuples(index=False):
        table.add_row(*row)
    console.width = max(console.width, _table_width(widths))
    console.print(table)


def _table_width(widths: Sequence[int]) -> int:
    """Letters in a line of a table, with a space on either side of each cell and rules between."""
    return sum(widths) + 3 * len(widths) + 1


def _widths(cells: pd.DataFrame, line: int) -> list[int]:
    """The width of each column: of its longest word, and as much more as its longest text needs and
    a line of that many letters has room for, narrow columns first."""
    texts = [[name, *cells[name]] for name in cells]
    widths = [max((len(word) for t in of for word in t.split()), default=1) for of in texts]
    wanted = [max(map(len, of)) for of in texts]
    for column in np.argsort(wanted, kind="stable"):
        room = max(0, line - _table_width(widths))
        widths[column] = min(wanted[column], widths[column] + room)
    return widths


def to_markdown(summary: pd.DataFrame) -> str:
    """The summary as a Markdown table."""
    cells = display_cells(summary)
    rule = ["---:" if pd.api.types.is_numeric_dtype(summary[name]) else "---" for name in cells]
    rows = [list(cells.columns), rule, *cells.to_numpy().tolist()]
    return "\n".join(_markdown_row(row) for row in rows) + "\n"


def _markdown_row(row: Sequence[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in row) + " |"


def mean_over_levels(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary's numbers averaged over levels, one row per task, variable and lead time."""
    keys = ["task", "variable", "lead_hours"]
    ratios = [c for c in summary if c.startswith("ratio ") and not c.endswith((" low", " high"))]
    chosen = [*ratios, *_MODEL_SCORES[1:]]
    frame: Any = summary
    return frame.groupby(keys, dropna=False, sort=False)[chosen].mean().reset_index()

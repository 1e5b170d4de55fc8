"""All files of a report in one folder."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
import zarr

from atmossl.evaluation.report.content import Provenance, TaskReport
from atmossl.evaluation.report.maps import DrawnCase, draw_case
from atmossl.evaluation.report.page import html_page
from atmossl.evaluation.report.tables import summarise, to_markdown
from atmossl.evaluation.report.verdicts import calibration_table, verdicts
from atmossl.evaluation.verify import CRPS_RATIO_PREFIX, RATIO_PREFIX, WHOLE_YEAR, rows_where
from atmossl.names import file_name

_SURFACE = 0.0
_NO_LEAD = 0.0
_NUMBERS = ("value", "low", "high", "p_value")
_LABELS = ("source", "score", "variable", "level", "lead_hours", "region", "season")


def write_report(reports: Sequence[TaskReport], provenance: Provenance, folder: Path) -> None:
    """Make the folder with index.html, summary.md, scores.csv, scores.zarr, calibration.csv,
    figures.json and maps/."""
    (folder / "maps").mkdir(parents=True)
    table = pd.concat([report.table for report in reports], ignore_index=True)
    table.to_csv(folder / "scores.csv", index=False)
    calibration_table(table).to_csv(folder / "calibration.csv", index=False)
    write_numbers(reports, folder / "scores.zarr")
    (folder / "figures.json").write_text(json.dumps(figures(reports), indent=1))
    (folder / "summary.md").write_text(_markdown(reports, provenance), encoding="utf-8")
    drawn: dict[tuple[str, str], DrawnCase] = {}
    for report in reports:
        for example in report.examples:
            name = f"{file_name(report.task)}_{file_name(example.variable)}.png"
            baseline = report.baseline_of(example)
            case = draw_case(report.task, example, baseline=baseline, about=report.about)
            (folder / "maps" / name).write_bytes(case.whole)
            drawn[report.task, example.variable] = case
    page = html_page(reports, provenance, drawn)
    (folder / "index.html").write_text(page, encoding="utf-8")


def _markdown(reports: Sequence[TaskReport], provenance: Provenance) -> str:
    summary = "\n".join(f"- {key}: {value}" for key, value in provenance.summary.items())
    parts = [f"# {provenance.title}\n\n{summary}\n\n{to_markdown(verdicts(reports))}"]
    for report in reports:
        summary = summarise(report.table, model_name=report.model_name)
        parts.append(f"## {report.task}\n\n{to_markdown(report.overall)}\n{to_markdown(summary)}")
        calibration = calibration_table(report.table)
        if len(calibration):
            parts.append(f"### Calibration\n\n{to_markdown(calibration)}")
    facts = "\n".join(f"- {key}: {value}" for key, value in provenance.facts.items())
    parts.append(f"## How to reproduce\n\n```\n{provenance.command}\n```\n\n{facts}\n")
    return "\n".join(parts)


def write_numbers(reports: Sequence[TaskReport], path: Path) -> None:
    """The table as arrays over its labels in zarr, a group per task, with a group per diagnostic.

    Surface variables are at level 0, tasks without lead time at 0 h.
    """
    tree: dict[str, xr.Dataset] = {}
    for report in reports:
        table = report.table.fillna({"level": _SURFACE, "lead_hours": _NO_LEAD})
        arrays = table.set_index(list(_LABELS))[list(_NUMBERS)].to_xarray()
        tree[file_name(report.task)] = arrays.assign_attrs(model=report.model_name)
        for (diagnostic, variable), dataset in report.diagnosed.items():
            tree[f"{file_name(report.task)}/{diagnostic}/{file_name(variable)}"] = dataset
    # xarray would consolidate the metadata of all groups again after each of them
    xr.DataTree.from_dict(_with_parents(tree)).to_zarr(path, zarr_format=2, consolidated=False)
    zarr.consolidate_metadata(path, zarr_format=2)


def _with_parents(tree: dict[str, xr.Dataset]) -> dict[str, xr.Dataset]:
    """Diagnostics have labels of their own: beside the table, not below it."""
    return {(name if "/" in name else f"{name}/scores"): dataset for name, dataset in tree.items()}


def figures(reports: Sequence[TaskReport]) -> dict[str, Any]:
    """Means over variables and levels of the ratios of RMSE and CRPS and of spread-skill."""
    means: dict[str, Any] = {}
    per_variable: dict[str, dict[str, float]] = {}
    for report in reports:
        rows = rows_where(
            report.table, source=report.model_name, region="global", season=WHOLE_YEAR
        )
        for row in rows_where(report.overall, score="rmse_ratio").to_dict("records"):
            key = f"{report.task}_vs_{row['baseline']}"
            means[key] = round(row["value"], 4)
            if np.isfinite(row["low"]):
                means[f"{key}_interval"] = [round(row[end], 4) for end in ("low", "high")]
        for (score, lead), part in rows.groupby(["score", "lead_hours"], dropna=False, sort=False):
            key = _key(report.task, str(score), float(lead))
            if key is None:
                continue
            means[key] = round(float(part["value"].mean()), 4)
            for variable, variable_part in part.groupby("variable"):
                mean = round(float(variable_part["value"].mean()), 4)
                per_variable.setdefault(str(variable), {})[key] = mean
    return {**means, "per_variable": per_variable}


def _key(task: str, score: str, lead: float) -> str | None:
    lead_name = "" if np.isnan(lead) else f"_{lead:g}h"
    if score == "spread_skill":
        return f"{score}_{task}{lead_name}"
    if score.startswith(RATIO_PREFIX):
        return f"{task}{lead_name}_{score.removeprefix('rmse_ratio_')}"
    if score.startswith(CRPS_RATIO_PREFIX):
        return f"{task}{lead_name}_crps_{score.removeprefix('crps_ratio_')}"
    return None

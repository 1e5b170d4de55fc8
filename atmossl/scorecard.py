"""Zero-shot tasks on held-out dates, scored against baselines: predictions to report."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr
from rich.console import Console
from rich.progress import track

from atmossl.data.store import Segment
from atmossl.evaluation import baselines as base
from atmossl.evaluation import ridge, spatial
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.evaluation.report.curves import lead_curves, spread_skill_curve
from atmossl.evaluation.report.figures import save_figure
from atmossl.evaluation.report.maps import case_map
from atmossl.evaluation.report.tables import (
    print_summary,
    summarise,
    write_csv,
    write_markdown,
)
from atmossl.evaluation.verify import RATIO_PREFIX, verify
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.predict import Predictor
from atmossl.inference.writer import predictions
from atmossl.schema import EvaluateConfig, TaskConfig


def write_report(
    config: EvaluateConfig,
    trained: TrainedModel,
    test: Sequence[Segment],
    training: Sequence[Segment],
    folder: Path,
    device: str,
) -> pd.DataFrame:
    """Score table, summary, maps and curves of all tasks in `folder`; returns the table."""
    if len(test) != 1:
        raise ValueError(f"split={config.split} has {len(test)} segments; evaluate takes one")
    truth = test[0].to_dataset()
    history = [segment.to_dataset() for segment in training]
    climatology = base.climatology(history, monthly=False)
    rng = np.random.default_rng(config.seed)
    tables = []
    for task in config.tasks:
        predictor = Predictor(
            trained=trained,
            segment=test[0].loaded(),
            task=task.sampler(),
            overlap=config.overlap,
            batch_size=config.batch_size,
            device=device,
        )
        predicted = predict_all(predictor, config.every, task.name)
        table = verify(
            predicted,
            truth,
            baselines_for(task, predictor, predicted, truth, history, climatology, config.ridge),
            climatology,
            task=task.name,
            rng=rng,
            bootstrap=BlockBootstrap(num_resamples=config.bootstrap),
        )
        tables.append(table)
        _draw(task.name, table, predicted, truth, folder)
    table = pd.concat(tables, ignore_index=True)
    summary = summarise(table)
    write_csv(table, folder / "scores.csv")
    write_markdown(summary, folder / "summary.md")
    (folder / "figures.json").write_text(json.dumps(figures(table), indent=1))
    print_summary(mean_over_levels(summary), Console(width=160), title="mean over levels")
    return table


def predict_all(predictor: Predictor, every: int, name: str) -> xr.Dataset:
    """The task at every n-th time that has its truth in the store, in memory."""
    plan, segment = predictor.plan, predictor.segment
    times = predictor.possible_times()
    times = times[times + plan.offsets[-1] * segment.step <= segment.times[-1]][::every]
    if len(times) == 0:
        raise ValueError(f"task {name}: no date of the store has all the steps that it needs")
    parts = list(track(predictions(predictor, times), total=len(times), description=name))
    return xr.concat(parts, "init_time" if plan.is_forecast else "time", combine_attrs="override")


def baselines_for(
    task: TaskConfig,
    predictor: Predictor,
    predicted: xr.Dataset,
    truth: xr.Dataset,
    history: Sequence[xr.Dataset],
    climatology: xr.Dataset,
    with_ridge: bool,
) -> dict[str, xr.Dataset]:
    """What a model has to beat, from the same inputs; fitted on training segments only."""
    plan, step = predictor.plan, predictor.segment.step
    num_steps = predictor.trained.window.time
    if task.name == "forecast":
        init, lead = predicted["init_time"], predicted["lead_time"]
        found = {
            "persistence": base.persistence(truth, init, lead),
            "climatology": base.climatology_forecast(climatology, init, lead),
        }
        problem: Any = ridge.Forecast(history=min(3, plan.reference + 1), leads=plan.offsets)
        reference = init
    elif task.name == "temporal_interpolation":
        reference = predicted["time"]
        found = {
            "linear": base.linear_in_time(truth, reference, before=step, after=step),
            "climatology": base.climatology_at(climatology, reference),
        }
        problem = ridge.TemporalInterpolation(neighbours=min(2, num_steps - plan.reference - 1))
    elif task.name == "downscaling":
        reference = predicted["time"]
        coarse = spatial.coarsen(truth.sel(time=reference), task.factor)
        found = {
            name: function(coarse, truth)
            for name, function in (
                ("bicubic", spatial.bicubic),
                ("bilinear", spatial.bilinear),
                ("conservative", spatial.conservative),
            )
        }
        problem = ridge.Downscaling(factor=task.factor, neighbours=min(1, plan.reference))
    else:
        raise ValueError(
            f"tasks: no baselines for {task.name}; valid: forecast, temporal_interpolation, "
            "downscaling"
        )
    if with_ridge:
        found["ridge"] = ridge.fit_ridge(history, problem).predict(truth, reference)
    return found


def mean_over_levels(summary: pd.DataFrame) -> pd.DataFrame:
    """The summary's numbers averaged over levels, one row per task, variable and lead time."""
    keys = ["task", "variable", "lead_hours"]
    ratios = [c for c in summary if c.startswith("ratio ") and not c.endswith((" low", " high"))]
    chosen = [*ratios, "crps", "acc", "spread_skill"]
    frame: Any = summary
    return frame.groupby(keys, dropna=False, sort=False)[chosen].mean().reset_index()


def figures(table: pd.DataFrame) -> dict[str, Any]:
    """Means over variables and levels of the ratios of RMSE and of the spread-skill ratio."""
    rows: Any = table[(table["source"] == "model") & (table["region"] == "global")]
    found: dict[str, Any] = {}
    per_variable: dict[str, Any] = {}
    for (task, score, lead), part in rows.groupby(["task", "score", "lead_hours"], dropna=False):
        if not str(score).startswith(RATIO_PREFIX) and score != "spread_skill":
            continue
        lead_name = "" if np.isnan(lead) else f"_{lead:g}h"
        name = str(score).removeprefix("rmse_ratio_")
        key = f"{name}_{task}{lead_name}" if name == "spread_skill" else f"{task}{lead_name}_{name}"
        found[key] = round(float(part["value"].mean()), 4)
        for variable, own in part.groupby("variable"):
            per_variable.setdefault(str(variable), {})[key] = round(float(own["value"].mean()), 4)
    return {**found, "per_variable": per_variable}


def _draw(
    task: str, table: pd.DataFrame, predicted: xr.Dataset, truth: xr.Dataset, folder: Path
) -> None:
    """Maps of the middle case of every variable at its middle level, and curves over lead time."""
    for name in map(str, predicted.data_vars):
        field = predicted[name]
        dim = "init_time" if "init_time" in field.dims else "time"
        case = field.isel({dim: field.sizes[dim] // 2})
        level = None
        if "level" in case.dims:
            case = case.isel(level=case.sizes["level"] // 2)
            level = float(case["level"])
        if "lead_time" in case.dims:
            _draw_lead_curves(task, table, name, level, folder)
            case = case.isel(lead_time=0)
        time = case["time"] if dim == "time" else case["init_time"] + case["lead_time"]
        true = truth[name].sel(time=time.values)
        if level is not None:
            true = true.sel(level=level)
        save_figure(case_map(true, case), folder / "maps" / f"{task}_{name}.png")


def _draw_lead_curves(
    task: str, table: pd.DataFrame, name: str, level: float | None, folder: Path
) -> None:
    curves = folder / "curves"
    chosen: Any = table[table["task"] == task]
    save_figure(lead_curves(chosen, variable=name, level=level), curves / f"{task}_{name}.png")
    save_figure(
        spread_skill_curve(chosen, variable=name, level=level),
        curves / f"{task}_{name}_spread_skill.png",
    )

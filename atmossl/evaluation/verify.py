"""Predictions and baselines against truth, as one tidy table."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import xarray as xr

from atmossl.evaluation.alignment import case_times, match_baseline, time_dim, truth_for
from atmossl.evaluation.baselines import climatology_at
from atmossl.evaluation.bootstrap import BlockBootstrap, ratio_interval, score_interval
from atmossl.evaluation.regions import Region, find_regions
from atmossl.evaluation.scores import DEFAULT_SCORES, Case, Rmse, Score

COLUMNS = (
    "task",
    "source",
    "variable",
    "units",
    "level",
    "lead_hours",
    "region",
    "score",
    "value",
    "low",
    "high",
    "num_times",
)
RATIO_PREFIX = "rmse_ratio_vs_"


@dataclass(frozen=True)
class _Plan:
    """What is the same for every row: the task, the scores, and which cases are drawn."""

    task: str
    dim: str
    regions: Sequence[Region]
    scores: Sequence[Score]
    bootstrap: BlockBootstrap
    counts: np.ndarray


def verify(
    predictions: xr.Dataset,
    truth: xr.Dataset,
    baselines: Mapping[str, xr.Dataset],
    climatology: xr.Dataset | None = None,
    *,
    task: str,
    rng: np.random.Generator,
    model_name: str = "model",
    regions: Sequence[str] = ("global",),
    scores: Sequence[Score] = DEFAULT_SCORES,
    bootstrap: BlockBootstrap | None = None,
) -> pd.DataFrame:
    """Every score of the model and its baselines, and the ratios of RMSE model to baseline.

    All sources are scored on the predictions' cases, found by valid time, and share the draws of
    the bootstrap. `climatology` is by month, as `baselines.climatology` gives it; without it the
    anomaly correlation is left out. Level is NaN for surface variables, lead_hours for tasks
    without lead time. Scores that a source cannot have (spread of one member) have no row.

    Raises:
        ValueError: unknown region; variables, times, levels or cells that do not match; a
            baseline called like the model.
    """
    if model_name in baselines:
        raise ValueError(f"baselines: {model_name!r} is the model's name; choose another")
    beside = truth_for(predictions, truth)
    normal = _climatology_for(predictions, climatology)
    sources = {model_name: predictions} | {
        name: match_baseline(baseline, predictions, name) for name, baseline in baselines.items()
    }
    bootstrap = bootstrap or BlockBootstrap()
    dim = time_dim(predictions)
    counts = bootstrap.draw(predictions.sizes[dim], rng)
    plan = _Plan(task, dim, find_regions(regions), scores, bootstrap, counts)
    frames = []
    for name in predictions.data_vars:
        variable = str(name)
        cases = {
            source: Case(dataset[name], beside[name], None if normal is None else normal[name])
            for source, dataset in sources.items()
        }
        labels = {"variable": variable, "units": beside[name].attrs.get("units", "")}
        frames += [frame.assign(**labels) for frame in _variable_frames(plan, cases, model_name)]
    return pd.concat(frames, ignore_index=True).loc[:, list(COLUMNS)]


def _climatology_for(predictions: xr.Dataset, climatology: xr.Dataset | None) -> xr.Dataset | None:
    """Climatology beside every case, on the predictions' labels."""
    if climatology is None:
        return None
    normal = climatology_at(climatology, case_times(predictions))
    return match_baseline(normal, predictions, "climatology")


def _variable_frames(
    plan: _Plan, cases: Mapping[str, Case], model_name: str
) -> Iterator[pd.DataFrame]:
    for region in plan.regions:
        for source, case in cases.items():
            for score in plan.scores:
                if _applies(score, case):
                    per_time = score.per_time(case, region)
                    frame = _score_frame(plan, score, per_time)
                    yield frame.assign(source=source, region=region.name)
        for name in cases:
            if name != model_name:
                frame = _ratio_frame(plan, cases[model_name], cases[name], region)
                yield frame.assign(source=model_name, region=region.name, score=RATIO_PREFIX + name)


def _applies(score: Score, case: Case) -> bool:
    has_climatology = case.climatology is not None
    return case.num_members >= score.min_members and (
        has_climatology or not score.needs_climatology
    )


def _score_frame(plan: _Plan, score: Score, per_time: xr.Dataset) -> pd.DataFrame:
    value = score.value(per_time.mean(plan.dim))
    limits = score_interval(per_time, score.value, plan.dim, plan.counts, plan.bootstrap)
    return _frame(plan, value, limits).assign(score=score.name)


def _ratio_frame(plan: _Plan, model: Case, baseline: Case, region: Region) -> pd.DataFrame:
    rmse = Rmse()
    ours, theirs = rmse.per_time(model, region), rmse.per_time(baseline, region)
    error = rmse.value(theirs.mean(plan.dim))
    value = rmse.value(ours.mean(plan.dim)) / error.where(error > 0)
    limits = ratio_interval(ours, theirs, rmse.value, plan.dim, plan.counts, plan.bootstrap)
    return _frame(plan, value, limits)


def _frame(
    plan: _Plan, value: xr.DataArray, limits: tuple[xr.DataArray, xr.DataArray]
) -> pd.DataFrame:
    """Rows over level and lead time; limits are NaN if the record is too short for any."""
    num_times = plan.counts.shape[1]
    low, high = limits
    if not plan.bootstrap.is_possible(num_times):
        low, high = xr.full_like(low, np.nan), xr.full_like(high, np.nan)
    table = xr.Dataset({"value": value, "low": low, "high": high})
    table = table.expand_dims([d for d in ("level", "lead_time") if d not in table.dims])
    frame = table.to_dataframe().reset_index()
    level = frame["level"].astype(float) if "level" in value.dims else np.nan
    hours = pd.to_timedelta(frame["lead_time"].to_numpy()) / pd.Timedelta(hours=1)
    lead = hours if "lead_time" in value.dims else np.nan
    return frame.assign(task=plan.task, num_times=num_times, level=level, lead_hours=lead)

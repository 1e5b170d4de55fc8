"""The baselines of a checkpoint that is given another model's fields: what this model says itself.

`uncorrected` are the other model's fields, interpolated to the cells of the truth. `bias_corrected`
takes off the mean error of every cell, `regression` is a line for every cell, variable and level,
both from the training record (model output statistics, Glahn and Lowry 1972). `ridge`, for
task=correction, is a ridge regression for each circle of latitude on the bias-corrected fields
of the other model: all variables in 5 x 5 cells, at the date and one step before.

The other model's fields are those of a stream of role `input` with a store of its own. Where there
are several such stores, the names of their baselines end in `_NAME`.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import xarray as xr

from atmossl.batch import StreamSpec
from atmossl.data.segment import Segment
from atmossl.evaluation import ridge
from atmossl.evaluation.alignment import case_times
from atmossl.evaluation.baselines import time_blocks
from atmossl.evaluation.ridge.predictors import RidgeCorrection
from atmossl.evaluation.spatial import on_cells
from atmossl.geometry import Grid
from atmossl.inference.plan import Plan
from atmossl.masking.cells import other_models
from atmossl.scorecard.baselines import Answers, Setting, beside_missing
from atmossl.scorecard.records import is_small, record_of

UNCORRECTED = "uncorrected"
_OTHER = "other:"  # before the names of the other model's variables beside those of the truth


@dataclass(frozen=True)
class OtherModel:
    """A store of another model's fields, and which of them are scored.

    data: of its streams. suffix: of the names of its baselines. levels: of each variable, in hPa.
    """

    data: str
    suffix: str
    levels: Mapping[str, tuple[int, ...]]

    def record(self, segment: Segment, grid: Grid, times: np.ndarray | None = None) -> xr.Dataset:
        """The fields on the cells of a grid, at all dates that a record of the truth has in common
        with the store, or at those among the given times."""
        source = segment.sources[self.data].segment
        chosen = np.isin(source.times, segment.times if times is None else times)
        record = record_of(source)[list(self.levels)].isel(time=np.flatnonzero(chosen))
        return on_cells(record.load(), grid)


def other_models_of(specs: Sequence[StreamSpec]) -> list[OtherModel]:
    """The stores of other models that the streams of a checkpoint read."""
    given = other_models(specs)
    names = sorted({spec.data for spec in given})
    predicted = [spec for spec in specs if spec.role == "predict"]
    models = []
    for data in names:
        levels: dict[str, tuple[int, ...]] = {}
        for spec in (spec for spec in given if spec.data == data):
            for name in spec.variables:
                has = {lev for p in predicted if name in p.variables for lev in p.level_values}
                common = tuple(level for level in spec.level_values if level in has)
                levels |= {name: levels.get(name, ()) + common} if common else {}
        models.append(OtherModel(data, f"_{data}" if len(names) > 1 else "", levels))
    return models


@dataclass(frozen=True)
class LinearCorrection:
    """For every cell, variable and level: mean error of the other model, and the line through its
    values and the truth's, of the training record."""

    error: xr.Dataset
    slope: xr.Dataset
    intercept: xr.Dataset

    @classmethod
    def fit(cls, pairs: Iterator[tuple[xr.Dataset, xr.Dataset]]) -> "LinearCorrection":
        """pairs: the other model's fields and the truth at the same dates, block by block. Sums are
        of departures from the first block's means, so that squares lose no digits.

        Raises:
            ValueError: no date in common.
        """
        origins: tuple[xr.Dataset, xr.Dataset] | None = None
        sums: list[xr.Dataset] = []
        for block in pairs:
            if origins is None:
                first, second = (part.mean("time").fillna(0.0) for part in block)
                origins = (first, second)
            x, y = (b.astype(np.float64) - o for b, o in zip(block, origins, strict=True))
            there = (x.notnull() & y.notnull()).astype(np.float64)
            x, y = x.where(there > 0, 0.0), y.where(there > 0, 0.0)
            new = [terms.sum("time") for terms in (there, x, y, x * x, x * y)]
            sums = [a + b for a, b in zip(sums, new, strict=True)] if sums else new
        if origins is None:
            raise ValueError(
                "the training records of the other model and of the truth share no date"
            )
        count, x, y, xx, xy = sums
        count = count.where(count > 0)
        mean_x, mean_y = x / count, y / count
        variance, covariance = xx / count - mean_x**2, xy / count - mean_x * mean_y
        slope = xr.where(variance > 1e-12 * (xx / count), covariance / variance, 0.0)
        mean_x, mean_y = mean_x + origins[0], mean_y + origins[1]
        return cls(mean_x - mean_y, slope, mean_y - slope * mean_x)

    def unbiased(self, other: xr.Dataset) -> xr.Dataset:
        return (other - self.error).astype(np.float32)

    def regressed(self, other: xr.Dataset) -> xr.Dataset:
        return (self.slope * other + self.intercept).astype(np.float32)


@dataclass(frozen=True)
class OtherModelBaselines:
    """The fitted baselines of one store; called with a prediction and the record that it is of."""

    model: OtherModel
    grid: Grid
    lines: LinearCorrection
    regression: ridge.RidgeModel | None

    def __call__(self, predicted: xr.Dataset, segment: Segment) -> Answers:
        """The answers for the cases of a prediction, missing for fields and dates that the other
        model lacks."""
        dates = np.unique(case_times(predicted).to_numpy())
        step = segment.sources[self.model.data].segment.step
        read = np.concatenate([dates - step, dates])  # a step before, for the regression
        record = self.model.record(segment, self.grid, read)
        unbiased = self.lines.unbiased(record)
        answers = {
            UNCORRECTED: record,
            "bias_corrected": unbiased,
            "regression": self.lines.regressed(record),
        }
        if self.regression is not None:
            answers["ridge"] = _regressed(self.regression, unbiased, dates)
        return {
            f"{name}{self.model.suffix}": _at_cases(answer, predicted)
            for name, answer in answers.items()
        }


def is_compared(plan: Plan) -> bool:
    """Whether a task is given the other model's fields at the dates that it writes."""
    steps = plan.steps
    return not steps.is_forecast and len(steps.read) == plan.trained.window.time * steps.refine


def fitted_other_models(
    plan: Plan, setting: Setting, training: Sequence[Segment]
) -> list[OtherModelBaselines]:
    """The baselines of every other model that a checkpoint is given for a task."""
    if not is_compared(plan):
        return []
    return [_fitted(model, setting, training) for model in other_models_of(plan.trained.specs)]


def _fitted(
    model: OtherModel, setting: Setting, training: Sequence[Segment]
) -> OtherModelBaselines:
    lines = LinearCorrection.fit(_pairs(model, setting, training))
    regression = None
    if setting.task.name == "correction" and can_regress(model, setting, training):
        names = _regressed_variables(model, setting)
        runs = []
        for segment, record in zip(training, setting.history, strict=True):
            other = lines.unbiased(model.record(segment, setting.grid)[names])
            runs.append(_beside(other, record[names].sel(time=other["time"])))
        count = len(ridge.Channels.of(runs[0])) // 2  # as many of the truth as of the other model
        of_other = tuple(range(count, 2 * count))
        task = RidgeCorrection(sources=2 * of_other, hidden_channels=tuple(range(count)))
        regression = ridge.fit_ridge(runs, task)
    return OtherModelBaselines(model, setting.grid, lines, regression)


def _regressed_variables(model: OtherModel, setting: Setting) -> list[str]:
    """The variables that the truth and the other model have on the same levels, without gaps."""
    return [name for name in setting.complete if setting.levels[name] == model.levels.get(name)]


def can_regress(model: OtherModel, setting: Setting, training: Sequence[Segment]) -> bool:
    """Whether the ridge regression can be fitted: the same levels, at the same steps, without
    missing values, on a closed circle of longitude, in records that fit into memory."""
    possible = setting.with_ridge and setting.grid.periodic
    return (
        possible
        and bool(_regressed_variables(model, setting))
        and all(
            segment.sources[model.data].segment.step == segment.step
            and not segment.sources[model.data].segment.may_miss
            and is_small(segment)
            for segment in training
        )
    )


def _pairs(
    model: OtherModel, setting: Setting, training: Sequence[Segment]
) -> Iterator[tuple[xr.Dataset, xr.Dataset]]:
    """The other model's fields and the truth at their common dates, in blocks."""
    for segment, record in zip(training, setting.history, strict=True):
        times = segment.sources[model.data].segment.times
        common = record.isel(time=np.flatnonzero(np.isin(segment.times, times)))
        for truth in time_blocks(common[list(model.levels)]):
            other = model.record(segment, setting.grid, truth["time"].to_numpy())
            yield xr.align(other, truth, join="inner", exclude=("latitude", "longitude"))


def _beside(other: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """The truth, and the other model's variables under names of their own."""
    return truth.assign({f"{_OTHER}{name}": field for name, field in other.data_vars.items()})


def _regressed(model: ridge.RidgeModel, unbiased: xr.Dataset, dates: np.ndarray) -> xr.Dataset:
    """The regression at those dates that have a step before them. Zeros stand in the place of the
    truth, which the regression does not read."""
    names = [
        name for name in unbiased.data_vars if f"{_OTHER}{name}" in model.frame.channels.levels
    ]
    other, times = unbiased[names], unbiased["time"].to_numpy()
    run = _beside(other, xr.zeros_like(other))
    pairs = [(np.flatnonzero(times == date), date) for date in dates]
    answers = [
        model.predict(run.isel(time=[index[0] - 1, index[0]]), np.array([date]))
        for index, date in pairs
        if len(index) and index[0] > 0
    ]
    if not answers:
        return other.isel(time=slice(0, 0))
    return xr.concat(answers, "time", combine_attrs="override")[names]


def _at_cases(answer: xr.Dataset, predicted: xr.Dataset) -> xr.Dataset:
    """The answer for the cases, levels and variables of a prediction, missing where it has none."""
    common = [name for name in predicted.data_vars if name in answer]
    dims = [dim for dim in ("time", "level") if dim in predicted.dims and dim in answer.dims]
    chosen = answer[common].reindex({dim: predicted[dim] for dim in dims})
    return beside_missing(chosen, predicted)

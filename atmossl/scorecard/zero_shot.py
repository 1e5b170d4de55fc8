"""A checkpoint's zero-shot tasks on held-out dates."""

from collections.abc import Iterator, Sequence

import numpy as np
import xarray as xr
from rich.progress import track

from atmossl.data.segment import Segment
from atmossl.data.store import only_segment
from atmossl.evaluation.alignment import case_times
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.report.content import Example, TaskReport
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.predict import Predictor
from atmossl.inference.writer import predictions
from atmossl.schema import EvaluateConfig, TaskConfig
from atmossl.scorecard.about import about, period
from atmossl.scorecard.hidden import beside, hidden_cells, only_hidden
from atmossl.scorecard.records import is_small, record_of
from atmossl.scorecard.rivals import Setting, build_rivals
from atmossl.scorecard.verified import empty_tally, example_of, reported

_CHUNK_BYTES = 64 * 2**20


def score_tasks(
    config: EvaluateConfig,
    trained: TrainedModel,
    test: Sequence[Segment],
    training: Sequence[Segment],
    device: str,
) -> list[TaskReport]:
    """Every task of the configuration against its rivals, a few dates at a time.

    Raises:
        ValueError: two tasks of one name, one that has no truth, or one that does not fit store
            or checkpoint; before any is scored.
    """
    _check_tasks(config.tasks)
    segment = only_segment(test, config.segment, config.split)
    if not segment.calendar.plain:
        raise ValueError(
            f"split={config.split}: scores by season and hour need the standard calendar, "
            f"{segment.location} has {segment.calendar.name}; valid: predict, or convert the "
            "store with xarray's convert_calendar"
        )
    segment = segment.loaded() if is_small(segment) else segment
    history = [record_of(segment) for segment in training]
    climate = Climate.of(history, quantiles=config.tails)
    rng = np.random.default_rng(config.seed)
    predictors = {
        task.name: (
            task,
            Predictor(
                trained=trained,
                segment=segment,
                task=task.sampler(),
                overlap=config.overlap,
                tilings=config.tilings,
                batch_size=config.batch_size,
                device=device,
            ),
        )
        for task in config.tasks
    }
    times = {name: scored_times(p, config.every, name) for name, (_, p) in predictors.items()}
    for name, (_, predictor) in predictors.items():  # refuses what does not fit store or model
        predictor.first_view(times[name][0])
    return [
        _score_task(config, task, predictor, times[name], history, climate, rng)
        for name, (task, predictor) in predictors.items()
    ]


def _check_tasks(tasks: Sequence[TaskConfig]) -> None:
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"tasks: {twice} are there twice; evaluate them in reports of their own")
    for task in tasks:
        if task.sampler().fills_missing:
            raise ValueError(
                f"tasks: {task.name} with missing=true fills what has no truth; to score it, hide "
                "cells that are known: boxes, mask_file, observed or stations"
            )


def scored_times(predictor: Predictor, every: int, name: str) -> np.ndarray:
    """Every n-th time that has its truth in the store.

    Raises:
        ValueError: there is none.
    """
    times = predictor.with_truth(predictor.possible_times())[::every]
    if len(times) == 0:
        raise ValueError(f"task {name}: no date of the store has all the steps that it needs")
    return times


def _score_task(
    config: EvaluateConfig,
    task: TaskConfig,
    predictor: Predictor,
    times: np.ndarray,
    history: Sequence[xr.Dataset],
    climate: Climate,
    rng: np.random.Generator,
) -> TaskReport:
    truth, plan = record_of(predictor.segment), predictor.plan
    setting = Setting(
        task=predictor.task,
        offsets=plan.offsets,
        reference=plan.reference,
        num_steps=predictor.trained.window.time,
        step=predictor.segment.step,
        truth=truth,
        history=history,
        climate=climate,
        with_ridge=config.ridge and not predictor.segment.may_miss,
    )
    rivals = build_rivals(task.name, setting)
    hidden = hidden_cells(predictor.task, predictor.grid)
    tally = empty_tally(config, task.name)
    middle = len(times) // 2
    examples: list[Example] = []
    for first, predicted in _chunks(predictor, times, task.name):
        predicted = only_hidden(predictor.task, predicted)
        here = _times_of(predicted, truth)
        answers = {name: answer.load() for name, answer in rivals(predicted).items()}
        tally.add(predicted, beside(here, hidden), answers, climate)
        dim = "init_time" if plan.is_forecast else "time"
        place = (middle - first) * (1 if plan.is_forecast else len(plan.offsets))
        if 0 <= place < predicted.sizes[dim]:
            chosen = predicted.isel({dim: [place]})
            names = map(str, predicted.data_vars)
            examples = [example_of(chosen, here, name, hidden) for name in names]
    step_hours = float(predictor.step / np.timedelta64(1, "h"))
    said = about(predictor.task, plan, step_hours, predictor.grid)
    return reported(config, tally, examples, rng, about=said, period=period(times))


def _times_of(predicted: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """The truth of some predictions, in memory."""
    return truth.sel(time=np.unique(case_times(predicted).to_numpy())).load()


def _chunks(predictor: Predictor, times: np.ndarray, name: str) -> Iterator[tuple[int, xr.Dataset]]:
    """Predictions of a few times in one dataset, and the number of the first of them."""
    dim = "init_time" if predictor.plan.is_forecast else "time"
    waiting: list[xr.Dataset] = []
    done = 0
    for one in track(predictions(predictor, times), total=len(times), description=name):
        waiting.append(one)
        full = len(waiting) * one.nbytes >= _CHUNK_BYTES
        if full or done + len(waiting) == len(times):
            yield done, xr.concat(waiting, dim, combine_attrs="override")
            done, waiting = done + len(waiting), []

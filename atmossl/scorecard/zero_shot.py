"""Scores a checkpoint's zero-shot tasks on held-out dates."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import xarray as xr

from atmossl.data.climatology import months_of, read_monthly
from atmossl.data.segment import Segment
from atmossl.data.variables import VARIABLES
from atmossl.evaluation.alignment import case_times
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.report.content import Example, Given, TaskReport
from atmossl.evaluation.report.figures import readable
from atmossl.evaluation.verify import Tally
from atmossl.inference.cases import VisibleInput, predictions, visible_inputs
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.plan import Options, Plan, check_draws, plan_prediction
from atmossl.inference.tiles import first_view
from atmossl.masking.tasks import Task
from atmossl.progress import counted, telling
from atmossl.schema import EvaluateConfig
from atmossl.scorecard.baselines import Baselines, Setting, build_baselines
from atmossl.scorecard.checks import check_baselines, check_records
from atmossl.scorecard.other_models import UNCORRECTED, OtherModelBaselines, fitted_other_models
from atmossl.scorecard.records import chosen_segments, is_small, record_of
from atmossl.scorecard.task_report import empty_tally, example_of, reported, span, valid_time, when
from atmossl.value_faults import listed, told_in_list

_CHUNK_BYTES = 64 * 2**20


@dataclass(frozen=True)
class _Run:
    """A task on one record, and the dates that are scored."""

    plan: Plan
    times: np.ndarray


def score_tasks(
    config: EvaluateConfig,
    trained: TrainedModel,
    test: Sequence[Segment],
    training: Sequence[Segment],
    device: str,
    tell: Callable[[Plan, np.ndarray], object] | None = None,
) -> list[TaskReport]:
    """Score every task of the configuration against its baselines, a few dates at a time.

    tell: called with the plan and the dates of every task and record before any is scored.
    All segments of the split are scored, or the one that the configuration names: each by itself,
    all in one table.

    Raises:
        ValueError: two tasks of one name, one that has no truth, or one that does not fit store
            or checkpoint; before any record is read.
    """
    check_tasks(config.tasks)
    segments = chosen_segments(test, config)
    check_records(config, segments, training)
    mean = None
    if config.climatology:
        mean = read_monthly(config.climatology, training, months_of(segments))
    runs = _runs(config, trained, segments, device)
    settings = [
        _setting(config, of_task[0].plan, task.name, training)
        for task, of_task in zip(config.tasks, runs, strict=True)
    ]
    if tell is not None:
        for run in [run for of_task in runs for run in of_task]:
            tell(run.plan, run.times)
    history = [record_of(segment) for segment in training]
    climate = Climate.of(history, quantiles=config.tails, mean=mean)
    rng = np.random.default_rng(config.seed)
    settings = [replace(setting, history=history, climate=climate) for setting in settings]
    return [
        _score_task(config, task, of_task, setting, training, rng)
        for task, of_task, setting in zip(config.tasks, _loaded(runs), settings, strict=True)
    ]


def _runs(
    config: EvaluateConfig, trained: TrainedModel, segments: Sequence[Segment], device: str
) -> list[list[_Run]]:
    """The dates of every record that are scored, for every task. ValueError for a task that fits
    neither store nor model."""
    check_draws(trained, config.members)
    options = Options(
        overlap=config.overlap,
        tilings=config.tilings,
        batch_size=config.batch_size,
        device=device,
        members=config.members,
    )
    names = [task.name for task in config.tasks]
    faults: list[str] = []
    plans: list[list[Plan]] = []
    for task in config.tasks:
        try:
            with told_in_list(task.name, names):
                plans.append([plan_prediction(trained, task, [s], options) for s in segments])
        except ValueError as error:
            faults.append(str(error))
    if faults:
        raise ValueError("\n".join(dict.fromkeys(faults)))
    runs = [
        scored_runs(of_task, config.every, name) for name, of_task in zip(names, plans, strict=True)
    ]
    for name, of_task in zip(names, runs, strict=True):  # refuses what does not fit the model
        with told_in_list(name, names):
            first_view(of_task[0].plan, of_task[0].times[0])
    return runs


def check_tasks(tasks: Sequence[Task]) -> None:
    """Raise ValueError for two tasks of one name, or a task that has no truth."""
    names = [task.name for task in tasks]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(
            f"tasks: {listed(twice)} are there twice; evaluate them in reports of their own"
        )
    for task in tasks:
        why = task.why_unscored()
        if why is not None:
            raise ValueError(f"tasks: {task.name} with {why}")


def scored_runs(plans: Sequence[Plan], every: int, name: str) -> list[_Run]:
    """For each plan every n-th time for which the store holds the truth; plans without such times
    are left out.

    Raises:
        ValueError: all have none.
    """
    runs = []
    for plan in plans:
        times = plan.with_truth(plan.possible_times())[::every]
        runs += [_Run(plan, times)] if len(times) else []
    if not runs:
        raise ValueError(f"task {name}: no date of the store has all the steps that it needs")
    return runs


def _setting(config: EvaluateConfig, plan: Plan, name: str, training: Sequence[Segment]) -> Setting:
    """What a task's baselines may use, apart from the training record.

    Raises:
        ValueError: records that the task's baselines cannot use.
    """
    segment = plan.segment
    setting = Setting(
        task=plan.task,
        offsets=plan.steps.offsets,
        reference=plan.steps.reference,
        num_steps=plan.trained.window.time,
        step=segment.step,
        grid=plan.grid,
        with_ridge=config.ridge,
        levels={v: segment.levels_of(v) for v in segment.variables if v not in segment.may_miss},
    )
    check_baselines(setting, name, training)
    return setting


def _loaded(runs: Sequence[Sequence[_Run]]) -> list[list[_Run]]:
    """The same dates of the same records, in memory if they are small."""
    segments = {id(run.plan.segment): run.plan.segment for of in runs for run in of}
    loaded = {
        key: segment.loaded() if is_small(segment) else segment for key, segment in segments.items()
    }

    def with_record(run: _Run) -> _Run:
        segment = loaded[id(run.plan.segment)]
        return replace(run, plan=replace(run.plan, segments=(segment,)))

    return [list(map(with_record, of_task)) for of_task in runs]


def _score_task(
    config: EvaluateConfig,
    task: Task,
    runs: Sequence[_Run],
    setting: Setting,
    training: Sequence[Segment],
    rng: np.random.Generator,
) -> TaskReport:
    plan, climate = runs[0].plan, setting.climate
    baselines = build_baselines(task.name, setting)
    others = fitted_other_models(plan, setting, training)
    tally = empty_tally(config, task.name, box_shift=_box_shift(task))
    examples = [
        _tallied(tally, run, baselines, others, climate, str(n)) for n, run in enumerate(runs)
    ]
    step_hours = float(plan.step / np.timedelta64(1, "h"))
    said = plan.task.describe(plan.steps, step_hours, plan.grid)
    if _box_shift(task):
        said += " Means over boxes are of boxes that lie across the coarse cells."
    spans = [span(run.times, run.plan.segment.name) for run in runs]
    return reported(config, tally, examples[0], rng, about=said, spans=spans)


def _tallied(
    tally: Tally,
    run: _Run,
    baselines: Baselines,
    others: Sequence[OtherModelBaselines],
    climate: Climate,
    series: str,
) -> list[Example]:
    """Score all dates of one record; its middle one is the example of every variable."""
    plan, times = run.plan, run.times
    truth, steps = record_of(plan.segment), plan.steps
    hidden = plan.task.hidden_cells(plan.grid)
    middle, shift = len(times) // 2, _box_shift(plan.task)
    examples: list[Example] = []
    for first, predicted in _chunks(plan, times, tally.task):
        predicted = only_hidden(plan.task, predicted)
        here = _times_of(predicted, truth)
        answers = {name: answer.load() for name, answer in baselines(predicted, truth).items()}
        for other in others:
            answers |= other(predicted, plan.segment)
        tally.add(predicted, where_hidden(here, hidden), answers, climate, series)
        dim = "init_time" if steps.is_forecast else "time"
        place = (middle - first) * (1 if steps.is_forecast else len(steps.offsets))
        if 0 <= place < predicted.sizes[dim]:
            chosen = predicted.isel({dim: [place]})
            examples = [
                example_of(
                    chosen, here, str(name), hidden=hidden, baselines=answers, box_shift=shift
                )
                for name in predicted.data_vars
            ]
    return _with_inputs(plan, times[middle], examples)


def _box_shift(task: Task) -> int:
    """Half the side of the blocks whose means a downscaling is given; 0 for other tasks."""
    return task.downscaling.factor // 2 if task.downscaling else 0


def _with_inputs(plan: Plan, time: np.datetime64, examples: list[Example]) -> list[Example]:
    """The examples of the case at a reference time with what the model saw."""
    lead = np.timedelta64((valid_time(examples[0].prediction) - time).item(), "ns")
    levels = {example.variable: int(example.level or 0) for example in examples}
    inputs = visible_inputs(plan, time, lead, levels)
    return [
        replace(example, given=_given(inputs[example.variable], example))
        if example.variable in inputs
        else replace(example, given=given_by_other_model(example))
        for example in examples
    ]


def given_by_other_model(example: Example) -> Given | None:
    """What another model says of a field of which nothing else was visible, if one was given."""
    field = example.baselines.get(UNCORRECTED)
    if field is None or not bool(field.notnull().any()):
        return None
    return Given("input: the other model", field, is_predicted=True)


def _given(visible: VisibleInput, example: Example) -> Given:
    is_predicted = (visible.variable, visible.level) == (example.variable, int(example.level or 0))
    title = f"input {when(visible.offset)}"
    units = example.truth.attrs.get("units", "")
    if not is_predicted:
        place = f" {visible.level} hPa" if visible.level else ""
        title += f": {readable(visible.variable)}{place}"
        units = VARIABLES[visible.variable].units if visible.variable in VARIABLES else ""
    values = example.truth.copy(data=visible.values).rename(visible.variable)
    return Given(title, values.assign_attrs(units=units), is_predicted)


def only_hidden(task: Task, predicted: xr.Dataset) -> xr.Dataset:
    """A prediction without the variables and levels that were given. For a union of a forecast
    and other tasks lead time 0 is left out as well, since most of the field was given there."""
    variables, levels = task.scored_variables, task.scored_levels
    if variables:
        predicted = predicted[[name for name in predicted.data_vars if name in variables]]
    if levels and "level" in predicted.dims:
        predicted = predicted.sel(level=[v for v in predicted["level"] if v in levels])
    if not task.scores_init_time and "lead_time" in predicted.dims:
        predicted = predicted.sel(lead_time=predicted["lead_time"] != np.timedelta64(0, "ns"))
    return predicted


def where_hidden(truth: xr.Dataset, hidden: np.ndarray | None) -> xr.Dataset:
    """The truth where cells were hidden, and missing values elsewhere, so that given cells are
    not scored."""
    if hidden is None:
        return truth
    return truth.where(xr.DataArray(hidden, dims=("latitude", "longitude")))


def _times_of(predicted: xr.Dataset, truth: xr.Dataset) -> xr.Dataset:
    """The truth of some predictions, in memory."""
    return truth.sel(time=np.unique(case_times(predicted).to_numpy())).load()


def _chunks(plan: Plan, times: np.ndarray, name: str) -> Iterator[tuple[int, xr.Dataset]]:
    """Predictions of a few times in one dataset, and the number of the first of them."""
    dim = "init_time" if plan.steps.is_forecast else "time"
    waiting: list[xr.Dataset] = []
    done = 0
    with telling(f"{name}, {counted(len(times), 'time')}", len(times)) as advance:
        for predicted in predictions(plan, times):
            advance(1.0)
            waiting.append(predicted)
            full = len(waiting) * predicted.nbytes >= _CHUNK_BYTES
            if full or done + len(waiting) == len(times):
                yield done, xr.concat(waiting, dim, combine_attrs="override")
                done, waiting = done + len(waiting), []

"""Checks that a comparison is possible, from the records' dates and coordinates, before any
field is read."""

from collections.abc import Sequence

from atmossl.data.segment import HOUR, Segment
from atmossl.evaluation import ridge
from atmossl.evaluation.climate import is_precipitation, rain_factor
from atmossl.evaluation.infill import require_visible
from atmossl.schema import EvaluateConfig
from atmossl.scorecard.baselines import Setting, problem_of
from atmossl.scorecard.task_report import check_regions


def check_records(
    config: EvaluateConfig, test: Sequence[Segment], training: Sequence[Segment]
) -> None:
    """Raise ValueError unless the records of the split can be scored, cell by cell, beside the
    training record."""
    first = training[0]
    check_regions(config, test[0].grid)
    for segment in test:
        check_calendar(config, segment)
        differs = segment.grid.difference(first.grid)
        if differs:
            raise ValueError(
                f"split={config.split}: {segment.location} is on other cells than split=train, "
                f"{first.location}, of which the climatology is: {differs}; regrid one of them"
            )
    check_rain(first)


def check_calendar(config: EvaluateConfig, segment: Segment) -> None:
    """Raise ValueError for a record of other dates than those of the standard calendar."""
    if not segment.calendar.plain:
        raise ValueError(
            f"split={config.split}: scores by season and hour need the standard calendar, "
            f"{segment.location} has {segment.calendar.name}; valid: predict, or convert the "
            "store with xarray's convert_calendar"
        )


def check_rain(training: Segment) -> None:
    """Raise ValueError for precipitation in units that are not known."""
    for name in filter(is_precipitation, training.variables):
        rain_factor(name, training.dataset[name].attrs.get("units"))


def check_baselines(setting: Setting, name: str, training: Sequence[Segment]) -> None:
    """Raise ValueError if a task's baselines cannot be computed from the training record.

    name: of the task, for messages.
    """
    hidden = setting.task.hidden_cells(setting.grid)
    if hidden is not None:
        require_visible(hidden)
    problem = problem_of(setting)
    if problem is None:
        return
    try:
        _check_steps(setting, training[0])
        ridge.check_runs(training[0].grid, [len(s.times) for s in training], problem)
    except ValueError as error:
        raise ValueError(f"task {name}: {error}; ridge=false leaves the regression out") from error


def _check_steps(setting: Setting, training: Segment) -> None:
    """Raise ValueError if the training record has another time step: a regression fitted to it
    would be of no use."""
    if training.step != setting.step:
        raise ValueError(
            f"split=train, {training.location}, has steps of {training.step_hours:g} h, the record "
            f"that is scored {setting.step / HOUR:g} h"
        )

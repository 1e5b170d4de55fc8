"""The baselines of each task. They use the same inputs as the model, and are fitted on training
segments only.

A builder makes a task's baselines once (a ridge regression is fitted then); they answer chunk by
chunk, from the predictions, of which they take the labels, and the record that these are of. A new
task is a new entry of `BUILDERS`; one without an entry is compared to climatology.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import xarray as xr

from atmossl.evaluation import baselines as base
from atmossl.evaluation import ridge, spatial
from atmossl.evaluation.climate import NO_CLIMATE, Climate
from atmossl.evaluation.infill import HarmonicInfill, LocalRidge
from atmossl.geometry import Grid
from atmossl.progress import console_of_output

Answers = dict[str, xr.Dataset]
Baselines = Callable[[xr.Dataset, xr.Dataset], Answers]


@dataclass(frozen=True)
class Setting:
    """What baselines may use: the task, the grid of the truth, the training record.

    Attributes:
        task: its mask, with the choices that were made.
        offsets: steps written, from the reference step; reference: that step in the window of
            `num_steps`.
        levels: of the variables that never miss a value, which alone a regression sees and
            predicts, in hPa; (0,) at the surface.
        history, climate: the training record and what is known of it; not read by `problem_of`.
    """

    task: Any
    offsets: tuple[int, ...]
    reference: int
    num_steps: int
    step: np.timedelta64
    grid: Grid
    with_ridge: bool
    levels: Mapping[str, tuple[int, ...]]
    history: Sequence[xr.Dataset] = ()
    climate: Climate = NO_CLIMATE

    @property
    def complete(self) -> tuple[str, ...]:
        return tuple(self.levels)

    @property
    def known(self) -> list[xr.Dataset]:
        """The training record of the complete variables."""
        return [record[list(self.complete)] for record in self.history]

    @property
    def regresses(self) -> bool:
        return self.with_ridge and len(self.complete) > 0

    def tell_of_ridge(self) -> None:
        """Say that a ridge regression is being fitted, before it is."""
        console_of_output().print(
            f"{self.task.name}: fitting a ridge regression to the training record, which takes "
            "minutes on a long one (ridge=false leaves it out)"
        )

    def fitted(self) -> Baselines:
        """The ridge regression of the training record, or none; missing for other variables."""
        problem = problem_of(self)
        if problem is None:
            return lambda predicted, truth: {}  # noqa: ARG005
        self.tell_of_ridge()
        model = ridge.fit_ridge(self.known, problem)
        dim = "init_time" if problem.is_forecast else "time"

        def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
            answer = model.predict(truth[list(self.complete)], predicted[dim].to_numpy())
            return {"ridge": beside_missing(answer, predicted)}

        return baselines

    def rolled_out(self) -> Baselines:
        """The ridge regression of one pass, which goes on from its own output in passes as long as
        the model's; none of a forecast in one pass."""
        pass_steps = round(np.timedelta64(round(self.task.pass_hours * 60), "m") / self.step)
        one_pass = replace(self, offsets=self.offsets[:pass_steps])
        problem = problem_of(one_pass)
        if problem is None or len(one_pass.offsets) == len(self.offsets):
            return lambda predicted, truth: {}  # noqa: ARG005
        model = ridge.fit_ridge(self.known, problem)

        def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
            complete, times = truth[list(self.complete)], predicted["init_time"].to_numpy()
            answer = model.roll_out(complete, times, len(self.offsets))
            return {"ridge_rollout": beside_missing(answer, predicted)}

        return baselines

    def climatology(self, predicted: xr.Dataset) -> xr.Dataset:
        if "init_time" in predicted.dims:
            return base.climatology_forecast(
                self.climate.mean, predicted["init_time"], predicted["lead_time"]
            )
        return base.climatology_at(self.climate.mean, predicted["time"])


def beside_missing(answer: xr.Dataset, predicted: xr.Dataset) -> xr.Dataset:
    """A baseline's answer, with missing values for variables that are predicted but that it
    lacks."""
    member = predicted.isel(member=0, drop=True) if "member" in predicted.dims else predicted
    lacking = [name for name in member.data_vars if name not in answer]
    return answer.assign({name: xr.full_like(member[name], np.nan) for name in lacking})


def problem_of(setting: Setting) -> ridge.RidgeTask | None:
    """The regression that a task is compared with (`REGRESSIONS`); None for other tasks and without
    complete variables."""
    make = REGRESSIONS.get(setting.task.name)
    return make(setting) if make is not None and setting.regresses else None


def _from_last_states(setting: Setting) -> ridge.RidgeTask:
    return ridge.RidgeForecast(history=min(3, setting.reference + 1), leads=setting.offsets)


def _from_neighbours_in_time(setting: Setting) -> ridge.RidgeTask | None:
    if len(setting.offsets) > 1:  # the answers of a regression would differ from step to step
        return None
    return ridge.TemporalInterpolation(neighbours=_steps_around(setting, 2))


def _from_coarse_cells_around(setting: Setting) -> ridge.RidgeTask:
    return ridge.RidgeDownscaling(factor=setting.task.factor, neighbours=_steps_around(setting, 1))


def _from_given_channels(setting: Setting) -> ridge.RidgeTask | None:
    hidden, count = _hidden_channels(setting), sum(map(len, setting.levels.values()))
    if len(hidden) in (0, count):  # all is told by streams that are not predicted
        return None
    return ridge.CrossVariable(hidden, neighbours=_steps_around(setting, 1))


def _steps_around(setting: Setting, most: int) -> int:
    """How many steps on either side of the written one the window has, `most` at most."""
    return min(most, setting.reference, setting.num_steps - setting.reference - 1)


REGRESSIONS: dict[str, Callable[[Setting], ridge.RidgeTask | None]] = {  # by the name of a task
    "forecast": _from_last_states,
    "temporal_interpolation": _from_neighbours_in_time,
    "downscaling": _from_coarse_cells_around,
    "cross_variable": _from_given_channels,
}


def _hidden_channels(setting: Setting) -> tuple[int, ...]:
    """The positions of the channels (variables on levels) that a task hides, among all channels."""
    task = setting.task
    channels = [(name, level) for name, levels in setting.levels.items() for level in levels]
    return tuple(
        number
        for number, (name, level) in enumerate(channels)
        if (not task.variables or name in task.variables)
        and (not task.levels or level in task.levels)
    )


def forecast(setting: Setting) -> Baselines:
    """Baselines of forecasts: persistence, climatology, and a ridge regression on the last three
    states; of rollouts also one that goes on from its own output."""
    regression, rollout = setting.fitted(), setting.rolled_out()

    def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
        answers = _persisting(setting, predicted, truth) | regression(predicted, truth)
        return answers | rollout(predicted, truth)

    return baselines


def hindcast(setting: Setting) -> Baselines:
    """Baselines of hindcasts: persistence backwards, and climatology."""
    return partial(_persisting, setting)


def _persisting(setting: Setting, predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
    still = base.persistence(truth, predicted["init_time"], predicted["lead_time"])
    return {"persistence": still, "climatology": setting.climatology(predicted)}


def temporal_interpolation(setting: Setting) -> Baselines:
    """Baselines of temporal interpolation: the line in time between the known states,
    climatology, and a ridge regression."""
    count, regression = len(setting.offsets), setting.fitted()
    known = [_steps_to_known(setting.offsets, offset) for offset in setting.offsets]

    def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
        times = predicted["time"]
        lines = [
            base.linear_in_time(
                truth,
                times[number::count],
                before=before * setting.step,
                after=after * setting.step,
            )
            for number, (before, after) in enumerate(known)
        ]
        line = xr.concat(lines, "time").sortby("time")
        answers = {"linear": line, "climatology": setting.climatology(predicted)}
        return answers | regression(predicted, truth)

    return baselines


def _steps_to_known(hidden: Sequence[int], step: int) -> tuple[int, int]:
    """How many steps the nearest steps before and after a hidden one lie away that are not hidden;
    between hidden steps there may be known ones."""
    before, after = 1, 1
    while step - before in hidden:
        before += 1
    while step + after in hidden:
        after += 1
    return before, after


def downscaling(setting: Setting) -> Baselines:
    """Baselines of downscaling: three interpolations of the coarse cells, and a ridge regression
    on their neighbourhoods."""
    factor = setting.task.factor
    regression = setting.fitted()

    def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
        times = predicted["time"]
        coarse = spatial.coarsen(truth.sel(time=times), factor)
        answers = {
            name: function(coarse, truth)
            for name, function in (
                ("bicubic", spatial.bicubic),
                ("bilinear", spatial.bilinear),
                ("conservative", spatial.conservative),
            )
        }
        return answers | regression(predicted, truth)

    return baselines


def inpainting(setting: Setting) -> Baselines:
    """Baselines of inpainting: harmonic infill, climatology, and a ridge regression on the
    nearest visible cells."""
    hidden = setting.task.hidden_cells(setting.grid)
    assert hidden is not None, setting.task
    harmonic = HarmonicInfill(setting.grid, hidden)
    names = list(setting.complete)
    regression = None
    if setting.regresses:
        setting.tell_of_ridge()
        regression = LocalRidge.fit(setting.known, hidden)

    def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
        truth_now = truth.sel(time=predicted["time"])
        answers = {"harmonic": harmonic(truth_now), "climatology": setting.climatology(predicted)}
        if regression is not None:
            answers["ridge"] = beside_missing(regression(truth_now[names]), predicted)
        return answers

    return baselines


def cross_variable(setting: Setting) -> Baselines:
    """Baselines of cross-variable tasks: climatology, and a ridge regression on the given
    variables and levels."""
    regression = setting.fitted()

    def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
        return {"climatology": setting.climatology(predicted)} | regression(predicted, truth)

    return baselines


def combined(setting: Setting) -> Baselines:
    """Baselines of unions. With a forecast: persistence of the state with its gaps filled. Of
    gaps alone: harmonic infill. Always: climatology."""
    gaps = [part.hidden_cells(setting.grid) for part in setting.task.parts]
    gaps = [gap for gap in gaps if gap is not None]
    hidden = setting.task.hidden_cells(setting.grid)  # of a union of gaps alone
    harmonic = None if hidden is None else HarmonicInfill(setting.grid, hidden)

    def baselines(predicted: xr.Dataset, truth: xr.Dataset) -> Answers:
        answers = {"climatology": setting.climatology(predicted)}
        if harmonic is not None:
            answers = {"harmonic": harmonic(truth.sel(time=predicted["time"]))} | answers
        if "init_time" not in predicted.dims:
            return answers
        init, lead = predicted["init_time"], predicted["lead_time"]
        start = truth.sel(time=init.to_numpy())
        if gaps:
            start = HarmonicInfill(setting.grid, np.any(gaps, axis=0))(start)
        return {"persistence": base.persistence(start, init, lead)} | answers

    return baselines


def climatology(setting: Setting) -> Baselines:
    """The baseline of all other tasks: climatology."""
    return lambda predicted, truth: {"climatology": setting.climatology(predicted)}  # noqa: ARG005


BUILDERS: dict[str, Callable[[Setting], Baselines]] = {
    "forecast": forecast,
    "hindcast": hindcast,
    "temporal_interpolation": temporal_interpolation,
    "downscaling": downscaling,
    "inpainting": inpainting,
    "cross_variable": cross_variable,
    "combined": combined,
}


def build_baselines(name: str, setting: Setting) -> Baselines:
    """The baselines of a task by its name."""
    return BUILDERS.get(name, climatology)(setting)

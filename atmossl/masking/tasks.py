"""The tasks that hide times or resolution, as masks: regions of physical time and space, put onto
each stream by its tokens.

Every task is a masking sampler that ignores its generator, and a plan of the steps that it reads
and writes. A region that would cut through the tokens of a stream in time is refused, so that all
streams hide the same air. Tasks that hide places or variables are in `masking.places`.
"""

import math
from dataclasses import dataclass, replace
from typing import Annotated, ClassVar

import numpy as np
import torch
from jaxtyping import Bool
from pydantic import Field
from torch import Tensor

from atmossl.batch import Corruption, StreamWindow
from atmossl.geometry import Grid
from atmossl.masking.base import (
    TOLERANCE_HOURS,
    Points,
    StreamMasks,
    TokenLayout,
    TokenLayouts,
    check_multiples,
    coarse_mask,
    hide_times,
    own_factor,
    step_hours_of,
    steps_of,
    window_times,
)
from atmossl.masking.unions import union
from atmossl.settings import Hours, NotNegative, Positive, snake_case
from atmossl.value_faults import as_written, listed


@dataclass(frozen=True)
class TimePlan:
    """Which steps of a window a task reads from the store, and which it writes.

    reference: window step of the reference time, which is the init time if `is_forecast` and the
        valid time otherwise. offsets: steps written, from the reference, over all passes.
    read: window steps that the store has to give, `refine` steps apart; all others are hidden.
    refine: window steps per step of the store. num_passes: of the model, each going on from the
        members of the one before.
    """

    reference: int
    offsets: tuple[int, ...]
    read: tuple[int, ...]
    is_forecast: bool = False
    refine: int = 1
    num_passes: int = 1

    @property
    def pass_offsets(self) -> tuple[int, ...]:
        """The steps that one pass writes."""
        return self.offsets if self.num_passes == 1 else self.offsets[: self.steps_per_pass]

    @property
    def steps_per_pass(self) -> int:
        return -(-len(self.offsets) // self.num_passes)

    @property
    def extent(self) -> int:
        """How many steps lie from the first to the last written one, both included; more than are
        written where known steps lie between them."""
        return self.offsets[-1] - self.offsets[0] + 1


class Task:
    """The base class of all tasks: a task adds to its mask which steps it reads and writes, what
    it hides, and its description. Each subclass answers for itself; no other code asks for its
    class.

    hides_whole_fields: whether all values are hidden, or coarse, at the steps that are written.
    """

    hides_whole_fields: ClassVar[bool] = False

    @property
    def kind(self) -> str:
        """A key that is equal for tasks that share one calibration of the spread."""
        return type(self).__name__

    @property
    def components(self) -> tuple["Task", ...]:
        """The tasks of which this one is the union; empty for a plain task."""
        return ()

    @property
    def true_task(self) -> "Task":
        """The task without the false dates and places that only the network is told."""
        return self

    @property
    def name(self) -> str:
        """The name of the task in configurations and reports."""
        return snake_case(type(self).__name__)

    @property
    def align(self) -> int:
        """The number of cells that tiles must not separate."""
        return 1

    @property
    def time_refinement(self) -> int:
        """How many steps of the window lie in one step of the store."""
        return 1

    @property
    def coarse_factor(self) -> int:
        """How many cells of the prediction lie along one cell of the store."""
        return 1

    @property
    def fills_missing(self) -> bool:
        """Whether missing values of the store are hidden, and so predicted."""
        return False

    @property
    def downscaling(self) -> "Downscaling | None":
        """The downscaling, if all that is given at the written steps is coarse; else None."""

    @property
    def hides_at_any_time(self) -> bool:
        """Whether the task hides the same at whatever step of the window is written, so that a
        union can write it at another step than the task alone does."""
        return True

    @property
    def scored_variables(self) -> tuple[str, ...]:
        """The variables that are hidden at the written steps; empty for all."""
        return ()

    @property
    def scored_levels(self) -> tuple[int, ...]:
        """The levels in hPa that are hidden at the written steps; empty for all."""
        return ()

    @property
    def scores_init_time(self) -> bool:
        """Whether a forecast is scored at lead time 0, where most of the field may have been
        given."""
        return True

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        """The steps that are read and written in a window of `num_steps` steps, `step_hours`
        apart."""
        raise NotImplementedError

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        raise NotImplementedError

    def check(self, grid: Grid) -> None:
        """Raise ValueError if the task cannot be put onto a store's grid."""

    def cells(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        """The cells [lat lon], by their centres in degrees, at which the task may hide
        something."""
        return np.ones((len(lat), len(lon)), bool)

    def hidden_cells(self, grid: Grid) -> np.ndarray | None:
        """The hidden cells [lat lon] at the written time, for a task that hides places; None for
        a task that treats all cells alike."""
        del grid

    def hidden_points(self, layouts: TokenLayouts) -> tuple[Points, ...] | None:
        """The hidden points of every stream, for a task that hides parts of tokens."""
        del layouts

    def change_coordinates(self, windows: tuple[StreamWindow, ...]) -> tuple[StreamWindow, ...]:
        """The windows with the dates and places that the network is told."""
        return windows

    def told_grid(self, grid: Grid) -> Grid:
        """The grid with the places that the network is told."""
        return grid

    def one_pass(self) -> "Task":
        """The task limited to its first pass."""
        return self

    def with_gaps_of(self, windows: tuple[StreamWindow, ...]) -> "Task":
        """The task for these windows, where it depends on which values they miss."""
        return self

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        """A sentence on what is given and what is predicted; empty if the task has none.
        step_hours: hours between the steps of a window."""
        return ""

    def why_unscored(self) -> str | None:
        """Why a prediction cannot be scored, for example because the store holds no truth; None
        if it can."""


def check_plan(task: Task, plan: object, num_steps: int) -> None:
    """Check the plan that a task, which may be a plugin's, made for a window of so many steps.

    Raises:
        ValueError: it is no `TimePlan`, or reads steps that the window does not have.
    """
    name = type(task).__qualname__
    if not isinstance(plan, TimePlan):
        raise ValueError(
            f"the method plan of the task {name} returned an object of the class "
            f"{type(plan).__qualname__}; it must return an atmossl.masking.tasks.TimePlan"
        )
    if outside := [step for step in plan.read if not 0 <= step < num_steps]:
        raise ValueError(
            f"the method plan of the task {name} returned a TimePlan that reads step {outside[0]}; "
            f"the window has the steps 0 to {num_steps - 1}"
        )


def given_steps(plan: TimePlan, step_hours: float) -> str:
    """The beginning of a task's description: which steps are given."""
    return f"Given: {len(plan.read)} steps of {step_hours * plan.refine:g} h"


def told_examples(examples: int) -> str:
    """The part of a description on steps that are shown whole as examples."""
    return f" but for {examples} before the middle one, shown whole" if examples else ""


def check_examples(examples: int, num_steps: int) -> None:
    """Raise ValueError if the window has fewer steps than examples before its middle one."""
    if examples > num_steps // 2:
        raise ValueError(
            f"task.examples={examples}: the window has {num_steps // 2} steps before the one that "
            "is written; valid: up to that many"
        )


def is_example(layout: TokenLayout, layouts: TokenLayouts, examples: int) -> Bool[Tensor, "nt"]:
    """Which tokens of a stream belong to the example steps before the window's middle one.

    Raises:
        ValueError: too many steps, or steps that cut through a token.
    """
    times = window_times(layouts)
    check_examples(examples, len(times))
    target, point_times = float(times[len(times) // 2]), layout.point_times()
    first = target - examples * step_hours_of(layouts)
    inside = (point_times >= first - TOLERANCE_HOURS) & (point_times < target - TOLERANCE_HOURS)
    shown = inside.all(dim=-1)
    if bool((inside.any(dim=-1) != shown).any()):
        raise ValueError(
            f"task.examples={examples} steps before the one that is written cut through a token of "
            f"stream {layout.spec.name}, of {float(layout.grid.time_extent):g} h; choose a multiple"
        )
    return shown


def _check_room(key: str, hours: float, count: int, num_steps: int, step_hours: float) -> None:
    if count >= num_steps:
        raise ValueError(
            f"{key}={hours:g} h hides every one of the window's {num_steps} steps of "
            f"{step_hours:g} h; valid: up to {(num_steps - 1) * step_hours:g} h"
        )


@dataclass(frozen=True)
class Forecast(Task):
    """Hide the last steps of the window (zero-shot forecast, AtmoRep section 3).

    lead_hours: longest lead time. rollout_hours: lead time of one pass, the whole by default; a
    longer lead time is reached by passes that each go on from the members of the one before.
    """

    hides_whole_fields = True
    lead_hours: Annotated[Hours, Field(alias="lead_time")]
    rollout_hours: Annotated[Hours | None, Field(alias="rollout_time")] = None

    def __post_init__(self) -> None:
        for key, value in (("lead_time", self.lead_hours), ("rollout_time", self.rollout_hours)):
            if value is not None and value <= 0:
                raise ValueError(f"task.{key} must be positive, got {value:g} h")

    @property
    def pass_hours(self) -> float:
        return min(self.lead_hours, self.rollout_hours or self.lead_hours)

    def one_pass(self) -> "Forecast":
        return replace(self, lead_hours=self.pass_hours)

    @property
    def hides_at_any_time(self) -> bool:
        return False

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        durations = {"lead_time": self.lead_hours, "rollout_time": self.rollout_hours}
        check_multiples(
            {f"task.{key}": value for key, value in durations.items() if value}, step_hours
        )
        total = steps_of("task.lead_time", self.lead_hours, step_hours)
        count = self._steps_per_pass(num_steps, step_hours)
        reference = num_steps - 1 - count
        return TimePlan(
            reference=reference,
            offsets=tuple(range(1, total + 1)),
            read=tuple(range(reference + 1)),
            is_forecast=True,
            num_passes=-(-total // count),
        )

    def _steps_per_pass(self, num_steps: int, step_hours: float) -> int:
        """The hidden steps of a window."""
        key = "task.lead_time" if self.pass_hours == self.lead_hours else "task.rollout_time"
        count = steps_of(key, self.pass_hours, step_hours)
        _check_room(key, self.pass_hours, count, num_steps, step_hours)
        return count

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        start = given_steps(plan, step_hours)
        return f"{start} up to the init time. Predicted: the {self.lead_hours:g} h after it."

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        times, step = window_times(layouts), step_hours_of(layouts)
        steps_of("task.lead_time", self.lead_hours, step)
        self._steps_per_pass(len(times), step)
        end = float(times[-1])
        return hide_times(layouts, end - self.pass_hours + step, end)


@dataclass(frozen=True)
class Hindcast(Task):
    """Hide the first `lead_hours` of the window, which lie before the init time. They are
    written with lead times below 0."""

    hides_whole_fields = True
    lead_hours: Annotated[Hours, Field(alias="lead_time")]

    @property
    def hides_at_any_time(self) -> bool:
        return False

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        count = steps_of("task.lead_time", self.lead_hours, step_hours)
        _check_room("task.lead_time", self.lead_hours, count, num_steps, step_hours)
        return TimePlan(
            reference=count,
            offsets=tuple(range(-count, 0)),
            read=tuple(range(count, num_steps)),
            is_forecast=True,
        )

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        start = given_steps(plan, step_hours)
        return f"{start} from the init time on. Predicted: the {self.lead_hours:g} h before it."

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        times, step = window_times(layouts), step_hours_of(layouts)
        count = steps_of("task.lead_time", self.lead_hours, step)
        _check_room("task.lead_time", self.lead_hours, count, len(times), step)
        start = float(times[0])
        return hide_times(layouts, start, start + self.lead_hours - step)


@dataclass(frozen=True)
class TemporalInterpolation(Task):
    """Hide steps inside the window: `hidden_hours` in its middle, centred as well as possible.

    steps: these steps of the window instead, counted from 0.
    refine: raise the store's time resolution this many times: the window's steps are that much
        shorter than the store's, and hide all that lie between those of the store.
    """

    hidden_hours: Annotated[Hours, Field(alias="hidden_time")]
    steps: tuple[NotNegative, ...] | None = None
    refine: Positive = 1

    def __post_init__(self) -> None:
        if self.hidden_hours <= 0:
            raise ValueError(f"task.hidden_time must be positive, got {self.hidden_hours:g} h")
        if self.refine < 1 or (self.refine > 1 and self.steps is not None):
            raise ValueError(
                f"task.refine={self.refine} with task.steps={as_written(self.steps)}: give a "
                "factor of at least 1, or steps, not both"
            )

    @property
    def hides_at_any_time(self) -> bool:
        return False

    def _hidden(self, num_steps: int, step_hours: float) -> list[int]:
        """The hidden steps of a window."""
        if self.refine > 1:
            return [step for step in range(num_steps) if step % self.refine]
        if self.steps is not None:
            if not self.steps or not 0 < min(self.steps) <= max(self.steps) < num_steps - 1:
                raise ValueError(
                    f"task.steps={as_written(self.steps)}: hide steps inside the window; valid: 1 "
                    f"to {num_steps - 2}"
                )
            return sorted(set(self.steps))
        count = steps_of("task.hidden_time", self.hidden_hours, step_hours)
        if count > num_steps - 2:
            raise ValueError(
                f"task.hidden_time={self.hidden_hours:g} h hides {count} of the window's "
                f"{num_steps} steps; valid: 1 to {num_steps - 2} steps of {step_hours:g} h"
            )
        start = (num_steps - count) // 2
        return list(range(start, start + count))

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        if self.refine > 1:
            return self._refining_plan(num_steps)
        hidden = self._hidden(num_steps, step_hours)
        offsets = tuple(step - hidden[0] for step in hidden)
        return TimePlan(hidden[0], offsets, tuple(range(num_steps)))

    def _refining_plan(self, num_steps: int) -> TimePlan:
        """The known step in the middle and the hidden ones up to the next known one."""
        last = (num_steps - 1) // self.refine * self.refine
        if last == 0:
            raise ValueError(
                f"task.refine={self.refine} leaves one known step in the window's {num_steps}; "
                f"valid: up to {num_steps - 1}"
            )
        reference = (num_steps - 1) // 2 // self.refine * self.refine
        reference = min(reference, last - self.refine)
        return TimePlan(
            reference=reference,
            offsets=tuple(range(self.refine)),
            read=tuple(range(0, last + 1, self.refine)),
            refine=self.refine,
        )

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        start, hidden = given_steps(plan, step_hours), len(plan.offsets)
        return f"{start}, of which {hidden} in the middle are hidden and predicted."

    @property
    def time_refinement(self) -> int:
        return self.refine

    def why_unscored(self) -> str | None:
        if self.refine == 1:
            return None
        return (
            f"refine={self.refine} writes steps of which the store has no truth; to score it, hide "
            "steps that are known: hidden_time or steps"
        )

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        times = window_times(layouts)
        hidden = self._hidden(len(times), step_hours_of(layouts))
        runs = np.split(np.array(hidden), np.flatnonzero(np.diff(hidden) > 1) + 1)
        masks = [hide_times(layouts, float(times[run[0]]), float(times[run[-1]])) for run in runs]
        return union(masks, layouts)


@dataclass(frozen=True)
class Downscaling(Task):
    """Coarsen every token to means over factor x factor cells, and predict all at full resolution.

    examples: so many steps before the one that is written are shown whole, as demonstrations of
    what a coarse step becomes (in-context learning, Brown et al. 2020, arXiv 2005.14165).
    consistent: add to every coarse cell of the prediction what its mean lacks of the given one.
        None: yes, but not in a union of tasks, some of which may hide the coarse cell.
    coarse_input: the store holds the coarse cells themselves.
    """

    hides_whole_fields = True
    factor: int
    consistent: bool | None = None
    coarse_input: bool = False
    examples: NotNegative = 0

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"task.factor must be at least 2, got {self.factor}")
        if self.examples and self.coarse_input:
            raise ValueError(
                f"task.examples={self.examples} with task.coarse_input=true: a coarse store has no "
                "whole steps to show; valid: examples=0"
            )

    @property
    def align(self) -> int:
        return self.factor

    @property
    def downscaling(self) -> "Downscaling":
        return self

    @property
    def coarse_factor(self) -> int:
        return self.factor if self.coarse_input else 1

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        return (
            f"{given_steps(plan, step_hours)}, as means over {self.factor} x {self.factor} cells"
            f"{told_examples(self.examples)}. Predicted: every cell at the middle step."
        )

    def why_unscored(self) -> str | None:
        if not self.coarse_input:
            return None
        return "coarse_input=true has no truth; to score it, give a fine store and leave it out"

    def check(self, grid: Grid) -> None:
        if any(size % self.factor for size in grid.shape):
            common = math.gcd(*grid.shape)
            valid = [factor for factor in range(2, common + 1) if common % factor == 0]
            none = (
                "none, as no number divides both, but of a store with a row or column less, which "
                "`atmossl data ingest region=[SOUTH,NORTH,WEST,EAST]` makes"
            )
            raise ValueError(
                f"task.factor={self.factor} does not divide the store's {grid.shape[0]} x "
                f"{grid.shape[1]} cells; valid: {listed(valid) if valid else none}"
            )

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        check_examples(self.examples, num_steps)
        return TimePlan(num_steps // 2, (0,), tuple(range(num_steps)))

    @property
    def hides_at_any_time(self) -> bool:
        return not self.examples

    def _corruption(self, layout: TokenLayout, layouts: TokenLayouts) -> Tensor:
        corruption = torch.full(layout.grid.shape, int(Corruption.COARSEN))
        if self.examples:
            corruption[:, is_example(layout, layouts, self.examples)] = int(Corruption.VISIBLE)
        return corruption

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        return tuple(
            coarse_mask(self._corruption(layout, layouts), own_factor(layout, layouts, self.factor))
            if layout.spec.role == "predict"
            else layout.nothing_hidden()
            for layout in layouts
        )

"""Tasks made of other tasks: unions of masks, and counterfactuals, in which the network is told
another date, level or place."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import attrgetter
from typing import Annotated, Any

import numpy as np
import torch
from pydantic import BeforeValidator, Field

from atmossl.batch import StreamWindow
from atmossl.geometry import Grid
from atmossl.masking.base import StreamMasks, TokenLayouts, points_of
from atmossl.masking.tasks import Downscaling, Points, Task, TimePlan, given_steps
from atmossl.masking.unions import union
from atmossl.model_levels import standard_pressure
from atmossl.settings import Positive, SignedHours
from atmossl.value_faults import as_written, listed, told_as


@dataclass(frozen=True)
class Combined(Task):
    """Hide what any of several tasks hides.

    Of several forecasts, or several hindcasts, among the parts the one that is given the shortest
    time sets init time and lead times. Where other parts hide something at any time, lead time 0 is
    written as well: the init time itself, as these parts see it. A union that would not write what
    one of its parts hides is refused.
    """

    parts: Sequence[Task]

    def __post_init__(self) -> None:
        if len(self.parts) < 2:
            raise ValueError(f"task.parts has {len(self.parts)} tasks; give two or more")
        downscalings = dict(_downscalings(self.parts, "task.parts"))
        for key in ("consistent", "coarse_input"):
            for place, part in downscalings.items():
                if getattr(part, key):
                    raise ValueError(
                        f"{place}.{key}=true: not in a union; valid: false, or the downscaling on "
                        "its own"
                    )
        if len({part.factor for part in downscalings.values()}) > 1:
            factors = [f"{place}.factor={part.factor}" for place, part in downscalings.items()]
            raise ValueError(f"{' and '.join(factors)} differ; valid: one factor for all parts")

    @property
    def kind(self) -> str:
        """The kinds of all parts, in an order that does not depend on theirs."""
        return "+".join(sorted(part.kind for part in self.parts))

    @property
    def components(self) -> tuple[Task, ...]:
        return tuple(self.parts)

    @property
    def scores_init_time(self) -> bool:
        return False

    @property
    def hides_at_any_time(self) -> bool:
        return all(part.hides_at_any_time for part in self.parts)

    @property
    def align(self) -> int:
        return max(part.align for part in self.parts)

    @property
    def fills_missing(self) -> bool:
        return any(part.fills_missing for part in self.parts)

    def with_gaps_of(self, windows: tuple[StreamWindow, ...]) -> Task:
        return replace(self, parts=tuple(part.with_gaps_of(windows) for part in self.parts))

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        plans = []
        for number, part in enumerate(self.parts):
            with told_as(f"task.parts.{number}"):
                plans.append(part.plan(num_steps, step_hours))
            if plans[-1].num_passes > 1 or plans[-1].refine > 1:
                raise ValueError(
                    f"task.parts.{number} ({part.name}) is rolled out or refines time, which a "
                    "part of a union cannot; predict it on its own"
                )
        read = tuple(sorted(set.intersection(*(set(plan.read) for plan in plans))))
        if not any(plan.is_forecast for plan in plans):
            steps, reference = set[int]().union(*map(_written, plans)), plans[0].reference
        else:
            steps, reference = self._steps_around_init_time(plans, step_hours)
        offsets = tuple(sorted(step - reference for step in steps))
        is_forecast = any(plan.is_forecast for plan in plans)
        return TimePlan(reference, offsets, read, is_forecast=is_forecast)

    def _steps_around_init_time(
        self, plans: Sequence[TimePlan], step_hours: float
    ) -> tuple[set[int], int]:
        """The steps of the window that a union with a forecast or a hindcast writes, and its init
        time.

        Raises:
            ValueError: a part whose hidden values would not be written.
        """
        leading = [number for number, plan in enumerate(plans) if plan.is_forecast]
        first = min(leading, key=lambda number: len(plans[number].read))
        reference = plans[first].reference
        steps = _written(plans[first])
        if any(not plan.is_forecast or 0 in plan.offsets for plan in plans):
            steps |= {reference}
        for number, (part, plan) in enumerate(zip(self.parts, plans, strict=True)):
            if not part.hides_at_any_time and not _written(plan) <= steps:
                leader = self.parts[first].name
                hidden, told = (
                    " to ".join(f"{(step - reference) * step_hours:g}" for step in ends)
                    for ends in map(_ends, (_written(plan), steps))
                )
                raise ValueError(
                    f"task.parts.{number} ({part.name}) hides times that a union with "
                    f"task.parts.{first} ({leader}) does not write: lead times {hidden} h, written "
                    f"are {told} h; valid beside a {leader}: parts that hide these times or all "
                    "times; predict others on their own"
                )
        return steps, reference

    def check(self, grid: Grid) -> None:
        for number, part in enumerate(self.parts):
            with told_as(f"task.parts.{number}"):
                part.check(grid)

    def hidden_cells(self, grid: Grid) -> np.ndarray | None:
        """The hidden cells of all parts together, if every part hides places."""
        cells = [part.hidden_cells(grid) for part in self.parts]
        places = [of_part for of_part in cells if of_part is not None]
        return np.any(places, axis=0) if len(places) == len(cells) else None

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        names = " and ".join(type(part).__name__ for part in self.parts)
        return f"{given_steps(plan, step_hours)}; hidden is what any of {names} hides."

    def why_unscored(self) -> str | None:
        for part in self.parts:
            if why := part.why_unscored():
                return why
        kinds = sorted({part.kind for part in self.parts})
        by_channel = any(part.scored_variables or part.scored_levels for part in self.parts)
        if any(part.hides_whole_fields for part in self.parts) or (
            len(kinds) == 1 and not by_channel
        ):
            return None
        return f"what a union of {listed(kinds)} hides differs from step to step; score its parts"

    def hidden_points(self, layouts: TokenLayouts) -> tuple[Points, ...] | None:
        points_of_parts = [part.hidden_points(layouts) for part in self.parts]
        if all(points is None for points in points_of_parts):
            return None
        rng = np.random.default_rng(0)  # never used by a task
        specs = [layout.spec for layout in layouts]
        whole = [
            points
            or tuple(points_of(m.hidden, s) for m, s in zip(part(layouts, rng), specs, strict=True))
            for part, points in zip(self.parts, points_of_parts, strict=True)
        ]
        return tuple(reduce(torch.logical_or, streams) for streams in zip(*whole, strict=True))

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        masks = []
        for number, part in enumerate(self.parts):
            with told_as(f"task.parts.{number}"):
                masks.append(part(layouts, rng))
        return union(masks, layouts)

    def change_coordinates(self, windows: tuple[StreamWindow, ...]) -> tuple[StreamWindow, ...]:
        for part in self.parts:
            windows = part.change_coordinates(windows)
        return windows


def _written(plan: TimePlan) -> set[int]:
    """The steps of the window that a plan writes."""
    return {plan.reference + offset for offset in plan.offsets}


def _ends(steps: set[int]) -> list[int]:
    """The first and the last of some steps; one if they are the same."""
    return sorted({min(steps), max(steps)})


def _downscalings(parts: Sequence[Task], key: str) -> Iterator[tuple[str, Downscaling]]:
    """All downscalings among the parts of a union, with the keys that lead to them."""
    for number, part in enumerate(parts):
        place = f"{key}.{number}"
        if isinstance(part, Counterfactual):
            part, place = part.task, f"{place}.task"
        if part.components:
            yield from _downscalings(part.components, f"{place}.parts")
        elif part.downscaling is not None:
            yield place, part.downscaling


def _pairs(levels: Any) -> Any:
    return tuple(levels.items()) if isinstance(levels, Mapping) else levels


def _told_levels(window: StreamWindow, new_levels: Mapping[int, int]) -> list[float]:
    """Levels of a window, some told as others: hPa, or numbers of model levels, which windows hold
    by their pressure."""
    levels = []
    for number, level in zip(window.spec.level_values, window.level_hpa.tolist(), strict=True):
        other = new_levels.get(number, number)
        if other != number:
            level = float(other) if level == number else standard_pressure(other)
        levels.append(level)
    return levels


def _of_task(name: str) -> Any:
    return property(attrgetter(f"task.{name}"))


@dataclass(frozen=True)
class Counterfactual(Task):
    """A task on the same fields at a false date, level or place: only what the network is told of
    them changes (AtmoRep's counterfactual experiment). Predictions are written with the true dates
    and places.

    shift_hours: added to the dates. shift_lat, shift_lon: degrees. levels: told level instead
    of the true one, in hPa or as the number of a model level, as in the catalog entry.
    """

    task: Task
    shift_hours: Annotated[SignedHours, Field(alias="shift_time")] = 0.0
    shift_lat: float = 0.0
    shift_lon: float = 0.0
    levels: Annotated[tuple[tuple[Positive, Positive], ...], BeforeValidator(_pairs)] = ()

    # all that does not ask what the model is told is as the task says
    kind = _of_task("kind")
    components = _of_task("components")
    true_task = _of_task("true_task")
    time_refinement = _of_task("time_refinement")
    coarse_factor = _of_task("coarse_factor")
    hides_whole_fields = _of_task("hides_whole_fields")
    hides_at_any_time = _of_task("hides_at_any_time")
    scored_variables = _of_task("scored_variables")
    scored_levels = _of_task("scored_levels")
    scores_init_time = _of_task("scores_init_time")
    align = _of_task("align")
    downscaling = _of_task("downscaling")
    fills_missing = _of_task("fills_missing")

    def with_gaps_of(self, windows: tuple[StreamWindow, ...]) -> Task:
        return replace(self, task=self.task.with_gaps_of(windows))

    def plan(self, num_steps: int, step_hours: float) -> TimePlan:
        with told_as("task.task"):
            return self.task.plan(num_steps, step_hours)

    def check(self, grid: Grid) -> None:
        with told_as("task.task"):
            self.task.check(grid)
        last = grid.latitude[[0, -1]] + self.shift_lat
        if last.min() < -90 or last.max() > 90:
            raise ValueError(
                f"task.shift_lat={self.shift_lat:g} moves the store's grid across a pole, to "
                f"{last[0]:g} to {last[1]:g} degrees north; take a region, or 0"
            )

    def cells(self, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
        return self.task.cells(lat, lon)

    def hidden_cells(self, grid: Grid) -> np.ndarray | None:
        return self.task.hidden_cells(grid)

    def told_grid(self, grid: Grid) -> Grid:
        return Grid(grid.latitude + self.shift_lat, grid.longitude + self.shift_lon)

    def describe(self, plan: TimePlan, step_hours: float, grid: Grid) -> str:
        start = given_steps(plan, step_hours)
        return f"{start}, of another date, level or place than the model is told."

    def why_unscored(self) -> str | None:
        return self.task.why_unscored()

    def hidden_points(self, layouts: TokenLayouts) -> tuple[Points, ...] | None:
        return self.task.hidden_points(self._true(layouts))

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        with told_as("task.task"):
            return self.task(self._true(layouts), rng)

    def _true(self, layouts: TokenLayouts) -> TokenLayouts:
        """The token layouts with their true dates and places, to which regions of the task
        refer."""
        return tuple(
            replace(
                layout,
                grid=replace(
                    layout.grid,
                    time_hours=layout.grid.time_hours - self.shift_hours,
                    lat=layout.grid.lat - self.shift_lat,
                    lon=layout.grid.lon - self.shift_lon,
                ),
            )
            for layout in layouts
        )

    def change_coordinates(self, windows: tuple[StreamWindow, ...]) -> tuple[StreamWindow, ...]:
        new_levels = dict(self.levels)
        have = {level for window in windows for level in window.spec.level_values}
        if not have.issuperset(new_levels):
            raise ValueError(
                f"task.levels={as_written(sorted(set(new_levels) - have))} are not there to be "
                f"told as others; valid: {listed(sorted(have))}"
            )
        moved = []
        for window in self.task.change_coordinates(windows):
            levels = _told_levels(window, new_levels)
            moved.append(
                replace(
                    window,
                    time_hours=window.time_hours + self.shift_hours,
                    lat=window.lat + self.shift_lat,
                    lon=(window.lon + self.shift_lon) % 360.0,
                    level_hpa=torch.tensor(levels, dtype=window.level_hpa.dtype),
                )
            )
        return tuple(moved)

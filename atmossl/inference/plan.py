"""The plan of a prediction: what is predicted, when, where and on which tiles.

`plan_prediction` works everything out and checks it before anything is read. A `Plan` holds data
and answers questions about dates and places; `chosen_times` takes the dates that a user names. The
functions that predict stand above it: one pass of the model over tiles in `tiles`, passes that
follow one another in `rollout`, files in `writer`.

The streams of every source are predicted on the cells and at the steps of their own store, as far
as those of the primary source cover them (`Coverage`).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from typing import Any, Protocol, Self

import numpy as np
import xarray as xr
from einops import reduce, repeat

from atmossl.batch import PRIMARY
from atmossl.data.axes import Calendar
from atmossl.data.forcings import FORCINGS
from atmossl.data.segment import Segment, check_window
from atmossl.geometry import Box, Grid, Nesting, TilePlan
from atmossl.inference.checkpoint import TrainedModel
from atmossl.masking.tasks import Task, TimePlan, check_plan
from atmossl.model.network import EVALUATED_MEMBERS, device_memory
from atmossl.settings import hours
from atmossl.value_faults import as_written, listed

Times = str | np.datetime64 | date | Sequence[Any] | np.ndarray | xr.DataArray | None
Fields = dict[str, np.ndarray]  # by variable, [step member level lat lon] in its own units


@dataclass(frozen=True)
class BlendedPart:
    """A part of the prediction of one case that is ready to be written. A case is one init or valid
    time.

    leads: times of the steps that the fields hold, from the reference time. rows: latitudes that
    they cover. completes: whether nothing is left of the case. departure: mean square per variable
    of what the coarsened prediction lacks of the given coarse cells, for downscaling.
    data: of the streams that the fields belong to, on whose cells and at whose steps they are.
    """

    case: int
    leads: np.ndarray
    rows: slice
    fields: Fields
    completes: bool
    departure: dict[str, float] = field(default_factory=dict)
    data: str = PRIMARY


@dataclass(frozen=True)
class Source:
    """A record, and the step of it at which a window's first read step lies. member: the only
    member of the prediction that is wanted; None: all.

    member: the only member of the prediction that is wanted; all by default.
    """

    segment: Segment
    start: int
    member: int | None = None


@dataclass(frozen=True)
class Coverage:
    """The cells of a source's grid that the cells of a segment cover. whole: these cells, as a
    box in that grid; the box starts at its first column if they close the circle."""

    nesting: Nesting
    whole: Box

    @classmethod
    def of(cls, segment: Segment, data: str) -> Self:
        nesting = segment.sources[data].nesting
        whole = nesting.box(Box(0, segment.alignment.lon_shift, *segment.grid.shape))
        closed = nesting.other.periodic and whole.lon_size == nesting.other.shape[1]
        return cls(nesting, replace(whole, lon_start=0) if closed else whole)

    @property
    def grid(self) -> Grid:
        return self.nesting.other.part(self.whole)

    def box(self, tile: Box) -> Box:
        """A tile, in cells of `grid`."""
        cells = self.nesting.box(tile)
        west = (cells.lon_start - self.whole.lon_start) % self.nesting.other.shape[1]
        return replace(cells, lat_start=cells.lat_start - self.whole.lat_start, lon_start=west)

    def row(self, row: int) -> int:
        """The row of `grid` that begins at the same edge as a row of the segment's grid."""
        return row // self.nesting.lat.cells * self.nesting.lat.other_cells

    def weights(self, tile: np.ndarray) -> np.ndarray:
        """The blending weights [lat lon] of a tile on the cells of `grid`: means over the
        segment's cells in common blocks, so that they sum to one over tiles as the segment's
        weights do."""
        lat, lon = self.nesting.lat, self.nesting.lon
        blocks = reduce(tile, "(lat y) (lon x) -> lat lon", "mean", y=lat.cells, x=lon.cells)
        return repeat(blocks, "lat lon -> (lat y) (lon x)", y=lat.other_cells, x=lon.other_cells)


@dataclass(frozen=True)
class Options:
    """How a prediction is computed.

    overlap: share of a tile that its neighbour covers as well. tilings: how many tilings are
    averaged, each shifted eastwards by an equal part of a token, where the grid is a whole circle
    and the task lets tiles lie anywhere. lon_shift: cells by which all of them are shifted.
    batch_size: tiles in one call of the model, of any time or member. seed: of the noise that makes
    members differ, or of the order in which members of a tail go on in a rollout. members: how many
    draws of noise, or the numbers of those members that are written; None: `EVALUATED_MEMBERS`, or
    all that a tail has. fill_missing: predict also
    where a variable is missing in the whole window, which is NaN in the output otherwise, such as
    sea-surface temperature on land. all_rows: the rows of a case are ready all at once, for a
    calibration that looks at neighbouring rows; otherwise band after band of latitude.
    """

    overlap: float
    batch_size: int
    device: str
    tilings: int = 1
    lon_shift: int = 0
    seed: int = 0
    members: int | tuple[int, ...] | None = None
    fill_missing: bool = False
    all_rows: bool = False


@dataclass(frozen=True)
class Plan:
    """One task of one model on records that share grid and time step.

    steps: of a window, which are read and which are written. grid: of the prediction: that of the
    records, or one that nests in it. coverage: where the streams that are predicted lie, by their
    `data`; the primary source last.
    """

    trained: TrainedModel
    task: Task
    segments: tuple[Segment, ...]
    options: Options
    steps: TimePlan
    grid: Grid
    tiles: TilePlan
    coverage: Mapping[str, Coverage]

    @property
    def segment(self) -> Segment:
        """The first record, for properties that all records share."""
        return self.segments[0]

    @property
    def step(self) -> np.timedelta64:
        """The time between the steps of a window."""
        return self.segment.step // self.steps.refine

    @property
    def leads(self) -> np.ndarray:
        """The time from the reference time to every written step."""
        return np.array(self.steps.offsets) * self.step

    @property
    def members(self) -> tuple[int, ...] | None:
        """The numbers of the written members; None: all members of a tail."""
        chosen = self.options.members
        if isinstance(chosen, tuple):
            return chosen
        model = self.trained.model
        count = (chosen or EVALUATED_MEMBERS) if model.any_member else model.num_members
        return None if count is None else tuple(range(count))

    @property
    def centre(self) -> int | None:
        """Around the mean of how many first members the spread is inflated; None: of all."""
        return EVALUATED_MEMBERS if self.trained.model.any_member else None

    @property
    def drawn(self) -> tuple[int, ...]:
        """The numbers of the draws of noise that are computed: the written ones, and for a
        calibrated checkpoint before them the first ones, around whose mean the spread is inflated
        (`centre`). So a member has the same values whatever others are asked for."""
        assert self.members is not None, "a network of noise has any number"
        if "spread" not in self.trained.checkpoint_record:
            return self.members
        first = range(self.centre or 0)
        return (*first, *(number for number in self.members if number not in first))

    def written(self, fields: Fields) -> Fields:
        """The written members out of a whole ensemble."""
        if self.trained.model.any_member:
            rows = [self.drawn.index(number) for number in self.members or ()]
            if rows == [*range(len(self.drawn))]:
                return fields
        elif isinstance(self.options.members, tuple):
            rows = [*self.options.members]
        else:
            return fields
        return {name: values[:, rows] for name, values in fields.items()}

    @property
    def row_chunk(self) -> int:
        """How many rows of latitude are written at once."""
        align = self.tiles.align
        return max(1, round(self.tiles.lat_size * (1 - self.tiles.overlap)) // align) * align

    def grid_of(self, data: str) -> Grid:
        """The cells that the streams with that `data` are predicted on."""
        return self.coverage[data].grid

    def leads_of(self, data: str, time: np.datetime64, leads: np.ndarray) -> np.ndarray:
        """The leads from a reference time at which the streams with that `data` have steps."""
        if self.steps.refine > 1:  # steps between those of the only store
            return leads
        return self.find(time).segment.sources[data].leads(time, leads)

    def placed(self, data: str, tile: Box, weight: np.ndarray) -> tuple[Box, np.ndarray]:
        """A tile and its blending weights, on the grid of the streams with that `data`."""
        coverage = self.coverage[data]
        return coverage.box(tile), coverage.weights(weight)

    def written_steps(self, data: str, source: Source) -> tuple[list[int], np.ndarray]:
        """The steps of a stream's window that one pass writes, and their times from its reference
        time."""
        steps, segment = self.steps, source.segment
        leads = np.array(steps.pass_offsets) * self.step
        if steps.refine > 1:  # steps between those of the only store
            return [steps.reference + offset for offset in steps.pass_offsets], leads
        read = segment.sources[data]
        first = segment.times[source.start] - steps.read[0] * segment.step
        reference = first + steps.reference * segment.step
        leads = read.leads(reference, leads)
        begin = read.steps(first, self.trained.window.time * segment.step).start
        since = reference + leads - read.segment.times[0]
        return (since // read.segment.step - begin).astype(int).tolist(), leads

    def possible_times(self) -> np.ndarray:
        """The reference times with all the steps around them that a window needs, in order, and
        so far apart that no valid time of a segment is written twice."""
        steps = self.steps
        stride = 1 if steps.is_forecast or steps.refine > 1 else steps.extent
        return np.sort(
            np.concatenate([self._served(segment)[::stride] for segment in self.segments])
        )

    def with_truth(self, times: np.ndarray) -> np.ndarray:
        """The reference times for which the record holds everything that would be written."""

        def has_truth(time: np.datetime64) -> bool:
            record = self.find(time).segment.times
            return all(_holds(record, valid) for valid in time + self.leads)

        return np.array([time for time in times if has_truth(time)], times.dtype)

    @property
    def steps_before(self) -> int:
        """How many steps of the store are read before the reference time."""
        return (self.steps.reference - self.steps.read[0]) // self.steps.refine

    def _served(self, segment: Segment) -> np.ndarray:
        """The times of a segment with the steps around them that a window needs."""
        before = self.steps_before
        stop = len(segment.times) - (len(self.steps.read) - 1 - before)
        return segment.times[before : max(before, stop)]

    def find(self, time: np.datetime64) -> Source:
        """The segment that serves a reference time, and the first step of it that is read.

        Raises:
            ValueError: no segment has the time and the steps around it, or several have.
        """
        holding = [segment for segment in self.segments if _holds(self._served(segment), time)]
        if len(holding) == 1:
            return Source(holding[0], holding[0].find_time(time) - self.steps_before)
        calendar = self.segment.calendar
        when = f"init_time={calendar.show(time)}"
        if holding:
            names = [segment.name for segment in holding]
            raise ValueError(
                f"{when} is in several segments; give segment=NAME, valid: {listed(names)}"
            )
        if len(self.segments) == 1:
            self.segment.find_time(time)  # says what it covers if it lacks the time itself
        before = self.steps_before
        after = max(len(self.steps.read) - 1 - before, 0)
        valid = ", ".join(_period(self._served(segment), calendar) for segment in self.segments)
        raise ValueError(
            f"{when} is not there or lacks steps around it: the task needs {before} before and "
            f"{after} after; valid: {valid}"
        )


def plan_prediction(
    trained: TrainedModel, task: Task, segments: Sequence[Segment], options: Options
) -> Plan:
    """Work out where, when and on which tiles a task is predicted on some records.

    Raises:
        ValueError: a model that did not learn to reconstruct, or a task that does not fit the
            records or the model.
    """
    trained.require("reconstruct")
    _check_members(trained, options.members)
    segment = segments[0]
    steps = task.plan(trained.window.time, segment.step_hours / task.time_refinement)
    check_plan(task, steps, trained.window.time)
    grid = _grid(task, segment)
    task.check(grid)
    align = math.lcm(task.align, segment.alignment.cells)
    tile_size = _tile_size(trained, grid, align)
    if segment.auxiliaries:
        names = sorted(segment.auxiliaries)
        if steps.refine > 1 or task.coarse_factor > 1:
            raise ValueError(
                "task.refine and task.coarse_input change the cells or steps of a single store; "
                f"the checkpoint has streams with data={as_written(names)}, whose own would stay"
            )
        check_window(segment, trained.window.time, *tile_size)
    tiles = TilePlan(grid, *tile_size, options.overlap, _shifts(trained, segment, options, align),
                     align)  # fmt: skip
    if steps.num_passes > 1:
        _check_rollout(trained, steps, segment)
    predicted = {spec.data for spec in trained.specs if spec.role == "predict"} - {PRIMARY}
    on_grid = replace(segment, grid=grid)
    coverage = {data: Coverage.of(on_grid, data) for data in (*sorted(predicted), PRIMARY)}
    plan = Plan(trained, task, tuple(segments), options, steps, grid, tiles, coverage)
    _check_memory(plan)
    return plan


def _check_members(trained: TrainedModel, members: int | tuple[int, ...] | None) -> None:
    """Raise ValueError for members that a tail does not have."""
    if members is None or trained.model.any_member:
        return
    have = trained.model.num_members
    if isinstance(members, int) or have is None:
        listed = "" if have is None else f", or some of its {have}, as in members=[0,{have - 1}]"
        raise ValueError(
            f"members={members}: the members of this checkpoint are the fixed outputs of its tail; "
            f"valid: null for all of them{listed}. Any number can be drawn of a network with "
            "model.ensemble=noise"
        )
    if max(members) >= have:
        raise ValueError(
            f"members={as_written(members)}: the tail of this checkpoint has {have} members; "
            f"valid: numbers from 0 to {have - 1}"
        )


def _check_memory(plan: Plan) -> None:
    """Raise ValueError if the fields of one call of the network alone are more than its device can
    hold."""
    if not plan.trained.model.any_member or not plan.drawn:
        return
    cells = plan.tiles.lat_size * plan.tiles.lon_size
    values = sum(
        len(spec.variables) * len(spec.levels) * plan.trained.window.time * cells
        for spec in plan.trained.specs
        if spec.role == "predict"
    )
    tiles = min(plan.options.batch_size, len(plan.tiles.tiles))
    of_member, memory = 4 * values * tiles, device_memory(plan.options.device)
    if of_member * len(plan.drawn) > memory:
        raise ValueError(
            f"members={len(plan.drawn)}: their fields in one call of the network take "
            f"{of_member * len(plan.drawn) / 2**30:.0f} GiB, and the {plan.options.device} has "
            f"{memory / 2**30:.0f} GiB; valid: at most {memory // of_member}, and fewer in "
            "practice. More are written in parts, such as members=[0,1,2,3] and members=[4,5,6,7]"
        )


def check_draws(trained: TrainedModel, members: int | None) -> None:
    """Raise ValueError for a number of members where there are no draws, for commands that take
    all members of a tail."""
    if members is not None and not trained.model.any_member:
        raise ValueError(
            f"members={members}: the members of this checkpoint are the fixed outputs of its tail, "
            "and all of them are taken; valid: members=null. Any number can be drawn of a network "
            "with model.ensemble=noise"
        )


def _grid(task: Task, segment: Segment) -> Grid:
    if task.coarse_factor == 1:
        return segment.grid
    try:
        return segment.grid.refined(task.coarse_factor)
    except ValueError as error:
        raise ValueError(f"task.coarse_input: {segment.location}: {error}") from error


def _tile_size(trained: TrainedModel, grid: Grid, align: int) -> tuple[int, int]:
    """The rows and columns of a tile: those of training's windows, or the whole grid if it is
    smaller, in whole tokens.

    Raises:
        ValueError: the grid is smaller than a token.
    """
    window, specs = trained.window, trained.own_specs
    sizes = []
    for key, size, have, tokens in (
        ("rows", window.lat, grid.shape[0], {s.token_size.lat for s in specs}),
        ("columns", window.lon, grid.shape[1], {s.token_size.lon for s in specs}),
    ):
        cells = math.lcm(align, *tokens)
        if have < cells:
            raise ValueError(
                f"the grid has {have} {key}, fewer than the {cells} of a token or coarse cell"
            )
        sizes.append(size if 0 < size <= have else have // cells * cells)
    return sizes[0], sizes[1]


def _shifts(
    trained: TrainedModel, segment: Segment, options: Options, align: int
) -> tuple[int, ...]:
    """The shifts of the tilings in cells, within one token; coarse cells stay whole."""
    token = max(spec.token_size.lon for spec in trained.own_specs)
    shifts = {number * token // options.tilings for number in range(options.tilings)}
    first = options.lon_shift + segment.alignment.lon_shift
    return tuple(first + shift for shift in sorted(shifts) if shift % align == 0)


def _check_rollout(trained: TrainedModel, steps: TimePlan, segment: Segment) -> None:
    """Raise ValueError for input streams that no pass of a rollout predicts or computes."""
    unknown = [
        spec.name
        for spec in trained.specs
        if spec.role not in ("predict", "static") and not set(spec.variables) <= set(FORCINGS)
    ]
    if unknown:
        raise ValueError(
            f"task.rollout_time={steps.steps_per_pass * segment.step_hours:g} h is shorter than "
            f"task.lead_time, but streams {listed(unknown)} are input only and nothing predicts or "
            "computes them; valid: a lead time within one pass"
        )


def _holds(times: np.ndarray, time: np.datetime64) -> bool:
    index = int(np.searchsorted(times, time))
    return index < len(times) and times[index] == time


def _period(times: np.ndarray, calendar: Calendar) -> str:
    if len(times) == 0:
        return "none, the store is too short"
    first, last = (calendar.show(time) for time in times[[0, -1]])
    return f"{first} to {last}"


class HasTimes(Protocol):
    """Anything with reference times: a `Plan`, or latents (`Embedder`)."""

    @property
    def segment(self) -> Segment: ...

    def possible_times(self) -> np.ndarray: ...

    def find(self, time: np.datetime64) -> Source: ...


_DATES = "ISO dates, or all, or a range START/END or START/END/STEP"


def chosen_times(plan: HasTimes, times: Times, every: int = 1) -> np.ndarray:
    """The reference times that a user chooses, in order, checked to have their steps; for None
    every n-th possible one.

    Raises:
        ValueError: no dates, or dates that the store does not serve.
    """
    if times is None:
        possible = plan.possible_times()[::every]
        if len(possible) == 0:
            raise ValueError("init_time=all: the store is shorter than one window")
        for time in possible[1:][np.diff(possible) == np.timedelta64(0)][:1]:
            plan.find(time)  # in several segments: says in which
        return possible
    names = [str(name) if isinstance(name, str) else name  # plain ones are shown in messages
             for name in _named(times, plan.segment.calendar)]  # fmt: skip
    try:
        dates = [date for name in names for date in _dates_of(name, plan)]
        chosen = np.unique(np.array(dates, plan.segment.times.dtype))
    except ValueError as error:
        shown = f"[{','.join(map(str, names))}]" if len(names) > 1 else names[0]
        raise ValueError(f"init_time={shown}: {error}; needed: {_DATES}") from error
    if len(chosen) == 0:
        raise ValueError(f"init_time=[] names no date; valid: {_DATES}")
    for time in chosen:
        plan.find(time)
    return chosen


def _dates_of(name: Any, plan: HasTimes) -> list[np.datetime64]:
    """The dates that one name stands for: a date, or a range `START/END` or `START/END/STEP`, both
    ends included; a day counts as a whole. Without a step the range holds all times that the store
    serves.

    Raises:
        ValueError: no dates, no duration, or none in the range.
    """
    calendar = plan.segment.calendar
    if not isinstance(name, str) or "/" not in name:
        return [calendar.parse(name)]
    start, end, *step = name.split("/")
    if len(step) > 1:
        raise ValueError("valid: START/END or START/END/STEP, such as 2020-01-01/2020-03-31/12h")
    first, last = calendar.parse(start), calendar.parse_end(end)
    if last < first:
        raise ValueError(f"{start} lies after {end}; valid: START/END, the earlier date first")
    if step:
        seconds = round(3600 * hours(step[0]))
        if seconds == 0:
            raise ValueError(f"step {step[0]} of {name}; valid: a duration such as 12h")
        spacing = np.timedelta64(seconds, "s")
        dates = first + np.arange((last - first) // spacing + 1) * spacing
    else:
        possible = plan.possible_times()
        dates = possible[(possible >= first) & (possible <= last)]
    if len(dates) == 0:
        raise ValueError(f"{name} holds no date that the store serves")
    return list(dates)


def _named(times: Any, calendar: Calendar) -> list[Any]:
    """Dates of numpy, pandas, xarray, cftime or the standard library, in the form that the calendar
    parses.

    Raises:
        ValueError: what is no date, or one of another calendar.
    """
    values = np.atleast_1d(np.asarray(times))
    wrong = [v for v in values if not isinstance(v, str | np.datetime64 | date)
             and not hasattr(v, "calendar")]  # fmt: skip
    if wrong:
        raise ValueError(f"init_time={wrong[0]} is no date; valid: {_DATES}")
    for value in values.ravel():
        if not calendar.knows(value):
            raise ValueError(
                f"init_time={value} is a date of calendar {value.calendar}, the record's is "
                f"{calendar.name}; valid: ISO dates of it, or all"
            )
    return [v.isoformat() if hasattr(v, "isoformat") else v for v in values.ravel()]

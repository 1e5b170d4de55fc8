"""Zero-shot prediction: a trained model under one task's mask, tile by tile, blended.

Generators over init (or valid) times and bands of latitude, so memory grows neither with the number
of times nor with the height of the grid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np

from atmossl.batch import PRIMARY, View
from atmossl.data.axes import Calendar
from atmossl.data.segment import Segment
from atmossl.data.sources import check_window
from atmossl.geometry import Grid, TilePlan
from atmossl.inference.blend import BlendedPart, Fields
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.consistency import CoarseCells
from atmossl.inference.coverage import Coverage
from atmossl.inference.rollout import check_inputs, roll_out
from atmossl.inference.tiles import blended, first_view
from atmossl.inference.windows import Source
from atmossl.masking.tasks import Task, TimePlan


@dataclass(frozen=True)
class Predictor:
    """One task on one segment, or on several of the same grid and time step (`others`).

    overlap: share of a tile that its neighbour covers as well. tilings: how many tilings are
    averaged, each shifted eastwards by an equal part of a token, where the grid is a whole circle
    and the task lets tiles lie anywhere. batch_size: tiles in one call of the model, of any time or
    member. seed: of the order in which members go on in a rollout.
    fill_missing: predict also where a variable is missing in the whole window, which is NaN in
    the output otherwise, such as sea-surface temperature on land.
    """

    trained: TrainedModel
    segment: Segment
    task: Task
    overlap: float
    batch_size: int
    device: str
    tilings: int = 1
    lon_shift: int = 0
    seed: int = 0
    fill_missing: bool = False
    others: tuple[Segment, ...] = ()

    def __post_init__(self) -> None:
        self.trained.require("reconstruct")

    @property
    def segments(self) -> tuple[Segment, ...]:
        return (self.segment, *self.others)

    @cached_property
    def plan(self) -> TimePlan:
        refine = getattr(self.task, "refine", 1)
        return self.task.plan(self.trained.window.time, self.segment.step_hours / refine)

    @property
    def step(self) -> np.timedelta64:
        """Time between the steps of a window."""
        return self.segment.step // self.plan.refine

    @cached_property
    def grid(self) -> Grid:
        """Of the prediction: the store's, or one that nests in it."""
        coarse = self.coarse_factor
        try:
            return self.segment.grid.refined(coarse) if coarse > 1 else self.segment.grid
        except ValueError as error:
            raise ValueError(f"task.coarse_input: {self.segment.location}: {error}") from error

    @property
    def coarse_factor(self) -> int:
        """Cells of the prediction along one cell of the store."""
        task = self.task.downscaling
        return task.factor if task is not None and task.coarse_input else 1

    @cached_property
    def leads(self) -> np.ndarray:
        """Time from the reference time to every step that is written."""
        return np.array(self.plan.offsets) * self.step

    @cached_property
    def coverage(self) -> dict[str, Coverage]:
        """Where the streams that are predicted lie, by their `data`; the primary source last."""
        record = replace(self.segment, grid=self.grid)
        names = {spec.data for spec in self.trained.specs if spec.role == "predict"} - {PRIMARY}
        return {data: Coverage.of(record, data) for data in (*sorted(names), PRIMARY)}

    def grid_of(self, data: str) -> Grid:
        """The cells that the streams with that `data` are predicted on."""
        return self.coverage[data].grid

    def leads_of(self, data: str, time: np.datetime64, leads: np.ndarray) -> np.ndarray:
        """Those of the leads from a reference time at which the streams with that `data` have
        steps."""
        if self.plan.refine > 1:  # steps between those of the only store
            return leads
        return self.find(time).segment.sources[data].leads(time, leads)

    @cached_property
    def tiles(self) -> TilePlan:
        self.task.check(self.grid)
        self._check_auxiliary()
        return TilePlan(self.grid, *self._tile_size, self.overlap, self._shifts, self._align)

    @property
    def _tile_size(self) -> tuple[int, int]:
        """Rows and columns of a tile: those of the training's windows, or all that there are, in
        whole tokens.

        Raises:
            ValueError: the grid is smaller than a token.
        """
        window, specs = self.trained.window, self.trained.own_specs
        found = []
        for key, wanted, have, tokens in (
            ("rows", window.lat, self.grid.shape[0], {s.token_size.lat for s in specs}),
            ("columns", window.lon, self.grid.shape[1], {s.token_size.lon for s in specs}),
        ):
            cells = math.lcm(self._align, *tokens)
            if have < cells:
                raise ValueError(
                    f"the grid has {have} {key}, fewer than the {cells} of a token or coarse cell"
                )
            found.append(wanted if 0 < wanted <= have else have // cells * cells)
        return found[0], found[1]

    def _check_auxiliary(self) -> None:
        """Raise ValueError for what cannot be done with streams that read other data."""
        if not self.segment.auxiliaries:
            return
        names = sorted(self.segment.auxiliaries)
        if self.plan.refine > 1 or self.coarse_factor > 1:
            raise ValueError(
                "task.refine and task.coarse_input change the cells or steps of a single store; "
                f"the checkpoint has streams with data={names}, whose own would stay"
            )
        check_window(self.segment, self.trained.window.time, *self._tile_size)

    @property
    def _align(self) -> int:
        """Cells that tiles have to keep together."""
        return math.lcm(self.task.align, self.segment.alignment.cells)

    @property
    def _shifts(self) -> tuple[int, ...]:
        """Of the tilings, cells: within one token, coarse cells staying where they are."""
        token = max(spec.token_size.lon for spec in self.trained.own_specs)
        shifts = {number * token // self.tilings for number in range(self.tilings)}
        first = self.lon_shift + self.segment.alignment.lon_shift
        return tuple(first + shift for shift in sorted(shifts) if shift % self._align == 0)

    @property
    def row_chunk(self) -> int:
        """Rows of latitude that are written at once."""
        align = self._align
        return max(1, round(self.tiles.lat_size * (1 - self.overlap)) // align) * align

    def possible_times(self) -> np.ndarray:
        """Reference times with all the steps around them that a window needs, in order; so far
        apart that no valid time of a segment is written twice."""
        stride = 1 if self.plan.is_forecast or self.plan.refine > 1 else len(self.plan.offsets)
        found = [segment.times[self._served(segment)][::stride] for segment in self.segments]
        return np.sort(np.concatenate(found))

    @property
    def _steps_before(self) -> int:
        """Steps of the store that are read before the reference time."""
        return (self.plan.reference - self.plan.read[0]) // self.plan.refine

    def _served(self, segment: Segment) -> slice:
        """Steps of a segment that have around them what a window needs."""
        before = self._steps_before
        stop = len(segment.times) - (len(self.plan.read) - 1 - before)
        return slice(before, max(before, stop))

    def find(self, time: np.datetime64) -> Source:
        """The segment that serves a reference time, and the first step of it that is read.

        Raises:
            ValueError: no segment has the time and the steps around it, or several have.
        """
        holding = [one for one in self.segments if _holds(one.times[self._served(one)], time)]
        if len(holding) == 1:
            return Source(holding[0], holding[0].find_time(time) - self._steps_before)
        calendar = self.segment.calendar
        when = f"init_time={calendar.show(time)}"
        if holding:
            names = [segment.name for segment in holding]
            raise ValueError(f"{when} is in several segments; choose one: segment={names}")
        if len(self.segments) == 1:
            self.segment.find_time(time)  # says what it covers if it lacks the time itself
        before = self._steps_before
        after = max(len(self.plan.read) - 1 - before, 0)
        valid = ", ".join(_period(one.times[self._served(one)], calendar) for one in self.segments)
        raise ValueError(
            f"{when} is not there or lacks steps around it: the task needs {before} before and "
            f"{after} after; valid: {valid}"
        )

    def with_truth(self, times: np.ndarray) -> np.ndarray:
        """Those of the reference times for which the record holds all that would be written."""

        def known(time: np.datetime64) -> bool:
            record = self.find(time).segment.times
            return all(_holds(record, valid) for valid in time + self.leads)

        return np.array([time for time in times if known(time)], times.dtype)

    def first_view(self, time: np.datetime64) -> View:
        """What the model is shown of the first tile; no batch axis."""
        self.check()
        return first_view(self, self.find(time))

    def check(self) -> None:
        """Raise ValueError for a task that does not fit store or model, before it reads."""
        _ = self.tiles
        if self.plan.num_passes > 1:
            check_inputs(self)

    def run(self, times: Sequence[np.datetime64], data: str = PRIMARY) -> Iterator[Fields]:
        """For every reference time, each variable's blended ensemble over all that is written of
        the streams with that `data`."""
        whole: Fields = {}
        for part in self.parts(times):
            for name, values in part.fields.items() if part.data == data else ():
                leads = self.leads_of(data, times[part.case], self.leads)
                shape = (len(leads), *values.shape[1:3], *self.grid_of(data).shape)
                target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
                target[np.isin(leads, part.leads), :, :, part.rows] = values
            if part.completes:
                yield whole
                whole = {}

    def parts(self, times: Sequence[np.datetime64]) -> Iterator[BlendedPart]:
        """All that is written, case after case, each as soon as it is ready.

        Raises:
            ValueError: a time without its steps, or a task that does not fit store or model.
        """
        self.check()
        sources = [self.find(time) for time in times]
        if self.plan.num_passes > 1:
            for case, source in enumerate(sources):
                yield from roll_out(self, case, source)
            return
        coarse = self._coarse_cells()
        for part in blended(self, sources):
            if coarse is None or part.data != PRIMARY:
                yield part
            else:
                source = sources[part.case]
                step = source.start + self._steps_before
                fields, departure = coarse.compare(part.fields, source.segment, step, part.rows)
                yield replace(part, fields=fields, departure=departure)

    def _coarse_cells(self) -> CoarseCells | None:
        task = self.task.downscaling
        return None if task is None else CoarseCells(self.grid, task, self.trained.level_values)


def _holds(times: np.ndarray, time: np.datetime64) -> bool:
    index = int(np.searchsorted(times, time))
    return index < len(times) and times[index] == time


def _period(times: np.ndarray, calendar: Calendar) -> str:
    if len(times) == 0:
        return "none, the store is too short"
    first, last = (calendar.show(time) for time in times[[0, -1]])
    return f"{first} to {last}"

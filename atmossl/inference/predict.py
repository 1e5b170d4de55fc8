"""Zero-shot prediction: a trained model under one task's mask, tile by tile, blended.

Generators over init (or valid) times and bands of latitude, so memory grows neither with the number
of times nor with the height of the grid.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice

import numpy as np
import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamPrediction, StreamTokens, View, collate_views
from atmossl.data.calendars import Calendar
from atmossl.data.companions import check_window
from atmossl.data.segment import Segment
from atmossl.geometry import Box, Grid, TilePlan
from atmossl.inference.blend import Fields, Mosaic, Part
from atmossl.inference.calibration import Calibration
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.consistency import CoarseCells
from atmossl.inference.rollout import roll_out
from atmossl.inference.windows import Source, WindowReader, columns, masked_view
from atmossl.masking.tasks import Downscaling, Points, Task, TimePlan
from atmossl.tokens import detokenise


@dataclass(frozen=True)
class _Tile:
    """One tile of one case. complete: rows that are final once it is in, for the last of a row."""

    case: int
    box: Box
    weight: np.ndarray
    view: View
    hidden: tuple[Points, ...]
    complete: int | None


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
        coarse = self._coarse_factor
        try:
            return self.segment.grid.refined(coarse) if coarse > 1 else self.segment.grid
        except ValueError as error:
            raise ValueError(f"task.coarse_input: {self.segment.location}: {error}") from error

    @property
    def _coarse_factor(self) -> int:
        task = self.task
        return task.factor if isinstance(task, Downscaling) and task.coarse_input else 1

    @cached_property
    def tiles(self) -> TilePlan:
        self.task.check(self.grid)
        self._check_companions()
        (num_lat, num_lon), window = self.grid.shape, self.trained.window
        return TilePlan(
            self.grid,
            window.lat or num_lat,
            window.lon or num_lon,
            self.overlap,
            self._shifts,
            self._align,
        )

    def _check_companions(self) -> None:
        """Raise ValueError for what cannot be done with streams that read other data."""
        if not self.segment.companions:
            return
        names = sorted(self.segment.companions)
        if self.plan.refine > 1 or self._coarse_factor > 1 or self.plan.num_passes > 1:
            raise ValueError(
                f"task.refine, task.coarse_input and task.rollout_time need all streams on one "
                f"grid; the checkpoint has streams with data={names}"
            )
        window = self.trained.window
        num_lat, num_lon = self.grid.shape
        check_window(self.segment, window.time, window.lat or num_lat, window.lon or num_lon)

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
        written = np.array(self.plan.offsets) * self.step

        def known(time: np.datetime64) -> bool:
            record = self.find(time).segment.times
            return all(_holds(record, valid) for valid in time + written)

        return np.array([time for time in times if known(time)], times.dtype)

    def first_view(self, time: np.datetime64) -> View:
        """What the model is shown of the first tile; no batch axis."""
        return next(self._tiles([self.find(time)])).view

    def run(self, times: Sequence[np.datetime64]) -> Iterator[Fields]:
        """For every reference time, each variable's blended ensemble over all that is written."""
        whole: Fields = {}
        for part in self.parts(times):
            for name, values in part.fields.items():
                steps, members, levels = len(self.plan.offsets), *values.shape[1:3]
                shape = (steps, members, levels, *self.grid.shape)
                target = whole.setdefault(name, np.full(shape, np.nan, np.float32))
                target[part.step : part.step + len(values), :, :, part.rows] = values
            if part.completes:
                yield whole
                whole = {}

    def parts(self, times: Sequence[np.datetime64]) -> Iterator[Part]:
        """All that is written, case after case, each as soon as it is ready.

        Raises:
            ValueError: a time without its steps, or a task that does not fit store or model.
        """
        sources = [self.find(time) for time in times]
        if self.plan.num_passes > 1:
            for case, source in enumerate(sources):
                yield from roll_out(self, case, source)
            return
        coarse = self._coarse_cells()
        for part in self.blended(sources):
            if coarse is None:
                yield part
            else:
                source = sources[part.case]
                step = source.start + self._steps_before
                fields, departure = coarse.compare(part.fields, source.segment, step, part.rows)
                yield replace(part, fields=fields, departure=departure)

    def _coarse_cells(self) -> CoarseCells | None:
        if not isinstance(self.task, Downscaling):
            return None
        return CoarseCells(self.grid, self.task, self.trained.level_values)

    def blended(self, sources: Sequence[Source]) -> Iterator[Part]:
        """Bands of latitude of one source after another, for the steps of one pass."""
        tiles, mosaic = self._tiles(sources), Mosaic(self.grid.shape[1])
        while batch := list(islice(tiles, self.batch_size)):
            fields = self._predicted(batch)
            for number, tile in enumerate(batch):
                for variables, values in fields:
                    mosaic.add(variables, values[number], tile.box, tile.weight)
                if tile.complete is not None:
                    completes = tile.complete == self.grid.shape[0]
                    rows, done = mosaic.take(tile.complete)
                    if rows.stop > rows.start:
                        members = self._members_of(sources[tile.case], done, rows)
                        yield Part(tile.case, 0, rows, members, completes, {})
                    mosaic = Mosaic(self.grid.shape[1]) if completes else mosaic

    def _predicted(self, batch: list[_Tile]) -> list[tuple[tuple[str, ...], np.ndarray]]:
        """Variables and fields [batch variable step member level lat lon] of every stream."""
        views = collate_views([(tile.view,) for tile in batch], [tile.case for tile in batch])
        view = views.to(self.device).views[0]
        with torch.inference_mode():
            prediction = self.trained.model.to(self.device)(view)
        streams = [stream for stream in view.streams if stream.spec.role == "predict"]
        return [
            (stream.spec.variables, self._fields(stream, predicted, batch))
            for stream, predicted in zip(streams, prediction.streams, strict=True)
            if not stream.spec.data
        ]

    def _members_of(self, source: Source, fields: Fields, rows: slice) -> Fields:
        """The blended ensemble with calibrated spread, or the one member of it that a source asks
        for: single members of tiles that overlap would average out."""
        hours = np.array(self.plan.pass_offsets) * (self.step / np.timedelta64(1, "h"))
        calibration = Calibration(self.trained.record, self.task)
        fields = calibration.apply(fields, hours, self.grid.latitude[rows], self.grid.longitude)
        if source.member is None:
            return fields
        return {name: values[:, [source.member]] for name, values in fields.items()}

    def _tiles(self, sources: Sequence[Source]) -> Iterator[_Tile]:
        """Tiles of all sources in the order of writing; each band of latitude is read once."""
        plan, (num_lat, num_lon) = self.tiles, self.grid.shape
        reader = WindowReader(self.trained, self.plan, self.grid, self._coarse_factor, self.task)
        rows = plan.rows()
        for case, source in enumerate(sources):
            for row, numbers in enumerate(rows):
                south = plan.tiles[numbers[0]].lat_start
                around = Box(south, self.segment.alignment.lon_shift, plan.lat_size, num_lon)
                band = reader.read(source, around)
                following = plan.tiles[rows[row + 1][0]].lat_start if row + 1 < len(rows) else None
                complete = (
                    num_lat if following is None else following // self.row_chunk * self.row_chunk
                )
                for number in numbers:
                    box = plan.tiles[number]
                    view, hidden = masked_view(
                        columns(band, source.segment, around, box),
                        self.task,
                        first_guess=self.trained.first_guess,
                    )
                    last = complete if number == numbers[-1] else None
                    yield _Tile(case, box, plan.weights[number], view, hidden, last)

    def _fields(
        self, stream: StreamTokens, predicted: StreamPrediction, batch: list[_Tile]
    ) -> Float[np.ndarray, "batch variable step member level lat lon"]:
        """Windows in the variables' own units over the steps of one pass: predicted where hidden,
        as given elsewhere."""
        spec = stream.spec
        steps = [self.plan.reference + offset for offset in self.plan.pass_offsets]
        fields = detokenise(_in_place(predicted, stream), spec)[..., steps, :, :]
        number = [tile.view.names().index(spec.name) for tile in batch]
        hidden = torch.stack([t.hidden[n] for t, n in zip(batch, number, strict=True)])
        hidden = hidden[..., steps, :, :].to(fields.device)
        if not bool(hidden.all()):
            given = detokenise(stream.target, spec)[..., steps, :, :]
            fields = torch.where(hidden[:, None], fields, given[:, None])
        if stream.valid is not None and not self.fill_missing:
            never = ~detokenise(stream.valid, spec).any(dim=-3, keepdim=True)  # at no time
            fields = fields.masked_fill(never[:, None], float("nan"))
        values = self.trained.normaliser.inverse(fields.cpu(), spec).numpy()
        return rearrange(
            values,
            "batch member variable level step lat lon -> batch variable step member level lat lon",
        )


def _holds(times: np.ndarray, time: np.datetime64) -> bool:
    index = int(np.searchsorted(times, time))
    return index < len(times) and times[index] == time


def _period(times: np.ndarray, calendar: Calendar) -> str:
    if len(times) == 0:
        return "none, the store is too short"
    first, last = (calendar.show(time) for time in times[[0, -1]])
    return f"{first} to {last}"


def _in_place(
    predicted: StreamPrediction, stream: StreamTokens
) -> Float[Tensor, "batch member level nt nlat nlon patch"]:
    """Queries back at their tokens, zeros where nothing was asked."""
    members, queries = predicted.members, predicted.queries
    num_level, num_time, num_lat, num_lon = stream.grid.shape
    everywhere = members.new_zeros(
        (members.shape[0], stream.grid.num_tokens + 1, *members.shape[2:])
    )
    # padding goes to a spare token at the end, which is cut off
    spare = torch.full_like(queries.index, stream.grid.num_tokens)
    index = torch.where(queries.valid, queries.index, spare)[..., None, None]
    everywhere.scatter_(1, index.expand_as(members), members)
    return rearrange(
        everywhere[:, :-1],
        "batch (level nt nlat nlon) member patch -> batch member level nt nlat nlon patch",
        level=num_level,
        nt=num_time,
        nlat=num_lat,
        nlon=num_lon,
    )

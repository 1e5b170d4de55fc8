"""What the model is shown: windows read from a record, put under a task's mask."""

from dataclasses import dataclass, replace

import numpy as np
import torch
from einops import repeat
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import StreamWindow, View, token_grid
from atmossl.data.forcings import FORCINGS, ComputedChunks
from atmossl.data.segment import Segment, hours_since_1970
from atmossl.data.windows import read_window
from atmossl.geometry import Box, Grid
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.plan import Source
from atmossl.masking.base import Points, TokenLayout, points_of
from atmossl.masking.tasks import Task, TimePlan
from atmossl.masking.views import FirstGuess, make_view

_TOLERANCE_HOURS = 1e-6


@dataclass(frozen=True)
class WindowReader:
    """Reads windows of a task's steps. grid: of the windows. task: which may fill missing values,
    or read coarse cells; none for windows in which nothing is hidden.
    """

    trained: TrainedModel
    plan: TimePlan
    grid: Grid
    task: Task | None = None

    @property
    def coarse(self) -> int:
        """Cells of `grid` along one cell of the record."""
        return 1 if self.task is None else self.task.coarse_factor

    def read(self, source: Source, box: Box) -> tuple[StreamWindow, ...]:
        """All streams in a box of cells over all steps of the window; steps that are not read
        repeat the last one before, and are hidden by the task. What is computed from time and
        place has its true values at all steps."""
        factor, segment, plan = self.coarse, source.segment, self.plan
        cells = Box(
            box.lat_start // factor,
            box.lon_start // factor,
            box.lat_size // factor,
            box.lon_size // factor,
        )
        windows = read_window(
            segment,
            self.trained.specs_for(self.task),
            self.trained.normaliser,
            source.start,
            len(plan.read),
            cells,
        )
        return tuple(
            replace(
                self._computed(self._placed(self._dated(window, source), box), source), spec=spec
            )
            for window, spec in zip(windows, self.trained.specs, strict=True)
        )

    def _computed(self, window: StreamWindow, source: Source) -> StreamWindow:
        rows = [n for n, name in enumerate(window.spec.variables) if name in FORCINGS]
        if not rows:
            return window
        calendar, times = source.segment.calendar, self._times(window.spec.data, source)
        places = (window.lat.double().numpy(), window.lon.double().numpy())
        whole = (slice(None),) * 3
        raw = torch.zeros_like(window.fields)
        for row in rows:
            name = window.spec.variables[row]
            chunks = ComputedChunks(name, times, *places, calendar)
            raw[row] = torch.from_numpy(chunks.read(whole).copy()).to(raw)
        true = self.trained.normaliser.forward(raw, window.spec)
        fields = window.fields.clone()
        fields[rows] = true[rows]
        return replace(window, fields=fields)

    def _dated(self, window: StreamWindow, source: Source) -> StreamWindow:
        hours = torch.from_numpy(hours_since_1970(self._times(window.spec.data, source)))
        if len(window.time_hours) == 0:
            return _unread(window, hours)
        latest = torch.searchsorted(window.time_hours, hours + _TOLERANCE_HOURS) - 1
        latest = latest.clamp_min(0)
        return replace(
            window,
            fields=window.fields[..., latest, :, :],
            valid=None if window.valid is None else window.valid[..., latest, :, :],
            time_hours=hours,
        )

    def _times(self, data: str, source: Source) -> np.ndarray:
        """Times of all steps of a stream's window, in the record's calendar; they may lie outside
        the record."""
        segment, plan, count = source.segment, self.plan, self.trained.window.time
        if plan.refine > 1:  # steps between those of the only store
            steps = np.arange(count) - plan.read[0]
            return segment.times[source.start] + steps * (segment.step // plan.refine)
        read = segment.sources[data]
        first = segment.times[source.start] - plan.read[0] * segment.step
        steps = read.steps(first, count * segment.step)
        return read.segment.times[0] + np.array(steps) * read.segment.step

    def _placed(self, window: StreamWindow, box: Box) -> StreamWindow:
        """Coarse cells repeated over the fine ones that lie in them."""
        if self.coarse == 1:
            return window
        lat, lon = box.lat_index(), box.lon_index(self.grid.shape[1])
        fine = "... lat lon -> ... (lat y) (lon x)"
        valid, factors = window.valid, {"y": self.coarse, "x": self.coarse}
        return replace(
            window,
            fields=repeat(window.fields, fine, **factors),
            valid=None if valid is None else repeat(valid, fine, **factors),
            lat=torch.from_numpy(self.grid.latitude[lat]).float(),
            lon=torch.from_numpy(self.grid.longitude[lon]).float(),
            weight=torch.from_numpy(self.grid.weights[lat]).float(),
        )


def _unread(window: StreamWindow, hours: Float[Tensor, "time"]) -> StreamWindow:
    """A stream of which the task reads no step: nothing but zeros, all of which the task hides.

    Raises:
        ValueError: the stream is never hidden, so that the zeros would be seen.
    """
    spec = window.spec
    if spec.role != "predict":
        raise ValueError(
            f"the task reads no step of stream {spec.name} with data={spec.data}, whose steps are "
            "longer than what is given; choose another init_time or a shorter task.lead_time"
        )
    shape = (*window.fields.shape[:2], len(hours), *window.fields.shape[3:])
    valid = None if window.valid is None else torch.zeros(shape, dtype=torch.bool)
    return replace(window, fields=torch.zeros(shape), valid=valid, time_hours=hours)


def columns(
    windows: tuple[StreamWindow, ...], segment: Segment, band: Box, box: Box
) -> tuple[StreamWindow, ...]:
    """The windows of a band, which goes around the grid of a segment, at the longitudes of a
    box."""
    parts = []
    for window in windows:
        nesting = segment.sources[window.spec.data].nesting
        whole, part = nesting.box(band), nesting.box(box)
        offset = np.arange(part.lon_size) + part.lon_start - whole.lon_start
        index = torch.from_numpy(offset % nesting.other.shape[1])
        parts.append(
            replace(
                window,
                fields=window.fields[..., index],
                lon=window.lon[index],
                valid=None if window.valid is None else window.valid[..., index],
            )
        )
    return tuple(parts)


def masked_view(
    windows: tuple[StreamWindow, ...], task: Task, *, first_guess: FirstGuess
) -> tuple[View, tuple[Points, ...]]:
    """The windows as tokens under the task's mask, and which points [variable level time lat lon]
    of every stream it hides."""
    windows = task.change_coordinates(windows)
    task = task.with_gaps_of(windows)
    layouts = tuple(TokenLayout(window.spec, token_grid(window)) for window in windows)
    hidden = task.hidden_points(layouts)
    if hidden is not None and task.fills_missing:
        windows = tuple(map(_without_gaps, windows, hidden))
    rng = np.random.default_rng(0)  # never used by a task
    view = make_view(windows, task, rng, first_guess=first_guess, hidden_points=hidden)
    if hidden is None:
        hidden = tuple(points_of(stream.hidden, stream.spec) for stream in view.streams)
    return view, tuple(
        points.expand(window.fields.shape) for points, window in zip(hidden, windows, strict=True)
    )


def _without_gaps(window: StreamWindow, hidden: Points) -> StreamWindow:
    """Missing values that are hidden count as observed: they are to be predicted."""
    if window.valid is None or window.spec.role != "predict":
        return window
    return replace(window, valid=window.valid | hidden)

"""Warnings when a task asks a checkpoint for something that its training never had: other masks,
places, dates, levels or values. `Seen` tells where and when the records of a training lie, which
its checkpoint keeps."""

import calendar
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Self

import numpy as np
from pydantic_core import to_jsonable_python

from atmossl.batch import PRIMARY, Corruption, StreamMask, StreamWindow, TokenGrid, View
from atmossl.data.axes import STANDARD, Calendar
from atmossl.data.segment import Segment
from atmossl.data.variables import VARIABLES
from atmossl.data.windows import Normaliser, Statistics, WindowSize, read_window
from atmossl.geometry import Grid, TilePlan
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.plan import Plan
from atmossl.inference.tiles import first_view
from atmossl.masking.base import MaskingSampler, TokenLayout, step_hours_of
from atmossl.model_levels import standard_pressure
from atmossl.value_faults import listed

_NUM_DRAWS = 200
_HALF_MONTH_DAYS = 15
DAYS = 365  # equal parts of a year of any calendar
_PERIOD = re.compile(r"(\d{4}-\d\d-\d\dT\d\d) to (\d{4}-\d\d-\d\dT\d\d)")


@dataclass(frozen=True)
class Seen:
    """Dates and places of a training's records; what is None or empty is not known.

    days: of the year, from 0 to 364. cell: degrees of latitude and of longitude. latitudes: the
    southernmost and northernmost. longitudes: the westernmost, and how many degrees eastwards the
    last one lies; 360 where they close the circle.
    """

    days: tuple[int, ...] = ()
    calendar: str | None = None
    cell: tuple[float, float] | None = None
    latitudes: tuple[float, float] | None = None
    longitudes: tuple[float, float] | None = None

    @classmethod
    def of(cls, segments: Sequence[Segment]) -> Self:
        grid, calendar = segments[0].grid, segments[0].calendar
        days = {day for segment in segments for day in days_of(segment.times, calendar)}
        return cls(
            days=tuple(sorted(days)),
            calendar=calendar.name,
            cell=(grid.latitude_spacing, grid.longitude_spacing),
            latitudes=(float(grid.latitude[0]), float(grid.latitude[-1])),
            longitudes=(float(grid.longitude[0]), _eastward_extent(grid)),
        )

    @classmethod
    def of_period(cls, text: str) -> Self:
        """The record of an older checkpoint, which tells the period alone."""
        days: set[int] = set()
        for first, last in _PERIOD.findall(text):
            try:
                start, end = (np.datetime64(date, "ns") for date in (first, last))
            except ValueError:  # a date of another calendar
                return cls()
            days.update(days_of(np.arange(start, end, np.timedelta64(6, "h")), STANDARD))
        return cls(days=tuple(sorted(days)))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        fields: dict[str, Any] = {
            key: tuple(value) if isinstance(value, list) else value for key, value in values.items()
        }
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, for a checkpoint."""
        return to_jsonable_python(asdict(self))


def seen_by_data(segments: Sequence[Segment]) -> dict[str, Seen]:
    """Dates and places of the records of every source, by the `data` of the streams that read
    it."""
    names = segments[0].sources
    return {name: Seen.of([s.sources[name].segment for s in segments]) for name in names}


def days_of(times: np.ndarray, calendar: Calendar) -> list[int]:
    """The days of the year of times, each once."""
    days = (calendar.year_share(times) * DAYS).astype(int)
    return [int(day) for day in np.unique(np.minimum(days, DAYS - 1))]


def _eastward_extent(grid: Grid) -> float:
    """Degrees from the first longitude eastwards to the last; 360 if the longitudes close the
    circle."""
    return 360.0 if grid.periodic else float(grid.longitude[-1] - grid.longitude[0])


@dataclass(frozen=True)
class _MaskFeatures:
    """Features of masks, of one or of several draws. steps: the most time steps of the window that
    are hidden at all places and levels, in the finest of the streams' steps. always:
    the largest share of places that are hidden at every step. streams: whether a whole stream was
    hidden beside a visible one; both, if draws differ."""

    kinds: frozenset[str]
    factors: frozenset[int]
    steps: int
    always: float
    streams: frozenset[bool]

    @classmethod
    def of(cls, masks: Sequence[StreamMask], layouts: tuple[TokenLayout, ...]) -> "_MaskFeatures":
        kinds = {Corruption(int(k)).name.lower() for m in masks for k in m.corruption.unique()}
        coarse = {
            m.coarsen_factor for m in masks if bool((m.corruption == Corruption.COARSEN).any())
        }
        # a coarse token is given, if less sharply, so it hides neither step nor place
        dark = [(m.corruption == Corruption.MASK) | (m.corruption == Corruption.DROP)
                for m in masks]  # fmt: skip
        whole = [bool(d.all()) for d in dark]
        hours = [  # tokens of a stream may be several steps long
            int(d.all(dim=3).all(dim=2).all(dim=0).sum()) * float(layout.grid.time_extent)
            for d, layout in zip(dark, layouts, strict=True)
        ]
        return cls(
            kinds=frozenset(kinds - {"visible"}),
            factors=frozenset(coarse),
            steps=round(max(hours) / step_hours_of(layouts)),
            always=max(float(d.all(dim=1).double().mean()) for d in dark),
            streams=frozenset({any(whole) and not all(whole)}),
        )

    def __or__(self, other: "_MaskFeatures") -> "_MaskFeatures":
        return _MaskFeatures(
            kinds=self.kinds | other.kinds,
            factors=self.factors | other.factors,
            steps=max(self.steps, other.steps),
            always=max(self.always, other.always),
            streams=self.streams | other.streams,
        )


def unseen(
    view: View, sampler: MaskingSampler, factor: int | None = None, *, stretch: float = 1.0
) -> list[str]:
    """Sentences on how a view's mask goes beyond the masks of training, from draws of the
    training's sampler.

    factor: of the view's coarse tokens; not compared if None. stretch: the training's time step
    over that of the view, so that the sampler meets windows as in training.
    """
    layouts = tuple(
        TokenLayout(stream.spec, _stretched(stream.grid, stretch)) for stream in view.streams
    )
    view_mask = _MaskFeatures.of(
        [StreamMask(stream.corruption, factor or 1) for stream in view.streams], layouts
    )
    rng = np.random.default_rng(0)
    drawn = _MaskFeatures.of(sampler(layouts, rng), layouts)
    for _ in range(_NUM_DRAWS - 1):
        if drawn | view_mask == drawn:
            break  # nothing of the view lies beyond, and no further draw could change that
        drawn |= _MaskFeatures.of(sampler(layouts, rng), layouts)
    return _beyond(view_mask, drawn, factor)


def _beyond(view_mask: _MaskFeatures, drawn: _MaskFeatures, factor: int | None) -> list[str]:
    """Sentences on what a mask hides that none of the drawn masks does."""
    lines = []
    if view_mask.kinds - drawn.kinds:
        lines.append(
            f"tokens as {listed(sorted(view_mask.kinds - drawn.kinds))}; training had "
            f"{listed(sorted(drawn.kinds))}"
        )
    elif factor is not None and view_mask.factors - drawn.factors:
        lines.append(
            f"cells coarsened by {listed(sorted(view_mask.factors))}; training had "
            f"{listed(sorted(drawn.factors))}"
        )
    hides_a_stream = True in view_mask.streams
    if view_mask.steps > drawn.steps:
        lines.append(f"{view_mask.steps} whole steps hidden; training hid {drawn.steps} at most")
    elif view_mask.always > drawn.always + 1e-9 and not hides_a_stream:
        lines.append(
            f"{view_mask.always:.0%} of the places hidden at all steps; training hid "
            f"{drawn.always:.0%} at most"
        )
    if hides_a_stream and True not in drawn.streams:
        lines.append("a whole stream hidden; training always showed some of each")
    if not hides_a_stream and False not in drawn.streams:
        lines.append("some of every stream shown; training always hid a whole one")
    return lines


def _stretched(grid: TokenGrid, times: float) -> TokenGrid:
    start = grid.time_hours[:1]
    return replace(
        grid,
        time_hours=start + (grid.time_hours - start) * times,
        time_extent=grid.time_extent * times,
    )


def untrained_window(tiles: TilePlan, trained: WindowSize) -> list[str]:
    """A sentence if the store's grid is smaller than the windows of the training."""
    had = f"training had {trained.lat or 'all'} x {trained.lon or 'all'}"
    if tiles.lat_size < trained.lat or tiles.lon_size < trained.lon:
        return [f"windows of {tiles.lat_size} x {tiles.lon_size} cells; {had}"]
    if not trained.lon and not tiles.grid.periodic:
        return [f"windows that do not close the circle of latitude; {had} cells"]
    return []


def untrained_step(step_hours: float, trained_hours: float | None) -> list[str]:
    """A sentence if the window's steps are not those of the training."""
    if trained_hours is None or abs(step_hours - trained_hours) < 1e-6:
        return []
    return [f"steps of {step_hours:g} h; training had {trained_hours:g} h"]


def unseen_place(training: Seen, grid: Grid) -> list[str]:
    """Sentences if the grid's cells are of another size than in training, or lie further than
    one cell beyond those of training."""
    lines = []
    if training.cell is not None:
        cell = (grid.latitude_spacing, grid.longitude_spacing)
        ratios = np.divide(cell, training.cell)
        if np.abs(np.log(ratios)).max() > 0.05:
            lines.append(f"cells of {_size(cell)} degrees; training had {_size(training.cell)}")
        south, north = training.latitudes or (-90.0, 90.0)
        low, high = float(grid.latitude[0]), float(grid.latitude[-1])
        margin = max(cell[0], training.cell[0]) * 1.01
        if low < south - margin or high > north + margin:
            lines.append(f"latitudes from {low:g} to {high:g}; training had {south:g} to {north:g}")
        lines += _unseen_longitudes(training, grid, max(cell[1], training.cell[1]) * 1.01)
    return lines


def _unseen_longitudes(training: Seen, grid: Grid, margin: float) -> list[str]:
    west, extent = training.longitudes or (0.0, 360.0)
    first, now = float(grid.longitude[0]), _eastward_extent(grid)
    if extent == 360.0:
        return []
    beyond = (first - (west - margin)) % 360.0  # where it begins, from the edge eastwards
    if beyond + now <= extent + 2 * margin:
        return []
    return [
        f"longitudes from {first % 360:g} eastwards over {now:g} degrees; training had "
        f"{west % 360:g} over {extent:g}"
    ]


def _size(cell: tuple[float, float]) -> str:
    return f"{cell[0]:.3g} x {cell[1]:.3g}"


def unseen_dates(training: Seen, days: Sequence[int]) -> list[str]:
    """A sentence if days of the year are further than half a month from all of the training."""
    if not training.days:
        return []
    apart = np.abs(np.subtract.outer(np.asarray(days), np.asarray(training.days)))
    far = np.minimum(apart, DAYS - apart).min(axis=1) > _HALF_MONTH_DAYS
    if not far.any():
        return []
    return [f"dates in {_months(np.asarray(days)[far])}; training had {_months(training.days)}"]


def _months(days: Sequence[int] | np.ndarray) -> str:
    dates = np.datetime64("2001-01-01") + np.unique(np.asarray(days)).astype("timedelta64[D]")
    numbers = np.unique(dates.astype("datetime64[M]").astype(int) % 12)
    return ", ".join(calendar.month_name[number + 1] for number in numbers)


def unseen_calendar(training: Seen, name: str) -> list[str]:
    """A sentence if dates are of another calendar than those of the training."""
    if training.calendar in (None, name):
        return []
    return [f"dates of calendar {name}; training had {training.calendar}"]


def unseen_levels(view: View, *, model_levels: bool = False) -> list[str]:
    """A sentence if the network is told levels that its streams do not have. model_levels: as of a
    segment."""
    for stream in view.streams:
        size = stream.spec.token_size.level
        levels = stream.spec.level_values
        if model_levels and stream.spec.levels:
            levels = tuple(map(standard_pressure, levels))
        had = np.asarray(levels, float).reshape(-1, size).mean(axis=1)
        levels_now = stream.grid.level_hpa.double().numpy().reshape(-1)
        if not np.allclose(levels_now, had, rtol=1e-3):
            shown = [", ".join(f"{level:g}" for level in levels) for levels in (levels_now, had)]
            mean = " on average" if size > 1 else ""
            return [f"levels of {shown[0]} hPa{mean}; training had {shown[1]}"]
    return []


def unseen_values(windows: Sequence[StreamWindow], normaliser: Normaliser) -> list[str]:
    """A sentence for every variable with values beyond those of training by more than a standard
    deviation, at the level where they are furthest."""
    lines: dict[str, str] = {}
    for window in windows:
        training = normaliser.statistics[window.spec.data]
        if training.minimum is None or training.maximum is None or not window.fields.numel():
            continue
        local = normaliser.local_of(window)
        if local is not None:
            window = replace(window, fields=local.out_of(window.fields))
        for row, name in enumerate(window.spec.variables):
            line = _unseen_range(window, row, training)
            if line:
                lines.setdefault(name, f"{name}{line}")
    return list(lines.values())


def _unseen_range(window: StreamWindow, row: int, statistics: Statistics) -> str:
    """Where and how far one variable of a window is beyond training; empty if it is not."""
    spec, name = window.spec, window.spec.variables[row]
    mean, std, low, high = (
        statistics.select(spec, field)[row].double().numpy()
        for field in ("mean", "std", "minimum", "maximum")
    )
    fields = window.fields[row].flatten(1).double()  # [level point]
    lowest, highest = (values.numpy() * std + mean for values in fields.aminmax(dim=1))
    beyond = np.maximum(low - lowest, highest - high) / std
    column = int(beyond.argmax())
    if beyond[column] <= 1.0:
        return ""
    numbers = np.array([values[column] for values in (lowest, highest, low, high)])
    transform = statistics.transforms.get(name)
    numbers = numbers if transform is None else transform.inverse(numbers)
    level = spec.level_values[column]
    units = f" {VARIABLES[name].units}" if name in VARIABLES else ""
    return (
        f"{f' at {level} hPa' if level else ''} from {numbers[0]:.4g} to {numbers[1]:.4g}{units}; "
        f"training had {numbers[2]:.4g} to {numbers[3]:.4g}"
    )


# A prediction's places, dates and values against those of the training of its checkpoint.

_NUM_READ = 3  # times whose values are looked at beforehand
_HOUR_US = 3.6e9


def unseen_by_training(plan: Plan, times: np.ndarray, view: View) -> list[str]:
    """Sentences on cells, places, dates, calendar, levels and values that training never had, as
    far as the checkpoint's record tells. view: what the network is shown at the first time."""
    trained, segment = plan.trained, plan.segment
    by_data = seen_in_training(trained)
    training, lines = by_data.get(PRIMARY, Seen()), []
    for data, source in segment.sources.items():
        is_primary = data == PRIMARY
        grid = plan.task.told_grid(plan.grid) if is_primary else source.segment.grid
        where = "" if is_primary else f" (data={data})"
        lines += [line + where for line in unseen_place(by_data.get(data, Seen()), grid)]
    lines += unseen_calendar(training, segment.calendar.name)
    lines += unseen_dates(training, _told_days(plan, times, view))
    lines += unseen_levels(view, model_levels=segment.model_levels)
    if segment.access.input_limits == "off":
        return lines
    return lines + unseen_values(_windows(plan, times), trained.normaliser)


def seen_in_training(trained: TrainedModel) -> dict[str, Seen]:
    """Dates and places of training, by the streams' `data`. Checkpoints before version 0.2 tell
    the period alone."""
    checkpoint_record = trained.checkpoint_record
    if checkpoint_record.get("seen"):
        return {data: Seen.from_dict(values) for data, values in checkpoint_record["seen"].items()}
    period = str(checkpoint_record.get("statistics", {}).get(PRIMARY, {}).get("period", ""))
    return {PRIMARY: Seen.of_period(period)}


def _told_days(plan: Plan, times: np.ndarray, view: View) -> list[int]:
    """The days of the year of all windows and leads, as the network is told them."""
    hours = view.streams[0].grid.time_hours.double().numpy()
    last = float(plan.leads.max() / np.timedelta64(1, "h")) + hours[0]
    window_times = np.append(hours, max(last, hours[-1])) * _HOUR_US
    since = (times - times[0]).astype("timedelta64[us]").astype(np.float64)
    every = np.add.outer(since, window_times).ravel().astype("datetime64[us]")
    return days_of(every.astype(plan.segment.times.dtype), plan.segment.calendar)


def _windows(plan: Plan, times: np.ndarray) -> list[StreamWindow]:
    """The streams of the run's own data on the whole grid, at some of the times."""
    trained = plan.trained
    specs = [spec for spec in trained.specs_for(plan.task) if spec.data == PRIMARY]
    chosen = times[np.unique(np.linspace(0, len(times) - 1, _NUM_READ).astype(int))]
    windows = []
    for time in chosen:
        source = plan.find(time)
        segment, count = source.segment, len(plan.steps.read)
        windows += read_window(
            segment, specs, trained.normaliser, source.start, count, segment.whole()
        )
    return windows


def out_of_training_warnings(
    plan: Plan, times: np.ndarray, sampler: MaskingSampler | str | None
) -> list[str]:
    """Sentences on what the task asks at these times that training never had, as far as the
    checkpoint records it.

    sampler: of the training's masks; None if it is not recorded, or a text that says why it may not
        be built.
    """
    checkpoint_record, view = plan.trained.checkpoint_record, first_view(plan, times[0])
    step_hours = float(plan.step / np.timedelta64(1, "h"))
    lines = untrained_step(step_hours, checkpoint_record.get("step_hours"))
    lines += untrained_window(plan.tiles, plan.trained.window)
    lines += unseen_by_training(plan, times, view)
    if sampler is None or isinstance(sampler, str):
        return lines if sampler is None else [*lines, sampler]
    task = plan.task.downscaling
    factor = None if task is None else task.factor
    stretch = (checkpoint_record.get("step_hours") or step_hours) / step_hours
    return lines + unseen(view, sampler, factor, stretch=stretch)

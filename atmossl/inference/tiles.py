"""Zero-shot prediction, tile by tile: read windows from a record, put them under a task's mask, run
the model, and blend its tiles into fields.

Generators over init (or valid) times and bands of latitude, so memory grows neither with the number
of times nor with the height of the grid.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass, replace
from itertools import islice

import numpy as np
import torch
from einops import rearrange, repeat
from jaxtyping import Float
from torch import Tensor

from atmossl.batch import (
    PRIMARY,
    StreamPrediction,
    StreamSpec,
    StreamTokens,
    StreamWindow,
    View,
    collate_views,
    detokenise,
    token_grid,
)
from atmossl.data.forcings import FORCINGS, ComputedChunks
from atmossl.data.monthly_normals import LocalUnits
from atmossl.data.segment import HOUR, Segment, hours_since_1970
from atmossl.data.windows import read_windows
from atmossl.geometry import Box, Grid
from atmossl.inference.calibration import Calibration
from atmossl.inference.checkpoint import TrainedModel
from atmossl.inference.coarse_cells import CoarseCells
from atmossl.inference.plan import BlendedPart, Fields, Plan, Source
from atmossl.inference.rollout import roll_out
from atmossl.masking.base import FirstGuess, Points, TokenLayout, make_view, points_of
from atmossl.masking.tasks import Task, TimePlan
from atmossl.model.network import scatter

_TOLERANCE_HOURS = 1e-6


@dataclass(frozen=True)
class WindowReader:
    """Reads windows of a task's steps. grid: of the windows. task: decides whether missing
    values are filled, or cells are coarse; None for windows in which nothing is hidden."""

    trained: TrainedModel
    plan: TimePlan
    grid: Grid
    task: Task | None = None

    @property
    def coarse(self) -> int:
        """How many cells of `grid` lie along one cell of the record."""
        return 1 if self.task is None else self.task.coarse_factor

    def read(self, source: Source, box: Box) -> tuple[StreamWindow, ...]:
        """Read all streams in a box of cells over all steps of the window. Steps that are not
        read repeat the last one before, and the task hides them. Forcings have their true values
        at all steps."""
        factor, segment, plan = self.coarse, source.segment, self.plan
        cells = Box(*(part // factor for part in astuple(box)))
        specs, place = self.trained.specs_for(self.task), (source.start, cells)
        (windows,) = read_windows(segment, specs, self.trained.normaliser, len(plan.read), [place])
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
        """The times of all steps of a stream's window, in the record's calendar; they may lie
        outside the record."""
        segment, plan, count = source.segment, self.plan, self.trained.window.time
        if plan.refine > 1:  # steps between those of the only store
            steps = np.arange(count) - plan.read[0]
            return segment.times[source.start] + steps * (segment.step // plan.refine)
        read = segment.sources[data]
        first = segment.times[source.start] - plan.read[0] * segment.step
        steps = read.steps(first, count * segment.step)
        return read.segment.times[0] + np.array(steps) * read.segment.step

    def _placed(self, window: StreamWindow, box: Box) -> StreamWindow:
        """Coarse cells, repeated over the fine cells that lie in them."""
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
    """Zeros for a stream of which the task reads no step; the task hides all of them.

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
    """The part of a band around the globe that lies at the longitudes of a box."""
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
    """The windows as tokens under the task's mask, and the points [variable level time lat lon]
    of every stream that it hides."""
    windows = task.change_coordinates(windows)
    task = task.with_gaps_of(windows)
    layouts = tuple(TokenLayout(window.spec, token_grid(window)) for window in windows)
    hidden = task.hidden_points(layouts)
    if hidden is not None and task.fills_missing:
        windows = tuple(map(_without_gaps, windows, hidden))
    rng = np.random.default_rng(0)  # never used by a task
    view = make_view(windows, task, rng, first_guess=first_guess)
    if hidden is None:
        hidden = tuple(points_of(stream.hidden, stream.spec) for stream in view.streams)
    return view, tuple(
        points.expand(window.fields.shape) for points, window in zip(hidden, windows, strict=True)
    )


def _without_gaps(window: StreamWindow, hidden: Points) -> StreamWindow:
    """A window in which hidden missing values count as observed, since they are to be predicted."""
    if window.valid is None or window.spec.role != "predict":
        return window
    return replace(window, valid=window.valid | hidden)


class TileBlender:
    """Weighted mean of the tiles of one case, over the bands of latitude that are still open.

    Members that are draws of noise (`model.ensemble=noise`) are the same field in all tiles, and
    their mean is all there is to it.

    Members of a tail of the same number in two tiles are hardly related, so their mean has less
    spread than either (`keeps_variance`). Each member's departure from the ensemble mean is
    therefore scaled where tiles overlap, such that the variance over members is the weighted mean
    of the tiles' variances; the ensemble mean is the weighted mean of theirs.

    levels: of every variable in hPa; a tile of one stream may hold some of them.
    """

    def __init__(
        self, num_lon: int, levels: Mapping[str, tuple[int, ...]], *, keeps_variance: bool = True
    ) -> None:
        self.num_lon = num_lon
        self.keeps_variance = keeps_variance
        self.levels = levels
        self.south = 0  # first row that is held
        self._fields: Fields = {}
        self._variance: Fields = {}  # over members, kept as one member

    def add(self, spec: StreamSpec, values: np.ndarray, tile: Box, weight: np.ndarray) -> None:
        """Add the values [variable step member level lat lon] of a stream's tile, with its
        weight."""
        share = weight.astype(np.float32)
        self._add(self._fields, spec, values * share, tile)
        if self.keeps_variance:
            self._add(self._variance, spec, values.var(axis=2, keepdims=True) * share, tile)

    def _add(self, fields: Fields, spec: StreamSpec, weighted: np.ndarray, tile: Box) -> None:
        top = tile.lat_start + tile.lat_size - self.south
        rows = slice(tile.lat_start - self.south, top)
        first = tile.lon_start
        before = min(tile.lon_size, self.num_lon - first)  # columns before the circle closes
        for name, patch in zip(spec.variables, weighted, strict=True):
            levels = self.levels[name]
            shape = (*patch.shape[:2], len(levels), *patch.shape[3:])
            field = self._room(fields, name, shape, top)
            whole = levels == spec.level_values
            at = slice(None) if whole else [levels.index(level) for level in spec.level_values]
            field[..., at, rows, first : first + before] += patch[..., :before]
            if before < tile.lon_size:
                field[..., at, rows, : tile.lon_size - before] += patch[..., before:]

    def _room(self, fields: Fields, name: str, shape: tuple[int, ...], num_rows: int) -> np.ndarray:
        """The field of a variable, with at least so many rows."""
        field = fields.get(name)
        held = 0 if field is None else field.shape[-2]
        if field is None or held < num_rows:
            grown = np.zeros((*shape[:-2], num_rows, self.num_lon), np.float32)
            if field is not None:
                grown[..., :held, :] = field
            fields[name] = field = grown
        return field

    def take(self, end: int) -> tuple[slice, Fields]:
        """The rows up to `end`, to which no further tile contributes; the blender forgets them."""
        rows, count = slice(self.south, max(end, self.south)), max(end - self.south, 0)
        done = {name: field[..., :count, :] for name, field in self._fields.items()}
        for name, variance in self._variance.items():
            done[name] = _with_variance(done[name], variance[..., :count, :])
        self._fields = _rows_from(self._fields, count)
        self._variance = _rows_from(self._variance, count)
        self.south = rows.stop
        return rows, done


def _rows_from(fields: Fields, first: int) -> Fields:
    return {name: field[..., first:, :].copy() for name, field in fields.items()}


def _with_variance(members: np.ndarray, variance: np.ndarray) -> np.ndarray:
    """Members whose departures from their mean (axis 1) are scaled to the given variance."""
    departure = members - members.mean(axis=1, keepdims=True)
    present = (departure**2).mean(axis=1, keepdims=True)
    ratio = np.divide(variance, present, out=np.ones_like(present), where=present > 0)
    # added, so that members stay as they are, to the last bit, where nothing is to be scaled
    return members + (np.sqrt(ratio) - 1) * departure


# Members that are one field each, rather than one value for each cell of a token.
#
# The loss of training looks at one value at a time, so nothing tells which value of a cell
# belongs to which of its neighbour. The network learns an order of members for every cell of a
# token, the same for all tokens, which shows as waves of the length of a token.

_BY_CELL = (
    "batch member variable level step (nlat plat) (nlon plon)"
    " -> batch member variable level step nlat nlon (plat plon)"
)


def coherent(
    fields: Float[Tensor, "batch member variable level step lat lon"], spec: StreamSpec
) -> Float[Tensor, "batch member variable level step lat lon"]:
    """The same values at every point, reordered so that in all cells of a token the members have
    the ranks that they have in its first cell. No score of single points changes.

    Source: ensemble copula coupling, Schefzik et al. (2013), Statistical Science 28, 616-640.
    """
    size = spec.token_size
    if size.lat * size.lon == 1 or fields.shape[1] == 1:
        return fields
    sizes = {"plat": size.lat, "plon": size.lon}
    cells = rearrange(fields, _BY_CELL, **sizes)
    rank = cells[..., :1].argsort(dim=1).argsort(dim=1)
    ordered = torch.gather(cells.sort(dim=1).values, 1, rank.expand(cells.shape))
    return rearrange(ordered, " -> ".join(reversed(_BY_CELL.split(" -> "))), **sizes)


@dataclass(frozen=True)
class _Tile:
    """One tile of one case. local: units of every stream's fields, where they depend on month and
    place. complete: for the last tile of a row, how many rows are final after it."""

    case: int
    box: Box
    weight: np.ndarray
    view: View
    hidden: tuple[Points, ...]
    local: tuple[LocalUnits | None, ...]
    complete: int | None


def predict_parts(plan: Plan, times: Sequence[np.datetime64]) -> Iterator[BlendedPart]:
    """Everything that is written, case after case, each part as soon as it is ready.

    Raises:
        ValueError: a time without its steps.
    """
    sources = [plan.find(time) for time in times]
    if plan.steps.num_passes > 1:
        for case, source in enumerate(sources):
            yield from roll_out(plan, case, source, blended)
        return
    yield from blended(plan, sources)


def views(plan: Plan, time: np.datetime64) -> Iterator[tuple[Box, View]]:
    """The place and the view of every tile at a reference time, without a batch axis."""
    for tile in _tiles(plan, [plan.find(time)]):
        yield tile.box, tile.view


def first_view(plan: Plan, time: np.datetime64) -> View:
    """The view of the first tile at a reference time, without a batch axis."""
    return next(_tiles(plan, [plan.find(time)])).view


def blended(plan: Plan, sources: Sequence[Source]) -> Iterator[BlendedPart]:
    """Blended bands of latitude of one source after another, for the steps of one pass. Streams
    with data of their own come before the others."""
    model = plan.trained.model.to(plan.options.device)
    calibration = Calibration(plan.trained.checkpoint_record, plan.task)
    if calibration.needs_all_rows:
        plan = replace(plan, options=replace(plan.options, all_rows=True))
    tiles, blenders = _tiles(plan, sources), _blenders(plan)
    while batch := list(islice(tiles, plan.options.batch_size)):  # reads windows and hides
        view, members = _batched(plan, sources, batch)
        with torch.inference_mode():
            prediction = model(view) if members is None else model(view, members)
        streams = [stream for stream in view.streams if stream.spec.role == "predict"]
        fields = [
            (stream.spec, _windows(plan, sources, stream, predicted, batch))
            for stream, predicted in zip(streams, prediction.streams, strict=True)
        ]
        for number, tile in enumerate(batch):
            for spec, windows in fields:
                if windows[number].shape[1] > 0:
                    placed = plan.placed(spec.data, tile.box, tile.weight)
                    blenders[spec.data].add(spec, windows[number], *placed)
            if tile.complete is not None:
                yield from _complete_rows(plan, blenders, calibration, tile, sources[tile.case])
                if tile.complete == plan.grid.shape[0]:
                    blenders = _blenders(plan)


def _batched(
    plan: Plan, sources: Sequence[Source], batch: list[_Tile]
) -> tuple[View, list[int | Tensor] | None]:
    """The views of some tiles as one batch on the device; and the members that a network of noise
    draws, None for one without."""
    views = collate_views([(tile.view,) for tile in batch], [tile.case for tile in batch])
    view = views.to(plan.options.device).views[0]
    if not plan.trained.model.any_member:
        return view, None
    return _with_noise(plan, view, [sources[tile.case] for tile in batch])


def _with_noise(
    plan: Plan, view: View, sources: Sequence[Source]
) -> tuple[View, list[int | Tensor]]:
    """The view with one seed for all its samples, and the members to draw. The noise of a member
    depends on seed, place and time alone, so that tiles, dates and passes agree. A source that
    asks for one member of a rollout has its own number in the batch."""
    assert view.noise_seed is not None
    seeded = replace(view, noise_seed=torch.full_like(view.noise_seed, plan.options.seed))
    chosen = [source.member for source in sources if source.member is not None]
    if chosen:
        return seeded, [torch.tensor(chosen, device=view.noise_seed.device)]
    return seeded, list(plan.drawn)


def _blenders(plan: Plan) -> dict[str, TileBlender]:
    """One blender for the grid of every source; that of the primary source comes last."""
    return {
        data: TileBlender(
            plan.grid_of(data).shape[1],
            plan.trained.predicted_levels(data),
            keeps_variance=not plan.trained.model.any_member,
        )
        for data in plan.coverage
    }


def _complete_rows(
    plan: Plan,
    blenders: Mapping[str, TileBlender],
    calibration: Calibration,
    tile: _Tile,
    source: Source,
) -> Iterator[BlendedPart]:
    """How many rows of every grid are final after a tile."""
    assert tile.complete is not None
    for data, blender in blenders.items():
        rows, fields = blender.take(plan.coverage[data].row(tile.complete))
        if rows.stop > rows.start and fields:
            leads, coarse = plan.written_steps(data, source)[1], None
            is_own = data == PRIMARY  # other streams are neither calibrated nor downscaled
            if is_own and plan.task.downscaling is not None:
                coarse = CoarseCells.read(plan, source, fields, rows)
            if is_own:
                fields = _corrected(plan, calibration, coarse, fields, rows, leads)
            fields = _members_of(plan, source, fields)
            departure = {} if coarse is None else coarse.departure(fields)
            is_last = is_own and tile.complete == plan.grid.shape[0]
            yield BlendedPart(tile.case, leads, rows, fields, is_last, departure, data)


def _corrected(
    plan: Plan,
    calibration: Calibration,
    coarse: CoarseCells | None,
    fields: Fields,
    rows: slice,
    leads: np.ndarray,
) -> Fields:
    """The blended ensemble, calibrated. That of a downscaling has the given means before, as it was
    when the calibration was fitted, and after."""
    fields = fields if coarse is None else coarse.kept(fields)
    if not calibration.factors:
        return fields
    lat, lon = plan.grid.latitude[rows], plan.grid.longitude
    fields = calibration.apply(fields, leads / HOUR, lat, lon, centre=plan.centre)
    return fields if coarse is None else coarse.kept(fields)


def _members_of(plan: Plan, source: Source, fields: Fields) -> Fields:
    """The written members of the blended ensemble, or the one that a source asks for. For a tail
    the whole ensemble is blended: single members of overlapping tiles would average out."""
    if source.member is None:
        return plan.written(fields)
    if plan.trained.model.any_member:
        return fields
    return {name: values[:, [source.member]] for name, values in fields.items()}


def _windows(
    plan: Plan,
    sources: Sequence[Source],
    stream: StreamTokens,
    predicted: StreamPrediction,
    batch: list[_Tile],
) -> list[Float[np.ndarray, "variable step member level lat lon"]]:
    """The written values of a stream, for every tile of a batch. A stream with data of its own
    may have other steps for every source."""
    written = [plan.written_steps(stream.spec.data, sources[tile.case])[0] for tile in batch]
    needed = list(dict.fromkeys(step for steps in written for step in steps))
    fields = _fields(plan, stream, predicted, batch, needed)
    return [
        of_tile if steps == needed else of_tile[:, [needed.index(step) for step in steps]]
        for of_tile, steps in zip(fields, written, strict=True)
    ]


def _tiles(plan: Plan, sources: Sequence[Source]) -> Iterator[_Tile]:
    """The tiles of all sources in the order of writing; each band of latitude is read once."""
    tiling, (num_lat, num_lon) = plan.tiles, plan.grid.shape
    reader = WindowReader(plan.trained, plan.steps, plan.grid, plan.task)
    rows = tiling.rows()
    for case, source in enumerate(sources):
        for row, numbers in enumerate(rows):
            south = tiling.tiles[numbers[0]].lat_start
            around = Box(south, plan.segment.alignment.lon_shift, tiling.lat_size, num_lon)
            band = reader.read(source, around)
            predicted = replace(source.segment, grid=plan.grid)
            following = tiling.tiles[rows[row + 1][0]].lat_start if row + 1 < len(rows) else None
            complete = (
                num_lat if following is None else following // plan.row_chunk * plan.row_chunk
            )
            if plan.options.all_rows and following is not None:
                complete = 0
            for number in numbers:
                box = tiling.tiles[number]
                windows = columns(band, predicted, around, box)
                view, hidden = masked_view(windows, plan.task, first_guess=plan.trained.first_guess)
                local = tuple(map(plan.trained.normaliser.local_of, windows))
                last = complete if number == numbers[-1] else None
                yield _Tile(case, box, tiling.weights[number], view, hidden, local, last)


def _fields(
    plan: Plan,
    stream: StreamTokens,
    predicted: StreamPrediction,
    batch: list[_Tile],
    steps: list[int],
) -> Float[np.ndarray, "batch variable step member level lat lon"]:
    """Some steps of windows in physical units: predicted where hidden, as given elsewhere."""
    spec = stream.spec
    fields = detokenise(_in_place(predicted, stream), spec)[..., steps, :, :]
    if not plan.trained.model.any_member:
        fields = coherent(fields, spec)
    number = [tile.view.names().index(spec.name) for tile in batch]
    hidden = torch.stack([t.hidden[n] for t, n in zip(batch, number, strict=True)])
    hidden = hidden[..., steps, :, :].to(fields.device)
    if not bool(hidden.all()):
        visible = detokenise(stream.target, spec)[..., steps, :, :]
        fields = torch.where(hidden[:, None], fields, visible[:, None])
    if stream.valid is not None and not plan.options.fill_missing:
        never = ~detokenise(stream.valid, spec).any(dim=-3, keepdim=True)  # at no time
        fields = fields.masked_fill(never[:, None], float("nan"))
    local = [tile.local[n] for n, tile in zip(number, batch, strict=True)]
    fields = torch.stack(
        [
            field if units is None else units.at_steps(steps).out_of(field)
            for field, units in zip(fields.cpu(), local, strict=True)
        ]
    )
    values = plan.trained.normaliser.inverse(fields, spec).numpy()
    return rearrange(
        values,
        "batch member variable level step lat lon -> batch variable step member level lat lon",
    )


def _in_place(
    predicted: StreamPrediction, stream: StreamTokens
) -> Float[Tensor, "batch member level nt nlat nlon patch"]:
    """Predicted queries at the places of their tokens, with zeros elsewhere."""
    num_level, num_time, num_lat, num_lon = stream.grid.shape
    return rearrange(
        scatter(predicted.members.flatten(2), predicted.queries),
        "batch (level nt nlat nlon) (member patch) -> batch member level nt nlat nlon patch",
        level=num_level,
        nt=num_time,
        nlat=num_lat,
        nlon=num_lon,
        patch=predicted.members.shape[-1],
    )

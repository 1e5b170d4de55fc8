"""From a window to what the encoder sees of it: the protocol of masking samplers, what samplers
share (tokens, times, places and masks), and the view under a mask with its first guess.

A sampler is a pure function: stream specs and token grids of one window, and a generator, to one
mask per stream. Streams of role `input` are never hidden.

The first guess of hidden values is linear in time between what is shown of the same place. Where a
whole token is shown or hidden, its points share their neighbours in time, which are then found once
per token, and only what is hidden is computed.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

from atmossl.batch import (
    PRIMARY,
    Corruption,
    StreamMask,
    StreamSpec,
    StreamTokens,
    StreamWindow,
    TokenGrid,
    TokenSize,
    View,
    detokenise,
    token_grid,
    tokenise,
)
from atmossl.masking.cells import coarsen, interpolate_cells, other_model_guess, repeat_coarse
from atmossl.value_faults import as_written

SURROUNDINGS, OTHER_MODEL = "surroundings", "other_model"
# Of hidden values: none, which is the climatological mean; from other steps of the same place; or
# that, and for places that are never shown from the places around, or from what another model says.
FirstGuess = bool | Literal["surroundings", "other_model"]
_TOLERANCE = 1e-2  # of a number of cells
TOLERANCE_HOURS = 1e-3
Points = Bool[Tensor, "*variable level time lat lon"]


@dataclass(frozen=True)
class TokenLayout:
    """The tokens of one stream of a window, before anything is hidden."""

    spec: StreamSpec
    grid: TokenGrid

    @property
    def step_hours(self) -> float:
        """Hours between the points of the window."""
        return float(self.grid.time_extent) / self.spec.token_size.time

    @property
    def cell_degrees(self) -> tuple[float, float]:
        """Height and width of a cell of the window."""
        size = self.spec.token_size
        return float(self.grid.lat_extent) / size.lat, float(self.grid.lon_extent) / size.lon

    def point_times(self) -> Float[Tensor, "nt point"]:
        """Times of the points of every token, in hours since 1970-01-01T00."""
        count = self.spec.token_size.time
        offset = (torch.arange(count) - (count - 1) / 2) * self.step_hours
        return self.grid.time_hours[:, None] + offset

    def point_lat(self) -> Float[Tensor, "lat"]:
        """Latitudes of the window's rows in degrees."""
        return _points(self.grid.lat, self.grid.lat_extent, self.spec.token_size.lat)

    def point_lon(self) -> Float[Tensor, "lon"]:
        """Longitudes of the window's columns in degrees, 0 to 360."""
        return _points(self.grid.lon, self.grid.lon_extent, self.spec.token_size.lon) % 360.0

    def nothing_hidden(self) -> StreamMask:
        return StreamMask(torch.zeros(self.grid.shape, dtype=torch.int64))


def _points(centre: Tensor, extent: Tensor, count: int) -> Tensor:
    """Points of tokens, flat, from their centres and what a token spans, in float64."""
    offset = (torch.arange(count, dtype=torch.float64) - (count - 1) / 2) / count * extent
    return (centre[:, None] + offset).flatten()


# Of all streams of one window, in the order of the streams.
TokenLayouts = tuple[TokenLayout, ...]
StreamMasks = tuple[StreamMask, ...]


def own_factor(layout: TokenLayout, layouts: TokenLayouts, factor: int) -> int:
    """How many cells of a stream lie along one coarse cell, which is `factor` cells of the run's
    own data; 1 if the stream's cells are as large or larger.

    Raises:
        ValueError: the coarse cell is no whole number of the stream's, or not the same along both
            axes.
    """
    if layout.spec.data == PRIMARY:
        return factor
    primary = next(other for other in layouts if other.spec.data == PRIMARY)
    cells = [factor * a / b for a, b in zip(primary.cell_degrees, layout.cell_degrees, strict=True)]
    if max(cells) <= 1 + _TOLERANCE:
        return 1
    if max(abs(n - round(cells[0])) for n in cells) > _TOLERANCE:
        raise ValueError(
            f"coarse cells of {factor} x {factor} are {cells[0]:g} x {cells[1]:g} cells of stream "
            f"{layout.spec.name}, which reads data={layout.spec.data}; choose another factor"
        )
    return round(cells[0])


def coarse_mask(corruption: Tensor, factor: int, noise_std: float = 1.0) -> StreamMask:
    """A mask that coarsens tokens; where a coarse cell is a single cell, the tokens are visible
    instead."""
    if factor == 1:
        visible = torch.full_like(corruption, int(Corruption.VISIBLE))
        corruption = torch.where(corruption == Corruption.COARSEN, visible, corruption)
    return StreamMask(corruption, factor, noise_std)


@runtime_checkable
class MaskingSampler(Protocol):
    """Draws masks and corruptions. A pure function of the token grids and a generator."""

    def __call__(self, layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
        """Draw one mask per stream of one window."""
        ...


def check_masks(sampler: object, masks: object, layouts: TokenLayouts) -> None:
    """Check what a sampler, which may be a plugin's, drew for the streams of a window.

    Raises:
        ValueError: it is something else than one `StreamMask` for each stream.
    """
    if isinstance(masks, tuple | list) and len(masks) == len(layouts):
        faults = [_mask_fault(*pair) for pair in zip(masks, layouts, strict=True)]
    elif isinstance(masks, tuple | list):
        faults = [f"{len(masks)} masks for {len(layouts)} streams"]
    else:
        faults = [_class_of(masks)]
    if fault := next(filter(None, faults), None):
        name = getattr(sampler, "__qualname__", type(sampler).__qualname__)
        raise ValueError(
            f"the masking sampler {name} returned {fault}; it must return a tuple with one "
            "atmossl.batch.StreamMask for each stream"
        )


def _mask_fault(mask: object, layout: TokenLayout) -> str | None:
    """What is wrong with the mask of one stream."""
    if not isinstance(mask, StreamMask):
        return f"{_class_of(mask)} for stream {layout.spec.name}"
    codes, shape = mask.corruption, tuple(layout.grid.shape)
    if not isinstance(codes, Tensor) or tuple(codes.shape) != shape:
        actual = as_written(list(codes.shape)) if isinstance(codes, Tensor) else _class_of(codes)
        return (
            f"a mask of shape {actual} for stream {layout.spec.name}, whose tokens [level, time, "
            f"lat, lon] have the shape {as_written(shape)}"
        )
    if codes.is_floating_point() or codes.dtype == torch.bool:
        return f"a mask of {codes.dtype} for stream {layout.spec.name}, not of whole numbers"
    if bool(((codes < 0) | (codes > max(Corruption))).any()):
        return (
            f"a mask with values from {int(codes.min())} to {int(codes.max())} for stream "
            f"{layout.spec.name}, not from 0 to {int(max(Corruption))} as atmossl.batch.Corruption"
        )
    return None


def _class_of(value: object) -> str:
    return "nothing" if value is None else f"an object of the class {type(value).__qualname__}"


def hide_nothing(layouts: TokenLayouts, rng: np.random.Generator) -> StreamMasks:
    """The masking sampler of a view that shows everything."""
    del rng
    return tuple(layout.nothing_hidden() for layout in layouts)


def share_known(hidden: Points, spec: StreamSpec) -> Float[Tensor, "level nt nlat nlon"]:
    """The share of known points in every token, over all variables."""
    size = spec.token_size
    return reduce(
        (~hidden).double(),
        "... (level pl) (nt pt) (nlat plat) (nlon plon) -> level nt nlat nlon",
        "mean",
        pl=size.level,
        pt=size.time,
        plat=size.lat,
        plon=size.lon,
    )


def steps_of(key: str, hours: float, step_hours: float) -> int:
    """The number of steps in a duration; ValueError if it is no multiple of the step."""
    if hours <= 0:
        raise ValueError(f"{key} must be positive, got {hours:g} h")
    check_multiples({key: hours}, step_hours)
    return round(hours / step_hours)


def check_multiples(durations: Mapping[str, float], step_hours: float) -> None:
    """Raise one ValueError for all durations in hours, by key, that are no multiples of the step of
    the data."""
    wrong = [
        f"{key}={hours:g} h"
        for key, hours in durations.items()
        if abs(hours / step_hours - round(hours / step_hours)) > TOLERANCE_HOURS
    ]
    if wrong:
        verb, each = ("is no multiple", "") if len(wrong) == 1 else ("are no multiples", " of each")
        raise ValueError(
            f"{' and '.join(wrong)} {verb} of the data's step of {step_hours:g} h; valid{each}: "
            f"{step_hours:g}h, {2 * step_hours:g}h, ..."
        )


def step_hours_of(layouts: TokenLayouts) -> float:
    """The hours between the steps of a window; if streams differ, of the finest one."""
    return min(layout.step_hours for layout in layouts)


def window_times(layouts: TokenLayouts) -> Tensor:
    """The times [step] of the window's points, in hours since 1970."""
    finest = min(layouts, key=lambda layout: layout.step_hours)
    return finest.point_times().flatten()


def hide_times(layouts: TokenLayouts, first_hour: float, last_hour: float) -> StreamMasks:
    """Mask every token whose points all lie in [first_hour, last_hour], hours since 1970.

    Raises:
        ValueError: the interval cuts through a token of a stream, or hides the whole window.
    """
    masks = []
    for layout in layouts:
        if layout.spec.role != "predict":
            masks.append(layout.nothing_hidden())
            continue
        times = layout.point_times()
        inside = (times >= first_hour - TOLERANCE_HOURS) & (times <= last_hour + TOLERANCE_HOURS)
        hidden = inside.all(dim=-1)
        if bool((inside.any(dim=-1) != hidden).any()):
            raise ValueError(
                f"task hides {last_hour - first_hour + layout.step_hours:g} h, which cuts through "
                f"a token of stream {layout.spec.name} of {float(layout.grid.time_extent):g} h; "
                "choose a multiple of the longest token"
            )
        if bool(hidden.all()) and layout.spec.data == PRIMARY:
            raise ValueError(
                f"task hides every time step of stream {layout.spec.name} in the window of "
                f"{layout.grid.shape[1]} x {float(layout.grid.time_extent):g} h; choose a shorter "
                "time to hide"
            )
        corruption = layout.nothing_hidden().corruption
        corruption[:, hidden] = int(Corruption.MASK)
        masks.append(StreamMask(corruption))
    return tuple(masks)


def points_of(
    tokens: Shaped[Tensor, "level nt nlat nlon"], spec: StreamSpec
) -> Shaped[Tensor, "level time lat lon"]:
    """The value of every token at all its points."""
    size = spec.token_size
    return repeat(
        tokens,
        "level nt nlat nlon -> (level pl) (nt pt) (nlat plat) (nlon plon)",
        pl=size.level,
        pt=size.time,
        plat=size.lat,
        plon=size.lon,
    )


def mask_of_points(hidden: Points, spec: StreamSpec) -> StreamMask:
    """A token mask for hidden points. A token that is known whole stays visible; one known in
    part is coarse, if it is square."""
    share, size = share_known(hidden, spec), spec.token_size
    square = size.lat == size.lon > 1
    corruption = torch.full(share.shape, int(Corruption.VISIBLE))
    corruption[share < 1] = int(Corruption.COARSEN if square else Corruption.MASK)
    corruption[share == 0] = int(Corruption.MASK)
    return StreamMask(corruption, coarsen_factor=size.lat if square else 1, points=hidden)


def make_view(
    windows: tuple[StreamWindow, ...],
    sampler: MaskingSampler,
    rng: np.random.Generator,
    *,
    first_guess: FirstGuess = True,
) -> View:
    """Tokens of all streams of one window under one draw of the sampler."""
    layouts = tuple(TokenLayout(window.spec, token_grid(window)) for window in windows)
    masks = sampler(layouts, rng)
    check_masks(sampler, masks, layouts)
    streams = tuple(
        corrupt(
            window, layout.grid, mask, rng, first_guess=first_guess,
            never_shown=other_model_guess(window, windows) if first_guess == OTHER_MODEL else None,
        )
        for window, layout, mask in zip(windows, layouts, masks, strict=True)
    )  # fmt: skip
    kind = masks[0].kind
    return View(
        streams,
        noise_seed=torch.tensor(int(rng.integers(2**62))),
        mask_kind=None if kind is None else torch.tensor(kind),
    )


def corrupt(
    window: StreamWindow,
    grid: TokenGrid,
    mask: StreamMask,
    rng: np.random.Generator,
    *,
    first_guess: FirstGuess = True,
    never_shown: Tensor | None = None,
) -> StreamTokens:
    """Apply a mask: what the encoder sees (`source`), the first guess, and the truth (`target`).

    A token that is masked or dropped shows its first guess, never its values, and so does a value
    that was never observed. Without `first_guess` the guess is 0, the climatological mean; of what
    comes `NEXT` it is the last value before. Known points of a token that is hidden in part are
    shown where the guess is made from `surroundings`; else the token shows their mean.
    never_shown: the guess of places that are shown at no step; 0 without.
    """
    size, shows_parts = window.spec.token_size, first_guess == SURROUNDINGS
    corruption = points_of(mask.corruption, window.spec)
    source, known = _known_points(window, mask)
    if mask.points is not None and shows_parts and not mask.coarse_by_task:
        corruption = _shown_in_part(corruption, mask.points, window)
    coarsened = corruption == Corruption.COARSEN
    coarse, present = None, known
    if bool(coarsened.any()):
        source, coarse, present = _coarsened(source, coarsened, mask, window.weight, known)
    noisy = corruption == Corruption.NOISE
    if bool(noisy.any()):
        noise = rng.standard_normal(source.shape, dtype=np.float32) * mask.noise_std
        source = torch.where(noisy, source + torch.from_numpy(noise), source)
    shown = _is_shown(corruption)
    if present is not None:
        shown = shown & present
    in_part = present is not None or (mask.points is not None and shows_parts)
    tokens = None if in_part else _is_shown(mask.corruption)
    guess = _first_guess(source, shown, tokens, window, grid, first_guess)
    if never_shown is not None:
        guess = torch.where(shown.any(dim=-3, keepdim=True), guess, never_shown)
    if first_guess and coarse is not None:
        guess = _with_coarse_guess(guess, coarse, coarsened, mask, window.weight)
    # where nothing is coarse, the guess has all that is shown as it is
    is_guess = bool(first_guess) and coarse is None
    source = guess if is_guess else torch.where(shown, source, guess)
    guess = _guess_what_comes(guess, source, corruption, size.time) if first_guess else guess
    target_points = (corruption != Corruption.VISIBLE).expand(source.shape) if shows_parts else None
    source_tokens = tokenise(source, size)
    return StreamTokens(
        spec=window.spec,
        source=source_tokens,
        guess=source_tokens if guess is source else tokenise(guess, size),
        target=tokenise(window.fields, size),
        corruption=mask.corruption,
        grid=grid,
        weight=window.weight,
        valid=None if window.valid is None else tokenise(window.valid, size),
        target_points=None if target_points is None else tokenise(target_points, size),
    )


def _known_points(window: StreamWindow, mask: StreamMask) -> tuple[Tensor, Tensor | None]:
    """The fields without what hidden points hold, and where values are known; None: everywhere."""
    if mask.points is None:
        return window.fields, window.valid
    if not mask.coarse_by_task:
        return fill_hidden_points(window, mask.points), window.valid
    known = ~mask.points if window.valid is None else window.valid & ~mask.points
    return torch.where(known, window.fields, 0.0), known


def _with_coarse_guess(
    guess: Tensor, coarse: Tensor, coarsened: Tensor, mask: StreamMask, weight: Tensor
) -> Tensor:
    """The first guess with interpolated coarse cells where all cells of a field are coarse, or
    where a task coarsens: there the guess itself has the cells of which nothing is known."""
    if mask.coarse_by_task:
        filled = coarsen(guess, weight, mask.coarsen_factor)
        return torch.where(coarsened, _interpolated(filled, guess), guess)
    whole = coarsened.all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    return torch.where(whole & coarsened, coarse, guess)


def _interpolated(coarse: Tensor, fine: Tensor) -> Tensor:
    """Coarse cells interpolated to as many cells as another field has."""
    num_lat, num_lon = fine.shape[-2:]
    return interpolate_cells(coarse, (num_lat, num_lon))


def _coarsened(
    source: Tensor, coarsened: Tensor, mask: StreamMask, weight: Tensor, known: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    """The source with means over coarse cells where it is coarsened, their interpolation, and which
    values are then present; None: all. weight: of every latitude. known: where the source has
    values, which is 0 elsewhere; the means are over these."""
    factor = mask.coarsen_factor
    coarse, present = coarsen(source, weight, factor), known
    if known is not None:
        share = coarsen(known.float(), weight, factor)
        coarse = torch.where(share > 0, coarse / share, coarse)
        present = torch.where(coarsened, repeat_coarse(share > 0, factor), known)
    source = torch.where(coarsened, repeat_coarse(coarse, factor), source)
    return source, _interpolated(coarse, source), present


def _guess_what_comes(guess: Tensor, source: Tensor, corruption: Tensor, num_steps: int) -> Tensor:
    """The guess with the last value before, repeated over `num_steps` steps, in tokens that come
    `NEXT`."""
    coming = corruption == Corruption.NEXT
    if not bool(coming.any()):
        return guess
    step = torch.arange(source.shape[-3])
    before = source.index_select(-3, (step // num_steps * num_steps - 1).clamp_min(0))
    return torch.where(coming, before, guess)


def _is_shown(corruption: Tensor) -> Tensor:
    return (corruption != Corruption.MASK) & (corruption != Corruption.DROP)


def _first_guess(
    source: Tensor,
    shown: Tensor,
    tokens: Tensor | None,
    window: StreamWindow,
    grid: TokenGrid,
    kind: FirstGuess,
) -> Tensor:
    """The first guess of all values. tokens: which tokens are shown, where they are shown or
    hidden as a whole."""
    if not kind:
        return torch.zeros_like(source)
    if tokens is None:
        guess = interpolate_in_time(source, shown)
    else:
        size = window.spec.token_size
        guess = detokenise(guess_tokens(tokenise(source, size), tokens, size), window.spec)
    if kind != SURROUNDINGS:
        return guess
    shown_at_some_step = shown.any(dim=-3)
    if bool(shown_at_some_step.all()):
        return guess
    from atmossl.masking.infill import fill_from_surroundings  # loads SciPy's solvers

    return fill_from_surroundings(
        guess,
        shown_at_some_step,
        lat=window.lat,
        lon_spacing=float(grid.lon_extent) / window.spec.token_size.lon,
        periodic=grid.periodic,
    )


def _shown_in_part(corruption: Tensor, points: Points, window: StreamWindow) -> Tensor:
    """The corruption at every point. In a token that is hidden in part, hidden points are masked
    and the other points visible."""
    share = share_known(points, window.spec)
    partly = points_of((share > 0) & (share < 1), window.spec)
    point_corruption = torch.where(points, int(Corruption.MASK), int(Corruption.VISIBLE))
    return torch.where(partly, point_corruption, corruption)


def fill_hidden_points(window: StreamWindow, hidden: Points) -> Tensor:
    """Fields in which hidden points have the mean of the known points of their token at the same
    variable, level and time, or 0 if there is none."""
    size = window.spec.token_size
    tokens = "... (nlat plat) (nlon plon) -> ... nlat nlon"
    visible = ~hidden if window.valid is None else ~hidden & window.valid
    visible = visible.to(window.fields)
    sums = reduce(window.fields.nan_to_num() * visible, tokens, "sum", plat=size.lat, plon=size.lon)
    counts = reduce(visible, tokens, "sum", plat=size.lat, plon=size.lon)
    means = repeat(
        sums / counts.clamp_min(1),
        "... nlat nlon -> ... (nlat plat) (nlon plon)",
        plat=size.lat,
        plon=size.lon,
    )
    filled = hidden if window.valid is None else hidden & window.valid
    return torch.where(filled, means, window.fields)


def guess_tokens(
    tokens: Float[Tensor, "level nt nlat nlon patch"],
    shown: Bool[Tensor, "level nt nlat nlon"],
    size: TokenSize,
) -> Float[Tensor, "level nt nlat nlon patch"]:
    """Shown tokens as they are; others from `interpolate_in_time`."""
    blocks = rearrange(
        tokens,
        "level nt nlat nlon (series pt point) -> level nt (nlat nlon) series pt point",
        pt=size.time,
        point=size.lat * size.lon,
    )
    guess = _fill(blocks, rearrange(shown, "level nt nlat nlon -> level nt (nlat nlon)"))
    return guess.reshape(tokens.shape)


def interpolate_in_time(
    source: Float[Tensor, "variable level time lat lon"],
    shown: Bool[Tensor, "*variable level time lat lon"],
) -> Float[Tensor, "variable level time lat lon"]:
    """Shown values as they are; hidden values linear in time between shown ones of the same
    place. Beyond the first or last shown value it is repeated; a place that is never shown gets
    0."""
    series = "variable level time lat lon -> (variable level) time (lat lon)"
    blocks = rearrange(source, series)[..., None, None, None]
    return _fill(blocks, rearrange(shown.expand(source.shape), series)).reshape(source.shape)


def _fill(
    blocks: Float[Tensor, "row nt place series pt point"], shown: Bool[Tensor, "row nt place"]
) -> Float[Tensor, "row nt place series pt point"]:
    """Interpolate blocks of `pt` steps, which are shown or hidden as a whole."""
    num_blocks, num_steps = shown.shape[1], blocks.shape[-2]
    before, after = _neighbours(shown)
    row, block, place = torch.nonzero(~shown, as_tuple=True)
    before, after = before[row, block, place], after[row, block, place]
    has_before, has_after = before >= 0, after < num_blocks
    has_neighbour = has_before | has_after
    early = torch.where(has_before, before, after).clamp(0, num_blocks - 1)
    late = torch.where(has_after, after, before).clamp(0, num_blocks - 1)
    early_step = torch.where(has_before, num_steps - 1, 0)  # inside its block
    late_step = torch.where(has_after, 0, num_steps - 1)

    first = (early * num_steps + early_step)[:, None]
    span = ((late * num_steps + late_step)[:, None] - first).clamp_min(1)
    step = block[:, None] * num_steps + torch.arange(num_steps)
    share = ((step - first) / span).clamp(0.0, 1.0)  # [hidden pt]
    values = torch.lerp(  # [hidden series pt point]
        blocks[row, early, place, :, early_step][:, :, None],
        blocks[row, late, place, :, late_step][:, :, None],
        share[:, None, :, None],
    )
    values[~has_neighbour] = 0.0
    filled = blocks.clone()
    filled[row, block, place] = values
    return filled


def _neighbours(
    shown: Bool[Tensor, "row nt place"],
) -> tuple[Int[Tensor, "row nt place"], Int[Tensor, "row nt place"]]:
    """For every block, the last shown block up to it (-1 if none) and the first from it on (nt
    if none)."""
    visible = shown.numpy()
    num_blocks = visible.shape[1]
    number = np.arange(num_blocks)[:, None]
    before = np.maximum.accumulate(np.where(visible, number, -1), axis=1)
    after = np.where(visible, number, num_blocks)[:, ::-1]
    after = np.minimum.accumulate(after, axis=1)[:, ::-1]
    return torch.from_numpy(before), torch.from_numpy(after.copy())

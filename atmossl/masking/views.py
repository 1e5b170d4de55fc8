"""Views of a sample: crops, lags and dates as an objective asks for them, and what the encoder sees
of a window under a mask, with the first guess of hidden values.

The first guess of hidden values is linear in time between what is shown of the same place. Where a
whole token is shown or hidden, its points share their neighbours in time, which are then found once
per token, and only what is hidden is computed.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from einops import rearrange, reduce, repeat
from jaxtyping import Bool, Float, Int
from torch import Tensor

from atmossl.batch import (
    PRIMARY,
    Corruption,
    StreamMask,
    StreamTokens,
    StreamWindow,
    TokenGrid,
    TokenSize,
    View,
    detokenise,
    token_grid,
    tokenise,
)
from atmossl.masking.base import (
    MaskingSampler,
    Points,
    TokenLayout,
    coarsen,
    draw_masks,
    interpolate_cells,
    points_of,
    repeat_coarse,
    share_known,
)
from atmossl.masking.correction import other_model_guess
from atmossl.masking.crops import Crop, CropPart, cropped, draw_part

SURROUNDINGS, OTHER_MODEL = "surroundings", "other_model"
# Of hidden values: none, which is the climatological mean; from other steps of the same place; or
# that, and for places that are never shown from the places around, or from what another model says.
FirstGuess = bool | Literal["surroundings", "other_model"]


@dataclass(frozen=True)
class ViewSpec:
    """One view that the loader makes of every sample.

    masking: the sampler of its mask. None: the run's own, which is a task's in validation.
    lag_hours: its window starts so many hours after that of the sample, at the same place; one of
        them is drawn for every sample. Empty: it is the sample's own window.
    tells_time: whether its tokens have their true date. Otherwise the date is moved on by up to a
        year in whole hours, drawn for every sample, so that dates do not tell how two views are
        related.
    crop: the part of its window that it shows. None: the whole window.
    """

    masking: MaskingSampler | None = None
    lag_hours: tuple[float, ...] = ()
    tells_time: bool = True
    crop: Crop | None = None


def lag_steps(spec: ViewSpec, step_hours: float, location: str) -> tuple[int, ...]:
    """The possible lags of a view in time steps; (0,) if it has none.

    Raises:
        ValueError: a lag is no multiple of the time step.
    """
    steps = [lag / step_hours for lag in spec.lag_hours] or [0.0]
    if any(abs(step - round(step)) > 1e-6 for step in steps):
        raise ValueError(
            f"objective.lag_time={show_hours(spec.lag_hours)} are no multiples of the time step "
            f"of {step_hours:g} h of {location}; give multiples of it"
        )
    return tuple(round(step) for step in steps)


def show_hours(hours: Sequence[float]) -> str:
    """A list of hours as a user writes it."""
    return f"[{', '.join(f'{value:g}h' for value in hours)}]"


def make_views(
    windows: Sequence[tuple[StreamWindow, ...]],
    specs: Sequence[ViewSpec],
    sampler: MaskingSampler,
    rng: np.random.Generator,
    *,
    first_guess: FirstGuess = True,
) -> tuple[View, ...]:
    """All views of one sample from its windows. sampler: masks the views that have no sampler of
    their own."""
    views: list[View] = []
    parts: dict[Crop, CropPart] = {}  # equal crops of a sample show the same place
    for streams, spec in zip(windows, specs, strict=True):
        if spec.crop is not None:
            if spec.crop not in parts:
                parts[spec.crop] = draw_part(streams, spec.crop, rng)
            streams = cropped(streams, spec.crop, parts[spec.crop])
        view = make_view(streams, spec.masking or sampler, rng, first_guess=first_guess)
        if any(other.lag_hours for other in specs):  # only then is the time asked for
            view = replace(view, start_hours=_first_time(streams))
        if not spec.tells_time:
            view = _with_another_date(view, streams[0].year_hours, rng)
        views.append(view)
    return tuple(views)


def _first_time(windows: tuple[StreamWindow, ...]) -> torch.Tensor:
    """The first time of the window of the run's own data; windows of other stores follow it."""
    return next(window for window in windows if window.spec.data == PRIMARY).time_hours[0]


def _with_another_date(view: View, year_hours: float, rng: np.random.Generator) -> View:
    shift = float(rng.integers(int(year_hours)))
    streams = tuple(
        replace(stream, grid=replace(stream.grid, time_hours=stream.grid.time_hours + shift))
        for stream in view.streams
    )
    return replace(view, streams=streams)


def make_view(
    windows: tuple[StreamWindow, ...],
    sampler: MaskingSampler,
    rng: np.random.Generator,
    *,
    first_guess: FirstGuess = True,
) -> View:
    """Tokens of all streams of one window under one draw of the sampler."""
    layouts = tuple(TokenLayout(window.spec, token_grid(window)) for window in windows)
    masks = draw_masks(sampler, layouts, rng)
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

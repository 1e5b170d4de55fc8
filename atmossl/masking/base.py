"""The sampler protocol, and what an encoder sees under a mask.

A sampler is a pure function: stream specs and token grids of one window, and a generator, to one
mask per stream. Streams of role `input` are never hidden.
"""

from dataclasses import dataclass, replace
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn import functional

from atmossl.batch import (
    PRIMARY,
    Corruption,
    StreamMask,
    StreamSpec,
    StreamTokens,
    StreamWindow,
    TokenGrid,
    View,
)
from atmossl.masking.first_guess import guess_tokens, interpolate_in_time
from atmossl.tokens import detokenise, token_grid, tokenise

_TOLERANCE = 1e-2  # of a number of cells

Points = Bool[Tensor, "*variable level time lat lon"]

SURROUNDINGS = "surroundings"
# Of hidden values: none, which is the climatological mean; from other steps of the same place; or
# that, and for places that are never shown from the places around.
FirstGuess = bool | Literal["surroundings"]


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


def own_factor(layout: TokenLayout, layouts: tuple[TokenLayout, ...], factor: int) -> int:
    """Cells of a stream along one coarse cell, which is `factor` cells of the run's own data; 1 if
    the stream's cells are as large or larger.

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
    """A mask whose coarse tokens are visible ones where a coarse cell is a single cell."""
    if factor == 1:
        visible = torch.full_like(corruption, int(Corruption.VISIBLE))
        corruption = torch.where(corruption == Corruption.COARSEN, visible, corruption)
    return StreamMask(corruption, factor, noise_std)


@runtime_checkable
class MaskingSampler(Protocol):
    """Draws masks and corruptions, as a pure function of the token grids and a generator."""

    def __call__(
        self, layouts: tuple[TokenLayout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        """Draw one mask per stream of one window."""
        ...


def hide_nothing(
    layouts: tuple[TokenLayout, ...], rng: np.random.Generator
) -> tuple[StreamMask, ...]:
    """The masking sampler of a view that shows everything."""
    del rng
    return tuple(layout.nothing_hidden() for layout in layouts)


def make_view(
    windows: tuple[StreamWindow, ...],
    sampler: MaskingSampler,
    rng: np.random.Generator,
    *,
    first_guess: FirstGuess = True,
    hidden_points: tuple[Points, ...] | None = None,
) -> View:
    """Tokens of all streams of one window under one draw of the sampler.

    hidden_points: of every stream, for a sampler that does not tell them with its masks.
    """
    layouts = tuple(TokenLayout(window.spec, token_grid(window)) for window in windows)
    masks = sampler(layouts, rng)
    if hidden_points is not None:
        masks = [replace(m, points=p) for m, p in zip(masks, hidden_points, strict=True)]
    streams = tuple(
        corrupt(window, layout.grid, mask, rng, first_guess=first_guess)
        for window, layout, mask in zip(windows, layouts, masks, strict=True)
    )
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
) -> StreamTokens:
    """What the encoder sees of a window (`source`), its first guess, and the truth (`target`).

    A token that is masked or dropped shows its first guess, never its values, and so does a value
    that was never observed. Without `first_guess` the guess is 0, the climatological mean; of what
    comes `NEXT` it is the last value before. Known points of a token that is hidden in part are
    shown where the guess is made from `surroundings`; else the token shows their mean.
    """
    size, shows_parts = window.spec.token_size, first_guess == SURROUNDINGS
    corruption = _at_points(mask.corruption, window)
    source = window.fields.clone()
    if mask.points is not None:
        source = fill_hidden_points(window, mask.points)
        if shows_parts:
            corruption = _shown_in_part(corruption, mask.points, window)
    coarsened = corruption == Corruption.COARSEN
    guess_coarse, present = None, window.valid
    if bool(coarsened.any()):
        coarse = coarsen(source, window.weight, mask.coarsen_factor)
        if window.valid is not None:  # means over the observed cells, which are 0 elsewhere
            share = coarsen(window.valid.float(), window.weight, mask.coarsen_factor)
            coarse = torch.where(share > 0, coarse / share, coarse)
            observed = repeat_coarse(share > 0, mask.coarsen_factor)
            present = torch.where(coarsened, observed, window.valid)
        guess_coarse = interpolate_coarse(coarse, mask.coarsen_factor)
        source = torch.where(coarsened, repeat_coarse(coarse, mask.coarsen_factor), source)
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
    if first_guess and guess_coarse is not None:
        whole = coarsened.all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
        guess = torch.where(whole & coarsened, guess_coarse, guess)
    source = torch.where(shown, source, guess)
    guess = _guess_what_comes(guess, source, corruption, size.time) if first_guess else guess
    asked = (corruption != Corruption.VISIBLE).expand(source.shape) if shows_parts else None
    return StreamTokens(
        spec=window.spec,
        source=tokenise(source, size),
        guess=tokenise(guess, size),
        target=tokenise(window.fields, size),
        corruption=mask.corruption,
        grid=grid,
        weight=window.weight,
        valid=None if window.valid is None else tokenise(window.valid, size),
        asked=None if asked is None else tokenise(asked, size),
    )


def _guess_what_comes(guess: Tensor, source: Tensor, corruption: Tensor, num_steps: int) -> Tensor:
    """In tokens of `num_steps` steps that come `NEXT` the last value before them."""
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
    """tokens: which of them are shown, where they are shown or hidden as a whole."""
    if not kind:
        return torch.zeros_like(source)
    if tokens is None:
        guess = interpolate_in_time(source, shown)
    else:
        size = window.spec.token_size
        guess = detokenise(guess_tokens(tokenise(source, size), tokens, size), window.spec)
    if kind != SURROUNDINGS:
        return guess
    from atmossl.masking.infill import fill_from_surroundings  # loads SciPy's solvers

    return fill_from_surroundings(
        guess,
        shown.any(dim=-3),
        lat=window.lat,
        lon_spacing=float(grid.lon_extent) / window.spec.token_size.lon,
        periodic=grid.periodic,
    )


def _shown_in_part(corruption: Tensor, points: Points, window: StreamWindow) -> Tensor:
    """Corruption at points, where those that a token hides in part of itself are masked and its
    others visible."""
    known = share_known(points, window.spec)
    partly = _at_points((known > 0) & (known < 1), window)
    own = torch.where(points, int(Corruption.MASK), int(Corruption.VISIBLE))
    return torch.where(partly, own, corruption)


def share_known(hidden: Points, spec: StreamSpec) -> Float[Tensor, "level nt nlat nlon"]:
    """Share of known points of every token, over all variables."""
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


def fill_hidden_points(window: StreamWindow, hidden: Points) -> Tensor:
    """Fields whose hidden points take the mean over the known points of their token at the same
    variable, level and time, or 0 where there is none."""
    size = window.spec.token_size
    tokens = "... (nlat plat) (nlon plon) -> ... nlat nlon"
    known = ~hidden if window.valid is None else ~hidden & window.valid
    known = known.to(window.fields)
    sums = reduce(window.fields.nan_to_num() * known, tokens, "sum", plat=size.lat, plon=size.lon)
    counts = reduce(known, tokens, "sum", plat=size.lat, plon=size.lon)
    means = repeat(
        sums / counts.clamp_min(1),
        "... nlat nlon -> ... (nlat plat) (nlon plon)",
        plat=size.lat,
        plon=size.lon,
    )
    filled = hidden if window.valid is None else hidden & window.valid
    return torch.where(filled, means, window.fields)


def _at_points(tokens: Tensor, window: StreamWindow) -> Tensor:
    """Repeat one value per token over its points: [level time lat lon]."""
    size = window.spec.token_size
    for axis, count in enumerate((size.level, size.time, size.lat, size.lon)):
        tokens = tokens.repeat_interleave(count, dim=axis)
    return tokens


def coarsen(
    fields: Float[Tensor, "*axes lat lon"], weight: Float[Tensor, "lat"], factor: int
) -> Float[Tensor, "*axes coarse_lat coarse_lon"]:
    """Area-weighted mean over blocks of factor x factor cells (conservative coarsening).

    Raises:
        ValueError: the factor does not divide the window.
    """
    num_lat, num_lon = fields.shape[-2:]
    if num_lat % factor or num_lon % factor:
        raise ValueError(
            f"coarsen factor {factor} does not divide the window of {num_lat} x {num_lon} cells"
        )
    weighted = fields * weight[:, None]
    sums = weighted.unflatten(-1, (-1, factor)).sum(-1).unflatten(-2, (-1, factor)).sum(-2)
    return sums / (weight.unflatten(-1, (-1, factor)).sum(-1)[:, None] * factor)


def repeat_coarse(coarse: Tensor, factor: int) -> Tensor:
    """Every fine cell takes the value of its coarse cell."""
    return coarse.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def interpolate_coarse(coarse: Tensor, factor: int) -> Tensor:
    """Bicubic interpolation from coarse to fine cell centres, edges repeated."""
    flat = coarse.flatten(0, -3)[:, None]
    fine = functional.interpolate(flat, scale_factor=factor, mode="bicubic", align_corners=False)
    return fine[:, 0].unflatten(0, coarse.shape[:-2])

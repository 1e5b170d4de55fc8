"""The data classes that rooms hand to each other: stream specs, token grids, windows, views,
batches, predictions; and the conversion of fields to tokens and exactly back.

Axis legend, used in every shape of the package:
    batch     samples of a batch          variable  fields of a stream, in the spec's order
    level     token levels of a stream    time lat lon  points of a window
    nt nlat nlon  tokens of a window      patch     values of one token, (variable level time lat
    token     tokens of a grid, flat          lon) of the token, flattened in this order
    member    ensemble members            feature   latent width
    query     hidden tokens to be predicted, padded to the batch's largest number
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from enum import IntEnum
from typing import Annotated, Any, Literal, Self

import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int, Shaped
from pydantic import BeforeValidator
from torch import Tensor

from atmossl.settings import NotNegativeFloat, Positive
from atmossl.value_faults import as_written, listed

YEAR_HOURS = 24.0 * 365.2425  # of the standard calendar, on average
PRIMARY = "primary"  # name of the source that is the run's own data, on whose grid windows are cut
Role = Literal["predict", "input", "static", "forcing"]
Missing = Literal["refuse", "mask"]
Empty = Callable[[Sequence[int], torch.dtype], Tensor]  # memory for a shape, as `torch.empty` gives


class Corruption(IntEnum):
    """How a token looks to the encoder. `VISIBLE` tokens are not predicted, all others are."""

    VISIBLE = 0
    DROP = 1  # not given to the encoder at all (MAE)
    MASK = 2  # a learned vector instead of its values
    NOISE = 3  # its values plus noise, not told
    COARSEN = 4  # its values averaged over coarse cells
    KEEP = 5  # its true values, not told
    NEXT = 6  # its true values, for later steps alone (networks with model.causal)


@dataclass(frozen=True)
class TokenSize:
    """Points of one token along each axis."""

    time: Positive
    lat: Positive
    lon: Positive
    level: Positive = 1

    @property
    def points(self) -> int:
        return self.level * self.time * self.lat * self.lon


@dataclass(frozen=True)
class StreamSpec:
    """One or more fields that share token size, levels and encoder.

    variables: by their names in the catalog entry. levels: pressures in hPa; empty for surface
    fields, which have one level of 0. token_size: steps, levels and cells of a token.
    role: `predict` streams are hidden and reconstructed, all others are context only, `input` of
    the window, `static` of the place, `forcing` known for any time. loss_weight: of its values in
    the loss, relative to other streams. missing: what a missing value does: `refuse` raises, `mask`
    marks it and goes on. data: name of the source that it is read from: `PRIMARY`, or a catalog
    entry whose cells and steps are cut by the windows of the primary source.
    Raises ValueError if a variable or level stands twice, or the token does not divide the levels.
    """

    name: str
    variables: tuple[str, ...]
    levels: tuple[Positive, ...]
    token_size: TokenSize
    role: Role = "predict"
    loss_weight: NotNegativeFloat = 1.0
    missing: Missing = "refuse"
    data: Annotated[str, BeforeValidator(lambda name: name or PRIMARY)] = PRIMARY

    def __post_init__(self) -> None:
        if not self.variables:
            raise ValueError(f"stream.{self.name}.variables is empty; name at least one variable")
        for key, values in (("variables", self.variables), ("levels", self.levels)):
            twice = sorted({value for value in values if values.count(value) > 1})
            if twice:
                raise ValueError(
                    f"stream.{self.name}.{key}={as_written(values)} has {listed(twice)} twice; "
                    "give each once"
                )
        if self.num_levels % self.token_size.level:
            raise ValueError(
                f"stream.{self.name}.token_size.level={self.token_size.level} does not divide the "
                f"{self.num_levels} levels {listed(self.levels)}"
            )

    @property
    def num_levels(self) -> int:
        return max(1, len(self.levels))

    @property
    def level_values(self) -> tuple[int, ...]:
        return self.levels or (0,)

    @property
    def patch(self) -> int:
        """Values of one token."""
        return len(self.variables) * self.token_size.points

    def token_shape(self, time: int, lat: int, lon: int) -> tuple[int, int, int, int]:
        """Tokens (level, nt, nlat, nlon) of a window of that many points.

        Raises:
            ValueError: the token size does not divide the window.
        """
        size = self.token_size
        for axis, points, step in (
            ("time", time, size.time),
            ("lat", lat, size.lat),
            ("lon", lon, size.lon),
        ):
            if points % step:
                divisors = [n for n in range(1, points + 1) if points % n == 0]
                raise ValueError(
                    f"stream.{self.name}.token_size.{axis}={step} does not divide "
                    f"data.window.{axis}={points}; valid: {listed(divisors)}"
                )
        return self.num_levels // size.level, time // size.time, lat // size.lat, lon // size.lon


def shared_fields(specs: Sequence[StreamSpec]) -> list[str]:
    """What is wrong with streams that hold the same field (a variable at a level of one store).
    A predicted field must stand in one stream alone: another stream would show what is hidden,
    and the prediction would be written twice. Different streams may hold different levels of a
    variable."""
    faults = []
    for number, first in enumerate(specs):
        for second in specs[number + 1 :]:
            if first.name == second.name:
                faults.append(f"stream.{first.name} is there twice; give each stream its own name")
            variables = sorted(set(first.variables) & set(second.variables))
            levels = sorted(set(first.level_values) & set(second.level_values))
            predicted = "predict" in (first.role, second.role)
            if predicted and first.data == second.data and variables and levels:
                at = f" at {listed(levels)} hPa" if any(levels) else ""
                faults.append(
                    f"stream.{first.name} (role {first.role}) and stream.{second.name} (role "
                    f"{second.role}) both hold {listed(variables)}{at}; a field that is predicted "
                    "stands in one stream alone: leave it out of the other"
                )
    return faults


def levels_by_variable(specs: Sequence[StreamSpec]) -> dict[str, tuple[int, ...]]:
    """The levels of every variable in hPa, (0,) at the surface: in the order of its stream, or
    ascending if several streams hold the variable."""
    levels: dict[str, tuple[int, ...]] = {}
    for spec in specs:
        for name in spec.variables:
            held = levels.get(name)
            both = spec.level_values if held is None else sorted({*held, *spec.level_values})
            levels[name] = tuple(both)
    return levels


class Movable:
    """Moves every tensor of a frozen dataclass, nested ones included."""

    def _map(self, function) -> Self:
        assert is_dataclass(self)
        values = {}
        for each in fields(self):  # one call a dataclass, so that a stack stays short
            value = getattr(self, each.name)
            if isinstance(value, tuple):
                values[each.name] = tuple(
                    item._map(function) if isinstance(item, Movable) else _mapped(item, function)
                    for item in value
                )
            elif isinstance(value, Movable):
                values[each.name] = value._map(function)
            elif isinstance(value, Tensor):
                values[each.name] = function(value)
        return replace(self, **values)

    def to(self, device: torch.device | str, non_blocking: bool = True) -> Self:
        return self._map(lambda tensor: tensor.to(device, non_blocking=non_blocking))

    def pin_memory(self) -> Self:
        return self._map(lambda tensor: tensor.pin_memory())


def _mapped(item, function):
    if isinstance(item, Tensor):
        return function(item)
    return tuple(_mapped(part, function) for part in item) if isinstance(item, tuple) else item


@dataclass(frozen=True)
class TokenGrid(Movable):
    """Physical coordinates of the tokens of one stream in one window.

    time_hours: token centres in hours since 1970-01-01T00; `time_extent` hours that a token spans.
    lat, lon: token centres in degrees; `*_extent` degrees that a token spans.
    level_hpa: mean level of a token. year_hours: length of a year, from 1970 on; every calendar
        has its own.
    """

    time_hours: Float[Tensor, "*batch nt"]
    level_hpa: Float[Tensor, "*batch level"]
    lat: Float[Tensor, "*batch nlat"]
    lon: Float[Tensor, "*batch nlon"]
    time_extent: Float[Tensor, "*batch"]
    lat_extent: Float[Tensor, "*batch"]
    lon_extent: Float[Tensor, "*batch"]
    periodic: bool = False  # the window closes the circle: its last longitude meets its first
    year_hours: float = YEAR_HOURS

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """Tokens (level, nt, nlat, nlon)."""
        return (
            self.level_hpa.shape[-1],
            self.time_hours.shape[-1],
            self.lat.shape[-1],
            self.lon.shape[-1],
        )

    @property
    def num_tokens(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class StreamWindow(Movable):
    """Normalised fields of one stream in one window, with the coordinates of its points.

    time_hours: hours since 1970-01-01T00. lat, lon: degrees. level_hpa: pressure, 0 at the surface.
    valid: True where a value was observed; fields are 0 elsewhere. None: everywhere.
    year_hours: length of a year of the record's calendar.
    """

    spec: StreamSpec
    fields: Float[Tensor, "*batch variable level time lat lon"]
    time_hours: Float[Tensor, "*batch time"]
    level_hpa: Float[Tensor, "*batch level"]
    lat: Float[Tensor, "*batch lat"]
    lon: Float[Tensor, "*batch lon"]
    weight: Float[Tensor, "*batch lat"]  # relative cell area, mean 1 over the whole grid
    valid: Bool[Tensor, "*batch variable level time lat lon"] | None = None
    year_hours: float = YEAR_HOURS


@dataclass(frozen=True)
class StreamMask(Movable):
    """The mask of one stream: `corruption` is `Corruption.VISIBLE` where nothing is hidden.

    `coarsen_factor`: cells of the fine grid that one coarse cell averages, along lat and lon.
    `noise_std`: of the noise on `NOISE` tokens, in units of the normalised field.
    `points`: True for the hidden points, where tokens are hidden in part. None: whole tokens.
    `coarse_by_task`: coarse tokens are so because a task coarsens them, and show the means of what
    `points` leaves of each coarse cell; else they are those that are hidden in part.
    `kind`: number of the sampler that drew it, of a mixture's. None: there is no mixture.
    """

    corruption: Int[Tensor, "*batch level nt nlat nlon"]
    coarsen_factor: int = 1
    noise_std: float = 1.0
    points: Bool[Tensor, "*variable level time lat lon"] | None = None
    coarse_by_task: bool = False
    kind: int | None = None

    @property
    def hidden(self) -> Bool[Tensor, "*batch level nt nlat nlon"]:
        return self.corruption != Corruption.VISIBLE


@dataclass(frozen=True)
class Frames(Movable):
    """The frames that hold a chosen token, for layers that work on neighbours in space.

    A frame is all tokens of one level and time step of one sample, numbered through the batch.
    slot: place of every chosen token in the row of kept frames; padding has the slot after all.
    """

    numbers: Int[Tensor, "frame"]
    slot: Int[Tensor, "batch token"]


@dataclass(frozen=True)
class TokenIndex(Movable):
    """The chosen tokens of the flat token grid, padded to the batch's largest number with other
    tokens.

    `complete` is True if every sample chose all its tokens, in order: nothing to gather then.
    """

    index: Int[Tensor, "batch token"]
    valid: Bool[Tensor, "batch token"]
    chosen: Bool[Tensor, "batch level nt nlat nlon"]
    frames: Frames
    complete: bool

    @classmethod
    def of(cls, chosen: Bool[Tensor, "batch level nt nlat nlon"]) -> Self:
        flat = chosen.flatten(1)
        counts = flat.sum(dim=1)
        largest = max(1, int(counts.max()))
        order = flat.int().argsort(dim=1, descending=True, stable=True)
        index = order[:, :largest].contiguous()
        valid = torch.arange(largest)[None] < counts[:, None]
        return cls(index, valid, chosen, _frames(chosen, index, valid), bool(chosen.all()))

    @classmethod
    def whole(cls, grids: Shaped[Tensor, "batch level nt nlat nlon"]) -> Self:
        """All tokens of grids of this shape. The index is made on the grids' device, without
        waiting for it."""
        batch, places = grids.shape[0], grids[0, 0, 0].numel()
        index = torch.arange(grids[0].numel(), device=grids.device).expand(batch, -1).contiguous()
        slot = torch.arange(grids.numel(), device=grids.device).view(batch, -1)
        frames = Frames(torch.arange(grids.numel() // places, device=grids.device), slot)
        chosen = torch.ones_like(grids, dtype=torch.bool)
        return cls(index, torch.ones_like(index, dtype=torch.bool), chosen, frames, True)


def _frames(chosen: Tensor, index: Tensor, valid: Tensor) -> Frames:
    places = chosen.shape[-2] * chosen.shape[-1]
    used = chosen.flatten(0, 2).flatten(1).any(dim=1)
    used[0] |= ~used.any()  # never none at all: layers need a frame to work on
    numbers = used.nonzero().flatten()
    rank = used.cumsum(0) - 1
    first = torch.arange(chosen.shape[0])[:, None] * (chosen[0].numel() // places)
    slot = rank[first + index // places] * places + index % places
    return Frames(numbers, torch.where(valid, slot, len(numbers) * places))


@dataclass(frozen=True)
class StreamTokens(Movable):
    """Tokens of one stream as the encoder sees them (`source`) and as they are (`target`).

    guess: first guess of every token, made from the visible source alone (`masking.base`).
    encoder_tokens, queries: the tokens that the encoder gets and those that the decoder predicts,
        set by `collate_views`.
    valid: True where the target was observed. None: everywhere.
    target_points: True where a value of a hidden token is to be predicted; the token shows its
        other values as they are. None: all values.
    """

    spec: StreamSpec
    source: Float[Tensor, "*batch level nt nlat nlon patch"]
    guess: Float[Tensor, "*batch level nt nlat nlon patch"]
    target: Float[Tensor, "*batch level nt nlat nlon patch"]
    corruption: Int[Tensor, "*batch level nt nlat nlon"]
    grid: TokenGrid
    weight: Float[Tensor, "*batch lat"]
    encoder_tokens: TokenIndex | None = None
    queries: TokenIndex | None = None
    valid: Bool[Tensor, "*batch level nt nlat nlon patch"] | None = None
    target_points: Bool[Tensor, "*batch level nt nlat nlon patch"] | None = None

    @property
    def hidden(self) -> Bool[Tensor, "*batch level nt nlat nlon"]:
        return self.corruption != Corruption.VISIBLE

    @property
    def unseen(self) -> Bool[Tensor, "*batch level nt nlat nlon patch"]:
        """Values of which the encoder sees nothing, those that were never observed among them."""
        dark = (self.corruption == Corruption.MASK) | (self.corruption == Corruption.DROP)
        unseen = dark[..., None].expand_as(self.source)
        if self.target_points is not None:  # a token that is hidden in part shows its other values
            unseen = torch.where(
                (~self.target_points).any(dim=-1, keepdim=True), self.target_points, unseen
            )
        return unseen if self.valid is None else unseen | ~self.valid

    @property
    def query_level(self) -> Int[Tensor, "batch query"]:
        """The level of every query, counted in tokens."""
        assert self.queries is not None, "collate the view first: token indices are missing"
        return self.queries.index // (self.grid.num_tokens // self.grid.shape[0])

    def indexed(self) -> Self:
        """The stream with the indices of its encoder tokens and queries; needs a batch axis."""
        encoder_tokens = TokenIndex.of(self.corruption != Corruption.DROP)
        return replace(self, encoder_tokens=encoder_tokens, queries=TokenIndex.of(self.hidden))


@dataclass(frozen=True)
class View(Movable):
    """One window as tokens of all streams.

    start_hours: first time of the window in hours since 1970-01-01T00, as the record has it; None
        unless the sample has views of several times.
    noise_seed: what the noise of noise-conditioned members is drawn from.
    mask_kind: number of the sampler of a mixture that drew the mask; None without a mixture.
    """

    streams: tuple[StreamTokens, ...]
    start_hours: Float[Tensor, "*batch"] | None = None
    noise_seed: Int[Tensor, "*batch"] | None = None
    mask_kind: Int[Tensor, "*batch"] | None = None

    def names(self) -> tuple[str, ...]:
        return tuple(stream.spec.name for stream in self.streams)


@dataclass(frozen=True)
class Batch(Movable):
    """Views of the same samples: one for masked objectives, crops or pairs for others.

    num_skipped: samples of the batch that could not be read and are left out.
    """

    views: tuple[View, ...]
    sample_id: Int[Tensor, "*batch"]
    num_skipped: int = 0

    @property
    def lag_hours(self) -> Float[Tensor, "batch"]:
        """Hours from the first view's window to the last one's."""
        first, last = self.views[0].start_hours, self.views[-1].start_hours
        assert first is not None and last is not None, "the views are of one time"
        return last - first


@dataclass(frozen=True)
class StreamPrediction(Movable):
    """Ensemble of the hidden tokens of one stream, in normalised units."""

    members: Float[Tensor, "batch query member patch"]
    queries: TokenIndex


@dataclass(frozen=True)
class Prediction(Movable):
    """Ensembles of the hidden tokens of every predicted stream, in the order of the view's
    streams."""

    streams: tuple[StreamPrediction, ...]


def collate_views(
    samples: list[tuple[View, ...]], sample_ids: list[int], empty: Empty | None = None
) -> Batch:
    """Batch of samples, each a tuple of views, with the token indices of every stream.

    Counts are taken here, on the host, so that no step waits for the device.
    """
    views = collate(samples, empty)
    indexed = tuple(
        replace(view, streams=tuple(stream.indexed() for stream in view.streams)) for view in views
    )
    return Batch(indexed, torch.tensor(sample_ids))


def collate(samples: list, empty: Empty | None = None) -> Any:
    """Stack a list of equal frozen dataclasses (`Movable`) along a new first axis.

    Non-tensor members (specs, factors) must be equal and are taken from the first.
    empty: where the stacks are to lie.
    """
    first: Any = samples[0]
    if isinstance(first, Tensor):
        place = empty((len(samples), *first.shape), first.dtype) if empty else None
        return torch.stack(samples, out=place)
    if isinstance(first, tuple):
        return tuple(collate(list(items), empty) for items in zip(*samples, strict=True))
    if isinstance(first, Movable):
        assert is_dataclass(first)
        members = {f.name: [getattr(s, f.name) for s in samples] for f in fields(first)}
        return replace(first, **{name: collate(values, empty) for name, values in members.items()})
    return first


_TOLERANCE_DEG = 1e-2
_FEW_CELLS = 2  # of a token along a latitude
_PATTERN = (
    "... variable (level pl) (nt pt) (nlat plat) (nlon plon)",
    "... level nt nlat nlon (variable pl pt plat plon)",
)


def _sizes(size: TokenSize) -> dict[str, int]:
    return {"pl": size.level, "pt": size.time, "plat": size.lat, "plon": size.lon}


def tokenise(
    window: Shaped[Tensor, "*batch variable level time lat lon"], size: TokenSize
) -> Shaped[Tensor, "*batch nlevel nt nlat nlon patch"]:
    """Cut a window into tokens; the inverse of `detokenise`."""
    fields, tokens = _PATTERN
    if size.lon > _FEW_CELLS:
        return rearrange(window, f"{fields} -> {tokens}", **_sizes(size))
    # two copies, each of long runs: of short ones, one copy takes four times as long
    rows = "... level nt nlat (variable pl pt plat plon) nlon"
    patches = rearrange(window, f"{fields} -> {rows}", **_sizes(size))
    return patches.transpose(-1, -2).contiguous()


def detokenise(
    tokens: Shaped[Tensor, "*batch nlevel nt nlat nlon patch"], spec: StreamSpec
) -> Shaped[Tensor, "*batch variable level time lat lon"]:
    """Put tokens back into a window; the inverse of `tokenise`."""
    pattern = " -> ".join(reversed(_PATTERN))
    return rearrange(tokens, pattern, variable=len(spec.variables), **_sizes(spec.token_size))


def token_grid(window: StreamWindow) -> TokenGrid:
    """Coordinates of the token centres and what a token spans.

    Longitudes are unwrapped along the window, so that a window across the date line or the
    meridian of Greenwich has centres between its own points.
    """
    size = window.spec.token_size
    start = window.lon[..., :1]
    lon = start + (window.lon - start) % 360.0
    spacing = _spacing(lon)
    turn = float(spacing.flatten()[0]) * lon.shape[-1]
    return TokenGrid(
        time_hours=_centres(window.time_hours, size.time),
        level_hpa=_centres(window.level_hpa, size.level),
        lat=_centres(window.lat, size.lat),
        lon=_centres(lon, size.lon) % 360.0,
        time_extent=_spacing(window.time_hours) * size.time,
        lat_extent=_spacing(window.lat) * size.lat,
        lon_extent=spacing * size.lon,
        periodic=abs(turn - 360.0) < _TOLERANCE_DEG,
        year_hours=window.year_hours,
    )


def _centres(values: Float[Tensor, "*batch point"], size: int) -> Float[Tensor, "*batch token"]:
    return reduce(values, "... (token size) -> ... token", "mean", size=size)


def _spacing(values: Float[Tensor, "*batch point"]) -> Float[Tensor, "*batch"]:
    """Mean distance between neighbours; 1 where there is a single point."""
    count = values.shape[-1]
    if count == 1:
        return torch.ones_like(values[..., 0])
    return (values[..., -1] - values[..., 0]) / (count - 1)


def patch_weights(
    weight: Float[Tensor, "*batch lat"], spec: StreamSpec
) -> Float[Tensor, "*batch nlat patch"]:
    """Area weight of every value of a token, by the token's row of latitudes."""
    size = spec.token_size
    rows = rearrange(weight, "... (nlat plat) -> ... nlat plat", plat=size.lat)
    repeats = len(spec.variables) * size.level * size.time
    expanded = rows[..., None, :, None].expand(*rows.shape[:-1], repeats, size.lat, size.lon)
    return rearrange(expanded, "... nlat r plat plon -> ... nlat (r plat plon)")


def patch_values(
    values: Float[Tensor, "variable level"], spec: StreamSpec
) -> Float[Tensor, "nlevel patch"]:
    """Spread one value per variable and level over the tokens' patches, by token level."""
    size = spec.token_size
    shape = (*values.shape, size.time, size.lat, size.lon)
    tokens = tokenise(values[..., None, None, None].expand(shape), size)
    return tokens[:, 0, 0, 0]

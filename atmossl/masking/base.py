"""The protocol of masking samplers, and what samplers share: the tokens, times and places of a
window, masks of tokens and points, and means over coarse cells.

A sampler is a pure function: stream specs and token grids of one window, and a generator, to one
mask per stream. Streams of role `input` are never hidden.
"""

from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from einops import reduce, repeat
from jaxtyping import Bool, Float, Shaped
from torch import Tensor
from torch.nn import functional

from atmossl.batch import PRIMARY, Corruption, StreamMask, StreamSpec, TokenGrid
from atmossl.value_faults import as_written

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


def own_factor(layout: TokenLayout, layouts: tuple[TokenLayout, ...], factor: int) -> int:
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

    def __call__(
        self, layouts: tuple[TokenLayout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        """Draw one mask per stream of one window."""
        ...


def draw_masks(
    sampler: MaskingSampler, layouts: tuple[TokenLayout, ...], rng: np.random.Generator
) -> tuple[StreamMask, ...]:
    """The masks that a sampler draws for the streams of a window.

    Raises:
        ValueError: the sampler, which may be a plugin's, returns something else than it must.
    """
    masks: object = sampler(layouts, rng)
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
    return tuple(masks)  # pyright: ignore[reportArgumentType]


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


def hide_nothing(
    layouts: tuple[TokenLayout, ...], rng: np.random.Generator
) -> tuple[StreamMask, ...]:
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
    """A fine field in which every cell has the value of its coarse cell."""
    return coarse.repeat_interleave(factor, dim=-2).repeat_interleave(factor, dim=-1)


def with_coarse_means(
    fine: Float[Tensor, "*axes level lat lon"],
    coarse: Float[Tensor, "level coarse_lat coarse_lon"],
    weight: Float[Tensor, "lat"],
    factor: int,
    *,
    is_amount: bool,
    closes_circle: bool,
) -> Float[Tensor, "*axes level lat lon"]:
    """A fine field whose coarse cells have the given means; one whose mean is not known stays as it
    is. What the means of a row of coarse cells lack is added as a smooth curve along longitude that
    has these means (`spread_along_row`), the same on all its fine rows; in a row with unknown means
    to all cells of a coarse cell alike. An amount, such as precipitation, is multiplied instead
    wherever the sum would fall below 0 (both constraints: Harder et al. 2023, JMLR 24,
    "Hard-constrained deep learning for climate downscaling", section 3). weight: relative areas of
    the rows. closes_circle: whether the last column lies beside the first."""
    lacking = coarse - coarsen(fine, weight, factor)
    row_is_known, lacking = lacking.isfinite().all(dim=-1, keepdim=True), lacking.nan_to_num()
    smooth = spread_along_row(lacking, factor, closes_circle=closes_circle)
    along_row = torch.where(row_is_known, smooth, lacking.repeat_interleave(factor, dim=-1))
    shifted = fine + along_row.repeat_interleave(factor, dim=-2)
    if not is_amount:
        return shifted
    below = shifted.unflatten(-1, (-1, factor)).unflatten(-3, (-1, factor)).amin(dim=(-3, -1)) < 0
    positive = fine.clamp_min(0)
    mean = coarsen(positive, weight, factor)
    scaled = torch.where(
        repeat_coarse(mean > 0, factor),
        positive * repeat_coarse(coarse / mean.clamp_min(torch.finfo(mean.dtype).tiny), factor),
        repeat_coarse(coarse, factor),
    )
    return torch.where(repeat_coarse(below & (coarse >= 0), factor), scaled, shifted)


def spread_along_row(
    means: Float[Tensor, "*axes coarse_lon"], factor: int, *, closes_circle: bool
) -> Float[Tensor, "*axes lon"]:
    """Values whose means over blocks of `factor` are the given ones: the most likely ones of a
    Gaussian process along the row (block kriging, Cressie 1993, section 3.2, of all blocks), whose
    power falls with the fourth power of the wavenumber beyond the waves that the means resolve. So
    no edges of blocks are seen. A row that does not close the circle is continued by its mirror
    image.

    In Fourier space a wave of the means is the sum of the waves k of the row that look alike on the
    blocks, each weakened and shifted by the mean over a block, h(k). Of power p(k), each has the
    part p(k) h*(k) / sum p |h|^2 of it.
    """
    if not closes_circle:
        mirrored = torch.cat([means, means.flip(-1)], dim=-1)
        whole = spread_along_row(mirrored, factor, closes_circle=True)
        return whole[..., : means.shape[-1] * factor]
    num_coarse = means.shape[-1]
    wave = torch.fft.fftfreq(num_coarse * factor, 1 / (num_coarse * factor), dtype=means.dtype)
    cells = torch.arange(factor, dtype=means.dtype)
    angle = 2 * torch.pi * wave * cells[:, None] / (num_coarse * factor)
    response = torch.polar(torch.ones_like(angle), angle).mean(0)
    power = (1 + (2 * wave / num_coarse) ** 2) ** -2
    among = (power * response.abs() ** 2).unflatten(0, (factor, num_coarse)).sum(0)
    share = power * response.conj() / among.repeat(factor)
    waves = torch.cat([torch.fft.fft(means)] * factor, dim=-1)
    return torch.fft.ifft(waves * share * factor).real


def interpolate_cells(
    fields: Float[Tensor, "*axes coarse_lat coarse_lon"], size: tuple[int, int]
) -> Float[Tensor, "*axes lat lon"]:
    """Bicubic interpolation to the centres of `size` smaller cells, edges repeated."""
    flat = fields.flatten(0, -3)[:, None]
    fine = functional.interpolate(flat, size=size, mode="bicubic", align_corners=False)
    return fine[:, 0].unflatten(0, fields.shape[:-2])


def steps_of(key: str, hours: float, step_hours: float) -> int:
    """The number of steps in a duration; ValueError if it is no multiple of the step."""
    count = round(hours / step_hours)
    if hours <= 0:
        raise ValueError(f"{key} must be positive, got {hours:g} h")
    if abs(hours / step_hours - count) > TOLERANCE_HOURS:
        raise ValueError(
            f"{key}={hours:g} h is no multiple of the data's step of {step_hours:g} h; valid: "
            f"{step_hours:g}h, {2 * step_hours:g}h, ..."
        )
    return count


def step_hours_of(layouts: tuple[TokenLayout, ...]) -> float:
    """The hours between the steps of a window; if streams differ, of the finest one."""
    return min(layout.step_hours for layout in layouts)


def window_times(layouts: tuple[TokenLayout, ...]) -> Tensor:
    """The times [step] of the window's points, in hours since 1970."""
    finest = min(layouts, key=lambda layout: layout.step_hours)
    return finest.point_times().flatten()


def hide_times(
    layouts: tuple[TokenLayout, ...], first_hour: float, last_hour: float
) -> tuple[StreamMask, ...]:
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
                "task hides every time step of the window; choose a shorter task.lead_time or a "
                "longer data.window.time"
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

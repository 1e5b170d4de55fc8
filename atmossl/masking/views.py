"""Views of a sample as an objective asks for them: their lags, dates and crops.

A crop is a part of a window in space, time and resolution, for objectives that compare parts of one
state. All streams of a window are cropped at the edges of tokens that they have in common, so that
they show the same air. Crops of equal shape from different samples can be one batch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from atmossl.batch import PRIMARY, StreamWindow, View, token_grid
from atmossl.masking.base import FirstGuess, MaskingSampler, make_view
from atmossl.masking.cells import coarsen

_AXES = ("time", "lat", "lon")


@dataclass(frozen=True)
class Crop:
    """A part of a window at a place that is drawn for every sample.

    number: views of one sample whose crops are equal, this number included, show the same place.
    time_share, share: of the window's steps, and of its rows and columns each; at least two blocks
        of tokens along each axis, if there are so many.
    coarsen: cells along latitude and longitude whose area-weighted mean is one cell of the crop.
    """

    number: int
    time_share: float = 1.0
    share: float = 1.0
    coarsen: int = 1


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


@dataclass(frozen=True)
class CropPart:
    """The part of a window that a crop takes, counted in blocks of tokens that all streams have
    in common: along time, lat and lon (first block, number of blocks, blocks of the window)."""

    blocks: tuple[tuple[int, int, int], ...]

    def points(self, axis: int, num_points: int) -> Tensor:
        """The points of the window that the part covers along an axis; beyond the end they start
        again at the beginning."""
        first, count, total = self.blocks[axis]
        size = num_points // total
        return (torch.arange(count * size) + first * size) % num_points


def draw_part(windows: tuple[StreamWindow, ...], crop: Crop, rng: np.random.Generator) -> CropPart:
    """Draw a place for a crop, anywhere along a circle of longitude that the window closes.

    Raises:
        ValueError: tokens of the coarsened window do not fit, or streams have no edges in common.
    """
    periodic = all(token_grid(window).periodic for window in windows)
    blocks = []
    for axis, total in enumerate(_common_blocks(windows, crop.coarsen)):
        share = crop.share if axis else crop.time_share
        count = min(total, max(2, round(share * total)))
        room = total if periodic and axis == 2 and count < total else total - count + 1
        blocks.append((int(rng.integers(room)), count, total))
    return CropPart(tuple(blocks))


def _common_blocks(windows: tuple[StreamWindow, ...], factor: int) -> tuple[int, ...]:
    """The largest number of blocks along time, lat and lon that are whole tokens of every
    stream, also after `factor` cells along lat and lon have become one."""
    counts: list[tuple[int, ...]] = []
    for window in windows:
        size, shape = window.spec.token_size, window.fields.shape[-3:]
        needed = (size.time, size.lat * factor, size.lon * factor)
        for axis, points, step in zip(_AXES, shape, needed, strict=True):
            if points % step:
                raise ValueError(
                    f"objective: a crop coarsened by {factor} needs data.window.{axis} to be a "
                    f"multiple of {step} for stream {window.spec.name}, which has {points} points; "
                    "choose another window, or no coarse crops"
                )
        counts.append(tuple(n // step for n, step in zip(shape, needed, strict=True)))
    return tuple(math.gcd(*axis) for axis in zip(*counts, strict=True))


def cropped(
    windows: tuple[StreamWindow, ...], crop: Crop, part: CropPart
) -> tuple[StreamWindow, ...]:
    """The part of a window for all streams, coarsened if the crop is coarse."""
    return tuple(_coarse(_cut(window, part), crop.coarsen) for window in windows)


def _cut(window: StreamWindow, part: CropPart) -> StreamWindow:
    sizes = window.fields.shape[-3:]
    time, lat, lon = (part.points(axis, size) for axis, size in enumerate(sizes))

    def cut(values: Tensor | None) -> Tensor | None:
        if values is None:
            return None
        return values.index_select(-3, time).index_select(-2, lat).index_select(-1, lon)

    fields = cut(window.fields)
    assert fields is not None
    return replace(
        window,
        fields=fields,
        valid=cut(window.valid),
        time_hours=window.time_hours[time],
        lat=window.lat[lat],
        lon=window.lon[lon],
        weight=window.weight[lat],
    )


def _coarse(window: StreamWindow, factor: int) -> StreamWindow:
    """A window of area-weighted means over the observed cells of `factor` x `factor`."""
    if factor == 1:
        return window
    fields, valid = coarsen(window.fields, window.weight, factor), None
    if window.valid is not None:  # fields are 0 where nothing was observed
        share = coarsen(window.valid.float(), window.weight, factor)
        valid = share > 0
        fields = torch.where(valid, fields / share, fields)
    start = window.lon[:1]
    lon = (start + (window.lon - start) % 360.0).unflatten(0, (-1, factor)).mean(dim=1) % 360.0
    lat, weight = (x.unflatten(0, (-1, factor)).mean(dim=1) for x in (window.lat, window.weight))
    return replace(window, fields=fields, valid=valid, lat=lat, lon=lon, weight=weight)

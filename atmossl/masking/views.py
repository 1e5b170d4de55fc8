"""Views of a sample, as an objective asks for them: what a view hides, which part of the window it
shows, how much later than the sample its window starts, and whether the network is told the view's
date."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from atmossl.batch import PRIMARY, StreamWindow, View
from atmossl.masking.base import FirstGuess, MaskingSampler, make_view
from atmossl.masking.crops import Crop, Part, cropped, draw_part


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
    """The lags of a view in time steps; (0,) if it has none.

    Raises:
        ValueError: a lag is no multiple of the time step.
    """
    steps = [lag / step_hours for lag in spec.lag_hours] or [0.0]
    if any(abs(step - round(step)) > 1e-6 for step in steps):
        raise ValueError(
            f"objective.lag_hours={show_hours(spec.lag_hours)} are no multiples of the time step "
            f"of {step_hours:g} h of {location}; give multiples of it"
        )
    return tuple(round(step) for step in steps)


def show_hours(hours: Sequence[float]) -> str:
    """A list of hours as a user writes it."""
    return f"[{', '.join(f'{value:g}' for value in hours)}]"


def make_views(
    windows: Sequence[tuple[StreamWindow, ...]],
    specs: Sequence[ViewSpec],
    sampler: MaskingSampler,
    rng: np.random.Generator,
    *,
    first_guess: FirstGuess = True,
) -> tuple[View, ...]:
    """Every view of one sample from its window, all streams of it; sampler: of views that have none
    of their own."""
    views: list[View] = []
    parts: dict[Crop, Part] = {}  # equal crops of a sample show the same place
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
    """Of the run's own data, whose windows those of other stores follow."""
    return next(window for window in windows if window.spec.data == PRIMARY).time_hours[0]


def _with_another_date(view: View, year_hours: float, rng: np.random.Generator) -> View:
    shift = float(rng.integers(int(year_hours)))
    streams = tuple(
        replace(stream, grid=replace(stream.grid, time_hours=stream.grid.time_hours + shift))
        for stream in view.streams
    )
    return replace(view, streams=streams)

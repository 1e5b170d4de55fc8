"""The tasks as masks: regions of physical time and space, put onto each stream by its tokens.

Every task is a masking sampler that ignores its generator. A region that would cut through the
tokens of a stream is refused, so that all streams hide the same air.
"""

from dataclasses import dataclass

import numpy as np
import torch

from atmossl.batch import Corruption, StreamMask
from atmossl.masking.base import Layout

_TOLERANCE_HOURS = 1e-3


def hide_times(
    layouts: tuple[Layout, ...], first_hour: float, last_hour: float
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
        inside = (times >= first_hour - _TOLERANCE_HOURS) & (times <= last_hour + _TOLERANCE_HOURS)
        hidden = inside.all(dim=-1)
        if bool((inside.any(dim=-1) != hidden).any()):
            raise ValueError(
                f"task hides {last_hour - first_hour + layout.step_hours:g} h, which cuts through "
                f"a token of stream {layout.spec.name} of {float(layout.grid.time_extent):g} h; "
                "choose a multiple of the longest token"
            )
        if bool(hidden.all()):
            raise ValueError(
                "task hides every time step of the window; choose a shorter task.lead_time or a "
                "longer data.window.time"
            )
        corruption = layout.nothing_hidden().corruption
        corruption[:, hidden] = int(Corruption.MASK)
        masks.append(StreamMask(corruption))
    return tuple(masks)


def _window_times(layouts: tuple[Layout, ...]) -> torch.Tensor:
    finest = min(layouts, key=lambda layout: layout.step_hours)
    return finest.point_times().flatten()


@dataclass(frozen=True)
class Forecast:
    """Hide the last `lead_hours` of the window (zero-shot forecast, AtmoRep section 3)."""

    lead_hours: float

    def __post_init__(self) -> None:
        if self.lead_hours <= 0:
            raise ValueError(f"task.lead_time must be positive, got {self.lead_hours:g} h")

    def __call__(
        self, layouts: tuple[Layout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        del rng
        end = float(_window_times(layouts)[-1])
        step = min(layout.step_hours for layout in layouts)
        if abs(self.lead_hours / step - round(self.lead_hours / step)) > _TOLERANCE_HOURS:
            raise ValueError(
                f"task.lead_time={self.lead_hours:g} h is no multiple of the data's step of "
                f"{step:g} h"
            )
        return hide_times(layouts, end - self.lead_hours + step, end)


@dataclass(frozen=True)
class TemporalInterpolation:
    """Hide steps in the middle of the window, `hidden_hours` in all, as centred as can be."""

    hidden_hours: float

    def __post_init__(self) -> None:
        if self.hidden_hours <= 0:
            raise ValueError(f"task.hidden_time must be positive, got {self.hidden_hours:g} h")

    def __call__(
        self, layouts: tuple[Layout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        del rng
        times = _window_times(layouts)
        step = min(layout.step_hours for layout in layouts)
        count = round(self.hidden_hours / step)
        if count < 1 or count > len(times) - 2:
            raise ValueError(
                f"task.hidden_time={self.hidden_hours:g} h hides {count} of the window's "
                f"{len(times)} steps; valid: 1 to {len(times) - 2} steps of {step:g} h"
            )
        start = (len(times) - count) // 2
        return hide_times(layouts, float(times[start]), float(times[start + count - 1]))


@dataclass(frozen=True)
class Downscaling:
    """Give every token as means over factor x factor cells, predict all at full resolution."""

    factor: int

    def __post_init__(self) -> None:
        if self.factor < 2:
            raise ValueError(f"task.factor must be at least 2, got {self.factor}")

    def __call__(
        self, layouts: tuple[Layout, ...], rng: np.random.Generator
    ) -> tuple[StreamMask, ...]:
        del rng
        return tuple(
            StreamMask(
                torch.full(layout.grid.shape, int(Corruption.COARSEN)), coarsen_factor=self.factor
            )
            if layout.spec.role == "predict"
            else layout.nothing_hidden()
            for layout in layouts
        )

"""The tasks of the configuration, by name.

A task's `sampler()` is its mask; files that it names are read there.
"""

import re
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args

from pydantic import BeforeValidator, Field

from atmossl.inference.regions import read_cell_mask, read_stations
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import AllButStations, CrossVariable, HiddenCells, Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from atmossl.schema.strict import NotNegative, Positive, Strict


def signed_hours(text: str) -> float:
    """Hours of a duration such as `12h`, `90min`, `2d` or `-30d`; ValueError if it is none."""
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(min|h|d)\s*", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no duration; valid: a number and min, h or d, such as 12h")
    return float(match[1]) * {"min": 1 / 60, "h": 1.0, "d": 24.0}[match[2]]


def hours(text: str) -> float:
    """Hours of a positive duration; ValueError if it is none."""
    value = signed_hours(text)
    if value < 0:
        raise ValueError(f"{text!r} is negative; valid: a duration such as 12h")
    return value


Hours = Annotated[float, BeforeValidator(hours)]


class ForecastConfig(Strict):
    """Hide the end of the window; `lead_time` beyond `rollout_time` is reached in passes."""

    name: Literal["forecast"]
    lead_time: Hours
    rollout_time: Hours | None = None

    def sampler(self) -> Forecast:
        return Forecast(self.lead_time, self.rollout_time)


class HindcastConfig(Strict):
    """Hide the first `lead_time` of the window."""

    name: Literal["hindcast"]
    lead_time: Hours

    def sampler(self) -> Hindcast:
        return Hindcast(self.lead_time)


class TemporalInterpolationConfig(Strict):
    """Hide `hidden_time` in the middle of the window, or `steps`, or the steps between those of
    the store where its time resolution is raised `refine` times."""

    name: Literal["temporal_interpolation"]
    hidden_time: Hours
    steps: tuple[NotNegative, ...] | None = None
    refine: Positive = 1

    def sampler(self) -> TemporalInterpolation:
        return TemporalInterpolation(self.hidden_time, self.steps, self.refine)


class DownscalingConfig(Strict):
    """Give means over factor x factor cells."""

    name: Literal["downscaling"]
    factor: Annotated[int, Field(ge=2)]
    consistent: bool = False
    coarse_input: bool = False

    def sampler(self) -> Downscaling:
        return Downscaling(self.factor, self.consistent, self.coarse_input)


def _boxes(values: Any) -> Any:
    try:
        return tuple(LatLonBox(*map(float, box)) for box in values)
    except TypeError as error:
        raise ValueError(
            "needed: boxes [south, north, west, east] in degrees, in a list"
        ) from error


class InpaintingConfig(Strict):
    """Hide `boxes` [south, north, west, east], the cells of a `mask_file`, and all cells but a
    share `observed` or those of the `stations` file; for `hidden_time` only, if given. `missing`:
    the store's missing values, too."""

    name: Literal["inpainting"]
    boxes: Annotated[tuple[LatLonBox, ...], BeforeValidator(_boxes)] = ()
    mask_file: Path | None = None
    observed: float | None = None
    stations: Path | None = None
    seed: NotNegative = 0
    hidden_time: Hours | None = None
    missing: bool = False

    def sampler(self) -> Inpainting:
        regions: list[HiddenCells] = list(self.boxes)
        if self.mask_file is not None:
            regions.append(read_cell_mask(self.mask_file))
        if self.observed is not None:
            regions.append(AllButStations(self.observed, self.seed))
        if self.stations is not None:
            regions.append(read_stations(self.stations))
        return Inpainting(tuple(regions), self.hidden_time, self.missing)


class CrossVariableConfig(Strict):
    """Hide `variables` (all if empty) at `levels` in hPa (all if empty)."""

    name: Literal["cross_variable"]
    variables: tuple[str, ...] = ()
    levels: tuple[Positive, ...] = ()

    def sampler(self) -> CrossVariable:
        return CrossVariable(self.variables, self.levels)


class CombinedConfig(Strict):
    """Hide what any of the parts hides."""

    name: Literal["combined"]
    parts: tuple["TaskConfig", ...] = Field(min_length=2)

    def sampler(self) -> Combined:
        return Combined(tuple(part.sampler() for part in self.parts))


class CounterfactualConfig(Strict):
    """A task whose model is told another date, place or level."""

    name: Literal["counterfactual"]
    task: "TaskConfig"
    shift_time: Annotated[float, BeforeValidator(signed_hours)] = 0.0
    shift_lat: float = 0.0
    shift_lon: float = 0.0
    levels: dict[Positive, Positive] = Field(default_factory=dict)

    def sampler(self) -> Counterfactual:
        task: Task = self.task.sampler()
        return Counterfactual(
            task, self.shift_time, self.shift_lat, self.shift_lon, tuple(self.levels.items())
        )


TaskConfig = Annotated[
    Union[  # noqa: UP007 (the names are not all defined yet where a part refers to them)
        ForecastConfig,
        HindcastConfig,
        TemporalInterpolationConfig,
        DownscalingConfig,
        InpaintingConfig,
        CrossVariableConfig,
        CombinedConfig,
        CounterfactualConfig,
    ],
    Field(discriminator="name"),
]
CombinedConfig.model_rebuild()
CounterfactualConfig.model_rebuild()
# what the literal of every `name` says
TASK_NAMES: tuple[str, ...] = tuple(
    get_args(kind.model_fields["name"].annotation)[0] for kind in get_args(get_args(TaskConfig)[0])
)

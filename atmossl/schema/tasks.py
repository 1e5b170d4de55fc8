"""The tasks of the configuration, by name."""

import re
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from atmossl.masking.tasks import Downscaling, Forecast, TemporalInterpolation
from atmossl.schema.strict import Strict


def hours(text: str) -> float:
    """Hours of a duration such as `12h`, `90min` or `2d`; ValueError if it is none."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*(min|h|d)\s*", str(text))
    if match is None:
        raise ValueError(f"{text!r} is no duration; valid: a number and min, h or d, such as 12h")
    return float(match[1]) * {"min": 1 / 60, "h": 1.0, "d": 24.0}[match[2]]


class ForecastConfig(Strict):
    """Hide the last `lead_time` of the window."""

    name: Literal["forecast"]
    lead_time: Annotated[float, BeforeValidator(hours)]

    def sampler(self) -> Forecast:
        return Forecast(self.lead_time)


class TemporalInterpolationConfig(Strict):
    """Hide `hidden_time` in the middle of the window."""

    name: Literal["temporal_interpolation"]
    hidden_time: Annotated[float, BeforeValidator(hours)]

    def sampler(self) -> TemporalInterpolation:
        return TemporalInterpolation(self.hidden_time)


class DownscalingConfig(Strict):
    """Give means over factor x factor cells."""

    name: Literal["downscaling"]
    factor: Annotated[int, Field(ge=2)]

    def sampler(self) -> Downscaling:
        return Downscaling(self.factor)


TaskConfig = Annotated[
    ForecastConfig | TemporalInterpolationConfig | DownscalingConfig, Field(discriminator="name")
]

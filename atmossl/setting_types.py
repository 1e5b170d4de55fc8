"""Types of settings that carry their bounds: numbers, and durations as people write them; the base
class of groups of settings, and names of classes as a configuration has them.

The types annotate the classes that a configuration is validated against (`atmossl.schema`),
wherever those classes are. Nothing is checked when such a class is made in code, without a
configuration.
"""

import re
from typing import Annotated

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from atmossl.value_faults import as_written

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
NUM_SEEDS = 2**63  # numbers that a signed integer of 64 bits can hold
Seed = Annotated[int, Field(ge=0, lt=NUM_SEEDS)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
NonZeroShare = Annotated[float, Field(gt=0.0, le=1.0)]
PositiveFloat = Annotated[float, Field(gt=0.0)]
NotNegativeFloat = Annotated[float, Field(ge=0.0)]
_HOURS = {"s": 1 / 3600, "min": 1 / 60, "h": 1.0, "d": 24.0}


class Strict(BaseModel):
    """Settings that refuse unknown keys and never change."""

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)


def signed_hours(text: str) -> float:
    """Hours of a duration such as `12h`, `90min`, `2d` or `-30d`; ValueError if it is none."""
    match = re.fullmatch(r"\s*(-?\d+(?:\.\d+)?)\s*(s|min|h|d)\s*", str(text))
    if match is None:
        raise ValueError(
            f"{as_written(text)} is no duration; valid: a number and min, h or d, such as 12h"
        )
    return float(match[1]) * _HOURS[match[2]]


def hours(text: str) -> float:
    """Hours of a duration that is not negative; ValueError if it is none."""
    value = signed_hours(text)
    if value < 0:
        raise ValueError(f"{as_written(text)} is negative; valid: a duration such as 12h")
    return value


def seconds(text: str) -> float:
    """Seconds of a duration that is not negative; ValueError if it is none."""
    return round(3600 * hours(text), 9)


# Hours or seconds in code, a number and its unit in a configuration: `12h`
Hours = Annotated[float, BeforeValidator(hours)]
Seconds = Annotated[float, BeforeValidator(seconds)]
SignedHours = Annotated[float, BeforeValidator(signed_hours)]


def snake_case(name: str) -> str:
    """The name of a class in small letters with underscores."""
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()


def target_name(target: str) -> str:
    """The short name of a class of this package, as a `_target_` of the configuration may name it
    with its module in front; any other name stays as it is."""
    return snake_case(target.rpartition(".")[2]) if target.startswith("atmossl.") else target

"""The keys of `atmossl features`."""

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from atmossl.schema.data import EncodingConfig, read_dates
from atmossl.setting_types import Positive


def _as_place(place: Any) -> Any:
    """A name, or degrees north and east as two numbers."""
    numbers = isinstance(place, Sequence) and not isinstance(place, str) and len(place) == 2
    if not isinstance(place, str) and not numbers:
        raise ValueError("valid: names, or [latitude,longitude] in degrees")
    return place


def _one_date(time: Any) -> Any:
    """A date as text, or None."""
    date = None if time is None else read_dates(time)
    if isinstance(date, tuple) and len(date) != 1:
        raise ValueError("valid: one ISO date such as 1959-01-12T06, or null")
    return date[0] if isinstance(date, tuple) else date


class FeaturesConfig(EncodingConfig):
    """Everything that `atmossl features` obeys.

    splits: whose dates are compared. init_time: of the maps. num_dates: evenly spread over the
        splits. places: names, or degrees north and east. layer: whose latents are shown. layers:
        whose attention is, empty for all.
    """

    checkpoint: str
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], Field(min_length=1)]
    init_time: Annotated[str | None, BeforeValidator(_one_date)]
    num_dates: Positive
    places: tuple[Annotated[str | tuple[float, float], BeforeValidator(_as_place)], ...]
    layer: int
    layers: tuple[int, ...]

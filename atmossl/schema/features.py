"""The keys of `atmossl features`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from atmossl.data.variables import InputLimits
from atmossl.plugins import Plugins
from atmossl.schema.data import ChosenStore, read_dates
from atmossl.schema.strict import Strict
from atmossl.setting_types import Positive


def _is_place(place: Any) -> Any:
    """A name, or degrees north and east as two numbers."""
    numbers = isinstance(place, Sequence) and not isinstance(place, str) and len(place) == 2
    if not isinstance(place, str) and not numbers:
        raise ValueError("valid: names, or [latitude,longitude] in degrees")
    return place


class FeaturesConfig(Strict):
    """Everything that `atmossl features` obeys.

    splits: whose dates are compared. init_time: of the maps. num_dates: evenly spread over the
        splits. places: names, or degrees north and east. layer: whose latents are shown. layers:
        whose attention is, empty for all. overlap: share of a tile that its neighbour covers as
        well. batch_size: tiles in one call of the network; fewer need less memory. accelerator:
        auto takes a GPU if there is one.
    """

    checkpoint: str
    data: ChosenStore
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], Field(min_length=1)]
    init_time: Annotated[str | None, BeforeValidator(lambda time: time and read_dates(time))]
    num_dates: Positive
    places: tuple[Annotated[str | tuple[float, float], BeforeValidator(_is_place)], ...]
    layer: int
    layers: tuple[int, ...]
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)]
    batch_size: Positive
    accelerator: Literal["auto", "cpu", "gpu"]
    input_limits: InputLimits
    output: Path
    plugins: Plugins

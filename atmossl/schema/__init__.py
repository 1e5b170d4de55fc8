"""Typed configuration: every key, its type and bounds; unknown keys are errors. Here are the
settings of every command but `train`, which has `atmossl.schema.training`.

`conf/` holds the values, these modules the types, the docstrings of the classes that are built from
them the meaning.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import index
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import (
    AfterValidator,
    BeforeValidator,
    ConfigDict,
    Field,
    TypeAdapter,
    ValidationError,
    model_validator,
)

from atmossl.data.catalog import StoreChoice
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers
from atmossl.data.variables import InputLimits
from atmossl.data.windows import WindowSize
from atmossl.evaluation.regions import boxes, find_regions
from atmossl.masking.base import MaskingSampler
from atmossl.overrides import split, unquoted
from atmossl.schema.config_errors import ConfigError, lines_of, with_single_items_listed
from atmossl.schema.targets import MASKS, REGIONS, ChosenTask, choose_mask
from atmossl.schema.training import StatsConfig, TrainConfig
from atmossl.settings import (
    NonZeroShare,
    Plugins,
    Positive,
    PositiveFloat,
    Seed,
    Strict,
    UntrustedError,
    check_listed,
)
from atmossl.value_faults import listed

__all__ = [
    "CalibrateConfig",
    "ConfigError",
    "EmbedConfig",
    "EncodingConfig",
    "EvaluateConfig",
    "FeaturesConfig",
    "IngestConfig",
    "InspectConfig",
    "PredictConfig",
    "ProbeConfig",
    "StatsConfig",
    "StoreChoice",
    "TrainConfig",
    "checked",
    "device_for",
    "parse",
    "trained_sampler",
]


def _by_name(data: Any) -> Any:
    return {"name": data} if data is None or isinstance(data, str) else data


ChosenStore = Annotated[StoreChoice, BeforeValidator(_by_name)]


class EncodingConfig(Strict):
    """The settings of every command that encodes a store tile by tile.

    overlap: share of a tile that its neighbour covers as well. batch_size: tiles in one call of
    the network; fewer need less memory. accelerator: auto takes a GPU if there is one.
    """

    data: ChosenStore
    overlap: Annotated[float, Field(ge=0.0, lt=1.0)]
    batch_size: Positive
    accelerator: Literal["auto", "cpu", "gpu"]
    input_limits: InputLimits
    output: Path
    plugins: Plugins


def device_for(accelerator: str) -> str:
    """`cuda` or `cpu` for the configured accelerator; ValueError if a GPU is asked for in vain."""
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu but no GPU is visible; valid here: auto, cpu")
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


@dataclass(frozen=True, kw_only=True)
class IngestConfig(IngestInput):
    """Everything that `atmossl data ingest` obeys."""

    output: Path
    layout: ChunkLayout
    workers: Workers
    verify: bool

    __pydantic_config__ = ConfigDict(extra="forbid")


class InspectConfig(Strict):
    """Everything that `atmossl data inspect NAME` obeys."""

    data: ChosenStore
    window: WindowSize
    samples: Positive
    output: Path


def read_dates(times: Any) -> Any:
    """Dates as texts. YAML reads those without separators, such as 19590112 or 1959011206, as
    numbers."""
    if isinstance(times, Sequence) and not isinstance(times, str):
        return tuple(map(read_dates, times))
    digits = re.fullmatch(r"(\d{4})(\d\d)(\d\d)T?(\d\d)?", str(times))
    if digits is not None:
        year, month, day, hour = digits.groups()
        return f"{year}-{month}-{day}" + (f"T{hour}" if hour else "")
    if not isinstance(times, str):
        raise ValueError("valid: all, an ISO date such as 1959-01-12T06, or a list of them")
    return times


Times = Annotated[str | tuple[str, ...], BeforeValidator(read_dates)]


class CheckpointConfig(EncodingConfig):
    """The settings of every command that runs a checkpoint on a store.

    split: part of the catalog entry whose dates are used. every: of all possible times, each n-th.
    """

    checkpoint: str
    split: Literal["train", "validation", "test"]
    segment: str | None
    every: Positive


def _members(members: Any) -> int | tuple[int, ...] | None:
    """The number of members, or the numbers of some members."""
    if members is None:
        return None
    members = members.tolist() if hasattr(members, "tolist") else members  # of numpy
    is_list = isinstance(members, Sequence) and not isinstance(members, str)
    numbers: list[Any] = [*members] if is_list else [members]
    whole = all(hasattr(number, "__index__") and number is not True for number in numbers)
    if not whole or not numbers or (not is_list and numbers[0] < 1):
        raise ValueError(_VALID_MEMBERS)
    if min(numbers) < 0:
        raise ValueError(f"{min(numbers)} is below 0, the first member; {_VALID_MEMBERS}")
    twice = sorted({number for number in numbers if numbers.count(number) > 1})
    if twice:
        raise ValueError(f"{listed(twice)} is there twice; {_VALID_MEMBERS}")
    chosen = tuple(map(index, numbers))
    return chosen if is_list else chosen[0]


_VALID_MEMBERS = "valid: null for all, a number from 1 on, or some by their numbers, such as [0,2]"
ChosenMembers = Annotated[int | tuple[int, ...] | None, BeforeValidator(_members)]


class DatedConfig(CheckpointConfig):
    """Settings of a command that runs a checkpoint at chosen times: ISO dates, or `all`."""

    init_time: Times

    @property
    def dates(self) -> str | tuple[str, ...] | None:
        """The chosen times; None for all of them."""
        return None if self.init_time == "all" else self.init_time


class PredictConfig(DatedConfig):
    """All settings of `atmossl predict`."""

    task: ChosenTask
    tilings: Positive
    members: ChosenMembers
    seed: Seed
    layout: Literal["cf", "weatherbench2"]
    resume: bool
    missing: Literal["keep", "fill"]


def _falling(scales_deg: tuple[float, ...]) -> tuple[float, ...]:
    if len({*scales_deg}) < len(scales_deg):
        raise ValueError(
            "needed: lengths in degrees of longitude, each once, such as [90,30]; [] for one factor"
        )
    return tuple(sorted(scales_deg, reverse=True))


class CalibrateConfig(DatedConfig):
    """All settings of `atmossl calibrate`.

    scales_deg: lengths of zonal waves that part the bands, each with its own factor of the spread,
        in degrees of longitude; empty for one factor for all scales; None for what suits the
        ensemble. members: how many draws of noise.
    """

    task: ChosenTask
    scales_deg: Annotated[tuple[PositiveFloat, ...], AfterValidator(_falling)] | None
    tilings: Positive
    members: Annotated[int, Field(ge=2)] | None
    seed: Seed


class EmbedConfig(DatedConfig):
    """All settings of `atmossl embed`."""

    layer: int


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
        splits. places: names, or degrees north and east; None for some that
        the data reach. layer: whose latents are shown. layers:
        whose attention is, empty for all.
    """

    checkpoint: str
    splits: Annotated[tuple[Literal["train", "validation", "test"], ...], Field(min_length=1)]
    init_time: Annotated[str | None, BeforeValidator(_one_date)]
    num_dates: Positive
    places: tuple[Annotated[str | tuple[float, float], BeforeValidator(_as_place)], ...] | None
    layer: int
    layers: tuple[int, ...]


def _as_list(names: Any) -> Any:
    """One path, or several as `[a.ckpt,b.ckpt]` or `a.ckpt,b.ckpt`, which the command line passes
    as one text."""
    if not isinstance(names, str):
        return names
    in_brackets = names.startswith("[") and names.endswith("]")
    if Path(names).exists() or not (in_brackets or "," in names):
        return [names]
    return [unquoted(name.strip()) for name in split(names[1:-1] if in_brackets else names)]


class FinetuneConfig(Strict):
    """How `atmossl probe` fine-tunes; see `atmossl.probes.finetuning.FinetuneSettings`."""

    fractions: tuple[NonZeroShare, ...]
    probes: tuple[str, ...]
    steps: Positive
    batch_size: Positive
    learning_rate: Annotated[
        tuple[PositiveFloat, ...], BeforeValidator(_as_list), Field(min_length=1)
    ]


class ProbeConfig(EncodingConfig):
    """All settings of `atmossl probe`.

    checkpoint: one or several. probes: names, empty for all that the checkpoint's fields allow.
        layers: of the encoder, empty for all. every: of all dates, each n-th. places: per date, for
        labels of a place. withheld: streams that the encoder is not shown. block_days, bootstrap:
        length of a block and number of draws.
    """

    checkpoint: Annotated[tuple[str, ...], BeforeValidator(_as_list), Field(min_length=1)]
    probes: tuple[str, ...]
    layers: tuple[int, ...]
    every: Positive
    places: Positive
    withheld: tuple[str, ...]
    finetune: FinetuneConfig
    block_days: Annotated[float, Field(gt=0.0)]
    bootstrap: Positive
    seed: Seed


def _is_box(limits: Any) -> Any:
    if not isinstance(limits, Sequence) or isinstance(limits, str) or len(limits) != 4:
        raise ValueError("needed: south, north, west, east in degrees")
    return limits


Limits = Annotated[tuple[float, float, float, float], BeforeValidator(_is_box)]


def _is_tails(tails: tuple[float, float]) -> tuple[float, float]:
    if not 0.0 < tails[0] < tails[1] < 1.0:
        raise ValueError("needed: 0 < low < high < 1")
    return tails


class EvaluateConfig(CheckpointConfig):
    """All settings of `atmossl evaluate`.

    forecasts: stores to score instead of the checkpoint's tasks; the first is compared with the
        others. boxes: name -> south, north, west, east in degrees. tails: quantiles of the
        training record below and above which events and extremes are scored. climatology: by cell
        and month, that `data stats` left of the same training data; worked out anew without.
    """

    split: Literal["validation", "test"]
    tasks: tuple[ChosenTask, ...] = Field(min_length=1)
    forecasts: tuple[str, ...]
    regions: tuple[str, ...]
    boxes: dict[str, Limits] | None
    tails: Annotated[tuple[float, float], AfterValidator(_is_tails)]
    climatology: Path | None
    ridge: bool
    bootstrap: Positive
    tilings: Positive
    members: Annotated[int, Field(ge=2)] | None
    seed: Seed

    @model_validator(mode="after")
    def _climatology_is_of_the_training(self) -> "EvaluateConfig":
        if self.climatology is not None and self.forecasts:
            raise ValueError(
                f"climatology={self.climatology} is of the checkpoint's own variables and grid; "
                "with forecasts=[...] leave it out"
            )
        return self

    @model_validator(mode="after")
    def _regions_exist(self) -> "EvaluateConfig":
        find_regions(self.regions)
        boxes(self.boxes or {})
        return self


def checked(
    kind: type, values: Mapping[str, Any], within: tuple[str, ...] = ()
) -> tuple[Any, dict[str, Any]]:
    """Validate a composed configuration. Returns it, and its values with a list of one in place of
    each single word or number where a list is needed.

    within: the keys that lead to the values, if they are a part of a configuration.

    Raises:
        ConfigError: one line per fault, each with the key, the value and what would be valid.
    """
    adapter, values = TypeAdapter(kind), dict(values)
    try:
        return adapter.validate_python(values), values
    except ValidationError as error:
        listed = with_single_items_listed(error.errors(), values)
    try:
        return adapter.validate_python(listed), listed
    except ValidationError as error:
        raise ConfigError("\n".join(lines_of(error.errors(), within, listed))) from error


def parse(kind: type, values: Mapping[str, Any]) -> Any:
    """The configuration alone; see `checked`."""
    return checked(kind, values)[0]


def trained_sampler(
    checkpoint_record: Mapping[str, Any], plugins: Sequence[str]
) -> MaskingSampler | str | None:
    """The sampler of the masks under which a checkpoint was trained, from its record. None if
    the record has none; a text that says so if its code is of a package that is not in
    `plugins`."""
    masking = checkpoint_record.get("config", {}).get("masking")
    if masking is None:
        return None
    try:
        check_listed(masking, {*MASKS, *REGIONS}, plugins)
    except UntrustedError as error:
        return f"masks that are known here: {error}"
    return choose_mask(masking)

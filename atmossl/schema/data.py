"""Configuration of the data: which store, which windows, how they are read."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, ConfigDict, Field

from atmossl.data.chunks import ReadSettings
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers
from atmossl.data.variables import InputLimits, Transform
from atmossl.data.windows import LoaderSettings, WindowSize
from atmossl.plugins import Plugins
from atmossl.schema.strict import Strict
from atmossl.setting_types import NonZeroShare, Positive


@dataclass(frozen=True)
class StoreChoice:
    """Which stores a command reads, `data`. name: a catalog entry; None: the one of the checkpoint.
    catalog: its file; None: the one of the package."""

    name: str | None = None
    catalog: Path | None = None


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


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoaderSettings):
    """The data of a training run and how they are read, `data`.

    name: a catalog entry, or the path of a store; catalog: a YAML file with further entries; null:
    the catalog of the package and ./data_catalog.yaml. in_memory: hold all data, once per process.
    window: steps and points of a training window; lat or lon of 0: the whole grid. read: how
    chunks are read. transforms: of variables before they are normalised. fraction: of the training
    records; see `atmossl.data.fraction`.
    """

    name: str
    catalog: Path | None
    in_memory: bool
    fraction: NonZeroShare
    window: WindowSize
    read: ReadSettings
    transforms: dict[str, Transform]


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

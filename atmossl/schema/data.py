"""Configuration of the data: which store, which windows, how they are read."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import BeforeValidator, ConfigDict

from atmossl.data.chunks import ReadSettings
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers
from atmossl.data.variables import Transform
from atmossl.data.windows import LoaderSettings, WindowSize
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


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoaderSettings):
    """What a training run reads and how, `data`.

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

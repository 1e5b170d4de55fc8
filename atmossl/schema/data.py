"""Configuration of the data: which store, which windows, how they are read."""

from dataclasses import dataclass
from pathlib import Path

from pydantic import ConfigDict

from atmossl.data.chunks import ReadSettings
from atmossl.data.ingest import ChunkLayout, IngestInput, Workers
from atmossl.data.variables import Transform
from atmossl.data.windows import LoaderSettings, WindowSize
from atmossl.schema.strict import Strict
from atmossl.setting_types import Positive


@dataclass(frozen=True, kw_only=True)
class DataConfig(LoaderSettings):
    """What a training run reads and how, `data`."""

    name: str
    catalog: Path | None
    in_memory: bool
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

    catalog: Path | None
    window: WindowSize
    samples: Positive
    output: Path

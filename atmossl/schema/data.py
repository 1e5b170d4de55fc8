"""Configuration of the data: which store, which windows, how they are read."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, field_validator, model_validator

from atmossl.data import ingest
from atmossl.data.chunks import Engine
from atmossl.data.transforms import Kind, Transform
from atmossl.masking.base import FirstGuess
from atmossl.names import check_name
from atmossl.schema.strict import Strict
from atmossl.setting_types import NotNegative, Positive


class WindowConfig(Strict):
    """Points of a window, `data.window`; lat or lon of 0 take the whole grid."""

    time: Positive
    lat: NotNegative
    lon: NotNegative


class ReadConfig(Strict):
    """How stores are read; see `atmossl.data.chunks.Access`."""

    engine: Engine
    threads: Positive
    retries: NotNegative
    retry_wait_s: float = Field(ge=0.0)


class TransformConfig(Strict):
    """Of one variable, before normalisation; see `atmossl.data.transforms.Transform`."""

    kind: Kind
    scale: float = Field(gt=0.0)


class DataConfig(Strict):
    """What is read and how, `data`; see `atmossl.data.datamodule.LoaderSettings`."""

    name: str
    catalog: Path | None
    in_memory: bool
    window: WindowConfig
    windows_per_time: Positive
    windows_per_read: Positive
    batch_size: Positive
    num_workers: NotNegative
    prefetch: Positive
    read: ReadConfig
    unreadable: Literal["raise", "skip"]
    transforms: dict[str, TransformConfig]
    first_guess: FirstGuess

    def transform_of(self) -> dict[str, Transform]:
        return {name: Transform(t.kind, t.scale) for name, t in self.transforms.items()}

    @model_validator(mode="after")
    def _groups_fit(self) -> "DataConfig":
        for key in ("windows_per_time", "batch_size"):
            if getattr(self, key) % self.windows_per_read:
                raise ValueError(
                    f"windows_per_read={self.windows_per_read} does not divide "
                    f"{key}={getattr(self, key)}"
                )
        return self


class LayoutConfig(Strict):
    """See `atmossl.data.ingest.Layout`."""

    time: NotNegative
    level: NotNegative
    lat: NotNegative
    lon: NotNegative
    shard: NotNegative
    compression: int = Field(ge=0, le=9)


class WorkersConfig(Strict):
    """See `atmossl.data.ingest.Workers`."""

    engine: ingest.Engine
    count: Positive
    slurm: dict[str, Any]


Date = Annotated[str, BeforeValidator(lambda date: None if date is None else str(date))]


class IngestConfig(Strict):
    """Everything that `atmossl data ingest` obeys."""

    input: str
    output: Path
    variables: dict[str, str]
    levels: tuple[Positive, ...]
    start: Date | None
    end: Date | None
    region: tuple[float, float, float, float] | None
    select: dict[str, Any]
    filters: dict[str, Any]
    coordinates: dict[Literal["time", "level", "latitude", "longitude"], str]
    layout: LayoutConfig
    workers: WorkersConfig
    verify: bool

    @field_validator("variables")
    @classmethod
    def _names_fit_stores(cls, variables: dict[str, str]) -> dict[str, str]:
        for name in variables:
            check_name(name, "variables")
        return variables


class InspectConfig(Strict):
    """Everything that `atmossl data inspect NAME` obeys."""

    catalog: Path | None
    window: WindowConfig
    samples: Positive
    output: Path

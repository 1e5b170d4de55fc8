"""Types and bounds of how a run trains: trainer, warm start, loggers."""

from typing import Literal

from pydantic import Field

from atmossl.schema.strict import Strict
from atmossl.setting_types import NotNegative, Positive


class TrainerConfig(Strict):
    """Devices, steps, precision and intervals of a run, `trainer`."""

    max_steps: Positive
    accumulate: Positive
    precision: Literal["32-true", "bf16-mixed", "16-mixed"]
    accelerator: Literal["auto", "cpu", "gpu"]
    devices: Positive | Literal["auto"]
    num_nodes: Positive
    strategy: Literal["auto", "ddp", "fsdp"]
    cpu_offload: bool
    compile: bool
    recompute: Literal["none", "selective", "full"]
    validation_interval: Positive
    validation_batches: Positive
    checkpoint_interval: Positive
    keep_checkpoints: Positive
    checkpoint_format: Literal["file", "sharded"]
    async_checkpoint: bool
    log_interval: Positive
    nonfinite_limit: Positive
    pictures: bool
    profiler: Literal["none", "torch"]
    profile_steps: tuple[NotNegative, Positive]


class LowRankConfig(Strict):
    """rank: of the matrices that alone are trained; 0: all weights are."""

    rank: NotNegative
    layers: tuple[str, ...] = Field(min_length=1)


class WarmStartConfig(Strict):
    """checkpoints: whose weights a new run starts from; rename: their streams to the run's;
    network: whether network, streams, window and normalisation are those of the first of them."""

    checkpoints: tuple[str, ...]
    network: bool
    rename: dict[str, str]
    low_rank: LowRankConfig


class LoggerConfig(Strict):
    """Where metrics go, `logger`; see `atmossl.training.loggers.make_loggers`. `metrics.csv` is
    always written."""

    csv: Literal[True]
    tensorboard: bool
    wandb: bool
    mlflow: bool
    project: str = Field(min_length=1)
    name: str | None
    group: str | None
    tags: tuple[str, ...]
    entity: str | None
    mlflow_uri: str | None


def trainer_faults(trainer: TrainerConfig) -> list[str]:
    """Strategy against precision and checkpoints."""
    faults = []
    if trainer.strategy == "fsdp" and trainer.precision == "16-mixed":
        faults.append("trainer.precision=16-mixed with strategy=fsdp; valid: 32-true, bf16-mixed")
    if trainer.strategy != "fsdp" and trainer.checkpoint_format == "sharded":
        faults.append("trainer.checkpoint_format=sharded needs trainer.strategy=fsdp; valid: file")
    if trainer.strategy != "fsdp" and trainer.cpu_offload:
        faults.append("trainer.cpu_offload=true needs trainer.strategy=fsdp; valid: false")
    last = sum(trainer.profile_steps)
    if trainer.profiler != "none" and last > trainer.max_steps * trainer.accumulate:
        faults.append(
            f"trainer.profile_steps={list(trainer.profile_steps)} (first batch, number) end after "
            f"the run's {trainer.max_steps * trainer.accumulate} batches"
        )
    return faults

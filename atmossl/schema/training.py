"""Types and bounds of the settings of training: trainer, warm start, loggers."""

import importlib
from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from atmossl.plugins import Part, checked_keywords, choose_part
from atmossl.schema.strict import Strict
from atmossl.setting_types import NotNegative, Positive


def _of_lightning(name: str) -> Any:
    """A class of Lightning. Lightning takes seconds to import, so this happens only where the
    class is needed."""
    return getattr(importlib.import_module("lightning.pytorch"), name)


def _choose_callback(node: Any) -> Part:
    return choose_part(node, _of_lightning("Callback"))


def _choose_logger(node: Any) -> Part:
    return choose_part(node, importlib.import_module("lightning.pytorch.loggers").Logger)


Callback = Annotated[Part, BeforeValidator(_choose_callback)]
Logger = Annotated[Part, BeforeValidator(_choose_logger)]


def _checkpoint(value: Any) -> Any:
    if isinstance(value, str) or value is None:
        return value
    raise ValueError("valid: null, auto, or the path of a checkpoint")


Resume = Annotated[str | None, BeforeValidator(_checkpoint)]

# What a run gives to Lightning's Trainer by itself, and the key that changes it
_OURS = {
    "accelerator": "trainer.accelerator",
    "devices": "trainer.devices",
    "num_nodes": "trainer.num_nodes",
    "strategy": "trainer.strategy",
    "precision": "trainer.precision",
    "max_steps": "trainer.max_steps",
    "max_epochs": "trainer.max_steps",
    "fast_dev_run": "debug=quick",
    "accumulate_grad_batches": "trainer.accumulate",
    "gradient_clip_val": "optimizer.gradient_clip",
    "gradient_clip_algorithm": "optimizer.gradient_clip",
    "val_check_interval": "trainer.validation_interval",
    "check_val_every_n_epoch": "trainer.validation_interval",
    "num_sanity_val_steps": "trainer.validation_interval",
    "limit_val_batches": "trainer.validation_batches",
    "log_every_n_steps": "trainer.log_interval",
    "enable_checkpointing": "trainer.checkpoint_interval",
    "profiler": "trainer.profiler",
    "plugins": "trainer.strategy",
    "use_distributed_sampler": "data.batch_size",
    "logger": "logger",
    "callbacks": "callbacks",
    "default_root_dir": "paths.output",
}


def _check_extra(extra: Any) -> Any:
    """Check keywords of Lightning's Trainer that have no key of ours, and the types of their
    values."""
    if not isinstance(extra, Mapping):
        raise ValueError("valid: keywords of Lightning's Trainer and their values")
    for name in extra:
        if name in _OURS:
            raise ValueError(f"{name} is set by {_OURS[name]}; use that key instead")
    if not extra:
        return {}
    return checked_keywords(_of_lightning("Trainer"), extra, _OURS)


class TrainerConfig(Strict):
    """Devices, steps, precision and intervals of a run, `trainer`.

    max_steps: of the optimiser, in all. accumulate: batches in one step. precision: of the passes;
    weights stay in 32 bits. accelerator: auto takes a GPU if there is one. devices: of every node.
    num_nodes: each with as many devices. strategy: ddp copies the model to every device, fsdp
    shards it; auto: ddp on several devices. compile: the blocks, by torch.compile.
    validation_interval: steps from validation to validation. validation_batches: of each.
    checkpoint_interval: steps from checkpoint to checkpoint. keep_checkpoints: the newest ones,
    beside the best. checkpoint_format: one file, or a shard of every device.
    async_checkpoint: write while training goes on. log_interval: steps from log to log.
    nonfinite_limit: steps in a row without a finite gradient, after which the run stops.
    profiler: torch writes a trace of some batches. patience: validations in a row without a better
    value of the objective's monitor after which the run ends; 0: never.
    """

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
    patience: NotNegative
    checkpoint_interval: Positive
    keep_checkpoints: Positive
    checkpoint_format: Literal["file", "sharded"]
    async_checkpoint: bool
    log_interval: Positive
    nonfinite_limit: Positive
    collapse_below: float = Field(ge=0.0)
    collapse: Literal["warn", "stop"]
    pictures: bool
    profiler: Literal["none", "torch"]
    profile_steps: tuple[NotNegative, Positive]
    extra: Annotated[dict[str, Any], BeforeValidator(_check_extra)]


class LowRankConfig(Strict):
    """Low-rank adaptation. rank: of the matrices that alone are trained; 0: all weights are
    trained."""

    rank: NotNegative
    layers: tuple[str, ...] = Field(min_length=1)


class WarmStartConfig(Strict):
    """The trained models that a new run starts from. checkpoints: whose weights a new run starts
    from; rename: their streams to the run's; network: whether network, streams, window and
    normalisation are those of the first of them."""

    checkpoints: tuple[str, ...]
    network: bool
    rename: dict[str, str]
    low_rank: LowRankConfig


class LoggerConfig(Strict):
    """Where metrics go, `logger`; see `atmossl.training.loggers.make_loggers`. `metrics.csv` is
    always written. tensorboard, wandb, mlflow: whether metrics go there, too. others: loggers of
    Lightning and of plugins, by names that are free."""

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
    others: dict[str, Logger]


def trainer_faults(trainer: TrainerConfig) -> list[str]:
    """Faults of a strategy that does not go with the precision or the form of checkpoints."""
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

"""Types and bounds of the settings of a training run, and whether they fit together."""

import importlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import BeforeValidator, Field, model_validator
from torch.nn import ModuleDict

from atmossl.batch import PRIMARY, StreamSpec, shared_fields
from atmossl.data.catalog import CatalogEntry, catalog_entry
from atmossl.data.chunks import ReadSettings
from atmossl.data.climatology import Kind
from atmossl.data.forcings import FORCINGS
from atmossl.data.loader import LoaderSettings
from atmossl.data.variables import InputLimits, Transform
from atmossl.data.windows import WindowSize
from atmossl.inference.checkpoint import objective_name
from atmossl.losses import AREAS
from atmossl.masking.base import OTHER_MODEL
from atmossl.masking.correction import check_other_model
from atmossl.masking.random import Autoregression
from atmossl.model.kinds import choose_network
from atmossl.model.multiformer import Multiformer
from atmossl.schema.targets import ChosenMask, ChosenObjective, ChosenTask
from atmossl.settings import (
    NonZeroShare,
    NotNegative,
    Part,
    Plugins,
    Positive,
    Strict,
    checked_keywords,
    choose_part,
    snake_case,
)
from atmossl.training.optimizer import OptimizerChoice
from atmossl.value_faults import as_written, listed


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

    @property
    def num_devices(self) -> int:
        """The number of devices of all nodes; `devices=auto` counts the visible GPUs."""
        per_node = self.devices
        if per_node == "auto":
            per_node = max(1, torch.cuda.device_count())
        return per_node * self.num_nodes


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


def _trainer_faults(config: "TrainConfig") -> list[str]:
    """Faults of a strategy that does not go with the precision or the form of checkpoints."""
    faults, trainer = [], config.trainer
    if trainer.strategy == "fsdp" and trainer.precision == "16-mixed":
        faults.append("trainer.precision=16-mixed with strategy=fsdp; valid: 32-true, bf16-mixed")
    if trainer.strategy != "fsdp" and trainer.checkpoint_format == "sharded":
        faults.append("trainer.checkpoint_format=sharded needs trainer.strategy=fsdp; valid: file")
    if trainer.strategy != "fsdp" and trainer.cpu_offload:
        faults.append("trainer.cpu_offload=true needs trainer.strategy=fsdp; valid: false")
    last = sum(trainer.profile_steps)
    if trainer.profiler != "none" and last > trainer.max_steps * trainer.accumulate:
        faults.append(
            f"trainer.profile_steps={as_written(trainer.profile_steps)} (first batch, number) end "
            f"after the run's {trainer.max_steps * trainer.accumulate} batches"
        )
    return faults


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


class PathsConfig(Strict):
    """Where a run is written, `paths`. output: folder of checkpoints, curves and logs."""

    output: Path


def _named(streams: Any) -> Any:
    """The streams, each with the name under which it stands in the configuration."""
    if not isinstance(streams, Mapping) or not streams:
        raise ValueError("needed: keys and values of at least one stream, by its name")
    for name, stream in streams.items():
        if isinstance(stream, Mapping) and "name" in stream:
            raise ValueError(f"stream.{name}.name: unknown key; {name} is the name")
    return {
        name: {**stream, "name": name} if isinstance(stream, Mapping) else stream
        for name, stream in streams.items()
    }


Streams = Annotated[dict[str, StreamSpec], BeforeValidator(_named)]


class TrainConfig(Strict):
    """All settings of `atmossl train`. seed: of first weights, masks and order of samples."""

    seed: NotNegative
    resume: Resume
    input_limits: InputLimits
    warm_start: WarmStartConfig
    data: DataConfig
    stream: Streams
    masking: ChosenMask
    tasks: tuple[ChosenTask, ...] = Field(min_length=1)
    model: Annotated[Part, BeforeValidator(choose_network)]
    objective: ChosenObjective
    optimizer: OptimizerChoice
    trainer: TrainerConfig
    callbacks: dict[str, Callback]
    logger: LoggerConfig
    paths: PathsConfig
    plugins: Plugins

    @property
    def specs(self) -> tuple[StreamSpec, ...]:
        return tuple(self.stream.values())

    @model_validator(mode="after")
    def _fits_together(self) -> "TrainConfig":
        faults = [fault for check in CHECKS for fault in check(self)]
        if faults:
            raise ValueError(" | ".join(faults))
        return self


def _tuning_faults(config: TrainConfig) -> list[str]:
    """Faults of settings that train only parts of a network."""
    only, rank = config.objective.train_only, config.warm_start.low_rank.rank
    chosen = [] if only is None else [f"objective.train_only={only}"]
    chosen += [f"warm_start.low_rank.rank={rank}"] if rank else []
    if len(chosen) > 1:
        return [f"{' and '.join(chosen)} exclude each other; choose one"]
    if only is not None and "reconstruct" not in config.objective.provides:
        return [
            f"objective.train_only={only} with an objective that reconstructs nothing, so that the "
            f"{only} would learn nothing; choose objective=masked"
        ]
    if chosen and not config.warm_start.checkpoints:
        return [
            f"{chosen[0]} would leave the rest of a new network at random; name the trained one in "
            "warm_start.checkpoints"
        ]
    return []


def _comparison_faults(config: TrainConfig) -> list[str]:
    """Faults of the objective's keywords together, and of settings with which an objective
    cannot compare the samples of a batch."""
    objective = config.objective
    faults = objective.faults(config.data.batch_size)
    if not objective.compares_samples:
        return faults
    name = f"objective={objective_name(objective.target)}"
    if config.data.batch_size < 2:
        faults.append(
            f"data.batch_size={config.data.batch_size} but {name} compares the samples of a batch; "
            "give at least 2"
        )
    if config.data.unreadable == "skip":
        faults.append(
            f"data.unreadable=skip but {name} compares the samples of all devices, which must have "
            "equally many; valid: raise"
        )
    return faults


class StatsConfig(TrainConfig):
    """All settings of `atmossl data stats`: the data of a training run, and which statistics to
    compute. See `atmossl.data.climatology.write_climatology`."""

    climatologies: tuple[Kind, ...]
    output: Path | None
    memory_mib: Positive
    force: bool

    @model_validator(mode="after")
    def _has_a_place(self) -> "StatsConfig":
        if self.climatologies and self.output is None:
            raise ValueError("climatologies need output=FOLDER")
        if self.output is not None and not self.climatologies:
            raise ValueError(
                f"output={self.output}: statistics go beside the store or into the cache; a folder "
                "is for climatologies, such as climatologies=[month]"
            )
        return self


def _stream_faults(config: TrainConfig) -> list[str]:
    """Faults of streams that fit neither catalog nor window."""
    faults = []
    for name, stream in config.stream.items():
        if "." in name or hasattr(ModuleDict, name):
            faults.append(
                f"stream.{name}: a network cannot have a part of that name; valid: letters, digits "
                f"and _, but no word of Python or torch such as {name!r}"
            )
        try:
            is_primary = stream.data == PRIMARY
            entry = catalog_entry(
                config.data.name if is_primary else stream.data, config.data.catalog
            )
        except ValueError as error:
            fault = str(error) if is_primary else f"stream.{name}.data: {error}"
            faults += [fault] if fault not in faults else []
            continue
        faults += _entry_faults(stream, entry)
        if stream.data == config.data.name:
            faults.append(f"stream.{name}.data={stream.data} is data.name; leave it out")
        # the window's points on another grid show when it is opened
        if is_primary:
            faults += _token_faults(stream, config.data.window)
    if not any(s.role == "predict" and s.data == PRIMARY for s in config.stream.values()):
        faults.append("no stream of data.name has role predict; give at least one")
    return faults + shared_fields(config.specs)


def _entry_faults(stream: StreamSpec, entry: CatalogEntry) -> list[str]:
    """Faults of a stream that does not fit its catalog entry."""
    faults, name = [], stream.name
    computed = sorted(set(stream.variables) & set(FORCINGS))
    if computed and stream.role == "predict":
        faults.append(
            f"stream.{name}.role=predict but {listed(computed)} are computed, not observed; valid: "
            "input, static, forcing"
        )
    unknown = sorted(set(stream.variables) - set(entry.variables) - set(FORCINGS))
    if unknown:
        valid = sorted({*entry.variables, *FORCINGS})
        faults.append(
            f"stream.{name}.variables={as_written(unknown)} not in the catalog; valid: "
            f"{listed(valid)}"
        )
    levels = sorted(set(stream.levels) - set(entry.levels))
    if levels:
        faults.append(
            f"stream.{name}.levels={as_written(levels)} not in the catalog; valid: "
            f"{listed(entry.levels)}"
        )
    return faults


def _token_faults(spec: StreamSpec, window: WindowSize) -> list[str]:
    try:
        size = spec.token_size
        spec.token_shape(window.time, window.lat or size.lat, window.lon or size.lon)
    except ValueError as error:
        return [str(error)]
    return []


def _transform_faults(config: TrainConfig) -> list[str]:
    """Transforms of variables that no stream has, such as misspelt ones."""
    have = sorted({name for stream in config.stream.values() for name in stream.variables})
    return [
        f"data.transforms.{name}: no stream has {name}; valid: {listed(have)}"
        for name in config.data.transforms
        if name not in have
    ]


def _first_guess_faults(config: TrainConfig) -> list[str]:
    """Faults of a first guess that another model should give, but no stream does."""
    if config.data.first_guess != OTHER_MODEL:
        return []
    try:
        check_other_model(config.specs, "data.first_guess=other_model")
    except ValueError as error:
        return [str(error)]
    return []


def _joint_faults(config: TrainConfig) -> list[str]:
    """Faults of losses that look at whole fields, which the window does not hold."""
    faults, window = [], config.data.window
    losses = config.objective.arguments.get("losses", ())
    smallest = min((n for n in (window.lat, window.lon) if n), default=None)  # 0: the whole grid
    for name, size in AREAS.items():
        if name in losses and smallest is not None and smallest < size:
            faults.append(
                f"objective.losses.{name} means over {size} x {size} cells, but data.window has "
                f"lat={window.lat}, lon={window.lon}; choose a smaller area or a larger window"
            )
    circles = sorted({"spectral_crps", "relative_spectral_crps"} & set(losses))
    if circles and window.lon:
        faults.append(
            f"objective.losses.{circles[0]} needs whole circles of longitude, data.window.lon=0; "
            f"it is {window.lon}"
        )
    return faults


def _schedule_faults(config: TrainConfig) -> list[str]:
    if config.optimizer.warmup_steps < config.trainer.max_steps:
        return []
    return [
        f"optimizer.warmup_steps={config.optimizer.warmup_steps} must be below "
        f"trainer.max_steps={config.trainer.max_steps}"
    ]


def _model_faults(config: TrainConfig) -> list[str]:
    """Faults of the network's keywords together, and of an ensemble that losses do not fit."""
    model = config.model
    faults = model.kind.faults_of(model.arguments, config.specs)
    needs_ensemble = sorted(
        set(config.objective.arguments.get("losses", ())) - {"ensemble_mse", "mean_mse"}
    )
    if needs_ensemble and model.arguments.get("num_members", 2) < 2:
        faults.append(
            f"model.num_members=1 but objective.losses={as_written(needs_ensemble)} need at least 2"
        )
    return faults


def _autoregression_faults(config: TrainConfig) -> list[str]:
    """Faults of masks that predict every step from earlier ones with a network that sees later
    steps, or of such a network with other masks."""
    if config.model.kind is not Multiformer:  # others check their own
        return []
    causal = config.model.arguments["causal"]
    samplers = [config.masking, *getattr(config.masking, "samplers", ())]
    if any(isinstance(sampler, Autoregression) for sampler in samplers) != causal:
        return [
            f"model.causal={str(causal).lower()} but masking is "
            f"{snake_case(type(config.masking).__name__)}: masking=autoregression needs "
            "model.causal=true, which is for it alone"
        ]
    return []


CHECKS = (
    _autoregression_faults,
    _stream_faults,
    _transform_faults,
    _first_guess_faults,
    _model_faults,
    _joint_faults,
    _schedule_faults,
    _tuning_faults,
    _comparison_faults,
    _trainer_faults,
)

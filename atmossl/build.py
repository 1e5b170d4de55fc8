"""Builds the objects that train from a validated configuration: the wiring between the rooms."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from atmossl.batch import PRIMARY
from atmossl.data.catalog import CatalogEntry, is_shipped, remembered
from atmossl.data.chunks import Access
from atmossl.data.datamodule import WindowDataModule, check_samples
from atmossl.data.fingerprint import Transforms
from atmossl.data.fraction import part_of_records
from atmossl.data.segment import Segment
from atmossl.data.statistics import load_or_compute, outside_limits
from atmossl.data.store import entries_of, open_records, paired
from atmossl.data.variables import InputLimits
from atmossl.data.windows import Normaliser, Statistics
from atmossl.inference.checkpoint import load_checkpoint, read_checkpoint, spec_to_dict, written_by
from atmossl.inference.out_of_training_warnings import Seen
from atmossl.masking.random import Mixture
from atmossl.masking.tasks import Task, check_plan
from atmossl.model.network import LOW_RANK, Network, add_low_rank
from atmossl.objectives.base import Monitor, Objective, check_built
from atmossl.progress import telling
from atmossl.schema import TrainConfig
from atmossl.schema.targets import builtin_names
from atmossl.schema.training import TrainerConfig
from atmossl.settings import classes_outside, package_of
from atmossl.training.callbacks import (
    CurvesAtEnd,
    LearningRate,
    LogMetrics,
    LossByMask,
    NothingHidden,
    StopOnNonFinite,
)
from atmossl.training.checkpoint import AtomicCheckpointIO, KeepCheckpoints
from atmossl.training.collapse import CollapseWatch
from atmossl.training.loggers import make_loggers
from atmossl.training.module import TrainingModule
from atmossl.training.optimizer import OptimizerSettings
from atmossl.training.pictures import Pictures
from atmossl.training.preemption import SaveOnSignal
from atmossl.training.progress import RunProgress
from atmossl.training.recompute import recompute
from atmossl.training.strategies import choose_strategy
from atmossl.training.throughput import Throughput, TraceSteps
from atmossl.training.warm_start import renamed, warm_start
from atmossl.value_faults import told_in_list

_LOGGER = logging.getLogger(__name__)


Records = dict[str, tuple[Segment, ...]]


def open_splits(config: TrainConfig) -> tuple[Records, Records]:
    """The segments of training and of validation, by the `data` of the streams that read them.
    Of the training segments it is the share `data.fraction` that the run may use."""
    access = Access(**vars(config.data.read), input_limits=config.input_limits)
    entries = entries_of(config.specs, config.data.name, config.data.catalog)
    train, validation = (
        open_records(config.specs, entries, split, in_memory=config.data.in_memory, access=access)
        for split in ("train", "validation")
    )
    if config.data.fraction < 1.0:
        steps = config.data.window.time
        train = part_of_records(train, config.data.fraction, config.seed, steps)
    return train, validation


def build_data(config: TrainConfig) -> tuple[WindowDataModule, dict[str, Statistics]]:
    """The datamodule, and the statistics of every source over the training split alone."""
    train, validation = open_splits(config)
    paired_train, paired_validation = paired(train), paired(validation)
    tasks = {task.name: task for task in config.tasks}
    samples = config.specs, config.data.window, config.objective.views
    check_samples([(paired_train, config.masking)], *samples)
    for name, task in tasks.items():
        with told_in_list(name, tasks):
            check_samples([(paired_validation, task)], *samples)
            _check_can_be_predicted(task, config.data.window.time, train[PRIMARY][0].step_hours)
    _warn(shared_steps(train[PRIMARY], validation[PRIMARY]))
    transforms = config.data.transforms
    statistics = {
        data: statistics_of(segments, transforms, config.data.name if data == PRIMARY else data)
        for data, segments in train.items()
    }
    for data, of_source in statistics.items():
        _warn(limits_told(of_source, train[data][0], config.input_limits))
    if config.warm_start.network:  # what the network takes its values in
        checkpoint_record = read_checkpoint(config.warm_start.checkpoints[0])["atmossl"]
        statistics = {
            d: Statistics.from_dict(s) for d, s in checkpoint_record["statistics"].items()
        }
    datamodule = WindowDataModule(
        train=paired_train,
        validation=paired_validation,
        specs=config.specs,
        normaliser=Normaliser(statistics),
        window=config.data.window,
        sampler=config.masking,
        tasks=tasks,
        settings=config.data,
        seed=config.seed,
        num_batches=config.trainer.max_steps * config.trainer.accumulate,
        validation_batches=config.trainer.validation_batches,
        views=config.objective.views,
    )
    return datamodule, statistics


def _check_can_be_predicted(task: Task, num_steps: int, step_hours: float) -> None:
    """Ask a validation task for its plan, which only a prediction needs."""
    try:
        plan = task.plan(num_steps, step_hours / task.time_refinement)
    except ValueError:  # the task does not fit this window, which validation does not ask
        return
    check_plan(task, plan, num_steps)


def statistics_of(
    segments: Sequence[Segment], transforms: Transforms, name: str, *, force: bool = False
) -> Statistics:
    """The statistics of a source from the cache, or computed by one of all processes, which
    shows its progress. name: of the source. force: see `load_or_compute`."""
    steps = sum(len(segment.times) for segment in segments) * len(segments[0].variables)
    with telling(f"statistics of {name}", steps) as progress:
        return load_or_compute(segments, transforms=transforms, progress=progress, force=force)


def limits_told(statistics: Statistics, segment: Segment, mode: InputLimits) -> list[str]:
    """Lines on values outside of physical limits in the training data of a store.

    Raises:
        ValueError: there is something, and it is to be refused.
    """
    lines = outside_limits(statistics, pressure_levels=segment.pressure_levels)
    if lines and mode == "refuse":
        raise ValueError(
            f"{segment.location}: {'; '.join(lines)} input_limits=warn takes the values as they are"
        )
    return [] if mode == "off" else lines


def shared_steps(train: Sequence[Segment], validation: Sequence[Segment]) -> list[str]:
    """Lines on time steps that a run would see twice, or validate on after training on them."""
    sentences = []
    for number, segment in enumerate(train):
        for use, other_segments in (("it again", train[number + 1 :]), ("validation", validation)):
            counts = [segment.shared_steps(other) for other in other_segments]
            sentences += [
                f"{segment.location}: {count} time steps of split train are in {use}, too"
                for count in counts
                if count
            ]
    return sentences


@rank_zero_only
def _warn(lines: Sequence[str]) -> None:
    for line in lines:
        _LOGGER.warning("note: %s", line)


def build_model(config: TrainConfig, scales: Mapping[str, Tensor]) -> Network:
    """The network of a configuration, with weights drawn from its seed."""
    torch.manual_seed(config.seed)
    model = config.model.build(streams=config.specs, scales=scales)
    if config.trainer.compile:
        model.compile_blocks()
    return model


def build_objective(
    config: TrainConfig, scales: Mapping[str, Tensor], network: Network
) -> Objective:
    """The objective; its own initial weights follow from the run's seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        objective = config.objective.build(scales=scales, network=network)
    check_built(objective)
    if config.trainer.compile:
        objective.compile_blocks()
    return objective


def optimizer_settings(config: TrainConfig, ends: Sequence[str] = ("tail",)) -> OptimizerSettings:
    """The settings of the optimiser, and which parameters it trains. ends: of the network."""
    chosen = config.objective.train_only
    only = tuple(f"{end}.*" for end in ends if end.rpartition(".")[2] == chosen)
    if chosen is not None and not only:
        raise ValueError(f"objective.train_only={chosen}: this network has no {chosen}")
    only = LOW_RANK if config.warm_start.low_rank.rank else only
    return OptimizerSettings(
        max_steps=config.trainer.max_steps, only=only, **vars(config.optimizer)
    )


def build_module(
    config: TrainConfig,
    statistics: Mapping[str, Statistics],
    resolved: dict[str, Any],
    *,
    step_hours: float | None = None,
    seen: Mapping[str, Seen] | None = None,
    resumed: bool = False,
) -> TrainingModule:
    """Model, objective and optimiser settings in one LightningModule.

    resolved: the configuration as plain values, kept in every checkpoint.
    step_hours: time step of the training data, for the record; None: not known. seen: where and
    when its records lie, by the streams' `data`, likewise.
    resumed: the weights come from a checkpoint of the same run, so there is no warm start.
    """
    scales = {spec.name: statistics[spec.data].residual_scale(spec) for spec in config.specs}
    model = build_model(config, scales)
    warm = bool(config.warm_start.checkpoints) and not resumed
    outside = classes_outside(resolved, builtin_names())
    entries = entries_of(config.specs, config.data.name, config.data.catalog)
    checkpoint_record: dict[str, Any] = {
        **written_by(),
        "streams": [spec_to_dict(spec) for spec in config.specs],
        "network": config.model.target,
        "model": config.model.plain_arguments,
        "plugins": outside,
        "statistics": {data: of_source.to_dict() for data, of_source in statistics.items()},
        "window": asdict(config.data.window),
        "first_guess": config.data.first_guess,
        "step_hours": step_hours,
        "seen": {data: of_source.to_dict() for data, of_source in (seen or {}).items()},
        "data": config.data.name,
        "levels_are": entries[PRIMARY].levels_are,
        "catalog": _remembered(config, entries),
        "config": resolved,
        "warm_start": warm_started(config, model, outside.values()) if warm else {},
    }
    apply_lora(config, model)
    objective = build_objective(config, scales, model)
    checkpoint_record["objective"] = {
        "kind": config.objective.target,
        "provides": sorted(objective.provides),
    }
    names = tuple(task.name for task in config.tasks)
    module = TrainingModule(
        model=model,
        objective=objective,
        optimizer=optimizer_settings(config, model.ends),
        checkpoint_record=checkpoint_record,
        task_names=names,
    )
    recompute(model, config.trainer.recompute)  # its averaged copy has no backward pass
    return module


def _remembered(config: TrainConfig, entries: Mapping[str, CatalogEntry]) -> dict[str, Any]:
    """The entries of a user's own catalog, by the streams' `data`; entries of the package are
    always there."""
    names = {data: config.data.name if data == PRIMARY else data for data in entries}
    return {
        data: remembered(entry)
        for data, entry in entries.items()
        if not is_shipped(names[data], config.data.catalog)
    }


def apply_lora(config: TrainConfig, model: Network) -> None:
    """Apply `warm_start.low_rank` to a model that has its weights."""
    choice = config.warm_start.low_rank
    if choice.rank:
        add_low_rank(model, choice.layers, choice.rank)


def warm_started(
    config: TrainConfig, model: Network, classes: Iterable[str] = ()
) -> dict[str, Any]:
    """Fill the model from `warm_start.checkpoints`; returns what happened to every weight.
    classes: of plugins that the configuration names; these checkpoints may run the plugins'
    packages, too."""
    sources, plugins = [], (*config.plugins, *map(package_of, classes))
    for name in config.warm_start.checkpoints:
        trained = load_checkpoint(name, plugins)
        names = {s.name: config.warm_start.rename.get(s.name, s.name) for s in trained.specs}
        sources.append(renamed(name, trained.specs, dict(trained.model.named_parameters()), names))
    return warm_start(model, config.specs, sources).summary()


def build_trainer(
    config: TrainConfig, normaliser: Normaliser, monitor: Monitor, *, logs: bool = True
) -> L.Trainer:
    """The Lightning trainer with callbacks and loggers; it counts steps, not epochs.

    monitor: what chooses the best checkpoint. logs: False for a run that has no step left, so that
    the logs that are there stay.
    """
    settings, folder = config.trainer, config.paths.output
    loggers = _loggers(config) if logs else []
    several = settings.strategy == "auto" and settings.num_devices > 1
    strategy = choose_strategy(
        "ddp" if several else settings.strategy,
        precision=settings.precision,
        checkpoint_format=settings.checkpoint_format,
        async_checkpoint=settings.async_checkpoint,
        cpu_offload=settings.cpu_offload,
        has_idle_parameters=has_idle_parameters(config),
    )
    plugins: list[Any] = [AtomicCheckpointIO(asynchronous=settings.async_checkpoint)]
    if SLURMEnvironment.detect():
        plugins.append(SLURMEnvironment(auto_requeue=False))  # SaveOnSignal does it
    arguments: dict[str, Any] = dict(
        accelerator=settings.accelerator,
        devices=settings.devices,
        num_nodes=settings.num_nodes,
        strategy=strategy,
        plugins=plugins,
        precision=settings.precision,
        max_steps=settings.max_steps,
        max_epochs=-1,
        accumulate_grad_batches=settings.accumulate,
        gradient_clip_val=config.optimizer.gradient_clip,
        val_check_interval=settings.validation_interval * settings.accumulate,
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=log_interval(settings),
        use_distributed_sampler=False,
        logger=loggers,
        callbacks=_callbacks(config, normaliser, monitor),
        default_root_dir=folder,
        enable_checkpointing=False,  # KeepCheckpoints does it
        enable_model_summary=False,
        enable_progress_bar=False,  # RunProgress does it
    )
    try:
        return L.Trainer(**arguments | settings.extra)
    except (MisconfigurationException, TypeError, ValueError) as error:
        if not settings.extra:
            raise
        why = " ".join(str(error).split())
        raise ValueError(f"trainer.extra={settings.extra}: {why}") from error


def _loggers(config: TrainConfig) -> list[Logger]:
    """The loggers of the package, then those of Lightning and of plugins by `_target_`."""
    settings = config.logger.model_dump(exclude={"csv", "others"})
    further_loggers = [logger.build() for logger in config.logger.others.values()]
    return make_loggers(config.paths.output, **settings) + further_loggers


def has_idle_parameters(config: TrainConfig) -> bool:
    """Whether some parameters get no gradient: the last layer of a stream that is context only, or
    the ends of a network whose objective reconstructs nothing."""
    reconstructs = "reconstruct" in config.objective.provides
    return not reconstructs or any(spec.role == "input" for spec in config.specs)


def log_interval(settings: TrainerConfig) -> int:
    """Optimiser steps from log to log; a run that is shorter logs its last step."""
    return min(settings.log_interval, settings.max_steps)


def _callbacks(config: TrainConfig, normaliser: Normaliser, monitor: Monitor) -> list[L.Callback]:
    settings, folder = config.trainer, config.paths.output
    log_batches = log_interval(settings) * settings.accumulate
    watch = StopOnNonFinite(settings.nonfinite_limit, folder)
    keep = KeepCheckpoints(
        folder / "checkpoints",
        interval=settings.checkpoint_interval,
        keep=settings.keep_checkpoints,
        monitor=monitor,
        healthy=watch.healthy,
    )
    optional: list[L.Callback] = []
    if isinstance(config.masking, Mixture):
        optional.append(LossByMask(config.masking.kinds, log_batches))
    if settings.pictures:
        optional.append(Pictures(folder / "pictures", normaliser))
    if settings.patience:
        stop = {"monitor": monitor.key, "mode": monitor.direction, "check_finite": False}
        optional.append(EarlyStopping(patience=settings.patience, **stop))
    if settings.profiler == "torch":
        first, count = settings.profile_steps
        optional.append(TraceSteps(folder / "profile", first=first, count=count))
    return [
        LogMetrics(),
        NothingHidden(config.masking, config.objective.views),
        Throughput(log_batches),
        LearningRate(log_batches),
        watch,
        *optional,
        *(callback.build() for callback in config.callbacks.values()),
        keep,
        CollapseWatch(settings.collapse_below, settings.collapse, keep),  # saves what it stops
        SaveOnSignal(keep),
        CurvesAtEnd(folder / "metrics.csv", folder / "curves"),
        RunProgress(every=log_batches),
    ]

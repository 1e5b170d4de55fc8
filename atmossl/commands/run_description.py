"""Describes a training run, before its first step and for its loggers."""

import math
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer

from atmossl import __version__
from atmossl.batch import PRIMARY, StreamSpec
from atmossl.build import log_interval
from atmossl.data.datamodule import WindowDataModule
from atmossl.data.loader import WindowDataset
from atmossl.data.segment import Segment
from atmossl.schema import TrainConfig
from atmossl.training.module import TrainingModule


def banner(
    config: TrainConfig,
    module: TrainingModule,
    datamodule: WindowDataModule,
    trainer: Trainer,
    first_step: int,
) -> str:
    """Lines about device, model, tokens, data, steps, output folder and loggers.

    first_step: optimiser steps that the run has behind it.
    """
    settings, total = config.trainer, config.trainer.max_steps
    per_step = config.data.batch_size * settings.accumulate * trainer.world_size
    goes_on = f", going on after step {first_step:,}" if first_step else ""
    training, (validation, *_) = datamodule.train_set, datamodule.validation_sets
    lines = {
        "device": f"{_devices(trainer)}, precision {settings.precision}",
        "model": f"{_parameters(module)} parameters, objective {config.objective.kind.__name__}",
        "tokens": f"{_tokens(training)} in a sample, {per_step} samples in a step",
        "data": f"{config.data.name}, training {_periods(training, validation)}",
        "": f"validation {_periods(validation, training)} for {', '.join(module.task_names)}",
        "steps": f"{total:,}{goes_on}; a log every {log_interval(settings):,}, a validation every "
        f"{settings.validation_interval:,}, a checkpoint every {settings.checkpoint_interval:,}",
        "output": str(config.paths.output),
        "loggers": ", ".join(name_of(logger) for logger in trainer.loggers),
    }
    rows = [f"{name:<8} {text}" for name, text in lines.items()]
    return "\n".join([f"atmossl {__version__} train", *rows])


def name_of(logger: Any) -> str:
    """`csv` of a CSVLogger, `tensorboard` of a TensorBoardLogger."""
    return type(logger).__name__.strip("_").removesuffix("Logger").lower()


def described(
    values: Mapping[str, Any], module: TrainingModule, statistics: Mapping[str, Any]
) -> dict[str, Any]:
    """The description of a run for its loggers: the resolved configuration, and under `run` facts
    that the configuration does not hold.

    statistics: of the training data, as a checkpoint's record has them.
    """
    name_of = {PRIMARY: values["data"]["name"]}
    prints = {name_of.get(d, d): moments["fingerprint"] for d, moments in statistics.items()}
    return {
        **values,
        "run": {
            "parameters": sum(p.numel() for p in module.trained.values()),
            "parameters_trained": sum(
                p.numel() for p in module.trained.values() if p.requires_grad
            ),
            "atmossl": __version__,
            "torch": str(torch.__version__),
            "git_commit": git_commit(),
            "dataset_fingerprint": prints,
            "dataset_period": statistics[PRIMARY]["period"],
        },
    }


def git_commit(folder: Path = Path(__file__).parent) -> str:
    """Commit of the code in a folder, with `+changes` where files differ from it; `unknown` outside
    of a git checkout."""
    try:
        commit, changes = (
            subprocess.run(
                ["git", "-C", str(folder), *arguments],
                capture_output=True, text=True, check=True, timeout=10,
            ).stdout.strip()
            for arguments in (["rev-parse", "HEAD"], ["status", "--porcelain", "-uno", "--", "."])
        )  # fmt: skip
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return f"{commit}+changes" if changes else commit


def _devices(trainer: Trainer) -> str:
    device = trainer.strategy.root_device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    nodes = f" on {trainer.num_nodes} nodes" if trainer.num_nodes > 1 else ""
    return f"{trainer.world_size} x {name}{nodes}"


def _parameters(module: TrainingModule) -> str:
    counts = [(p.numel(), p.requires_grad) for p in module.trained.values()]
    total, trained = sum(n for n, _ in counts), sum(n for n, trains in counts if trains)
    return f"{total:,}" if trained == total else f"{total:,} ({trained:,} of them trained)"


def _tokens(dataset: WindowDataset) -> str:
    """Tokens of a sample by stream."""
    counts = {spec.name: _count(dataset, spec) for spec in dataset.specs}
    return ", ".join(f"{count:,} tokens of {name}" for name, count in counts.items())


def _count(dataset: WindowDataset, spec: StreamSpec) -> int:
    points = dataset.window.points(dataset.segments[0], spec)
    return math.prod(spec.token_shape(*points)) * len(dataset.views)


def _periods(dataset: WindowDataset, other: WindowDataset) -> str:
    """First and last date, and how many times lie in between; the names of the segments, too, where
    those of the other dataset have the same dates and other names."""
    segments: tuple[Segment, ...] = dataset.segments
    parts = f" in {len(segments)} parts" if len(segments) > 1 else ""
    times = sum(len(segment.times) for segment in segments)
    names, others = ({segment.name: None for segment in d.segments} for d in (dataset, other))
    which = f"{', '.join(names)}: " if _dates(dataset) == _dates(other) and names != others else ""
    step_hours = dataset.segments[0].step_hours
    return f"{which}{_dates(dataset)} ({times:,} times every {step_hours:g} h{parts})"


def _dates(dataset: WindowDataset) -> str:
    first, last = dataset.segments[0], dataset.segments[-1]
    return f"{first.calendar.show(first.times[0])} to {last.calendar.show(last.times[-1])}"

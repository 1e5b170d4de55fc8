"""`atmossl train`."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import OmegaConf

from atmossl.at_work import keeping, owned
from atmossl.atomic_files import write_atomically
from atmossl.build import build_data, build_module, build_trainer
from atmossl.commands.common import make_folder, plain
from atmossl.commands.run_description import banner, described
from atmossl.data.datamodule import WindowDataModule
from atmossl.inference.checkpoint import checkpoint_path, spec_to_dict
from atmossl.inference.out_of_training_warnings import seen_by_data
from atmossl.model.network import half_is_fast
from atmossl.process_lifetime import is_first_rank
from atmossl.progress import console_of_output, note
from atmossl.schema import TrainConfig, checked, device_for
from atmossl.training.checkpoint import KeepCheckpoints, note_once
from atmossl.training.curves import keep_metrics
from atmossl.training.keeping import BEST, renew_last
from atmossl.training.loggers import check_loggers, describe_run, finish_runs
from atmossl.training.module import TrainingModule
from atmossl.training.resume import (
    Start,
    check_same_run,
    check_same_statistics,
    newest_start,
    samples_seen,
    start_from,
)


@dataclass(frozen=True)
class Trained:
    """The result of a run: its last checkpoint, and the best value of the objective's monitor in
    any validation, or None. Lower is better: a monitor that should be high has its sign changed."""

    checkpoint: Path
    score: float | None


def train(values: Mapping[str, Any]) -> Trained:
    """Train as configured.

    Raises:
        ValueError: anything wrong with the configuration, before any work.
    """
    config, values = checked(TrainConfig, plain(values))
    _check_precision(config)
    check_loggers(config.logger.model_dump())
    first = is_first_rank(os.environ)
    lock = owned(config.paths.output, "paths.output", inside=True) if first else nullcontext()
    with lock, keeping("no step was taken; checkpoints of an earlier run stay as they were"):
        return _train(config, values)


def _train(config: TrainConfig, values: dict[str, Any]) -> Trained:
    output, checkpoints = config.paths.output, config.paths.output / "checkpoints"
    start = _start_of(config.resume, checkpoints)
    if config.resume is None and checkpoints.exists():
        raise ValueError(
            f"paths.output={output} holds a run; go on with resume=auto, or choose another folder"
        )
    if start is not None:
        _check_start(start, config, values)
    for name in config.warm_start.checkpoints if start is None else ():
        checkpoint_path(name)  # refuses those that are not there
    make_folder(output)
    datamodule, statistics = build_data(config)
    if start is not None:
        now = {data: moments.to_dict() for data, moments in statistics.items()}
        check_same_statistics(start.path, start.checkpoint_record["statistics"], now)
        datamodule.go_on(
            step=start.checkpoint_record["step"], samples=samples_seen(start.checkpoint_record)
        )
    module = build_module(
        config,
        statistics,
        values,
        step_hours=datamodule.step_hours,
        seen=seen_by_data(datamodule.train_set.segments),
        resumed=start is not None,
    )
    trainer = _trainer(config, values, module, datamodule, start)
    path = None if start is None else start.path
    trainer.fit(module, datamodule, ckpt_path=path, weights_only=True)
    finish_runs(trainer.loggers)
    last, curves = checkpoints / "last.ckpt", output / "curves"
    if trainer.is_global_zero:
        results = {"checkpoint": last, "curves": curves}
        text = "\n".join(f"{name}: {path}" for name, path in results.items() if path.exists())
        console_of_output().print(text)
        if trainer.should_stop and config.trainer.patience:
            note(
                f"ended at step {trainer.global_step} of {config.trainer.max_steps}; "
                f"{module.objective.monitor.key} was best at the step of {checkpoints / BEST} "
                f"(trainer.patience={config.trainer.patience})"
            )
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    (keep,) = (callback for callback in callbacks if isinstance(callback, KeepCheckpoints))
    cost = module.objective.monitor.cost
    return Trained(last, None if keep.best is None else cost(keep.best))


def _trainer(
    config: TrainConfig,
    values: dict[str, Any],
    module: TrainingModule,
    datamodule: WindowDataModule,
    start: Start | None,
) -> Trainer:
    """The trainer of a run whose folder is ready, once user and loggers are told what it is."""
    output, checkpoints = config.paths.output, config.paths.output / "checkpoints"
    first_step = 0 if start is None else start.checkpoint_record["step"]
    steps_left = first_step < config.trainer.max_steps
    if steps_left:
        keep_metrics(output)
    normaliser, monitor = datamodule.train_set.normaliser, module.objective.monitor
    trainer = build_trainer(config, normaliser, monitor, logs=steps_left)
    tell_warm_start(trainer, module.checkpoint_record["warm_start"], output)
    if not trainer.is_global_zero:
        return trainer
    write_yaml(values, output / "config.yaml")
    if start is not None:
        renew_last(checkpoints, start.path)
    if steps_left:
        console_of_output().print(banner(config, module, datamodule, trainer, first_step))
        description = described(values, module, module.checkpoint_record["statistics"])
        describe_run(trainer.loggers, description)
    return trainer


def write_yaml(values: Mapping[str, Any], path: Path) -> None:
    """Write plain values as YAML, atomically."""
    write_atomically(path, lambda partial: OmegaConf.save(OmegaConf.create(dict(values)), partial))


def tell_warm_start(trainer: Trainer, report: dict[str, list[str]], output: Path) -> None:
    """Print how many weights were loaded, grown, initialised and left; name them in a file. The
    first rank does it for all."""
    if not report or not trainer.is_global_zero:
        return
    path = output / "warm_start.yaml"
    write_yaml(report, path)
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in report.items())
    console_of_output().print(f"warm start: {counts}; see {path}")


def _start_of(resume: str | None, checkpoints: Path) -> Start | None:
    """The checkpoint to go on from; with `auto` the newest good one, or none of a new run."""
    if resume is None:
        return None
    if resume != "auto":
        try:
            path = checkpoint_path(resume)
        except ValueError as error:
            words = str(error).removeprefix(f"checkpoint={resume}")
            raise ValueError(f"resume={resume}{words}, or resume=auto") from error
        return start_from(path)
    start = newest_start(checkpoints)
    if start is not None and start.passed_over:
        note_once(f"resume=auto goes on from {start.path}: {'; '.join(start.passed_over)}")
    return start


def _check_start(start: Start, config: TrainConfig, values: Mapping[str, Any]) -> None:
    """Check that this run can continue from the checkpoint."""
    specs = [spec_to_dict(spec) for spec in config.specs]
    network = {"_target_": config.model.target, **config.model.plain_arguments}
    check_same_run(start.path, start.checkpoint_record, values, network, specs)
    if start.checkpoint_record["step"] >= config.trainer.max_steps:
        note_once(
            f"{start.path} has {start.checkpoint_record['step']} of trainer.max_steps="
            f"{config.trainer.max_steps} steps; nothing is left to train"
        )


def _check_precision(config: TrainConfig) -> None:
    """float16 needs a GPU; bfloat16 goes on any CPU, but on some not in reasonable time."""
    device, precision = device_for(config.trainer.accelerator), config.trainer.precision
    if device == "cpu" and precision == "16-mixed":
        raise ValueError("trainer.precision=16-mixed needs a GPU; valid here: 32-true, bf16-mixed")
    if precision == "bf16-mixed" and not half_is_fast(torch.device(device)):
        note(
            "trainer.precision=bf16-mixed on a CPU without bfloat16, which takes up to a hundred "
            "times as long as trainer.precision=32-true"
        )

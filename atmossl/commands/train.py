"""`atmossl train`."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning import Trainer
from omegaconf import OmegaConf
from rich.console import Console

from atmossl.build import build_data, build_module, build_trainer
from atmossl.checkpoint_files import newest_readable, read_record, write_atomically
from atmossl.commands.common import device_for, make_folder, note, plain
from atmossl.data.statistics import Normaliser
from atmossl.inference.checkpoint import read_checkpoint, spec_to_dict
from atmossl.model.linear import half_is_fast
from atmossl.schema import TrainConfig, parse
from atmossl.training.checkpoint import KeepCheckpoints
from atmossl.training.curves import keep_metrics
from atmossl.training.resume import check_same_run, check_same_statistics, samples_seen


@dataclass(frozen=True)
class Trained:
    """What a run ends with: its last checkpoint, and the lowest error over the first guess's that
    a validation saw, None without one."""

    checkpoint: Path
    score: float | None


def train(values: Mapping[str, Any]) -> Trained:
    """Train as configured.

    Raises:
        ValueError: anything wrong with the configuration, before any work.
    """
    values = plain(values)
    config: TrainConfig = parse(TrainConfig, values)
    _check_precision(config)
    output, checkpoints = config.paths.output, config.paths.output / "checkpoints"
    resume = _resume_from(config.resume, checkpoints)
    if config.resume is None and checkpoints.exists():
        raise ValueError(
            f"paths.output={output} holds a run; go on with resume=auto, or choose another folder"
        )
    before = None if resume is None else _record_of(resume, config, values)
    make_folder(output)
    datamodule, statistics = build_data(config)
    if resume is not None and before is not None:
        check_same_statistics(resume, before["statistics"], statistics.to_dict())
        datamodule.go_on(step=before["step"], samples=samples_seen(before))
    module = build_module(
        config,
        statistics,
        values,
        step_hours=datamodule.step_hours,
        resumed=resume is not None,
    )
    keep_metrics(output)
    trainer = build_trainer(config, Normaliser(statistics))
    tell_warm_start(trainer, module.record["warm_start"], output)
    OmegaConf.save(OmegaConf.create(values), output / "config.yaml")
    trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
    last = checkpoints / "last.ckpt"
    if trainer.is_global_zero:
        Console(markup=False).print(
            f"checkpoint: {last}\ncurves: {output / 'curves'}", highlight=False
        )
    callbacks: list[Any] = trainer.callbacks  # pyright: ignore[reportAttributeAccessIssue]
    (keep,) = (one for one in callbacks if isinstance(one, KeepCheckpoints))
    return Trained(last, keep.best)


def tell_warm_start(trainer: Trainer, report: dict[str, list[str]], output: Path) -> None:
    """Print how many weights were loaded, grown, initialised and left; name them in a file. The
    first rank does it for all."""
    if not report or not trainer.is_global_zero:
        return
    path = output / "warm_start.yaml"
    write_atomically(path, lambda partial: OmegaConf.save(OmegaConf.create(report), partial))
    counts = ", ".join(f"{len(names)} {kind}" for kind, names in report.items())
    Console(markup=False).print(f"warm start: {counts}; see {path}", highlight=False)


def _resume_from(resume: str | None, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; with `auto` the newest that can be read, or none."""
    if resume is None:
        return None
    if resume == "auto":
        return newest_readable(checkpoints)
    if "optimizer_states" not in read_checkpoint(resume):
        raise ValueError(
            f"resume={resume} holds weights alone; a run goes on from a step-N.ckpt of its own, "
            f"and a new one starts from weights with warm_start.checkpoints=[{resume}]"
        )
    return Path(resume)


def _record_of(resume: Path, config: TrainConfig, values: Mapping[str, Any]) -> dict[str, Any]:
    """The record of the checkpoint, which this run can go on from."""
    record = read_record(resume)
    specs = [spec_to_dict(spec) for spec in config.specs]
    check_same_run(resume, record, values, config.model.model_dump(), specs)
    if record["step"] >= config.trainer.max_steps:
        note(
            f"{resume} has {record['step']} of trainer.max_steps={config.trainer.max_steps} steps; "
            "nothing is left to train"
        )
    return record


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

"""What the commands do, once their configuration is composed."""

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from omegaconf import OmegaConf
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TimeRemainingColumn
from rich.table import Table

from atmossl.api import cautions, chosen_times
from atmossl.build import build_data, build_module, build_trainer
from atmossl.checkpoint_files import newest_readable, read_record, write_atomically
from atmossl.data.catalog import catalog_entry
from atmossl.data.companions import open_records, paired
from atmossl.data.segment import Segment
from atmossl.data.statistics import Normaliser
from atmossl.inference.calibration import Calibration, estimate_inflation
from atmossl.inference.checkpoint import (
    TrainedModel,
    load_checkpoint,
    read_checkpoint,
    spec_to_dict,
)
from atmossl.inference.predict import Predictor
from atmossl.inference.writer import check_output, write
from atmossl.masking.tasks import Task
from atmossl.preflight import advice, estimate
from atmossl.schema import EvaluateConfig, PredictConfig, TrainConfig, parse
from atmossl.training.checkpoint import KeepCheckpoints
from atmossl.training.curves import keep_metrics
from atmossl.training.resume import check_same_run, check_same_statistics
from atmossl.training.watch import matmul_rate


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
    values = {key: value for key, value in values.items() if key != "hydra"}
    config: TrainConfig = parse(TrainConfig, values)
    _check_precision(config)
    output, checkpoints = config.paths.output, config.paths.output / "checkpoints"
    resume = _resume_from(config.resume, checkpoints)
    if config.resume is None and checkpoints.exists():
        raise ValueError(
            f"paths.output={output} holds a run; go on with resume=auto, or choose another folder"
        )
    before = None if resume is None else read_record(resume)
    if resume is not None and before is not None:
        specs = [spec_to_dict(spec) for spec in config.specs]
        check_same_run(resume, before, _plain(values), config.model.model_dump(), specs)
    _make_folder(output)
    datamodule, statistics = build_data(config)
    if resume is not None and before is not None:
        check_same_statistics(resume, before["statistics"], statistics.to_dict())
    module = build_module(
        config,
        statistics,
        _plain(values),
        step_hours=datamodule.step_hours,
        resumed=resume is not None,
    )
    keep_metrics(output)
    trainer = build_trainer(config, Normaliser(statistics))
    tell_warm_start(trainer, module.record["warm_start"], output)
    OmegaConf.save(OmegaConf.create(_plain(values)), output / "config.yaml")
    trainer.fit(module, datamodule, ckpt_path=resume, weights_only=True)
    last = checkpoints / "last.ckpt"
    if trainer.is_global_zero:
        Console().print(f"checkpoint: {last}\ncurves: {output / 'curves'}", highlight=False)
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
    Console().print(f"warm start: {counts}; see {path}", highlight=False)


def _resume_from(resume: str | None, checkpoints: Path) -> Path | None:
    """The checkpoint to go on from; with `auto` the newest that can be read, or none."""
    if resume is None:
        return None
    if resume == "auto":
        return newest_readable(checkpoints)
    read_checkpoint(resume)
    return Path(resume)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as plain values; the key `hydra` belongs to one launch only."""
    return {key: value for key, value in values.items() if key != "hydra"}


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"paths.output={folder} cannot be written: {error.strerror}") from error


def _device(accelerator: str) -> str:
    if accelerator == "gpu" and not torch.cuda.is_available():
        raise ValueError("accelerator=gpu but no GPU is visible; valid here: auto, cpu")
    return "cuda" if accelerator != "cpu" and torch.cuda.is_available() else "cpu"


def _check_precision(config: TrainConfig) -> None:
    on_cpu = _device(config.trainer.accelerator) == "cpu"
    if on_cpu and config.trainer.precision == "16-mixed":
        raise ValueError("trainer.precision=16-mixed needs a GPU; valid here: 32-true, bf16-mixed")


def open_for(
    trained: TrainedModel,
    data: str | None,
    catalog: Path | None,
    split: Any,
    *,
    name: str | None = None,
    task: Task | None = None,
) -> tuple[Segment, ...]:
    """The segments of a split with the variables and levels of a checkpoint.

    name: of the only one that is wanted. task: which may fill missing values.
    Raises:
        ValueError: unknown entry or segment, or a store that lacks what the checkpoint needs.
    """
    records = open_records(trained.specs_for(task), data or trained.data, catalog, split)
    segments = paired(records)
    chosen = tuple(one for one in segments if one.is_called(name))
    if not chosen:
        have = sorted({one.name for one in segments})
        raise ValueError(f"segment={name} is not in split={split}; valid: {have}")
    return chosen


def predict(values: Mapping[str, Any]) -> Path:
    """Run one task for every chosen time and write a CF store; returns its path."""
    config: PredictConfig = parse(PredictConfig, values)
    check_output(config.output, resume=config.resume)
    predictor = _predictor(config)
    times = _times(config, predictor)
    for caution in cautions(predictor, times[0]):
        Console(stderr=True).print(
            f"note: this checkpoint was not trained for {caution}", highlight=False, soft_wrap=True
        )
    columns = ("{task.description}", BarColumn(), TaskProgressColumn(), TimeRemainingColumn())
    with Progress(*columns) as bar:
        shown = bar.add_task(f"{config.task.name}, {len(times)} times", total=len(times))
        write(
            predictor,
            times,
            config.output,
            names=config.layout,
            resume=config.resume,
            advance=lambda share: bar.advance(shown, share),
        )
    Console().print(f"prediction: {config.output}", highlight=False)
    return config.output


def _predictor(config: PredictConfig) -> Predictor:
    trained = load_checkpoint(config.checkpoint)
    task = config.task.sampler()
    first, *others = open_for(
        trained, config.data, config.catalog, config.split, name=config.segment, task=task
    )
    return Predictor(
        trained=trained,
        segment=first,
        others=tuple(others),
        task=task,
        overlap=config.overlap,
        tilings=config.tilings,
        batch_size=config.batch_size,
        device=_device(config.accelerator),
        seed=config.seed,
        fill_missing=config.missing == "fill",
    )


def _times(config: PredictConfig, predictor: Predictor) -> np.ndarray:
    times = None if config.init_time == "all" else config.init_time
    return chosen_times(predictor, times, config.every)


def calibrate(values: Mapping[str, Any]) -> Path:
    """Measure how much a task's spread lacks on held-out dates, and write a checkpoint that
    inflates it; returns its path."""
    config: PredictConfig = parse(PredictConfig, values)
    if config.output.suffix != ".ckpt" or config.output.exists():
        raise ValueError(f"output={config.output} must end in .ckpt and not exist")
    if config.split == "test":
        raise ValueError("split=test is kept for scores; calibrate on split=validation or train")
    predictor = _predictor(config)
    task = predictor.task.one_pass()
    record = Calibration(predictor.trained.record, task).without_own()
    predictor = replace(predictor, task=task, trained=replace(predictor.trained, record=record))
    times = predictor.with_truth(_times(config, predictor))
    if len(times) == 0:
        raise ValueError(f"init_time={config.init_time}: no truth for what the task writes")
    found = estimate_inflation(predictor, times)
    contents = read_checkpoint(config.checkpoint)
    record = Calibration(contents["atmossl"], task).replaced(found)
    write_atomically(config.output, lambda path: torch.save({**contents, "atmossl": record}, path))
    for name, factors in found.factors.items():
        text = ", ".join(f"{value:.3f}" for value in factors.mean(axis=1))
        Console().print(f"{name}: spread x {text} by lead time", highlight=False)
    Console().print(f"checkpoint: {config.output}", highlight=False)
    return config.output


def evaluate(values: Mapping[str, Any], command: str = "atmossl evaluate") -> Path:
    """Score tasks or forecast stores on held-out dates; returns the report's folder.

    command: the line that the report gives for making it again.
    """
    from atmossl.evaluation.report.tables import mean_over_levels, print_summary, summarise
    from atmossl.evaluation.report.write import write_report
    from atmossl.scorecard import compare_forecasts, provenance_of, score_tasks

    config: EvaluateConfig = parse(EvaluateConfig, values)
    if config.output.exists():
        raise ValueError(f"output={config.output} exists; choose another folder or remove it")
    partial = config.output.with_name(f".{config.output.name}.{os.getpid()}")
    _make_folder(partial)
    try:
        trained = load_checkpoint(config.checkpoint)
        if config.forecasts:
            entry = catalog_entry(config.data or trained.data, config.catalog)
            reports = [compare_forecasts(config, entry)]
        else:
            test = open_for(trained, config.data, config.catalog, config.split)
            training = open_for(trained, config.data, config.catalog, "train")
            gappy = sorted({name for segment in test for name in segment.may_miss})
            if config.ridge and gappy:
                Console(stderr=True).print(
                    f"note: no ridge regression of {gappy}, which may have missing values",
                    markup=False,
                )
            others = sorted({s.data for s in trained.specs if s.role == "predict"} - {""})
            if others:
                Console(stderr=True).print(
                    f"note: streams with data={others} are not scored here; predict writes them "
                    "into groups, which evaluate forecasts=[OUTPUT.zarr/GROUP] data=GROUP scores",
                    markup=False,
                    soft_wrap=True,
                )
            reports = score_tasks(config, trained, test, training, _device(config.accelerator))
        write_report(reports, provenance_of(config, trained, command), partial)
        partial.replace(config.output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    console = Console(width=max(120, Console().width))
    for report in reports:
        summary = mean_over_levels(summarise(report.table, model_name=report.model_name))
        print_summary(summary, console, title="RMSE ratios and scores, mean over levels")
    console.print(f"report: {config.output / 'index.html'}", highlight=False)
    return config.output


def show_checkpoint(checkpoint: str) -> None:
    """Print what is in a checkpoint."""
    trained = load_checkpoint(checkpoint)
    record = trained.record
    table = Table("what", "value", show_header=False)
    count = sum(parameter.numel() for parameter in trained.model.parameters())
    rows = {
        "written by": f"atmossl {record['atmossl']}, torch {record['torch']}",
        "optimiser steps": str(record["step"]),
        "parameters": f"{count:,}",
        "window (time, lat, lon)": str(tuple(record["window"].values())),
        "trained on": f"{record['data']}: {record['statistics']['period']}",
        "digest": trained.digest,
        **{f"model.{key}": str(value) for key, value in record["model"].items()},
    }
    for spec in trained.specs:
        rows[f"stream {spec.name}"] = f"{', '.join(spec.variables)} at {list(spec.levels)} hPa"
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)


def show_estimate(values: Mapping[str, Any], memory_gib: float | None, *, check: bool) -> None:
    """Print what a training run will cost on each device.

    memory_gib: of one device; None takes the GPU that is visible here, or this machine's.
    Raises:
        ValueError: `check`, and the run does not fit; with advice.
    """
    config: TrainConfig = parse(TrainConfig, _plain(values))
    wanted, here = config.trainer.accelerator, torch.cuda.is_available()
    on_host = wanted == "cpu" or (wanted == "auto" and not here and memory_gib is None)
    found, rate = estimate(config, on_host=on_host), _matmul_rate(config)
    cost, memory = found.cost, memory_gib or _device_memory_gib()
    table = Table("what", "value", show_header=False)
    rows = {f"parameters of {part}": f"{count:,}" for part, count in cost.parameters.items()}
    rows["parameters"] = f"{sum(cost.parameters.values()):,}"
    rows |= {f"tokens per sample, {name}": f"{count:,}" for name, count in found.tokens.items()}
    rows["hidden share of tokens"] = f"{found.hidden_share:.2f}"
    samples = config.trainer.accumulate * found.batch_size * found.num_devices
    rows["samples per step"] = f"{samples} on {found.num_devices} devices"
    rows["FLOPs per sample"] = f"{cost.flops / found.batch_size:.4g}"
    rows["FLOPs per step"] = f"{cost.flops / found.batch_size * samples:.4g}"
    kinds = {
        "weights": cost.weights,
        "averaged weights": cost.averaged,
        "optimiser": cost.optimizer,
        "gradients": cost.gradients,
        "activations": cost.activations,
    }
    rows |= {f"{kind}, unsharded": _mib(size) for kind, size in kinds.items()}
    rows[f"tensors per device, {config.trainer.strategy}"] = _mib(found.device_bytes)
    what = "process with its libraries" if on_host else "device with its runtime"
    rows[f"memory of a {what}"] = _mib(found.process_bytes)
    rows["there is"] = f"{memory:.1f} GiB"
    speed = 0.5 * rate / cost.flops * found.batch_size
    rows["samples/s per device at half this device's rate"] = f"{speed:.3g}"
    rows["data rate per device then"] = f"{speed * found.bytes_per_sample / 2**20:.3g} MiB/s"
    for key, value in rows.items():
        table.add_row(key, value)
    Console().print(table)
    if found.fits(memory):
        return
    message = f"needs {_mib(found.process_bytes)} of {memory:.1f} GiB per device; try "
    message += advice(config, found, memory)
    if check:
        raise ValueError(message)
    Console().print(f"does not fit: {message}", markup=False, highlight=False)


def _mib(size: int) -> str:
    return f"{size / 2**20:,.1f} MiB"


def _matmul_rate(config: TrainConfig) -> float:
    device = torch.device(
        _device(config.trainer.accelerator) if torch.cuda.is_available() else "cpu"
    )
    mixed = config.trainer.precision != "32-true"
    return matmul_rate(device, torch.bfloat16 if mixed else torch.float32)


def _device_memory_gib() -> float:
    if torch.cuda.is_available():
        return torch.cuda.get_device_properties(0).total_memory / 2**30
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30

"""`atmossl predict` and `atmossl calibrate`: write a prediction, or a checkpoint with calibrated
spread."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from atmossl.at_work import keeping, owned
from atmossl.atomic_files import check_room, remove, size_on_disk
from atmossl.checkpoint_files import write_output
from atmossl.inference.calibration import (
    Calibration,
    CalibrationFactors,
    check_calibrated,
    estimate_factors,
    scales_of,
)
from atmossl.inference.checkpoint import checkpoint_path, open_checkpoint, read_checkpoint
from atmossl.inference.out_of_training_warnings import out_of_training_warnings
from atmossl.inference.plan import Options, Plan, check_draws, chosen_times, plan_prediction
from atmossl.inference.tiles import predict_parts
from atmossl.inference.writer import check_output, check_request, partial_of, write
from atmossl.progress import (
    EarlyEstimate,
    NoRoomError,
    check_free,
    console_of_output,
    counted,
    note,
    size_text,
    telling,
)
from atmossl.schema import CalibrateConfig, PredictConfig, device_for, parse, trained_sampler


def predict(values: Mapping[str, Any]) -> Path:
    """Run one task for every chosen time and write a CF store; returns its path."""
    config: PredictConfig = parse(PredictConfig, values)
    with owned(config.output, "output"), keeping("nothing was predicted"):
        check_output(config.output, resume=config.resume)
        trained, segments = open_checkpoint(config, config.task)
        options = _options(config, fill_missing=config.missing == "fill")
        plan = plan_prediction(trained, config.task, segments, options)
        times = chosen_times(plan, config.dates, config.every)
        size = check_request(plan, times, config.output, config.layout)
        note_out_of_training(plan, times)
        with _estimated(config, plan, times, size) as advance:
            write(
                plan, times, config.output,
                names=config.layout, resume=config.resume, advance=advance,
            )  # fmt: skip
    console_of_output().print(
        f"checkpoint: {config.checkpoint} (digest {plan.trained.digest})\n"
        f"prediction: {config.output}"
    )
    return config.output


def note_out_of_training(plan: Plan, times: np.ndarray, printed: set[str] | None = None) -> None:
    """Note what the checkpoint was not trained for. printed: notes that were printed before, and
    are not repeated."""
    printed = set() if printed is None else printed
    sampler = trained_sampler(plan.trained.checkpoint_record, plan.trained.plugins)
    for caution in out_of_training_warnings(plan, times, sampler):
        if caution not in printed:
            printed.add(caution)
            note(f"this checkpoint was not trained for {caution}")


@contextmanager
def _estimated(
    config: PredictConfig, plan: Plan, times: np.ndarray, size: int
) -> Iterator[EarlyEstimate]:
    """A context for the writing of a prediction, which tells how far it is and, before a long one,
    what it will take. size: bytes of the fields.

    Raises:
        NoRoomError: the disk cannot hold it; nothing stays of what this call has begun.
    """
    output, passes = config.output, plan.steps.num_passes
    at_end = size if output.suffix == ".nc" else 0  # uncompressed, of the store that was compressed
    smaller = "choose fewer times (init_time=START/END/STEP, every=N) or members, or make room"
    check_free(output, at_end, smaller)
    if len(times) * passes > 1:
        console_of_output().print(_extent(plan, times, size))
    partial, parts = partial_of(output), passes if passes > 1 else len(plan.tiles.rows())
    with telling(f"{config.task.name}, {counted(len(times), 'time')}", len(times)) as advance:
        try:
            yield EarlyEstimate(
                advance, output, len(times), parts, lambda: size_on_disk(partial), smaller,
                first_differs=passes > 1, at_end=at_end,
            )  # fmt: skip
        except NoRoomError:
            if not config.resume:
                remove(partial)
                remove(partial.with_suffix(".json"))
            raise


def _extent(plan: Plan, times: np.ndarray, size: int) -> str:
    """How much will be predicted, in words."""
    show, passes = plan.segment.calendar.show, plan.steps.num_passes
    each = f", {passes} passes each" if passes > 1 else ""
    return (
        f"{len(times)} times from {show(times[0])} to {show(times[-1])}{each}: some "
        f"{size_text(size)} before compression; init_time=START/END/STEP or every=N chooses fewer"
    )


def _options(config: PredictConfig | CalibrateConfig, *, fill_missing: bool = False) -> Options:
    return Options(
        overlap=config.overlap,
        tilings=config.tilings,
        batch_size=config.batch_size,
        device=device_for(config.accelerator),
        seed=config.seed,
        members=config.members,
        fill_missing=fill_missing,
    )


def calibrate(values: Mapping[str, Any]) -> Path:
    """Measure how much the spread of a task and the waves of its mean lack on held-out dates, and
    write a checkpoint that scales them accordingly; returns the path of the checkpoint."""
    config: CalibrateConfig = parse(CalibrateConfig, values)
    if config.split == "test":
        raise ValueError("split=test is kept for scores; calibrate on split=validation or train")
    with owned(config.output, "output"), keeping("nothing is kept"):
        if config.output.suffix != ".ckpt" or config.output.exists():
            raise ValueError(f"output={config.output} must end in .ckpt and not exist")
        check_calibrated(config.task)
        found = _calibrate(config)
    for of, by_variable in (("spread", found.spread), ("mean", found.mean)):
        for name, factors in by_variable.items():
            for band, by_step in zip(found.bands(), factors.mean(axis=(0, -1)), strict=True):
                text = ", ".join(f"{value:.3f}" for value in by_step)
                leads = " by lead time" if len(found.hours) > 1 else ""
                console_of_output().print(f"{name}, {band}: {of} x {text}{leads}")
    console_of_output().print(f"checkpoint: {config.output}")
    return config.output


def _calibrate(config: CalibrateConfig) -> CalibrationFactors:
    check_room(config.output, size_on_disk(checkpoint_path(config.checkpoint)))
    trained, segments = open_checkpoint(config, config.task)
    check_draws(trained, config.members)
    requested = plan_prediction(trained, config.task, segments, _options(config))
    task = requested.task.one_pass()
    checkpoint_record = Calibration(requested.trained.checkpoint_record, task).without_own()
    uncalibrated = replace(requested.trained, checkpoint_record=checkpoint_record)
    plan = plan_prediction(uncalibrated, task, requested.segments, requested.options)
    times = plan.with_truth(chosen_times(plan, config.dates, config.every))
    if len(times) == 0:
        raise ValueError(f"init_time={config.init_time}: no truth for what the task writes")
    parts = predict_parts(plan, list(times))
    edges = config.scales_deg
    if edges is None:
        edges = scales_of(plan.grid) if plan.trained.model.any_member else ()
    factors = estimate_factors(plan, times, parts, edges)
    contents = read_checkpoint(config.checkpoint)
    checkpoint_record = Calibration(contents["atmossl"], task).replaced(factors)
    write_output({**contents, "atmossl": checkpoint_record}, config.output)
    return factors

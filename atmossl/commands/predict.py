"""`atmossl predict`: write a prediction."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from atmossl.at_work import keeping, owned
from atmossl.atomic_files import remove, size_on_disk
from atmossl.inference.checkpoint import open_checkpoint
from atmossl.inference.out_of_training_warnings import out_of_training_warnings
from atmossl.inference.plan import Options, Plan, chosen_times, plan_prediction
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
        options = options_of(config, fill_missing=config.missing == "fill")
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


def options_of(config: PredictConfig | CalibrateConfig, *, fill_missing: bool = False) -> Options:
    """How a prediction is computed, by the settings of a command."""
    return Options(
        overlap=config.overlap,
        tilings=config.tilings,
        batch_size=config.batch_size,
        device=device_for(config.accelerator),
        seed=config.seed,
        members=config.members,
        fill_missing=fill_missing,
    )

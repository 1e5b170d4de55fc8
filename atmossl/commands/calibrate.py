"""`atmossl calibrate`: write a checkpoint whose ensembles have the spread of their errors."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from atmossl.at_work import keeping, owned
from atmossl.atomic_files import check_room, size_on_disk
from atmossl.checkpoint_files import write_output
from atmossl.commands.predict import options_of
from atmossl.inference.calibration import Calibration, CalibrationFactors
from atmossl.inference.calibration_fit import (
    Split,
    check_calibrated,
    estimate_factors,
    estimate_rollout,
    scales_of,
)
from atmossl.inference.checkpoint import checkpoint_path, open_checkpoint, read_checkpoint
from atmossl.inference.plan import BlendedPart, Plan, check_draws, chosen_times, plan_prediction
from atmossl.inference.tiles import blended, predict_parts
from atmossl.progress import console_of_output, counted, telling
from atmossl.schema import CalibrateConfig, parse

_MAX_ROWS = 30  # of the printed table
_RANGES = 3  # of bands, in the printed table


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
        factors = _calibrate(config)
    console = console_of_output()
    console.print(
        f"{config.task.name}: factors {factors.described()}; median (smallest-largest) over "
        "levels, lead times, bands and zones"
    )
    console.print(factors_table(factors))
    console.print(f"checkpoint, with all factors in its record: {config.output}")
    return config.output


def _calibrate(config: CalibrateConfig) -> CalibrationFactors:
    check_room(config.output, size_on_disk(checkpoint_path(config.checkpoint)))
    trained, segments = open_checkpoint(config, config.task)
    check_draws(trained, config.members)
    requested = plan_prediction(trained, config.task, segments, options_of(config))
    task = requested.task
    checkpoint_record = Calibration(requested.trained.checkpoint_record, task).without_own()
    uncalibrated = replace(requested.trained, checkpoint_record=checkpoint_record)
    edges = config.scales_deg
    if edges is None:
        edges = scales_of(requested.grid) if requested.trained.model.any_member else ()
    options = replace(requested.options, all_rows=Split.of(requested, edges).along_lat)
    plan = plan_prediction(uncalibrated, task, requested.segments, options)
    times = plan.with_truth(chosen_times(plan, config.dates, config.every))
    if len(times) == 0:
        raise ValueError(f"init_time={config.init_time}: no truth for what the task writes")
    factors = _estimated(plan, times, edges)
    contents = read_checkpoint(config.checkpoint)
    checkpoint_record = Calibration(contents["atmossl"], task).replaced(factors)
    write_output({**contents, "atmossl": checkpoint_record}, config.output)
    return factors


def _estimated(plan: Plan, times: np.ndarray, edges: tuple[float, ...]) -> CalibrationFactors:
    """The factors of one pass or of all passes of a rollout; the output tells how far it is."""
    passes, what = plan.steps.num_passes, f"{plan.task.name}, {counted(len(times), 'date')}"
    if passes > 1:
        with telling(f"{what}, {passes} passes each", len(times) * passes) as advance:
            return estimate_rollout(plan, times, blended, edges, advance)
    with telling(what, len(times)) as advance:

        def parts() -> Iterator[BlendedPart]:
            for part in predict_parts(plan, list(times)):
                yield part
                advance(int(part.completes))

        return estimate_factors(plan, times, parts(), edges)


def factors_table(factors: CalibrationFactors) -> Table:
    """For every variable and some ranges of waves the median of the factors over levels, lead
    times, bands and zones, with the smallest and the largest; of a rollout for the first pass and
    the last one. At most 30 rows: of many variables the ranges are one, then the last are left
    out."""
    passes = {1: factors}
    if factors.later:
        passes[1 + len(factors.later)] = factors.later[-1]
    num_bands, variables = len(factors.edges) + 1, [*factors.spread]
    num_ranges = min(_RANGES, num_bands)
    if len(variables) * num_ranges * len(passes) > _MAX_ROWS:
        num_ranges = 1
    table = Table(
        "variable",
        f"waves, {factors.unit}",
        "pass",
        "spread x",
        "mean x",
        box=None,
        pad_edge=False,
    )
    table.columns[2].justify = "right"
    for name in variables[: _MAX_ROWS // (num_ranges * len(passes))]:
        for bands in np.array_split(np.arange(num_bands), num_ranges):
            for number, of_pass in passes.items():
                waves = of_pass.waves(bands[0], bands[-1])
                spread, mean = (
                    _summary(by_variable[name][:, bands]) if name in by_variable else "1"
                    for by_variable in (of_pass.spread, of_pass.mean)
                )
                table.add_row(name, waves, str(number), spread, mean)
    return table


def _summary(values: np.ndarray) -> str:
    """Median, smallest and largest."""
    return f"{np.median(values):.2f} ({values.min():.2f}-{values.max():.2f})"

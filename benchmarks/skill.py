"""Skill of the reference experiment on the held-out test run of the sample.

python -m benchmarks.skill                        # trains first: hours on two cores
python -m benchmarks.skill --checkpoint default   # only scores
python -m benchmarks.skill --streams              # trains the checkpoint `default_streams`
"""

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from atmossl.cli import main as atmossl
from benchmarks.report import finish

STAGES = ("reference", "reference_second", "reference_third", "reference_fourth", "reference_fifth")
AFTER_MEAN = 4  # the stage that starts from the mean of the two before
CALIBRATED = ("forecast", "hindcast", "temporal_interpolation", "downscaling", "inpainting")


def required_figures(report_figures: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's keys from the report's: means over lead times where a task has several."""
    leads = [
        key for key in report_figures if key.startswith("forecast_") and key.endswith("h_vs_ridge")
    ]
    spreads = [key for key in report_figures if key.startswith("spread_skill_forecast")]
    chosen = {
        key: report_figures[key]
        for key in (
            "forecast_6h_vs_persistence",
            "forecast_12h_vs_persistence",
            "temporal_interpolation_vs_linear",
            "downscaling_vs_bicubic",
            *leads,
            "temporal_interpolation_vs_ridge",
            "downscaling_vs_ridge",
            "spread_skill_temporal_interpolation",
            "spread_skill_downscaling",
        )
        if key in report_figures
    }
    if leads:
        chosen["forecast_vs_ridge"] = round(
            sum(report_figures[key] for key in leads) / len(leads), 4
        )
    if spreads:
        mean = sum(report_figures[key] for key in spreads) / len(spreads)
        chosen["spread_skill_forecast"] = round(mean, 4)
    return chosen


def run(*arguments: str) -> None:
    if atmossl(arguments) != 0:
        raise SystemExit(f"failed: atmossl {' '.join(arguments)}")


def train(folder: Path, overrides: list[str]) -> str:
    """The stages of the reference experiment, each going on where it stopped; the fourth starts
    from the mean of the two before. Of the last two the mean, the last counting twice, calibrated
    on the validation run; returns that checkpoint."""
    mean = folder / "mean.ckpt"
    start, stages = "", []
    for number, experiment in enumerate(STAGES, start=1):
        if number == AFTER_MEAN and not mean.exists():
            run("export", f"checkpoint={','.join(stages[-2:])}", f"output={mean}")
        start = str(mean) if number == AFTER_MEAN else start
        options = [f"warm_start.checkpoints=[{start}]"] if start else []
        output = folder / str(number)
        run(
            "train", f"experiment={experiment}", f"paths.output={output}", *options, "resume=auto",
            *overrides,
        )  # fmt: skip
        start = str(output / "checkpoints" / "last.ckpt")
        stages.append(start)
    mixed = ",".join((*stages[-2:], stages[-1]))
    return calibrated(mixed, folder / "reference.ckpt", CALIBRATED)


def train_streams(folder: Path, overrides: list[str]) -> str:
    """The experiment with two streams, as the package's checkpoint `default_streams`."""
    output = folder / "streams"
    options = [f"paths.output={output}", "resume=auto", *overrides]
    run("train", "experiment=reference_streams", *options)
    last = str(output / "checkpoints" / "last.ckpt")
    return calibrated(last, folder / "reference_streams.ckpt", (*CALIBRATED, "cross_variable"))


def calibrated(checkpoint: str, finished: Path, tasks: Sequence[str]) -> str:
    """Export a checkpoint, calibrated for some tasks, unless that is there already; its path."""
    if finished.exists():
        return str(finished)
    with tempfile.TemporaryDirectory(dir=finished.parent) as temporary:
        current = str(Path(temporary) / "exported.ckpt")
        run("export", f"checkpoint={checkpoint}", f"output={current}")
        for task in tasks:
            given = (f"task={task}", f"checkpoint={current}", "split=validation", "every=12")
            current = str(Path(temporary) / f"{task}.ckpt")
            run("calibrate", *given, f"output={current}")
        Path(current).replace(finished)
    return str(finished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="score this one instead of training; or `default`")
    parser.add_argument(
        "--streams", action="store_true", help="train the checkpoint with two streams instead"
    )
    parser.add_argument("--every", type=int, default=1, help="score every n-th date")
    parser.add_argument("overrides", nargs="*", help="key=value for the training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            stages = train_streams if arguments.streams else train
            checkpoint = stages(Path("runs/benchmark_skill"), arguments.overrides)
        report = Path(folder) / "report"
        run("evaluate", f"checkpoint={checkpoint}", f"output={report}", f"every={arguments.every}")
        report_figures = json.loads((report / "figures.json").read_text())
    figures = {"every": arguments.every, **required_figures(report_figures)}
    figures["per_variable"] = {
        name: required_figures(values) for name, values in report_figures["per_variable"].items()
    }
    finish("skill_streams" if arguments.streams else "skill", figures)


if __name__ == "__main__":
    main()

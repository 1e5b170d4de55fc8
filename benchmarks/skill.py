"""Skill of the reference experiment on the held-out test run of the sample.

python -m benchmarks.skill                        # trains first: hours on two cores
python -m benchmarks.skill --checkpoint default   # only scores
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

from atmossl.cli import main as atmossl
from benchmarks.report import finish

CALIBRATED = ("forecast", "hindcast", "temporal_interpolation", "downscaling", "inpainting")


def required_figures(found: dict[str, Any]) -> dict[str, Any]:
    """The benchmark's keys from the report's: means over lead times where a task has several."""
    leads = [key for key in found if key.startswith("forecast_") and key.endswith("h_vs_ridge")]
    spreads = [key for key in found if key.startswith("spread_skill_forecast")]
    chosen = {
        key: found[key]
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
        if key in found
    }
    if leads:
        chosen["forecast_vs_ridge"] = round(sum(found[key] for key in leads) / len(leads), 4)
    if spreads:
        mean = sum(found[key] for key in spreads) / len(spreads)
        chosen["spread_skill_forecast"] = round(mean, 4)
    return chosen


def run(*arguments: str) -> None:
    if atmossl(arguments) != 0:
        raise SystemExit(f"failed: atmossl {' '.join(arguments)}")


def train(folder: Path, overrides: list[str]) -> str:
    """The three stages of the reference experiment, each going on where it stopped, and the mean
    of the last two, its spread calibrated on the validation run; returns that checkpoint."""
    stages = [str(folder / stage / "checkpoints" / "last.ckpt") for stage in ("1", "2", "3")]
    for number, experiment in enumerate(("reference", "reference_second", "reference_third")):
        options = [f"experiment={experiment}", f"paths.output={folder / str(number + 1)}"]
        if number:
            options.append(f"warm_start.checkpoints=[{stages[number - 1]}]")
        run("train", *options, "resume=auto", *overrides)
    finished = folder / "reference.ckpt"
    if finished.exists():
        return str(finished)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        current = str(Path(temporary) / "mean.ckpt")
        run("export", f"checkpoint={stages[1]},{stages[2]}", f"output={current}")
        for task in CALIBRATED:
            given = (f"task={task}", f"checkpoint={current}", "split=validation", "every=4")
            current = str(Path(temporary) / f"{task}.ckpt")
            run("calibrate", *given, f"output={current}")
        Path(current).replace(finished)
    return str(finished)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", help="score this one instead of training; or `default`")
    parser.add_argument("--every", type=int, default=1, help="score every n-th date")
    parser.add_argument("overrides", nargs="*", help="key=value for the training")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = arguments.checkpoint
        if checkpoint is None:
            checkpoint = train(Path("runs/benchmark_skill"), arguments.overrides)
        report = Path(folder) / "report"
        run("evaluate", f"checkpoint={checkpoint}", f"output={report}", f"every={arguments.every}")
        found = json.loads((report / "figures.json").read_text())
    figures = required_figures(found)
    figures["per_variable"] = {
        name: required_figures(values) for name, values in found["per_variable"].items()
    }
    finish("skill", figures)


if __name__ == "__main__":
    main()

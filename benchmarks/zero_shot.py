"""Every task against every baseline on the sample's held-out run, and against specialists.

python -m benchmarks.zero_shot --checkpoint default             # only scores: minutes
python -m benchmarks.zero_shot --checkpoint PATH --specialists  # trains and scores them, too

With `--checkpoint default`, what the reference checkpoint cannot be asked is asked of the other one
of the package, `default_streams`, whose digest then stands beside the task's figures.

python -m benchmarks.zero_shot --examples 0 1 2                  # in-context examples alone
python -m benchmarks.zero_shot --examples 0 1 2 --task cross_variable --checkpoint default_streams

With `--examples` nothing else is scored, and the figures are kept as `zero_shot_examples`, those of
cross_variable as `zero_shot_examples_cross_variable`. `TASK_examples_K_over_0`: RMSE of the task
with K whole steps shown before the one that is written, over that without; root of the ratio of
mean squares, each variable and level in units of its mean without examples, and its interval
(block bootstrap over the same dates). `trained_with_examples`: whether the masks of the
checkpoint's training had such windows.

A specialist has the checkpoint's size and step budget and is trained with one task's mask alone.
That takes as long as the checkpoint's own training, for each task. Its progress is on disk, under
--runs, and the same command goes on where it stopped; specialists that are finished are only
scored. Every score has its own folder there and is not made twice.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import xarray as xr

import atmossl
from atmossl.api import find_task
from atmossl.cli import compose_config
from atmossl.commands.evaluate import evaluate
from atmossl.commands.train import train
from atmossl.evaluation.verify import rows_where
from atmossl.inference.checkpoint import load_checkpoint, open_for
from atmossl.inference.plan import Options, plan_prediction
from atmossl.inference.tiles import first_view
from atmossl.renamed_keys import renamed
from atmossl.schema import StoreChoice
from benchmarks.finetune import fields_of, ratio, square_error
from benchmarks.report import finish

TASKS: dict[str, dict[str, Any]] = {
    "forecast": {"lead_time": "12h"},
    "hindcast": {"lead_time": "12h"},
    "temporal_interpolation": {"hidden_time": "6h"},
    "downscaling": {"factor": 4},
    "inpainting": {"boxes": [[20.0, 50.0, 120.0, 170.0], [-50.0, -20.0, 200.0, 250.0]]},
    "cross_variable": {"variables": ["specific_humidity"]},
    "combined": {
        "parts": [
            {"_target_": "forecast", "lead_time": "12h"},
            {"_target_": "inpainting", "boxes": [[20.0, 50.0, 120.0, 170.0]]},
        ]
    },
}
_WITH_EXAMPLES = ("downscaling", "cross_variable")  # tasks that --examples can show steps for
STREAMS = "default_streams"  # hides humidity, which the reference checkpoint cannot
# The mask that a specialist of each task is trained with.
SPECIALISTS: dict[str, dict[str, Any]] = {
    "forecast": {"_target_": "forecast", "lead_time": "12h"},
    "temporal_interpolation": {"_target_": "temporal_interpolation", "hidden_time": "6h"},
    "downscaling": {"_target_": "downscaling", "factor": 4},
    "inpainting": {
        "_target_": "atmossl.masking.places.Inpainting",
        "regions": [
            dict(
                zip(("south", "north", "west", "east"), box, strict=True),
                _target_="atmossl.masking.places.LatLonBox",
            )
            for box in TASKS["inpainting"]["boxes"]
        ],
    },
}


def score(checkpoint: str, tasks: list[str], output: Path, arguments: argparse.Namespace) -> Path:
    """A report of some tasks, unless it is there already."""
    if output.exists():
        return output
    options = [
        f"checkpoint={checkpoint}",
        f"output={output}",
        f"every={arguments.every}",
        f"ridge={str(arguments.ridge).lower()}",
    ]
    values = compose_config("evaluate", options)
    chosen = [{"_target_": name, **TASKS[name]} for name in tasks]
    return evaluate(values | {"tasks": chosen}, f"python -m benchmarks.zero_shot ({output})")


def specialist_values(
    task: str, record: dict[str, Any], folder: Path, *, generalist: str | None
) -> dict[str, Any]:
    """The configuration of a run on one task's mask, as a checkpoint was trained; from the
    generalist's weights for a tenth of the budget, if it is given."""
    values = _merged(compose_config("train", ["paths.output=_"]), renamed(record))
    values |= {
        "masking": SPECIALISTS[task],
        "tasks": [{"_target_": task, **TASKS[task]}],
        "paths": {"output": str(folder)},
        "resume": "auto",
    }
    values["warm_start"] |= {"checkpoints": [], "rename": {}}
    if generalist is not None:
        steps = max(10, values["trainer"]["max_steps"] // 10)
        warmup = min(values["optimizer"]["warmup_steps"], steps // 10)
        values["trainer"] |= {"max_steps": steps, "validation_interval": steps}
        values["optimizer"] |= {"warmup_steps": warmup}
        values["warm_start"]["checkpoints"] = [generalist]
    return values


def train_specialist(task: str, checkpoint: str, folder: Path, *, tuned: bool) -> str:
    """Train, or go on training where it stopped; returns the path of the result."""
    record = load_checkpoint(checkpoint).checkpoint_record["config"]
    generalist = checkpoint if tuned else None
    return str(train(specialist_values(task, record, folder, generalist=generalist)).checkpoint)


def _merged(defaults: dict[str, Any], record: dict[str, Any]) -> dict[str, Any]:
    """The record of an older version with today's keys."""
    nested = {
        key: _merged(defaults[key], value)
        for key, value in record.items()
        if isinstance(value, dict) and isinstance(defaults.get(key), dict) and key != "stream"
    }
    return {**defaults, **record, **nested}


def refusals(checkpoint: str) -> dict[str, str]:
    """Why a task cannot be asked of a checkpoint, for those that cannot."""
    trained, reasons = load_checkpoint(checkpoint), {}
    (segment,) = open_for(trained, StoreChoice(), "test")
    for name, choices in TASKS.items():
        task = find_task({"_target_": name, **choices}, {})
        options = Options(overlap=0.5, batch_size=1, device="cpu")
        try:
            plan = plan_prediction(trained, task, [segment], options)
            first_view(plan, plan.possible_times()[0])
        except ValueError as error:
            reasons[name] = str(error)
    return reasons


def figures_of_refused(refused: dict[str, str], arguments: argparse.Namespace) -> dict[str, Any]:
    """Those of the package's checkpoint with several streams in place of the reference one, as far
    as it goes; why there are none otherwise."""
    figures: dict[str, Any] = {}
    if arguments.checkpoint == "default" and refused:
        still = refusals(STREAMS)
        tasks = [task for task in refused if task not in still]
        refused = {task: reason for task, reason in refused.items() if task in still}
        digest = load_checkpoint(STREAMS).digest
        report = score(STREAMS, tasks, arguments.runs / digest / report_name(arguments), arguments)
        report_figures = json.loads((report / "figures.json").read_text())
        for task in tasks:
            figures |= {**against_baselines(report_figures, task), f"{task}_checkpoint": digest}
    for task, reason in refused.items():
        figures |= {f"{task}_vs_best_baseline": None, f"{task}_reason": reason}
    return figures


def report_name(arguments: argparse.Namespace) -> str:
    return f"report-every{arguments.every}" + ("" if arguments.ridge else "-noridge")


def errors(report: Path, task: str) -> pd.Series:
    """RMSE on the globe by variable, level and lead time."""
    table = pd.read_csv(report / "scores.csv")
    labels = {"task": task, "source": "model", "score": "rmse", "region": "global"}
    chosen = rows_where(table, season="all", **labels)
    keys = ["variable", "level", "lead_hours"]
    return chosen.fillna({"level": 0.0, "lead_hours": 0.0}).set_index(keys)["value"]


def against_baselines(report_figures: dict[str, Any], task: str) -> dict[str, Any]:
    """Ratios to every baseline, and to the best, which is the one with the highest ratio."""
    prefix = f"{task}_vs_"
    ratios = {
        key.removeprefix(prefix): value
        for key, value in report_figures.items()
        if key.startswith(prefix) and not key.endswith("_interval")
    }
    best = max(ratios, key=lambda name: ratios[name])
    spreads = [
        value for key, value in report_figures.items() if key.startswith(f"spread_skill_{task}")
    ]
    return {
        f"{task}_vs_best_baseline": ratios[best],
        f"{task}_vs_best_baseline_interval": report_figures.get(f"{prefix}{best}_interval"),
        f"{task}_best_baseline": best,
        f"{task}_spread_skill": round(sum(spreads) / len(spreads), 4),
        f"{task}_vs_all": ratios,
    }


def examples_figures(task: str, checkpoint: str, counts: list[int], every: int) -> dict[str, Any]:
    """A task with so many examples against none, see the module."""
    model = atmossl.load(checkpoint, device="cpu")
    (truth,) = fields_of("test").values()
    names = [name for spec in model.trained.specs for name in spec.variables]
    steps, choices = model.trained.window.time, TASKS[task]
    written = choices.get("variables", names)
    times = truth["time"].to_numpy()[steps : len(truth["time"]) - steps : every]
    valid = truth[written].sel(time=times)
    errors: dict[int, xr.Dataset] = {}
    for count in sorted({0, *counts}):
        dates = times.astype(str).tolist()
        predicted = model.predict(task, truth[names], dates, examples=count, **choices)
        errors[count] = square_error(predicted[written].mean("member"), valid)
    unit = errors[0].mean("time")

    def losses(count: int) -> np.ndarray:
        by_field = (errors[count] / unit).to_dataarray("variable")
        return by_field.mean(("variable", "level")).transpose("time").to_numpy()

    masks = json.dumps(model.trained.checkpoint_record["config"]["masking"])
    figures: dict[str, Any] = {
        "checkpoint": model.trained.digest, "every": every, "dates": len(times),
        "trained_with_examples": '"examples"' in masks,
    }  # fmt: skip
    for count in (n for n in errors if n):
        compared = ratio(losses(count), losses(0))
        figures[f"{task}_examples_{count}_over_0"] = compared["value"]
        figures[f"{task}_examples_{count}_over_0_interval"] = compared["interval"]
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="default", help="a path, or `default`")
    parser.add_argument("--every", type=int, default=4, help="score every n-th date")
    parser.add_argument("--no-ridge", dest="ridge", action="store_false")
    parser.add_argument(
        "--specialists",
        nargs="*",
        choices=SPECIALISTS,
        metavar="TASK",
        help="train and score them, too; all if none is named",
    )
    parser.add_argument(
        "--finetune",
        action="store_true",
        help="with --specialists: also tune the checkpoint for a tenth of the budget",
    )
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_zero_shot"))
    parser.add_argument("--examples", nargs="+", type=int, metavar="K", help="only these")
    parser.add_argument(
        "--task", choices=_WITH_EXAMPLES, default=_WITH_EXAMPLES[0], help="for --examples"
    )
    arguments = parser.parse_args()
    if arguments.examples:
        task, counts = arguments.task, arguments.examples
        figures = examples_figures(task, arguments.checkpoint, counts, arguments.every)
        suffix = "" if task == _WITH_EXAMPLES[0] else f"_{task}"
        finish(f"zero_shot_examples{suffix}", figures)
        return
    digest = load_checkpoint(arguments.checkpoint).digest
    runs: Path = arguments.runs / digest
    name = report_name(arguments)
    refused = refusals(arguments.checkpoint)
    tasks = [task for task in TASKS if task not in refused]
    report = score(arguments.checkpoint, tasks, runs / f"all-{name}", arguments)
    report_figures = json.loads((report / "figures.json").read_text())
    figures: dict[str, Any] = {"checkpoint": digest, "every": arguments.every}
    for task in tasks:
        figures |= against_baselines(report_figures, task)
    figures |= figures_of_refused(refused, arguments)
    if arguments.specialists is not None:
        for task in arguments.specialists or SPECIALISTS:
            arguments.ridge = False
            specialist = train_specialist(task, arguments.checkpoint, runs / task, tuned=False)
            specialist_report = score(specialist, [task], runs / f"{task}-{name}", arguments)
            ratio = errors(report, task) / errors(specialist_report, task)
            figures[f"{task}_vs_specialist"] = round(float(ratio.mean()), 4)
            if arguments.finetune:
                folder = runs / f"{task}-finetuned"
                tuned = train_specialist(task, arguments.checkpoint, folder, tuned=True)
                tuned_report = score(tuned, [task], runs / f"{task}-finetuned-{name}", arguments)
                ratio = errors(tuned_report, task) / errors(specialist_report, task)
                figures[f"{task}_finetuned_vs_specialist"] = round(float(ratio.mean()), 4)
    finish("zero_shot", figures)


if __name__ == "__main__":
    main()

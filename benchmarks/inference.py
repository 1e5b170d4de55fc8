"""Global fields per second, memory, and the share of time outside the model, writing included.

python -m benchmarks.inference
python -m benchmarks.inference --checkpoint PATH --task downscaling --dates 8

Each run is a process of its own, so that its peak memory is its own. A field is one variable on
one level at one time on the whole globe, as an ensemble. Times are CPU times of the process on a
CPU, so that what else the machine does is left out, and wall times on a GPU. The shorter run has
to fill a batch (a whole-globe window is one tile per date), or memory grows with the batch.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from atmossl.api import find_task
from atmossl.commands.cost import resident_bytes
from atmossl.data.catalog import catalog_entry
from atmossl.data.store import open_split
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.inference.plan import Options, chosen_times, plan_prediction
from atmossl.inference.writer import write
from benchmarks.report import finish


class ModelTime:
    """Adds up the time that a network's calls take."""

    def __init__(self, model: nn.Module, clock: Callable[[], float]) -> None:
        self.clock, self.seconds, self._start = clock, 0.0, 0.0
        model.register_forward_pre_hook(self._begin)
        model.register_forward_hook(self._end)

    def _begin(self, *_: object) -> None:
        self._start = self.clock()

    def _end(self, *_: object) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds += self.clock() - self._start


def one_run(checkpoint: str, task: str, dates: int, batch_size: int) -> dict[str, float]:
    """Predict and write so many dates of the test split; times without loading, after one date
    for warming up."""
    on_gpu = torch.cuda.is_available()
    clock = time.perf_counter if on_gpu else time.process_time
    trained = load_checkpoint(checkpoint)
    model_time = ModelTime(trained.model, clock)
    (segment,) = open_split(
        catalog_entry(trained.data),
        "test",
        variables=sorted(trained.variables),
        levels=trained.levels,
    )
    options = Options(
        overlap=0.5, tilings=2, batch_size=batch_size, device="cuda" if on_gpu else "cpu"
    )
    plan = plan_prediction(trained, find_task(task, {}), [segment], options)
    times = chosen_times(plan, None)[:dates]
    if len(times) < dates:
        raise SystemExit(f"--dates {dates}: the test split has {len(times)}")
    with tempfile.TemporaryDirectory() as folder:
        write(plan, times[:1], Path(folder) / "first.zarr")
        model_time.seconds, start = 0.0, clock()
        write(plan, times, Path(folder) / "out.zarr")
        total = clock() - start
    levels = sum(spec.num_levels * len(spec.variables) for spec in trained.specs)
    return {
        "fields": dates * len(plan.steps.offsets) * levels,
        "seconds": total,
        "model_seconds": model_time.seconds,
        "peak_mib": resident_bytes() / 2**20,
        "gpu_peak_mib": torch.cuda.max_memory_allocated() / 2**20 if on_gpu else 0.0,
    }


def in_process(arguments: argparse.Namespace, dates: int) -> dict[str, float]:
    command = [sys.executable, "-m", "benchmarks.inference", "--one", "--dates", str(dates)]
    command += ["--checkpoint", arguments.checkpoint, "--task", arguments.task]
    command += ["--batch-size", str(arguments.batch_size)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--checkpoint", default="default")
    parser.add_argument("--task", default="forecast")
    parser.add_argument("--dates", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="one run in this process")
    arguments = parser.parse_args()
    if arguments.one:
        figures = one_run(
            arguments.checkpoint, arguments.task, arguments.dates, arguments.batch_size
        )
        print(json.dumps(figures))
        return
    few, many = (in_process(arguments, arguments.dates * factor) for factor in (1, 10))
    finish(
        "inference",
        {
            "fields_per_s": round(many["fields"] / many["seconds"], 2),
            "outside_model_fraction": round(1 - many["model_seconds"] / many["seconds"], 4),
            "peak_memory_mib": round(many["peak_mib"] + many["gpu_peak_mib"]),
            "memory_growth_10x_dates": round(
                (many["peak_mib"] + many["gpu_peak_mib"]) / (few["peak_mib"] + few["gpu_peak_mib"]),
                4,
            ),
            "task": arguments.task,
            "dates": arguments.dates * 10,
            "batch_size": arguments.batch_size,
            "clock": "wall" if torch.cuda.is_available() else "cpu time",
        },
    )


if __name__ == "__main__":
    main()

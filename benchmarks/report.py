"""The last line of every benchmark, and the device it ran on."""

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    processor = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            processor = line.split(":")[1].strip()
            break
    return f"{processor}, {torch.get_num_threads()} threads"


def take_no_options(description: str | None) -> None:
    """Answer `--help` of a benchmark without options, and refuse every other word."""
    shown = argparse.RawDescriptionHelpFormatter
    argparse.ArgumentParser(description=description, formatter_class=shown).parse_args()


def finish(benchmark: str, figures: dict[str, Any]) -> None:
    """Print the JSON line, and keep it under `benchmarks/results/`, or in the folder that the
    environment variable `BENCHMARK_RESULTS` names."""
    line = json.dumps({"benchmark": benchmark, "device": device_name(), "figures": figures})
    usual_folder = Path(__file__).parent / "results"
    folder = Path(os.environ.get("BENCHMARK_RESULTS", usual_folder))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{benchmark}.json").write_text(line + "\n")
    print(line)

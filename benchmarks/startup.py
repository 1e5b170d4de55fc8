"""Seconds until a command answers, mostly spent on importing libraries.

python -m benchmarks.startup

Each command runs in a process of its own and counts with its CPU seconds, of user and system, the
lowest of the repeats. `predict` counts until its progress bar starts, where the process is ended.
`modules_*` are the imported modules, and `heavy_*` which heavy libraries are among them.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.report import finish, take_no_options

REPEATS = 3
HEAVY = ("torch", "lightning", "xarray", "dask", "pandas", "scipy", "matplotlib", "cartopy", "zarr")
COMMANDS = {
    "unknown_key": ["train", "model.dmi=3"],
    "unknown_choice": ["train", "masking=brt"],
    "invalid_value": ["config", "validate", "model.dim=101"],
    "data_list": ["data", "list"],
    "info_large": ["info", "model=large", "--check"],
    "predict_bar": ["predict", "task=forecast", "checkpoint=default", "init_time=1959-02-12T00"],
}
LIMITS_S = {"unknown_key": 2.0, "data_list": 1.5, "info_large": 20.0, "predict_bar": 5.0}
# Runs one command as the installed script does, and reports how it ended in the file of argv[1].
CHILD = """
import json, os, sys
report, sys.argv = sys.argv[1], ["atmossl", *sys.argv[2:]]
from atmossl.cli import main

def end(code=0):
    modules = sorted(sys.modules)
    with open(report, "w") as file:
        json.dump({"code": code, "modules": modules}, file)
    sys.stdout.flush()
    os._exit(0)

if sys.argv[1] == "predict":
    import atmossl.progress
    atmossl.progress.telling = lambda *work: end()
end(main())
"""


def measure(arguments: list[str]) -> tuple[float, dict[str, Any]]:
    """CPU seconds of one command, and its exit code and imported modules."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        output = [f"output={folder}/out.zarr"] if arguments[0] == "predict" else []
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run(
            [sys.executable, "-c", CHILD, str(report), *arguments, *output],
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return seconds, json.loads(report.read_text())


def main() -> None:
    take_no_options(__doc__)
    figures: dict[str, Any] = {}
    for name, arguments in COMMANDS.items():
        runs = [measure(arguments) for _ in range(REPEATS)]
        seconds, ended = min(runs, key=lambda run: run[0])
        limit = f"  (at most {LIMITS_S[name]:g})" if name in LIMITS_S else ""
        print(f"{name:15} {seconds:6.2f} s{limit}  exit code {ended['code']}")
        figures[f"seconds_{name}"] = round(seconds, 2)
        figures[f"exit_code_{name}"] = ended["code"]
        figures[f"modules_{name}"] = len(ended["modules"])
        figures[f"heavy_{name}"] = [lib for lib in HEAVY if lib in ended["modules"]]
    finish("startup", figures)


if __name__ == "__main__":
    main()

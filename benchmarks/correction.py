"""Error of a corrected model against that of the model itself and of linear corrections.

    python -m benchmarks.correction --runs FOLDER                  # half an hour on two free cores
    python -m benchmarks.correction --kinds same --steps 100 --every 12

`scripts/degrade_sample.py` makes the forecasts of a deliberately poor model of the sample; then
`experiment=correction` is trained on the sample's training runs for `--steps` and scored on every
n-th date of the held-out run 5. Kinds: `same`, forecasts on the sample's own grid, whose biases are
to be corrected; `coarse`, on cells twice as large, to be downscaled as well. What is in --runs
already is not done again.

Ratios of RMSE over all variables and levels, with their intervals (block bootstrap over dates), of
the corrected fields to: `uncorrected`, the poor model's own, interpolated to the sample's grid;
`bias_corrected`, without the mean error of every cell; `regression`, a line for every cell,
variable and level; `ridge`, a regression on 5 x 5 cells of all variables and two steps;
`climatology`. All of these are fitted on the training runs. Below 1 the network is better.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

from atmossl.cli import main as command
from atmossl.data.catalog import catalog_entry
from benchmarks.report import finish

KINDS = {
    "same": (),
    "coarse": (
        "stream.other_model.data=degraded_sample_coarse",
        "stream.other_model.token_size.lat=1", "stream.other_model.token_size.lon=1",
    ),
}  # fmt: skip
_SCRIPT = Path(__file__).parents[1] / "scripts" / "degrade_sample.py"


def written_catalog(folder: Path) -> Path:
    """The stores of the poor model, and a catalog of the sample and of these."""
    stores, path = folder / "degraded_sample", folder / "catalog.yaml"
    if not stores.exists():
        subprocess.run([sys.executable, _SCRIPT, "--output", stores], check=True)
    entries = {}
    for name in ("sample", "degraded_sample", "degraded_sample_coarse"):
        entry = catalog_entry(name).model_dump(mode="json", exclude_defaults=True)
        if name != "sample":
            for segment in entry["segments"].values():
                segment["location"] = str(folder / segment["location"])
        entries[name] = entry
    path.write_text(yaml.safe_dump(entries))
    return path


def run(*words: str) -> None:
    if code := command(list(words)):
        raise SystemExit(f"ended with code {code}: atmossl {' '.join(words)}")


def ratios(folder: Path, kind: str, steps: int, every: int) -> dict[str, Any]:
    """The report's figures of one kind; trained first, unless that is done."""
    catalog, output = written_catalog(folder), folder / f"{kind}_{steps}"
    interval = max(1, steps // 3)
    if not (output / "curves").exists():  # drawn at the end
        run(
            "train", "experiment=correction", f"data.catalog={catalog}", *KINDS[kind],
            f"trainer.max_steps={steps}", f"trainer.validation_interval={interval}",
            f"trainer.checkpoint_interval={interval}", "trainer.pictures=false",
            f"paths.output={output}", "resume=auto",
        )  # fmt: skip
    report = output / f"report_{every}"
    if not report.exists():
        run(
            "evaluate", f"checkpoint={output / 'checkpoints' / 'best.ckpt'}",
            "tasks=[correction]", f"every={every}", "tilings=1", f"output={report}",
        )  # fmt: skip
    return json.loads((report / "figures.json").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="*", choices=tuple(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--every", type=int, default=12, help="score every n-th date")
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    figures: dict[str, Any] = {"steps": arguments.steps, "every": arguments.every}
    with tempfile.TemporaryDirectory() as scratch:
        runs = (arguments.runs or Path(scratch)).absolute()
        runs.mkdir(parents=True, exist_ok=True)
        for kind in arguments.kinds:
            figures[kind] = ratios(runs, kind, arguments.steps, arguments.every)
    finish("correction", figures)


if __name__ == "__main__":
    main()

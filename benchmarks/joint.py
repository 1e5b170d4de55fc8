"""Are members whole fields? Scores of the joint distribution on the sample's held-out run.

python -m benchmarks.joint --checkpoint PATH --against default     # minutes each

Keys of TASK (forecast at +6 h and +12 h, interpolation, downscaling, inpainting):
`_box_mean_spread_skill`: spread over error of means over 4 x 4 and 8 x 8 cells, where 1 is
calibrated; `_difference_spread_skill`: of differences between neighbours, zonal and meridional;
`_member_power_ratio_worst`: zonal power of a member over the truth's, or its inverse if that is
larger, at wavenumbers 1 to 28 in the northern extratropics. Each is the worst over variables and
levels, as a value and as "which". `_energy_score_vs_*`, `_crps_vs_*`, `_rmse_vs_*`: ratios to those
of the checkpoint given by --against, mean over variables and levels. Reports are kept under --runs
and not made twice.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import pandas as pd
import xarray as xr

from atmossl.cli import compose_config
from atmossl.commands.evaluate import evaluate
from atmossl.evaluation.joint import BOXES, DIFFERENCES
from atmossl.evaluation.rows import rows_where
from atmossl.inference.checkpoint import load_checkpoint
from benchmarks.report import finish
from benchmarks.zero_shot import TASKS

CHOSEN = ("forecast", "temporal_interpolation", "downscaling", "inpainting")
WAVES = slice(1, 28)
BELT = "northern_extratropics"
SPREADS = {
    "box_mean": [derived.name for derived in BOXES],
    "difference": [derived.name for derived in DIFFERENCES[:2]],
}


def report_of(checkpoint: str, arguments: argparse.Namespace) -> Path:
    """The report of all tasks, unless it is there already."""
    digest = load_checkpoint(checkpoint).digest
    output = arguments.runs / f"{digest}-every{arguments.every}"
    if not output.exists():
        options = [
            f"checkpoint={checkpoint}",
            f"output={output}",
            f"every={arguments.every}",
            f"regions=[{BELT}]",
            "ridge=false",
        ]
        tasks = [{"_target_": name, **TASKS[name]} for name in CHOSEN]
        values = compose_config("evaluate", options) | {"tasks": tasks}
        evaluate(values, f"python -m benchmarks.joint ({output})")
    return output


def scores_of(report: Path, task: str, score: str) -> pd.Series:
    """Values on the globe by variable, level and lead time."""
    table = pd.read_csv(report / "scores.csv")
    labels = {"task": task, "source": "model", "score": score, "region": "global"}
    chosen = rows_where(table, season="all", **labels)
    keys = ["variable", "level", "lead_hours"]
    return chosen.fillna({"level": 0.0, "lead_hours": 0.0}).set_index(keys)["value"]


def worst(values: pd.Series) -> tuple[float, str]:
    """The value farthest from 1 as a ratio, and its labels."""
    distance = values.map(lambda value: abs(math.log(value)) if value > 0 else math.inf)
    label = distance.idxmax()
    return round(float(values[label]), 3), " ".join(map(str, label))  # type: ignore[call-overload]


def power_ratios(report: Path, task: str) -> pd.Series:
    """Power of members over the truth's by variable, level, lead time and wavenumber; none of a
    task that hides parts of a latitude circle."""
    tree = xr.open_datatree(report / "scores.zarr", engine="zarr")
    found = {}
    if "zonal_spectrum" not in tree[task].children:
        return pd.Series(dtype=float)
    for variable, node in tree[f"{task}/zonal_spectrum"].children.items():
        spectrum = node.to_dataset().sel(source="model", region=BELT, wavenumber=WAVES)
        ratio = spectrum["members"] / spectrum["truth"]
        found[variable] = ratio.to_series()
    ratios: Any = pd.concat(found)
    return ratios.dropna()


def figures_of(report: Path, task: str) -> dict[str, Any]:
    figures: dict[str, Any] = {}
    for key, names in SPREADS.items():
        values = pd.concat({n: scores_of(report, task, f"spread_skill_{n}") for n in names})
        value, label = worst(values.dropna())
        figures |= {f"{task}_{key}_spread_skill": value, f"{task}_{key}_worst": label}
        figures[f"{task}_{key}_spread_skill_median"] = round(float(values.median()), 3)
    ratios = power_ratios(report, task)
    if len(ratios):
        value, label = worst(ratios)
        figures[f"{task}_member_power_ratio_worst"] = round(max(value, 1 / value), 3)
        figures[f"{task}_member_power_ratio_at"] = label
    single = scores_of(report, task, "spread_skill")
    figures[f"{task}_spread_skill"] = round(float(single.mean()), 3)
    return figures


def compared(ours: Path, theirs: Path, task: str) -> dict[str, Any]:
    """Mean ratios of scores of which less is better."""
    figures = {}
    for score in ("energy_score", "variogram_score", "crps", "rmse"):
        ratio = scores_of(ours, task, score) / scores_of(theirs, task, score)
        figures[f"{task}_{score}_vs_other"] = round(float(ratio.mean()), 4)
    return figures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="default", help="a path, or `default`")
    parser.add_argument("--against", help="another checkpoint, scored on the same dates")
    parser.add_argument("--every", type=int, default=12, help="score every n-th date")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_joint"))
    arguments = parser.parse_args()
    report = report_of(arguments.checkpoint, arguments)
    figures: dict[str, Any] = {"checkpoint": load_checkpoint(arguments.checkpoint).digest}
    figures["every"] = arguments.every
    other = None if arguments.against is None else report_of(arguments.against, arguments)
    for task in CHOSEN:
        figures |= figures_of(report, task)
        if other is not None:
            figures |= {f"other_{key}": value for key, value in figures_of(other, task).items()}
            figures |= compared(report, other, task)
    finish("joint", figures)


if __name__ == "__main__":
    main()

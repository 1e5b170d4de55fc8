"""Are members whole fields? Scores of the joint distribution on the sample's held-out run.

python -m benchmarks.joint --checkpoint PATH --against default     # minutes each
python -m benchmarks.joint --checkpoint PATH --tasks inpainting    # some of the tasks
python -m benchmarks.joint --checkpoint PATH --rollout --every 48  # ten days: some minutes a date
python -m benchmarks.joint --cost [KEY=VALUE ...]                  # a minute

Keys of TASK (forecast at +6 h and +12 h, interpolation, downscaling, inpainting):
`_box_mean_spread_skill`: spread over error of means over 4 x 4 and 8 x 8 cells, where 1 is
calibrated (of downscaling, boxes that lie across the coarse cells, whose means are given);
`_difference_spread_skill`: of differences between neighbours, zonal and meridional;
`_member_power_ratio_worst`: zonal power of a member over the truth's, or its inverse if that is
larger, at wavenumbers 1 to 28 in the northern extratropics. Each is the worst over variables and
levels, as a value and as "which". `_member_power_within_1.5`: the share of these power ratios
between 1 / 1.5 and 1.5. `_energy_score_vs_*`, `_crps_vs_*`, `_rmse_vs_*`: ratios to those of the
checkpoint given by --against, mean over variables and levels. `_rmse_of_many_vs_*`: the mean of M
draws errs by their variance / M more than that of very many, which is told here (Leutbecher 2019,
doi:10.1002/qj.3387); the members of a tail are no draws, and their mean stays as it is. Reports are
kept under --runs and not made twice.

Keys of --rollout, a forecast of ten days in passes of 12 h, by day where a key ends in one:
`rollout_spread_skill`, mean over variables and levels; `rollout_crps_vs_climatology` and
`rollout_rmse_vs_climatology`, ratios of means; `rollout_drift`, the error of the area mean over the
RMSE, worst of the variables; `rollout_member_power_ratio_worst`, as above;
`rollout_rmse_vs_ridge` and `rollout_rmse_vs_ridge_of_each_lead`, ratios to a ridge regression that
is rolled out in passes of 12 h, too, and to regressions that are fitted for each lead time;
`rollout_acc_z500_hours_above_0.6`, the last lead time before the anomaly correlation of 500 hPa
geopotential falls to 0.6, of the checkpoint, of persistence and of these regressions;
`rollout_crps_below_climatology_hours`, the last one before its CRPS reaches climatology's.

Keys of --cost, which takes further settings of both trainings: `samples_per_s_noise_over_tail`, of
a training step of experiment=joint over one of experiment=quickstart, the same network with eight
outputs of a tail; `seconds_per_member_noise_over_tail`, of their predictions of a window with eight
members. CPU seconds (GPU: seconds), the least of several in turns.
"""

import argparse
import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import xarray as xr

from atmossl.batch import View
from atmossl.cli import compose_config
from atmossl.commands.cost import sample_batch
from atmossl.commands.evaluate import evaluate
from atmossl.evaluation.joint import BOX_SIZES, DIFFERENCES, AreaMeans
from atmossl.evaluation.verify import rows_where
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.inference.plan import EVALUATED_MEMBERS
from atmossl.model.network import Network
from benchmarks.report import finish
from benchmarks.train_step import configuration, in_turns, step_of_run
from benchmarks.zero_shot import TASKS

CHOSEN = ("forecast", "temporal_interpolation", "downscaling", "inpainting")
WAVES = slice(1, 28)
BELT = "northern_extratropics"
DAYS = (1, 3, 5, 10)
REGRESSIONS = {"ridge_rollout": "ridge", "ridge": "ridge_of_each_lead"}
SPREADS = {
    "box_mean": [AreaMeans(size).name for size in BOX_SIZES],
    "difference": [derived.name for derived in DIFFERENCES[:2]],
}


def report_of(checkpoint: str, arguments: argparse.Namespace) -> Path:
    """The report of the tasks, or of a rollout, unless it is there already."""
    digest = load_checkpoint(checkpoint).digest
    kind = "rollout-ridge-" if arguments.rollout else ""
    some = "" if arguments.tasks == [*CHOSEN] else "".join(f"-{name}" for name in arguments.tasks)
    output = arguments.runs / f"{kind}{digest}-every{arguments.every}{some}"
    if not output.exists():
        options = [
            f"checkpoint={checkpoint}",
            f"output={output}",
            f"every={arguments.every}",
            f"regions=[{BELT}]",
            f"ridge={str(arguments.rollout).lower()}",
        ]
        tasks = [{"_target_": name, **TASKS[name]} for name in arguments.tasks]
        if arguments.rollout:
            tasks = [{"_target_": "forecast", "lead_time": "240h", "rollout_time": "12h"}]
        values = compose_config("evaluate", options) | {"tasks": tasks}
        evaluate(values, f"python -m benchmarks.joint ({output})")
    return output


def scores_of(report: Path, task: str, score: str, source: str = "model") -> pd.Series:
    """Values on the globe by variable, level and lead time."""
    table = pd.read_csv(report / "scores.csv")
    labels = {"task": task, "source": source, "score": score, "region": "global"}
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
        is_near = ratios.between(1 / 1.5, 1.5)
        figures[f"{task}_member_power_within_1.5"] = round(float(is_near.mean()), 3)
    single = scores_of(report, task, "spread_skill")
    figures[f"{task}_spread_skill"] = round(float(single.mean()), 3)
    return figures


def compared(ours: Path, theirs: Path, task: str, num_draws: int | None) -> dict[str, Any]:
    """Mean ratios of scores of which less is better. num_draws: members of ours that are draws."""
    figures = {}
    for score in ("energy_score", "variogram_score", "crps", "rmse"):
        ratio = scores_of(ours, task, score) / scores_of(theirs, task, score)
        figures[f"{task}_{score}_vs_other"] = round(float(ratio.mean()), 4)
    if num_draws:
        ratio = rmse_of_many(ours, task, num_draws) / scores_of(theirs, task, "rmse")
        figures[f"{task}_rmse_of_many_vs_other"] = round(float(ratio.mean()), 4)
    return figures


def rmse_of_many(report: Path, task: str, num_members: int) -> pd.Series:
    """RMSE that the mean of very many draws would have: less the variance of one draw over their
    number, which the spread over error tells (its square is (M + 1) / M * variance / MSE)."""
    spread = scores_of(report, task, "spread_skill")
    return scores_of(report, task, "rmse") * (1.0 - spread**2 / (num_members + 1)) ** 0.5


def hours_until(stopped: pd.Series) -> float:
    """The last lead time [h] before the first one at which a series by lead time is true."""
    hours = [0.0]
    for lead, is_over in stopped.sort_index().items():
        if is_over:
            break
        hours.append(float(lead))  # type: ignore[arg-type]
    return hours[-1]


def rollout_figures(report: Path) -> dict[str, Any]:
    """Spread, skill, drift and power of a forecast of ten days."""
    spread: Any = scores_of(report, "forecast", "spread_skill").groupby("lead_hours").mean()
    power: Any = power_ratios(report, "forecast")
    bias, rmse = (scores_of(report, "forecast", score) for score in ("bias", "rmse"))
    drift: Any = (bias.abs() / rmse).groupby("lead_hours").max()
    dates: Any = pd.read_csv(report / "scores.csv")["num_times"].max()
    figures: dict[str, Any] = {"rollout_dates": int(dates)}
    ratios: dict[str, Any] = {}
    for score in ("crps", "rmse"):
        ratio = scores_of(report, "forecast", score)
        ratio = ratio / scores_of(report, "forecast", score, "climatology")
        ratios[score] = ratio.groupby("lead_hours").mean()
    for source, name in REGRESSIONS.items():
        ratio = scores_of(report, "forecast", "rmse")
        ratio = ratio / scores_of(report, "forecast", "rmse", source)
        ratios[name] = ratio.groupby("lead_hours").mean()
    for day in DAYS:
        lead = 24.0 * day
        value, label = worst(power.xs(pd.Timedelta(days=day), level="lead_time"))
        figures |= {
            f"rollout_spread_skill_day_{day}": round(float(spread[lead]), 3),
            f"rollout_crps_vs_climatology_day_{day}": round(float(ratios["crps"][lead]), 3),
            f"rollout_rmse_vs_climatology_day_{day}": round(float(ratios["rmse"][lead]), 3),
            **{
                f"rollout_rmse_vs_{name}_day_{day}": round(float(ratios[name][lead]), 3)
                for name in REGRESSIONS.values()
            },
            f"rollout_drift_day_{day}": round(float(drift[lead]), 3),
            f"rollout_member_power_ratio_worst_day_{day}": round(max(value, 1 / value), 3),
            f"rollout_member_power_ratio_at_day_{day}": label,
        }
    for source, name in {"model": "rollout", "persistence": "persistence", **REGRESSIONS}.items():
        acc: Any = scores_of(report, "forecast", "acc", source).sort_index()
        is_lost = acc.loc[("geopotential", 500.0)] <= 0.6
        figures[f"{name}_acc_z500_hours_above_0.6"] = hours_until(is_lost)
    figures["rollout_crps_below_climatology_hours"] = hours_until(ratios["crps"] >= 1.0)
    return figures


def cost_figures(changes: Sequence[str], repeats: int = 3) -> dict[str, Any]:
    """What members that are draws of noise cost beside those of a tail."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    steps, predictions, members = {}, {}, range(8)
    for kind, experiment in (("tail", "quickstart"), ("noise", "joint")):
        config = configuration([f"experiment={experiment}", *changes])
        batch = sample_batch(config).to(device)
        network, step = step_of_run(config, {}, device)
        steps[kind] = partial(step, batch)
        asked = members if network.any_member else None
        predictions[kind] = partial(_predict, network, batch.views[0], asked)
    training = in_turns(steps, repeats)
    prediction = in_turns(predictions, repeats)
    return {
        "samples_per_s_noise_over_tail": round(training["tail"] / training["noise"], 3),
        "seconds_per_member_noise_over_tail": round(prediction["noise"] / prediction["tail"], 3),
        "changes": list(changes),
    }


@torch.no_grad()
def _predict(network: Network, view: View, members: Sequence[int] | None) -> None:
    network.reconstruct(network.encode(view), view, members)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoint", default="default", help="a path, or `default`")
    parser.add_argument("--against", help="another checkpoint, scored on the same dates")
    parser.add_argument("--every", type=int, default=12, help="score every n-th date")
    parser.add_argument("--tasks", nargs="+", choices=CHOSEN, default=[*CHOSEN], metavar="TASK")
    parser.add_argument("--rollout", action="store_true", help="score forecasts of ten days")
    parser.add_argument("--runs", type=Path, default=Path("runs/benchmark_joint"))
    parser.add_argument("--cost", nargs="*", metavar="KEY=VALUE", help="measure what members cost")
    arguments = parser.parse_args()
    if arguments.cost is not None:
        finish("joint_cost", cost_figures(arguments.cost))
        return
    report = report_of(arguments.checkpoint, arguments)
    trained = load_checkpoint(arguments.checkpoint)
    num_draws = EVALUATED_MEMBERS if trained.model.any_member else None
    figures: dict[str, Any] = {"checkpoint": trained.digest}
    figures["every"] = arguments.every
    if arguments.rollout:
        finish("rollout", figures | rollout_figures(report))
        return
    other = None if arguments.against is None else report_of(arguments.against, arguments)
    for task in arguments.tasks:
        figures |= figures_of(report, task)
        if other is not None:
            figures |= {f"other_{key}": value for key, value in figures_of(other, task).items()}
            figures |= compared(report, other, task, num_draws)
    finish("joint", figures)


if __name__ == "__main__":
    main()

"""What every objective's latents hold, against baselines and each other, and what it costs.

    python -m benchmarks.representations --checkpoints masked=a.ckpt jepa=b.ckpt
    python -m benchmarks.representations --train 300 --runs FOLDER      # trains them first
    python -m benchmarks.representations --train 30 --objectives mae jepa --set model=tiny

With --train every experiment of EXPERIMENTS is trained for that many steps on the sample, one after
another, unless its run is in --runs already. Probes are those of `atmossl probe`, on the sample's
held-out run; `skill`, its interval and what `certain` means are defined in docs/probes.md.
`loss_over_best_baseline`: (1 - skill) over that of the best baseline.

Summary: `objectives_trained`; `objectives_collapsed` (RankMe of the last layer's pooled anomalies
below 2); `probes_beating_random` and `_pca`: share of probes, of the objective with the most;
`probes_beating_raw_ridge`: share of probes at which the best objective beats ridge on raw values;
each also with `_certain`, where the interval of the difference has to lie above 0.

`cost_vs_masked`: samples per CPU second (GPU: second) of a training step, and memory over what the
process held before its network was made, as ratios to `masked`: the same network, window and batch
for all. A state of an objective that takes pairs or crops is one sample.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch

from atmossl.cli import main as atmossl
from atmossl.commands.probe import summarise
from atmossl.composition import compose_config
from atmossl.evaluation.rows import rows_where
from atmossl.probes.summary import Summary, shares_beaten
from atmossl.schema import ProbeConfig, parse
from benchmarks.report import finish
from benchmarks.train_step import configuration, from_data, in_turns, peak_bytes, step_of_run

EXPERIMENTS = {
    "masked": "bert", "mae": "mae", "causal": "causal", "blocks": "blocks",
    "split_brain": "split_brain", "autoregression": "autoregression",
    "contrastive": "contrastive", "atmodist": "atmodist", "jepa": "jepa", "lejepa": "lejepa",
    "dino": "dino", "combined": "combined",
}  # fmt: skip
COLLAPSED_BELOW = 2.0
_EQUAL = ("model=small", "data.window={time: 4, lon: 0}", "data.batch_size=4")


def cost_of(name: str, repeats: int = 3) -> dict[str, float]:
    """Samples per second and bytes of memory of an experiment's training step, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration([f"experiment={EXPERIMENTS[name]}", *_EQUAL])
    loader, scales = from_data(config)
    batch = next(iter(loader)).to(device)
    before = peak_bytes(device)
    _, step = step_of_run(config, scales, device)
    spent = in_turns({"step": partial(step, batch)}, repeats)["step"]
    return {
        "samples_per_s": len(batch.sample_id) / spent,
        "memory": float(peak_bytes(device) - before),
    }


def costs(names: list[str]) -> tuple[dict[str, Any], dict[str, str]]:
    """Ratios to `masked`, each measured in a process of its own; and why some have none."""
    found, failed = {}, {}
    for name in dict.fromkeys(["masked", *names]):
        command = [sys.executable, "-m", "benchmarks.representations", "--cost-of", name]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode == 0:
            found[name] = json.loads(done.stdout.strip().splitlines()[-1])
        else:
            failed[name] = done.stderr.strip().splitlines()[-1]
    reference = found["masked"]
    ratios = {
        name: {key: round(value / reference[key], 3) for key, value in cost.items()}
        for name, cost in found.items()
    }
    return ratios, failed


def trained(names: list[str], steps: int, runs: Path, changes: list[str]) -> dict[str, str]:
    """Checkpoints of all experiments; those that are there already are not made again. changes: to
    every experiment's configuration."""
    checkpoints = {}
    for name in names:
        folder = runs / f"{name}_{steps}"
        checkpoint = folder / "checkpoints" / "last.ckpt"
        if not checkpoint.exists():
            code = atmossl(
                ["train", f"experiment={EXPERIMENTS[name]}", f"paths.output={folder}",
                 f"trainer.max_steps={steps}", f"trainer.validation_interval={steps}",
                 f"trainer.checkpoint_interval={steps}", "trainer.validation_batches=1",
                 "trainer.pictures=false", "logger=csv", "resume=auto", *changes]
            )  # fmt: skip
            if code:
                raise SystemExit(f"the training of {name} ended with code {code}")
        checkpoints[name] = str(checkpoint)
    return checkpoints


def probed(checkpoints: dict[str, str], every: int) -> Summary:
    """Tables of all checkpoints, by their names."""
    values = compose_config("probe", [f"every={every}", "output=unused"])
    paths = {str(path): name for name, path in checkpoints.items()}
    values = {**values, "checkpoint": list(paths)}
    summary = summarise(parse(ProbeConfig, {k: v for k, v in values.items() if k != "hydra"}))
    for table, columns in (
        (summary.scores, ["checkpoint"]), (summary.comparisons, ["checkpoint"]),
        (summary.rank, ["checkpoint"]), (summary.alignment, ["first", "second"]),
    ):  # fmt: skip
        for column in columns:
            table[column] = [paths[path] for path in table[column]]
    return summary


def figures_of(summary: Summary) -> dict[str, Any]:
    """Scores by objective and probe, and the summary keys."""
    skills: dict[str, dict[str, Any]] = {}
    for row in rows_where(summary.scores, headline=True).to_dict("records"):
        name, probe = row["checkpoint"], row["probe"]
        baselines = rows_where(summary.comparisons, checkpoint=name, probe=probe)["baseline_skill"]
        skills.setdefault(name, {})[probe] = {
            "skill": round(row["skill"], 3),
            "interval": [round(row["low"], 3), round(row["high"], 3)],
            "loss_over_best_baseline": round(
                (1.0 - row["skill"]) / max(1.0 - baselines.max(), 1e-6), 3
            ),
        }
    rank = {
        row["checkpoint"]: round(row["rankme"], 2)  # of the last layer, which comes last
        for row in rows_where(summary.rank, source="latents").to_dict("records")
    }
    alignment = {
        f"{row['first']}, {row['second']}": round(row["cka"], 3)
        for row in summary.alignment.to_dict("records")
    }
    return {
        "skills": skills, "rankme": rank, "cka": alignment, "objectives_trained": len(skills),
        "objectives_collapsed": sum(value < COLLAPSED_BELOW for value in rank.values()),
        **_shares(summary.comparisons),
    }  # fmt: skip


def _shares(comparisons: pd.DataFrame) -> dict[str, float]:
    """Shares of probes with more skill than a baseline, see the module."""
    beaten, shares = shares_beaten(comparisons), {}
    for baseline in ("random", "pca"):
        of_baseline = rows_where(beaten, baseline=baseline)
        shares[f"probes_beating_{baseline}"] = of_baseline["higher"].max()
        shares[f"probes_beating_{baseline}_certain"] = of_baseline["certain"].max()
    raw = rows_where(comparisons, baseline="raw")
    for key, column in (("", "difference"), ("_certain", "low")):
        best = [rows[column].max() for _, rows in raw.groupby("probe")]
        shares[f"probes_beating_raw_ridge{key}"] = sum(one > 0 for one in best) / len(best)
    return {key: round(float(value), 3) for key, value in shares.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--checkpoints", nargs="*", default=[], metavar="NAME=PATH")
    parser.add_argument("--objectives", nargs="*", choices=list(EXPERIMENTS), default=None)
    parser.add_argument("--train", type=int, metavar="STEPS")
    parser.add_argument("--runs", type=Path)
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE")
    parser.add_argument("--every", type=int, default=3)
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--cost-of", choices=list(EXPERIMENTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost_of:
        print(json.dumps(cost_of(arguments.cost_of)))
        return
    checkpoints = dict(item.split("=", 1) for item in arguments.checkpoints)
    names = arguments.objectives or list(EXPERIMENTS)
    with tempfile.TemporaryDirectory() as scratch:
        if arguments.train:
            checkpoints |= trained(
                names, arguments.train, arguments.runs or Path(scratch), arguments.set
            )
        if not checkpoints:
            parser.error("name --checkpoints NAME=PATH or --train STEPS")
        figures = figures_of(probed(checkpoints, arguments.every))
    figures |= {"training_steps": arguments.train, "training_changes": arguments.set}
    if not arguments.no_cost:
        figures["cost_vs_masked"], figures["cost_failed"] = costs(
            [name for name in checkpoints if name in EXPERIMENTS]
        )
    finish("representations", figures)


if __name__ == "__main__":
    main()

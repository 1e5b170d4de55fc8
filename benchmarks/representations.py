"""What every objective's latents hold, against baselines and each other, and what it costs.

    python -m benchmarks.representations --checkpoints masked=a.ckpt jepa=b.ckpt
    python -m benchmarks.representations --train 300 --runs FOLDER      # trains them first
    python -m benchmarks.representations --train 30 --objectives mae jepa --set model=tiny

With --train every experiment of EXPERIMENTS is trained for that many steps on the sample, one after
another, with the changes of --set; one written NAME,NAME:KEY=VALUE, such as
contrastive:objective.lag_time=[18h,24h], is to these objectives alone. Whatever is in --runs
already is not done again, so that a run that was stopped goes on.
Probes are those of `atmossl probe`, on the sample's held-out run; `skill`, its interval and what
`certain` means are defined in docs/probes.md. `loss_over_best_baseline`: (1 - skill) over that of
the best baseline; `position` is none where positions are withheld from the latents.

Summary: `objectives_trained`; `objectives_collapsed` (RankMe of the last layer's pooled anomalies
below 2); `probes_beating_random`, `_pca` and `_eofs`: share of probes, of the objective with the
most; `probes_beating_raw_ridge`: share of probes at which the best objective beats ridge on raw
values; each also with `_certain`, where the interval of the difference has to lie above 0.

`resume_exact`: objectives whose last steps, taken again from the checkpoint before the last after
all others were trained, end with the same weights, optimiser, objective's state and generators, bit
for bit.

`labels`: by objective and probe, the loss of the network fine-tuned on a fraction of the labels
(--finetune STEPS) over that of a random start with all of them, as many steps and the same choices
on validation, the head among them; `loss_over_plain`: over that of a random start whose head began
at 0. `finetuned`: every fit. `labels_10pct_vs_scratch_100pct` and
`labels_10pct_vs_plain_scratch_100pct`: these ratios' means over the fine-tuned probes with a tenth
of the labels, of the objective with the most skill there on the validation dates.

`cost_vs_masked`: samples per CPU second (GPU: second) of a training step, and memory over what the
process held before its network was made, as ratios to `masked`: the same network, window and batch
for all, those of --set where it is given. A state of an objective that takes pairs or crops is one
sample. `cpu_seconds`: of the training, validation and start included.
"""

import argparse
import hashlib
import json
import pickle
import re
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from atmossl.checkpoint_files import read_contents
from atmossl.cli import main as atmossl
from atmossl.commands.probe import probed, summary_of
from atmossl.composition import compose_config
from atmossl.evaluation.verify import rows_where
from atmossl.probes.run import Baselines, Probed
from atmossl.probes.summary import Summary, shares_beaten
from atmossl.schema import ProbeConfig, parse
from atmossl.training.keeping import steps_in
from benchmarks.report import finish
from benchmarks.train_step import configuration, from_data, in_turns, peak_bytes, step_of_run

EXPERIMENTS = {
    "masked": "bert", "mae": "mae", "causal": "causal", "blocks": "blocks",
    "split_brain": "split_brain", "autoregression": "autoregression",
    "contrastive": "contrastive", "atmodist": "atmodist", "jepa": "jepa", "lejepa": "lejepa",
    "dino": "dino", "combined": "combined",
}  # fmt: skip
COLLAPSED_BELOW = 2.0
_NAME = f"(?:{'|'.join(EXPERIMENTS)})"
_OF_SOME = re.compile(rf"({_NAME}(?:,{_NAME})*):(.+)", re.DOTALL)  # a change to some experiments
_EQUAL = ("model=small", "data.window={time: 4, lon: 0}", "data.batch_size=4")


def changes_for(name: str, changes: list[str]) -> list[str]:
    """Of all changes those to an experiment: `NAME,NAME:KEY=VALUE` is to these alone."""
    found = [(_OF_SOME.fullmatch(change), change) for change in changes]
    return [own[2] if own else word for own, word in found if not own or name in own[1].split(",")]


def cost_of(name: str, changes: list[str], repeats: int = 3) -> dict[str, float]:
    """Samples per second and bytes of memory of an experiment's training step, in this process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = configuration(
        [f"experiment={EXPERIMENTS[name]}", *changes_for(name, changes or [*_EQUAL])]
    )
    loader, scales = from_data(config)
    batch = next(iter(loader)).to(device)
    before = peak_bytes(device)
    _, step = step_of_run(config, scales, device)
    spent = in_turns({"step": partial(step, batch)}, repeats)["step"]
    return {
        "samples_per_s": len(batch.sample_id) / spent,
        "memory": float(peak_bytes(device) - before),
    }


def costs(
    names: list[str], changes: list[str], runs: Path
) -> tuple[dict[str, Any], dict[str, str]]:
    """Ratios to `masked`, each measured in a process of its own; and why some have none."""
    found, failed = {}, {}
    for name in dict.fromkeys(["masked", *names]):
        kept = runs / f"{name}.cost.json"
        if not kept.exists():
            command = [sys.executable, "-m", "benchmarks.representations", "--cost-of", name]
            done = subprocess.run(
                [*command, "--set", *changes], capture_output=True, text=True, check=False
            )
            if done.returncode:
                words = done.stderr.strip().splitlines()
                failed[name] = words[-1] if words else f"ended with code {done.returncode}"
                continue
            kept.write_text(done.stdout.strip().splitlines()[-1])
        found[name] = json.loads(kept.read_text())
    ratios = {
        name: {key: round(value / found["masked"][key], 3) for key, value in cost.items()}
        for name, cost in found.items()
    }
    return ratios, failed


def training(name: str, steps: int, folder: Path, changes: list[str]) -> list[str]:
    """Words of the command that trains an objective; its last two checkpoints stay."""
    return [
        "train", f"experiment={EXPERIMENTS[name]}", f"paths.output={folder}",
        f"trainer.max_steps={steps}", f"trainer.validation_interval={steps}",
        f"trainer.checkpoint_interval={max(1, steps // 10)}", "trainer.keep_checkpoints=2",
        "trainer.validation_batches=1", "trainer.pictures=false", "logger=csv",
        *changes_for(name, changes),
    ]  # fmt: skip


def trained(names: list[str], steps: int, runs: Path, changes: list[str]) -> dict[str, str]:
    """Checkpoints of all experiments; those that are there already are not made again. changes: to
    every experiment's configuration."""
    checkpoints = {}
    for name in names:
        folder = runs / f"{name}_{steps}"
        checkpoint = folder / "checkpoints" / f"step-{steps}.ckpt"
        if not checkpoint.exists():
            at_once, started = not folder.exists(), time.process_time()
            code = atmossl([*training(name, steps, folder, changes), "resume=auto"])
            if code:
                raise SystemExit(f"the training of {name} ended with code {code}")
            if at_once:
                spent = round(time.process_time() - started, 1)
                (folder / "cpu_seconds.json").write_text(json.dumps(spent))
        checkpoints[name] = str(checkpoint)
    return checkpoints


def resumes_exactly(name: str, steps: int, runs: Path, changes: list[str]) -> bool:
    """Whether a run that goes on from the last checkpoint but one ends as the unbroken one did."""
    folder = runs / f"{name}_{steps}"
    answer = folder / "resume_exact.json"
    if not answer.exists():
        checkpoints = folder / "checkpoints"
        before = checkpoints / f"step-{sorted(steps_in(checkpoints))[-2]}.ckpt"
        with tempfile.TemporaryDirectory(dir=runs) as scratch:
            again = Path(scratch) / "run"
            if atmossl([*training(name, steps, again, changes), f"resume={before}"]):
                raise SystemExit(f"{name} does not go on from {before}")
            ends = [read_contents(run / "checkpoints" / "last.ckpt") for run in (folder, again)]
        answer.write_text(json.dumps(not differing(*map(_state, ends))))
    return json.loads(answer.read_text())


def _state(contents: dict[str, Any]) -> dict[str, Any]:
    keys = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step")
    return {key: contents[key] for key in keys} | {"rng": contents["atmossl"]["rng"]}


def differing(one: Any, two: Any) -> list[str]:
    """Paths of all leaves of two trees that are not equal, bit for bit."""
    first, second = (dict(pytree.tree_flatten_with_path(tree)[0]) for tree in (one, two))

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) else a == b

    shared = first.keys() & second.keys()
    unlike = [key for key in shared if not equal(first[key], second[key])]
    return [pytree.keystr(key) for key in [*unlike, *(first.keys() ^ second.keys())]]


def tables_of(
    checkpoints: dict[str, str], words: list[str], runs: Path, tuned: dict[str, list[str]]
) -> Summary:
    """Tables of all checkpoints, by their names; what was found of each is kept in `runs`. words:
    of `atmossl probe`; tuned: more of them, by name."""
    results: dict[str, Probed] = {}
    shared: dict[str, Baselines] = {}
    for name, path in checkpoints.items():
        all_words = [*words, *tuned.get(name, [])]
        asked = hashlib.sha256(json.dumps([path, *all_words]).encode()).hexdigest()[:8]
        kept = runs / f"{name}-{asked}.probes"
        if not kept.exists():
            values = compose_config("probe", [*all_words, "output=unused"])
            values.pop("hydra", None)
            config = parse(ProbeConfig, {**values, "checkpoint": path})
            (found,) = probed(config, shared).values()
            kept.write_bytes(pickle.dumps(found))
        results[name] = pickle.loads(kept.read_bytes())
    return summary_of(results)


def figures_of(summary: Summary) -> dict[str, Any]:
    """Scores by objective and probe, and the summary keys."""
    skills: dict[str, dict[str, Any]] = {}
    for row in rows_where(summary.scores, headline=True).to_dict("records"):
        name, probe = row["checkpoint"], row["probe"]
        compared = rows_where(summary.comparisons, checkpoint=name, probe=probe)
        baselines = compared["baseline_skill"]
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
        **_shares(summary.comparisons), **_of_labels(summary.tuned),
    }  # fmt: skip


def _shares(comparisons: pd.DataFrame) -> dict[str, float]:
    """Shares of probes with more skill than a baseline, see the module."""
    beaten, shares = shares_beaten(comparisons), {}
    for baseline in ("random", "pca", "eofs"):
        of_baseline = rows_where(beaten, baseline=baseline)
        if of_baseline.empty:  # no label of a sector was asked
            continue
        shares[f"probes_beating_{baseline}"] = of_baseline["higher"].max()
        shares[f"probes_beating_{baseline}_certain"] = of_baseline["certain"].max()
    raw = rows_where(comparisons, baseline="raw")
    for key, column in (("", "difference"), ("_certain", "low")):
        best = [rows[column].max() for _, rows in raw.groupby("probe")]
        shares[f"probes_beating_raw_ridge{key}"] = sum(one > 0 for one in best) / len(best)
    return {key: round(float(value), 3) for key, value in shares.items()}


def _of_labels(tuned: pd.DataFrame) -> dict[str, Any]:
    """Losses after fine-tuning over those of a random start with all labels, see the module."""
    if tuned.empty:
        return {}
    labels: dict[str, dict[str, Any]] = {}
    best = tuned.sort_values("validation").groupby(
        ["checkpoint", "probe", "start", "fraction"], as_index=False
    ).last()  # fmt: skip
    for row in rows_where(best, start="trained").to_dict("records"):
        of_probe = labels.setdefault(row["checkpoint"], {}).setdefault(row["probe"], {})
        of_probe[f"{row['fraction']:g}"] = {
            "dates": row["dates"], "loss_over_scratch": round(row["loss_over_scratch"], 3),
            "interval": [round(row["ratio_low"], 3), round(row["ratio_high"], 3)],
            "loss_over_plain": round(row["loss_over_plain"], 3),
            "plain_interval": [round(row["plain_low"], 3), round(row["plain_high"], 3)],
            "skill": round(row["skill"], 3),
        }  # fmt: skip
    fits = [
        {
            "checkpoint": row["checkpoint"], "probe": row["probe"], "start": row["start"],
            "head": row["head"], "fraction": row["fraction"],
            "learning_rate": row["learning_rate"], "skill": round(row["skill"], 3),
            "validation": round(row["validation"], 3),
        }
        for row in tuned.to_dict("records")
    ]  # fmt: skip
    tenth = rows_where(best, start="trained", fraction=0.1)
    found: dict[str, Any] = {"labels": labels, "finetuned": fits}
    if len(tenth):
        ratios = ["loss_over_scratch", "loss_over_plain"]
        means = tenth.groupby("checkpoint")[["validation", *ratios]].mean()
        name = means["validation"].idxmax()
        found["labels_10pct_best"] = name
        for reference, ratio in zip(("scratch", "plain_scratch"), ratios, strict=True):
            found[f"labels_10pct_vs_{reference}_100pct"] = round(means.loc[name, ratio], 3)
    return found


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
    parser.add_argument("--probe", nargs="*", default=[], metavar="KEY=VALUE", help="of the probes")
    parser.add_argument("--finetune", type=int, default=0, metavar="STEPS")
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.01, 0.1, 1.0])
    parser.add_argument("--finetune-of", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--probed", nargs="*", metavar="NAME", help="default: all")
    parser.add_argument("--no-cost", action="store_true")
    parser.add_argument("--no-exact", action="store_true", help="without resume_exact")
    parser.add_argument("--cost-of", choices=list(EXPERIMENTS), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.cost_of:
        print(json.dumps(cost_of(arguments.cost_of, arguments.set)))
        return
    with tempfile.TemporaryDirectory() as scratch:
        figures = measured(parser, arguments, arguments.runs or Path(scratch))
    finish("representations", figures)


def measured(
    parser: argparse.ArgumentParser, arguments: argparse.Namespace, runs: Path
) -> dict[str, Any]:
    """All figures, in the order of the work; runs: where it is kept."""
    checkpoints = dict(item.split("=", 1) for item in arguments.checkpoints)
    names, steps = arguments.objectives or list(EXPERIMENTS), arguments.train
    figures: dict[str, Any] = {"training_steps": steps, "training_changes": arguments.set}
    runs.mkdir(parents=True, exist_ok=True)
    if steps:
        checkpoints |= trained(names, steps, runs, arguments.set)
        spent = {name: runs / f"{name}_{steps}" / "cpu_seconds.json" for name in names}
        figures["cpu_seconds"] = {
            n: json.loads(f.read_text()) for n, f in spent.items() if f.exists()
        }
        if not arguments.no_exact:
            exact = {name: resumes_exactly(name, steps, runs, arguments.set) for name in names}
            figures |= {"resume_exact": sum(exact.values())}
            figures["resume_inexact"] = [name for name, same in exact.items() if not same]
    if not checkpoints:
        parser.error("name --checkpoints NAME=PATH or --train STEPS")
    known = [name for name in checkpoints if name in EXPERIMENTS]
    counts = {"objectives_trained": len(checkpoints)}
    if arguments.probed is not None:
        checkpoints = {name: checkpoints[name] for name in arguments.probed}
    counts["objectives_probed"] = len(checkpoints)
    words = [f"every={arguments.every}", *arguments.probe]
    more = [f"finetune.fractions={arguments.fractions}", f"finetune.steps={arguments.finetune}"]
    of = checkpoints if arguments.finetune_of is None else arguments.finetune_of
    tuned = {name: more for name in of if arguments.finetune}
    figures = figures_of(tables_of(checkpoints, words, runs, tuned)) | figures
    figures |= counts | {
        "every": arguments.every,
        "probe_changes": arguments.probe,
        "finetuning_steps": arguments.finetune,
    }
    if not arguments.no_cost:
        figures["cost_vs_masked"], figures["cost_failed"] = costs(known, arguments.set, runs)
    return figures


if __name__ == "__main__":
    main()

"""Whether a change leaves every number as it was: digests of losses and predictions.

    python -m benchmarks.neutral                    print the digests, and keep them in results/
    python -m benchmarks.neutral --check            compare with those kept; exit 1 if any differs
    python -m benchmarks.neutral --against FOLDER   compare with the code of another worktree, now

`losses` are the first 40 training losses of `experiment=quickstart` with seed 0, `validation` its
ratios of errors after them, from the averaged weights: both through `atmossl train`. `trainer.
max_steps` is 40 here, so that the learning rate falls earlier than in the 300 steps of the whole
run. The other digests are of predictions by the checkpoints that ship, on two dates of the sample's
test split. A digest is the sha256 of the float32 values in their order; 16 digits of it are shown.

Sums of floating-point numbers depend on the order in which a processor's vector units and threads
take them. One thread is used here. Digests therefore hold for one kind of processor and one
version of torch and numpy. They are kept for every processor by its name, with these versions
beside them. Where a processor or a version is new, `--check` says so before it computes anything,
and how to compare all the same.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
import xarray as xr

from benchmarks.report import device_name, finish

TASKS = ("forecast", "temporal_interpolation", "downscaling", "inpainting")
DATES = ("1959-02-12T00", "1959-02-16T12")
STEPS = 40
_ROOT = Path(__file__).parents[1]
_RESULT = _ROOT / "benchmarks" / "results" / "neutral.json"
_RUN = (
    "experiment=quickstart", "seed=0", f"trainer.max_steps={STEPS}", "trainer.log_interval=1",
    f"trainer.validation_interval={STEPS}", f"trainer.checkpoint_interval={STEPS}",
    "trainer.accelerator=cpu", "trainer.pictures=false", "logger.tensorboard=false",
)  # fmt: skip


def digest(values: Any) -> str:
    """sha256 of the values as little-endian float32."""
    return hashlib.sha256(np.ascontiguousarray(values, "<f4").tobytes()).hexdigest()


def dataset_digest(dataset: xr.Dataset) -> str:
    """Of all variables of a prediction, in the order of their names."""
    names = sorted(map(str, dataset.data_vars))
    return digest(np.concatenate([dataset[name].values.ravel() for name in names]))


def training_digests(folder: Path) -> dict[str, str]:
    """Train in a process of its own, which has one thread from its start."""
    command = [sys.executable, "scripts/train.py", *_RUN, f"paths.output={folder}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, cwd=_ROOT, env=one_thread())
    table = pd.read_csv(folder / "metrics.csv")
    losses = table["train/loss"].dropna()
    assert len(losses) == STEPS, f"{len(losses)} losses of {STEPS} steps"
    # `ratio/` was renamed `rmse_ratio/`; digests are compared across that change
    ratios = sorted(name for name in table if name.startswith(("ratio/", "rmse_ratio/")))
    return {
        "losses": digest(losses.to_numpy()),
        "validation": digest(table[ratios].dropna().to_numpy()),
    }


def prediction_digests() -> dict[str, str]:
    import atmossl

    torch.set_num_threads(1)
    digests = {}
    for checkpoint in ("default", "default_streams"):
        model, dataset = atmossl.load(checkpoint, device="cpu"), atmossl.open_data("sample")
        for task in TASKS:
            # the digests are of downscaling before its coarse cells kept their given means
            choices: dict[str, Any] = {"consistent": False} if task == "downscaling" else {}
            predicted = model.predict(task, dataset, list(DATES), **choices)
            digests[f"{checkpoint}/{task}"] = dataset_digest(predicted)
    return digests


def one_thread() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": "."}


def machine() -> dict[str, str]:
    """What digests depend on beside the code."""
    torch.set_num_threads(1)
    return {
        "processor": device_name(),
        "vector_units": torch.backends.cpu.get_cpu_capability(),
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def measure() -> dict[str, Any]:
    """All digests, and what they depend on beside the code."""
    with tempfile.TemporaryDirectory() as folder:
        digests = {**training_digests(Path(folder) / "run"), **prediction_digests()}
    return {"digests": {name: value[:16] for name, value in digests.items()}, "machine": machine()}


def processor_of(machine: Mapping[str, str]) -> str:
    """The name under which the digests of a processor are kept."""
    return f"{machine['processor'].partition(',')[0]}, {machine['vector_units']}"


def kept_for(this_machine: Mapping[str, str], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The digests that are kept for this machine.

    Raises:
        SystemExit: there are none, or those of other versions; says what to do.
    """
    processor = processor_of(this_machine)
    figures = stored.get(processor)
    if figures is not None and figures["machine"] == this_machine:
        return figures
    others = ", ".join(stored) or "none"
    fault = (
        f"no digests are kept for the processor {processor} (kept: {others})"
        if figures is None
        else f"the digests kept for {processor} are of {figures['machine']}, this machine is "
        f"{dict(this_machine)}"
    )
    raise SystemExit(
        f"{fault}. To compare a change all the same: git worktree add ../before main, then "
        "python -m benchmarks.neutral --against ../before. To keep digests of this processor: run "
        "python -m benchmarks.neutral at a commit without the change and commit "
        "benchmarks/results/neutral.json, in which those of the other processors stay"
    )


def measured_in(worktree: Path) -> dict[str, Any]:
    """The same by the code of another worktree, with this process's packages."""
    command = [sys.executable, "-m", "benchmarks.neutral", "--print"]
    finished = subprocess.run(
        command, cwd=worktree, stdout=subprocess.PIPE, text=True, check=True, env=one_thread()
    )
    return json.loads(finished.stdout.splitlines()[-1])["figures"]


def differing(now: Mapping[str, Any], before: Mapping[str, Any]) -> list[str]:
    """Names of the digests that are not what they were, on one machine."""
    assert now["machine"] == before["machine"], (now["machine"], before["machine"])
    digests_now, digests_before = now["digests"], before["digests"]
    return sorted(
        name
        for name in {*digests_now, *digests_before}
        if digests_now.get(name) != digests_before.get(name)
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    choice = parser.add_mutually_exclusive_group()
    choice.add_argument("--check", action="store_true", help="compare with results/neutral.json")
    choice.add_argument("--against", type=Path, metavar="FOLDER", help="a worktree to compare with")
    choice.add_argument("--print", action="store_true", help="keep nothing")
    arguments = parser.parse_args()
    stored = json.loads(_RESULT.read_text())["figures"]
    before = kept_for(machine(), stored) if arguments.check else None
    figures = measure()
    if arguments.check or arguments.against:
        changed = differing(figures, before or measured_in(arguments.against))
        print(json.dumps({"benchmark": "neutral", "changed": changed, "figures": figures}))
        raise SystemExit(f"changed: {', '.join(changed)}" if changed else 0)
    if arguments.print:
        print(json.dumps({"benchmark": "neutral", "figures": figures}))
        return
    finish("neutral", {**stored, processor_of(figures["machine"]): figures})


if __name__ == "__main__":
    main()

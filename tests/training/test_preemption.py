"""Signals to real training processes, and the Slurm script with a stub of every Slurm command."""

import os
import signal
import subprocess
from pathlib import Path

import pandas as pd
import pytest

from atmossl.checkpoint_files import read_contents
from atmossl.training.keeping import checkpoints_in
from atmossl.training.preemption import wants_requeue
from tests.processes import (
    run,
    run_ranks,
    signal_at_batch,
    signal_in_validation,
    stub,
    training,
)
from tests.training.test_resume import differing

ROOT = Path(__file__).resolve().parents[2]
SLURM = {
    "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "test", "SLURM_NTASKS": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_NNODES": "1",
}  # fmt: skip


@pytest.mark.e2e
def test_sigusr1_under_slurm_finishes_the_step_saves_and_requeues(tmp_path: Path) -> None:
    """The signal comes in the first half of the third accumulated step."""
    stub(tmp_path / "bin", "scontrol", f'echo "$@" >> {tmp_path}/scontrol.log')
    slurm = {**SLURM, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    arguments = training(tmp_path / "run", "trainer.accumulate=2", "resume=auto")
    before = (signal_at_batch, (5, signal.SIGUSR1))
    assert run(arguments, cache=tmp_path, before=before, **slurm) == 0
    assert (tmp_path / "scontrol.log").read_text() == "requeue 4711\n"
    (saved,) = checkpoints_in(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-3.ckpt"
    assert run(arguments, cache=tmp_path, **slurm) == 0  # the requeued job
    last = read_contents(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert last["global_step"] == 8
    assert (tmp_path / "scontrol.log").read_text().count("requeue") == 1


@pytest.mark.e2e
@pytest.mark.distributed
def test_sigterm_to_one_rank_ends_all_ranks_after_the_same_step(tmp_path: Path) -> None:
    arguments = training(tmp_path / "run", "trainer.strategy=ddp")
    before = (signal_at_batch, (3, signal.SIGTERM))
    codes = run_ranks(arguments, 2, cache=tmp_path, before=before)
    assert codes == [128 + signal.SIGTERM] * 2
    (saved,) = checkpoints_in(tmp_path / "run" / "checkpoints")
    assert saved.name == "step-3.ckpt"


@pytest.mark.e2e
def test_sigterm_in_a_validation_leaves_after_its_batch_and_loses_nothing(tmp_path: Path) -> None:
    """The run that goes on ends with the weights and moments of the unbroken one."""
    more = ("trainer.validation_interval=3", "trainer.validation_batches=4")
    assert run(training(tmp_path / "whole", *more), cache=tmp_path) == 0
    arguments = training(tmp_path / "broken", *more, "resume=auto")
    before = (signal_in_validation, (signal.SIGTERM, tmp_path / "batches"))
    assert run(arguments, cache=tmp_path, before=before) == 128 + signal.SIGTERM
    assert (tmp_path / "batches").read_text() == "v"
    (saved,) = checkpoints_in(tmp_path / "broken" / "checkpoints")
    assert saved.name == "step-3.ckpt"
    assert run(arguments, cache=tmp_path) == 0
    ends = [
        read_contents(tmp_path / name / "checkpoints" / "last.ckpt") for name in ("whole", "broken")
    ]
    kept = [{key: end[key] for key in ("state_dict", "optimizer_states")} for end in ends]
    assert differing(*kept) == []


@pytest.mark.e2e
def test_sigterm_in_the_last_validation_lets_the_run_end(tmp_path: Path) -> None:
    """Nothing would be left to go on with, so that its score would be lost."""
    more = ("trainer.max_steps=3", "trainer.validation_interval=3", "trainer.validation_batches=4")
    before = (signal_in_validation, (signal.SIGTERM, tmp_path / "batches"))
    assert run(training(tmp_path / "run", *more), cache=tmp_path, before=before) == 0
    table = pd.read_csv(tmp_path / "run" / "metrics.csv")
    assert table["rmse_ratio/mean"].notna().sum() == 1


@pytest.mark.parametrize(
    ("number", "environment", "expected"),
    [
        (signal.SIGUSR1, {"SLURM_JOB_ID": "1"}, True),
        (signal.SIGUSR1, {}, False),
        (signal.SIGTERM, {"SLURM_JOB_ID": "1"}, False),  # cancelled by the user, perhaps
        (signal.SIGTERM, {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "1060"}, True),
        (signal.SIGTERM, {"SLURM_JOB_ID": "1", "SLURM_JOB_END_TIME": "99999"}, False),
    ],
)
def test_a_job_is_requeued_when_its_time_is_up(number, environment, expected) -> None:
    assert wants_requeue(number, environment, now=1000.0) is expected


def test_the_slurm_script_starts_one_task_per_device(tmp_path: Path) -> None:
    """`sbatch` runs the script as Slurm would, `srun` records what it is asked to start."""
    commands = tmp_path / "bin"
    stub(commands, "sbatch", 'exec bash "$@"')
    stub(commands, "srun", 'printf "%s\\n" "$@"; echo "at $MASTER_ADDR:$MASTER_PORT"')
    stub(
        commands, "scontrol", '[[ "$*" == "show hostnames node[1-2]" ]] && echo node1 && echo node2'
    )
    environment = {
        "PATH": f"{commands}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "4711", "SLURM_JOB_NAME": "wind", "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "4", "SLURM_CPUS_PER_TASK": "8",
    }  # fmt: skip
    done = subprocess.run(
        ["sbatch", "scripts/slurm/train.sbatch", "experiment=quickstart", "model=large"],
        cwd=ROOT, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    lines = done.stdout.splitlines()
    assert lines[-1] == "at node1:24711"
    expected = {"scripts/train.py", "trainer.num_nodes=2", "trainer.devices=4", "resume=auto"}
    expected |= {"paths.output=runs/wind-4711", "experiment=quickstart", "model=large"}
    assert expected <= set(lines)

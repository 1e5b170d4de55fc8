"""Several runs from one command: one after the other, searched by Optuna, submitted to Slurm."""

import os
from pathlib import Path

import pytest
import yaml

from atmossl.cli import main
from tests.processes import run, stub, training

pytestmark = pytest.mark.e2e


def sweep(folder: Path, *more: str) -> list[str]:
    command, *rest = training(folder / "unused", "trainer.max_steps=2", "optimizer.warmup_steps=1")
    rest = [item for item in rest if not item.startswith("paths.output=")]
    return [command, "-m", *rest, f"hydra.sweep.dir={folder / 'sweep'}", *more]


def test_every_value_is_a_run_in_a_folder_of_its_own(tmp_path: Path) -> None:
    tasks = ("tasks=[forecast]", "tasks.forecast.lead_time=6h")
    assert run(sweep(tmp_path, "model.dim=16,32", *tasks), cache=tmp_path) == 0
    for number, dim in enumerate((16, 32)):
        folder = tmp_path / "sweep" / str(number)
        config = yaml.safe_load((folder / "config.yaml").read_text())
        assert config["model"]["dim"] == dim
        assert [task["lead_time"] for task in config["tasks"]] == ["6h"]
        assert (folder / "checkpoints" / "step-2.ckpt").exists()


def test_what_is_wrong_with_a_sweep_is_one_line(tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path))
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # the command changes it
    monkeypatch.setattr("sys.argv", [])
    for wrong, told in (
        (("model.dim=17,32",), "atmossl train: model.dim=17 of stream"),
        (("hparams_search=nope",), "atmossl train: In 'train'"),
        (("tasks=forecast,hindcast",), "atmossl train: tasks=forecast,hindcast: the runs of a"),
        (("launcher=slurm",), "atmossl train: launcher=slurm: this machine has no `srun`"),
    ):
        assert main(sweep(tmp_path, *wrong)) == 2
        captured = capsys.readouterr()
        assert captured.err.splitlines()[-1].startswith(told), captured.err
        assert "Traceback" not in captured.err + captured.out


def test_optuna_finds_the_lowest_score_of_its_trials(tmp_path: Path) -> None:
    more = ("hparams_search=optuna", "hydra.sweeper.n_trials=2", "trainer.validation_interval=2")
    assert run(sweep(tmp_path, *more), cache=tmp_path) == 0
    results = yaml.safe_load((tmp_path / "sweep" / "optimization_results.yaml").read_text())
    assert set(results["best_params"]) == {
        "optimizer.learning_rate", "optimizer.weight_decay", "model.feedforward_ratio",
    }  # fmt: skip
    assert 0.5 < results["best_value"] < 2.0
    assert (tmp_path / "sweep" / "1" / "checkpoints" / "best.ckpt").exists()


@pytest.mark.slow
def test_a_slurm_sweep_submits_jobs_that_train(tmp_path: Path) -> None:
    """`sbatch` keeps the script and starts it, as a job that found a free node."""
    commands = tmp_path / "bin"
    job = "SLURM_JOB_ID=4711 SLURM_NTASKS=1 SLURM_PROCID=0 SLURM_LOCALID=0 SLURM_NODEID=0"
    job += " SLURM_JOB_NAME=test SLURM_NNODES=1 SLURM_JOB_NODELIST=localhost"
    done = tmp_path / "done"
    start = f"({job} bash {tmp_path}/job.sh; touch {done}) >{tmp_path}/job.log 2>&1 &"
    keep = f'cp "${{@: -1}}" {tmp_path}/job.sh'
    stub(commands, "sbatch", f"{keep}\n{start}\necho Submitted batch job 4711")
    stub(commands, "srun", 'while [[ $1 != *python* ]]; do shift; done\nexec "$@"')
    state = f"$([[ -e {done} ]] && echo COMPLETED || echo RUNNING)"
    stub(commands, "sacct", f'echo "JobID|State|NodeList"; echo "4711|{state}|localhost"')
    stub(commands, "scontrol", "echo localhost")
    more = ("launcher=slurm", "hydra.launcher.partition=small", "trainer.accelerator=cpu")
    more = (*more, "tasks=[forecast]")  # which the jobs are told beside what Hydra tells them
    path = f"{commands}:{os.environ['PATH']}"
    assert run(sweep(tmp_path, *more), cache=tmp_path, PATH=path) == 0
    script = (tmp_path / "job.sh").read_text()
    for line in ("--partition=small", "--signal=USR2@90", "--ntasks-per-node=1", "--time=720"):
        assert f"#SBATCH {line}" in script
    assert (tmp_path / "sweep" / "0" / "checkpoints" / "step-2.ckpt").exists()

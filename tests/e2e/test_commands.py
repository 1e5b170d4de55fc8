"""The commands as a user runs them, on stores made here."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from atmossl.cli import main
from atmossl.data.catalog import find_file
from tests.processes import command
from tests.synthetic import catalog, dataset

pytestmark = pytest.mark.e2e
VARIABLES = ("temperature", "u_component_of_wind")
PROGRAM = Path(sys.executable).with_name("atmossl")


def training(output: Path, *more: str) -> tuple[str, ...]:
    """A tiny run on two variables of the shipped sample."""
    return (
        "train", "experiment=quickstart", "model=tiny", f"paths.output={output}",
        "trainer.max_steps=4", "optimizer.warmup_steps=1", "trainer.checkpoint_interval=2",
        "trainer.validation_interval=4", "trainer.validation_batches=1", "data.num_workers=0",
        "data.batch_size=2", "trainer.accelerator=cpu", "trainer.pictures=false",
        f"stream.atmosphere.variables=[{','.join(VARIABLES)}]", *more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("e2e")
    done = command(*training(folder / "run"), cache=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    return folder / "run"


def test_two_processes_train(tmp_path: Path) -> None:
    more = ("trainer.devices=2", "trainer.strategy=ddp", "trainer.precision=bf16-mixed",
            "optimizer=muon", "optimizer.warmup_steps=1", "trainer.max_steps=2",
            "data.window={time: 5, lat: 8, lon: 16}")  # fmt: skip
    arguments = [PROGRAM, *training(tmp_path / "run", *more)]
    environment = os.environ | {"ATMOSSL_CACHE": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(arguments, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "run" / "checkpoints" / "last.ckpt").exists()


@pytest.mark.parametrize("task", ["forecast", "temporal_interpolation", "downscaling"])
def test_a_prediction_is_complete_and_dated(run: Path, task: str, tmp_path: Path) -> None:
    output = tmp_path / "out.zarr"
    arguments = (f"task={task}", f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", "data=sample",
                 "init_time=all", "every=1000", f"output={output}")  # fmt: skip
    done = command("predict", *arguments, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    with xr.open_zarr(output, consolidated=False) as store:
        assert all(np.isfinite(store[name].values).all() for name in store.data_vars)
        assert {"member", "latitude", "longitude"} <= set(store["temperature"].dims)
        assert store["temperature"].attrs["units"] == "K"
        assert 150 < float(store["temperature"].mean()) < 320
        assert ("init_time" in store.dims) == (task == "forecast")
    again = command("predict", *arguments, cache=tmp_path)
    assert again.returncode == 2 and "exists" in again.stderr


def test_an_evaluation_leaves_a_whole_report(run: Path, tmp_path: Path) -> None:
    arguments = (f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", "every=70", "bootstrap=10",
                 "tasks=[forecast]", "ridge=false", "overlap=0.0", "tilings=1",
                 f"output={tmp_path / 'report'}")  # fmt: skip
    done = command("evaluate", *arguments, cache=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "ratio persistence" in done.stdout
    figures = json.loads((tmp_path / "report" / "figures.json").read_text())
    # four steps from a random start have learnt nothing, so persistence it is
    assert figures["forecast_6h_vs_persistence"] == pytest.approx(1.0, abs=0.2)
    assert len(figures["per_variable"]) == 2
    scores = pd.read_csv(tmp_path / "report" / "scores.csv")
    sources = scores.groupby("task")["source"].unique()
    assert {"model", "persistence", "climatology"} == set(sources["forecast"])
    assert len(list((tmp_path / "report" / "maps").glob("*.png"))) == 2
    assert "<h1>" in (tmp_path / "report" / "index.html").read_text()
    assert "forecast" in (tmp_path / "report" / "summary.md").read_text()
    again = command("evaluate", *arguments, cache=tmp_path)
    assert again.returncode == 2 and "exists" in again.stderr


@pytest.mark.parametrize("times", [1, 2])
def test_an_exported_checkpoint_is_smaller_and_loads(run: Path, tmp_path: Path, times: int) -> None:
    whole, small = run / "checkpoints" / "last.ckpt", tmp_path / "small.ckpt"
    names = ",".join([str(whole)] * times)
    done = command("export", f"checkpoint={names}", f"output={small}", cache=tmp_path)
    assert done.returncode == 0, done.stderr
    assert small.stat().st_size < 0.5 * whole.stat().st_size
    done = command("info", f"checkpoint={small}", cache=tmp_path)
    assert done.returncode == 0 and "temperature" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("train", "data.name=nothing"), "nothing"),
        (("train", "model.depth=3"), "depth"),
        (("train", "trainer.max_steps=-1"), "max_steps"),
        (("train", "tasks=[{_target_:weather}]"), "weather"),
        (("predict", "task=forecast", "checkpoint=none.ckpt", "output=o.zarr"), "none.ckpt"),
        (("predict", "task=weather", "checkpoint=none.ckpt", "output=o.zarr"), "weather"),
        (("paint",), "paint"),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: tuple, message: str, tmp_path: Path) -> None:
    done = command(*arguments, cache=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_truncated_and_a_foreign_checkpoint_are_named(run: Path, tmp_path: Path) -> None:
    whole = (run / "checkpoints" / "last.ckpt").read_bytes()
    (tmp_path / "cut.ckpt").write_bytes(whole[: len(whole) // 2])
    torch.save({"weights": 1}, tmp_path / "foreign.ckpt")
    for name, message in (("cut", "truncated"), ("foreign", "not written by atmossl")):
        done = command("info", f"checkpoint={tmp_path / name}.ckpt", cache=tmp_path)
        assert done.returncode == 2
        assert message in " ".join(done.stderr.split())


def test_a_store_of_the_user_is_predicted_too(run: Path, tmp_path: Path) -> None:
    """Another grid size than the trained one; the checkpoint's own variables must be there."""
    path = catalog(tmp_path, test=dataset(variables=VARIABLES[:1], num_lat=32, num_lon=64))
    done = command(
        "predict", "task=forecast", f"checkpoint={run / 'checkpoints' / 'last.ckpt'}",
        "data=waves", f"data.catalog={path}", "init_time=all", f"output={tmp_path / 'o.zarr'}",
        cache=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2
    assert "u_component_of_wind" in done.stderr


def test_the_template_of_the_catalog_can_be_copied_and_listed(tmp_path, capsys) -> None:
    shipped = find_file("data_catalog.yaml").read_text()
    copy = tmp_path / "copy.yaml"
    copy.write_text(shipped[shipped.index("\nlocal:") :])
    assert main(["data", "list", f"data.catalog={copy}"]) == 0
    assert "local" in capsys.readouterr().out
    assert main(["data", "list", f"catalgo={copy}"]) == 2
    assert "catalgo=" in capsys.readouterr().err

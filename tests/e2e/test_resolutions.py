"""Two stores of different resolution to a checkpoint and a prediction, through the commands."""

from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr
import yaml

from atmossl.cli import main
from atmossl.inference.checkpoint import load_checkpoint
from tests.synthetic import dataset

pytestmark = pytest.mark.e2e
NAMES = ("temperature", "u_component_of_wind")


def fine_store() -> xr.Dataset:
    store = dataset(num_lat=16, num_lon=32, steps=24)
    return store.assign_coords(longitude=store.longitude + 0.5 * 360 / 32)


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entry `fine`, 6-hourly, and entry `coarse`: its means over 2 x 2 cells, 12-hourly."""
    folder, fine = tmp_path_factory.mktemp("stores"), fine_store()
    coarse = (
        fine[["temperature"]].coarsen(latitude=2, longitude=2).mean().isel(time=slice(0, None, 2))
    )
    entries = {}
    for name, store in (("fine", fine), ("coarse", coarse)):
        store.to_zarr(folder / f"{name}.zarr", consolidated=False)
        entries[name] = {
            "description": name, "licence": "none", "citation": "none", "levels": [300, 500, 850],
            "segments": {name: {"location": str(folder / f"{name}.zarr")}},
            "splits": {split: [{"segment": name}] for split in ("train", "validation", "test")},
            "variables": {str(v): str(v) for v in store.data_vars},
        }  # fmt: skip
    path = folder / "catalog.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def training(catalog: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "model=tiny", "stream=atmosphere", f"data.catalog={catalog}", "data.name=fine",
        f"stream.atmosphere.variables=[{','.join(NAMES)}]",
        "+stream.coarse={variables: [temperature], levels: [300, 500, 850], "
        "token_size: {time: 1, lat: 2, lon: 2, level: 3}, data: coarse, role: predict}",
        "data.window={time: 6, lat: 8, lon: 16}", "data.batch_size=2", "data.num_workers=0",
        "trainer.max_steps=2", "optimizer.warmup_steps=1", "trainer.validation_interval=2",
        "trainer.validation_batches=1", "trainer.log_interval=1", "trainer.accelerator=cpu",
        "trainer.pictures=false", f"paths.output={output}", *more,
    ]  # fmt: skip


@pytest.mark.usefixtures("undrawn")
def test_two_resolutions_train_and_predict(catalog: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path))
    assert main(training(catalog, tmp_path / "run")) == 0
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    trained = load_checkpoint(str(checkpoint))
    assert [spec.data for spec in trained.specs] == ["primary", "coarse"]
    fine, coarse = (trained.normaliser.values(spec, "std")[0] for spec in trained.specs)
    assert bool((coarse < fine).all())  # means of the same values
    assert moved(checkpoint)
    for task in ("forecast", "downscaling"):
        output = tmp_path / f"{task}.zarr"
        arguments = [f"task={task}", f"checkpoint={checkpoint}", f"data.catalog={catalog}",
                     "init_time=2001-01-03T06", f"output={output}"]  # fmt: skip
        assert main(["predict", *arguments]) == 0
        with xr.open_zarr(output, consolidated=False) as store:
            assert set(store.data_vars) == set(NAMES)
            assert store.sizes["latitude"] == 16 and store.sizes["longitude"] == 32
            assert all(np.isfinite(store[name].values).all() for name in NAMES)
    with xr.open_zarr(tmp_path / "forecast.zarr", group="coarse") as store:
        assert store.sizes["latitude"] == 8 and store.sizes["longitude"] == 16
        assert np.isfinite(store["temperature"].values).all()
    scored = ["evaluate", f"forecasts=[{tmp_path}/forecast.zarr/coarse]", "data=coarse",
              f"data.catalog={catalog}", f"output={tmp_path}/report", "bootstrap=10"]  # fmt: skip
    assert main(scored) == 0


def moved(checkpoint: Path) -> bool:
    """Whether what reads the coarse stream, which begins at 0, has been trained."""
    weights = torch.load(checkpoint, weights_only=True)["state_dict"]
    names = [n for n in weights if n.startswith("model.") and "coupling.coarse.out" in n]
    return bool(names) and all(bool(weights[name].abs().sum() > 0) for name in names)


def test_a_misfit_is_one_line(catalog: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path))
    for more, message in (
        ("stream.coarse.data=era6", "era6"),
        ("stream.coarse.data=fine", "leave it out"),
        ("stream.coarse.variables=[u_component_of_wind]", "stream.coarse.variables"),
        ("data.window.time=5", "data.window.time=5"),
        ("data.window.lat=6", "token_size.lat"),
        ("stream.atmosphere.role=input", "role predict"),
    ):
        assert main(training(catalog, tmp_path / "run", more)) == 2
        assert message in capsys.readouterr().err

"""A run on a store of the user's own: nothing of it need be said a second time."""

import shutil
from pathlib import Path

import pytest
import torch
import xarray as xr
import yaml

from atmossl.cli import main
from atmossl.data.catalog import CatalogEntry, Period, SegmentEntry, remembered
from tests.synthetic import dataset

STEPS = (
    "model=tiny", "trainer.max_steps=2", "optimizer.warmup_steps=1", "trainer.pictures=false",
    "trainer.accelerator=cpu", "data.batch_size=2", "trainer.validation_batches=1",
    "trainer.checkpoint_interval=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run on `era5.zarr`, which `data add` has named."""
    folder = tmp_path_factory.mktemp("own")
    dataset(steps=80).to_zarr(folder / "era5.zarr", consolidated=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("ATMOSSL_CACHE", str(folder / "cache"))
        assert main(["data", "add", "era5.zarr", "name=mine"]) == 0
        assert main(["train", "data=mine", "paths.output=run", *STEPS]) == 0
    return folder / "run"


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_its_checkpoint_knows_its_store_in_any_folder(run, elsewhere) -> None:
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    words = [checkpoint, "init_time=all", "every=40", "accelerator=cpu"]
    assert main(["predict", "task=forecast", *words, "output=forecast.zarr"]) == 0
    assert main(["embed", *words, "output=latents.zarr"]) == 0
    with xr.open_zarr(elsewhere / "forecast.zarr", consolidated=False) as store:
        assert set(store.data_vars) == {"temperature", "u_component_of_wind"}


@pytest.mark.usefixtures("elsewhere")
def test_a_store_that_has_moved_is_asked_for_in_one_line(run, capsys) -> None:
    checkpoint = f"checkpoint={run / 'checkpoints' / 'last.ckpt'}"
    store, moved = run.parent / "era5.zarr", run.parent / "moved.zarr"
    words = ["predict", "task=forecast", checkpoint, "every=40", "accelerator=cpu"]
    shutil.move(store, moved)
    try:
        assert main([*words, "output=a.zarr"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert f"trained on {store}" in line and "data=PATH" in line
        assert main([*words, f"data={moved}", "output=b.zarr"]) == 0
    finally:
        shutil.move(moved, store)


def test_it_goes_on_with_its_own_configuration(run, monkeypatch, capsys) -> None:
    monkeypatch.chdir(run.parent)
    monkeypatch.setenv("ATMOSSL_CACHE", str(run.parent / "cache"))
    before = yaml.safe_load((run / "config.yaml").read_text())
    words = ["train", "paths.output=run", "resume=auto", "trainer.max_steps=3"]
    assert main(words) == 0
    told = " ".join(capsys.readouterr().err.split())
    assert "run/config.yaml; changed: trainer.max_steps=3 (was 2)" in told
    contents = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    assert contents["atmossl"]["step"] == 3
    after = yaml.safe_load((run / "config.yaml").read_text())
    assert after["trainer"].pop("max_steps") == 3 and before["trainer"].pop("max_steps") == 2
    assert {**after, "resume": None} == before
    assert main([*words, "model.dim=64"]) == 2
    assert "model.dim=32, not 64" in capsys.readouterr().err
    assert main([*words, "model.dmi=64"]) == 2
    assert "unknown key model.dmi" in capsys.readouterr().err
    assert main([*words, "trainer=ddp", "trainer.max_steps=-1"]) == 2
    assert "trainer.max_steps" in capsys.readouterr().err


def test_words_that_give_access_are_not_remembered() -> None:
    options = {"token": "anon", "secret": "abc", "client_kwargs": {"endpoint_url": "https://x"}}
    segments = {"a": SegmentEntry(location="s3://b/c.zarr", storage_options=options)}
    entry = CatalogEntry(
        description="", licence="", citation="", variables={"t": "t"}, segments=segments,
        splits={"train": (Period(segment="a"),)},
    )  # fmt: skip
    segment = remembered(entry)["segments"]["a"]
    assert segment["location"] == "s3://b/c.zarr"
    assert segment["storage_options"] == {k: v for k, v in options.items() if k != "secret"}

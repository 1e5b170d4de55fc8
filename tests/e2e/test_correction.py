"""Another model's forecasts to a correction, a prediction and its scores, through the commands."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import xarray as xr
import yaml

from atmossl.cli import main
from tests.synthetic import dataset

pytestmark = pytest.mark.e2e
BIAS = 0.7  # of the other model, in the variable's units, everywhere


def truth(seed: int = 0) -> xr.Dataset:
    store = dataset(num_lat=16, num_lon=32, steps=24, seed=seed)
    return store.assign_coords(longitude=store.longitude + 0.5 * 360 / 32)


def entry(folder: Path, stores: dict[str, xr.Dataset]) -> dict:
    for name, store in stores.items():
        store.to_zarr(folder / f"{name}.zarr", consolidated=False)
    first = next(iter(stores.values()))
    return {
        "description": folder.name, "licence": "none", "citation": "none",
        "levels": [300, 500, 850], "variables": {str(v): str(v) for v in first.data_vars},
        "segments": {name: {"location": str(folder / f"{name}.zarr")} for name in stores},
        "splits": {name: [{"segment": name}] for name in stores},
    }  # fmt: skip


@pytest.fixture(scope="module")
def catalog(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Entry `analysis`; `poor`, means over 2 x 2 of its cells plus a bias; `wet`, without its
    variables; `later`, 20 years after it; `altered`, other values on the cells of the analysis."""
    folder = tmp_path_factory.mktemp("stores")
    splits = {"train": 0, "validation": 1, "test": 2}
    analysis = {name: truth(seed) for name, seed in splits.items()}
    poor = {
        name: store.coarsen(latitude=2, longitude=2).mean().astype(np.float32) + np.float32(BIAS)
        for name, store in analysis.items()
    }
    wet = {n: s[["temperature"]].rename(temperature="ozone") for n, s in poor.items()}
    later = {n: s.assign_coords(time=s.time + np.timedelta64(7305, "D")) for n, s in poor.items()}
    altered = {n: truth(seed + 9) for n, seed in splits.items()}
    kinds = {"analysis": analysis, "poor": poor, "wet": wet, "later": later, "altered": altered}
    entries = {}
    for name, stores in kinds.items():
        (folder / name).mkdir()
        entries[name] = entry(folder / name, stores)
    path = folder / "catalog.yaml"
    path.write_text(yaml.safe_dump(entries))
    return path


def training(catalog: Path, output: Path, *more: str) -> list[str]:
    return [
        "train", "experiment=correction", "model=tiny", f"data.catalog={catalog}",
        "data.name=analysis", "stream.atmosphere.variables=[temperature,u_component_of_wind]",
        "stream.other_model.variables=[temperature]", "stream.other_model.data=poor",
        "stream.other_model.token_size={time: 1, lat: 1, lon: 1, level: 3}",
        "data.window.lat=16", "data.batch_size=2", "trainer.max_steps=2",
        "optimizer.warmup_steps=1", "trainer.validation_interval=2",
        "trainer.validation_batches=1", "trainer.accelerator=cpu", "trainer.pictures=false",
        f"paths.output={output}", *more,
    ]  # fmt: skip


@pytest.fixture(scope="module")
def checkpoint(catalog: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("run") / "corrected"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ATMOSSL_CACHE", str(run.parent))
        assert main(training(catalog, run)) == 0
    return run / "checkpoints" / "last.ckpt"


def test_a_correction_lies_on_the_analysis_grid_and_does_not_read_the_analysis(
    catalog: Path, checkpoint: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out.zarr"
    words = ["task=correction", f"checkpoint={checkpoint}", "init_time=2001-01-03T06"]
    assert main(["predict", *words, f"output={output}"]) == 0
    with xr.open_zarr(output, consolidated=False) as store:
        assert store.sizes["latitude"] == 16 and store.sizes["longitude"] == 32
        assert all(np.isfinite(field.values).all() for field in store.data_vars.values())
        again = tmp_path / "again.zarr"
        words += ["data=altered", f"data.catalog={catalog}", f"output={again}"]
        assert main(["predict", *words]) == 0
        with xr.open_zarr(again, consolidated=False) as other:
            xr.testing.assert_equal(store.load(), other.load())


@pytest.mark.usefixtures("undrawn")
def test_scores_stand_beside_those_of_the_other_model(checkpoint: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    words = [f"checkpoint={checkpoint}", "tasks=[correction]", "every=7", "tilings=1",
             "bootstrap=10", f"output={report}"]  # fmt: skip
    assert main(["evaluate", *words]) == 0
    scores = pd.read_csv(report / "scores.csv")
    chosen = scores[(scores.score == "rmse") & (scores.region == "global")]
    rmse = chosen.groupby(["source", "variable"])["value"].mean()
    sources = {"climatology", "uncorrected", "bias_corrected", "regression", "ridge"}
    assert sources <= set(chosen.source)
    # the poor model is as wrong as its bias, and what is lost in 2 x 2 cells
    assert BIAS < rmse["uncorrected", "temperature"] < 1.1 * BIAS
    assert rmse["bias_corrected", "temperature"] < 0.3 * BIAS
    missing = rmse.get(("uncorrected", "u_component_of_wind"))
    assert missing is None or np.isnan(missing)  # it has no wind


def test_what_does_not_fit_is_one_line(
    catalog: Path, checkpoint: Path, tmp_path: Path, capsys, monkeypatch
) -> None:
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path))
    run, output = tmp_path / "run", f"output={tmp_path}/o.zarr"
    no_other_model = ["~stream.other_model"]
    lines = [
        (["predict", "task=correction", output], "task=correction needs the fields of another"),
        (["evaluate", "tasks=[correction]", output], r"tasks\.correction needs the fields of"),
        (training(catalog, run, "stream.other_model.data=wet"), "stream.other_model.variables=.*"),
        (training(catalog, run, "stream.other_model.data=later"), "data=later: its periods"),
        (training(catalog, run, "stream.other_model.data=pour"), "stream.other_model.data"),
        (training(catalog, run, *no_other_model), "data.first_guess=other_model needs the fields"),
        (training(catalog, run, "data.first_guess=true", *no_other_model), "task=correction needs"),
        (["predict", "task=correction", f"checkpoint={checkpoint}", "init_time=2031-01-01", output],
         "init_time=2031-01-01T00 is not in segment"),
    ]  # fmt: skip
    for words, message in lines:
        assert main(words) == 2, words
        told = capsys.readouterr().err
        assert told.count("\n") <= 2 and pd.Series([told]).str.contains(message).all(), told

"""`atmossl predict` and `calibrate`, on a small checkpoint made here."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

from atmossl.cli import main
from atmossl.data.statistics import compute_statistics
from atmossl.inference.checkpoint import spec_to_dict
from atmossl.inference.writer import partial_of
from atmossl.model.multiformer import Multiformer
from tests.inference.oracle_models import NAMES, segment
from tests.processes import start
from tests.synthetic import catalog, dataset, spec

STORE = dataset(steps=12, variables=NAMES)
MODEL = {"dim": 16, "num_layers": 1, "num_decoder_layers": 1, "num_heads": 2, "num_members": 3}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog `waves`, and `tiny.ckpt` with a stream per variable and random weights."""
    folder = tmp_path_factory.mktemp("command")
    catalog(folder, train=STORE, validation=STORE, test=STORE)
    save_tiny(folder / "tiny.ckpt")
    return folder


def save_tiny(path: Path, missing: str = "refuse", **more: Any) -> None:
    """missing: of the wind's stream. more: settings of the network."""
    settings = MODEL | more
    specs = tuple(spec(name[0], variables=(name,), token=(1, 2, 2)) for name in NAMES)
    specs = (specs[0], replace(specs[1], missing=missing))
    torch.manual_seed(0)
    weights = Multiformer(streams=specs, **settings).state_dict()
    record = {
        "atmossl": "0.1.0",
        "torch": "2",
        "streams": [spec_to_dict(stream) for stream in specs],
        "model": settings,
        "statistics": compute_statistics([segment(STORE)]).to_dict(),
        "window": {"time": 5, "lat": 4, "lon": 8},
        "first_guess": True,
        "data": "waves",
        "step": 1,
        "step_hours": 6.0,
        "config": {"masking": {"_target_": "atmossl.masking.random.TimeBlockMasking"}},
    }
    state = {f"ema.module.{key}": value for key, value in weights.items()}
    torch.save({"state_dict": state, "atmossl": record}, path)


def arguments(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={folder / 'tiny.ckpt'}", f"data.catalog={folder / 'catalog.yaml'}",
        "accelerator=cpu", "batch_size=4", "tilings=1", f"output={output}", *more,
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("task", "dims"),
    [
        (["task=forecast", "task.lead_time=30h", "task.rollout_time=12h"], {"lead_time": 5}),
        (["task=hindcast"], {"lead_time": 2}),
        (["task=temporal_interpolation", "task.refine=2"], {"time": 4}),
        (["task=downscaling", "task.factor=2", "task.consistent=true"], {"time": 2}),
        (["task=inpainting"], {"time": 2}),
        (["task=cross_variable", "task.variables=[temperature]"], {"time": 2}),
        (["task=combined"], {"lead_time": 3}),
        (["task=counterfactual", "task.levels={500: 850}"], {"lead_time": 2}),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_every_task_runs(folder: Path, tmp_path: Path, task: list[str], dims: dict) -> None:
    output = tmp_path / "out.zarr"
    chosen = "init_time=[2001-01-02,2001-01-02T06]"
    assert main(["predict", *task, chosen, *arguments(folder, output)]) == 0
    with xr.open_zarr(output, consolidated=False, decode_timedelta=True) as found:
        assert set(found.data_vars) == set(NAMES)
        sizes = {"member": 3, "level": 3, "latitude": 8, "longitude": 16, **dims}
        assert {name: found.sizes[name] for name in sizes} == sizes
        assert all(np.isfinite(found[name].values).all() for name in NAMES)


def test_a_task_of_ones_own_is_a_file(folder: Path, tmp_path: Path) -> None:
    file, output = tmp_path / "mine.yaml", tmp_path / "out.zarr"
    file.write_text("_target_: inpainting\nboxes: [[-30, 30, 0, 90]]\n")
    own = [f"task={file}", "task.hidden_time=6h", "every=6"]
    assert main(["predict", *own, *arguments(folder, output)]) == 0
    with xr.open_zarr(output, consolidated=False) as found:
        spread = found["temperature"].std("member").isel(time=0, level=0)
        inside = (abs(found.latitude) < 30) & (found.longitude <= 90)
        assert ((spread > 1e-4) == inside).all()  # float32 rounds the rest


@pytest.fixture(scope="module")
def gappy(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A catalog with the same checkpoint: `test` lacks wind in a box, and `validation` is two."""
    own = tmp_path_factory.mktemp("gappy")
    store = STORE.copy(deep=True)
    store["u_component_of_wind"].values[:, :, 2:5, 3:8] = np.nan
    later = dataset(steps=12, variables=NAMES, start="2001-02-01")
    later.to_zarr(own / "later.zarr", consolidated=False)
    path = catalog(own, train=STORE, validation=STORE, test=store)
    text = path.read_text().replace(
        "validation: [{segment: validation}]", "validation: [{segment: train}, {segment: later}]"
    )
    also = f"    later: {{location: {own / 'later.zarr'}}}"
    path.write_text(text.replace("  splits:", f"{also}\n  splits:"))
    (own / "tiny.ckpt").symlink_to(folder / "tiny.ckpt")
    return own


def test_missing_values_are_filled(gappy: Path, tmp_path: Path, capsys) -> None:
    output = tmp_path / "out.zarr"
    given = [*arguments(gappy, output), "task=inpainting", "task.boxes=[]", "every=4"]
    assert main(["predict", *given]) == 2  # nothing is named that could be hidden
    assert "task.missing=false" in capsys.readouterr().err
    assert main(["predict", *given, "task.missing=true"]) == 0
    with xr.open_zarr(output, consolidated=False) as found:
        assert np.isfinite(found["u_component_of_wind"].values).all()
        spread = found["u_component_of_wind"].std("member").isel(time=0, level=0).values
        assert (spread[2:5, 3:8] > 1e-4).all() and (spread > 1e-4).sum() == 15
        assert (found["temperature"].std("member") < 1e-4).all()
    report = [a for a in arguments(gappy, tmp_path / "report") if not a.startswith("output")]
    file = tmp_path / "fill.yaml"
    file.write_text("_target_: inpainting\nmissing: true\n")
    capsys.readouterr()
    report += [f"tasks=[{file}]", f"output={tmp_path / 'report'}"]
    assert main(["evaluate", *report]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "has no truth" in line


@pytest.mark.usefixtures("undrawn")
def test_fields_with_missing_values_are_scored(gappy: Path, tmp_path: Path, capsys) -> None:
    """Against all baselines that can answer; only what is never missing has a regression."""
    save_tiny(tmp_path / "gaps.ckpt", missing="mask")
    (tmp_path / "fine.yaml").write_text("_target_: downscaling\nfactor: 2\n")
    (tmp_path / "box.yaml").write_text("_target_: inpainting\nboxes: [[-50, 0, 0, 120]]\n")
    given = [a for a in arguments(gappy, tmp_path / "report") if "checkpoint" not in a]
    given += [f"tasks=[{tmp_path}/fine.yaml,{tmp_path}/box.yaml]", "bootstrap=10", "every=3",
              f"checkpoint={tmp_path}/gaps.ckpt", "regions=[]"]  # fmt: skip
    assert main(["evaluate", *given]) == 0
    assert "no ridge regression of u_component_of_wind," in capsys.readouterr().err
    table = pd.read_csv(tmp_path / "report" / "scores.csv").query("score == 'rmse'")
    rows = table.groupby(["task", "source", "variable"])["value"]
    lacking = rows.apply(lambda values: values.isna().any())
    sources = {"downscaling": {"bicubic", "bilinear", "conservative"},
               "inpainting": {"harmonic", "climatology"}}  # fmt: skip
    for task, baselines in sources.items():
        assert set(lacking[task].index.get_level_values(0)) == {"model", "ridge", *baselines}
        found = lacking[task][lacking[task]]
        assert list(found.index) == [("ridge", "u_component_of_wind")]


def test_a_split_of_several_segments(gappy: Path, tmp_path: Path, capsys) -> None:
    """Dates of both in one output; one of them by name; a date of neither in one line."""
    both, one = tmp_path / "both.zarr", tmp_path / "one.nc"
    split = ["task=forecast", "split=validation"]
    dates = "init_time=[2001-01-02,2001-02-02T06]"
    assert main(["predict", *split, dates, *arguments(gappy, both)]) == 0
    assert main(["predict", *split, "segment=later", "every=3", *arguments(gappy, one)]) == 0
    with xr.open_zarr(both, consolidated=False, decode_timedelta=True) as found:
        assert found["init_time"].dt.month.values.tolist() == [1, 2]
        later = found.isel(init_time=1).load()
    with xr.open_dataset(one, decode_timedelta=True) as found:
        assert (found["init_time"].dt.month == 2).all()
        same = found.sel(init_time=later.init_time)
        np.testing.assert_allclose(later["temperature"], same["temperature"], atol=1e-5)
    capsys.readouterr()
    bad = ["init_time=2001-01-20", *arguments(gappy, tmp_path / "no.zarr")]
    assert main(["predict", *split, *bad]) == 2
    assert "2001-02-01T12" in capsys.readouterr().err
    assert main(["predict", *split, "segment=none", *arguments(gappy, tmp_path / "no.zarr")]) == 2
    assert "valid: later, train" in capsys.readouterr().err


@pytest.mark.e2e
@pytest.mark.usefixtures("undrawn")
@pytest.mark.parametrize("kind", ["mask_file", "stations"])
def test_regions_from_files_are_predicted_and_scored(
    folder: Path, tmp_path: Path, capsys, kind: str
) -> None:
    cells = np.zeros((8, 16), bool)
    cells[2:6, 4:12] = True
    mask = xr.Dataset(
        {"hidden": (("latitude", "longitude"), cells.astype("int8"))},
        {name: STORE[name] for name in ("latitude", "longitude")},
    )
    if kind == "mask_file":
        file = tmp_path / "mask.nc"
        mask.to_netcdf(file)
    else:
        file, places = tmp_path / "stations.csv", np.argwhere(~cells)
        lat, lon = STORE["latitude"].values, STORE["longitude"].values
        rows = [f"{lat[row] + 1},{lon[column] - 3}" for row, column in places]
        file.write_text("\n".join(["latitude,longitude", *rows]))
    task, output = tmp_path / "own.yaml", tmp_path / "out.zarr"
    task.write_text(f"_target_: inpainting\n{kind}: {file}\n")
    assert main(["predict", f"task={task}", "every=4", *arguments(folder, output)]) == 0
    with xr.open_zarr(output, consolidated=False) as found:
        spread = found["temperature"].std("member").isel(time=0, level=0)
        np.testing.assert_array_equal(spread > 1e-4, cells)
    if kind == "stations":
        return
    report = tmp_path / "report"
    options = [f"tasks=[{task}]", "ridge=false", "bootstrap=10", "every=3"]
    assert main(["evaluate", *options, *arguments(folder, report)]) == 0
    scores = pd.read_csv(report / "scores.csv")
    assert set(scores["source"]) == {"model", "harmonic", "climatology"}
    mask.isel(latitude=slice(1, None)).to_netcdf(tmp_path / "other.nc")
    task.write_text(f"_target_: inpainting\nmask_file: {tmp_path / 'other.nc'}\n")
    capsys.readouterr()
    for command, key in (("predict", f"task={task}"), ("evaluate", f"tasks=[{task}]")):
        assert main([command, key, *arguments(folder, tmp_path / f"no-{command}.nc")]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "other.nc: its cells are not those of the store: 7 latitudes" in line
        assert "regrid the mask" in line


def test_what_training_never_hid_is_noted(folder: Path, tmp_path: Path, capsys) -> None:
    far = ["task=forecast", "task.lead_time=18h", "task.rollout_time=null", "every=100"]
    assert main(["predict", *far, *arguments(folder, tmp_path / "out.zarr")]) == 0
    assert "3 whole steps hidden; training hid 2 at most" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["task.lead_time=9h"], "no multiple of the data's step of 6 h"),
        (["init_time=1990-01-01"], "not in segment"),
        (["init_time=2001-01-01"], "needs 2 before"),
        (["init_time=soon"], "ISO dates"),
        (["task=inpainting", "task.mask_file=none.nc"], "none.nc"),
        (["task=inpainting", "task.boxes=[]"], "empty"),
        (["task=none.yaml"], "none.yaml"),
        (["task=cross_variable", "task.variables=[ozone]"], "ozone"),
        (["task=downscaling", "task.coarse_input=true", "task.factor=3"], "divide"),
    ],
)
def test_bad_input_is_one_line(folder: Path, tmp_path: Path, capsys, more, message) -> None:
    output = tmp_path / "out.zarr"
    assert main(["predict", *more, *arguments(folder, output)]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert list(tmp_path.iterdir()) == []


def test_a_broken_task_file_is_named(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.yaml").write_text("_target_: combined\nparts: [a\n")
    given = [f"task={tmp_path / 'broken.yaml'}", *arguments(folder, tmp_path / "out.zarr")]
    assert main(["predict", *given]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "broken.yaml is no YAML" in line


def test_calibration_is_kept_in_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    new, spreads = tmp_path / "new.ckpt", []
    task = ["task=forecast", "every=2"]
    assert main(["calibrate", *task, *arguments(folder, new)]) == 0  # on split=validation
    for number, checkpoint in enumerate((folder / "tiny.ckpt", new)):
        output = tmp_path / f"{number}.zarr"
        given = [*arguments(folder, output), f"checkpoint={checkpoint}", "split=validation"]
        assert main(["predict", *task, *given]) == 0
        with xr.open_zarr(output, consolidated=False, decode_timedelta=True) as found:
            spreads.append(found["temperature"].std("member").mean(("latitude", "longitude")))
    factors = torch.load(new, weights_only=True)["atmossl"]["spread"]["Forecast"]["factors"]
    ((factors,),) = factors["temperature"]  # of the only zone and band
    ratio = (spreads[1] / spreads[0]).transpose("init_time", "lead_time", "level").values
    np.testing.assert_allclose(ratio, np.array([factors] * len(ratio)), rtol=1e-3)
    scored = [*task, "split=test", *arguments(folder, tmp_path / "b.ckpt")]
    assert main(["calibrate", *scored]) == 2


@pytest.mark.parametrize(
    ("ensemble", "more", "num_bands"),
    # cells of 22.5 degrees: two octaves in sixths, up to 180 degrees
    [("tail", [], 1), ("noise", [], 13), ("tail", ["scales_deg=[120,60]"], 3)],
)
def test_members_that_are_fields_are_calibrated_by_scale(
    folder: Path, tmp_path: Path, ensemble: str, more: list[str], num_bands: int
) -> None:
    old, new = tmp_path / "old.ckpt", tmp_path / "new.ckpt"
    save_tiny(old, ensemble=ensemble, num_members=2, noise_lengths_km=[2000.0])
    given = [*arguments(folder, new, *more), f"checkpoint={old}", "every=4"]
    assert main(["calibrate", "task=temporal_interpolation", *given]) == 0
    spread = torch.load(new, weights_only=True)["atmossl"]["spread"]["TemporalInterpolation"]
    assert len(spread["edges_deg"]) == num_bands - 1
    shape = (3 if num_bands > 1 else 1, num_bands, 1, 3)  # zone band step level
    assert {np.shape(values) for values in spread["factors"].values()} == {shape}
    given = [*arguments(folder, tmp_path / "o.zarr"), f"checkpoint={new}", "every=4"]
    assert main(["predict", "task=temporal_interpolation", *given]) == 0


def test_calibration_of_a_rollout_tells_its_dates_and_passes_in_a_short_table(
    folder: Path, tmp_path: Path, capsys
) -> None:
    new = tmp_path / "new.ckpt"
    given = ["task.lead_time=30h", "task.rollout_time=12h", "scales_deg=[180,90,60,50]", "every=2"]
    assert main(["calibrate", "task=forecast", *given, *arguments(folder, new)]) == 0
    spread = torch.load(new, weights_only=True)["atmossl"]["spread"]["Forecast"]
    assert [passed["hours"] for passed in spread["later_passes"]] == [[6.0, 12.0], [6.0]]
    said = capsys.readouterr().out
    dates = f"at 6, 12 h of each of 3 passes from {spread['num_dates']} dates"
    assert spread["num_dates"] > 1 and f"forecast: factors {dates};" in " ".join(said.split())
    rows = [line for line in said.splitlines() if line.startswith("temperature")]
    assert len(rows) == 3 * 2 and "over 90" in rows[0] and len(said.splitlines()) <= 35
    assert max(map(len, rows)) <= 80
    assert main(["info", f"checkpoint={new}"]) == 0
    said = " ".join(word for word in capsys.readouterr().out.split() if word != "│")
    assert f"{dates} for waves over 180" in said
    # a later calibration of one pass replaces all of it
    newer = tmp_path / "newer.ckpt"
    given = ["task=forecast", "every=2", *arguments(folder, newer), f"checkpoint={new}"]
    assert main(["calibrate", *given]) == 0
    assert (
        "later_passes" not in torch.load(newer, weights_only=True)["atmossl"]["spread"]["Forecast"]
    )


def test_calibration_asks_for_room_before_its_work(folder: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("no folder")
    given = arguments(folder, tmp_path / "file" / "new.ckpt")
    assert main(["calibrate", "task=forecast", *given, "checkpoint=default"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "output=" in line and "new.ckpt cannot be written" in line


def test_a_hindcast_is_calibrated_where_its_truth_is_known(folder: Path, tmp_path: Path) -> None:
    """It could be asked at the first time of the store, but its truth lies before that."""
    new = tmp_path / "new.ckpt"
    given = ["task=hindcast", "split=validation", *arguments(folder, new)]
    assert main(["calibrate", *given]) == 0
    spread = torch.load(new, weights_only=True)["atmossl"]["spread"]["Hindcast"]
    assert np.isfinite(spread["factors"]["temperature"]).all()


@pytest.mark.e2e
def test_a_killed_prediction_goes_on(folder: Path, tmp_path: Path) -> None:
    """SIGKILL once the first date is written; `resume=true` ends with what one run gives."""
    output = tmp_path / "out.zarr"
    given = ["predict", "task=forecast", *arguments(folder, output), "every=3", "batch_size=1"]
    progress = partial_of(output).with_suffix(".json")
    process = start(given, cache=tmp_path)
    while process.is_alive() and not (
        progress.exists() and json.loads(progress.read_text())["cases"]
    ):
        time.sleep(0.005)
    process.kill()
    process.join()
    assert not output.exists() and partial_of(output).exists()
    assert main(given) == 2  # nothing is overwritten unasked
    assert main([*given, "resume=true"]) == 0
    whole = tmp_path / "whole.zarr"
    assert main([*given, f"output={whole}"]) == 0
    one, two = (
        xr.open_zarr(path, consolidated=False, decode_timedelta=True).load()
        for path in (output, whole)
    )
    xr.testing.assert_identical(one, two)

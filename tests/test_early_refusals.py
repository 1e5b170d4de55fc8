"""Wrong settings end in one line before any work: a table, in process, with the work forbidden."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import xarray as xr

import atmossl.build
import atmossl.inference.checkpoint
from atmossl.cli import main
from atmossl.composition import compose_with_task_file, compose_with_tasks, valid
from atmossl.data.segment import Segment
from atmossl.evaluation.climate import Climate
from atmossl.inference import tiles
from atmossl.scorecard import zero_shot
from tests.evaluation.test_forecasts import forecast_of, weatherbench2
from tests.inference.oracle_models import NAMES
from tests.inference.test_command import save_tiny
from tests.synthetic import catalog, dataset


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Catalogs whose splits differ in one thing, a checkpoint, forecasts, and files of tasks."""
    folder = tmp_path_factory.mktemp("early")
    store = dataset(steps=24, variables=NAMES)
    shifted = store.assign_coords(longitude=store.longitude + 1.0)
    region = store.isel(longitude=slice(2, 12))
    half = store.isel(time=slice(None, None, 2))
    for name, (train, test) in {
        "waves": (store, store),
        "shifted": (shifted, store),
        "region": (region, region),
        "half": (half, store),
        "short": (store.isel(time=slice(0, 6)), store),
        "no_leap": (store, store.convert_calendar("noleap", use_cftime=True)),
    }.items():
        (folder / name).mkdir()
        catalog(folder / name, train=train, validation=test, test=test)
    save_tiny(folder / "tiny.ckpt")
    (folder / "done" / "checkpoints").mkdir(parents=True)
    (folder / "done" / "checkpoints" / "last.ckpt").symlink_to(folder / "tiny.ckpt")
    (folder / "empty").mkdir()
    forecast = forecast_of(store)
    stores = {
        "good": forecast,
        "members": xr.concat([forecast, forecast], "ensemble_member"),
        "no_latitudes": forecast.drop_vars("latitude"),
        "no_leads": forecast.drop_vars("lead_time"),
        "numbered": forecast.assign_coords(init_time=np.arange(forecast.sizes["init_time"])),
        "named": forecast.assign_coords(level=[f"L{n}" for n in range(forecast.sizes["level"])]),
        "elsewhere": forecast.isel(latitude=slice(0, 1)),
        "other_units": forecast.assign(
            temperature=forecast["temperature"].assign_attrs(units="furlong")
        ),
        "without_leads": store.isel(time=slice(0, 9)),
        "theirs": weatherbench2(forecast),
    }
    for name, values in stores.items():
        values.drop_encoding().to_zarr(folder / f"{name}.zarr", zarr_format=2)
    (folder / "exists.zarr").mkdir()
    (folder / "exists.zarr" / "zarr.json").touch()
    (folder / "stations.csv").write_text("latitude,longitude\n95,10\n")
    mask = np.ones((8, 16), int)
    places = {"latitude": store.latitude, "longitude": shifted.longitude}
    xr.Dataset({"mask": (("latitude", "longitude"), mask)}, places).to_netcdf(folder / "mask.nc")
    places["longitude"] = store.longitude
    xr.Dataset({"mask": (("latitude", "longitude"), mask)}, places).to_netcdf(folder / "all.nc")
    (folder / "three.yaml").write_text("_target_: downscaling\nfactor: 3")
    parts = "[{_target_: forecast, lead_time: 12h}, {_target_: hindcast, lead_time: 6h}]"
    (folder / "union.yaml").write_text(f"_target_: combined\nparts: {parts}")
    (folder / "bad.yaml").write_text("_target_: forecast\nlead_time: soon")
    (folder / "torn.yaml").write_text("a: [1,\n b")
    (folder / "list.yaml").write_text("- a\n- b\n")
    (folder / "misspelt.yaml").write_text("mine:\n  descripton: x\n")
    store.isel(time=[0]).to_netcdf(folder / "one_time.nc")
    store.isel(latitude=[0]).to_netcdf(folder / "one_latitude.nc")
    return folder


def forbid(monkeypatch: pytest.MonkeyPatch, *targets: tuple[Any, str]) -> None:
    def too_late(*_: Any, **__: Any) -> None:
        raise AssertionError("work began before the refusal")

    for owner, name in targets:
        monkeypatch.setattr(owner, name, too_late)


def refused(arguments: Sequence[str], folder: Path, message: str, capsys: Any) -> None:
    """One line that holds the message, and the exit code of bad input."""
    code = main([item.replace("DIR", str(folder)) for item in arguments])
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if not line.startswith("note: ")]
    assert code == 2, (code, error)
    assert len(lines) == 1, error
    assert re.search(message, lines[0]), error


PREDICT_BEFORE_WEIGHTS = {
    "output=DIR/exists.zarr": "exists",
    "output=DIR/o.hdf": "must end in",
    "task=inpainting task.boxes=[] task.mask_file=DIR/none.nc": "none.nc does not exist",
    "task=inpainting task.boxes=[] task.mask_file=DIR/stations.csv": "cannot be read",
    "task=inpainting task.boxes=[] task.stations=DIR/stations.csv": "latitude 95",
    "task=inpainting task.boxes=[]": "give one",
    "task=DIR/bad.yaml": "lead_time.*soon",
    "task=DIR/none.yaml": "no file",
    "task=oracle": "oracle",
    "task.lead_time=-6h": "negative",
    "task=downscaling task.factor=1": "factor",
    "data=era6": "era6",
    "data=waves split=test data.catalog=DIR/none.yaml": "none.yaml",
    "checkpoint=DIR/none.ckpt": "none.ckpt",
    "checkpoint=DIR/mask.nc": "mask.nc",
    "accelerator=tpu": "accelerator",
    "overlap=1": "overlap",
    "layout=grib": "layout",
    "task=[forecast,downscaling]": r"task=.*: is a list; valid: one task, such as task=forecast$",
    "segment=a,b": r"segment=a,b: several values; write segment=.a,b. for a list$",
    "task=forecast,inpainting": "task=forecast,inpainting: several values; valid: one task, such",
    "segmnt=a,b": r"unknown key segmnt; did you mean segment\?$",
    "date=1959-02-12": r"unknown key date; did you mean init_time\?$",
    "every=0": "every",
    "missing=drop": "missing",
    "init_tiem=all": "unknown key init_tiem; did you mean init_time",
    "init_time=1959": "init_time=1959: valid: all, an ISO date such as",
    "init_time=null": "init_time=null: valid: all, an ISO date such as",
    "init_time=[1959-01-12,3]": "init_time=.*: valid: all, an ISO date such as",
    "checkpoint=yes": "checkpoint=yes: no such file; valid: .*the folder of a run, default",
    "checkpoint=DIR/empty": "empty: the folder is empty; valid: ",
    "task.lead_tmie=3h": "unknown key task.lead_tmie; did you mean task.lead_time",
    "output=???": "output: is missing; give output=VALUE",
    "members=0": "members=0: valid: null for all, a number from 1 on, or some by their numbers",
    "members=all": "members=all: valid: null for all, ",
    "members=1,1": "members=.1,1.: 1 is there twice; valid: null for all, ",
    "members=[2,-1]": "members=.2,-1.: -1 is below 0, the first member; valid: null for all, ",
    "data=nan": """data.name=nan: valid: a text; nan without .* write 'data.name="nan"' if""",
    "plugins=[1]": """plugins.0=1: valid: a text; 1 without .* write 'plugins=."1".' if""",
    "output=null": """output=null: valid: a path; null without .* write 'output="null"' if""",
    "checkpoint=true": "checkpoint=true: valid: a text; true without quotes is no text: ",
    "task=nan": "task=nan: no such choice; valid: .*forecast",
    "task=inpainting task.boxes=europe": "task.boxes=europe: needed: a list of boxes",
    "task=inpainting task.boxes=[[a,b,c,d]]": "task.boxes=.*: needed: a list of boxes",
    "task=inpainting task.boxes=[[1,2,3]]": "task.boxes=.*: needed: a list of boxes",
    "task=inpainting task.boxes=[[9,1,0,5]]": "task.boxes=.*: box of latitudes 9 to 1; valid: .so",
    "task=DIR/torn.yaml": "torn.yaml is no YAML: line 2, column 3: expected",
    "data.catalog=DIR/torn.yaml data=mine": "torn.yaml: not a catalog .line 2, column 3: expected",
    "data.catalog=DIR/list.yaml data=mine": "list.yaml: not a catalog .needed: NAME: KEY: VALUE",
    "data.catalog=DIR/misspelt.yaml data=mine": "mine.descripton: unknown key; did you mean descri",
}
PREDICT_BEFORE_READING = {
    "init_time=2002-01-01": "not in segment",
    "init_time=yesterday": "init_time=yesterday: 'yesterday' is no date .*ISO dates, or all",
    "init_time=2001-13-01": "init_time=2001-13-01: .*no calendar has such a month",
    "init_time=2001-01-03/2001-01-01/6h": "2001-01-03 lies after 2001-01-01; valid: START/END",
    "init_time=2001-01-03,soon": r"init_time=\[2001-01-03,soon\]: 'soon' is no date",
    "task=cross_variable task.variables=ozone": "task.variables=.*ozone.* not predicted; valid: ",
    "init_time=[]": "names no date",
    "init_time=20020101": "init_time=2002-01-01T00 is not in segment",
    "init_time=[2002010106]": "init_time=2002-01-01T06 is not in segment",
    "checkpoint=DIR/done init_time=20020101": "init_time=2002-01-01T00 is not in segment",
    "checkpoint=DIR/done/checkpoints init_time=20020101": "2002-01-01T00 is not in segment",
    "segment=north": "segment=north.*valid",
    "task.lead_time=5h": "no multiple",
    "task.lead_time=10d task.rollout_time=60h": "hides every one",
    "task=temporal_interpolation task.hidden_time=36h": "valid: 1 to 3",
    "task=temporal_interpolation task.steps=[0]": "inside the window",
    "task=downscaling task.factor=3": "does not divide",
    "task=cross_variable task.variables=[ozone]": "ozone",
    "task=cross_variable task.variables=[] task.levels=[123]": "123",
    "task=inpainting task.boxes=[[95,99,0,1]]": "9[59]",
    "task=inpainting task.boxes=[] task.mask_file=DIR/mask.nc": "16 of 16 longitudes differ",
    "task=counterfactual task.shift_lat=60": "pole",
    "task=counterfactual task.levels.123=500": "123",
    "task=hindcast output=DIR/o.grib2": "no lead times below 0",
    "data.catalog=DIR/no_leap/catalog.yaml output=DIR/o.grib2": "noleap",
}
EVALUATE = {
    "output=DIR/exists.zarr": "exists",
    "regions=[arctic]": "arctic",
    "regions=[tropics,tropics]": "twice",
    "boxes={tropics: [0,1,0,1]}": "tropics",
    "boxes={x: [10,0,0,1]}": "south < north",
    "boxes={x: [1,2,0,1]}": "no cell",
    "tails=[0.9,0.1]": "low < high",
    "tasks=[forecast,forecast]": "twice",
    "tasks=[DIR/bad.yaml]": "^atmossl evaluate: tasks.0.lead_time=soon",
    "tasks=[forcast]": "^atmossl evaluate: tasks=forcast: no such choice; did you mean forecast",
    "tasks=forecast,forcast": "^atmossl evaluate: tasks=forcast: no such choice; did you mean fo",
    "regions=arctic": "regions=arctic: unknown; valid: .*tropics",
    "boxes.x=[35,75]": "boxes.x=.*: needed: south, north, west, east in degrees",
    "tails=0.9": "tails=.0.9.: valid: 2 values",
    "forecasts=DIR/none.zarr": "none.zarr does not exist",
    "split=tset": "split",
    "segment=north": "north",
    "climatology=DIR/none.zarr": "none.zarr",
    "climatology=DIR/good.zarr": "good.zarr",
    "data.catalog=DIR/shifted/catalog.yaml": "16 of 16 longitudes differ, the first is 0, not 1",
    "data.catalog=DIR/region/catalog.yaml tasks=[temporal_interpolation]": "closes.*ridge=f",
    "data.catalog=DIR/half/catalog.yaml tasks=[temporal_interpolation]": "steps of 12 h.*ridge=f",
    "data.catalog=DIR/short/catalog.yaml tasks=[forecast]": "too short.*ridge=false",
    "data.catalog=DIR/no_leap/catalog.yaml": "noleap",
    "tasks=[DIR/three.yaml]": "evaluate: tasks.downscaling.factor=3 does not divide.*8 x 16 cells",
    "tasks=[forecast,DIR/three.yaml]": r"factor=3 .*; tasks=\[forecast\] leaves downscaling out$",
    "tasks=[forecast] tasks.forecast.lead_time=7h": ": tasks.forecast.lead_time=7 h is no multip",
    "tasks=[hindcast] tasks.hindcast.lead_time=90h": ": tasks.hindcast.lead_time=90 h hides every",
    "tasks=[temporal_interpolation] tasks.0.hidden_time=7h": "tasks.temporal_interpolation.hidden_",
    "tasks=[inpainting] tasks.0.boxes=[[1,2,1,2]]": ": tasks.inpainting.boxes: .* no centre",
    "tasks=[cross_variable] tasks.0.variables=[sst]": ": tasks.cross_variable.variables=.sst. are",
    "tasks=[correction]": ": tasks.correction needs the fields of another model",
    "tasks=[DIR/union.yaml]": ": tasks.combined.parts.1 .hindcast. hides times that a union with t",
    "boxes={x: [0,40,1,2]}": r"boxes.x=\[0,40,1,2\] has no cell .* longitudes go from 0 to 337.5",
    "boxes={x: [1,2,0,90]}": r"boxes.x=\[1,2,0,90\] has no cell .* latitudes go from -",
    "forecasts=[DIR/none.zarr]": "none.zarr",
    "forecasts=[DIR/members.zarr]": "further dimensions ensemble_member;.*realization",
    "forecasts=[DIR/no_latitudes.zarr]": "latitude has no coordinates",
    "forecasts=[DIR/no_leads.zarr]": "lead_time has no coordinates",
    "forecasts=[DIR/numbered.zarr]": "init_time.*dates",
    "forecasts=[DIR/named.zarr]": "level is .*numbers",
    "forecasts=[DIR/elsewhere.zarr]": "latitude",
    "forecasts=[DIR/other_units.zarr]": "furlong",
    "forecasts=[DIR/good.zarr,DIR/good.zarr]": "taken",
    "forecasts=[DIR/good.zarr,DIR/without_leads.zarr]": "some have lead times",
    "forecasts=[DIR/good.zarr] climatology=DIR/good.zarr": "leave it out",
    "forecasts=[DIR/good.zarr] boxes={x: [1,2,0,1]}": "no cell",
    "forecasts=[DIR/theirs.zarr] data.catalog=DIR/no_leap/catalog.yaml": "noleap",
}
CALIBRATE = {
    "output=DIR/o.zarr": "must end in .ckpt",
    "split=test": "kept for scores",
    "task=counterfactual": "counterfactual has no truth",
    "task=downscaling task.coarse_input=true": "no truth",
    "task=downscaling task.factor=3": "does not divide",
    "init_time=2002-01-01": "not in segment",
    "scales_deg=[60,60]": "scales_deg=.*needed: lengths in degrees of longitude, each once, such ",
    "seed=9223372036854775808": "seed=9223372036854775808: valid: below 9223372036854775808$",
    "scales_deg=[0]": "scales_deg.0=0: valid: above 0",
    "members=[1,2]": "members=.*valid: ",
    "members=1": "members=1: valid: ",
    "scales_deg=[5]": "scales_deg=5: valid: from 45, the shortest wave of this grid, to 360 deg",
}
SECOND_STREAM = (
    "++stream.t={variables: [temperature], levels: [500], token_size: {time: 1, lat: 2, lon: 2}"
)
TRAIN = {
    "stream.s.variables=[temperature,temperature]": "stream.s.variables.*twice",
    "stream.s.levels=[300,500,500]": "stream.s.levels.*twice",
    SECOND_STREAM + "}": "stream.s .role predict. and stream.t .role predict. both hold",
    SECOND_STREAM + ", role: input}": "stream.t .role input. both hold",
    "++stream.pop={variables: [u_component_of_wind], levels: [500], "
    "token_size: {time: 1, lat: 2, lon: 2}} stream.s.levels=[300]": "stream.pop.*of that name",
    "masking=streams": "masking.streams has unknown",
    "trainer.devices=0": "trainer.devices=0: valid: above 0, or auto",
    "stream.s.levels=[]": "temperature has levels, its stream has levels",
    "data.window.time=100": "100 steps is longer",
    "data.window.lat=40": "window",
    "data.window.time=5 tasks.0.lead_time=5h": "no multiple",
    "data.window.time=5 tasks.0.lead_time=10d": "hides every",
    "warm_start.checkpoints=[DIR/none.ckpt]": "none.ckpt",
    "warm_start.checkpoints=DIR/none.ckpt": "checkpoint.*=.*none.ckpt: no such file",
    "warm_start.checkpoints=DIR/none.ckpt warm_start.network=true": "=.*/none.ckpt: no such file",
    "checkpoint=default": r"unknown key checkpoint; did you mean warm_start.checkpoints\?$",
    "resume=DIR/none.ckpt": "none.ckpt",
    "trainer.precision=16-mixed trainer.accelerator=cpu": "needs a GPU",
    "data.catalog=DIR/none.yaml": "none.yaml",
}


OTHER_COMMANDS = {
    "data": "data: an action is missing; valid: add, list, inspect, ingest, stats$",
    "data inspct waves": r"inspct: no such action; did you mean inspect\? valid: add, ",
    "data inspect sample local": "inspect sample local: one store at a time$",
    "data add DIR/one_time.nc": "one_time.nc: one time step; needed: a record",
    "data add DIR/one_latitude.nc": "one_latitude.nc: one latitude; needed: a grid",
    "data add DIR/good.zarr name=nan": "name=nan: the command line reads it as no text, ",
    "data add DIR/good.zarr name=": "name= is empty; give name=VALUE, or leave it out$",
    "data stats data=sample output=DIR/o": "output=.*/o: .*a folder is for climatologies",
    "config": "config: an action is missing; valid: show, validate$",
    "config valdate": r"valdate: no such action; did you mean validate\? valid: show, validate$",
    "info memory=-1": "memory=-1: valid: a number of GiB above 0, such as 80$",
    "info memory=nan": "memory=nan: valid: a number of GiB above 0, such as 80$",
    "info memory=80GB": "memory=80GB: valid: a number of GiB above 0, such as 80$",
    "export checkpoint=default": "output: is missing; needed: checkpoint=VALUE output=VALUE$",
    "export checkpoint=default hub=DIR/hub format=onnx": "unknown key format; needed: checkpoint=",
    "import aurora DIR/empty output=DIR/a.ckpt": "aurora: no such kind of model; valid: .*atmorep",
    "import atmorep DIR/empty output=DIR/a.ckpt": "data: is missing; needed: output=VALUE data=V",
    "probe checkpoint=default output=DIR/p probes=linear": "probes=linear: unknown; valid: jet_",
    "probe checkpoint=DIR/tiny.ckpt output=DIR/p layers=last": "layers.0=last: valid: a whole",
    "embed checkpoint=DIR/tiny.ckpt output=DIR/l.zarr layer=last": "layer=last: valid: a whole",
    "embed checkpoint=DIR/tiny.ckpt output=DIR/l.zarr pool=mean": "unknown key pool; valid: ",
}


CONFIG = {  # unknown, misspelt and contradictory words of every kind
    "model.dmi=3": r"unknown key model.dmi; did you mean model.dim\?$",
    "modle.dmi=3": r"unknown key modle.dmi; did you mean model.dim\?$",
    "+model.dmi=3": r"unknown key model.dmi; did you mean model.dim\?$",
    "~model.dmi": r"unknown key model.dmi; did you mean model.dim\?$",
    "learning_rate=1": r"unknown key learning_rate; did you mean optimizer.learning_rate\?$",
    "data.window.tmie=3": r"unknown key data.window.tmie; did you mean data.window.time\?$",
    "data.window={tmie: 3}": r"unknown key data.window.tmie; did you mean data.window.time\?$",
    "model.zzzz=3": "unknown key model.zzzz; valid: model.attention, ",
    "model.dim.x=3": "unknown key model.dim.x: model.dim takes a value and has no further keys",
    "+model.dim=32": "model.dim exists already; leave out the",
    "model=tinny": r"model=tinny: no such choice; did you mean tiny\? valid: atmorep, ",
    "tasks=nope": "tasks=nope: no such choice; .*valid: correction, standard, or a list of tasks",
    "data=sampel": r"data.name=sampel is not in the catalog .*; did you mean sample\? valid: ",
    "model.dim=1,2": "several values; write model.dim=.1,2. for a list, or -m for",
    "model.dim": "model.dim: needs a value; valid: model.dim=VALUE",
    "--foo": "no option --foo; valid: --help, .*; keys have no dashes, as in foo=VALUE",
    "data.window=[5,32,16]": "data.window has keys of its own; valid: .* with time, lat, lon",
    "lr=1e-3": r"unknown key lr; did you mean optimizer.learning_rate\?$",
    "trainer.gpus=4": r"unknown key trainer.gpus; did you mean trainer.devices\?$",
    "resume=true": "resume=true: valid: null, auto, or the path of a checkpoint$",
    "objective.losses={mse: 1}": "objective.losses.mse=mse: valid: ensemble_mse, ",
    "9x": "9x: is no key; every word is KEY=VALUE",
    "paths.output=": "paths.output=: is empty; valid: paths.output=PATH",
    "data.name=": "data.name=: is empty; valid: data.name=NAME$",
    "~resume": "~resume: resume is null already; leave the word out$",
    "data=": "data.name=: is empty; valid: data.name=NAME$",
    "logger=[csv,tensorbord]": r"no such choice; did you mean tensorboard\? valid: csv, ",
    "warm_start.checkpoints=[DIR/none.ckpt]": "checkpoints.0=.*none.ckpt: no such file; valid: ",
    "resume=yes": "resume=yes: no such file; valid: .*auto",
    "data.transforms.temprature={kind: sqrt, scale: 1}": "no stream has temprature; valid: ",
    "objective=jepa objective.momentum=[1,0.5]": "momentum=.*the second not below the first",
    "objective=jepa objective.momentum=[1]": "objective.momentum.* 2 values",
    "trainer.devices=0": "trainer.devices=0: valid: above 0, or auto$",
    "seed=abc": "seed=abc: valid: a whole number$",
    "trainer.compile=3": "trainer.compile=3: valid: true or false$",
    "tasks=forecast tasks.0.lead_time=soon": "tasks.0.lead_time=soon",
    "tasks=forecast tasks.0.lead_tmie=6h": "unknown key tasks.0.lead_tmie; .*tasks.0.lead_time",
    "tasks=forecast tasks.forecst.lead_time=6h": "NAME one of forecast, 0$",
    "tasks=forecast tasks.1.lead_time=6h": "NAME one of forecast, 0$",
    "tasks.downscaling=2": r"tasks.downscaling=2: valid: tasks.NAME.KEY=VALUE",
    "tasks=[forecast,forecast] tasks.forecast.lead_time=6h": "2 tasks are called forecast; give",
}


def words(line: str) -> list[str]:
    """Arguments of a row of a table; commas and spaces inside braces stay."""
    return re.findall(r"(?:[^\s{]|\{(?:[^{}]|\{[^}]*\})*\})+", line)


def with_defaults(line: str, **defaults: str) -> list[str]:
    given = words(line)
    keys = {item.partition("=")[0] for item in given}
    return [*(f"{k}={v}" for k, v in defaults.items() if k not in keys), *given]


COMMON = {
    "checkpoint": "DIR/tiny.ckpt",
    "data.catalog": "DIR/waves/catalog.yaml",
    "accelerator": "cpu",
}


@pytest.mark.parametrize("line", OTHER_COMMANDS)
def test_every_other_command_says_what_is_wrong(line, folder, capsys) -> None:
    refused(words(line), folder, OTHER_COMMANDS[line], capsys)


def test_a_single_word_is_a_list_of_one_where_a_list_is_needed() -> None:
    values = compose_with_tasks(
        "evaluate", ["output=o", "regions=tropics", "tasks=cross_variable", "tasks.0.variables=x"]
    )
    listed = valid("EvaluateConfig", values)
    assert listed["regions"] == ["tropics"] and listed["tasks"][0]["variables"] == ["x"]
    assert values["regions"] == "tropics"  # what came in is as it was
    with pytest.raises(ValueError, match="bootstrap=many: valid: a whole number"):
        valid("EvaluateConfig", {**values, "bootstrap": "many"})


@pytest.mark.parametrize("line", CONFIG)
def test_what_a_training_run_cannot_take_is_told_in_our_words(line, folder, capsys) -> None:
    refused(["config", "validate", *words(line)], folder, CONFIG[line], capsys)


def test_misspelt_keys_hide_no_other_faults(capsys: Any) -> None:
    wrong = ["model.dmi=3", "trainer.devices=0", "seed=-1", "model=tinny", "paths.ouptut=x"]
    assert main(["config", "validate", *wrong]) == 2
    told = capsys.readouterr().err
    starts = ("unknown key model.dmi", "trainer.devices=0", "seed=-1", "model=tinny",
              "unknown key paths.ouptut")  # fmt: skip
    assert all(start in told for start in starts) and told.count("\n") == len(starts), told


def test_a_sweep_is_refused_before_its_first_run(capsys: Any) -> None:
    for word, message in (("model.dmi=1,2", "unknown key model.dmi"), ("seed=-1,2", "seed=-1")):
        assert main(["train", "-m", word, "model=tiny,small"]) == 2
        assert capsys.readouterr().err.startswith(f"atmossl train: {message}")


def test_one_task_is_a_list_of_one() -> None:
    (task,) = compose_with_tasks("train", ["tasks=forecast", "tasks.0.lead_time=6h"])["tasks"]
    assert task["_target_"] == "forecast" and task["lead_time"] == "6h"
    both = compose_with_tasks("evaluate", ["tasks=forecast,downscaling", "output=o"])["tasks"]
    assert [task["_target_"] for task in both] == ["forecast", "downscaling"]


def test_a_task_written_as_a_mapping_takes_no_key_of_the_default_task() -> None:
    text = "{_target_: downscaling, factor: 4}"
    listed = compose_with_tasks("evaluate", [f"tasks=[{text},forecast]", "output=o"])["tasks"]
    assert listed[0] == {"_target_": "downscaling", "factor": 4} and "lead_time" in listed[1]
    values = compose_with_task_file("predict", [f"task={text}", "task.examples=1", "output=o"])
    assert values["task"] == {"_target_": "downscaling", "factor": 4, "examples": 1}


def test_a_key_of_a_task_is_named_by_the_task_or_its_number() -> None:
    for words in (["tasks=[forecast,downscaling]"], []):  # listed here, or in conf/tasks
        by_name, by_number = (
            compose_with_tasks("evaluate", [*words, f"tasks.{task}.factor=2", "output=o"])["tasks"]
            for task in ("downscaling", 1 if words else 2)
        )
        assert by_name == by_number and by_name[-1]["factor"] == 2


@pytest.mark.parametrize("line", PREDICT_BEFORE_WEIGHTS)
def test_predict_refuses_before_weights_are_loaded(line, folder, monkeypatch, capsys) -> None:
    if "checkpoint" not in line:
        forbid(monkeypatch, (atmossl.inference.checkpoint, "load_checkpoint"))
    arguments = with_defaults(line, output="DIR/o.zarr", **COMMON)
    refused(["predict", *arguments], folder, PREDICT_BEFORE_WEIGHTS[line], capsys)


@pytest.mark.parametrize("line", PREDICT_BEFORE_READING)
def test_predict_refuses_before_the_model_runs(line, folder, monkeypatch, capsys) -> None:
    forbid(monkeypatch, (tiles, "_batched"))
    arguments = with_defaults(line, output="DIR/o.zarr", **COMMON)
    refused(["predict", *arguments], folder, PREDICT_BEFORE_READING[line], capsys)


@pytest.mark.parametrize("line", CALIBRATE)
def test_calibrate_refuses_before_the_model_runs(line, folder, monkeypatch, capsys) -> None:
    forbid(monkeypatch, (tiles, "_batched"))
    arguments = with_defaults(line, output="DIR/o.ckpt", **COMMON)
    refused(["calibrate", *arguments], folder, CALIBRATE[line], capsys)


@pytest.mark.parametrize("line", EVALUATE)
def test_evaluate_refuses_before_any_record_is_read(line, folder, monkeypatch, capsys) -> None:
    forbid(monkeypatch, (tiles, "_batched"), (Climate, "of"), (Segment, "loaded"),
           (Segment, "to_dataset"), (zero_shot, "record_of"))  # fmt: skip
    arguments = with_defaults(line, output="DIR/report", data="waves", **COMMON)
    refused(["evaluate", *arguments], folder, EVALUATE[line], capsys)


@pytest.mark.parametrize("line", TRAIN)
def test_train_refuses_before_statistics_are_computed(line, folder, monkeypatch, capsys) -> None:
    forbid(monkeypatch, (atmossl.build, "load_or_compute"))
    stream = "++stream.s={variables: [temperature, u_component_of_wind], levels: [300, 500, 850], "
    arguments = [
        "data.name=waves",
        "data.window={time: 6, lat: 8, lon: 8}",
        "~stream.dynamics",
        "~stream.humidity",
        stream + "token_size: {time: 1, lat: 2, lon: 2}}",
        *with_defaults(
            line, **{"data.catalog": "DIR/waves/catalog.yaml", "paths.output": "DIR/run"}
        ),
    ]
    refused(["train", *arguments], folder, TRAIN[line], capsys)

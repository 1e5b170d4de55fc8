"""A model of AtmoRep's form from its files to predictions of `atmossl`, against the plain network
run by hand on the same store."""

import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
import yaml
from torch._dynamo import config as dynamo
from torch._dynamo.utils import counters
from torch._inductor import config as inductor

import atmossl
from atmossl.batch import PRIMARY, TokenGrid, collate_views
from atmossl.cli import main
from atmossl.evaluation.report.tables import summarise
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.masking.base import make_view
from atmossl.masking.random import RandomMasking
from atmossl.model.atmorep import AtmoRepField
from atmossl.model.atmorep_network import dates_of, token_info
from tests.model.plain_atmorep import PlainAtmoRep, field, write_model
from tests.synthetic import catalog, dataset, window

LEVELS = (123, 137)
FIELDS = [
    field("velocity_u", 20, ("temperature",), LEVELS, (3, 2, 4), (2, 3, 3)),
    field("temperature", 12, ("velocity_u",), (137,), (3, 3, 2), (2, 2, 6)),
]
VARIABLES = {"velocity_u": "u_component_of_wind", "temperature": "temperature"}
ROWS, COLUMNS, STEPS = 6, 12, 6  # of a window; the store has 12 x 24 cells
# the 29th of February 2004, day 59 from 0, is among the dates
STORE = dataset(
    levels=LEVELS, num_lat=12, num_lon=24, steps=30, start="2004-02-29T18", step_hours=1
).isel(latitude=slice(None, None, -1))
STORE["temperature"] = 250 + 10 * (STORE["temperature"] - 250)  # float32 of 250 K rounds by 2e-5 K
STORE["level"].attrs = {"standard_name": "model_level_number", "long_name": "model level"}


def write_catalog(folder: Path, store: xr.Dataset = STORE, levels_are: str = "model") -> Path:
    path = catalog(folder, train=store, validation=store, test=store)
    lines = path.read_text().splitlines()
    place = next(n for n, line in enumerate(lines) if line.startswith("  levels:"))
    lines.insert(place, f"  levels_are: {levels_are}")
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model's folder `model`, a catalog with `waves`, and the imported `atmorep.ckpt`."""
    folder = tmp_path_factory.mktemp("atmorep")
    write_catalog(folder)
    write_model(folder / "model", FIELDS, ["velocity_u", "temperature"])
    feel_token_info(folder / "model" / "AtmoRep_idtest.mod")
    assert run(folder, folder / "atmorep.ckpt") == 0
    return folder


def feel_token_info(file: Path) -> None:
    """Scale the weights of what describes a token, so that every entry changes the prediction: a
    raw year would leave nothing of the others."""
    tensors = torch.load(file, weights_only=True)
    scales = torch.tensor([1e-3, 0.05, 0.1, 0.02, 0.02, 0.01, 0.02, 0.1])
    for name in tensors:
        if name.startswith("embeds_token_info") and name.endswith("weight"):
            tensors[name] *= scales
    torch.save(tensors, file)


def run(folder: Path, output: Path, model: str = "model", *more: str) -> int:
    return main(
        ["import", "atmorep", str(folder / model), f"output={output}", "data=waves",
         f"data.catalog={folder / 'catalog.yaml'}", *more]
    )  # fmt: skip


def arguments_of(folder: Path, output: Path, *more: str) -> list[str]:
    return [
        f"checkpoint={folder / 'atmorep.ckpt'}", f"data.catalog={folder / 'catalog.yaml'}",
        "accelerator=cpu", f"output={output}", *more,
    ]  # fmt: skip


def plain(folder: Path) -> PlainAtmoRep:
    file = folder / "model" / "AtmoRep_idtest.mod"
    tensors = torch.load(file, weights_only=True)
    return PlainAtmoRep(folder / "model", {k: v.double().numpy() for k, v in tensors.items()})


def inputs_of(
    network: PlainAtmoRep, windows: dict[str, xr.DataArray], hidden_step: int | None
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Values and token information of normalised windows from north to south, one step of tokens
    hidden."""
    values, info = {}, {}
    for name, _, levels, (nt, nlat, nlon), (time, lat, lon), *_ in network.s["fields"]:
        window = windows[name]
        cut = window.values.reshape(len(levels), nt, time, nlat, lat, nlon, lon)
        values[name] = cut.transpose(0, 1, 3, 5, 2, 4, 6).copy()
        if hidden_step is not None:
            values[name][:, hidden_step] = 0.0
        info[name] = np.zeros((len(levels), nt * nlat * nlon, 8))
        for v, level in enumerate(levels):
            for token in range(nt * nlat * nlon):
                t, row, column = np.unravel_index(token, (nt, nlat, nlon))
                date = pd.Timestamp(window["time"].values[t * time + time - 1])
                info[name][v, token] = [
                    date.year, date.day_of_year - 1, date.hour, level,
                    90 - window["latitude"].values[row * lat + lat // 2],
                    window["longitude"].values[column * lon + lon // 2],
                    level, 15.0,
                ]  # fmt: skip
    return values, info


def by_hand(network: PlainAtmoRep, windows: dict[str, xr.DataArray], hidden_step: int):
    """Members [member level time lat lon] of every field in a window; see `inputs_of`."""
    outputs = network(*inputs_of(network, windows, hidden_step))
    found = {}
    for (name, members), entry in zip(outputs.items(), network.s["fields"], strict=True):
        _, _, levels, (nt, nlat, nlon), (time, lat, lon), *_ = entry
        cut = members.reshape(len(levels), nt, nlat, nlon, -1, time, lat, lon)
        together = cut.transpose(4, 0, 1, 5, 2, 6, 3, 7)
        found[name] = together.reshape(-1, len(levels), nt * time, nlat * lat, nlon * lon)
    return found


@pytest.mark.parametrize(
    ("task", "time", "first_step", "hidden_step"),
    [
        (["task=temporal_interpolation", "task.hidden_time=2h"], "2004-03-01T01", -2, 1),
        (["task=forecast", "task.lead_time=2h"], "2004-03-01T01", -3, 2),
    ],
    ids=["interpolation", "forecast"],
)
def test_predictions_are_those_of_the_plain_network(
    folder: Path, tmp_path: Path, task: list[str], time: str, first_step: int, hidden_step: int
) -> None:
    output = tmp_path / "out.zarr"
    more = [*task, f"init_time={time}", "overlap=0.0", "tilings=1"]
    assert main(["predict", *arguments_of(folder, output, *more)]) == 0
    predicted = xr.open_zarr(output, decode_timedelta=True)
    assert predicted["level"].attrs["standard_name"] == "model_level_number"
    if "lead_time" in predicted.dims:
        predicted = predicted.isel(init_time=0).drop_vars("init_time").rename(lead_time="time")
    statistics = load_checkpoint(str(folder / "atmorep.ckpt")).normaliser.statistics[PRIMARY]
    start = STORE.get_index("time").get_loc(pd.Timestamp(time)) + first_step
    hidden = slice(2 * hidden_step, 2 * hidden_step + 2)
    store = STORE.isel(time=slice(start, start + STEPS))
    for north, west in [(0, 0), (6, 0), (0, 12), (6, 12)]:
        cells = {
            "latitude": slice(north, north + ROWS), "longitude": slice(west, west + COLUMNS),
        }  # fmt: skip
        windows, scales = {}, {}
        for name, _, levels, *_ in FIELDS:
            variable = VARIABLES[name]
            row = statistics.variables.index(variable)
            columns = [statistics.levels.index(level) for level in levels]
            mean, std = (
                getattr(statistics, kind)[row, columns][:, None, None, None]
                for kind in ("mean", "std")
            )
            window = store[variable].sel(level=list(levels)).isel(cells)
            windows[name] = (window.transpose("level", ...) - mean) / std
            scales[name] = mean, std
        for name, members in by_hand(plain(folder), windows, hidden_step).items():
            mean, std = scales[name]
            lat, lon = windows[name]["latitude"], windows[name]["longitude"]
            found = predicted[VARIABLES[name]].sel(
                latitude=lat, longitude=lon, level=windows[name]["level"]
            )
            found = found.transpose("member", "level", "time", "latitude", "longitude").values
            assert found.std() > 0.01 * std.mean()
            # `atmossl predict` orders the members of every token's cells alike
            own, expected = np.sort((found - mean) / std, 0), np.sort(members[:, :, hidden], 0)
            np.testing.assert_allclose(own, expected, atol=2e-5, rtol=0)


def test_exported_weights_are_the_very_ones(folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "small.ckpt"
    assert main(["export", f"checkpoint={folder / 'atmorep.ckpt'}", f"output={output}"]) == 0
    before, after = (load_checkpoint(str(file)) for file in (folder / "atmorep.ckpt", output))
    assert before.specs == after.specs
    for name, value in before.model.state_dict().items():
        assert torch.equal(value, after.model.state_dict()[name])


def test_python_embeds_and_predicts(folder: Path, tmp_path: Path) -> None:
    model = atmossl.load(folder / "atmorep.ckpt", device="cpu")
    latents = model.embed(STORE, "2004-03-01T01", overlap=0.0)
    assert latents["latents_velocity_u"].sizes["feature_velocity_u"] == 20
    assert model.trained.model.widths["velocity_u"] == 20
    assert latents["level_velocity_u"].values.tolist() == list(LEVELS)
    assert latents["level_velocity_u"].attrs["standard_name"] == "model_level_number"
    with pytest.warns(UserWarning, match=r"0\.25"):
        predicted = model.predict(
            "forecast", STORE, "2004-03-01T01", lead_time="4h", rollout_time="2h", overlap=0.0,
            tilings=1,
        )  # fmt: skip
    output = tmp_path / "out.zarr"
    more = ["task=forecast", "task.lead_time=4h", "task.rollout_time=2h", "overlap=0.0",
            "tilings=1", "init_time=2004-03-01T01"]  # fmt: skip
    assert main(["predict", *arguments_of(folder, output, *more)]) == 0
    written = xr.open_zarr(output, decode_timedelta=True)
    xr.testing.assert_allclose(predicted[list(written)], written.load())
    assert bool(np.isfinite(written["u_component_of_wind"]).all())


def test_latents_lie_where_their_coordinates_say(folder: Path) -> None:
    """Those of one field in the order of the plain network, whose rows go southwards."""
    model = atmossl.load(folder / "atmorep.ckpt", device="cpu")
    latents = model.embed(STORE, "2004-03-01T01", layer=0, overlap=0.0)["latents_velocity_u"]
    there = latents.sel(longitude_velocity_u=slice(0, 180), latitude_velocity_u=slice(0, 90))
    there = there.sortby("latitude_velocity_u", ascending=False).isel(init_time=0)
    statistics = model.trained.normaliser.statistics[PRIMARY]
    end = STORE.get_index("time").get_loc(pd.Timestamp("2004-03-01T01")) + 1
    windows = {}
    for name, _, levels, *_ in FIELDS:
        variable = VARIABLES[name]
        row = statistics.variables.index(variable)
        columns = [statistics.levels.index(level) for level in levels]
        mean, std = (
            getattr(statistics, kind)[row, columns][:, None, None, None] for kind in ("mean", "std")
        )
        window = (
            STORE[variable]
            .sel(level=list(levels))
            .isel(
                time=slice(end - STEPS, end), latitude=slice(0, ROWS), longitude=slice(0, COLUMNS)
            )
        )
        windows[name] = (window.transpose("level", ...) - mean) / std
    values, info = inputs_of(plain(folder), windows, None)
    first = plain(folder).encode(values, info)["velocity_u"][0]
    own = there.transpose("level_velocity_u", "offset_velocity_u", "latitude_velocity_u", ...)
    np.testing.assert_allclose(own.values.reshape(first.shape), first, atol=5e-5, rtol=0)


def test_evaluate_scores_it(folder: Path, tmp_path: Path, monkeypatch) -> None:
    reports = []
    write = "atmossl.commands.evaluate.write_report"  # draws for seconds

    def written(found, _, folder: Path) -> None:
        reports.extend(found)
        folder.mkdir()

    monkeypatch.setattr(write, written)
    output, task = tmp_path / "report", tmp_path / "inside.yaml"
    task.write_text("_target_: temporal_interpolation\nhidden_time: 2h\nsteps: null\nrefine: 1\n")
    more = [f"tasks=[{task}]", "every=12", "ridge=false", "bootstrap=2", "regions=[]",
            "overlap=0.0", "tilings=1"]  # fmt: skip
    assert main(["evaluate", *arguments_of(folder, output, *more)]) == 0
    (report,) = reports
    summary = summarise(report.table, model_name=report.model_name)
    scored = summary.dropna(subset=["rmse model", "crps"])[["variable", "level"]]
    assert set(scored.itertuples(index=False, name=None)) == {
        ("u_component_of_wind", 123), ("u_component_of_wind", 137), ("temperature", 137),
    }  # fmt: skip


def test_info_says_where_it_comes_from(folder: Path, capsys) -> None:
    assert main(["info", f"checkpoint={folder / 'atmorep.ckpt'}"]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "imported from" in said and " 137 of the model levels" in said


def other_store(tmp_path: Path, store: xr.Dataset = STORE, levels_are: str = "model") -> list[str]:
    """Arguments of an import that reads another store."""
    path = write_catalog(tmp_path, store, levels_are)
    return [f"output={tmp_path / 'new.ckpt'}", "data=waves", f"data.catalog={path}"]


@pytest.mark.parametrize(
    ("fields", "changes", "words"),
    [
        ([field("ozone", 8)], {}, "'ozone' is no field that is known here"),
        ([field("temperature", 8, levels=(0, 137))], {}, "0 is the surface"),
        ([field("temperature", 8)], {"size_token_info": 7}, "size_token_info=7"),
        (
            [field("temperature", 8), field("velocity_u", 8, tokens=(2, 2, 2))],
            {},
            "their windows (time, lat, lon) differ",
        ),
        ([field("temperature", 8, levels=(96, 137))], {}, "levels 96 are missing"),
        ([field("temperature", 8, tokens=(2, 8, 3))], {}, "smaller than the network's window"),
        ([field("vorticity", 8)], {}, "stream variables vorticity are not in the catalog"),
    ],
    ids=["field", "surface", "entries", "windows", "levels", "grid", "variable"],
)
def test_model_that_does_not_fit_is_refused_in_one_line(
    tmp_path: Path, capsys, fields: list, changes: dict, words: str
) -> None:
    write_model(tmp_path / "model", fields, [fields[0][0]], **changes)
    assert main(["import", "atmorep", str(tmp_path / "model"), *other_store(tmp_path)]) == 2
    said = capsys.readouterr().err.strip()
    assert words in said and "\n" not in said
    assert not (tmp_path / "new.ckpt").exists()


@pytest.mark.parametrize(
    ("attributes", "levels_are", "words"),
    [
        ({"standard_name": "model_level_number"}, "pressure", "`levels_are: model`"),
        ({}, "pressure", "`levels_are: model`"),
        ({"standard_name": "air_pressure", "units": "hPa"}, "model", "levels of pressure"),
    ],
    ids=["said-to-be-model", "says-nothing", "said-to-be-pressure"],
)
def test_store_of_other_levels_is_refused(
    folder: Path, tmp_path: Path, capsys, attributes: dict, levels_are: str, words: str
) -> None:
    """At import, and where an imported checkpoint reads it."""
    store = STORE.copy()
    store["level"] = store["level"].assign_attrs(attributes)
    store["level"].attrs = attributes
    new = other_store(tmp_path, store, levels_are)
    lines = [["import", "atmorep", str(folder / "model"), *new]]
    used = [item for item in arguments_of(folder, tmp_path / "out.zarr") if "catalog" not in item]
    lines += [["predict", "task=forecast", "task.lead_time=2h", *used, new[-1]]]
    for line in lines:
        assert main(line) == 2
        said = capsys.readouterr().err.strip()
        assert words in said and "\n" not in said, said


def test_store_in_other_units_is_refused(folder: Path, tmp_path: Path, capsys) -> None:
    store = STORE.assign(temperature=STORE["temperature"] - 273.15)
    new = other_store(tmp_path, store)
    assert main(["import", "atmorep", str(folder / "model"), *new]) == 2
    said = capsys.readouterr().err.strip()
    assert "temperature goes from" in said and "\n" not in said


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["atmorep"],
        ["other", "model", "output=a.ckpt", "data=waves"],
        ["atmorep", "model", "output=a.ckpt"],
        ["atmorep", "model", "output=a.ckpt", "data=waves", "more=1"],
        ["atmorep", "model", "output=a.zarr", "data=waves"],
        ["atmorep", "model", "output=a.ckpt", "data=waves"],
    ],
)
def test_odd_arguments_of_import_are_refused_in_one_line(
    tmp_path: Path, monkeypatch, capsys, given: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["import", *given]) == 2
    said = capsys.readouterr().err.strip()
    assert said.startswith("atmossl import: ") and "\n" not in said
    assert not list(tmp_path.iterdir())


def test_dates_of_tokens_are_those_of_the_calendar() -> None:
    """Every 31 h from 1871 to 2160, against pandas."""
    dates = pd.date_range("1871-01-01T05", "2160-12-31", freq="31h")
    hours = torch.tensor((dates - pd.Timestamp(0)) / pd.Timedelta("1h"), dtype=torch.float64)
    year, day, hour = (values[0].numpy() for values in dates_of(hours[None]))
    np.testing.assert_array_equal(year, dates.year)
    np.testing.assert_array_equal(day, dates.day_of_year - 1)
    np.testing.assert_array_equal(hour, dates.hour)


@pytest.mark.parametrize(
    "task",
    [
        ["task=hindcast", "task.lead_time=2h"],
        ["task=downscaling", "task.factor=3"],
        ["task=inpainting", "task.boxes=[[0,45,60,150]]"],
        ["task=cross_variable", "task.variables=[temperature]"],
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_other_tasks_run(folder: Path, tmp_path: Path, task: list[str]) -> None:
    output = tmp_path / "out.zarr"
    more = [*task, "init_time=2004-03-01T02", "overlap=0.0", "tilings=1"]
    assert main(["predict", *arguments_of(folder, output, *more)]) == 0
    predicted = xr.open_zarr(output, decode_timedelta=True)
    assert bool(np.isfinite(predicted["temperature"].sel(level=137)).all())


def test_network_tells_training_its_parts(folder: Path) -> None:
    network = load_checkpoint(str(folder / "atmorep.ckpt")).model
    depths = {name: network.depth(name) for name, _ in network.named_parameters()}
    of_encoders = {n for n, _ in network.named_parameters() if n.startswith("core.encoders.")}
    assert {name for name, depth in depths.items() if depth is not None} == of_encoders
    assert {d for n, d in depths.items() if ".attentions.0." in n and n in of_encoders} == {1}
    assert {d for n, d in depths.items() if ".perceptrons.1." in n and n in of_encoders} == {0}
    assert {depth for name, depth in depths.items() if ".embed" in name} == {2}
    inside = {id(p) for block in network.blocks for p in block.parameters()}
    outside = {n for n, p in network.named_parameters() if id(p) not in inside}
    ends = tuple(f"{end}." for end in network.ends)
    assert outside == {n for n in depths if ".embed" in n or n.startswith(ends)}
    assert all(any(name.startswith(end) for name in depths) for end in ends)


def test_field_at_the_surface_is_a_stream_without_levels(tmp_path: Path) -> None:
    store = STORE.copy()
    rain = 1e-3 * abs(STORE["u_component_of_wind"].isel(level=0, drop=True))
    store["total_precipitation"] = rain.assign_attrs(units="m")
    fields = [FIELDS[1], field("total_precip", 12, ("temperature",), (0,), (3, 2, 4), (2, 3, 3))]
    fields[0] = field("temperature", 12, ("total_precip",), (137,), (3, 3, 2), (2, 2, 6))
    write_model(tmp_path / "model", fields, ["temperature", "total_precip"])
    new = other_store(tmp_path, store)
    assert main(["import", "atmorep", str(tmp_path / "model"), *new]) == 0
    specs = load_checkpoint(str(tmp_path / "new.ckpt")).specs
    assert [spec.levels for spec in specs] == [(137,), ()]
    model = atmossl.load(tmp_path / "new.ckpt", device="cpu")
    with pytest.warns(UserWarning, match=r"0\.25"):
        predicted = model.predict("forecast", store, "2004-03-01T01", lead_time="2h")
    assert "level" not in predicted["total_precipitation"].dims
    assert bool(np.isfinite(predicted["total_precipitation"]).all())


@pytest.mark.filterwarnings("ignore:this checkpoint was not trained")
def test_counterfactual_tells_the_network_other_levels_and_places(folder: Path) -> None:
    model = atmossl.load(folder / "atmorep.ckpt", device="cpu")
    inner = {"_target_": "forecast", "lead_time": "2h"}
    predicted = []
    for change in ({}, {"levels": {137: 96}}, {"shift_lon": 90.0}, {"shift_time": "1h"}):
        task = {"_target_": "counterfactual", "task": inner, "shift_time": "0h", "shift_lat": 0.0,
                "shift_lon": 0.0, "levels": {}, **change}  # fmt: skip
        one = model.predict(task, STORE, "2004-03-01T01", overlap=0.0, tilings=1)
        predicted.append(one["temperature"].sel(level=137).values)
    for changed in predicted[1:]:
        assert np.abs(changed - predicted[0]).max() > 0.01


def test_older_models_are_told_six_numbers_of_a_token() -> None:
    """Those of eight, with the hour as a fraction of the day and the level once."""
    grid = TokenGrid(
        time_hours=torch.tensor([[300_000.5, 300_002.5]], dtype=torch.float64),
        level_hpa=torch.tensor([[123.0]]),
        lat=torch.tensor([[10.0, 40.0]]),
        lon=torch.tensor([[350.0, 20.0, 50.0]]),
        time_extent=torch.tensor([2.0]),
        lat_extent=torch.tensor([30.0]),
        lon_extent=torch.tensor([30.0]),
    )
    one = AtmoRepField("temperature", 8, (), (123,), (2, 2, 3), (2, 3, 2))
    (now,), (older,) = (token_info(grid, one, count)[0] for count in (8, 6))
    # the middle of three rows around 40 N, and the second of two columns around 350 E
    date = pd.Timestamp(0) + pd.Timedelta(300_001, "h")
    expected = [date.year, date.day_of_year - 1, date.hour, 123, 50, 357.5, 123, 10]
    np.testing.assert_allclose(now[0], expected)
    np.testing.assert_allclose(older[:, 1], now[:, 1] + now[:, 2] / 24, rtol=1e-6)
    assert torch.equal(older[:, [0, 2, 3, 4, 5]], now[:, [0, 3, 4, 5, 7]])


@pytest.mark.slow
@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
def test_compiled_network_gives_the_same(folder: Path) -> None:
    torch._dynamo.reset()
    before, after = (load_checkpoint(str(folder / "atmorep.ckpt")).model for _ in range(2))
    after.compile_blocks("eager")
    windows = tuple(
        window(spec, time=STEPS, lat=ROWS, lon=COLUMNS, seed=number)
        for number, spec in enumerate(load_checkpoint(str(folder / "atmorep.ckpt")).specs)
    )
    view = make_view(windows, RandomMasking((0.5, 0.5)), np.random.default_rng(0))
    here = collate_views([(view,)], [0]).views[0]
    for one, two in zip(before(here).streams, after(here).streams, strict=True):
        torch.testing.assert_close(one.members, two.members, atol=2e-5, rtol=0)
    latents = before.predict(before.encode(here), here)
    for stream in here.streams:
        assert stream.queries is not None
        shape = (
            *stream.queries.index.shape,
            {"velocity_u": 20, "temperature": 12}[stream.spec.name],
        )
        assert latents[stream.spec.name].last.shape == shape
    torch.stack([s.members.pow(2).mean() for s in after(here).streams]).sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in after.parameters() if p.grad is not None)


TASKS = ("tasks.0.lead_time=2h", "tasks.1.hidden_time=2h", "tasks.2.factor=3")


def train(folder: Path, output: Path, *more: str, tasks: Sequence[str] = TASKS) -> int:
    """A run of two steps from the imported network. tasks: words on those of its validation."""
    return main(
        ["train", "masking=bert", "masking.coarsen_factor=3", "warm_start.network=true",
         f"warm_start.checkpoints=[{folder / 'atmorep.ckpt'}]", "data.name=waves",
         f"data.catalog={folder / 'catalog.yaml'}", "data.batch_size=2", "data.windows_per_time=1",
         *tasks, "trainer.max_steps=2", "trainer.validation_interval=2",
         "trainer.validation_batches=1",
         "trainer.log_interval=1", "trainer.accelerator=cpu", "trainer.pictures=false",
         "trainer.precision=32-true", "optimizer.warmup_steps=0", "optimizer.learning_rate=1e-3",
         f"paths.output={output}", *more]
    )  # fmt: skip


def moved_weights(folder: Path, run: Path) -> set[str]:
    """Names of the weights that a run has changed, with thin matrices merged."""
    old = load_checkpoint(str(folder / "atmorep.ckpt")).model.state_dict()
    new = load_checkpoint(str(run / "checkpoints" / "last.ckpt")).model.state_dict()
    assert old.keys() == new.keys()
    assert all(torch.isfinite(value).all() for value in new.values())
    return {name for name, value in old.items() if not torch.equal(value, new[name])}


def test_training_goes_on_from_an_imported_network(folder: Path, tmp_path: Path) -> None:
    run = tmp_path / "full"
    assert train(folder, run) == 0
    report = yaml.safe_load((run / "warm_start.yaml").read_text())
    assert report["loaded"] and not report["initialised"] + report["left"] + report["grown"]
    imported = load_checkpoint(str(folder / "atmorep.ckpt"))
    tuned = load_checkpoint(str(run / "checkpoints" / "last.ckpt"))
    names = dict(tuned.model.named_parameters())
    # a bias of all keys alike changes no attention
    still = set(names) - moved_weights(folder, run)
    assert all("key_norm.bias" in name for name in still), still
    for key in ("network", "model", "window", "first_guess", "statistics", "levels_are"):
        assert tuned.checkpoint_record[key] == imported.checkpoint_record[key], key
    output = tmp_path / "out.zarr"
    arguments = [item for item in arguments_of(folder, output) if "checkpoint" not in item]
    arguments += ["task=forecast", "task.lead_time=2h", "init_time=2004-03-01T01"]
    assert main(["predict", f"checkpoint={run / 'checkpoints' / 'last.ckpt'}", *arguments]) == 0
    predicted = xr.open_zarr(output, decode_timedelta=True)
    assert predicted["level"].attrs["standard_name"] == "model_level_number"
    assert np.isfinite(predicted["temperature"].sel(level=137).values).all()


def test_thin_matrices_tune_attention_and_perceptrons_of_an_imported_network(
    folder: Path, tmp_path: Path
) -> None:
    assert train(folder, tmp_path / "thin", "warm_start.low_rank.rank=2") == 0
    moved = moved_weights(folder, tmp_path / "thin")
    layers = {name.split(".")[3] for name in moved}
    assert layers == {"attentions", "perceptrons"} and not any("bias" in name for name in moved)


def test_tails_of_an_imported_network_are_tuned_alone(folder: Path, tmp_path: Path) -> None:
    assert train(folder, tmp_path / "tail", "objective.train_only=tail") == 0
    moved = moved_weights(folder, tmp_path / "tail")
    tails = {name for name in moved if re.match(r"core\.decoders\.\w+\.tail\.", name)}
    assert moved and moved == tails


@pytest.mark.slow
@pytest.mark.e2e
@pytest.mark.filterwarnings("default")  # the compiler warns of its own doings
@pytest.mark.skipif(
    not any(map(shutil.which, ("c++", "g++", "clang++"))), reason="inductor needs a C++ compiler"
)
def test_compiled_fine_tuning_is_the_plain_one(tmp_path: Path) -> None:
    """Two steps and a validation of an imported network by `atmossl train`, compiled by inductor:
    losses, weights, and predictions of the checkpoint that the compiled run exports. The network
    is as small as can be, its kernels are scalar and for sizes that vary from the
    first batch on, and one task is validated, since a C++ compiler is slow."""
    write_catalog(tmp_path)
    alone = field("temperature", 12, (), (137,), (3, 3, 2), (2, 2, 6))
    layers = {"encoder_num_layers": 1, "decoder_num_layers": 1}
    write_model(tmp_path / "model", [alone], ["temperature"], **layers)
    feel_token_info(tmp_path / "model" / "AtmoRep_idtest.mod")
    assert run(tmp_path, tmp_path / "atmorep.ckpt") == 0
    torch._dynamo.reset()
    counters.clear()
    one_task = ("tasks=[forecast]", "tasks.0.lead_time=2h")
    assert train(tmp_path, tmp_path / "plain", tasks=one_task) == 0
    assert not counters["stats"]
    compiler = {"compile_threads": 1, "cpp.simdlen": 1}
    with inductor.patch(compiler), dynamo.patch(assume_static_by_default=False):
        told = (tmp_path / "compiled", "trainer.compile=true")
        assert train(tmp_path, *told, tasks=one_task) == 0
    assert counters["stats"]["unique_graphs"] >= 5  # both attentions, perceptron, tail and losses
    torch._dynamo.reset()

    plain, compiled = (tmp_path / name for name in ("plain", "compiled"))
    expected, found = (pd.read_csv(folder / "metrics.csv") for folder in (plain, compiled))
    losses = [name for name in expected if "loss" in name or "rmse" in name]
    assert {"train/loss", "validation/forecast/loss"} < set(losses)
    np.testing.assert_allclose(found[losses], expected[losses], rtol=1e-5)
    assert (expected["train/loss"].dropna().diff().dropna() != 0).all()

    exported = tmp_path / "exported.ckpt"
    last = compiled / "checkpoints" / "last.ckpt"
    assert main(["export", f"checkpoint={last}", f"output={exported}"]) == 0
    before = load_checkpoint(str(plain / "checkpoints" / "last.ckpt"))
    after = load_checkpoint(str(exported)).model.state_dict()
    for name, value in before.model.state_dict().items():
        if "key_norm.bias" not in name:  # it changes no attention: its gradient is rounding alone
            torch.testing.assert_close(after[name], value, atol=1e-4, rtol=0)  # of steps of 1e-3
    predicted = []
    for number, checkpoint in enumerate([plain / "checkpoints" / "last.ckpt", exported]):
        output = tmp_path / f"{number}.zarr"
        more = [item for item in arguments_of(tmp_path, output) if "checkpoint" not in item]
        more += ["task=forecast", "task.lead_time=2h", "init_time=2004-03-01T01"]
        assert main(["predict", f"checkpoint={checkpoint}", *more]) == 0
        predicted.append(xr.open_zarr(output, decode_timedelta=True)["temperature"].values)
    std = before.normaliser.statistics[PRIMARY].std.max()
    assert predicted[0].std() > 0.01 * std
    np.testing.assert_allclose(predicted[1] / std, predicted[0] / std, atol=2e-5, rtol=0)


def test_a_run_that_names_no_network_to_take_is_refused(capsys) -> None:
    assert main(["train", "warm_start.network=true"]) == 2
    assert "warm_start.checkpoints, which names none" in capsys.readouterr().err

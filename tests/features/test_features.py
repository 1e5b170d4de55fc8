"""Attention is that of the modules themselves, distances have their closed forms, components find
what was planted, analogues leave out the same situation; the page says what it leaves out."""

import base64
import json
import re
import sys
import zlib
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr
from einops import rearrange
from pyproj import Geod

pytest.importorskip("sklearn")

from atmossl.batch import TokenGrid, View, collate_views
from atmossl.cli import main
from atmossl.features import figures, filters, latents
from atmossl.features.attention import (
    Pair,
    Reach,
    attention_weights,
    check_attention,
    distances,
    handed_over,
    mean_distance,
)
from atmossl.features.page import chance_verdict
from atmossl.features.run import (
    FeatureOptions,
    FeatureRun,
    at_tokens,
    degrees_of,
    few_dates,
    places_within,
)
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.masking.base import hide_nothing, make_view
from atmossl.model.atmorep_files import load_atmorep
from atmossl.model.atmorep_network import AtmoRepNetwork, streams_of, window_of
from atmossl.model.multiformer import Multiformer
from tests.inference.oracle_models import segment
from tests.model.plain_atmorep import field, write_model
from tests.synthetic import dataset, spec, window

TINY = Path(__file__).parents[1] / "checkpoints" / "format_4.ckpt"
STREAMS = (
    spec("air", token=(1, 2, 2)),
    spec("wind", variables=("u_component_of_wind",), token=(1, 2, 4)),
    spec("rain", variables=("specific_humidity",), token=(1, 2, 2)),
)


def view(streams=STREAMS) -> View:
    """The whole globe, nothing hidden."""
    windows = tuple(window(s, seed=n) for n, s in enumerate(streams))
    made = make_view(windows, hide_nothing, np.random.default_rng(0))
    return collate_views([(made,)], [0]).views[0]


def network(attention: str, *, causal: bool = False) -> Multiformer:
    torch.manual_seed(0)
    made = Multiformer(
        streams=STREAMS, dim=16, num_layers=2, num_decoder_layers=0, num_heads=2, num_members=1,
        attention=attention, attention_window=(2, 3, 5), causal=causal,
    )  # fmt: skip
    for name, weight in made.named_parameters():  # couplings begin as zeros
        torch.nn.init.normal_(weight, std=0.3) if ".coupling." in name else None
    return made.eval()


KINDS = [("full", False), ("factorised", False), ("temporal", False), ("windowed", False),
         ("full", True), ("factorised", True)]  # fmt: skip


@pytest.mark.parametrize(("attention", "causal"), KINDS)
def test_weights_times_values_are_the_output_of_every_module(attention: str, causal: bool) -> None:
    """Of self-attention and of coupling, to other grids too; rows sum to one."""
    model, shown = network(attention, causal=causal), view()
    outputs: dict[torch.nn.Module, Any] = {}
    for layer in model.encoder:
        for block in layer.values():
            for module in (block.attention, *block.coupling.values()):
                module.register_forward_hook(
                    lambda module, given, out: outputs.update({module: (given, out)})
                )
    found: list[tuple[Pair, np.ndarray]] = []

    def take(pair: Pair, query, key, reach: Reach) -> None:
        grids = {stream.spec.name: stream.grid.shape for stream in shown.streams}
        rows = np.arange(query.shape[2])
        seen = reach.seen(rows, grids[pair.stream], grids[pair.other], query.shape[1])
        weights = attention_weights(query[0], key[0], rows, seen)
        np.testing.assert_allclose(weights.sum(-1), 1.0, atol=1e-5)
        assert (weights.numpy()[~seen] == 0).all()
        found.append((pair, weights))

    with torch.inference_mode(), handed_over(model, take):
        model.encode(shown)
    assert len(found) == 2 * len(STREAMS) ** 2
    for pair, weights in found:
        block = model.encoder[pair.layer][pair.stream]
        is_self = pair.stream == pair.other
        module = block.attention if is_self else block.coupling[pair.other]
        given, out = outputs[module]
        with torch.inference_mode():
            values = (
                module.project(given[0].features).chunk(3, dim=-1)[2]
                if is_self
                else module.key_value(given[1].features).chunk(2, dim=-1)[1]
            )
            values = rearrange(values[0], "key (head feature) -> head key feature", head=2)
            joined = rearrange(weights @ values, "head query feature -> query (head feature)")
            torch.testing.assert_close(module.out(joined), out[0], atol=1e-5, rtol=1e-4)


def test_a_network_is_left_as_it_was() -> None:
    model, shown = network("factorised"), view()
    before = [block.attention.attend for layer in model.encoder for block in layer.values()]
    with torch.inference_mode():
        expected = model.encode(shown)["air"].last
        with handed_over(model, lambda *_: None):
            torch.testing.assert_close(model.encode(shown)["air"].last, expected, rtol=0, atol=0)
    after = [block.attention.attend for layer in model.encoder for block in layer.values()]
    assert all(one is other for one, other in zip(before, after, strict=True))


def test_weights_of_atmorep_are_those_of_its_modules_from_south_to_north(tmp_path: Path) -> None:
    fields = [field("temperature", 8, ("velocity_u",), (137,), (2, 3, 2)),
              field("velocity_u", 8, (), (96, 137), (2, 3, 2))]  # fmt: skip
    write_model(tmp_path, fields, ["temperature"], with_qk_lnorm=True)
    core = load_atmorep(tmp_path)
    model = AtmoRepNetwork(streams=streams_of(core.settings), **asdict(core.settings))
    model.core.load_state_dict(core.state_dict())
    time, lat, lon = window_of(core.settings)
    windows = [window(s, time=time, lat=lat, lon=lon) for s in streams_of(core.settings)]
    made = make_view(tuple(windows), hide_nothing, np.random.default_rng(0))
    shown = collate_views([(made,)], [0]).views[0]
    module = model.core.encoders["temperature"].attentions[0]
    outputs = []
    module.register_forward_hook(lambda _, given, out: outputs.append((given, out)))
    weights = {}

    def take(pair: Pair, query, key, _: Reach) -> None:
        if (pair.layer, pair.stream) == (0, "temperature"):
            seen = np.ones((query.shape[1], query.shape[2], key.shape[2]), bool)
            rows = np.arange(query.shape[2])
            weights[pair.other] = attention_weights(query[0], key[0], rows, seen)

    with torch.inference_mode(), handed_over(model, take):
        model.encode(shown)

    def turned(x: torch.Tensor) -> torch.Tensor:  # [head token feature], rows the other way
        return x.unflatten(1, (-1, 2, 3, 2)).flip(3).flatten(1, 4)

    ((given, out),) = outputs
    with torch.inference_mode():
        values = [value[0] for _, _, value in module.projected(*given)]
        names = ("temperature", "velocity_u")
        heads = [turned(weights[n] @ turned(v)) for n, v in zip(names, values, strict=True)]
        joined = rearrange(torch.cat(heads), "head query feature -> query (head feature)")
        torch.testing.assert_close(given[0][0] + module.out(joined), out[0], atol=1e-5, rtol=1e-5)


def test_a_network_of_others_has_no_attention_that_is_known() -> None:
    with pytest.raises(ValueError, match="attention of Identity is not known"):
        check_attention(torch.nn.Identity())  # type: ignore[arg-type]


def token_grid() -> TokenGrid:
    stream = view().streams[0].grid
    return replace(stream, **{
        name: getattr(stream, name)[0] for name in ("time_hours", "level_hpa", "lat", "lon")
    })  # fmt: skip


def test_uniform_attention_has_the_mean_distance_and_attention_to_itself_none() -> None:
    grid = token_grid()
    levels, steps, num_lat, num_lon = grid.shape
    rows = np.array([0, grid.num_tokens - 1, grid.num_tokens // 3])
    apart = distances(rows, grid, grid)
    uniform = np.full((1, len(rows), grid.num_tokens), 1 / grid.num_tokens)
    found = mean_distance(uniform, apart)[0]
    sphere = Geod(a=6.371e6, f=0)
    for number, row in enumerate(rows):
        level, step, lat, lon = np.unravel_index(row, grid.shape)
        here = float(grid.lon[lon]), float(grid.lat[lat])
        km = [
            sphere.inv(*here, float(east), float(north))[2] / 1000
            for north in grid.lat
            for east in grid.lon
        ]
        hours = np.abs(grid.time_hours.numpy() - float(grid.time_hours[step]))
        pressure = np.abs(grid.level_hpa.numpy() - float(grid.level_hpa[level]))
        expected = [np.mean(km), hours.mean(), pressure.mean()]
        np.testing.assert_allclose(found[:, number], expected, rtol=1e-6)
    itself = np.zeros_like(uniform)
    itself[0, np.arange(len(rows)), rows] = 1.0
    np.testing.assert_allclose(mean_distance(itself, apart), 0.0, atol=1e-9)


def test_planted_components_are_recovered_with_one_basis_for_all_days() -> None:
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.standard_normal((12, 3)))[0].T
    latitude = np.repeat([-60.0, -20.0, 20.0, 60.0], 6)
    planted = rng.standard_normal((40, 24, 3)) * [5.0, 3.0, 1.0]
    places = 100 * rng.standard_normal((24, 12))  # what positions alone tell
    tokens = places + planted @ axes + 1e-3 * rng.standard_normal((40, 24, 12))
    found = latents.token_components(latents.anomalies(tokens), latitude)
    np.testing.assert_allclose(np.abs(found.axes @ axes.T), np.eye(3), atol=0.15)
    span = found.axes.T @ found.axes
    np.testing.assert_allclose(span @ axes.T, axes.T, atol=1e-3)
    assert found.share.sum() == pytest.approx(1.0, abs=1e-5)
    centred = planted - planted.mean(axis=0)
    for number in range(3):
        assert (
            np.abs(latents.correlations(found.scores, planted[..., number], latitude)).max() > 0.97
        )
    weight = np.cos(np.deg2rad(latitude))
    total = np.average((centred**2).mean(axis=0).sum(axis=-1), weights=weight)
    assert (found.spread**2).sum() == pytest.approx(total, rel=1e-3)
    colours = found.colours()
    assert colours.min() >= 0 and colours.max() <= 1
    np.testing.assert_allclose(colours[found.scores == found.scores.max()], 1.0)


def test_cosines_are_those_of_their_definition() -> None:
    vectors = np.array([[1.0, 0.0], [0.0, 2.0], [-3.0, 0.0], [1.0, 1.0]])
    np.testing.assert_allclose(
        latents.cosines(vectors, np.array([0, 3])),
        [[1, 0, -1, 0.5**0.5], [0.5**0.5, 0.5**0.5, -(0.5**0.5), 1]], atol=1e-12,
    )  # fmt: skip


def test_analogues_are_those_of_a_search_by_hand_without_the_same_situation() -> None:
    rng = np.random.default_rng(1)
    values, weights = rng.standard_normal((20, 7)) + 5000.0, rng.uniform(0.1, 1.0, 7)
    apart = latents.root_mean_squares(values, weights)
    hours = np.concatenate([np.arange(10) * 24, np.arange(10) * 24])
    times = np.datetime64("2001-01-01", "ns") + hours * np.timedelta64(3_600_000_000_000, "ns")
    run = np.repeat([0, 1], 10)
    found = latents.analogues(apart, latents.admissible(times, run), count=2)
    for date in range(20):
        by_hand = {
            other: np.sqrt(np.average((values[date] - values[other]) ** 2, weights=weights))
            for other in range(20)
            if run[other] != run[date] or abs(hours[other] - hours[date]) > 5 * 24
        }
        nearest = sorted(by_hand, key=by_hand.__getitem__)[:2]
        assert list(found.number[date]) == nearest
        np.testing.assert_allclose(found.distance[date], [by_hand[n] for n in nearest], rtol=1e-9)
    alone = latents.analogues(apart[:3, :3], latents.admissible(times[:3], run[:3]))
    assert (alone.number == -1).all() and np.isnan(alone.distance).all()


def many_dates(per_run: int = 60) -> tuple[np.ndarray, np.ndarray]:
    """Two runs of dates a day apart."""
    hours = np.tile(np.arange(per_run) * 24, 2)
    times = np.datetime64("2001-01-01", "ns") + hours * np.timedelta64(3_600_000_000_000, "ns")
    return times, np.repeat([0, 1], per_run)


def test_analogues_are_compared_with_chance() -> None:
    times, run = many_dates()
    allowed, weights = latents.admissible(times, run), np.ones(6)

    def rows(seed: int) -> np.ndarray:
        return np.random.default_rng(seed).standard_normal((len(times), 6))

    apart = latents.root_mean_squares(rows(0), weights)
    for by, words in ((apart, "are nearer than"), (-apart, "are worse than")):
        found = latents.against_chance(apart, latents.analogues(by, allowed), times, run)
        differences = [
            apart[date, np.where(allowed[date], by[date], np.inf).argmin()]
            - apart[date, allowed[date]].mean()
            for date in range(len(times))
        ]
        assert found.difference == pytest.approx(np.mean(differences))
        assert found.low < found.difference < found.high
        assert f"Analogues by latents {words} dates drawn at random" in chance_verdict(found)
    told_apart = 0
    for seed in range(1, 41):  # what has nothing to do with height: 5 % are told apart by chance
        by = latents.root_mean_squares(rows(seed), weights)
        found = latents.against_chance(apart, latents.analogues(by, allowed), times, run)
        told_apart += "cannot be told" not in chance_verdict(found)
    assert told_apart <= 8


def test_too_few_dates_say_nothing_of_analogues() -> None:
    times, run = many_dates(4)
    apart = latents.root_mean_squares(np.arange(8.0)[:, None], np.ones(1))
    nearest = latents.analogues(apart, latents.admissible(times, run))
    found = latents.against_chance(apart, nearest, times, run)
    assert np.isfinite(found.difference) and np.isnan(found.low)
    assert "too few dates" in chance_verdict(found)
    alone = latents.analogues(apart[:4, :4], latents.admissible(times[:4], run[:4]))
    assert np.isnan(latents.against_chance(apart[:4, :4], alone, times[:4], run[:4]).difference)


def test_few_dates_are_told() -> None:
    assert few_dates(latents.STEADY_DATES) is None
    assert "compares 39 dates alone" in str(few_dates(39))


def test_days_lie_in_the_plane_of_their_variance_and_in_that_of_umap_if_there_is_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(2)
    pooled = rng.standard_normal((30, 2)) @ rng.standard_normal((2, 9))
    monkeypatch.setitem(sys.modules, "umap", None)
    ((name, points),) = latents.planes_of_days(pooled).items()
    rows = latents.standardised(pooled)
    assert name.startswith("PCA")  # distances in the plane are those of all features
    between = np.linalg.norm(points[:, None] - points, axis=-1)
    np.testing.assert_allclose(between, np.linalg.norm(rows[:, None] - rows, axis=-1), atol=1e-9)
    fake = SimpleNamespace(fit_transform=lambda rows: rows[:, :2])
    monkeypatch.setitem(sys.modules, "umap", SimpleNamespace(UMAP=lambda **_: fake))
    assert list(latents.planes_of_days(pooled))[1] == "UMAP"


def test_dates_are_spread_over_all_records_and_too_few_are_refused() -> None:
    records = {"train": [segment(dataset(steps=30))], "test": [segment(dataset(steps=13))]}
    runs = latents.dated_runs(records, window_steps=4, num_dates=10)
    assert [run.split for run in runs] == ["train", "test"]
    assert sum(len(run.steps) for run in runs) == 10
    assert runs[0].steps[0] == 3 and runs[-1].steps[-1] == 12
    for step, run in ((4, 1), (20, 0)):  # in both records, and in the first one alone
        shown = records["train"][0].times[step]
        runs = latents.dated_runs(records, window_steps=4, num_dates=10, shown=shown)
        assert [shown in dated.times for dated in runs] == [run == 0, run == 1]
        assert sum(len(dated.steps) for dated in runs) == 10  # as many as asked for, it included
    with pytest.raises(ValueError, match="num_dates=5: 5 dates of 37 .* needed: 8 or more"):
        latents.dated_runs(records, window_steps=4, num_dates=5)


@pytest.mark.parametrize(
    ("latitudes", "longitudes", "expected"),
    [
        ((-87.5, 87.5), (0.0, 355.0), ("north_atlantic", "nino34", "southern_ocean")),
        ((35.0, 70.0), (-20.0, 40.0), ("europe",)),
        ((35.0, 70.0), (340.0, 400.0), ("europe",)),
        ((10.0, 60.0), (-40.0, 20.0), ("north_atlantic", "europe", "sahara")),
        ((-40.0, -30.0), (10.0, 30.0), ()),
    ],
)
def test_places_are_chosen_that_the_data_reach(
    latitudes: tuple[float, float], longitudes: tuple[float, float], expected: tuple[str, ...]
) -> None:
    stream: Any = SimpleNamespace(
        latitude=np.arange(latitudes[0], latitudes[1] + 1, 5.0),
        longitude=np.arange(longitudes[0], longitudes[1] + 1, 5.0),
    )
    assert places_within(stream) == expected


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("atlantis", "places: 'atlantis' is no place that is known; valid: north_atlantic"),
        ((91.0, 0.0), r"places: \[91,0\] is not on the globe; valid: latitudes from -90 to 90"),
        ((0.0, 400.0), r"places: \[0,400\] is not on the globe"),
    ],
)
def test_places_that_are_nowhere_are_refused(place: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        degrees_of(place)


def test_fields_beside_tokens_are_those_of_their_cells_across_greenwich() -> None:
    """Cells from 350 E to 7.5 E, whose longitudes go on past 360, as do those of tokens or not."""
    latitude, longitude = np.arange(40.0, 48.0, 2.0), 350.0 + 2.5 * np.arange(8)
    values = np.arange(32.0).reshape(1, 4, 8)
    field = xr.DataArray(values, {"latitude": latitude, "longitude": longitude},
                         ("case", "latitude", "longitude"))  # fmt: skip
    for tokens in (np.array([351.2, 361.2, 366.2]), np.array([351.2, 1.2, 6.2])):
        results: Any = SimpleNamespace(
            fields=xr.Dataset({"wind": field}), token_latitude=np.array([41.9, 46.1]),
            token_longitude=tokens,
        )  # fmt: skip
        assert at_tokens(results, "wind").tolist() == [[8.0, 12.0, 14.0, 24.0, 28.0, 30.0]]


def test_the_strongest_pattern_is_the_one_that_was_planted() -> None:
    """In units of the variable: one standard deviation of normalised values is that of the data."""
    trained = load_checkpoint(str(TINY))
    (own,) = trained.own_specs
    pattern = np.linspace(-1, 3, own.patch)
    pattern /= np.linalg.norm(pattern)
    weight = trained.model.embedding[own.name].values.weight  # type: ignore[union-attr]
    noise = 1e-3 * np.random.default_rng(0).standard_normal(weight.shape[:2])
    planted = np.outer(np.linspace(1, 2, len(weight)), pattern) + noise
    weight.data = torch.from_numpy(planted).float()[:, :, None, None]
    (found,) = filters.first_layer(trained)
    spread = float(trained.normaliser.values(own, "std"))
    np.testing.assert_allclose(found.patterns[0].ravel(), spread * pattern, atol=0.01 * spread)
    assert found.share[0] == pytest.approx(1.0, abs=1e-4) and found.units == ("K",)
    assert found.patterns.shape[1:] == (1, 1, 1, 4, 4) and found.steps == (0,)
    with pytest.raises(ValueError, match="the embedding of Identity is not known"):
        filters.first_layer(replace(trained, model=torch.nn.Identity()))  # type: ignore[arg-type]


def test_tendencies_and_gradients_are_read_in_typical_residuals() -> None:
    """A filter that reads one gradient of one cell is that pattern, in the variable's units."""
    trained = load_checkpoint("default")
    (own,) = trained.own_specs
    embedding = trained.model.embedding[own.name]  # type: ignore[union-attr]
    details = embedding.details.weight
    details.data.zero_()
    cell = own.patch - 1  # humidity, the last level, the last cell
    details.data[0, 2 * (2 * own.patch) + own.patch + cell, 1, 1] = 1.0  # gradient, the own step
    (found,) = (f for f in filters.first_layer(trained) if f.reads == "gradients")
    spread = float(trained.normaliser.values(own, "std")[-1, -1])
    expected = np.zeros(found.patterns.shape[1:])
    expected[-1, -1, 2, 3, 3] = 2 * spread * float(embedding.scale[0, cell])
    np.testing.assert_allclose(found.patterns[0], expected, rtol=1e-5)
    assert found.steps == (-2, -1, 0, 1, 2) and found.units[-1] == "kg kg-1"


def test_colours_on_a_map_are_those_of_their_tokens() -> None:
    rng = np.random.default_rng(3)
    latitude, longitude = np.array([-45.0, 45.0]), np.array([45.0, 135.0, 225.0, 315.0])
    colours = rng.uniform(size=(8, 3))
    figure = figures.colour_map(colours, latitude, longitude, "made")
    (cells,) = figure.axes[0].collections[:1]
    drawn = np.asarray(cells.get_array())
    east = drawn.shape[1] // 2  # the first column east of Greenwich, the southernmost row
    np.testing.assert_allclose(drawn[0, east], colours[0])
    np.testing.assert_allclose(drawn[-1, 0], colours[6])


def test_maps_of_a_head_and_of_cosines_show_their_values_and_name_what_they_are_of() -> None:
    latitude, longitude = np.array([-45.0, 45.0]), np.array([0.0, 90.0, 180.0, 270.0])
    share = np.arange(8.0).reshape(2, 4) / 28.0
    dims = ("layer", "head", "place", "latitude", "longitude")
    head = xr.Dataset(
        {"by_place": (dims, share[None, None, None])},
        coords={"layer": [3], "latitude": latitude, "longitude": longitude,
                "place_latitude": ("place", [45.0]), "place_longitude": ("place", [90.0])},
    )  # fmt: skip
    cosine = np.linspace(-1.0, 1.0, 8)
    for figure, values, title in (
        (figures.attention_map(head, 3, 0, 0), 100.0 * share, "layer 3, head 1, from 45 N, 90 E"),
        (figures.cosine_map(cosine, latitude, longitude, "cosines"), cosine, "cosines"),
    ):
        (axes, *_) = figure.axes
        assert axes.get_title() == title
        drawn = {round(float(v), 6) for v in np.ma.compressed(axes.collections[0].get_array())}
        assert drawn == {round(float(v), 6) for v in values.ravel()}


def test_a_map_of_lags_shows_the_hours_of_every_place() -> None:
    north, east = np.meshgrid([-45.0, 45.0], [0.0, 90.0, 180.0, 270.0], indexing="ij")
    hours = np.arange(8.0) * 3
    apart = np.stack([hours, 100.0 + hours], axis=-1)[None, None]  # h, km
    dataset = xr.Dataset(
        {"distance": (("layer", "head", "place", "unit"), apart)},
        coords={"layer": [1], "unit": ["h", "km"], "offset": [-24.0, 0.0],
                "place_latitude": ("place", north.ravel()),
                "place_longitude": ("place", east.ravel())},
    )  # fmt: skip
    (axes, *_) = figures.lag_map(dataset, 1, 0).axes
    assert axes.get_title() == "layer 1, head 1, mean lag"
    (cells,) = axes.collections[:1]
    drawn = np.ma.compressed(cells.get_array())
    assert {float(v) for v in drawn} == set(hours) and cells.get_clim() == (0.0, 24.0)
    assert float(np.asarray(cells.get_array())[0, 0]) in hours[:4]  # south at the bottom


def unpacked(packed: dict[str, str]) -> np.ndarray:
    return np.frombuffer(zlib.decompress(base64.b64decode(packed["bytes"])), packed["type"])


@pytest.mark.e2e
def test_the_command_writes_a_page_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    def command(output: str, *more: str) -> int:
        words = [f"checkpoint={TINY}", "num_dates=8", "places=[europe,[-30,-60]]"]
        return main(["features", *words, f"output={tmp_path / output}", "accelerator=cpu", *more])

    (tmp_path / "page").mkdir()  # an empty folder is no output
    assert command("page") == 0
    assert "note: the page compares 8 dates alone" in capsys.readouterr().err
    page = (tmp_path / "page" / "index.html").read_text()
    assert "Left out: the checkpoint&#39;s fields lack geopotential at 500 hPa" in page
    assert "left out: the checkpoint&#39;s fields lack zonal wind at 850 hPa" in page
    assert not re.findall(r'(?:src|href)="(?!data:|#)', page), "the page refers to other files"
    assert "Few dates:" in page
    still = '<img class="still"'  # panels have pictures before their script has run
    panels = (
        page.split('id="heads"')[1].split('<h2 id="distance"')[0],
        (page.split('id="cosines"')[1].split('<h2 id="components"')[0]),
    )
    assert [panel.count(still) for panel in panels] == [2, 2]
    assert page.split('id="background-title"')[1].split("<canvas")[0].count(still) == 1
    (text,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page, re.S)
    data = json.loads(text)
    assert data["places"]["names"] == ["europe", "30° S, 60° W"]
    (pair,) = data["pairs"]
    head = pair["heads"][0]
    times = unpacked(head["times"]).reshape(len(data["places"]["latitude"]), -1)
    np.testing.assert_allclose(times.sum(axis=1), 10000, atol=5)  # hundredths of a per cent
    maps = unpacked(head["values"]).reshape(len(times), pair["rows"], pair["columns"])
    inside = maps != 255
    assert (inside.sum(axis=(1, 2)) == 2 * 4).all()  # a window of 8 x 16 cells, tokens of 4 x 4
    shares = (maps / 254.0) ** 2 * np.array(head["high"])[:, None, None]
    np.testing.assert_allclose((shares * inside).sum(axis=(1, 2)), 100.0, atol=1.5)
    dates = pd.read_csv(tmp_path / "page" / "dates.csv")
    assert len(dates) == 8 and {"pca_1", "pca_2"} <= set(dates)
    table = pd.read_csv(tmp_path / "page" / "attention_distance.csv")
    assert len(table) == 2 * 3 and (table.query("unit == 'hPa'")["distance"] == 0).all()
    capsys.readouterr()
    assert command("page") == 2 and "exists" in capsys.readouterr().err
    for more, words in (
        ("layer=4", "layer=4; valid: -1 to 0"),
        ("places=[[1,2,3]]", "places.0=[1,2,3]"),
        ("init_time=1999-01-01", "init_time=1999-01-01T00 is not in segment"),
        ("init_time=2001-01-01,2001-01-02", "valid: one ISO date such as 1959-01-12T06, or null"),
    ):
        assert command("other", more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert words in line
    assert not (tmp_path / "other").exists()


def test_what_cannot_be_is_refused_before_anything_is_read() -> None:
    trained = load_checkpoint(str(TINY))
    mute = replace(trained, provides=frozenset({"reconstruct"}))
    with pytest.raises(ValueError, match="did not learn to embed; it can reconstruct"):
        FeatureRun.prepare(mute, {}, FeatureOptions())
    with pytest.raises(ValueError, match="layers=-3; valid: -1 to 0"):
        FeatureRun.prepare(trained, {}, FeatureOptions(layers=(0, -3)))
    with pytest.raises(ValueError, match=r"places: \[95,0\] is not on the globe"):
        FeatureRun.prepare(trained, {}, FeatureOptions(places=((95.0, 0.0),)))
    records, late = {"test": [segment(dataset(steps=30))]}, np.datetime64("2002-01-01", "ns")
    with pytest.raises(ValueError, match="init_time=2002-01-01T00 ends no whole window"):
        FeatureRun.prepare(trained, records, FeatureOptions(), late)

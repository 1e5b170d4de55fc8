"""Probes find what is there, find nothing where nothing is, and are fitted on training dates alone;
labels agree with their closed forms."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import xarray as xr

pytest.importorskip("sklearn")

from atmossl.cli import main
from atmossl.evaluation.bootstrap import BlockBootstrap
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.probes import labels
from atmossl.probes.cases import Cases, TokenPlaces, chosen_runs, draw_places, read_cases
from atmossl.probes.features import (
    Features,
    band_weights,
    leading_axes,
    map_components,
    position_and_calendar,
    principal_components,
    random_network,
    raw_values,
    sector_weights,
)
from atmossl.probes.labels import Blind
from atmossl.probes.models import (
    PENALTIES,
    Rows,
    chosen_linear,
    fit_linear,
    folds_of,
    nearest_neighbours,
    ridge_of_all,
)
from atmossl.probes.run import Probed, ProbeOptions, ProbeRun, comparisons, linear_cka, scores
from atmossl.probes.scoring import Outcome, Question, Scorer, ask
from atmossl.probes.summary import Summary, brief_text
from tests.inference.oracle_models import segment

TINY = Path(__file__).parents[1] / "checkpoints" / "format_4.ckpt"
LATITUDE = np.arange(-87.1875, 90.0, 5.625)
LONGITUDE = np.arange(0.0, 360.0, 5.625)
LEVELS = {"geopotential": (500,), "u_component_of_wind": (850,), "v_component_of_wind": (850,)}


def state(level: int, times: list[str], **fields: np.ndarray) -> xr.Dataset:
    """Fields [lat lon] or [case lat lon], the same at all times where they have no case."""
    shape = (len(times), 1, len(LATITUDE), len(LONGITUDE))
    dims = ("case", "level", "latitude", "longitude")
    values = {
        name: (dims, np.broadcast_to(np.reshape(v, (-1, 1, *np.shape(v)[-2:])), shape).copy())
        for name, v in fields.items()
    }
    coords = {"level": [level], "latitude": LATITUDE, "longitude": LONGITUDE}
    return xr.Dataset(values, coords).assign_coords(
        time=("case", np.array(times, "datetime64[ns]"))
    )


def zonal(values: np.ndarray) -> np.ndarray:
    return np.repeat(np.asarray(values)[:, None], len(LONGITUDE), axis=1)


NOON = ["2001-03-01T12"]


def test_solid_rotation_has_the_vorticity_of_its_closed_form() -> None:
    wind = zonal(20.0 * np.cos(np.deg2rad(LATITUDE)))
    now = state(850, NOON, u_component_of_wind=wind, v_component_of_wind=0 * wind)
    found = labels.cyclonic_vorticity(now, now)[0].isel(longitude=3).to_numpy()
    exact = 2 * 20.0 * np.abs(np.sin(np.deg2rad(LATITUDE))) / labels.EARTH_RADIUS_M
    np.testing.assert_allclose(found[1:-1], exact[1:-1], rtol=0.02)  # differences over 11 degrees
    wave = zonal(np.cos(np.deg2rad(LATITUDE))) * np.sin(np.deg2rad(2 * LONGITUDE))
    eddy = state(850, NOON, u_component_of_wind=0 * wave, v_component_of_wind=wave)
    found = labels.cyclonic_vorticity(eddy, eddy)[0].sel(latitude=2.8125).to_numpy()
    exact = 2 * np.cos(np.deg2rad(2 * LONGITUDE)) / labels.EARTH_RADIUS_M
    np.testing.assert_allclose(found, exact, atol=0.02 * np.abs(exact).max())


def test_jet_blocking_and_storm_track_of_known_fields() -> None:
    wind = zonal(30.0 - 0.01 * (LATITUDE - 43.7) ** 2)  # a parabola, so the refinement is exact
    now = state(850, NOON, u_component_of_wind=wind)
    assert labels.jet_latitude(now, now).item() == pytest.approx(43.7, abs=1e-3)
    slope = zonal(labels.GRAVITY * (5500.0 - 8.0 * LATITUDE))
    now = state(500, NOON, geopotential=slope)
    assert labels.blocking(now, now).item() == pytest.approx(-8.0, abs=1e-6)
    before = state(500, NOON, geopotential=slope - 30.0 * labels.GRAVITY)
    assert labels.storm_track(now, before).item() == pytest.approx(2 * np.log(30.0), abs=1e-5)


def test_every_sector_has_its_own_label_and_features() -> None:
    """A jet at another latitude in every sector, whose first cell is not the first of the grid."""
    made = cases(6)
    centres = LATITUDE.reshape(-1, 2).mean(axis=1)  # of tokens of 2 x 2 cells
    places = draw_places(centres, LONGITUDE[::2], 24, 4, np.random.default_rng(0), first_column=3)
    assert places.sectors == 8
    jets = np.array([24.0, 28.0, 33.0, 38.0, 44.0, 49.0, 55.0, 61.0])
    of_cell = np.roll(np.repeat(jets, 8), 3)
    wind = 30.0 - 0.01 * (LATITUDE[:, None] - of_cell) ** 2
    for dataset in made.states.values():
        by_case = [np.roll(wind, shift, axis=0) for shift in (0, 1)]
        dataset["u_component_of_wind"][:] = np.stack([by_case[n % 2] for n in range(24)])[:, None]
    question = ask("jet_latitude", made, places)
    found = question.targets.reshape(24, 8) + 5.625 / 2
    np.testing.assert_allclose(found[::2], 0.0, atol=0.05)  # departures from every sector's mean
    np.testing.assert_allclose(found[1::2], 5.625, atol=0.05)
    assert (question.case == np.repeat(np.arange(24), 8)).all()
    raw = raw_values(made, places, {"u_component_of_wind": (850,)}).features
    now = raw.sectors[0].reshape(8, 2, 16, 4)[:, 1]  # of the day and the day before, row and column
    top = places.latitude[now.mean(axis=2).argmax(axis=1)]
    np.testing.assert_allclose(top, jets, atol=5.7)


def test_columns_count_in_a_sector_as_they_overlap_it() -> None:
    np.testing.assert_allclose(sector_weights(8, 4), np.repeat(np.eye(4), 2, axis=1) / 2)
    np.testing.assert_allclose(sector_weights(2, 4), np.repeat(np.eye(2), 2, axis=0))
    np.testing.assert_allclose(sector_weights(3, 2), np.array([[2, 1, 0], [0, 1, 2]]) / 3)
    columns = TokenPlaces(LATITUDE, LONGITUDE[:60], *np.zeros((2, 1, 1), int))
    assert columns.every == 2 and columns.sectors == 2  # 60 and 30 columns
    np.testing.assert_array_equal(
        replace(columns, first_column=2).cells_of_sectors(60)[1], [*range(32, 60), 0, 1]
    )


def test_belts_and_local_hours_follow_from_place_and_date() -> None:
    now = state(500, NOON, geopotential=zonal(LATITUDE))
    belts = labels.latitude_belt(now, now)[0, :, 0].to_numpy()
    assert belts[LATITUDE < -60].max() == 0 and belts[(LATITUDE > 0) & (LATITUDE < 30)].min() == 3
    hours = labels.local_hour(now, now)[0, 0].sel(longitude=90.0)  # 18 h where it is noon at 0
    np.testing.assert_allclose(hours, [-1.0, 0.0], atol=1e-12)


def test_pairs_are_of_one_run_within_bounds() -> None:
    times = np.datetime64("2001-01-01", "ns") + np.timedelta64(18, "h") * np.array([0, 1, 2, 7, 0])
    first, second, hours = labels.date_pairs(times, np.array([0, 0, 0, 0, 1]))
    assert list(zip(first, second, hours, strict=True)) == [
        (0, 1, 18.0), (0, 2, 36.0), (1, 2, 18.0), (2, 3, 90.0)
    ]  # fmt: skip


def cases(per_run: int = 40, seed: int = 0) -> Cases:
    """Four runs, two of them for training, of random fields a day apart in time."""
    rng = np.random.default_rng(seed)
    count = 4 * per_run
    dates = np.datetime64("2001-01-01", "ns") + np.arange(per_run) * np.timedelta64(18, "h")
    times = np.tile(dates, 4)
    shape = (count, 1, len(LATITUDE), len(LONGITUDE))
    dims = ("case", "level", "latitude", "longitude")
    states = {}
    for hours in (-24, 0, 24):
        fields = [
            xr.DataArray(
                rng.standard_normal(shape), dims=dims, name=name,
                coords={"level": list(levels), "latitude": LATITUDE, "longitude": LONGITUDE},
            )
            for name, levels in LEVELS.items()
        ]  # fmt: skip
        states[hours] = xr.merge(fields, join="outer").assign_coords(time=("case", times))
    split = np.repeat(["train", "train", "validation", "test"], per_run)
    return Cases(times, np.repeat(np.arange(4), per_run), split, states)


def question(of: Cases, targets: np.ndarray, *, classes: bool = False) -> Question:
    return Question("made", classes, False, targets, np.arange(len(of.times)))


def features(of_date: np.ndarray, layer: int | None = 0) -> Features:
    return Features("latents", layer, of_date[:, None], of_date[:, None], of_date[:, None])


BOOTSTRAP = BlockBootstrap(4, 200)


@pytest.mark.parametrize("classes", [False, True])
def test_a_label_that_is_linear_in_the_features_is_found(classes: bool) -> None:
    made, rng = cases(), np.random.default_rng(1)
    pooled = rng.standard_normal((len(made.times), 6))
    targets = pooled @ rng.standard_normal((6, 2)) + 3.0
    if classes:
        targets = np.eye(2)[(targets[:, 0] > 3.0).astype(int)]
    scorer = Scorer(question(made, targets, classes=classes), made, BOOTSTRAP)
    outcome = scorer.linear(features(pooled))
    assert outcome.skill == pytest.approx(1.0, abs=0.15 if classes else 1e-4)
    assert outcome.samples.min() <= outcome.skill <= outcome.samples.max()
    refitted = scorer.with_refits(outcome, features(pooled))
    assert refitted.refits[0] <= refitted.refits[1] <= 1.0
    np.testing.assert_allclose(refitted.refits, outcome.skill, atol=0.15)


def test_skill_is_that_of_its_definition_and_climatology_has_none() -> None:
    made, rng = cases(), np.random.default_rng(2)
    targets = (
        rng.standard_normal((len(made.times), 1)) + np.linspace(0, 2, len(made.times))[:, None]
    )
    scorer = Scorer(question(made, targets), made, BOOTSTRAP)
    (climatology,) = scorer.references()
    assert climatology.skill == 0.0 and not climatology.samples.any()
    guess = targets + 0.5 * rng.standard_normal(targets.shape)
    outcome = scorer.outcome("made", "none", lambda split: guess[made.of(split)])
    test, mean = made.of("test"), targets[~made.of("test")].mean()
    exact = 1 - ((guess - targets)[test] ** 2).mean() / ((targets[test] - mean) ** 2).mean()
    assert outcome.skill == pytest.approx(exact, abs=1e-12)


def test_features_without_the_label_have_no_skill_within_the_interval() -> None:
    made, rng = cases(80), np.random.default_rng(3)
    targets = rng.standard_normal((len(made.times), 1))
    scorer = Scorer(question(made, targets), made, BOOTSTRAP)
    pooled = rng.standard_normal((len(made.times), 8))
    for outcome in (scorer.linear(features(pooled)), scorer.neighbours(features(pooled))):
        low, high = np.quantile(outcome.samples, [0.025, 0.975])
        assert low < 0.05 and high > -0.2 and outcome.skill < 0.1, outcome


def rows_of(features: np.ndarray, targets: np.ndarray, run: np.ndarray) -> Rows:
    times = np.datetime64("2001-01-01", "ns") + np.arange(len(run)) * np.timedelta64(6, "h")
    return Rows(features, targets, run, times)


@pytest.mark.parametrize("width", [5, 90])
def test_ridge_with_all_penalties_is_that_with_each(width: int) -> None:
    rng = np.random.default_rng(width)
    features, targets = 3.0 + rng.standard_normal((60, width)), rng.standard_normal((60, 2))
    known = rows_of(features[:40], targets[:40], np.zeros(40, int))
    found = ridge_of_all(known, features[40:], PENALTIES)
    for predicted, penalty in zip(found, PENALTIES, strict=True):
        alone = fit_linear(known, penalty, classes=False)(features[40:])
        np.testing.assert_allclose(predicted, alone, atol=1e-7 / min(1.0, penalty))


def test_the_penalty_is_one_that_serves_runs_that_the_fit_lacks() -> None:
    """Features that tell the run tell the label of these runs, but of no other."""
    rng = np.random.default_rng(0)
    run = np.repeat(np.arange(6), 20)
    of_run = rng.standard_normal((6, 3))[run] + 0.01 * rng.standard_normal((120, 3))
    label = rng.standard_normal((6, 1))[run]
    misled = chosen_linear(rows_of(of_run, label, run), classes=False)
    assert misled.strength >= 10.0 and misled.skill < 0.5
    true = chosen_linear(rows_of(of_run, of_run[:, :1], run), classes=False)
    assert true.strength == min(PENALTIES) and true.skill > 0.999


def test_folds_are_runs_or_stretches_of_few_runs() -> None:
    nothing = np.zeros((12, 1))
    runs = rows_of(nothing, nothing, np.repeat([0, 1, 2, 5], 3))
    assert folds_of(runs).tolist() == np.repeat(np.arange(4), 3).tolist()
    two = rows_of(nothing, nothing, np.repeat([3, 7], 6))
    assert folds_of(two).tolist() == np.repeat(np.arange(4), 3).tolist()
    places_of_dates = replace(two, times=np.repeat(two.times[:6], 2), run=np.zeros(12, int))
    assert folds_of(places_of_dates).tolist() == np.repeat([0, 1, 2, 3], [4, 2, 4, 2]).tolist()


def test_classes_that_a_fit_does_not_have_are_not_expected() -> None:
    rng = np.random.default_rng(0)
    known = rows_of(rng.standard_normal((9, 2)), np.eye(2)[np.zeros(9, int)], np.zeros(9, int))
    predicted = fit_linear(known, 10.0, classes=True)(rng.standard_normal((3, 2)))
    np.testing.assert_array_equal(predicted, [[1.0, 0.0]] * 3)


def test_neighbours_near_in_time_of_the_same_run_are_left_out() -> None:
    rng = np.random.default_rng(0)
    vectors = rng.standard_normal((40, 3))
    hours = np.concatenate([np.arange(20) * 6, 20000 + np.arange(20) * 6])
    times = np.datetime64("2001-01-01", "ns") + hours * np.timedelta64(1, "h")
    wrong = np.repeat([1.0, 5.0], 20)[:, None]
    train = Rows(vectors, wrong, np.zeros(40, int), times)
    asked = Rows(vectors[:20], wrong[:20], np.zeros(20, int), times[:20])  # are rows themselves
    assert (nearest_neighbours(train, asked, neighbours=5) == 5.0).all()
    elsewhere = replace(asked, run=np.ones(20, int))
    found = nearest_neighbours(train, elsewhere, neighbours=1)
    assert (found == 1.0).all()  # another run: its own copy is the nearest
    crowded = Rows(vectors[:20], wrong[:20], np.zeros(20, int), times[:20])
    assert (nearest_neighbours(crowded, asked) == 1.0).all()  # none is left: the mean of all


def test_neighbours_agree_with_a_search_by_hand() -> None:
    rng = np.random.default_rng(4)
    train = Rows(rng.standard_normal((60, 5)), rng.standard_normal((60, 2)), np.zeros(60, int),
                 np.zeros(60, "datetime64[ns]"))  # fmt: skip
    asked = replace(train, features=rng.standard_normal((60, 5)), run=np.ones(60, int))
    mean, spread = train.features.mean(0), train.features.std(0)
    expected = []
    for row in (asked.features - mean) / spread:
        cosines = [
            row @ other / np.linalg.norm(row) / np.linalg.norm(other)
            for other in (train.features - mean) / spread
        ]
        expected.append(train.targets[np.argsort(cosines)[-20:]].mean(axis=0))
    np.testing.assert_allclose(nearest_neighbours(train, asked), expected, atol=1e-6)


def test_attention_finds_what_pooling_averages_away() -> None:
    """The label is a feature of one token, which another feature marks; the means over tokens of
    both are no help."""
    rng = np.random.default_rng(0)
    made, count = cases(80), 320
    tokens, marked = rng.standard_normal((count, 32, 6)), rng.integers(0, 32, count)
    tokens[:, :, 0] = 0.0
    tokens[np.arange(count), marked, 0] = 5.0
    targets = tokens[np.arange(count), marked, 1][:, None]
    scorer = Scorer(question(made, targets), made, BOOTSTRAP)
    seen = replace(features(tokens.mean(axis=1)), tokens=tokens)
    places = draw_places(np.linspace(-60, 60, 32), np.zeros(1), count, 1, rng)  # one sector
    assert scorer.linear(seen).skill < 0.2
    assert scorer.attentive(seen, places).skill > 0.8


def test_a_constant_label_is_refused_by_name() -> None:
    made = cases(6)
    for hours in made.states:
        made.states[hours]["geopotential"][:] = 50000.0
    places = draw_places(LATITUDE, LONGITUDE, 24, 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match="probes: blocking: its label is constant over the 12"):
        ask("blocking", made, places)


def test_a_label_that_varies_by_rounding_errors_alone_is_constant() -> None:
    """The local hour, if all dates are of the same hour."""
    made = cases(6)
    days = np.datetime64("2001-01-01T06", "ns") + np.arange(6) * np.timedelta64(48, "h")
    for hours, dataset in made.states.items():
        moved = np.tile(days + np.timedelta64(hours, "h"), 4)
        made.states[hours] = dataset.assign_coords(time=("case", moved))
    places = draw_places(LATITUDE, LONGITUDE, 24, 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match="local_hour: its label is constant over the 12"):
        ask("local_hour", made, places)


@pytest.mark.parametrize(
    ("field", "part", "label"),
    [("geopotential", 1, "blocking"), ("u_component_of_wind", 3, "jet_latitude")],
)
def test_a_label_of_fields_with_gaps_is_refused_by_name(field: str, part: int, label: str) -> None:
    made = cases(6)
    for hours in made.states:
        made.states[hours][field][part] = np.nan
    places = draw_places(LATITUDE, LONGITUDE, 24, 4, np.random.default_rng(0))
    with pytest.raises(ValueError, match=f"{label}: its label is missing on 1 of 24 dates"):
        ask(label, made, places)


def test_gaps_of_raw_values_are_at_the_mean_of_training() -> None:
    made = cases(10)
    for hours in made.states:
        made.states[hours]["geopotential"][:, :, :2, :2] = np.nan
    places = draw_places(LATITUDE, LONGITUDE, 40, 6, np.random.default_rng(0))
    raw = raw_values(made, places, {"geopotential": LEVELS["geopotential"]}).features
    assert raw.local is not None
    assert np.isfinite(raw.sectors).all() and np.isfinite(raw.local).all()
    where = np.isnan(made.states[0]["geopotential"].to_numpy()[0, 0])
    assert where.sum() == 4 and np.abs(raw.sectors.mean()) < 0.1


def test_what_a_network_does_not_see_is_not_withheld() -> None:
    asked = Blind(position=True, variables=("specific_humidity", "temperature"))
    assert asked.within(Blind(True, ("temperature",))) == Blind(True, ("temperature",))
    assert Blind(position=True).within(Blind(False, ("temperature",))) == Blind()


def outcome(probe: str, source: str, skill: float) -> Outcome:
    method = "none" if source in ("climatology", "persistence") else "linear"
    return Outcome(probe, source, 0, method, skill, np.full(20, skill), skill)


def test_position_is_no_rival_of_latents_that_were_not_told_it() -> None:
    outcomes = tuple(
        outcome(probe, source, skill)
        for probe in ("local_hour", "anomaly_24h")
        for source, skill in (("latents", 0.5), ("position", 0.9), ("random", 0.25))
    )
    headlines = {one.probe: one for one in outcomes if one.source == "latents"}
    found = Probed(outcomes, headlines, {}, {}, {}, without_position=frozenset({"local_hour"}))
    table = comparisons(found, "a")
    rivals = table.groupby("probe")["baseline"].agg(set).to_dict()
    assert rivals == {"local_hour": {"random"}, "anomaly_24h": {"position", "random"}}


def test_the_printed_table_fits_80_columns_and_names_the_best_baseline() -> None:
    outcomes = tuple(
        outcome("vorticity_extreme", source, skill)
        for source, skill in (("latents", 0.5), ("climatology", 0.0), ("pca", 0.3), ("raw", 0.2),
                              ("persistence", -0.4))
    )  # fmt: skip
    found = Probed(outcomes, {"vorticity_extreme": outcomes[0]}, {}, {}, {})
    scored = scores(found, "a").assign(headline=lambda table: table["source"] == "latents")
    nothing = pd.DataFrame()
    summary = Summary(scored, comparisons(found, "a"), nothing, nothing, nothing, {})
    lines = brief_text(summary).splitlines()
    assert lines[0] == "checkpoint a" and max(map(len, lines)) <= 80
    assert lines[1].split("  ")[0] == "probe"
    assert lines[2].split() == [
        "vorticity_extreme", "0.50", "pca", "0.30", "+0.20", "(+0.20", "to", "+0.20)", "*",
    ]  # fmt: skip


@pytest.mark.e2e
def test_labels_that_data_do_not_have_are_left_out_if_nobody_named_them(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    """One date a day, all at the same hour."""
    words = ["probe", f"checkpoint={TINY}", "every=48", "accelerator=cpu", "bootstrap=20",
             "places=4", f"output={tmp_path / 'report'}"]  # fmt: skip
    assert main(words) == 0
    told = capsys.readouterr().err
    assert "note: without the probe local_hour: its label is constant over the" in told
    assert set(pd.read_csv(tmp_path / "report" / "scores.csv")["probe"]) >= {"latitude_belt"}
    words[-1] = f"output={tmp_path / 'other'}"
    assert main([*words, "probes=[local_hour]"]) == 2
    assert "local_hour: its label is constant" in capsys.readouterr().err


def test_all_statistics_are_of_the_training_dates() -> None:
    made = cases(10)
    places = draw_places(LATITUDE, LONGITUDE, 40, 6, np.random.default_rng(0))
    changed = cases(10)
    for hours in changed.states:  # only what is not for training is another world
        fields = changed.states[hours]
        fields["geopotential"][20:] = 7.0 * fields["geopotential"][20:] + 1000.0
        fields["v_component_of_wind"][20:] = 9.0 * fields["v_component_of_wind"][20:]
    for name in ("blocking", "anomaly_24h", "vorticity_extreme"):
        one, other = ask(name, made, places), ask(name, changed, places)
        train = made.of("train")[one.case]
        np.testing.assert_array_equal(one.targets[train], other.targets[train])
        assert (one.targets[~train] != other.targets[~train]).any()
    like = latents_like(places, num_features=5)
    raw = [raw_values(one, places, LEVELS) for one in (made, changed)]
    parts = [
        principal_components(of_raw, one, places, like)
        for of_raw, one in zip(raw, (made, changed), strict=True)
    ]
    maps = [map_components(one, made, like) for one in raw]
    for one, other in ([of_raw.features for of_raw in raw], parts, maps):
        for name in ("sectors", "local", "departures", "tokens"):
            found, again = getattr(one, name), getattr(other, name)
            if found is not None:
                bound = 1e-9 if found.dtype == np.float64 else 1e-5 * np.abs(found).max()
                np.testing.assert_allclose(found[:20], again[:20], atol=bound)
                assert not np.allclose(found[20:], again[20:], atol=1e-2)
    assert parts[0].sectors.shape == (40, 8, 16 * 5) and parts[0].local.shape == (40, 6, 5)
    assert maps[0].sectors.shape == (40, 8, 5) and maps[0].local is None


def latents_like(places: TokenPlaces, num_features: int) -> Features:
    """Latents without any meaning, of so many features in a token."""
    count, num_places = places.rows.shape
    rng = np.random.default_rng(0)
    local = rng.standard_normal((count, num_places, num_features))
    tokens = rng.standard_normal((count, len(places.spread_out()[0]), num_features))
    bands = rng.standard_normal((count, places.sectors, 16 * num_features))
    return Features("latents", 0, bands, local, local, tokens)


def test_principal_components_are_those_of_scikit_learn() -> None:
    from sklearn.decomposition import PCA

    made = cases(10)
    places = draw_places(LATITUDE, LONGITUDE, 40, 6, np.random.default_rng(0))
    raw = raw_values(made, places, LEVELS)
    found = principal_components(raw, made, places, latents_like(places, 3))
    for name in ("local", "departures"):
        rows = getattr(raw.features, name)
        width = rows.shape[-1]
        fitted = PCA(3).fit(rows[:20].reshape(-1, width).astype(float))
        expected = fitted.transform(rows.reshape(-1, width).astype(float)).reshape(40, 6, 3)
        np.testing.assert_allclose(np.abs(getattr(found, name)), np.abs(expected), atol=1e-9)
    rows = raw.features.local[:20].reshape(120, -1)
    mean, axes = rows.mean(axis=0), leading_axes(rows)[1][:3]
    spread = (places.rows % places.every == 0) & (places.columns % places.every == 0)
    cases_of, places_of = np.nonzero(spread)  # places that are among the tokens shown everywhere
    assert len(cases_of) > 9
    in_row = -(-len(LONGITUDE) // places.every)
    number = places.rows // places.every * in_row + places.columns // places.every
    expected = (raw.features.local[spread] - mean) @ axes.T
    assert found.tokens is not None  # products with unit vectors, in float32
    bound = 8 * np.finfo(np.float32).eps * np.linalg.norm(raw.features.local, axis=-1).max()
    np.testing.assert_allclose(found.tokens[cases_of, number[spread]], expected, atol=bound)
    whole = map_components(raw, made, latents_like(places, 3))
    maps = raw.features.sectors.astype(float)
    maps = (maps - maps[:20].mean(axis=0)).reshape(40 * 8, -1)
    expected = PCA(3, svd_solver="full").fit(maps[: 20 * 8]).transform(maps).reshape(40, 8, 3)
    np.testing.assert_allclose(np.abs(whole.sectors), np.abs(expected), atol=1e-9)


def test_means_over_bands_tell_the_latitude_that_the_mean_over_the_sphere_hides() -> None:
    """A jet that wanders between bands, which are of equal area in this made-up field."""
    latitude = np.degrees(np.arcsin(np.linspace(-1, 1, 33)[1:] - 1 / 32))
    weights = band_weights(latitude)
    assert weights.shape == (16, 32)
    np.testing.assert_allclose(weights.sum(axis=1), 1.0)
    area = np.cos(np.deg2rad(latitude))
    np.testing.assert_allclose(weights[3, 6:8], area[6:8] / area[6:8].sum())
    assert (weights > 0).sum() == 32
    jets = np.eye(32)[:, None]  # in one row after another
    np.testing.assert_array_equal((jets[:, 0] @ weights.T).argmax(axis=1), np.arange(32) // 2)
    assert band_weights(latitude[:5]).shape == (5, 5)


def test_departures_are_from_every_tokens_mean_over_the_training_dates() -> None:
    made = cases(10)
    places = draw_places(LATITUDE, LONGITUDE, 40, 6, np.random.default_rng(0))
    for hours in made.states:  # every place has a climate of its own
        made.states[hours] = made.states[hours] + 100.0 * np.arange(32.0)[:, None]
    raw = raw_values(made, places, {"geopotential": (500,)}).features
    cells = made.states[0]["geopotential"].isel(level=0).to_numpy()
    cells = (cells - cells[:20].mean()) / cells[:20].std()
    expected = places.at_places((cells - cells[:20].mean(axis=0))[..., None])[..., 0]
    first = raw.local.shape[-1] // 2  # the day before comes first; tokens of one cell
    np.testing.assert_allclose(raw.departures[..., first], expected, atol=1e-9)
    question = ask("anomaly_24h", made, places)
    np.testing.assert_array_equal(question.inputs(raw, made), raw.departures.reshape(240, -1))
    belts = ask("latitude_belt", made, places)
    np.testing.assert_array_equal(belts.inputs(raw, made), raw.local.reshape(240, -1))


def test_places_are_drawn_by_area_and_tokens_average_their_cells() -> None:
    places = draw_places(LATITUDE[:16] + 45, LONGITUDE[::4], 3000, 4, np.random.default_rng(0))
    latitude = places.latitude[places.rows]
    weight = np.cos(np.deg2rad(places.latitude)).clip(1e-6)
    assert latitude.mean() == pytest.approx(np.average(places.latitude, weights=weight), abs=1.0)
    numbers = places.rows * 16 + places.columns
    assert all(len(set(row)) == 4 for row in numbers)  # no place twice
    shifted = replace(places, first_column=2)
    cells = np.arange(64.0)[None, None].repeat(32, axis=1)
    np.testing.assert_allclose(shifted.token_means(cells)[0, 0, :2], [3.5, 7.5])
    at = shifted.at_places(shifted.token_means(cells.repeat(3000, axis=0)))
    assert at.shape == (3000, 4)


def test_position_and_calendar_know_where_and_when_alone() -> None:
    made = cases(8)
    places = draw_places(LATITUDE, LONGITUDE, 32, 5, np.random.default_rng(0))
    one = position_and_calendar(made, places)
    for hours in made.states:
        made.states[hours]["geopotential"][:] = 0.0
    np.testing.assert_array_equal(one.local, position_and_calendar(made, places).local)
    scorer = Scorer(ask("local_hour", made, places), made, BOOTSTRAP)
    assert scorer.linear(one).skill > 0.98  # it is told the local hour


def test_cka_sees_through_rotations_and_is_small_between_strangers() -> None:
    rng = np.random.default_rng(6)
    x = rng.standard_normal((200, 5))
    turned = 3.0 * x @ np.linalg.qr(rng.standard_normal((5, 5)))[0] + 1.0
    assert linear_cka(x, turned) == pytest.approx(1.0, abs=1e-9)
    assert linear_cka(x, rng.standard_normal((200, 5))) < 0.1


def test_the_random_network_is_the_same_architecture_untrained() -> None:
    trained = load_checkpoint(str(TINY))
    random = [random_network(trained, seed).model.state_dict() for seed in (0, 0, 1)]
    assert random[0].keys() == trained.model.state_dict().keys()
    assert all(torch.equal(random[0][name], random[1][name]) for name in random[0])
    assert any(not torch.equal(random[0][name], random[2][name]) for name in random[0])


def test_the_random_network_measures_tendencies_as_the_trained_one_does() -> None:
    """The typical sizes of tendencies are of the data, not of training."""
    trained = load_checkpoint("default")
    random = dict(random_network(trained, 0).model.named_buffers())
    scales = {name: b for name, b in trained.model.named_buffers() if name.endswith("scale")}
    assert scales and all(torch.equal(random[name], values) for name, values in scales.items())
    assert any((values != 1).any() for values in scales.values())


def test_too_few_dates_and_odd_time_steps_are_named() -> None:
    short = segment()
    with pytest.raises(ValueError, match="every=3 leaves 2 dates of split train.*needed: 8"):
        chosen_runs({"train": [short]}, window_steps=4, every=3)
    odd = replace(short, times=short.times[0] + np.arange(12) * np.timedelta64(5, "h"))
    with pytest.raises(ValueError, match="step of 5 h does not divide a day"):
        chosen_runs({"train": [odd]}, window_steps=4, every=1)


def test_parts_of_a_record_with_gaps_are_one_run_and_short_ones_have_no_dates() -> None:
    whole = segment()
    parts = [replace(whole, name=f"waves@{part}", part=part) for part in "abc"]
    stub = replace(parts[1], times=whole.times[:3], partial=True)
    records = {"train": [parts[0], stub, parts[1], parts[2]], "validation": [parts[0]],
               "test": [stub, parts[1]]}  # fmt: skip
    runs = chosen_runs(records, window_steps=4, every=1)
    dates = len(whole.times) - 8  # a day before and after
    assert [(run.split, len(run.steps)) for run in runs] == [
        ("train", dates), ("train", dates), ("train", dates), ("validation", dates), ("test", dates)
    ]  # fmt: skip
    read = read_cases(runs, {whole.variables[0]: whole.levels[:1]})
    assert read.run.tolist() == [0] * 3 * dates + [1] * dates + [2] * dates
    np.testing.assert_array_equal(read.times[:dates], whole.times[4:-4])


def test_a_checkpoint_that_cannot_embed_is_refused_before_anything_is_read() -> None:
    mute = replace(load_checkpoint(str(TINY)), provides=frozenset({"reconstruct"}))
    with pytest.raises(ValueError, match="did not learn to embed; it can reconstruct"):
        ProbeRun.prepare(mute, {}, ProbeOptions())


@pytest.mark.e2e
def test_the_command_writes_a_report_once(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    both = f"checkpoint=[{TINY},{TINY.with_name('format_3.ckpt')}]"

    def command(output: str, *more: str) -> int:
        return main(["probe", "every=51", "probes=[latitude_belt,local_hour]", "accelerator=cpu",
                     "bootstrap=50", "places=8", f"output={tmp_path / output}", *more])  # fmt: skip

    (tmp_path / "report").mkdir()  # an empty folder is no output
    assert command("report", both) == 0
    (line,) = [t for t in capsys.readouterr().err.splitlines() if t.startswith("note: ")]
    assert line.startswith(
        "note: probes are fitted on 12 dates and scored on 3, that is 3.0 blocks"
    )
    table = pd.read_csv(tmp_path / "report" / "scores.csv")
    assert set(table["source"]) == {"latents", "random", "pca", "raw", "position", "climatology"}
    assert (table.query("source == 'climatology'")["skill"] == 0).all()
    assert (table["skill"] <= 1).all() and table.query("headline")["refits_low"].notna().all()
    alignment = pd.read_csv(tmp_path / "report" / "alignment.csv")["cka"]
    assert alignment.to_numpy() == pytest.approx([1.0])  # the same network in two formats
    page = (tmp_path / "report" / "index.html").read_text()
    assert "latitude_belt" in page and "RankMe" in page
    capsys.readouterr()
    assert command("report", both) == 2 and "exists" in capsys.readouterr().err
    for more, text in (
        ("probes=[jets]", "probes=jets: unknown; valid: jet_latitude,"),
        ("probes=[blocking]", "blocking needs geopotential at 500 hPa; the checkpoint has"),
        ("layers=[4]", "layers=[4]; valid: -1 to 0"),
        ("every=80", "every=80 leaves"),
    ):
        assert command("other", f"checkpoint={TINY}", more) == 2
        (line,) = capsys.readouterr().err.strip().splitlines()
        assert text in line
    assert not (tmp_path / "other").exists()

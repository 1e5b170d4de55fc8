"""Spread inflation against an ensemble whose lack of spread is known."""

import json
from collections.abc import Iterable
from dataclasses import replace

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.batch import PRIMARY, Prediction
from atmossl.cli import main
from atmossl.data.statistics import compute_statistics
from atmossl.inference.calibration import (
    Calibration,
    CalibrationFactors,
    zonal_bands,
    zone_weights,
)
from atmossl.inference.calibration_fit import Split, _Sums, estimate_factors, estimate_rollout
from atmossl.inference.cases import predict_fields
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.inference.plan import Plan
from atmossl.inference.tiles import blended, predict_parts
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from tests.inference.oracle_models import (
    NAMES,
    STORE,
    Diffusing,
    Known,
    Oracle,
    predictor,
    run_at,
    segment,
)
from tests.synthetic import dataset


class Overconfident(Oracle):
    """The truth plus noise, in members that are spread a third of what they err."""

    def forward(self, view):
        generator = torch.Generator().manual_seed(int(view.streams[0].grid.time_hours[0, 0]))

        def noisy(stream):
            shared = torch.randn(stream.target.shape, generator=generator)
            return stream.target + 0.3 * shared

        return Known(noisy, tuple(0.1 * np.linspace(-1.5, 1.5, 6))).forward(view)


def inflation(used: Plan, times: np.ndarray) -> CalibrationFactors:
    return estimate_factors(used, times, predict_parts(used, list(times)))


def test_inflation_brings_spread_to_error() -> None:
    used = predictor(
        TemporalInterpolation(6), Overconfident(), window=(5, 8, 16), overlap=0.0, batch_size=1
    )
    times = used.possible_times()
    found = inflation(used, times)
    variance = np.var(0.1 * np.linspace(-1.5, 1.5, 6), ddof=1) * 7 / 6
    expected = 0.3 / np.sqrt(variance)
    for factors in found.spread.values():
        assert factors.shape == (1, 1, 1, 3)  # zone band step level
        np.testing.assert_allclose(factors, expected, rtol=0.1)  # of 8 times 128 cells
    record = Calibration({"kept": 1}, used.task).replaced(found)
    assert record["kept"] == 1
    trained = replace(used.trained, checkpoint_record=record)
    again = inflation(replace(used, trained=trained), times)
    for factors in again.spread.values():
        np.testing.assert_allclose(factors, 1.0, atol=1e-4)
    record = Calibration(record, used.task).without_own()
    free = inflation(replace(used, trained=replace(trained, checkpoint_record=record)), times)
    np.testing.assert_allclose(free.spread["temperature"], found.spread["temperature"])
    assert CalibrationFactors.of(record, "TemporalInterpolation") is None


GRID = (np.array([-60.0, 0.0, 70.0]), np.arange(4) * 90.0)
BOX = Inpainting((LatLonBox(60, 90, 0, 360),))
FACTORS = {
    "spread": {
        "Forecast": {"hours": [6.0, 12.0], "factors": {"t": [[1.0, 2.0], [3.0, 2.0]]}},
        "Inpainting": {"hours": [0.0], "factors": {"t": [[1.5, 1.5]]}},
    }
}


def ratios(record: dict, task: Task, hours: list[float]) -> np.ndarray:
    """How far the members of a random ensemble are moved from their mean, [step level lat]."""
    fields = np.random.default_rng(0).standard_normal((len(hours), 5, 2, 3, 4)).astype(np.float32)
    found = Calibration(record, task).apply({"t": fields}, np.array(hours), *GRID)["t"]
    np.testing.assert_allclose(found.mean(axis=1), fields.mean(axis=1), atol=1e-6)
    ratio = found.std(axis=1) / fields.std(axis=1)
    np.testing.assert_allclose(np.ptp(ratio, axis=-1), 0, atol=1e-5)  # along a circle of latitude
    return ratio.mean(axis=-1)


def test_factors_are_linear_between_lead_times_and_keep_the_mean() -> None:
    found = ratios(FACTORS, Forecast(24), [3.0, 6.0, 9.0, 24.0])
    expected = np.array([[1, 2], [1, 2], [2, 2], [3, 2]])
    np.testing.assert_allclose(found, np.repeat(expected[..., None], 3, axis=2), rtol=1e-5)


def test_a_union_takes_at_each_cell_the_largest_factor_of_what_hides_there() -> None:
    """The box holds the northernmost row of three; what is calibrated for the union itself comes
    on top, in any order of the parts."""
    union = Combined((Forecast(12), BOX))
    inherited = np.array([[[1, 1, 1.5], [2, 2, 2]], [[3, 3, 3], [2, 2, 2]]])  # [step level lat]
    np.testing.assert_allclose(ratios(FACTORS, union, [6, 12]), inherited, rtol=1e-5)
    own = CalibrationFactors(np.zeros(1), {"t": np.full((1, 1, 1, 2), 4.0)})
    record = Calibration(FACTORS, union).replaced(own)
    told = Counterfactual(Combined((BOX, Forecast(6))), 720.0)
    np.testing.assert_allclose(ratios(record, told, [6, 12]), 4 * inherited, rtol=1e-5)
    assert Calibration(record, union).without_own() == FACTORS
    other = Combined((BOX, Hindcast(6)))  # of which the gap alone is calibrated
    np.testing.assert_allclose(ratios(FACTORS, other, [-6.0]), [[[1, 1, 1.5]] * 2], rtol=1e-5)


@pytest.mark.parametrize("gap", [None, (slice(2, 5), slice(3, 40))])
def test_bands_part_waves_by_their_length(gap: tuple[slice, slice] | None) -> None:
    """They add up to the field, and the first keeps half of a wave as long as the edge, whatever
    lies elsewhere: each row by itself."""
    lon = np.arange(64) * 5.625
    wave = np.cos(np.deg2rad(8 * lon)) * np.ones((3, 1))
    edges = np.array([90.0, 45.0, 22.5])  # of rows: twice, once and half the length of the wave
    for edge, kept in ((45.0, np.full(3, 0.5)), (edges, 0.5 ** (np.array([2.0, 1.0, 0.5]) ** 8))):
        large, small = zonal_bands(wave, np.ones((3, 64), bool), lon, (edge,))
        np.testing.assert_allclose(large + small, wave, atol=1e-12)
        np.testing.assert_allclose(large, kept[:, None] * wave, atol=1e-12)
    soft, _ = zonal_bands(wave[:, :33], np.ones((3, 33), bool), lon[:33], (edges,))
    assert abs(soft[0, 16] - 0.5**4 * wave[0, 16]) < 1e-3  # amid a part of the circle
    fields = np.random.default_rng(0).standard_normal((2, 5, 64)).astype(np.float32)
    where = np.ones((1, 5, 64), bool)
    if gap:
        where[:, *gap] = False
    bands = [*zonal_bands(fields, where, lon, (70.0, 27.0))]
    np.testing.assert_allclose(sum(bands), np.where(where, fields, 0), atol=1e-5)
    fields[:, ~where[0]] = 1e6
    again = [*zonal_bands(fields, where, lon, (70.0, 27.0))]
    np.testing.assert_array_equal(bands, again)
    rows = [*zonal_bands(fields[:, 3:], where[:, 3:], lon, (70.0, 27.0))]
    np.testing.assert_allclose(rows, np.array(bands)[..., 3:, :], atol=1e-6)


def test_a_constant_stays_in_the_first_band_up_to_the_edges_of_a_region() -> None:
    lon = np.arange(20) * 2.0
    bands = [*zonal_bands(np.ones((7, 20)), np.ones((7, 20), bool), lon, (45.0, 9.0))]
    np.testing.assert_allclose(bands[0], 1.0, atol=1e-9)
    np.testing.assert_allclose(bands[1:], 0.0, atol=1e-9)


def test_parts_of_rows_are_split_along_both_axes() -> None:
    """Amid the hidden cells a plane wave keeps the share 2^-(edge / length)^2, whatever lies
    outside; the bands add up to the field, and a constant stays in the first."""
    lat, lon = np.arange(40) * 2.0 - 39.0, np.arange(90) * 4.0
    where = np.zeros((40, 90), bool)
    where[2:38, 5:85] = True
    length_lat, length_lon = 20.0, 45.0
    wave = np.cos(2 * np.pi * (lat[:, None] / length_lat + lon / length_lon))
    outside = np.where(where, wave, 1e6)
    large, small = zonal_bands(outside, where, lon, (12.0,), lat=lat)
    kept = 0.5 ** (12.0**2 * (1 / length_lat**2 + 1 / length_lon**2))
    np.testing.assert_allclose(large[15:25, 35:55], kept * wave[15:25, 35:55], atol=2e-3)
    np.testing.assert_allclose(large + small, np.where(where, wave, 0), atol=1e-9)
    flat, rest = zonal_bands(np.ones((40, 90)), where, lon, (50.0,), lat=lat)
    np.testing.assert_allclose(flat, where, atol=1e-9)
    np.testing.assert_allclose(rest, 0.0, atol=1e-9)


def test_the_mean_of_a_hidden_box_gets_the_spread_of_its_error_as_its_cells_do() -> None:
    """Errors that are alike in all cells of a box are a quarter of the members' departures that
    are, errors of single cells twice theirs. Bands along rows alone, whose means hold both, leave
    too much spread to the mean of the box."""
    rng = np.random.default_rng(0)
    lat, lon, box = np.arange(12) * 5.0 - 27.5, np.arange(24) * 15.0, (slice(3, 9), slice(6, 14))

    def field(of_box: float, of_cells: float, *count: int) -> np.ndarray:
        values = np.zeros((*count, 1, 12, 24))
        cells = rng.standard_normal((*count, 1, 6, 8))
        values[..., *box] = of_box * rng.standard_normal((*count, 1, 1, 1)) + of_cells * cells
        return values

    def cases() -> Iterable[tuple[np.ndarray, np.ndarray]]:
        for _ in range(300):
            members = field(1.0, 0.5, 8)
            yield members - members.mean(axis=0), field(0.25, 1.0)

    def spread_over_error(split: Split) -> tuple[float, float]:
        sums = _Sums(lat, lon, split, 1, 1, 8, are_draws=False)
        for members, truth in cases():
            sums.add(0, slice(0, 12), members, truth, np.ones(12))
        factors = {"t": sums.factors(sums.slopes())}
        found = CalibrationFactors(np.zeros(1), factors, {}, split.edges, along_lat=split.along_lat)
        record = json.loads(json.dumps(Calibration({}, BOX).replaced(found)))
        ratios = []
        for members, truth in cases():
            (moved,) = Calibration(record, BOX).apply({"t": members[None]}, np.zeros(1), lat, lon)[
                "t"
            ]
            inside, true = moved[..., *box], truth[..., *box]
            means = inside.mean(axis=(-2, -1)), true.mean(axis=(-2, -1))
            ratios.append(
                [inside.var(0, ddof=1).mean(), (true**2).mean(),
                 means[0].var(0, ddof=1).mean(), (means[1] ** 2).mean()]
            )  # fmt: skip
        cells, of_cells, mean, of_mean = np.mean(ratios, axis=0) * (9 / 8, 1, 9 / 8, 1)
        return float((cells / of_cells) ** 0.5), float((mean / of_mean) ** 0.5)

    edges = (350.0, 120.0)  # the mean of the box is longer than the first
    cells, mean = spread_over_error(Split(edges, along_lat=True))
    assert cells == pytest.approx(1.0, abs=0.05) and mean == pytest.approx(1.0, abs=0.15)
    cells, mean = spread_over_error(Split(edges))
    assert cells == pytest.approx(1.0, abs=0.05) and mean > 1.3


def test_tasks_that_hide_places_are_split_along_both_axes_without_zones() -> None:
    model, edges = Known(lambda stream: stream.guess), (120.0, 60.0)
    assert Split.of(predictor(BOX, model), edges) == Split(edges, (), along_lat=True)
    assert Split.of(predictor(BOX, model), ()) == Split()
    whole = Split.of(predictor(Forecast(6), model), edges)
    assert len(whole.zones) == 3 and not whole.along_lat


def test_factors_along_latitude_see_all_rows_whatever_the_tiles() -> None:
    """Tiles of four rows on a grid of eight: each case is one part, and its members are those of
    the whole field."""
    task = Inpainting((LatLonBox(-40, 60, 30, 200),))
    used = predictor(task, Known(lambda stream: stream.guess, (-1.0, 0.5, 2.0)), overlap=0.0)
    rng = np.random.default_rng(0)
    factors = {name: rng.uniform(0.5, 2.0, (1, 3, 1, 3)) for name in NAMES}
    found = CalibrationFactors(np.zeros(1), factors, {}, (120.0, 60.0), along_lat=True)
    record = Calibration({}, task).replaced(found)
    calibrated = replace(used, trained=replace(used.trained, checkpoint_record=record))
    (part,) = predict_parts(calibrated, [used.segment.times[6]])
    assert part.rows == slice(0, 8) and len([*predict_parts(used, [used.segment.times[6]])]) == 2
    uncalibrated, place = run_at(used, 6), (used.grid.latitude, used.grid.longitude)
    expected = Calibration(record, task).apply(uncalibrated, np.zeros(1), *place)
    for name in NAMES:
        np.testing.assert_allclose(part.fields[name], expected[name], rtol=1e-5)
        assert np.abs(part.fields[name] - uncalibrated[name]).max() > 0.1


def test_bands_bring_the_spread_of_each_scale_to_its_error() -> None:
    """Members that err at large scales alone but are spread at small ones: both are brought to the
    error, and given cells stay as they are."""
    rng = np.random.default_rng(0)
    lat, lon = np.linspace(-30, 30, 8), np.arange(64) * 5.625
    edges = (90.0,)
    large, small = 0.4, 2.0  # spread over error

    def field(count: int) -> np.ndarray:
        phases = rng.uniform(0, 2 * np.pi, (2, count, 1, 8, 1))
        waves = (
            np.sqrt(2) * np.cos(np.deg2rad(n * lon) + p)
            for n, p in zip((2, 20), phases, strict=True)
        )
        return np.stack([*waves])

    def factors(record: dict) -> np.ndarray:
        sums = _Sums(lat, lon, Split(edges), 1, 1, 6, are_draws=False)  # around a fixed mean
        for _ in range(60):
            truth, members = field(1)[:, 0].sum(axis=0), field(6)
            spread = large * members[0] + small * members[1]
            spread -= spread.mean(axis=0)
            spread[..., :4] = truth[..., :4]  # given cells
            calibrated = Calibration(record, Forecast(6))
            moved = calibrated.apply({"t": spread[None]}, np.zeros(1), lat, lon)["t"][0]
            np.testing.assert_array_equal(moved[..., :4], spread[..., :4])
            np.testing.assert_allclose(moved.mean(axis=0), spread.mean(axis=0), atol=1e-9)
            sums.add(0, slice(0, 8), moved, truth, np.ones(8))
        np.testing.assert_array_equal(sums.slopes(), 1.0)  # no row is wholly predicted
        return sums.factors(sums.slopes())[0, :, 0, 0]

    found = factors({})
    np.testing.assert_allclose(found, [1 / large, 1 / small], rtol=0.1)
    inflation = CalibrationFactors(np.zeros(1), {"t": found[None, :, None, None]}, {}, edges)
    record = json.loads(json.dumps(Calibration({}, Forecast(6)).replaced(inflation)))
    np.testing.assert_allclose(factors(record), 1.0, rtol=0.12)  # bands overlap


def test_waves_that_the_mean_lacks_get_back_their_amplitude_and_the_members_power() -> None:
    """Members around a mean with a third of the short waves that can be foreseen, or none of them,
    and with half of the spread that is lacking: afterwards their power is the truth's."""
    rng = np.random.default_rng(1)
    lat, lon = np.linspace(-30, 30, 8), np.arange(64) * 5.625
    edges, hours = (72.0,), np.zeros(1)

    def waves(number: int, *count: int) -> np.ndarray:
        phase = rng.uniform(0, 2 * np.pi, (*count, 1, 8, 1))
        return np.sqrt(2) * np.cos(np.deg2rad(number * lon) + phase)

    def case(kept: float) -> tuple[np.ndarray, np.ndarray]:
        foreseen, state = waves(20), 300 + 3 * waves(2)
        truth = state + foreseen + 0.5 * waves(20)
        return truth, state + kept * foreseen + 0.25 * waves(20, 8)

    def short(fields: np.ndarray) -> float:
        return float((abs(np.fft.rfft(fields)[..., 20]) ** 2).mean())

    for kept, slope in ((1 / 3, 3.0), (1.0, 1.0)):
        sums = _Sums(lat, lon, Split(edges), 1, 1, 8)
        for _ in range(200):
            truth, members = case(kept)
            sums.add(0, slice(0, 8), members, truth, np.ones(8))
        slopes = sums.slopes()
        np.testing.assert_allclose(slopes[0, 0, 0], [1.0, slope], rtol=0.03)
        of_mean = {"t": np.moveaxis(slopes, -1, 1)}
        inflation = CalibrationFactors(hours, {"t": sums.factors(slopes)}, of_mean, edges)
        record = json.loads(json.dumps(Calibration({}, Forecast(6)).replaced(inflation)))
        power = []
        for _ in range(200):
            truth, members = case(kept)
            (moved,) = Calibration(record, Forecast(6)).apply(
                {"t": members[None]}, hours, lat, lon
            )["t"]
            power.append((short(moved), short(truth)))
            assert abs(moved.mean() - members.mean()) < 1e-3
        ours, true = np.mean(power, axis=0)
        assert ours / true == pytest.approx(1.0, abs=0.06)


def test_waves_that_the_mean_has_with_the_wrong_sign_go() -> None:
    rng = np.random.default_rng(4)
    lat, lon = np.linspace(-30, 30, 8), np.arange(64) * 5.625
    sums = _Sums(lat, lon, Split((72.0,)), 1, 1, 4)
    for _ in range(20):
        truth = rng.standard_normal((1, 8, 64))
        members = -truth + 0.1 * rng.standard_normal((4, 1, 8, 64))
        sums.add(0, slice(0, 8), members, truth, np.ones(8))
    np.testing.assert_array_equal(sums.slopes()[0, 0, 0], [1.0, 0.0])


def test_the_mean_of_a_row_that_is_given_in_part_stays_as_it_is() -> None:
    rng = np.random.default_rng(2)
    lat, lon = np.linspace(-30, 30, 8), np.arange(64) * 5.625
    doubled = {"t": np.array([1.0, 2.0])[None, :, None, None]}
    inflation = CalibrationFactors(np.zeros(1), {"t": np.ones((1, 2, 1, 1))}, doubled, (72.0,))
    record = Calibration({}, Forecast(6)).replaced(inflation)
    members = rng.standard_normal((1, 4, 1, 8, 64))
    members[:, :, :, 3, 10] = 0.5  # given
    calibrated = Calibration(record, Forecast(6))
    moved = calibrated.apply({"t": members}, np.zeros(1), lat, lon)["t"]
    is_same = np.isclose(moved, members, atol=1e-6).all(axis=(0, 1, 2, 4))
    np.testing.assert_array_equal(is_same, np.arange(8) == 3)
    part = calibrated.apply({"t": members[..., :40]}, np.zeros(1), lat, lon[:40])["t"]
    np.testing.assert_allclose(part, members[..., :40], atol=1e-6)  # a part of the circle


def test_a_factor_has_the_spread_of_many_draws_equal_their_error_in_every_zone() -> None:
    """Draws whose spread is right in the tropics and half as large as it should be elsewhere. The
    factor of a zone is of the mean variances of its rows, by their weights, although the mean of
    four errs by a part of their variance."""
    rng = np.random.default_rng(3)
    lat, lon = np.linspace(-85, 85, 18), np.arange(64) * 5.625
    zones, edges = (-45.0, 0.0, 45.0), (72.0,)
    weights = zone_weights(lat, zones)
    spread = 1.0 / (weights * np.array([2.0, 1.0, 2.0])[:, None]).sum(0)[:, None]
    sums = _Sums(lat, lon, Split(edges, zones), 1, 1, 4)
    for _ in range(40):
        truth = rng.standard_normal((1, 18, 64))
        members = spread * rng.standard_normal((4, 1, 18, 64))
        for rows in (slice(0, 7), slice(7, 18)):
            sums.add(0, rows, members[..., rows, :], truth[:, rows], np.ones(18)[rows])
    factors = sums.factors(np.ones((3, 1, 1, 2)))
    assert factors.shape == (3, 2, 1, 1)
    expected = np.sqrt(weights.sum(1) / (weights @ spread**2)[:, 0])
    np.testing.assert_allclose(factors[..., 0, 0].T, [expected] * 2, rtol=0.05)
    known = {"t": np.array([2.0, 1.0, 2.0])[:, None, None, None]}
    found = CalibrationFactors(np.zeros(1), known, zones=zones)
    moved = found.applied("t", np.ones((1, 4, 1, 18, 64)), np.zeros(1), lat, lon)
    np.testing.assert_allclose(moved[0, 0, 0, :, 0] * spread[:, 0], 1.0, rtol=1e-6)


def test_factors_of_earlier_versions_are_read() -> None:
    """Of version 0.5, of all scales, and of 0.7, of bands by lengths in km: a wave of 45 degrees is
    5004 km long on the equator, and half as long at 60 degrees."""
    lat, lon = np.array([-60.0, 0.0, 60.0]), np.arange(64) * 5.625
    wave = (
        np.cos(np.deg2rad(8 * lon))
        * np.ones((1, 2, 1, 3, 1))
        * np.array([1, -1])[:, None, None, None]
    )
    for stored, expected in (
        ({"factors": {"t": [[3.0]]}}, [3, 3, 3]),
        ({"factors": {"t": [[[3.0]], [[5.0]]]}, "edges_km": [3500.0]}, [5, 3, 5]),
    ):
        record = {"spread": {"Forecast": {"hours": [6.0], **stored}}}
        moved = Calibration(record, Forecast(6)).apply({"t": wave}, np.full(1, 6.0), lat, lon)["t"]
        np.testing.assert_allclose((moved / wave)[0, 0, 0, :, 0], expected, rtol=0.06)
        found = CalibrationFactors.of(record, "Forecast")
        assert found is not None and found.bands()[-1] in ("all scales", "waves under 3500 km")


@pytest.mark.parametrize("checkpoint", ["default", "default_joint"])
def test_info_tells_of_which_tasks_the_spread_is_calibrated(checkpoint: str, capsys) -> None:
    assert main(["info", f"checkpoint={checkpoint}"]) == 0
    said = " ".join(word for word in capsys.readouterr().out.split() if word != "│")
    record = load_checkpoint(checkpoint).checkpoint_record["spread"]
    hours = ", ".join(f"{hour:g}" for hour in record["Forecast"]["hours"])
    later = record["Forecast"].get("later_passes", ())
    passes = f" of each of {1 + len(later)} passes" if later else ""
    assert bool(later) == (checkpoint == "default_joint")
    assert f"spread of forecast calibrated at {hours} h{passes} for " in said
    assert record["TemporalInterpolation"]["hours"] == [0.0]  # it has no lead times to tell
    assert "spread of temporal_interpolation calibrated for " in said
    bands = "waves of 60 to 120 degrees" if record["Forecast"].get("edges_deg") else "all scales"
    assert bands in said


def test_one_member_has_no_spread() -> None:
    used = predictor(Forecast(6), Known(lambda stream: stream.guess, (0.0,)))
    with pytest.raises(ValueError, match="one member"):
        inflation(used, used.possible_times()[:1])


def test_every_pass_of_a_rollout_is_inflated() -> None:
    """Members that diffuse go on from calibrated states: variances are the factor's square more."""
    used = predictor(Forecast(12, 6), Diffusing(6), window=(5, 8, 16), overlap=0.0)
    factors = {name: np.full((1, 1, 1, 3), 2.0) for name in STORE.data_vars}
    record = Calibration({}, used.task).replaced(CalibrationFactors(np.array([6.0]), factors))
    used = replace(used, trained=replace(used.trained, checkpoint_record=record))
    scale = used.trained.normaliser.statistics[PRIMARY].std[0][:, None, None]
    variance = (run_at(used, 6)["temperature"] / scale).var(axis=1, ddof=1).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(variance, [4, 8], rtol=0.15)


class Wandering(Oracle):
    """Draws: the last state plus noise of normalised variance 0.01, new in every point, member and
    pass."""

    any_member = True

    def __init__(self) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(0)

    def forward(self, view, members):
        (still,) = Known(lambda stream: stream.guess, (0.0,) * len(members))(view).streams
        noise = 0.1 * torch.randn(still.members.shape, generator=self.generator)
        return Prediction((replace(still, members=still.members + noise),))


def walk() -> xr.Dataset:
    """A random walk in every cell, whose steps have a normalised variance of 0.04."""
    rng, store = np.random.default_rng(0), dataset(steps=60)
    for name, std in zip(NAMES, compute_statistics([segment()]).std, strict=True):
        steps = 0.2 * rng.standard_normal(store[name].shape) * std[:, None, None]
        store[name].values[:] = store[name].values[:1] + np.cumsum(steps, axis=0)
    return store


def calibrated_walk(model: Oracle, num_passes: int) -> Plan:
    """A plan of four passes, the first of which were calibrated one after another."""
    plans = (
        predictor(Forecast(6 * count, 6), model, store=walk(), window=(5, 8, 16), overlap=0.0)
        for count in (num_passes, 4)
    )
    fitted, used = plans
    times = fitted.with_truth(fitted.possible_times())[::2]
    factors = estimate_rollout(fitted, times, blended, (), lambda _: None)
    assert factors.num_dates == len(times) and len(factors.later) == num_passes - 1
    record = json.loads(json.dumps(Calibration({}, used.task).replaced(factors)))
    return replace(used, trained=replace(used.trained, checkpoint_record=record))


def variances(used: Plan, times: Iterable[np.datetime64]) -> np.ndarray:
    """Of the members of temperature at every lead time, normalised."""
    std = used.trained.normaliser.statistics[PRIMARY].std[0][:, None, None]
    fields = [predicted["temperature"] / std for predicted in predict_fields(used, [*times])]
    return np.mean([f.var(axis=1, ddof=1).mean(axis=(1, 2, 3)) for f in fields], axis=0)


def test_every_pass_of_a_rollout_is_calibrated_from_calibrated_members() -> None:
    """Of a random walk the error grows by the variance of a step at each pass, and that of the
    draws by a quarter of it. A pass beyond the last fitted one has the factors of that."""
    used = calibrated_walk(Wandering(), 2)
    factors = CalibrationFactors.of(used.trained.checkpoint_record, "Forecast")
    assert factors is not None and factors.later[0].hours.tolist() == [6.0]
    assert factors.of_pass(7) is factors.later[0]
    for of_pass, ratio in ((factors, 4.0), (factors.later[0], 8 / 5)):
        np.testing.assert_allclose(of_pass.spread["temperature"], ratio**0.5, rtol=0.04)
    variance, expected = np.zeros(3), []  # of every level
    for number in range(4):
        of_pass = factors.of_pass(number)
        assert of_pass is not None
        variance = (variance + 0.01) * of_pass.spread["temperature"][0, 0, 0] ** 2
        expected.append(variance.mean())
    np.testing.assert_allclose(variances(used, used.possible_times()[:4]), expected, rtol=0.03)


def test_a_tail_in_a_rollout_has_the_spread_of_its_error_at_every_pass() -> None:
    class Tail(Diffusing):
        def forward(self, view):
            (still,) = self.known(view).streams
            noise = 0.1 * torch.randn(still.members.shape, generator=self.generator)
            return Prediction((replace(still, members=still.members + noise),))

    used, num_members = calibrated_walk(Tail(6), 4), 6
    found = variances(used, used.possible_times()[::8])
    # the mean of six errs by a part of their noise, too, which is inflated for later passes
    passes = np.arange(4)
    error = 0.04 * (passes + 1) + (0.01 + found[0] * passes) / num_members
    np.testing.assert_allclose(found * (num_members + 1) / num_members, error, rtol=0.06)


def test_a_checkpoint_without_factors_of_later_passes_calibrates_the_first_alone() -> None:
    used = predictor(Forecast(18, 6), Wandering(), store=walk(), window=(5, 8, 16), overlap=0.0)
    factors = {name: np.full((1, 1, 1, 3), 3.0) for name in NAMES}
    record = Calibration({}, used.task).replaced(CalibrationFactors(np.array([6.0]), factors))
    assert "later_passes" not in record["spread"]["Forecast"]
    used = replace(used, trained=replace(used.trained, checkpoint_record=record))
    found = variances(used, used.possible_times()[:4])
    np.testing.assert_allclose(found, [0.09, 0.10, 0.11], rtol=0.1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (Counterfactual(Forecast(6), 720.0), "a counterfactual has no truth"),
        (Downscaling(2, coarse_input=True), "coarse_input=true has no truth"),
        (Inpainting((), missing=True), "no truth where the task predicts"),
    ],
)
def test_a_task_without_truth_is_not_calibrated(task: Task, message: str) -> None:
    store = STORE.copy(deep=True)
    store["temperature"].values[:, 1:, 2:5, 3:9] = np.nan
    used = predictor(task, Overconfident(), store=store if task.fills_missing else STORE)
    with pytest.raises(ValueError, match=message):
        inflation(used, used.segment.times[6:7])

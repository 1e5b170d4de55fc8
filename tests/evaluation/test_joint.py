"""Scores of box means, differences and whole fields, against numpy and ensembles of known kind."""

from typing import Any

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.climate import Climate
from atmossl.evaluation.events import Brier
from atmossl.evaluation.joint import (
    AreaMaxima,
    AreaMeans,
    Differences,
    EnergyScore,
    OfDerived,
    VariogramScore,
    area_event_scores,
    joint_rank_histograms,
    joint_scores,
)
from atmossl.evaluation.regions import REGIONS, stacked_weights
from atmossl.evaluation.scores import Case, SpreadSkill
from atmossl.evaluation.verify import Tally
from atmossl.geometry import area_weights

LAT, LON = np.linspace(-84.375, 84.375, 16), np.arange(0, 360, 11.25)
STEP = np.timedelta64(6, "h")
DIMS = ("time", "member", "level", "latitude", "longitude")


def labelled(values: np.ndarray) -> xr.DataArray:
    """[time member level lat lon], times and levels with labels."""
    coords = {"latitude": LAT, "longitude": LON, "level": [300, 500, 850][: values.shape[2]]}
    return xr.DataArray(values, coords, DIMS)


def case(members: np.ndarray, truth: np.ndarray, **more: Any) -> Case:
    return Case(labelled(members), labelled(truth[:, None]).isel(member=0), **more)


def value(score, case: Case, region: str = "global") -> np.ndarray:
    weights = stacked_weights(case.truth, (REGIONS[region],))
    return score.value(score.per_time(case, weights).mean("time")).to_numpy().squeeze()


def drawn(kind: str, times: int = 60, members: int = 6) -> Case:
    """Truth whose boxes of 4 x 4 cells vary as one, and members that do so or whose cells are
    independent; every single value is standard normal."""
    rng = np.random.default_rng(0)

    def boxes(count: int) -> np.ndarray:
        coarse = rng.standard_normal((times, count, 1, 4, 8))
        return coarse.repeat(4, axis=-2).repeat(4, axis=-1)

    truth = boxes(1)[:, 0]
    own = rng.standard_normal((times, members, 1, 16, 32))
    return case(boxes(members) if kind == "boxes" else own, truth)


def test_members_with_the_truths_structure_are_calibrated_and_others_are_not() -> None:
    single, of_boxes = SpreadSkill(), OfDerived(SpreadSkill(), AreaMeans(4))
    right, wrong = drawn("boxes"), drawn("cells")
    assert value(single, right) == pytest.approx(1.0, abs=0.05)
    assert value(single, wrong) == pytest.approx(1.0, abs=0.05)
    assert value(of_boxes, right) == pytest.approx(1.0, abs=0.06)
    # means of 16 independent cells spread a quarter as much; the error is mostly the truth's
    assert value(of_boxes, wrong) == pytest.approx(0.27, abs=0.03)
    differences = OfDerived(SpreadSkill(), Differences("longitude"))
    assert value(differences, wrong) > 1.5  # neighbours differ in a quarter of the truth's pairs
    assert value(EnergyScore(), right) < value(EnergyScore(), wrong)
    assert value(VariogramScore(), right) < 0.8 * value(VariogramScore(), wrong)


def test_box_means_are_area_weighted() -> None:
    rng = np.random.default_rng(1)
    members, truth = rng.standard_normal((2, 3, 2, 16, 32)), rng.standard_normal((2, 2, 16, 32))
    both = case(members, truth)
    area = area_weights(LAT).reshape(4, 4)
    by_hand = np.einsum(
        "tlaibj,ai->tlab", truth.reshape(2, 2, 4, 4, 8, 4), area / area.sum(1, keepdims=True) / 4
    )
    np.testing.assert_allclose(AreaMeans(4).derive(both.truth).to_numpy(), by_hand, atol=1e-12)
    largest = truth.reshape(2, 2, 4, 4, 8, 4).max((3, 5))
    np.testing.assert_array_equal(AreaMaxima(4).derive(both.truth).to_numpy(), largest)


def test_shifted_boxes_are_those_of_the_cells_further_on() -> None:
    rng = np.random.default_rng(1)
    both = case(rng.standard_normal((2, 3, 2, 16, 32)), rng.standard_normal((2, 2, 16, 32)))
    rest = both.truth.isel(latitude=slice(2, None), longitude=slice(2, None))
    for kind in (AreaMeans, AreaMaxima):
        shifted = kind(4, shift=2).derive(both.truth).to_numpy()
        assert shifted.shape == (2, 2, 3, 7)
        np.testing.assert_allclose(shifted, kind(4).derive(rest).to_numpy(), atol=1e-12)
    weights = xr.ones_like(both.truth.isel(time=0, level=0)).expand_dims("region")
    assert AreaMeans(4, shift=2).weights(weights).shape == (1, 3, 7)
    small = both.truth.isel(latitude=slice(0, 5))
    assert not AreaMeans(4, shift=2).applies(Case(small.expand_dims("member"), small))


def test_differences_close_the_circle_and_stay_in_their_region() -> None:
    rng = np.random.default_rng(2)
    both = case(rng.standard_normal((2, 3, 2, 16, 32)), rng.standard_normal((2, 2, 16, 32)))
    zonal = Differences("longitude").derive(both.truth).to_numpy()
    np.testing.assert_allclose(zonal, np.roll(both.truth, -1, -1) - both.truth, atol=1e-12)
    meridional = Differences("latitude")
    np.testing.assert_allclose(
        meridional.derive(both.truth).to_numpy(), np.diff(both.truth, axis=-2), atol=1e-12
    )
    belt = stacked_weights(both.truth, (REGIONS["tropics"],)) * xr.ones_like(both.truth.longitude)
    inside = (belt.isel(region=0, longitude=0) > 0).to_numpy()
    kept = (meridional.weights(belt).isel(region=0, longitude=0) > 0).to_numpy()
    np.testing.assert_array_equal(kept, inside[:-1] & inside[1:])
    vertical = Differences("level").derive(both.truth)
    np.testing.assert_allclose(vertical.to_numpy(), np.diff(both.truth, axis=1), atol=1e-12)


@pytest.mark.parametrize("are_draws", [True, False])
@pytest.mark.parametrize("region", ["global", "tropics"])
def test_energy_score_is_that_of_numpy(region: str, are_draws: bool) -> None:
    """Of fields far from zero, with cells that are missing: 1e-9 of the score. Members that are no
    draws are compared with themselves, too."""
    rng = np.random.default_rng(3)
    members = 5e4 + rng.standard_normal((2, 3, 1, 16, 32))
    truth = 5e4 + rng.standard_normal((2, 1, 16, 32))
    truth[1, 0, 7, 4:9] = np.nan
    belt = np.abs(LAT) <= 20.0 if region == "tropics" else np.ones(16, bool)
    expected = []
    for fields, beside in zip(members[:, :, 0], truth[:, 0], strict=True):
        weight = (area_weights(LAT) * belt)[:, None] * np.isfinite(beside)
        beside = np.nan_to_num(beside)

        def length(field: np.ndarray, weight: np.ndarray = weight) -> float:
            return float(np.sqrt((weight * field**2).sum() / weight.sum()))

        error = np.mean([length(x - beside) for x in fields])
        pairs = sum(length(fields[i] - fields[j]) for i in range(3) for j in range(i))
        expected.append(error - pairs / (6 if are_draws else 9))
    found = value(EnergyScore(), case(members, truth, are_draws=are_draws), region)
    assert found == pytest.approx(np.mean(expected), rel=1e-9)


def test_an_event_over_an_area_has_its_own_probability() -> None:
    """Two of four members exceed in the box's mean, and it happens: Brier score by hand, fair for
    draws."""
    members, truth = np.zeros((1, 4, 1, 16, 32)), np.ones((1, 1, 16, 32))
    members[:, :2] = 1.0
    threshold = xr.full_like(labelled(truth[:, None]).isel(member=0, time=0), 0.5)
    quantiles = threshold.expand_dims(quantile=[0.9])
    share = 0.5
    for are_draws, correction in ((True, share * (1 - share) / 3), (False, 0.0)):
        both = case(members, truth, quantiles=quantiles, are_draws=are_draws)
        expected = (share - 1) ** 2 - correction
        for derived in (AreaMeans(4), AreaMaxima(4)):
            assert value(OfDerived(Brier(0.9), derived), both) == pytest.approx(expected)


def test_missing_cells_leave_out_what_they_belong_to() -> None:
    both = drawn("boxes", times=30)
    truth = both.truth.copy()
    truth[:, 0, 2, 3] = np.nan
    gappy = Case(both.prediction, truth)
    for score in joint_scores():
        if score.applies(gappy):
            there = value(score, gappy)
            assert np.isfinite(there).all(), score.name
            assert there == pytest.approx(value(score, both), rel=0.1), score.name


def test_each_quantity_of_a_case_is_derived_once_and_scores_are_the_same_to_the_last_bit(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rng = np.random.default_rng(4)
    one = case(rng.standard_normal((3, 4, 3, 16, 32)), rng.standard_normal((3, 3, 16, 32)))
    predictions, truth = (x.to_dataset(name="t") for x in (one.prediction, one.truth))
    climate = Climate.of([dated(truth)], quantiles=(0.05, 0.95))
    scores = (*joint_scores(), *area_event_scores(0.95))
    tally = Tally("forecast", scores=scores, diagnostics=joint_rank_histograms())
    derived: list[tuple[str, tuple]] = []
    for kind in (AreaMeans, AreaMaxima, Differences):

        def counted(self, values, derive=kind.derive):
            derived.append((self.name, values.dims))
            return derive(self, values)

        monkeypatch.setattr(kind, "derive", counted)
    tally.add(dated(predictions), dated(truth), {}, climate)
    assert {name for name, _ in derived} >= {"mean_4x4", "max_4x4", "zonal_difference"}
    assert len(derived) == len(set(derived))  # members, truth and quantiles have other dims
    monkeypatch.undo()
    for score in (*scores, *joint_rank_histograms()):
        fresh = Case(one.prediction, one.truth, quantiles=climate.quantiles["t"])
        if score.applies(fresh):
            weights = stacked_weights(fresh.truth, (REGIONS["global"],))
            (kept,) = tally._parts["t", "model", score.name]
            for name, alone in score.per_time(fresh, weights).items():
                np.testing.assert_array_equal(kept[name], alone, err_msg=score.name)


def dated(fields: xr.Dataset) -> xr.Dataset:
    return fields.assign_coords(time=np.datetime64("2001-01-01", "ns") + np.arange(3) * STEP)

"""What another model says itself, and lines and regressions on it, as baselines of a correction."""

import numpy as np
import pytest
import xarray as xr

from atmossl.batch import StreamSpec, TokenSize
from atmossl.evaluation.alignment import grid_of
from atmossl.evaluation.report.content import Example
from atmossl.evaluation.ridge import Channels, RidgeCorrection, fit_ridge
from atmossl.evaluation.spatial import bicubic, coarsen, on_cells
from atmossl.scorecard.other_models import (
    LinearCorrection,
    OtherModel,
    OtherModelBaselines,
    other_models_of,
)
from atmossl.scorecard.zero_shot import given_by_other_model
from tests.data.test_sources import COARSE, FINE, LEVELS, NAMES, pair
from tests.evaluation.conftest import make_dataset


def smooth(num_lat: int, num_lon: int) -> xr.Dataset:
    """A wave that has the same values on every grid at the same places."""
    field = make_dataset(num_times=2, num_lat=num_lat, num_lon=num_lon)
    wave = np.sin(np.deg2rad(field.longitude)) * np.cos(np.deg2rad(field.latitude))
    return field.map(lambda values: (values * 0 + wave).transpose(*values.dims))


def test_fields_on_cells_that_nest_are_those_of_cubic_interpolation() -> None:
    fine = make_dataset(num_times=3)
    coarse = coarsen(fine, 2)
    xr.testing.assert_allclose(on_cells(coarse, grid_of(fine)), bicubic(coarse, fine), atol=1e-6)
    xr.testing.assert_identical(on_cells(fine, grid_of(fine)), fine)


@pytest.mark.parametrize("shift", [0.0, 3.0, 355.0])
def test_fields_on_cells_that_do_not_nest_are_near_the_field(shift: float) -> None:
    source, target = smooth(36, 72), smooth(40, 80)
    turned = target.assign_coords(longitude=target.longitude + (shift if shift < 300 else 0.0))
    if shift > 300:  # the source begins elsewhere on the circle
        source = source.roll(longitude=7, roll_coords=True)
        source = source.assign_coords(
            longitude=np.where(source.longitude > 322, source.longitude - 360, source.longitude)
        )
    wave = np.sin(np.deg2rad(turned.longitude)) * np.cos(np.deg2rad(turned.latitude))
    answer = on_cells(source, grid_of(turned))["temperature"]
    assert float(np.abs(answer - wave).max()) < 1e-3


def test_fields_on_larger_cells_are_area_means() -> None:
    fine = make_dataset(num_times=2)
    coarse = coarsen(fine, 2)
    xr.testing.assert_allclose(on_cells(fine, grid_of(coarse)), coarse, atol=1e-6)


def test_lines_are_those_of_least_squares_at_every_cell() -> None:
    rng = np.random.default_rng(0)
    other = make_dataset(num_times=30, seed=1) + 250.0
    noise = other.map(lambda f: f * 0 + rng.standard_normal(f.shape))
    truth = (0.5 * other + 100.0 + 0.1 * noise).astype(np.float32)
    blocks = [(other.isel(time=part), truth.isel(time=part))
              for part in (slice(0, 7), slice(7, 30))]  # fmt: skip
    lines = LinearCorrection.fit(iter(blocks))
    cell = {"level": 1, "latitude": 3, "longitude": 5}
    x, y = (d["temperature"].isel(cell).to_numpy().astype(float) for d in (other, truth))
    slope, intercept = np.polyfit(x, y, 1)
    np.testing.assert_allclose(lines.slope["temperature"].isel(cell), slope, rtol=1e-5)
    np.testing.assert_allclose(lines.intercept["temperature"].isel(cell), intercept, rtol=1e-4)
    error = lines.unbiased(other)["temperature"].isel(cell).mean() - y.mean()
    assert abs(float(error)) < 1e-4
    np.testing.assert_allclose(
        lines.regressed(other)["temperature"].isel(cell), slope * x + intercept, rtol=1e-6
    )


def test_lines_pass_over_missing_values_and_take_constants_as_they_are() -> None:
    other, truth = make_dataset(num_times=20, seed=1), make_dataset(num_times=20, seed=2)
    gap = {"time": slice(0, 5), "latitude": 0}
    lacking = other.copy(deep=True)
    lacking["temperature"][dict(time=slice(0, 5), latitude=0)] = np.nan
    after = {"time": slice(5, None)}
    whole = LinearCorrection.fit(iter([(other.isel(after), truth.isel(after))]))
    part = LinearCorrection.fit(iter([(lacking, truth)]))
    row = {"latitude": gap["latitude"]}
    xr.testing.assert_allclose(part.slope["temperature"].isel(row),
                               whole.slope["temperature"].isel(row))  # fmt: skip
    constant = LinearCorrection.fit(iter([(other * 0 + 3.0, truth)]))
    assert not bool(constant.slope["temperature"].any())
    np.testing.assert_allclose(
        constant.regressed(other)["temperature"].isel(time=0), truth["temperature"].mean("time"),
        atol=1e-5,
    )  # fmt: skip


def test_the_regression_inverts_a_shift_and_never_reads_the_truth() -> None:
    """The truth is the other model's field of the cell to the east."""

    def run(seed: int) -> xr.Dataset:
        other = make_dataset(num_times=40, seed=seed)
        truth = other.roll(longitude=-1, roll_coords=False)
        return truth.assign({f"other:{name}": field for name, field in other.items()})

    count = len(Channels.of(run(0))) // 2
    of_other = tuple(range(count, 2 * count))
    task = RidgeCorrection(sources=2 * of_other, hidden_channels=tuple(range(count)))
    model = fit_ridge([run(0), run(1), run(2), run(3)], task, radius=1)
    test = run(9)
    blank = test.assign({name: test[name] * 0 for name in ("temperature", "u_component_of_wind")})
    answer = model.predict(blank)
    truth = test["temperature"].sel(time=answer["time"])
    assert float(np.abs(answer["temperature"] - truth).max()) < 1e-2
    xr.testing.assert_identical(answer, model.predict(test))


def test_a_store_of_longer_steps_answers_at_its_dates_and_nowhere_else() -> None:
    """Coarser cells, and every second step of the truth from its second one on."""
    segment = pair()
    model = OtherModel("reduced", "_reduced", dict.fromkeys(NAMES, LEVELS))
    other = model.record(segment, segment.grid)
    truth = FINE.sel(time=other["time"])
    lines = LinearCorrection.fit(iter([(other, truth)]))
    baselines = OtherModelBaselines(model, segment.grid, lines, None)
    predicted = FINE.isel(time=slice(4, 8)).expand_dims(member=2)
    answers = baselines(predicted, segment)
    assert list(answers) == [
        f"{n}_reduced" for n in ("uncorrected", "bias_corrected", "regression")
    ]
    there = np.isin(predicted["time"], COARSE["time"])
    assert there.sum() == 2
    for answer in answers.values():
        field = answer["temperature"].transpose("time", "level", "latitude", "longitude")
        np.testing.assert_array_equal(
            field.notnull().all(("level", "latitude", "longitude")), there
        )
        assert not bool(field[~there].notnull().any())
    expected = on_cells(COARSE.sel(time=predicted["time"][there]), segment.grid)
    xr.testing.assert_allclose(
        answers["uncorrected_reduced"]["temperature"].isel(time=there).transpose("time", ...),
        expected["temperature"].transpose("time", "level", "latitude", "longitude"),
    )
    error = answers["bias_corrected_reduced"] - answers["uncorrected_reduced"]
    mean = (truth - other).mean("time")
    xr.testing.assert_allclose(error["temperature"].isel(time=there).isel(time=0, drop=True)
                               .transpose(*mean["temperature"].dims), mean["temperature"],
                               atol=1e-3)  # fmt: skip


def test_names_tell_several_other_models_apart_and_fields_in_common_are_compared() -> None:
    token = TokenSize(1, 2, 2)
    analysis = StreamSpec("analysis", ("temperature", "geopotential"), (500, 850), token)
    ifs = StreamSpec("ifs", ("temperature",), (300, 850), token, role="input", data="ifs")
    gfs = StreamSpec("gfs", ("geopotential", "ozone"), (500, 850), token, role="input", data="gfs")
    land = StreamSpec("land", ("land_sea_mask",), (), token, role="static", data="land")
    (alone,) = other_models_of((analysis, ifs, land))
    assert alone == OtherModel("ifs", "", {"temperature": (850,)})
    both = other_models_of((analysis, ifs, gfs))
    assert [model.suffix for model in both] == ["_gfs", "_ifs"]
    assert both[0].levels == {"geopotential": (500, 850)}


def test_maps_show_what_the_other_model_says_where_it_says_anything() -> None:
    truth = make_dataset(num_times=1)["temperature"].isel(time=0, level=0)
    fields = {"uncorrected": truth + 1.0, "ridge": truth}
    given = given_by_other_model(Example("temperature", 500.0, truth, truth, baselines=fields))
    assert given is not None and given.is_predicted
    xr.testing.assert_identical(given.field, truth + 1.0)
    for lacking in ({}, {"uncorrected": truth * np.nan}):
        example = Example("temperature", 500.0, truth, truth, baselines=lacking)
        assert given_by_other_model(example) is None

"""What tasks hid, and what their baselines answer from the rest."""

import re
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.alignment import grid_of
from atmossl.evaluation.climate import Climate
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import CrossVariable, Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, TemporalInterpolation
from atmossl.scorecard.baselines import Setting, build_baselines, problem_of
from atmossl.scorecard.zero_shot import only_hidden, where_hidden
from tests.evaluation.conftest import STEP, make_dataset
from tests.evaluation.test_forecasts import forecast_of

BOX = Inpainting((LatLonBox(-30.0, 30.0, 330.0, 60.0),))


def truth_of_a_run() -> xr.Dataset:
    return make_dataset(num_times=12, seed=2)


def setting(task, *, offsets: tuple[int, ...] = (0,)) -> Setting:
    """Trained on noise of another run."""
    history = [make_dataset(num_times=40, seed=1)]
    return Setting(
        task=task,
        offsets=offsets,
        reference=2,
        num_steps=5,
        step=STEP,
        grid=grid_of(history[0]),
        history=history,
        climate=Climate.of(history, quantiles=(0.05, 0.95)),
        with_ridge=True,
        levels={str(name): (500, 850) for name in history[0].data_vars},
    )


def test_hidden_cells_of_a_box_across_greenwich_are_scored_alone():
    truth = make_dataset(num_times=2)
    hidden = BOX.hidden_cells(grid_of(truth))
    assert hidden is not None
    assert np.flatnonzero(hidden.any(axis=0)).tolist() == [0, 1, 2, 15]
    scored = where_hidden(truth, hidden)["temperature"]
    assert int(scored.notnull().sum()) == 2 * 2 * hidden.sum()
    assert where_hidden(truth, Forecast(12.0).hidden_cells(grid_of(truth))) is truth


def test_what_was_given_is_not_scored():
    truth = make_dataset(num_times=6)
    chosen = only_hidden(CrossVariable(("temperature",), (850,)), truth)
    assert list(chosen.data_vars) == ["temperature"]
    assert chosen["level"].to_numpy().tolist() == [850.0]
    union = Combined((Forecast(12.0), BOX))
    forecast = forecast_of(truth, leads=(0, 1, 2))
    assert only_hidden(union, forecast)["lead_time"].to_numpy().tolist() == [STEP, 2 * STEP]
    other_year = Counterfactual(union, shift_hours=8760.0)
    assert only_hidden(other_year, forecast).sizes["lead_time"] == 2


def test_a_union_of_gaps_is_scored_in_them_alone():
    other = Inpainting((LatLonBox(40.0, 80.0, 100.0, 200.0),))
    truth = make_dataset(num_times=12)
    grid, union = grid_of(truth), Combined((BOX, other))
    cells = [task.hidden_cells(grid) for task in (BOX, other, union, Counterfactual(union, 24.0))]
    np.testing.assert_array_equal(cells[2], cells[0] | cells[1])
    np.testing.assert_array_equal(cells[3], cells[2])
    assert Combined((Forecast(12.0), BOX)).hidden_cells(grid) is None
    answers = build_baselines("combined", setting(union))(truth.isel(time=slice(2, 4)), truth)
    assert list(answers) == ["harmonic", "climatology"]


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            Combined((BOX, CrossVariable(("temperature",)))),
            r"a union of CrossVar.*score its parts",
        ),
        (Combined((BOX, TemporalInterpolation(6.0))), "differs from step to step"),
        (Downscaling(4, coarse_input=True), "coarse_input=true has no truth"),
        (Counterfactual(TemporalInterpolation(6.0, refine=2), 24.0), "refine=2 writes steps"),
        (Inpainting((), missing=True), "missing=true fills what has no truth"),
        (Combined((BOX, BOX)), None),
        (Combined((Forecast(12.0), CrossVariable(("temperature",)))), None),
        (Combined((Downscaling(4), BOX)), None),
    ],
)
def test_what_has_no_score_is_refused(task, message: str | None):
    why = task.why_unscored()
    assert why is None if message is None else re.search(message, why)


@pytest.mark.parametrize("name", ["inpainting", "combined"])
def test_rivals_never_look_at_hidden_cells(name):
    task = BOX if name == "inpainting" else Combined((Forecast(12.0), BOX))
    hidden = BOX.hidden_cells(grid_of(make_dataset(num_times=1)))
    predicted = make_dataset(num_times=12)
    if name == "combined":
        predicted = forecast_of(predicted)
    truth = truth_of_a_run().where(~hidden_mask(hidden), 1e6)
    answers = build_baselines(name, setting(task))(predicted, truth)
    expected = {"inpainting": {"harmonic", "climatology", "ridge"}}
    assert set(answers) == expected.get(name, {"persistence", "climatology"})
    for answer in answers.values():
        assert float(abs(answer["temperature"].where(hidden_mask(hidden))).max()) < 10.0


def hidden_mask(hidden: np.ndarray) -> xr.DataArray:
    return xr.DataArray(hidden, dims=("latitude", "longitude"))


def test_a_rollout_has_a_ridge_that_goes_on_from_its_own_output():
    predicted = forecast_of(make_dataset(num_times=12), leads=(1, 2, 3, 4)).isel(
        init_time=slice(2, 6)
    )
    truth, offsets = truth_of_a_run(), (1, 2, 3, 4)
    answers = build_baselines("forecast", setting(Forecast(24.0, 12.0), offsets=offsets))(
        predicted, truth
    )
    assert list(answers) == ["persistence", "climatology", "ridge", "ridge_rollout"]
    one_pass = build_baselines("forecast", setting(Forecast(12.0), offsets=(1, 2)))(
        predicted.isel(lead_time=slice(2)), truth
    )
    assert list(one_pass) == ["persistence", "climatology", "ridge"]
    rolled = answers["ridge_rollout"]
    assert rolled.sizes["lead_time"] == 4
    xr.testing.assert_allclose(rolled.isel(lead_time=slice(2)), one_pass["ridge"])


def test_a_hindcast_s_persistence_is_the_state_after_it():
    predicted = forecast_of(make_dataset(num_times=12)).isel(init_time=slice(2, 6))
    predicted = predicted.assign_coords(lead_time=-predicted["lead_time"].to_numpy())
    here = setting(Hindcast(12.0), offsets=(-2, -1))
    answer = build_baselines("hindcast", here)(predicted, truth_of_a_run())["persistence"][
        "temperature"
    ]
    for lead in range(2):
        np.testing.assert_array_equal(answer[:, lead], truth_of_a_run()["temperature"][2:6])


def test_lines_lead_between_the_nearest_steps_that_are_not_hidden():
    """Of the steps 1 and 3, with 0, 2 and 4 known; of 1 and 2, whose line leads from 0 to 3."""
    truth = truth_of_a_run()
    values = truth["temperature"].to_numpy()
    for steps, offsets, ends in (
        ((1, 3), (0, 2), ((2, 4, 0.5), (4, 6, 0.5))),
        ((1, 2), (0, 1), ((2, 5, 1 / 3), (2, 5, 2 / 3))),
    ):
        here = replace(setting(TemporalInterpolation(6.0, steps), offsets=offsets), reference=1)
        predicted = make_dataset(num_times=12).isel(time=[3 + offset for offset in offsets])
        line = build_baselines("temporal_interpolation", here)(predicted, truth)["linear"]
        for number, (before, after, share) in enumerate(ends):
            expected = (1 - share) * values[before] + share * values[after]
            np.testing.assert_allclose(line["temperature"][number], expected, atol=1e-6)


@pytest.mark.parametrize(("reference", "num_steps", "most"), [(1, 5, 1), (2, 5, 2), (3, 5, 1)])
def test_a_regression_on_neighbours_in_time_sees_no_step_outside_of_the_window(
    reference: int, num_steps: int, most: int
):
    task = TemporalInterpolation(6.0, (reference,))
    problem = problem_of(replace(setting(task), reference=reference, num_steps=num_steps))
    assert problem is not None
    assert max(problem.input_offsets) == -min(problem.input_offsets) == most


def test_a_regression_for_a_window_of_two_steps_has_its_written_step_alone():
    for task in (Downscaling(4), CrossVariable(("temperature",))):
        problem = problem_of(replace(setting(task), reference=1, num_steps=2))
        assert problem is not None
        assert problem.input_offsets == (0,)


def test_a_task_without_rivals_of_its_own_has_climatology():
    predicted = make_dataset(num_times=3)
    answers = build_baselines("counterfactual", setting(Counterfactual(BOX)))(
        predicted, truth_of_a_run()
    )
    assert set(answers) == {"climatology"}


def test_hidden_variables_have_a_ridge_on_the_rest():
    predicted = make_dataset(num_times=12).isel(time=slice(2, 6))[["temperature"]]
    task = CrossVariable(("temperature",))
    answers = build_baselines("cross_variable", setting(task))(predicted, truth_of_a_run())
    assert set(answers) == {"climatology", "ridge"}
    assert answers["ridge"].sizes["time"] == 4


@pytest.mark.parametrize("name", ["inpainting", "cross_variable"])
def test_a_regression_leaves_out_what_may_be_missing(name: str):
    """Its answer is the one without the gappy variable, which is missing in it."""
    task = BOX if name == "inpainting" else CrossVariable((), (500,))
    whole, truth = setting(task), truth_of_a_run()
    alone = replace(whole, levels={"temperature": (500, 850)},
                    history=[record[["temperature"]] for record in whole.history])  # fmt: skip
    predicted = make_dataset(num_times=12).isel(time=slice(2, 6))
    there = [truth[["temperature"]].copy(deep=True), predicted[["temperature"]]]
    for record in (truth, *whole.history):
        record["u_component_of_wind"][:, :, 2:4, 3:6] = np.nan
    gappy = replace(whole, levels={"temperature": (500, 850)})
    found = build_baselines(name, gappy)(predicted, truth)["ridge"]
    expected = build_baselines(name, alone)(there[1], there[0])["ridge"]
    xr.testing.assert_allclose(found[["temperature"]], expected)
    assert bool(found["u_component_of_wind"].isnull().all())


def test_without_a_given_channel_there_is_no_regression_on_given_channels():
    """All that is predicted is hidden: what is given are streams that are not predicted."""
    task = CrossVariable(("temperature", "u_component_of_wind"))
    predicted, truth = make_dataset(num_times=12).isel(time=slice(2, 4)), truth_of_a_run()
    answers = build_baselines("cross_variable", setting(task))(predicted, truth)
    assert list(answers) == ["climatology"]

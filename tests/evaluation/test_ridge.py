from collections.abc import Sequence

import numpy as np
import pytest
import xarray as xr

from atmossl.evaluation.baselines import linear_in_time, persistence
from atmossl.evaluation.ridge import (
    CrossVariable,
    RidgeDownscaling,
    RidgeForecast,
    RidgeModel,
    RidgeTask,
    TemporalInterpolation,
    fit_ridge,
)
from atmossl.evaluation.ridge.moments import RidgeMoments
from atmossl.evaluation.spatial import bicubic, coarsen

STEP = np.timedelta64(6, "h").astype("timedelta64[ns]")
TASKS = (RidgeForecast(), TemporalInterpolation(), RidgeDownscaling())


def _advected(dataset, *, start: str, seed: int, num_times: int = 40) -> xr.Dataset:
    """Noise that moves east by exactly one cell per step; all steps are one pattern turned."""
    run = dataset(num_times=num_times, start=start, seed=seed, levels=(500.0,))
    for field in run.values():
        for t in range(1, num_times):
            field[t] = np.roll(field[0].to_numpy(), t, axis=-1)
    return run


def _runs(dataset, num_runs: int = 6) -> list[xr.Dataset]:
    return [_advected(dataset, start=f"20{10 + run}-01-01", seed=run) for run in range(num_runs)]


def _noise_fit(dataset, task: RidgeTask, **options) -> tuple[RidgeModel, xr.Dataset]:
    runs = [dataset(num_times=24, start=f"20{10 + run}-01-01", seed=run) for run in range(2)]
    return fit_ridge(runs, task, radius=1, **options), dataset(num_times=12, seed=9)


def test_forecast_recovers_advection_by_one_cell(dataset):
    model = fit_ridge(
        _runs(dataset), RidgeForecast(history=1, leads=(1, 2)), strengths=(1e-9, 1e-3)
    )
    test_run = _advected(dataset, start="2030-01-01", seed=99)
    forecast = model.predict(test_run, test_run["time"][:10])
    for lead in (1, 2):
        ours = forecast["temperature"].isel(lead_time=lead - 1)
        later = test_run["temperature"].isel(time=slice(lead, 10 + lead))
        np.testing.assert_allclose(ours, later, atol=1e-3)
    assert set(model.strength) == {1e-9}


def _linear_run(dataset, mixing: np.ndarray, *, seed: int, num_times: int = 40) -> xr.Dataset:
    """x(t + 1) = mixing x(t), moved east by one cell, where x are the two variables of a cell."""
    run = dataset(num_times=num_times, seed=seed, levels=(500.0,))
    first = run.isel(time=0).to_dataarray("variable").to_numpy()
    for t in range(num_times):
        state = np.tensordot(np.linalg.matrix_power(mixing, t), first, axes=1)
        for field, values in zip(run.values(), np.roll(state, t, axis=-1), strict=True):
            field[t] = values
    return run


def test_rollout_of_a_linear_system_is_the_power_of_its_matrix(dataset):
    turn = 0.4
    mixing = np.array([[np.cos(turn), np.sin(turn)], [-np.sin(turn), np.cos(turn)]])
    runs = [_linear_run(dataset, mixing, seed=seed) for seed in range(6)]
    task = RidgeForecast(history=1, leads=(1, 2))
    model = fit_ridge(runs, task, strengths=(1e-9, 1e-3))
    test_run = 0.5 * _linear_run(dataset, mixing, seed=99)  # within the limits of training
    for field in test_run.values():
        field[4:] = 1e3  # nothing after the last init time may be read
    rolled = model.roll_out(test_run, test_run["time"][[0, 3]], num_steps=7)
    assert rolled["lead_time"].to_numpy().tolist() == [STEP * lead for lead in range(1, 8)]
    for init in (0, 1):
        start = test_run.isel(time=3 * init).to_dataarray("variable").to_numpy()
        for lead in range(1, 8):
            expected = np.tensordot(np.linalg.matrix_power(mixing, lead), start, axes=1)
            ours = rolled.isel(init_time=init, lead_time=lead - 1).to_dataarray("variable")
            np.testing.assert_allclose(ours, np.roll(expected, lead, axis=-1), atol=5e-3)


def test_a_rollout_stays_within_the_values_of_training(dataset):
    """A system that grows twofold a step is learnt as such, and stopped where training stopped."""
    runs = [_linear_run(dataset, 2.0 * np.eye(2), seed=seed, num_times=8) for seed in range(4)]
    model = fit_ridge(runs, RidgeForecast(history=1, leads=(1,)), radius=1, strengths=(1e-9,))
    rolled = model.roll_out(runs[0], runs[0]["time"][[6]], num_steps=5)["temperature"][0]
    highest = np.max([run["temperature"].max(("time", "longitude")) for run in runs], axis=0)
    lowest = np.min([run["temperature"].min(("time", "longitude")) for run in runs], axis=0)
    np.testing.assert_allclose(rolled[0], runs[0]["temperature"][7], rtol=1e-3, atol=1e-2)
    np.testing.assert_allclose(rolled[-1].max("longitude"), highest, rtol=1e-6)
    np.testing.assert_allclose(rolled[-1].min("longitude"), lowest, rtol=1e-6)


def test_a_pass_of_a_rollout_starts_from_what_the_one_before_predicted(dataset):
    model, run = _noise_fit(dataset, RidgeForecast(history=3, leads=(1, 2)))
    start = run["time"][[4]]
    rolled = model.roll_out(run, start, num_steps=6)
    record = run.copy(deep=True)
    for passes in range(3):
        now = 4 + 2 * passes
        answer = model.predict(record, record["time"][[now]]).isel(init_time=0)
        for name, field in record.items():
            field[now + 1 : now + 3] = answer[name].to_numpy()
    for name, field in record.items():
        np.testing.assert_allclose(rolled[name][0], field[5:11], atol=1e-4)
    single = model.roll_out(run, start, num_steps=2)
    xr.testing.assert_identical(single, model.predict(run, start))


def test_interpolation_recovers_advection_by_one_cell(dataset):
    model = fit_ridge(_runs(dataset), TemporalInterpolation(neighbours=1), radius=1)
    test_run = _advected(dataset, start="2030-01-01", seed=99)
    hidden = model.predict(test_run)
    error = hidden["temperature"] - test_run["temperature"].sel(time=hidden["time"])
    assert float(np.abs(error).max()) < 1e-2


def test_downscaling_recovers_detail_that_is_linear_in_block_means(dataset):
    # Zonal detail made from the block and its eastern neighbour. The bicubic answer that the
    # regression corrects reaches two blocks out, and so must the regression.
    def with_detail(run: xr.Dataset) -> xr.Dataset:
        fields = {}
        for name, field in run.items():
            blocks = coarsen(run, 2)[name].to_numpy()
            east = np.roll(blocks, -1, axis=-1) - blocks
            detail = np.kron(east, np.array([[1.0, -1.0], [1.0, -1.0]]))
            fields[name] = (field.dims, np.kron(blocks, np.ones((2, 2))) + detail)
        return xr.Dataset(fields, run.coords).astype(np.float32)

    runs = [with_detail(dataset(num_times=60, seed=seed)) for seed in range(2)]
    model = fit_ridge(runs, RidgeDownscaling(factor=2, neighbours=0), strengths=(1e-8,))
    test_run = with_detail(dataset(num_times=3, seed=9))
    np.testing.assert_allclose(
        model.predict(test_run)["temperature"], test_run["temperature"], atol=1e-3
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_strong_penalty_falls_back_to_the_trivial_answer(dataset, task):
    model, test_run = _noise_fit(dataset, task, strengths=(1e9,))
    ours = model.predict(test_run)
    trivial = _trivial(test_run, task, ours)
    # What remains is the mean residual of the training runs: small for noise of zero mean.
    assert float(np.abs((ours - trivial)["temperature"]).max()) < 0.35
    spread = float((ours - trivial)["temperature"].std("longitude").max())
    assert spread < (0.2 if task.factor > 1 else 1e-6)


def _trivial(run: xr.Dataset, task: RidgeTask, ours: xr.Dataset) -> xr.Dataset:
    if task.is_forecast:
        return persistence(run, ours["init_time"], ours["lead_time"])
    if task.factor > 1:
        return bicubic(coarsen(run, task.factor), run).sel(time=ours["time"])
    return linear_in_time(run, ours["time"], before=STEP, after=STEP)


def test_moments_equal_those_of_a_plain_design_matrix():
    rng = np.random.default_rng(0)
    radius, num_rows, num_cols, num_channels = 1, 3, 6, 2
    wide = rng.standard_normal((4, num_channels, num_rows + 2 * radius, num_cols))
    halo = np.concatenate([wide[..., -2 * radius :], wide, wide[..., : 2 * radius]], axis=-1)
    targets = rng.standard_normal((4, 5, num_rows, num_cols))
    moments = RidgeMoments.zeros(
        radius=radius, num_rows=num_rows, num_channels=num_channels, num_outputs=5
    )
    moments.add(halo[:1], targets[:1])
    moments.add(halo[1:], targets[1:])
    for row in range(num_rows):
        design = _design_matrix(wide, row, radius)
        y = targets[:, :, row].transpose(0, 2, 1).reshape(-1, 5)
        found = moments.of_row(row)
        np.testing.assert_allclose(found.gram, design.T @ design / len(design), atol=1e-12)
        np.testing.assert_allclose(found.cross, design.T @ y / len(design), atol=1e-12)
        np.testing.assert_allclose(found.mean_x, design.mean(axis=0), atol=1e-12)
        slope, intercept = rng.standard_normal((design.shape[1], 5)), rng.standard_normal(5)
        direct = ((design @ slope + intercept - y) ** 2).mean(axis=0)
        np.testing.assert_allclose(found.squared_error(slope, intercept), direct, rtol=1e-10)


def _design_matrix(wide: np.ndarray, row: int, radius: int) -> np.ndarray:
    """Features [sample, (dy dx channel)] written out by loops."""
    num_times, num_channels, _, num_cols = wide.shape
    shifts = range(-radius, radius + 1)
    return np.array(
        [
            [
                wide[time, channel, row + radius + dy, (col + dx) % num_cols]
                for dy in shifts
                for dx in shifts
                for channel in range(num_channels)
            ]
            for time in range(num_times)
            for col in range(num_cols)
        ]
    )


def test_regression_turns_with_the_globe(dataset):
    model, run = _noise_fit(dataset, RidgeForecast(history=1, leads=(1,)))
    turned = run.roll(longitude=5, roll_coords=False)
    np.testing.assert_allclose(
        model.predict(turned)["temperature"],
        model.predict(run)["temperature"].roll(longitude=5, roll_coords=False),
        atol=1e-5,
    )


@pytest.mark.parametrize("task", TASKS, ids=lambda task: type(task).__name__)
def test_prediction_never_reads_its_target(dataset, task):
    model, run = _noise_fit(dataset, task)
    time = run["time"][5]
    spoiled = run.copy(deep=True)
    _spoil_targets(spoiled, task)
    first, second = (model.predict(each, [time.to_numpy()]) for each in (run, spoiled))
    np.testing.assert_allclose(first["temperature"], second["temperature"], atol=1e-4)


def _spoil_targets(run: xr.Dataset, task: RidgeTask) -> None:
    for field in run.values():
        if task.is_forecast:
            field[6:] = 1e3
        elif task.factor == 1:
            field[5] = 1e3
        else:  # zonal detail without a block mean
            field[:] = field + np.tile([1.0, -1.0], field.sizes["longitude"] // 2)


def test_nothing_is_learned_across_runs(dataset):
    # One run cut in two at a jump: only whole runs may supply samples.
    task = RidgeForecast(history=2, leads=(1,))
    run = dataset(num_times=40)
    halves = [run.isel(time=slice(20)), run.isel(time=slice(20, None))]
    loud = [halves[0], halves[1] + 100.0]
    first, second = (fit_ridge(pair, task, radius=1, strengths=(1e3,)) for pair in (halves, loud))
    # A tendency across the cut would add a mean change of 100 / 36.
    np.testing.assert_allclose(
        first.predict(run)["temperature"], second.predict(run)["temperature"], atol=1.0
    )


def test_variables_without_levels_and_single_times_are_served(dataset):
    def with_surface(run: xr.Dataset) -> xr.Dataset:
        surface = run["temperature"].isel(level=0, drop=True) * 2.0
        return run.assign(surface_pressure=surface.assign_attrs(units="Pa"))

    runs = [with_surface(dataset(num_times=24, seed=seed)) for seed in range(2)]
    model = fit_ridge(runs, RidgeForecast(), radius=1)
    forecast = model.predict(runs[0], runs[0]["time"][4])
    assert forecast["surface_pressure"].dims == (
        "init_time",
        "lead_time",
        "latitude",
        "longitude",
    )
    assert forecast["surface_pressure"].attrs["units"] == "Pa"
    assert forecast["temperature"].dims[2] == "level"
    assert forecast["lead_time"].to_numpy().tolist() == [STEP.item(), 2 * STEP.item()]


def test_unservable_input_is_named(dataset):
    task = RidgeForecast()
    model, run = _noise_fit(dataset, task)
    with pytest.raises(ValueError, match="time: the run .with its input steps. lacks"):
        model.predict(run, run["time"][:1])
    with pytest.raises(ValueError, match="segments"):
        fit_ridge([], task)
    with pytest.raises(ValueError, match="too short"):
        fit_ridge([run.isel(time=slice(3))], task)
    with pytest.raises(ValueError, match="even steps"):
        fit_ridge([run.isel(time=[0, 1, 2, 3, 4, 8])], task)
    with pytest.raises(ValueError, match="closes the circle"):
        fit_ridge([run.isel(longitude=slice(8))], task)
    with pytest.raises(ValueError, match="finite"):
        fit_ridge([run.where(run["time"] != run["time"][3])], task)


@pytest.mark.parametrize(
    ("task", "wrong"),
    [
        (RidgeForecast, {"history": 0}),
        (TemporalInterpolation, {"neighbours": 0}),
        (RidgeDownscaling, {"factor": 1}),
    ],
)
def test_task_setting_out_of_range_is_named(task, wrong: dict[str, int] | Sequence[str]):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        task(**wrong)


def _related(dataset, num_times: int, seed: int) -> xr.Dataset:
    """Temperature is a weighted sum of the wind at the cell and to the east of it, plus 280."""
    run = dataset(num_times=num_times, seed=seed)
    wind = run["u_component_of_wind"]
    warm = 280.0 + 0.5 * wind + 0.8 * wind.roll(longitude=-1)
    return run.assign(temperature=warm.astype(np.float32).assign_attrs(units="K"))


def test_hidden_variables_are_found_from_the_others_and_never_looked_at(dataset):
    history = [_related(dataset, 60, 1), _related(dataset, 60, 2)]
    test = _related(dataset, 4, 3)
    model = fit_ridge(history, CrossVariable(hidden_channels=(0, 1)))
    spoiled = test.assign(temperature=test["temperature"] * 0.0 - 999.0)
    found = model.predict(spoiled)
    np.testing.assert_allclose(found["temperature"], test["temperature"], atol=0.02)

"""Members that are draws of noise: one field over all tiles, dates, batches and passes."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.api import Model, load, open_data
from atmossl.batch import (
    PRIMARY,
    Prediction,
    StreamPrediction,
    StreamTokens,
    TokenGrid,
    View,
)
from atmossl.cli import compose_config, main
from atmossl.inference.calibration import Calibration, CalibrationFactors
from atmossl.inference.cases import predict_fields
from atmossl.inference.plan import Plan, plan_prediction
from atmossl.inference.writer import OutputLayout
from atmossl.masking.cells import coarsen
from atmossl.masking.tasks import Downscaling, Forecast, Task, TemporalInterpolation
from atmossl.model.network import gather
from atmossl.model.noise import noise_field
from tests.inference.oracle_models import STORE, Known, Oracle, predictor, run_at

LENGTHS = (900.0,)


class Noisy(Oracle):
    """The first guess plus one channel of a member's noise, the same in all cells of a token."""

    any_member = True

    def forward(self, view: View, members) -> Prediction:
        (stream,) = view.streams
        assert stream.queries is not None and view.noise_seed is not None
        guess = gather(stream.guess.flatten(1, 4), stream.queries)
        drawn = []
        for member in members:
            noise = noise_field(stream.grid, view.noise_seed, member, LENGTHS)[..., :1]
            drawn.append(guess + gather(noise, stream.queries))
        return Prediction((StreamPrediction(torch.stack(drawn, dim=2), stream.queries),))


def departures(plan: Plan, fields: dict[str, np.ndarray]) -> np.ndarray:
    """Of members from the first, normalised, of temperature [step member level lat lon]."""
    std = plan.trained.normaliser.statistics[PRIMARY].std[0][:, None, None]
    return (fields["temperature"] - fields["temperature"][:, :1]) / std


def noise_of(member: int, hours: np.ndarray) -> np.ndarray:
    """On the globe's own cells [time lat lon] at a level, from tokens of 2 x 2 cells."""
    lat, lon = (STORE[axis].values.reshape(-1, 2).mean(1) for axis in ("latitude", "longitude"))
    extent = torch.ones(1)
    grid = TokenGrid(
        time_hours=torch.tensor(hours)[None], level_hpa=torch.tensor([[500.0]]),
        lat=torch.tensor(lat)[None], lon=torch.tensor(lon)[None],
        time_extent=extent, lat_extent=extent, lon_extent=extent,
    )  # fmt: skip
    values = noise_field(grid, torch.tensor([7]), member, LENGTHS)[0, :, 0]
    values = values.view(len(hours), len(lat), len(lon)).numpy()
    return values.repeat(2, axis=1).repeat(2, axis=2)


@pytest.mark.parametrize("changes", [{}, {"overlap": 0.0}, {"batch_size": 100}])
def test_a_member_is_the_noise_of_the_globe_in_all_tiles(changes: dict) -> None:
    """Of tiles whose tokens lie alike, to the bit of rounding; others see the field in between."""
    used = predictor(TemporalInterpolation(6), Noisy(), members=3, seed=7, **changes)
    found = departures(used, run_at(used, 6))
    hours = (STORE["time"].values[6:7] - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    for member in (1, 2):
        expected = noise_of(member, hours) - noise_of(0, hours)
        np.testing.assert_allclose(found[:, member, 1], expected, atol=2e-3)


def test_members_of_a_rollout_go_on_with_their_own_noise() -> None:
    """From pass to pass a member's increments are those of its noise at the later times, whatever
    the number of members and of tiles in a call."""
    task = Forecast(24, rollout_hours=6)
    used = predictor(task, Noisy(), members=3, seed=7, batch_size=5)
    whole = run_at(used, 4)["temperature"]
    fewer = predictor(task, Noisy(), members=2, seed=7, batch_size=1)
    np.testing.assert_allclose(run_at(fewer, 4)["temperature"], whole[:, :2], rtol=1e-5)
    steps = departures(used, {"temperature": whole})
    hours = (STORE["time"].values[5:9] - np.datetime64("1970-01-01")) / np.timedelta64(1, "h")
    added = (noise_of(2, hours) - noise_of(0, hours)).cumsum(axis=0)  # the guess is persistence
    np.testing.assert_allclose(steps[:, 2, 1], added, atol=1e-2)


def test_every_draw_of_noise_has_the_given_coarse_means() -> None:
    plan = predictor(Downscaling(2), Noisy(), window=(5, 8, 8), members=3)
    fields = run_at(plan, 6)["temperature"][0]
    weight = torch.from_numpy(plan.grid.weights)
    means, given = (
        coarsen(torch.from_numpy(values).double(), weight, 2)
        for values in (fields, STORE["temperature"].values[6])
    )
    torch.testing.assert_close(means, given.expand_as(means), atol=1e-4, rtol=0)
    assert (fields[0] != fields[1]).any()


def test_a_tail_has_no_more_members_than_it_has() -> None:
    for members, message in (
        (20, r"members=20: .* tail; valid: null .* members=\[0,1\]"),
        ((1, 2), r"members=\[1,2\]: the tail of this checkpoint has 2 members; valid: .* 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            predictor(Forecast(6), Known(lambda stream: stream.guess), members=members)


@pytest.mark.parametrize("command", ["evaluate", "calibrate"])
def test_commands_that_take_all_members_of_a_tail_advise_no_list(
    command: str, tmp_path: Path, capsys
) -> None:
    """A list, which `predict` takes, they would refuse."""
    output = tmp_path / "out.ckpt"
    assert main([command, "members=4", f"output={output}", "accelerator=cpu"]) == 2
    said = capsys.readouterr().err.strip()
    assert re.search(r"members=4: .* tail, and all of them are taken; valid: members=null\.", said)
    assert "members=[" not in said and "\n" not in said and not output.exists()


def guess_of(stream: StreamTokens) -> torch.Tensor:
    return stream.guess


MODELS = {"noise": Noisy(), "tail": Known(guess_of, (-1.0, 0.5, 2.0, 3.0))}
TASKS = (TemporalInterpolation(6), Forecast(24, rollout_hours=6))


@pytest.mark.parametrize(
    ("kind", "task", "calibrated"),
    [
        ("noise", TASKS[0], 0), ("noise", TASKS[0], 1), ("noise", TASKS[1], 0),
        ("noise", TASKS[1], 1), ("noise", TASKS[1], 3),
        ("tail", TASKS[0], 0), ("tail", TASKS[0], 1), ("tail", TASKS[1], 1), ("tail", TASKS[1], 3),
    ],
)  # fmt: skip
def test_members_that_are_chosen_are_those_of_the_whole_ensemble(
    kind: str, task: Task, calibrated: int
) -> None:
    """In the order that was asked for, with their numbers, in rollouts, with inflated spread.
    calibrated: how many passes are."""
    whole = predictor(task, MODELS[kind], seed=7)
    factors = {name: np.full((1, 1, 1, 3), 2.0) for name in STORE.data_vars}
    of_pass = CalibrationFactors(np.zeros(1), factors)
    of_passes = replace(of_pass, later=(of_pass,) * (calibrated - 1))
    record = Calibration({}, task).replaced(of_passes)
    trained = replace(whole.trained, checkpoint_record=record if calibrated else {})
    whole = replace(whole, trained=trained)
    some = replace(whole, options=replace(whole.options, members=(3, 1)))
    expected, found = run_at(whole, 6)["temperature"], run_at(some, 6)["temperature"]
    np.testing.assert_allclose(found, expected[:, [3, 1]], rtol=1e-5)
    layout = OutputLayout(some, STORE["time"].values[6:7], 2)
    np.testing.assert_array_equal(layout.coordinates()["member"], [3, 1])
    if kind == "noise":  # however many are asked for
        for members in (1, 2, 11, (3, 9, 1)):
            other = replace(whole, options=replace(whole.options, members=members))
            numbers = members if isinstance(members, tuple) else range(members)
            at = [n for n, number in enumerate(numbers) if number < expected.shape[1]]
            same = expected[:, [numbers[n] for n in at]]
            found = run_at(other, 6)["temperature"]
            assert found.shape[1] == len(numbers)
            np.testing.assert_allclose(found[:, at], same, rtol=1e-5)


@pytest.mark.parametrize("members", [0, -1, True, 1.5, "two", [], [1, 1], [-1], [True], [[1]]])
def test_members_that_are_none_are_one_line(members: Any) -> None:
    with pytest.raises(
        ValueError, match=r"members.*: .*valid: null for all, a number from 1 on, or some by their"
    ):
        load().predict("forecast", open_data(), "1959-02-12T00", members=members)


def test_members_may_be_an_array() -> None:
    trained = predictor(Forecast(6), Known(guess_of, (-1.0, 0.5, 2.0, 3.0))).trained
    now, model = "2001-01-02", Model(trained, "cpu")
    expected = model.predict("forecast", STORE, now, lead_time="6h", members=[2, 0])
    found = model.predict("forecast", STORE, now, lead_time="6h", members=np.array([2, 0]))
    xr.testing.assert_equal(found, expected)
    assert found["member"].values.tolist() == [2, 0]


@pytest.mark.parametrize("seed", [-1, 1.5, "two", None])
def test_a_seed_that_is_none_is_one_line(seed: Any) -> None:
    trained = predictor(Forecast(6), Known(guess_of)).trained
    with pytest.raises(ValueError, match=r"^seed=.*; valid: a whole number from 0 to 2\*\*63 - 1$"):
        Model(trained, "cpu").predict("forecast", STORE, "2001-01-02", lead_time="6h", seed=seed)


def test_commas_make_a_list_of_members_and_of_dates() -> None:
    words = ["output=o.zarr", "members=1,2", "init_time=1959-02-12T00,1959-02-13"]
    values = compose_config("predict", words)
    assert values["members"] == [1, 2]
    assert values["init_time"] == ["1959-02-12T00", "1959-02-13"]
    assert compose_config("evaluate", ["output=o", "regions=poles,tropics"])["regions"] == [
        "poles", "tropics",
    ]  # fmt: skip


def test_a_prediction_on_disk_holds_the_members_that_were_asked_for(tmp_path: Path) -> None:
    given = ("predict", "init_time=1959-02-12T00", "accelerator=cpu", "tilings=1", "overlap=0")
    for name, more in (("some", ["members=5,2"]), ("all", [])):
        assert main([*given, f"output={tmp_path / name}.zarr", *more]) == 0
    some, whole = (xr.open_zarr(tmp_path / f"{name}.zarr") for name in ("some", "all"))
    xr.testing.assert_allclose(some.load(), whole.sel(member=[5, 2]).load())
    assert main(["calibrate", "members=1,2", f"output={tmp_path}/c.ckpt"]) == 2


def test_seeds_draw_other_members() -> None:
    fields = []
    for seed in (1, 2):
        used = predictor(Forecast(6), Noisy(), members=2, seed=seed)
        (predicted,) = predict_fields(used, [STORE["time"].values[6]])
        fields.append(predicted["temperature"])
    assert not np.allclose(*fields, atol=0.1)
    used = replace(used, options=replace(used.options, members=None))
    assert run_at(used, 6)["temperature"].shape[1] == 8


@pytest.mark.parametrize("kind", ["noise", "tail"])
def test_more_members_than_memory_holds_are_refused_before_any_work(kind: str, monkeypatch) -> None:
    """Of the memory of 25 members: 24 are no fault, 26 are. A tail has as many as it has."""
    used = predictor(TASKS[0], MODELS[kind])
    window, (spec,) = used.trained.window, used.trained.specs
    cells = used.tiles.lat_size * used.tiles.lon_size * len(spec.variables) * len(spec.levels)
    tiles = min(used.options.batch_size, len(used.tiles.tiles))
    memory = 25 * 4 * cells * window.time * tiles
    monkeypatch.setattr("atmossl.inference.plan.device_memory", lambda _: memory)

    def planned(members: int | None) -> Plan:
        options = replace(used.options, members=members)
        return plan_prediction(used.trained, used.task, used.segments, options)

    if kind == "tail":
        planned(None)
        return
    planned(24)
    with pytest.raises(ValueError, match="members=26: .* GiB; valid: at most 25, and fewer in p"):
        planned(26)

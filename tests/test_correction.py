"""The task that corrects another model, the first guess that this model gives, and the script that
makes a poor model of the sample."""

import importlib.util
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import xarray as xr

from atmossl.batch import StreamSpec, StreamWindow, TokenSize, detokenise, token_grid
from atmossl.data.catalog import catalog_entry
from atmossl.data.store import open_entry
from atmossl.inference.out_of_training_warnings import unseen
from atmossl.masking.base import OTHER_MODEL, TokenLayout, make_view
from atmossl.masking.cells import other_model_guess, other_models
from atmossl.masking.correction import Correction
from atmossl.masking.tasks import Forecast
from tests.evaluation.conftest import make_dataset
from tests.synthetic import dataset

ANALYSIS = StreamSpec("analysis", ("temperature", "specific_humidity"), (300, 850),
                      TokenSize(1, 2, 2))  # fmt: skip
OTHER = StreamSpec("other", ("temperature",), (850,), TokenSize(1, 2, 2), role="input", data="ifs")


def window(spec: StreamSpec, num_lat: int = 8, num_lon: int = 16, hours=(0.0, 6.0, 12.0)):
    """Random fields on cells of equal size around the globe."""
    lat = -90 + 180 / num_lat * (torch.arange(num_lat) + 0.5)
    lon = 360 / num_lon * (torch.arange(num_lon) + 0.5)
    rng = torch.Generator().manual_seed(num_lat)
    shape = (len(spec.variables), len(spec.levels), len(hours), num_lat, num_lon)
    return StreamWindow(
        spec=spec,
        fields=torch.randn(shape, generator=rng),
        time_hours=torch.tensor(hours, dtype=torch.float64),
        lat=lat,
        lon=lon,
        weight=torch.cos(torch.deg2rad(lat)),
        level_hpa=torch.tensor(spec.levels).float(),
    )


def layouts(*windows: StreamWindow) -> tuple[TokenLayout, ...]:
    return tuple(TokenLayout(w.spec, token_grid(w)) for w in windows)


def test_a_correction_hides_the_analysis_and_nothing_of_the_other_model() -> None:
    masks = Correction()(layouts(window(ANALYSIS), window(OTHER)), np.random.default_rng(0))
    assert bool(masks[0].hidden.all()) and not bool(masks[1].hidden.any())


def test_a_correction_reads_nothing_after_what_it_writes() -> None:
    plan = Correction().plan(5, 6.0)
    assert max(plan.read) == plan.reference == 4 and plan.offsets == (0,) and not plan.is_forecast


def test_a_forecast_of_a_network_that_was_never_shown_the_analysis_is_told() -> None:
    windows = (window(ANALYSIS), window(OTHER))
    for task, told in (
        (Forecast(6), ["some of every stream shown; training always hid a whole one"]),
        (Correction(), []),
    ):
        view = make_view(windows, task, np.random.default_rng(0), first_guess=False)
        assert unseen(view, Correction()) == told


@pytest.mark.parametrize(
    "other",
    [
        replace(OTHER, role="predict"),
        replace(OTHER, role="input", data="primary"),
        replace(OTHER, variables=("total_cloud_cover",)),
        replace(OTHER, levels=(500,)),
    ],
)
def test_without_fields_of_another_model_a_correction_is_refused(other: StreamSpec) -> None:
    assert other_models((ANALYSIS, other)) == ()
    with pytest.raises(ValueError, match="task=correction needs the fields of another model"):
        Correction()(layouts(window(ANALYSIS), window(other)), np.random.default_rng(0))


def test_the_guess_is_the_other_model_where_it_has_the_field_and_0_elsewhere() -> None:
    analysis, other = window(ANALYSIS), window(OTHER)
    guess = other_model_guess(analysis, (analysis, other))
    torch.testing.assert_close(guess[0, 1], other.fields[0, 0])
    assert not bool(guess[0, 0].any()) and not bool(guess[1].any())
    assert not bool(other_model_guess(other, (analysis, other)).any())  # it is given, not guessed


def test_a_coarse_guess_turns_with_the_globe_and_keeps_a_constant() -> None:
    analysis, coarse = window(ANALYSIS), window(OTHER, 4, 8)
    turned = replace(coarse, fields=coarse.fields.roll(3, dims=-1))
    first, second = (other_model_guess(analysis, (analysis, o))[0, 1] for o in (coarse, turned))
    torch.testing.assert_close(first.roll(6, dims=-1), second)
    flat = replace(coarse, fields=torch.full_like(coarse.fields, 2.0))
    torch.testing.assert_close(
        other_model_guess(analysis, (analysis, flat))[0, 1], torch.full((3, 8, 16), 2.0)
    )


def test_a_fine_other_model_is_averaged_over_the_cells() -> None:
    analysis, fine = window(ANALYSIS), window(OTHER, 16, 32)
    blocks = fine.fields[0, 0].unflatten(-1, (16, 2)).unflatten(-3, (8, 2)).mean((-1, -3))
    torch.testing.assert_close(other_model_guess(analysis, (analysis, fine))[0, 1], blocks)


def test_longer_steps_of_the_other_model_are_joined_by_lines() -> None:
    analysis, other = window(ANALYSIS), window(OTHER, hours=(0.0, 12.0))
    guess = other_model_guess(analysis, (analysis, other))[0, 1]
    first, last = other.fields[0, 0]
    torch.testing.assert_close(guess, torch.stack([first, (first + last) / 2, last]))


def test_missing_values_of_the_other_model_are_no_guess() -> None:
    analysis, other = window(ANALYSIS), window(OTHER)
    valid = torch.ones_like(other.fields, dtype=torch.bool)
    valid[..., 2, 3] = False
    guess = other_model_guess(analysis, (analysis, replace(other, valid=valid)))[0, 1]
    assert not bool(guess[:, 2, 3].any())
    torch.testing.assert_close(guess[:, 3], other.fields[0, 0, :, 3])


def test_hidden_fields_show_the_other_model_and_shown_ones_stay_as_they_are() -> None:
    windows = window(ANALYSIS), window(OTHER)
    rng = np.random.default_rng(0)
    hidden = make_view(windows, Correction(), rng, first_guess=OTHER_MODEL).streams[0]
    for tokens in (hidden.source, hidden.guess):
        torch.testing.assert_close(detokenise(tokens, ANALYSIS)[0, 1], windows[1].fields[0, 0])
    torch.testing.assert_close(detokenise(hidden.target, ANALYSIS), windows[0].fields)
    usual, told = (
        make_view(windows, Forecast(6.0), rng, first_guess=kind).streams[0].guess
        for kind in (True, OTHER_MODEL)
    )
    torch.testing.assert_close(usual, told)  # every place is shown at some step


@pytest.fixture(scope="module")
def script():
    path = Path(__file__).parents[1] / "scripts" / "degrade_sample.py"
    spec = importlib.util.spec_from_file_location("degrade_sample", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def perfect(script, **errors):
    """The other model without errors but for those that are named."""
    none = {
        "lead": 24.0,
        "delay": 0.0,
        "smoothings": 0,
        "amplitude": 1.0,
        "bias": 0.0,
        "error": 0.0,
    }
    return script.Errors(**{**none, **errors})


RECORD = dataset(steps=40)


def said(script, run: int = 0, seed: int = 0, **errors) -> xr.Dataset:
    climate = script.Climate.of([RECORD])
    return script.forecasts(RECORD, climate, perfect(script, **errors), seed, run)


def test_a_catalog_entry_whose_stores_are_not_made_yet_names_their_script(
    tmp_path: Path, monkeypatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("degraded_sample", "degraded_sample_coarse"):
        entry = catalog_entry(name)
        with pytest.raises(ValueError, match=r"run_0\.zarr does not exist; `(.*)` makes") as told:
            open_entry(entry, "run_0")
        made_by = re.search("`python (.*)`", str(told.value))
        assert made_by is not None and (Path(__file__).parents[1] / made_by[1]).exists()
    with pytest.raises(ValueError, match=r"does not exist; valid: a zarr store"):
        open_entry(entry.model_copy(update={"made_by": ""}), "run_0")


def test_a_model_without_errors_says_the_truth(script) -> None:
    xr.testing.assert_allclose(said(script), RECORD.isel(time=slice(1, None)), atol=1e-4)


def test_each_error_of_the_poor_model_is_what_it_is_said_to_be(script) -> None:
    truth, climate = RECORD.isel(time=slice(1, None)), script.Climate.of([RECORD])
    before = RECORD.isel(time=slice(None, -1)).assign_coords(time=truth.time)
    late = said(script, delay=1.5, lead=48.0)  # 3 of the 6 hours between two steps
    xr.testing.assert_allclose(late, (truth + before) / 2, atol=1e-4)
    weak = said(script, amplitude=0.5)
    expected = (truth + climate.mean) / 2
    xr.testing.assert_allclose(
        weak, expected.transpose("time", "level", "latitude", "longitude"), atol=1e-4
    )
    bias = said(script, bias=0.5) - truth
    assert float(bias.std("time").to_dataarray().max()) < 1e-3  # the same at all dates
    area = np.cos(np.deg2rad(truth.latitude))
    for name, field in (bias / climate.deviation).mean("time").items():
        size = np.sqrt((field**2).weighted(area).mean(("latitude", "longitude")))
        np.testing.assert_allclose(size, 0.5, rtol=1e-3, err_msg=str(name))


def test_errors_grow_with_lead_time_and_follow_from_the_seed(script) -> None:
    truth = RECORD.isel(time=slice(1, None))
    day, two = (said(script, error=0.2, lead=lead) - truth for lead in (24.0, 48.0))
    xr.testing.assert_allclose(2 * day, two, atol=1e-3)
    xr.testing.assert_identical(said(script, error=0.2), said(script, error=0.2))
    for other in (said(script, error=0.2, seed=1), said(script, error=0.2, run=1)):
        assert float(np.abs(other - said(script, error=0.2)).to_dataarray().max()) > 0.1
    bias, of_run = said(script, bias=0.2), said(script, bias=0.2, run=1)
    xr.testing.assert_allclose(bias - truth, of_run - RECORD.isel(time=slice(1, None)), atol=1e-4)


def test_a_delay_beyond_one_step_is_refused(script) -> None:
    with pytest.raises(ValueError, match="--delay 4 h for each day of --lead 48 h is 8 h; valid"):
        said(script, delay=4.0, lead=48.0)


def test_smoothing_keeps_a_constant_and_removes_the_shortest_wave(script) -> None:
    field = make_dataset(num_times=1)["temperature"]
    wave = field.copy(data=np.broadcast_to((-1.0) ** np.arange(16), field.shape))
    assert float(np.abs(script.smoothed(wave, 1)).max()) < 1e-12
    xr.testing.assert_allclose(script.smoothed(xr.ones_like(field), 3), xr.ones_like(field))

"""Unions of tasks: what one of several masks hides is hidden, and what all show is shown."""

import itertools
import re
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY, Corruption, StreamWindow, detokenise, token_grid
from atmossl.data.statistics import compute_statistics
from atmossl.data.windows import Normaliser, read_window
from atmossl.inference.tiles import masked_view
from atmossl.masking.base import FirstGuess, TokenLayout
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.correction import Correction
from atmossl.masking.places import CrossVariable, Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, Task, TemporalInterpolation
from tests.inference.oracle_models import NAMES, segment
from tests.synthetic import spec

BOX = Inpainting((LatLonBox(south=-46.0, north=1.0, west=85.0, east=185.0),))  # cuts tokens
INSIDE = np.ix_(range(2, 4), range(4, 9))  # its cells of 22.5 degrees
GAPS = Inpainting((), missing=True)
EXAMPLES = Downscaling(4, examples=1)


def window(token: tuple[int, int, int]) -> StreamWindow:
    record = segment()
    stream = spec(variables=NAMES, token=token)
    normaliser = Normaliser({PRIMARY: compute_statistics([record])})
    (read,) = read_window(record, (stream,), normaliser, 4, 5, record.whole())
    return read


def shown(task: Task, seen: StreamWindow, first_guess: FirstGuess = True) -> torch.Tensor:
    """What the encoder sees, [variable level time lat lon]."""
    view, _ = masked_view((seen,), task, first_guess=first_guess)
    (stream,) = view.streams
    return detokenise(stream.source, seen.spec)


def means_of_known(seen: StreamWindow, known: np.ndarray, factor: int) -> np.ndarray:
    """Area-weighted means over the known cells of each coarse cell, at each of its cells; NaN where
    none is known."""
    weight = known * np.broadcast_to(seen.weight.numpy()[:, None], known.shape).astype(float)
    rows, columns = known.shape
    blocks = (rows // factor, factor, columns // factor, factor)
    sums = (seen.fields.numpy() * weight).reshape(*seen.fields.shape[:3], *blocks).sum((-3, -1))
    with np.errstate(invalid="ignore"):
        means = sums / weight.reshape(blocks).sum((1, 3))
    return means.repeat(factor, -2).repeat(factor, -1)


@pytest.mark.parametrize("token", [(1, 2, 2), (1, 4, 4), (1, 1, 1), (1, 8, 8), (1, 4, 2)])
@pytest.mark.parametrize("first_guess", [True, "surroundings"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_coarse_cell_shows_the_mean_of_what_the_other_parts_leave(
    token, first_guess: FirstGuess, order: int
) -> None:
    """Whatever the size of tokens. Cells in tokens that are hidden as a whole show the guess."""
    task = Combined((Downscaling(4), BOX)[::order])
    seen = window(token)
    known = np.ones(seen.fields.shape[-2:], bool)
    known[INSIDE] = False
    expected = means_of_known(seen, known, 4)
    tokens = known.reshape(8 // token[1], token[1], 16 // token[2], token[2]).any((1, 3))
    in_view = tokens.repeat(token[1], 0).repeat(token[2], 1) & np.isfinite(expected[0, 0, 0])
    assert in_view.any()
    found = shown(task, seen, first_guess).numpy()
    np.testing.assert_allclose(found[..., in_view], expected[..., in_view], atol=1e-5)


@pytest.mark.parametrize("token", [(1, 2, 2), (1, 4, 4)])
@pytest.mark.parametrize("first_guess", [False, True, "surroundings"])
@pytest.mark.parametrize("downscaling", [Downscaling(4), EXAMPLES, Downscaling(2)])
def test_no_hidden_value_has_an_influence(token, first_guess: FirstGuess, downscaling) -> None:
    seen, task = window(token), Combined((downscaling, BOX))
    other = seen.fields.clone()
    other[..., INSIDE[0], INSIDE[1]] += 50.0
    same = shown(task, replace(seen, fields=other), first_guess)
    torch.testing.assert_close(shown(task, seen, first_guess), same, rtol=0, atol=0)


@pytest.mark.parametrize("first_guess", [True, "surroundings"])
def test_gaps_are_filled_while_all_else_is_downscaled(first_guess: FirstGuess) -> None:
    """A value that was never observed is neither in a mean nor an error, and is predicted."""
    seen = window((1, 2, 2))
    valid = torch.ones_like(seen.fields, dtype=torch.bool)
    valid[0, :, :, INSIDE[0], INSIDE[1]] = False
    gaps = replace(seen, valid=valid, fields=torch.where(valid, seen.fields, 0.0))
    task = Combined((Downscaling(4), GAPS))
    view, (hidden,) = masked_view((gaps,), task, first_guess=first_guess)
    assert bool(hidden.all())
    (stream,) = view.streams
    found = detokenise(stream.source, seen.spec).numpy()
    for row, known in enumerate(valid[:, 0, 0].numpy()):
        expected = means_of_known(seen, known, 4)[row]
        in_view = np.isfinite(expected[0, 0])
        np.testing.assert_allclose(found[row][..., in_view], expected[..., in_view], atol=1e-5)


def test_places_far_from_the_hidden_ones_have_the_first_guess_of_downscaling() -> None:
    """The guess is interpolated there from the same coarse cells, by a spline."""
    alone, union = (
        masked_view((window((1, 2, 2)),), task, first_guess=True)[0].streams[0]
        for task in (Downscaling(2), Combined((Downscaling(2), BOX)))
    )
    guesses = [detokenise(stream.guess, alone.spec)[..., -2:, 12:15] for stream in (alone, union)]
    torch.testing.assert_close(*guesses, rtol=0, atol=2e-3)


def test_masks_that_hide_a_token_together_hide_it_as_a_whole() -> None:
    halves = [Inpainting((LatLonBox(-46.0, 1.0, west, west + 1.0),)) for west in (90.0, 112.5)]
    view, _ = masked_view((window((1, 2, 2)),), Combined(halves), first_guess=True)
    corruption = view.streams[0].corruption
    assert (corruption[:, :, 1, 2] == Corruption.MASK).all()
    assert (corruption != Corruption.VISIBLE).sum() == corruption[:, :, 0, 0].numel()


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        (
            (Downscaling(2), Downscaling(4)),
            r"task\.parts\.0\.factor=2 and task\.parts\.1\.factor=4",
        ),
        (
            (Forecast(6), Combined((BOX, Downscaling(2))), Counterfactual(Downscaling(8), 6.0)),
            r"task\.parts\.1\.parts\.1\.factor=2 and task\.parts\.2\.task\.factor=8 differ",
        ),
    ],
)
def test_parts_that_do_not_go_together_are_told_by_their_keys(parts, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Combined(parts)


CASES: dict[str, Task] = {  # every kind of task, with and without a limit in time
    "forecast": Forecast(12),
    "short forecast": Forecast(6),
    "long forecast": Forecast(18),
    "hindcast": Hindcast(6),
    "long hindcast": Hindcast(12),
    "interpolation": TemporalInterpolation(6),
    "long interpolation": TemporalInterpolation(12),
    "early interpolation": TemporalInterpolation(6, steps=(1,)),
    "inpainting": BOX,
    "inpainting for 6 h": replace(BOX, hidden_hours=6),
    "inpainting for 12 h": replace(BOX, hidden_hours=12),
    "variable": CrossVariable(NAMES),
    "variable with an example": CrossVariable(NAMES, examples=1),
    "downscaling": Downscaling(2),
    "downscaling with examples": Downscaling(2, examples=2),
    "correction": Correction(),
    "told another time": Counterfactual(Forecast(6), shift_hours=720.0),
    "union": Combined((Forecast(12), BOX)),
    "union in time": Combined((TemporalInterpolation(6), replace(BOX, hidden_hours=6))),
}
NUM_STEPS = 5


def steps_written(task: Task) -> set[int]:
    plan = task.plan(NUM_STEPS, 6.0)
    return {plan.reference + offset for offset in plan.offsets}


@cache
def hidden_steps(task: Task) -> set[int]:
    """The steps of a window at which a task hides anything."""
    if isinstance(task, Correction):
        return set(range(NUM_STEPS))
    grid = token_grid(window((1, 2, 2)))
    other = spec("other", variables=("v_component_of_wind",), token=(1, 2, 2))
    two = tuple(TokenLayout(s, grid) for s in (spec(variables=NAMES, token=(1, 2, 2)), other))
    hidden = [mask.corruption != Corruption.VISIBLE for mask in task(two, np.random.default_rng(0))]
    anywhere = sum(of_stream.sum(dim=(0, 2, 3)) for of_stream in hidden)
    return {step for step, count in enumerate(torch.as_tensor(anywhere).tolist()) if count}


@pytest.mark.parametrize("names", [*itertools.permutations(CASES, 2)], ids="+".join)
def test_a_union_writes_what_each_part_hides_or_is_refused(names: tuple[str, str]) -> None:
    """A part alone hides steps and writes some or all of them. The union writes these, too, or
    other ones where the part hides every step alike."""
    parts = tuple(CASES[name] for name in names)
    try:
        written = steps_written(Combined(parts))
    except ValueError as refusal:
        number, told, other = re.match(
            r"task\.parts\.(\d) \((\w+)\) hides times that a union with task\.parts\.(\d)",
            str(refusal),
        ).groups()
        assert {number, other} == {"0", "1"} and parts[int(number)].name == told
        assert "\n" not in str(refusal)
        return
    for part in parts:
        hidden = hidden_steps(part)
        lost = (hidden & steps_written(part)) - written
        assert not lost or (hidden == set(range(NUM_STEPS)) and hidden & written), (lost, written)


@pytest.mark.parametrize(
    ("names", "offsets"),
    [
        (("short forecast", "forecast"), (1, 2)),
        (("forecast", "union"), (0, 1, 2)),
        (("hindcast", "long hindcast"), (-2, -1)),
        (("hindcast", "inpainting"), (-1, 0)),
        (("interpolation", "forecast"), (0, 1, 2)),
        (("early interpolation", "inpainting"), (0, 1)),
    ],
)
def test_parts_that_go_together_are_written_from_the_init_time_on(names, offsets) -> None:
    union = Combined(tuple(CASES[name] for name in names))
    assert union.plan(NUM_STEPS, 6.0).offsets == offsets


def test_a_forecast_and_a_hindcast_are_refused_by_their_names() -> None:
    with pytest.raises(
        ValueError, match=r"task\.parts\.1 \(hindcast\).*task\.parts\.0 \(forecast\)"
    ):
        Combined((Forecast(12), Hindcast(6))).plan(NUM_STEPS, 6.0)


def test_what_is_wrong_with_a_part_is_told_of_the_part() -> None:
    inner = Counterfactual(Forecast(30), shift_hours=720.0)
    with pytest.raises(ValueError, match=r"^task\.parts\.1\.task\.lead_time=30 h hides every one"):
        Combined((BOX, inner)).plan(NUM_STEPS, 6.0)
    rolled = Forecast(24, rollout_hours=6)
    with pytest.raises(ValueError, match=r"^task\.parts\.0 \(forecast\) is rolled out"):
        Combined((rolled, BOX)).plan(NUM_STEPS, 6.0)

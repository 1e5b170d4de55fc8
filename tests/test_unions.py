"""Unions of tasks: what one of several masks hides is hidden, and what all show is shown."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY, Corruption, StreamWindow, detokenise
from atmossl.data.statistics import compute_statistics
from atmossl.data.windows import Normaliser, read_window
from atmossl.inference.tiles import masked_view
from atmossl.masking.base import FirstGuess
from atmossl.masking.combined import Combined, Counterfactual
from atmossl.masking.places import Inpainting, LatLonBox
from atmossl.masking.tasks import Downscaling, Forecast, Task
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

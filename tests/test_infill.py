"""What is never shown is filled from the places around, and boxes end at any cell."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from atmossl.batch import Corruption, collate_views, detokenise, tokenise
from atmossl.masking.base import make_view
from atmossl.masking.infill import fill_from_surroundings, laplacian
from atmossl.masking.places import Inpainting, LatLonBox
from atmossl.masking.random import BlockMasking, RandomMasking
from atmossl.objectives.masked import hidden_values
from tests.synthetic import spec, window

LAT = torch.linspace(-78.75, 78.75, 8)
SPACING = 22.5


def fill(fields: torch.Tensor, shown: torch.Tensor) -> torch.Tensor:
    return fill_from_surroundings(fields, shown, lat=LAT, lon_spacing=SPACING, periodic=True)


def box_shown() -> torch.Tensor:
    """All but a box across the last longitude, and one whole row."""
    shown = torch.ones(8, 16, dtype=torch.bool)
    shown[2:5, 14:] = shown[2:5, :2] = shown[6] = False
    return shown[None].expand(3, 8, 16)


def test_fields_of_latitude_alone_are_filled_exactly_in_rows_that_show_any() -> None:
    fields = torch.randn(2, 3, 4, 8, 1, generator=torch.manual_seed(0)).expand(2, 3, 4, 8, 16)
    filled = fill(fields, box_shown())
    rows = [0, 1, 2, 3, 4, 5, 7]
    torch.testing.assert_close(filled[..., rows, :], fields[..., rows, :])
    between = (fields[..., 5, :] + fields[..., 7, :]) / 2  # rows are evenly spaced
    torch.testing.assert_close(filled[..., 6, :], between)


def test_departures_from_the_mean_of_a_latitude_are_harmonic() -> None:
    """Against a dense solution with means and departures taken by hand."""
    fields = torch.randn(1, 1, 1, 8, 16, generator=torch.manual_seed(1)).double()
    shown = box_shown()[0].clone()
    shown[6] = True
    filled = fill(fields.float(), shown[None])[0, 0, 0].double()
    assert torch.equal(filled[shown].float(), fields[0, 0, 0][shown].float())
    means = torch.stack(
        [row[known].mean() for row, known in zip(fields[0, 0, 0], shown, strict=True)]
    )
    departures = (filled - means[:, None]).numpy()
    matrix = laplacian(LAT.double().numpy(), 16, SPACING, periodic=True).toarray()
    pulled = (matrix @ departures.ravel()).reshape(8, 16)
    np.testing.assert_allclose(pulled[~shown.numpy()], 0.0, atol=1e-5)
    assert np.abs(pulled[shown.numpy()]).max() > 0.1


def test_variables_with_other_gaps_are_filled_each_from_its_own_and_empty_ones_stay() -> None:
    fields = torch.randn(3, 2, 2, 8, 16, generator=torch.manual_seed(2))
    shown = torch.ones(3, 2, 8, 16, dtype=torch.bool)
    shown[0, :, 3, 3:6] = shown[1, :, 5, 5:9] = False
    shown[2] = False
    together = fill(fields, shown)
    for number in range(2):
        alone = fill(fields[number : number + 1], shown[number : number + 1])
        torch.testing.assert_close(together[number], alone[0])
    assert torch.equal(together[2], fields[2])


@pytest.mark.parametrize("first_guess", [False, True, "surroundings"])
@pytest.mark.parametrize(
    "sampler",
    [
        BlockMasking(2, (0.1, 0.5), cells=True),
        RandomMasking((0.9, 0.9)),
        Inpainting((LatLonBox(-30, 40, 100, 190),), hidden_hours=12),
    ],
    ids=lambda sampler: type(sampler).__name__,
)
def test_hidden_points_never_leak(sampler, first_guess) -> None:
    """Other values in all that is hidden, the same source and first guess, to the bit."""
    here = window(spec(token=(1, 2, 2)))
    (before,) = make_view(
        (here,), sampler, np.random.default_rng(3), first_guess="surroundings"
    ).streams
    assert before.target_points is not None
    hidden = detokenise(before.target_points, here.spec)
    spoiled = replace(here, fields=torch.where(hidden, 1e6, here.fields))
    views = [
        make_view((one,), sampler, np.random.default_rng(3), first_guess=first_guess).streams[0]
        for one in (here, spoiled)
    ]
    assert torch.equal(views[0].source, views[1].source)
    assert torch.equal(views[0].guess, views[1].guess)


def test_known_points_of_hidden_tokens_are_shown_and_not_asked_for() -> None:
    """A box of 3 x 3 cells in tokens of 2 x 2: its points alone are lost, guessed and scored."""
    here = window(spec(token=(1, 2, 2)))
    sampler = Inpainting((LatLonBox(-60, -10, 40, 100),))
    cells = torch.from_numpy(sampler.cells(here.lat.numpy(), here.lon.numpy()))
    assert cells.sum() == 9
    view = make_view((here,), sampler, np.random.default_rng(0), first_guess="surroundings")
    (tokens,) = view.streams
    assert {Corruption.COARSEN, Corruption.MASK} & set(tokens.corruption.unique().tolist())
    lost = tokenise(cells.expand_as(here.fields), here.spec.token_size)
    assert tokens.target_points is not None and torch.equal(tokens.target_points, lost)
    assert torch.equal(tokens.source[~lost], tokens.target[~lost])
    assert torch.equal(tokens.source[lost], tokens.guess[lost])
    batch = collate_views([(view,)], [0])
    _, weight, _ = hidden_values(batch.views[0].streams[0])
    assert int((weight > 0).sum()) == int(lost.sum())


def test_boxes_of_cells_end_inside_tokens() -> None:
    here = window(spec(token=(1, 2, 2)))
    rng, ends = np.random.default_rng(0), set()
    for _ in range(40):
        (tokens,) = make_view(
            (here,), BlockMasking(1, (0.2, 0.6), cells=True), rng, first_guess="surroundings"
        ).streams
        asked = tokens.target_points
        assert asked is not None
        part = asked.any(-1) & ~asked.all(-1)
        assert bool((tokens.corruption[part] == Corruption.COARSEN).all())
        ends.add(bool(part.any()))
    assert ends == {False, True}

"""Samplers are pure, draw what they promise, and nothing hidden is ever seen."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.batch import Corruption, TokenSize, detokenise, token_grid, tokenise
from atmossl.geometry import Grid
from atmossl.masking.base import (
    TokenLayout,
    guess_tokens,
    interpolate_in_time,
    make_view,
    points_of,
)
from atmossl.masking.cells import coarsen, spread_along_row, with_coarse_means
from atmossl.masking.places import CrossVariable
from atmossl.masking.random import BlockMasking, Mixture, RandomMasking, TimeBlockMasking
from atmossl.masking.tasks import Downscaling, Forecast, TemporalInterpolation
from tests.synthetic import spec, window

KINDS = ("drop", "mask", "noise", "coarsen", "keep")


def layouts(*streams, **sizes) -> tuple[TokenLayout, ...]:
    return tuple(TokenLayout(s, token_grid(window(s, **sizes))) for s in streams)


def draws(sampler, shapes: tuple[TokenLayout, ...], count: int) -> list:
    rng = np.random.default_rng(0)
    return [sampler(shapes, rng) for _ in range(count)]


def test_the_share_of_hidden_tokens_lies_in_the_range_and_fills_it() -> None:
    shapes = layouts(spec())
    shares = [
        float(m[0].hidden.float().mean()) for m in draws(RandomMasking((0.2, 0.6)), shapes, 400)
    ]
    assert min(shares) >= 0.2 - 0.01 and max(shares) <= 0.6 + 0.01
    assert np.mean(shares) == pytest.approx(0.4, abs=0.02)
    assert np.std(shares) == pytest.approx(0.4 / 12**0.5, abs=0.015)


def test_hidden_tokens_are_split_by_the_fractions() -> None:
    fractions = {"mask": 0.5, "noise": 0.2, "coarsen": 0.2, "keep": 0.1}
    masks = draws(RandomMasking((0.5, 0.5), fractions), layouts(spec()), 200)
    kinds = torch.cat([m[0].corruption.flatten() for m in masks])
    hidden = kinds[kinds != Corruption.VISIBLE]
    for name, share in fractions.items():
        drawn = float((hidden == Corruption[name.upper()]).float().mean())
        assert drawn == pytest.approx(share, abs=0.015)


def test_every_token_is_hidden_equally_often() -> None:
    masks = draws(RandomMasking((0.3, 0.3)), layouts(spec()), 1500)
    often = torch.stack([m[0].hidden for m in masks]).float().mean(0)
    assert float((often - 0.3).abs().max()) < 0.06


def test_synced_streams_hide_the_same_places_others_do_not() -> None:
    shapes = layouts(spec("a"), spec("b"))
    for first, second in draws(RandomMasking((0.5, 0.5), synced=True), shapes, 5):
        assert torch.equal(first.hidden, second.hidden)
    first, second = draws(RandomMasking((0.5, 0.5)), shapes, 1)[0]
    assert not torch.equal(first.hidden, second.hidden)


TOKENS = [((1, 2, 4), (1, 4, 2)), ((1, 2, 4), (2, 2, 8)), ((2, 4, 4), (1, 2, 8), (4, 2, 4))]


@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize(
    "sampler",
    [RandomMasking((0.2, 0.9), synced=True), RandomMasking((0.5, 0.5), synced=True, tube=True),
     BlockMasking(), BlockMasking(1, (0.1, 0.9)), TimeBlockMasking((1, 2))], ids=repr,
)  # fmt: skip
def test_random_masks_hide_the_same_air_whatever_the_token(sampler, tokens) -> None:
    """Point by point, also of streams with fewer levels; some of it stays visible."""
    streams = [spec(str(n), token=size, levels=(300, 500)) for n, size in enumerate(tokens)]
    shapes = layouts(*streams, spec("given", role="input"), time=8, lat=16, lon=32)
    shares = []
    for masks in draws(sampler, shapes, 30):
        first, *others = (points_of(m.hidden, s) for m, s in zip(masks[:-1], streams, strict=True))
        assert all(torch.equal(first, other) for other in others)
        assert not bool(masks[-1].hidden.any())
        shares.append(float(first.float().mean()))
    assert 0 < min(shares) < 1


def test_streams_without_a_common_edge_are_named() -> None:
    shapes = layouts(spec("a", token=(1, 4, 8)), spec("b", token=(1, 6, 8)), lat=12)
    for sampler in (RandomMasking(synced=True), BlockMasking()):
        with pytest.raises(ValueError, match=r"masking.*a: \[3,2\], b: \[2,2\]"):
            draws(sampler, shapes, 1)


def test_tubes_hide_a_place_at_all_times() -> None:
    (mask,) = draws(RandomMasking((0.5, 0.5), tube=True), layouts(spec()), 1)[0]
    assert torch.equal(mask.hidden, mask.hidden[:, :1].expand_as(mask.hidden))


def test_whole_levels_and_streams_are_hidden_with_their_probability() -> None:
    shapes = layouts(spec("a"), spec("b"))
    masks = draws(RandomMasking((0.1, 0.1), hide_stream=0.3), shapes, 600)
    assert np.mean([a.hidden.all() or b.hidden.all() for a, b in masks]) == pytest.approx(
        0.3, abs=0.06
    )
    chosen = draws(RandomMasking((0.0, 0.0), hide_stream=1.0, streams=["b"]), shapes, 20)
    assert all(bool(b.hidden.all()) and not bool(a.hidden.any()) for a, b in chosen)
    masks = draws(RandomMasking((0.1, 0.1), hide_level=0.4), shapes, 600)
    levels = [bool(a.hidden.flatten(1).all(dim=1).any()) for a, _ in masks]
    assert np.mean(levels) == pytest.approx(0.4, abs=0.06)


@pytest.mark.parametrize(
    "sampler",
    [
        RandomMasking(hide_level=0.5, hide_stream=0.9),
        BlockMasking(),
        BlockMasking(cells=True),
        TimeBlockMasking(),
        Forecast(6),
        TemporalInterpolation(6),
        Downscaling(2),
        Downscaling(2, examples=1),
        Mixture([BlockMasking(), Forecast(6)], [0.5, 0.5]),
    ],
)
def test_samplers_are_pure_and_leave_input_streams_alone(sampler) -> None:
    shapes = layouts(spec("a"), spec("orography", role="input"))
    for seed in range(5):
        one, two = (sampler(shapes, np.random.default_rng(seed)) for _ in range(2))
        assert torch.equal(one[0].corruption, two[0].corruption)
        assert bool(one[0].hidden.any())
        assert not bool(one[1].hidden.any())


def test_mixture_draws_by_probability() -> None:
    mixture = Mixture([Forecast(6), Downscaling(2)], [0.25, 0.75])
    masks = draws(mixture, layouts(spec()), 600)
    coarse = [bool((m[0].corruption == Corruption.COARSEN).all()) for m in masks]
    assert np.mean(coarse) == pytest.approx(0.75, abs=0.06)


def test_a_mixture_says_which_sampler_drew_a_mask() -> None:
    steps = (TimeBlockMasking((1, 1)), TimeBlockMasking((2, 2)), TimeBlockMasking(causal=True))
    mixture = Mixture([*steps, Forecast(6)], [0.25] * 4)
    assert mixture.kinds == ("time_block_1", "time_block_2", "causal_time_block", "forecast")
    for (mask,) in draws(mixture, layouts(spec()), 40):
        count = int(mask.hidden[0, :, 0, 0].sum())
        assert mask.kind in range(4)
        assert mask.kind != 0 or count == 1
        assert mask.kind != 1 or count == 2
    named = Mixture(steps, [0.2, 0.3, 0.5], names=["a", "b", "c"])
    assert named.kinds == ("a", "b", "c")
    with pytest.raises(ValueError, match=r"masking.names=\[a,a,c\] for 3 samplers"):
        Mixture(steps, [0.2, 0.3, 0.5], names=["a", "a", "c"])


def test_time_blocks_contain_forecasts_and_interpolations() -> None:
    masks = draws(TimeBlockMasking((1, 2)), layouts(spec()), 200)
    seen = {tuple(m[0].hidden.flatten(2).all(-1)[0].tolist()) for m in masks}
    assert (False, False, False, True) in seen and (False, True, True, False) in seen
    causal = draws(TimeBlockMasking((1, 2), causal=True), layouts(spec()), 50)
    assert all(bool(m[0].hidden[:, -1].all()) for m in causal)


def test_tasks_hide_the_same_air_whatever_the_token() -> None:
    fine, coarse = spec("fine", token=(1, 2, 2)), spec("coarse", token=(2, 4, 4))
    for task in (Forecast(12), TemporalInterpolation(12)):
        try:
            masks = task(layouts(fine, coarse, time=6), np.random.default_rng(0))
        except ValueError:
            assert isinstance(task, TemporalInterpolation)
            continue
        hours = [m.hidden.any(-1).any(-1).any(0).repeat_interleave(6 // m.hidden.shape[1])
                 for m in masks]  # fmt: skip
        assert torch.equal(*hours)
        assert hours[0].sum() == 2
    with pytest.raises(ValueError, match="cuts through"):
        Forecast(6)(layouts(fine, coarse, time=6), np.random.default_rng(0))


@pytest.mark.parametrize(
    "sampler",
    [
        RandomMasking((0.5, 0.5)),
        RandomMasking((0.5, 0.5), {"mask": 0.5, "drop": 0.5}),
        BlockMasking(),
        Forecast(12),
        TemporalInterpolation(6),
    ],
)
def test_masked_values_never_leak(sampler) -> None:
    """Other hidden values, the same source and first guess, to the bit."""
    here = window(spec())
    before = make_view((here,), sampler, np.random.default_rng(3)).streams[0]
    hidden = detokenise(before.hidden[..., None].expand_as(before.target), here.spec)
    changed = replace(
        here, fields=torch.where(hidden, torch.full_like(here.fields, 1e6), here.fields)
    )
    after = make_view((changed,), sampler, np.random.default_rng(3)).streams[0]
    assert not torch.equal(before.target, after.target)
    assert torch.equal(before.source, after.source)
    assert torch.equal(before.guess, after.guess)


def test_downscaling_sees_block_means_alone() -> None:
    here = window(spec())
    ripple = torch.zeros_like(here.fields)
    ripple[..., ::2] = 1.0
    ripple[..., 1::2] = -1.0
    views = [
        make_view((replace(here, fields=f),), Downscaling(2), np.random.default_rng(0)).streams[0]
        for f in (here.fields, here.fields + ripple)
    ]
    torch.testing.assert_close(views[0].source, views[1].source, rtol=0, atol=1e-5)
    torch.testing.assert_close(views[0].guess, views[1].guess, rtol=0, atol=1e-5)


def test_the_first_guess_is_exact_for_fields_linear_in_time() -> None:
    slope = torch.randn(2, 1, 1, 3, 5)
    fields = slope * torch.arange(6.0)[:, None, None]
    shown = torch.tensor([True, False, False, True, True, False])[:, None, None].expand(1, 6, 3, 5)
    guess = interpolate_in_time(fields, shown)
    torch.testing.assert_close(guess[:, :, :5], fields[:, :, :5])
    torch.testing.assert_close(guess[:, :, 5], fields[:, :, 4])
    nothing = interpolate_in_time(fields, torch.zeros_like(shown))
    assert bool((nothing == 0).all())


@pytest.mark.parametrize("size", [TokenSize(3, 2, 4), TokenSize(1, 1, 1), TokenSize(2, 4, 2, 2)])
def test_the_first_guess_of_tokens_is_numpys_interpolation_at_every_point(size: TokenSize) -> None:
    stream = replace(spec(), token_size=size, variables=("a", "b"), levels=(300, 500))
    rng = np.random.default_rng(size.time)
    fields = torch.from_numpy(rng.standard_normal((2, 2, 12, 4, 8), np.float32))
    tokens = tokenise(fields, size)
    shown = torch.from_numpy(rng.random(tokens.shape[:-1]) < 0.3)
    points = detokenise(shown[..., None].expand(tokens.shape), stream).reshape(4, 12, 32)
    guess = detokenise(guess_tokens(tokens, shown, size), stream).reshape(4, 12, 32)
    values, steps = fields.reshape(4, 12, 32), np.arange(12)
    for row in range(4):
        for place in range(32):
            seen, column = points[row, :, place].numpy(), values[row, :, place].numpy()
            known = np.interp(steps, steps[seen], column[seen]) if seen.any() else 0 * steps
            np.testing.assert_allclose(guess[row, :, place], known, rtol=0, atol=1e-5)


@settings(deadline=None)  # the first Fourier transform of a process takes longer than the others
@given(
    seed=st.integers(0, 2**16),
    dryness=st.floats(-1.0, 2.0),
    is_amount=st.booleans(),
    closes_circle=st.booleans(),
)
def test_coarse_means_are_kept_and_amounts_stay_positive(
    seed, dryness, is_amount, closes_circle
) -> None:
    rng = torch.Generator().manual_seed(seed)
    weight = torch.rand(8, generator=rng, dtype=torch.float64) + 0.1
    truth = (torch.randn(2, 8, 16, generator=rng, dtype=torch.float64) - dryness).clamp_min(0.0)
    fine = truth + torch.randn(3, 2, 8, 16, generator=rng, dtype=torch.float64)
    coarse = coarsen(truth, weight, 4)
    coarse[0, 1, 2] = torch.nan  # a mean that is not known
    kept = with_coarse_means(
        fine, coarse, weight, 4, is_amount=is_amount, closes_circle=closes_circle
    )
    known = coarse.isfinite()
    torch.testing.assert_close(coarsen(kept, weight, 4)[:, known], coarse[known].expand(3, -1))
    unknown = ~known.repeat_interleave(4, -1).repeat_interleave(4, -2)
    assert torch.equal(kept[:, unknown], fine[:, unknown])
    if is_amount:
        assert float(kept[:, ~unknown].min()) >= 0.0


@pytest.mark.parametrize(("num_coarse", "factor"), [(16, 4), (15, 3), (8, 2), (5, 1), (2, 8)])
def test_values_along_a_row_are_those_of_a_gaussian_process_with_the_given_means(
    num_coarse: int, factor: int
) -> None:
    """Against its conditional mean, C K' (K C K')^-1 m, with all matrices written out."""
    size = num_coarse * factor
    wave = np.fft.fftfreq(size, 1 / size)
    correlation = np.fft.ifft((1 + (2 * wave / num_coarse) ** 2) ** -2).real
    distance = np.arange(size)[:, None] - np.arange(size)
    covariance = correlation[distance % size]
    mean_of_block = np.kron(np.eye(num_coarse), np.full((1, factor), 1 / factor))
    means = np.random.default_rng(factor).standard_normal((3, num_coarse))
    of_means = mean_of_block @ covariance @ mean_of_block.T
    expected = covariance @ mean_of_block.T @ np.linalg.solve(of_means, means.T)
    spread = spread_along_row(torch.from_numpy(means), factor, closes_circle=True)
    np.testing.assert_allclose(spread, expected.T, rtol=0, atol=1e-9)


def test_a_row_with_ends_is_continued_by_its_mirror_image() -> None:
    ramp = torch.arange(6.0, dtype=torch.float64)
    spread = spread_along_row(ramp, 4, closes_circle=False)
    torch.testing.assert_close(spread.unflatten(0, (-1, 4)).mean(1), ramp)
    assert float((spread.diff() - 0.25).abs().max()) < 0.2  # no jump from the last to the first
    mirrored = spread_along_row(ramp.flip(0), 4, closes_circle=False)
    torch.testing.assert_close(mirrored, spread.flip(0))


def test_coarsening_keeps_the_area_mean() -> None:
    here = window(spec())
    coarse = coarsen(here.fields, here.weight, 4)
    block_weight = here.weight.unflatten(0, (-1, 4)).mean(1)
    fine_mean = (here.fields * here.weight[:, None]).mean((-2, -1))
    coarse_mean = (coarse * block_weight[:, None]).mean((-2, -1))
    torch.testing.assert_close(fine_mean, coarse_mean, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="does not divide"):
        coarsen(here.fields, here.weight, 3)


def test_rows_on_the_poles_have_no_coarse_cells_and_the_message_tells_what_to_do() -> None:
    """721 x 1440 points of ERA5 have no common divisor."""
    era5 = Grid(np.linspace(-90.0, 90.0, 721), 0.25 * np.arange(1440))
    with pytest.raises(ValueError, match=r"721 x 1440 cells; valid: none, .* a row or column less"):
        Downscaling(4).check(era5)


@pytest.mark.parametrize("examples", [0, 1, 2])
@pytest.mark.parametrize("task", [Downscaling(2), CrossVariable(("temperature",))], ids=repr)
def test_examples_before_the_written_step_are_shown_whole(task, examples: int) -> None:
    """All else stays as it is without them, in streams of short and of long tokens."""
    a, b = spec("a", variables=("temperature",)), spec("b", variables=("u_component_of_wind",))
    shapes = layouts(a, b, time=5)
    without = task(shapes, np.random.default_rng(0))
    masks = replace(task, examples=examples)(shapes, np.random.default_rng(0))
    written = replace(task, examples=examples).plan(5, 6.0).reference
    shown = list(range(written - examples, written))
    for mask, plain in zip(masks, without, strict=True):
        assert not bool(mask.hidden[:, shown].any())
        rest = [step for step in range(5) if step not in shown]
        assert torch.equal(mask.corruption[:, rest], plain.corruption[:, rest])
        assert mask.coarsen_factor == plain.coarsen_factor
    assert bool(masks[0].hidden[:, written].all())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RandomMasking((0.5, 0.2)), "masking.rate"),
        (lambda: RandomMasking(fractions={"mask": 0.5}), "sum to 1"),
        (lambda: RandomMasking(fractions={"blur": 1.0}), "blur"),
        (lambda: RandomMasking(hide_level=2.0), "hide_level"),
        (lambda: Mixture([Forecast(6)], [0.5, 0.5]), "one each"),
        (lambda: Forecast(-6), "lead_time"),
        (lambda: Downscaling(1), "factor"),
        (lambda: Downscaling(2, coarse_input=True, examples=1), "no whole steps to show"),
        (lambda: Downscaling(2, examples=3).plan(5, 6.0), "task.examples=3.*2 steps before"),
        (
            lambda: Downscaling(2, examples=3)(layouts(spec(), time=5), np.random.default_rng(0)),
            "task.examples=3.*2 steps before",
        ),
        (
            lambda: Downscaling(2, examples=1)(
                layouts(spec(token=(2, 2, 4)), time=8), np.random.default_rng(0)
            ),
            "task.examples=1 steps.*cut through a token",
        ),
        (lambda: TimeBlockMasking((0, 1)), "hidden_steps"),
        (lambda: BlockMasking(corruption="keep"), "corruption"),
        (lambda: BlockMasking(corruption="drop", cells=True), "cells=false"),
        (
            lambda: RandomMasking(streams=["sea"])(layouts(spec()), np.random.default_rng(0)),
            r"unknown sea; valid: air$",
        ),
        (lambda: Forecast(7)(layouts(spec()), np.random.default_rng(0)), "no multiple"),
        (lambda: Forecast(24)(layouts(spec()), np.random.default_rng(0)), "hides every one of"),
    ],
)
def test_bad_settings_are_named(make, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_boxes_on_the_sphere_go_around_it_and_are_as_wide_near_the_pole_in_kilometres() -> None:
    """Columns times the cosine of the box's centre are the drawn share of the circle, unless the
    box is the whole circle; a box that goes beyond the last longitude begins again at the first."""
    stream = spec(token=(1, 1, 1))
    made = window(stream, lat=32, lon=64)
    layout = TokenLayout(stream, token_grid(made))
    beyond, widths = 0, []
    for seed in range(200):
        sampler = BlockMasking(num_blocks=1, share=(0.2, 0.2), sphere=True)
        (mask,) = sampler((layout,), np.random.default_rng(seed))
        hidden = mask.hidden[0, 0]
        assert torch.equal(mask.hidden, hidden.expand_as(mask.hidden))
        rows, columns = hidden.any(dim=1), hidden.any(dim=0)
        assert torch.equal(hidden, rows[:, None] & columns[None])
        lat = made.lat[rows]
        width = int(columns.sum()) * math.cos(math.radians(float(lat[[0, -1]].mean())))
        if int(columns.sum()) < 64:
            widths.append(width / 64)
        ends = int((columns != columns.roll(1)).sum())
        assert ends in (0, 2)  # one run around the circle
        beyond += bool(columns[0] and columns[-1] and ends)
    assert len(widths) > 100 and np.allclose(widths, 0.2, atol=0.05)
    assert np.mean(widths) == pytest.approx(0.2, abs=0.01)
    assert 20 < beyond < 150

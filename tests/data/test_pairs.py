"""Views of one place some hours apart: what they hold, when they start, what is refused."""

from typing import Any

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY, collate_views, detokenise
from atmossl.data.loader import SampleKey, WindowDataset, sample_rng
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, WindowSize, read_window
from atmossl.geometry import random_box
from atmossl.masking.base import hide_nothing, make_view
from atmossl.masking.random import RandomMasking
from atmossl.masking.views import ViewSpec
from tests.synthetic import dataset, spec

STREAM = spec(token=(1, 2, 4))
LAGS = (6.0, 18.0)
PAIR = (ViewSpec(hide_nothing), ViewSpec(hide_nothing, LAGS, tells_time=False))


@pytest.fixture(scope="module")
def record() -> tuple[Segment, Normaliser]:
    segment = open_segment(
        "waves", dataset(steps=12), "memory", variables=STREAM.variables, levels=STREAM.levels
    )
    return segment, Normaliser({PRIMARY: compute_statistics([segment])})


def samples(record: tuple[Segment, Normaliser], views: Any, **changes: Any) -> WindowDataset:
    segment, normaliser = record
    settings: dict[str, Any] = {
        "segments": [segment], "specs": [STREAM], "normaliser": normaliser, "seed": 1,
        "window": WindowSize(2, 4, 8), "sampler": RandomMasking((0.5, 0.5)), "views": views,
    }  # fmt: skip
    return WindowDataset(**(settings | changes))


def test_views_hold_what_the_store_has_at_the_lag_that_the_batch_tells(
    record: tuple[Segment, Normaliser],
) -> None:
    """Values against the store, and both lags are drawn."""
    (segment, normaliser), store = record, dataset(steps=12)
    pairs, drawn = samples(record, PAIR), set()
    for number in range(len(pairs)):
        batch = collate_views([pairs[SampleKey(0, number)][0]], [number])
        lag = batch.lag_hours.item()
        drawn.add(lag)
        box = random_box(segment.grid, 4, 8, sample_rng(1, 0, number), segment.alignment)
        for view, start in zip(batch.views, (number, number + int(lag) // 6), strict=True):
            fields = normaliser.inverse(detokenise(view.streams[0].target[0], STREAM), STREAM)
            expected = store["temperature"].isel(
                time=slice(start, start + 2),
                latitude=box.lat_index(),
                longitude=box.lon_index(16),
            )
            found = fields[0].numpy()
            np.testing.assert_allclose(found, expected.transpose("level", ...), atol=1e-4)
            first_time = np.datetime64(int(view.start_hours.item()), "h")
            assert first_time == store["time"].values[start]
        told = [view.streams[0].grid.time_hours[0, 0].item() for view in batch.views]
        assert told[0] == batch.views[0].start_hours.item()
    assert drawn == set(LAGS)


def test_the_later_view_is_told_any_date_within_a_year(record: tuple[Segment, Normaliser]) -> None:
    pairs = samples(record, PAIR)
    moved = []
    for epoch in range(200):
        (_, later), _ = pairs[SampleKey(epoch, 0)]
        times = later.streams[0].grid.time_hours
        assert times[1] - times[0] == 6.0
        moved.append(float(times[0] - later.start_hours))
    assert min(moved) >= 0 and max(moved) < 24 * 366
    # of 200 uniform draws: mean and extremes, five standard deviations wide
    assert np.mean(moved) == pytest.approx(24 * 366 / 2, abs=5 * 24 * 366 / np.sqrt(12 * 200))
    assert max(moved) - min(moved) > 0.9 * 24 * 365
    assert len({shift % 24 for shift in moved}) > 12


def test_samples_end_where_the_longest_lag_does(record: tuple[Segment, Normaliser]) -> None:
    assert len(samples(record, (ViewSpec(),))) == 12 - 2 + 1
    assert len(samples(record, PAIR)) == 12 - 2 + 1 - 3
    longest = 6.0 * (12 - 2)
    assert len(samples(record, (ViewSpec(), ViewSpec(lag_hours=(longest,))))) == 1


@pytest.mark.parametrize(
    ("lags", "message"),
    [
        ((6.0, 9.0), r"objective.lag_time=\[6h, 9h\] are no multiples of the time step of 6 h"),
        ((66.0,), r"data.window.time=2 steps and objective.lag_time=\[66h\], together 13 steps, "
                  "are longer than the longest unbroken part of memory with 12 steps"),
    ],
)  # fmt: skip
def test_lags_that_do_not_fit_the_record_are_refused(
    record: tuple[Segment, Normaliser], lags: tuple[float, ...], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        samples(record, (ViewSpec(), ViewSpec(lag_hours=lags)))


@pytest.mark.parametrize("views", [(ViewSpec(),), (ViewSpec(), ViewSpec(hide_nothing))])
def test_views_of_one_time_are_drawn_as_without_lags(
    record: tuple[Segment, Normaliser], views: tuple[ViewSpec, ...]
) -> None:
    """Place first, then the masks of one view after another; nothing else is drawn or added."""
    segment, normaliser = record
    sampler = RandomMasking((0.5, 0.5), {"mask": 0.5, "noise": 0.5})
    found, _ = samples(record, views, sampler=sampler)[SampleKey(2, 5)]
    rng = sample_rng(1, 2, 5)
    box = random_box(segment.grid, 4, 8, rng, segment.alignment)
    window = read_window(segment, (STREAM,), normaliser, 5, 2, box)
    for view, one in zip(views, found, strict=True):
        expected = make_view(window, view.masking or sampler, rng)
        assert one.start_hours is None
        for name in ("source", "guess", "target", "corruption"):
            assert torch.equal(*(getattr(v.streams[0], name) for v in (one, expected))), name
        assert torch.equal(*(v.streams[0].grid.time_hours for v in (one, expected)))

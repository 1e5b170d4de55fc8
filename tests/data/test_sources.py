"""Streams of other resolutions: the same air in every window, whatever store it is read from."""

import numpy as np
import pytest
import torch
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from atmossl.batch import PRIMARY, StreamSpec, StreamWindow, TokenSize, token_grid
from atmossl.checkpoint_files import migrated
from atmossl.data.loader import SampleKey, WindowDataset
from atmossl.data.segment import Segment, check_window
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import entries_of, open_segment, paired
from atmossl.data.windows import Normaliser, Statistics, WindowSize, read_windows
from atmossl.geometry import Box, Grid, Nesting, latitude_edges, random_box
from atmossl.masking.base import TokenLayout, points_of
from atmossl.masking.places import Inpainting, LatLonBox
from atmossl.masking.random import BlockMasking, RandomMasking, TimeBlockMasking
from atmossl.masking.tasks import Downscaling, Forecast, Hindcast, TemporalInterpolation
from tests.synthetic import dataset

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 850)
FINE = dataset(num_lat=16, num_lon=32, levels=LEVELS, steps=24)
FINE = FINE.assign_coords(longitude=FINE.longitude + 0.5 * 360 / 32)  # edges at Greenwich
COARSE = FINE.coarsen(latitude=2, longitude=2).mean().isel(time=slice(1, None, 2))
SPECS = (
    StreamSpec("fine", NAMES, LEVELS, TokenSize(1, 2, 2)),
    StreamSpec("coarse", NAMES[:1], LEVELS, TokenSize(1, 2, 2), data="reduced"),
)


def opened(store: xr.Dataset, name: str = "waves") -> Segment:
    variables = [str(v) for v in store.data_vars]
    return open_segment(name, store, name, variables=variables, levels=LEVELS)


def pair(fine: xr.Dataset = FINE, coarse: xr.Dataset = COARSE) -> Segment:
    (segment,) = paired({PRIMARY: [opened(fine)], "reduced": [opened(coarse)]})
    return segment


def windows(start: int, box: Box, count: int = 8) -> tuple[StreamWindow, ...]:
    statistics = compute_statistics([opened(FINE)])
    scale = Normaliser({PRIMARY: statistics, "reduced": statistics})
    (found,) = read_windows(pair(), SPECS, scale, count, [(start, box)])
    return found


def global_grid(num_lat: int, num_lon: int, west: float = 0.0) -> Grid:
    height, width = 180 / num_lat, 360 / num_lon
    rows = -90 + height * (np.arange(num_lat) + 0.5)
    return Grid(rows, west % width + width * (np.arange(num_lon) + 0.5))


def edges(grid: Grid, box: Box) -> tuple[float, float, float, float]:
    """South, north, west (0 to 360) and width of a box, in degrees."""
    lat, spacing = latitude_edges(grid.latitude), grid.longitude_spacing
    west = grid.longitude[box.lon_index(grid.shape[1])[0]] - spacing / 2
    south, north = lat[box.lat_start], lat[box.lat_start + box.lat_size]
    return south, north, round(west, 6) % 360.0, box.lon_size * spacing


@settings(deadline=None, max_examples=80)
@given(
    blocks=st.tuples(st.integers(3, 6), st.integers(4, 8)),
    lat=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 2)]),
    lon=st.sampled_from([(1, 1), (2, 1), (3, 1), (1, 3)]),
    shift=st.integers(0, 5),
    seed=st.integers(0, 99),
)
def test_a_nested_window_has_the_same_edges(blocks, lat, lon, shift: int, seed: int) -> None:
    """Of global grids, whose longitudes start anywhere."""
    rows, columns = blocks
    fine = global_grid(rows * lat[0], columns * lon[0])
    other = global_grid(rows * lat[1], columns * lon[1])
    turned = (fine.longitude + shift * fine.longitude_spacing) % 360.0
    fine = Grid(fine.latitude, np.sort(turned))
    nesting = Nesting.of(fine, other)
    (segment,) = paired({PRIMARY: [on_grid(fine)], "other": [on_grid(other)]})
    sizes = 2 * nesting.lat.cells * nesting.lon.cells, 3 * nesting.lat.cells * nesting.lon.cells
    if sizes[0] > fine.shape[0] or sizes[1] > fine.shape[1]:
        return
    box = random_box(fine, *sizes, np.random.default_rng(seed), segment.alignment)
    np.testing.assert_allclose(edges(fine, box), edges(other, nesting.box(box)), atol=1e-5)


def on_grid(grid: Grid) -> Segment:
    values = np.zeros((2, *grid.shape), np.float32)
    values[1] = 1.0
    coords = {
        "time": np.array(["2001-01-01", "2001-01-02"], "datetime64[ns]"),
        "latitude": grid.latitude,
        "longitude": grid.longitude,
    }
    store = xr.Dataset({"temperature": (("time", "latitude", "longitude"), values)}, coords)
    return open_segment("ones", store, "ones", variables=["temperature"], levels=[])


def test_a_region_nests_in_the_globe_across_greenwich() -> None:
    whole = global_grid(18, 36)
    region = Grid(global_grid(36, 72).latitude[8:20], 350 + 5 * (np.arange(8) + 0.5))
    nesting = Nesting.of(region, whole)
    box = Box(2, 4, 6, 4)
    assert nesting.box(box) == Box(5, 1, 3, 2)
    for misfit in (global_grid(18, 36, west=1.0), global_grid(20, 36), global_grid(18, 40)):
        with pytest.raises(ValueError, match="do not nest"):
            Nesting.of(region, misfit)
    with pytest.raises(ValueError, match="do not nest"):  # the other one covers too little
        Nesting.of(whole, region)


@pytest.mark.parametrize("start", [0, 1, 5])
@pytest.mark.parametrize("box", [Box(4, 6, 8, 12), Box(0, 28, 8, 8), Box(8, 0, 8, 32)])
def test_windows_hold_the_same_air(start: int, box: Box) -> None:
    """The coarse store holds means of the fine one, so its windows hold means of the fine ones."""
    fine, coarse = windows(start, box)
    assert coarse.fields.shape == (1, 2, 4, box.lat_size // 2, box.lon_size // 2)
    times = fine.time_hours.tolist()
    steps = [times.index(hour) for hour in coarse.time_hours.tolist()]
    assert steps == list(range(1 - start % 2, 8, 2))
    shared = fine.fields[:1][:, :, steps].unflatten(-1, (-1, 2)).mean(-1)
    torch.testing.assert_close(
        shared.unflatten(-2, (-1, 2)).mean(-2), coarse.fields, atol=1e-4, rtol=1e-5
    )
    torch.testing.assert_close(fine.lat.unflatten(0, (-1, 2)).mean(1), coarse.lat)
    assert token_grid(fine).periodic == token_grid(coarse).periodic == (box.lon_size == 32)


def hidden_bounds(layout: TokenLayout, hidden: Tensor) -> dict[str, set[float]]:
    """Coordinates of the hidden points, per axis."""
    points = points_of(hidden, layout.spec)
    times = layout.point_times().flatten()[points.any(dim=(0, 2, 3))]
    return {
        "time": set(times.tolist()),
        "lat": set(layout.point_lat()[points.any(dim=(0, 1, 3))].tolist()),
        "lon": set(layout.point_lon()[points.any(dim=(0, 1, 2))].tolist()),
    }


@pytest.mark.parametrize("start", [0, 3])
@pytest.mark.parametrize(
    "task",
    [
        Forecast(24),
        Forecast(18),
        Hindcast(24),
        TemporalInterpolation(12),
        TimeBlockMasking((1, 2)),
        TimeBlockMasking((1, 2), causal=True),
    ],
    ids=repr,
)
def test_tasks_hide_the_same_times_of_both(task, start: int) -> None:
    layouts = tuple(TokenLayout(w.spec, token_grid(w)) for w in windows(start, Box(4, 6, 8, 12)))
    for seed in range(8):
        masks = task(layouts, np.random.default_rng(seed))
        fine, coarse = (
            hidden_bounds(layout, mask.hidden)["time"]
            for layout, mask in zip(layouts, masks, strict=True)
        )
        shared = set(layouts[1].point_times().flatten().tolist())
        assert fine & shared == coarse


@pytest.mark.parametrize("sampler", [BlockMasking(), RandomMasking(synced=True)], ids=repr)
def test_random_masks_hide_the_same_air_of_both(sampler) -> None:
    """What is hidden of the fine store, at the steps of the coarse one, in means over its cells."""
    for start in (0, 3):
        layouts = tuple(
            TokenLayout(w.spec, token_grid(w)) for w in windows(start, Box(4, 28, 8, 8))
        )
        times = [layout.point_times().flatten().tolist() for layout in layouts]
        shared = [times[0].index(hour) for hour in times[1]]
        for seed in range(20):
            masks = sampler(layouts, np.random.default_rng(seed))
            fine, coarse = (
                points_of(m.hidden, x.spec) for m, x in zip(masks, layouts, strict=True)
            )
            cells = fine[..., shared, :, :].unflatten(-1, (-1, 2)).unflatten(-3, (-1, 2))
            assert torch.equal(cells.all(-1).all(-2), coarse)
            assert torch.equal(cells.any(-1).any(-2), coarse)


def test_tasks_hide_the_same_places_of_both() -> None:
    layouts = tuple(TokenLayout(w.spec, token_grid(w)) for w in windows(0, Box(4, 28, 8, 8)))
    box = LatLonBox(-22.5, 0.0, 337.5, 22.5)
    fine, coarse = Inpainting((box,)).hidden_points(layouts)
    halves = fine.unflatten(-1, (-1, 2)).all(-1).unflatten(-2, (-1, 2)).all(-2)
    assert 0 < int(fine.sum()) < fine.numel()
    assert torch.equal(halves[:, :4], coarse)


def test_coarse_cells_are_the_same_cells() -> None:
    layouts = tuple(TokenLayout(w.spec, token_grid(w)) for w in windows(0, Box(4, 28, 8, 8)))
    rng = np.random.default_rng(0)
    by_four, by_two = Downscaling(4)(layouts, rng), Downscaling(2)(layouts, rng)
    assert [mask.coarsen_factor for mask in by_four] == [4, 2]
    assert bool(by_two[0].hidden.all()) and not bool(by_two[1].hidden.any())
    drawn = RandomMasking((0.5, 0.5), {"coarsen": 1.0}, coarsen_factor=2)(layouts, rng)
    assert bool(drawn[0].hidden.any()) and not bool(drawn[1].hidden.any())
    with pytest.raises(ValueError, match="choose another factor"):
        Downscaling(3)(layouts, rng)


def test_samples_of_two_resolutions_collate_and_repeat() -> None:
    stores = {PRIMARY: FINE, "reduced": COARSE}
    both = Normaliser({name: compute_statistics([opened(s)]) for name, s in stores.items()})
    arguments = {
        "segments": [pair()], "specs": SPECS, "normaliser": both, "seed": 1,
        "window": WindowSize(8, 8, 8), "sampler": Forecast(24),
    }  # fmt: skip
    data = WindowDataset(**arguments)
    ((view,), _), ((again,), _) = data[SampleKey(0, 3)], data[SampleKey(0, 3)]
    fine, coarse = view.streams
    assert fine.corruption.shape == (2, 8, 4, 4) and coarse.corruption.shape == (2, 4, 2, 2)
    assert torch.equal(coarse.target, again.streams[1].target)
    # each entry by its own statistics: about zero mean and unit variance over all samples
    values = torch.cat([data[SampleKey(0, n)][0][0].streams[1].target for n in range(len(data))])
    assert abs(float(values.mean())) < 0.5 and 0.5 < float(values.std()) < 1.5


def test_only_common_periods_are_sampled() -> None:
    later = COARSE.isel(time=slice(4, 9))
    segment = pair(coarse=later)
    assert segment.times[0] == later.time.values[0] - np.timedelta64(6, "h") and segment.partial
    assert segment.times[-1] == later.time.values[-1] + np.timedelta64(6, "h")
    for start in range(len(segment.times) - 3):
        place = segment.place("reduced", start, 4, segment.whole())
        assert place.count == 2 and 0 <= place.start <= len(later.time) - 2
    with pytest.raises(ValueError, match="no two steps in common"):
        pair(coarse=COARSE.assign_coords(time=COARSE.time + np.timedelta64(3650, "D")))


def test_segments_pair_by_name() -> None:
    """Members of an ensemble cover the same dates."""
    fine, coarse = [opened(FINE, n) for n in "ab"], [opened(COARSE, n) for n in "ba"]
    found = paired({PRIMARY: fine, "reduced": coarse})
    assert [(s.name, s.auxiliaries["reduced"].segment.name) for s in found] == [
        ("a", "a"),
        ("b", "b"),
    ]
    assert len(paired({PRIMARY: fine, "reduced": [opened(COARSE, "c")]})) == 2
    assert len(paired({PRIMARY: fine, "reduced": coarse[:1]})) == 1


@pytest.mark.parametrize(
    ("coarse", "message"),
    [
        (COARSE.assign_coords(latitude=COARSE.latitude + 1.0), "do not nest"),
        (COARSE.assign_coords(time=COARSE.time + np.timedelta64(1, "h")), "needed: a multiple"),
        (FINE.isel(time=slice(None, None, 2)).isel(longitude=slice(0, 8)), "do not nest"),
    ],
)
def test_what_does_not_nest_is_named(coarse: xr.Dataset, message: str) -> None:
    with pytest.raises(ValueError, match=f"data=reduced: .*{message}"):
        pair(coarse=coarse)


@pytest.mark.parametrize(
    ("size", "message"),
    [
        ((7, 8, 8), "3.5 of the 12 h of data=reduced"),
        ((8, 7, 8), "window.lat=7 is no multiple of the 2 cells"),
        ((8, 2, 8), "1 x 4 of data=reduced"),
    ],
)
def test_a_window_that_cuts_cells_is_named(size: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_window(pair(), *size)


def test_every_stream_is_normalised_by_the_statistics_of_its_own_source() -> None:
    own, other = compute_statistics([opened(FINE)]), compute_statistics([opened(COARSE)])
    both = Normaliser({PRIMARY: own, "reduced": Statistics.from_dict(other.to_dict())})
    for spec, single in zip(SPECS, (own, other), strict=True):
        row = [single.variables.index(name) for name in spec.variables]
        for field in ("mean", "std"):
            expected = torch.from_numpy(getattr(single, field)[row]).float()
            assert torch.equal(both.values(spec, field)[..., 0, 0, 0], expected)


def test_a_checkpoint_of_format_3_names_its_primary_source() -> None:
    own, other = compute_statistics([opened(FINE)]), compute_statistics([opened(COARSE)])
    stored = {
        "format": 3,
        "streams": [{"name": "fine"}, {"name": "plain", "data": ""}, {"name": "c", "data": "era5"}],
        "seen": {"": {"days": [1]}, "era5": {"days": [2]}},
        "statistics": {**own.to_dict(), "others": {"era5": other.to_dict()}},
    }
    record = migrated(stored)
    assert [stream["data"] for stream in record["streams"]] == [PRIMARY, PRIMARY, "era5"]
    assert record["seen"] == {PRIMARY: {"days": [1]}, "era5": {"days": [2]}}
    assert record["statistics"] == {PRIMARY: own.to_dict(), "era5": other.to_dict()}


def test_an_unknown_entry_is_named() -> None:
    with pytest.raises(ValueError, match="reduced"):
        entries_of(SPECS, "sample", None)

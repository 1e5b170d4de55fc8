"""Mirrored windows hold an atmosphere that could be: winds, sun and clock fit together."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY, StreamSpec, StreamWindow, TokenSize
from atmossl.data.forcings import FORCINGS
from atmossl.data.loader import SampleKey, WindowDataset
from atmossl.data.mirror import check_mirror, mirror_sign, mirrored
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.variables import Kind, Transform
from atmossl.data.windows import Normaliser, Statistics, WindowSize
from atmossl.masking.random import RandomMasking
from tests.synthetic import dataset, spec, window

EARTH_RADIUS = 6.371e6
DAY_HOURS = 24
HALF_YEAR_HOURS = 183 * DAY_HOURS  # the whole number of days next to half of 365.2425


def normaliser(names: tuple[str, ...], mean: float = 0.0, std: float = 1.0) -> Normaliser:
    one = np.ones((len(names), 1))
    statistics = Statistics(names, (0,), mean * one, std * one, one, period="", fingerprint="")
    return Normaliser({PRIMARY: statistics})


def window_of(
    names: tuple[str, ...], fields: np.ndarray, lat: np.ndarray, lon: np.ndarray, hours: np.ndarray
) -> StreamWindow:
    stream = StreamSpec("air", names, (), TokenSize(1, 1, 1))
    return StreamWindow(
        spec=stream,
        fields=torch.from_numpy(fields)[:, None],  # [variable level time lat lon]
        time_hours=torch.from_numpy(hours),
        level_hpa=torch.zeros(1),
        lat=torch.from_numpy(lat),
        lon=torch.from_numpy(lon),
        weight=torch.from_numpy(np.cos(np.deg2rad(lat))),
    )


def vorticity_and_divergence(
    u: np.ndarray, v: np.ndarray, lat: np.ndarray, lon: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """By finite differences on the sphere, s-1 [lat lon], without the first and the last row."""
    cosine = np.cos(np.deg2rad(lat))[:, None]
    step = np.deg2rad(lon[1] - lon[0])

    def along_lon(x: np.ndarray) -> np.ndarray:
        return (np.roll(x, -1, 1) - np.roll(x, 1, 1)) / (2 * step)

    def along_lat(x: np.ndarray) -> np.ndarray:
        return np.gradient(x, np.deg2rad(lat), axis=0)

    turning = (along_lon(v) - along_lat(u * cosine)) / (EARTH_RADIUS * cosine)
    spreading = (along_lon(u) + along_lat(v * cosine)) / (EARTH_RADIUS * cosine)
    return turning[1:-1], spreading[1:-1]


@pytest.mark.parametrize("ascending", [True, False])
def test_vorticity_of_mirrored_winds_changes_sign_and_their_divergence_stays(
    ascending: bool,
) -> None:
    rng = np.random.default_rng(3)
    lat = np.linspace(-20.0, 70.0, 19)[:: 1 if ascending else -1].copy()  # no symmetric window
    lon = np.arange(0.0, 360.0, 10.0)
    names = ("u_component_of_wind", "v_component_of_wind", "vorticity", "divergence")
    wind = 10 * rng.standard_normal((2, 1, len(lat), len(lon)))
    turning, spreading = vorticity_and_divergence(wind[0, 0], wind[1, 0], lat, lon)
    pad = ((0, 0), (1, 1), (0, 0))
    both = [np.pad(field[None], pad) for field in (turning, spreading)]
    scales = normaliser(names, mean=3.0, std=2.0)
    physical = np.stack([wind[0], wind[1], *both])
    before = window_of(names, (physical - 3.0) / 2.0, lat, lon, np.zeros(1))
    (after,) = mirrored([before], scales)
    u, v, vorticity, divergence = (2.0 * after.fields[:, 0, 0] + 3.0).numpy()
    expected = vorticity_and_divergence(u, v, after.lat.numpy(), lon)
    np.testing.assert_allclose(vorticity[1:-1], expected[0], atol=1e-12)
    np.testing.assert_allclose(divergence[1:-1], expected[1], atol=1e-12)
    np.testing.assert_array_equal(np.sign(np.diff(after.lat)), np.sign(np.diff(lat)))
    np.testing.assert_allclose(after.weight, np.cos(np.deg2rad(after.lat.numpy())))


@pytest.mark.parametrize("name", sorted(FORCINGS))
def test_mirrored_forcings_are_those_of_the_mirrored_place_and_date(name: str) -> None:
    """The sun is as high as at the new place and date; its distance and the equation of time
    differ by some percent."""
    start = np.datetime64("1979-01-15T03", "ns")
    hours = (start - np.datetime64("1970-01-01", "ns")) / np.timedelta64(1, "h") + np.arange(
        0, 24, 6
    )
    lat, lon = np.linspace(-60.0, 80.0, 15), np.arange(0.0, 360.0, 30.0)

    def at(hours: np.ndarray, lat: np.ndarray) -> np.ndarray:
        times = np.datetime64("1970-01-01", "ns") + (hours * 3.6e12).astype("timedelta64[ns]")
        return FORCINGS[name](times, lat, lon)

    before = window_of((name,), at(hours, lat)[None].copy(), lat, lon, hours)
    (after,) = mirrored([before], normaliser((name,)))
    expected = at(after.time_hours.numpy(), after.lat.numpy())
    np.testing.assert_allclose(
        after.fields[0, 0].numpy(), expected, atol=0.08 * float(np.abs(expected).max())
    )
    np.testing.assert_array_equal(after.time_hours - before.time_hours, HALF_YEAR_HOURS)


def test_mirrored_twice_is_the_window_a_year_later() -> None:
    names = ("temperature", "v_component_of_wind")
    before = window(spec(variables=names, levels=(0,)))
    valid = torch.rand(before.fields.shape, generator=torch.Generator().manual_seed(1)) > 0.3
    before = replace(before, valid=valid)
    scales = normaliser(names, mean=1.0, std=4.0)
    (after,) = mirrored(mirrored([before], scales), scales)
    torch.testing.assert_close(after.fields, before.fields, rtol=0, atol=1e-6)
    assert after.valid is not None and torch.equal(after.valid, valid)
    assert torch.equal(after.lat, before.lat) and torch.equal(after.weight, before.weight)
    assert set((after.time_hours - before.time_hours).tolist()) == {2 * HALF_YEAR_HOURS}


def test_only_northward_winds_and_vorticities_change_sign() -> None:
    changing = {"v_component_of_wind", "10m_v_component_of_wind", "vorticity", "sin_latitude"}
    same = {"u_component_of_wind", "temperature", "divergence", "vertical_velocity"}
    assert {mirror_sign(name) for name in changing} == {-1.0}
    assert {mirror_sign(name) for name in same} == {1.0}


@pytest.fixture(scope="module")
def record() -> tuple[Segment, Normaliser]:
    stream = spec()
    segment = open_segment(
        "waves", dataset(steps=12), "memory", variables=stream.variables, levels=stream.levels
    )
    return segment, Normaliser({PRIMARY: compute_statistics([segment])})


def first_hours(record: tuple[Segment, Normaliser], **changes: Any) -> list[float]:
    """Hours since 1970 of the first step of every sample."""
    segment, scales = record
    samples = WindowDataset(
        segments=[segment], specs=[spec()], normaliser=scales, seed=1, windows_per_time=8,
        window=WindowSize(2, 8, 8), sampler=RandomMasking((0.5, 0.5)), **changes,
    )  # fmt: skip
    return [
        float(samples[SampleKey(0, number)][0][0].streams[0].grid.time_hours[0])
        for number in range(len(samples))
    ]


def test_so_many_samples_are_mirrored_as_are_asked_for(
    record: tuple[Segment, Normaliser],
) -> None:
    plain = np.array(first_hours(record))
    none, all_of_them, half = (
        np.array(first_hours(record, mirror=share)) for share in (0.0, 1.0, 0.5)
    )
    np.testing.assert_array_equal(none, plain)
    np.testing.assert_array_equal(all_of_them, plain + HALF_YEAR_HOURS)
    share = float((half > plain + HALF_YEAR_HOURS / 2).mean())
    assert 0.3 < share < 0.7  # of 88 samples
    np.testing.assert_array_equal(half, first_hours(record, mirror=0.5))


@pytest.mark.parametrize("kind", ["log", "sqrt"])
def test_a_transformed_variable_is_mirrored_too(kind: Kind) -> None:
    names = ("v_component_of_wind",)
    scales = normaliser(names, mean=0.3, std=2.0)
    transforms = {names[0]: Transform(kind, 2.0)}
    statistics = replace(scales.statistics[PRIMARY], transforms=transforms)
    scales = Normaliser({PRIMARY: statistics})
    before = window(spec(variables=names, levels=()))
    wind = 10 * before.fields
    before = replace(before, fields=scales.forward(wind, before.spec))
    (after,) = mirrored([before], scales)
    expected = -wind.flip(-2)
    torch.testing.assert_close(scales.inverse(after.fields, before.spec), expected)


def test_a_variable_in_units_of_its_place_and_month_is_refused() -> None:
    names = ("temperature",)
    scales = normaliser(names)
    check_mirror([spec(variables=names, levels=())], scales)
    normals: Any = {"temperature": object()}
    statistics = replace(scales.statistics[PRIMARY], normals=normals)
    with pytest.raises(ValueError, match=r"data\.mirror: temperature .*set data\.mirror=0"):
        check_mirror([spec(variables=names, levels=())], Normaliser({PRIMARY: statistics}))

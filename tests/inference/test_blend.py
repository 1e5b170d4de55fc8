"""Ensembles in the overlap of tiles."""

import numpy as np

from atmossl.geometry import Box
from atmossl.inference.tiles import TileBlender
from tests.synthetic import spec

LEVELS = (300, 500)


def blended(tiles: list[np.ndarray], shares: list[float]) -> np.ndarray:
    mosaic = TileBlender(num_lon=8, levels={"temperature": LEVELS[: tiles[0].shape[2]]})
    stream = spec(variables=("temperature",), levels=LEVELS[: tiles[0].shape[2]])
    for values, share in zip(tiles, shares, strict=True):
        weight = np.full(values.shape[-2:], share)
        mosaic.add(stream, values[None], Box(0, 0, 4, 8), weight)
    return mosaic.take(4)[1]["temperature"]


def test_overlap_keeps_the_mean_and_the_spread_of_unrelated_members() -> None:
    """Weighted means of both tiles' ensemble means and variances, in float64."""
    rng = np.random.default_rng(0)
    first = rng.normal(5.0, 2.0, (1, 6, 2, 4, 8)).astype("f4")
    second = rng.normal(4.0, 3.0, (1, 6, 2, 4, 8)).astype("f4")
    found = blended([first, second], [0.25, 0.75])
    one, two = first.astype("f8"), second.astype("f8")
    mean = 0.25 * one.mean(axis=1) + 0.75 * two.mean(axis=1)
    variance = 0.25 * one.var(axis=1) + 0.75 * two.var(axis=1)
    np.testing.assert_allclose(found.mean(axis=1), mean, rtol=1e-5)
    np.testing.assert_allclose(found.var(axis=1), variance, rtol=1e-3)


def test_a_tile_alone_stays_as_it_is() -> None:
    values = np.random.default_rng(1).normal(280, 5, (2, 5, 1, 4, 8)).astype("f4")
    np.testing.assert_array_equal(blended([values], [1.0]), values)


def test_one_member_and_given_values_stay_finite() -> None:
    alone = np.random.default_rng(2).normal(0, 1, (1, 1, 1, 4, 8)).astype("f4")
    np.testing.assert_allclose(blended([alone, alone], [0.5, 0.5]), alone, rtol=1e-6)
    given = np.broadcast_to(alone, (1, 3, 1, 4, 8)).copy()
    np.testing.assert_allclose(blended([given, given], [0.5, 0.5]), given, rtol=1e-6)

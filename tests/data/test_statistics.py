"""Statistics against float64 numpy, over the training period alone."""

import numpy as np
import pytest
import torch

from atmossl.data.statistics import Normaliser, Statistics, load_or_compute
from atmossl.data.store import open_segment
from tests.synthetic import dataset, spec

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 500, 850)


def segment(store):
    return open_segment("waves", store, "memory", variables=NAMES, levels=LEVELS)


def test_moments_are_those_of_numpy() -> None:
    stores = [dataset(seed=1), dataset(seed=2, steps=40)]
    statistics = Statistics.compute([segment(store) for store in stores])
    for row, name in enumerate(NAMES):
        values = [store[name].values.astype(np.float64) for store in stores]
        weight = np.cos(np.deg2rad(stores[0].latitude.values))[:, None]
        for column in range(3):
            joined = np.concatenate([v[:, column] for v in values])
            wide = np.broadcast_to(weight, joined.shape)
            mean = np.average(joined, weights=wide)
            variance = np.average((joined - mean) ** 2, weights=wide)
            steps = np.concatenate([np.diff(v[:, column], axis=0) for v in values])
            step = np.average(steps**2, weights=np.broadcast_to(weight, steps.shape))
            assert statistics.mean[row, column] == pytest.approx(mean, rel=1e-9)
            assert statistics.std[row, column] == pytest.approx(variance**0.5, rel=1e-9)
            assert statistics.step_std[row, column] == pytest.approx(step**0.5, rel=1e-9)


def test_nothing_outside_the_period_counts() -> None:
    store = dataset(steps=40)
    changed = store.copy(deep=True)
    changed["temperature"][20:] += 1000
    one, two = (segment(s).between("2001-01-01", "2001-01-05") for s in (store, changed))
    np.testing.assert_array_equal(Statistics.compute([one]).mean, Statistics.compute([two]).mean)


def test_normalisation_goes_back() -> None:
    statistics = Statistics.compute([segment(dataset())])
    stream = spec()
    fields = torch.randn(2, 3, 4, 8, 16)
    normaliser = Normaliser(statistics)
    back = normaliser.inverse(normaliser.forward(fields, stream), stream)
    torch.testing.assert_close(back, fields, rtol=1e-5, atol=1e-5)


def test_saved_statistics_are_read_and_stale_ones_are_not(tmp_path) -> None:
    first = load_or_compute([segment(dataset())], tmp_path)
    again = load_or_compute([segment(dataset())], tmp_path)
    other = load_or_compute([segment(dataset(seed=9))], tmp_path)
    np.testing.assert_array_equal(first.mean, again.mean)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert len(list(tmp_path.iterdir())) == 2
    back = Statistics.from_dict(first.to_dict())
    np.testing.assert_array_equal(back.std, first.std)


def test_a_constant_field_is_refused() -> None:
    store = dataset()
    store["temperature"][:] = 250.0
    with pytest.raises(ValueError, match="never changes"):
        Statistics.compute([segment(store)])

"""A fraction of the records is unbroken blocks of time, and nothing else of them is used."""

from datetime import timedelta

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.batch import PRIMARY
from atmossl.data.fraction import blocks_of_time, part_of_records
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment, paired
from tests.synthetic import dataset

LEVELS = (300, 850)


def opened(store: xr.Dataset, name: str) -> Segment:
    variables = [str(variable) for variable in store.data_vars]
    return open_segment(name, store, name, variables=variables, levels=LEVELS)


STORES = {
    name: dataset(num_lat=8, num_lon=16, levels=LEVELS, steps=40, start=start, seed=seed)
    for seed, (name, start) in enumerate((("one", "2001-01-01"), ("two", "2003-01-01")))
}
RECORDS = [opened(store, name) for name, store in STORES.items()]


@settings(deadline=timedelta(seconds=5), max_examples=200)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=1, max_size=6),
    fractions=st.tuples(st.floats(0.001, 1.0), st.floats(0.001, 1.0)),
    seed=st.integers(0, 99),
)
def test_a_fraction_is_few_blocks_and_holds_the_smaller_ones(lengths, fractions, seed) -> None:
    small, large = (blocks_of_time(lengths, part, seed) for part in sorted(fractions))
    for part, blocks in zip(sorted(fractions), (small, large), strict=True):
        assert sum(map(len, blocks.values())) == max(1, round(part * sum(lengths)))
        assert all(0 <= b.start < b.stop <= lengths[n] and b.step == 1 for n, b in blocks.items())
        assert sum(len(block) < lengths[number] for number, block in blocks.items()) <= 1
    assert all(set(block) <= set(large[number]) for number, block in small.items())
    assert blocks_of_time(lengths, 1.0, seed) == {n: range(k) for n, k in enumerate(lengths)}


def test_seeds_choose_other_blocks() -> None:
    starts = {
        (number, block.start)
        for seed in range(30)
        for number, block in blocks_of_time([400, 400], 0.1, seed).items()
    }
    assert len(starts) > 25 and {number for number, _ in starts} == {0, 1}


def test_statistics_are_those_of_the_used_steps() -> None:
    (used,) = part_of_records({PRIMARY: RECORDS}, 0.2, 3, window_steps=5)[PRIMARY]
    assert len(used.times) == 16 and used.partial
    fields = STORES[used.name].sel(time=used.times)
    weight = np.sin(np.deg2rad(fields.latitude + 90 / 8)) - np.sin(
        np.deg2rad(fields.latitude - 90 / 8)
    )
    found = compute_statistics([used])
    for row, name in enumerate(found.variables):
        expected = fields[name].astype(float).weighted(weight)
        dims = ("time", "latitude", "longitude")
        np.testing.assert_allclose(found.mean[row], expected.mean(dims), rtol=1e-5)
        np.testing.assert_allclose(found.std[row], expected.std(dims), rtol=1e-4)


def test_other_sources_are_cut_to_the_same_periods() -> None:
    coarse = [
        opened(store.coarsen(latitude=2, longitude=2).mean().isel(time=slice(1, None, 2)), name)
        for name, store in STORES.items()
    ]
    records = {PRIMARY: RECORDS, "reduced": coarse}
    used = part_of_records(records, 0.2, 3, window_steps=5)
    (fine,), (other,) = used[PRIMARY], used["reduced"]
    assert other.record_name == fine.record_name
    assert fine.times[0] - fine.step <= other.times[0] and other.times[-1] <= fine.times[-1]
    (pair,) = paired(used)
    assert set(pair.times) <= set(fine.times) and len(pair.times) >= len(fine.times) - 1


def test_a_fraction_below_a_window_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data.fraction=0.01 of 80 steps is a block of 1, short"):
        part_of_records({PRIMARY: RECORDS}, 0.01, 0, window_steps=5)

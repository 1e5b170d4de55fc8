"""The shipped sample: whole runs per split, plausible, dated, licensed, finely packed."""

import numpy as np
import pytest

from atmossl.data.catalog import catalog_entry
from atmossl.data.store import Segment, open_split

# Generous physical limits of monthly extremes at 300 to 850 hPa, in the variables' units.
LIMITS = {
    "temperature": (180, 330),
    "u_component_of_wind": (-100, 130),
    "v_component_of_wind": (-110, 110),
    "geopotential": (5_000, 100_000),
    "specific_humidity": (-0.005, 0.03),  # the spectral core undershoots in dry air
}
MIN_DAYS = 10


def segments() -> list[tuple[str, Segment]]:
    entry = catalog_entry("sample")
    names, levels = sorted(LIMITS), (300, 500, 850)
    return [
        (split, segment)
        for split in ("train", "validation", "test")
        for segment in open_split(entry, split, variables=names, levels=levels)
    ]


def test_six_whole_runs_and_no_run_in_two_splits() -> None:
    found = segments()
    assert len(found) == len({segment.location for _, segment in found}) == 6
    for split, segment in found:
        assert segment.grid.shape == (32, 64) and segment.grid.periodic
        assert segment.step_hours == 6
        assert len(segment.times) >= MIN_DAYS * 4
        assert segment.name.startswith("run_"), split


@pytest.mark.parametrize("number", range(6))
def test_values_are_plausible_and_packed_finely(number: int) -> None:
    _, segment = segments()[number]
    for name, (low, high) in LIMITS.items():
        values = segment.read(name, (300, 500, 850), 0, len(segment.times), segment.whole())
        assert low < values.min() and values.max() < high, name
        error = np.array(segment.dataset[name].attrs["packing_rms_error"])
        change = np.diff(values.astype(np.float64), axis=1).std(axis=(1, 2, 3))
        assert (error < 0.02 * change).all(), f"{name}: {error} of a 6-hourly change of {change}"


def test_runs_are_no_twins() -> None:
    """Two runs differ like unrelated states of one run do, in the deviation from the mean."""
    runs = [
        segment.read("geopotential", (500,), 0, len(segment.times), segment.whole())[0]
        for _, segment in segments()
    ]
    mean = np.mean([run.mean(axis=0) for run in runs], axis=0)
    size = np.std([run - mean for run in runs])
    for one in range(6):
        for two in range(one):
            assert np.std(runs[one] - runs[two]) > 0.8 * np.sqrt(2) * size

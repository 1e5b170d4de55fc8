"""The benchmark's catalog, and the entries of the poor model in that of the package."""

from pathlib import Path

import pytest

from atmossl.data.catalog import catalog_entry
from benchmarks.correction import KINDS, written_catalog


@pytest.mark.parametrize("name", ["degraded_sample", "degraded_sample_coarse"])
def test_the_poor_model_has_the_splits_of_the_sample_in_stores_of_the_folder(
    name: str, tmp_path: Path
) -> None:
    (tmp_path / "degraded_sample").mkdir()  # made already
    entry = catalog_entry(name, written_catalog(tmp_path))
    sample = catalog_entry("sample")
    assert entry.splits == sample.splits and list(entry.segments) == list(sample.segments)
    kind = "coarse" if name.endswith("coarse") else "same"
    places = {s.location for s in entry.segments.values()}
    assert places == {f"{tmp_path}/degraded_sample/{kind}/run_{n}.zarr" for n in range(6)}
    assert f"stream.other_model.data={name}" in KINDS["coarse"] or name == "degraded_sample"

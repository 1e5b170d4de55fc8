"""Statistics against float64 numpy, over the training period alone."""

import json
import os
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from atmossl.batch import PRIMARY
from atmossl.data import statistics as module
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry, catalog_entry
from atmossl.data.chunks import Access
from atmossl.data.fingerprint import _spread_chunks, agree, fingerprint, identity
from atmossl.data.statistics import compute_statistics, load_or_compute, outside_limits
from atmossl.data.store import open_segment, open_split
from atmossl.data.variables import Transform
from atmossl.data.windows import Normaliser, Statistics
from tests.processes import CONTEXT, HANGS_AFTER_SECONDS
from tests.synthetic import dataset, spec

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 500, 850)


def segment(store):
    return open_segment("waves", store, "memory", variables=NAMES, levels=LEVELS)


def test_moments_are_those_of_numpy() -> None:
    stores = [dataset(seed=1), dataset(seed=2, steps=40)]
    statistics = compute_statistics([segment(store) for store in stores])
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
    np.testing.assert_array_equal(compute_statistics([one]).mean, compute_statistics([two]).mean)


def test_normalisation_goes_back() -> None:
    statistics = compute_statistics([segment(dataset())])
    stream = spec()
    fields = torch.randn(2, 3, 4, 8, 16)
    normaliser = Normaliser({PRIMARY: statistics})
    back = normaliser.inverse(normaliser.forward(fields, stream), stream)
    torch.testing.assert_close(back, fields, rtol=1e-5, atol=1e-4)


def test_saved_statistics_are_read_and_stale_ones_are_refused(tmp_path) -> None:
    first = load_or_compute([segment(dataset())], tmp_path)
    again = load_or_compute([segment(dataset())], tmp_path)
    np.testing.assert_array_equal(first.mean, again.mean)
    changed = dataset()
    changed["temperature"][12] += 1.0  # in the middle
    with pytest.raises(ValueError, match=r"statistics-.*\.json was computed from another state"):
        load_or_compute([segment(changed)], tmp_path)
    other = load_or_compute([segment(changed)], tmp_path, force=True)
    assert first.fingerprint == again.fingerprint != other.fingerprint
    assert other.mean[0, 0] != first.mean[0, 0]
    np.testing.assert_array_equal(load_or_compute([segment(changed)], tmp_path).mean, other.mean)
    load_or_compute([segment(changed).between("2001-01-02", "2001-01-04")], tmp_path)
    assert len(list(tmp_path.iterdir())) == 2  # another period is another question
    back = Statistics.from_dict(first.to_dict())
    np.testing.assert_array_equal(back.std, first.std)


def test_checksums_of_ingest_enter_the_fingerprint_within_the_period() -> None:
    """A change anywhere in the period is seen, one outside of it does not matter."""
    store, seen = dataset(steps=40), []
    for changed in (None, "temperature-8", "temperature-32"):
        notes = {f"temperature-{start}": "a" for start in range(0, 40, 8)}
        store.attrs["checksums"] = notes | ({changed: "b"} if changed else {})
        seen.append(fingerprint([segment(store).between("2001-01-01", "2001-01-05")]))
    assert seen[0] == seen[2] != seen[1]


@pytest.mark.parametrize("engine", ["zarr", "auto"])
@pytest.mark.parametrize("form", [2, 3])
def test_a_chunk_anywhere_that_has_another_size_is_seen(tmp_path, engine: str, form: int) -> None:
    """Away from first, middle and last field; another period, and another folder, do not matter."""
    store, seen = dataset(steps=48), []
    changed = store.copy(deep=True)
    changed["temperature"][7:9] = 1.0
    for name, content in (("a", store), ("b", store), ("c", changed)):
        chunks = {v: {"chunks": (2, 3, 8, 16)} for v in NAMES}
        content.to_zarr(tmp_path / name, zarr_format=form, encoding=chunks, consolidated=False)
        entry = SegmentEntry(location=str(tmp_path / name))
        whole = open_segment(name, open_store(entry), str(tmp_path / name), variables=NAMES,
                             levels=LEVELS, access=Access(engine=engine))  # fmt: skip
        seen.append((fingerprint([whole]), fingerprint([whole.between("2001-01-05", "")]),
                     fingerprint([whole.loaded()])))  # fmt: skip
    assert seen[0] == seen[1]
    assert not agree(seen[0][0], seen[2][0]) and agree(seen[0][1], seen[2][1])
    for found in seen:  # what was computed without sizes still counts
        assert "-" in found[0] and "-" not in found[2] and agree(found[0], found[2])


def test_sampled_chunks_are_spread_over_time_and_place() -> None:
    bounds = [range(7), range(100, 500), range(4), range(9)]
    found = np.array(_spread_chunks(bounds, 1))
    assert len(np.unique(found, axis=0)) == len(found) == 32
    assert np.diff(found[:, 1]).max() <= 13 and found[:, 1].min() >= 100
    assert all(len(np.unique(found[:, axis])) > 3 for axis in (0, 2, 3))
    assert _spread_chunks([range(2), range(3)], 0) == list(np.ndindex(2, 3))


def test_embedded_data_are_never_stale() -> None:
    entry = catalog_entry("sample")
    one = open_split(entry, "test", variables=NAMES, levels=LEVELS)[0]
    changed = one.dataset.load().copy(deep=True)
    changed["temperature"][0] += 1.0
    assert identity([one]) != identity([replace(one, dataset=changed)])
    elsewhere = replace(one, location="/data/run.zarr")
    assert identity([elsewhere]) == identity([replace(elsewhere, dataset=changed)])


def test_a_constant_field_is_refused() -> None:
    store = dataset()
    store["temperature"][:] = 250.0
    with pytest.raises(ValueError, match="never changes"):
        compute_statistics([segment(store)])


def test_values_that_the_atmosphere_does_not_have_are_told() -> None:
    store = dataset(variables=("temperature", "u_component_of_wind"))
    assert outside_limits(compute_statistics([segment(store)])) == []
    store["temperature"][3, 1, 2, 2] = -9999.0
    (line,) = outside_limits(compute_statistics([segment(store)]))
    assert line.startswith("temperature goes from -9999 to 25") and "130 to 350" in line
    transforms = {"temperature": Transform("log", 1.0)}
    assert outside_limits(compute_statistics([segment(store)], transforms)) == [line]


def test_a_stopped_pass_goes_on_and_gives_the_same(tmp_path, monkeypatch) -> None:
    """Stopped in the middle, only what is left is read; the result is the same bit for bit."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 3 * 8 * 16 * 5)  # five steps at a time
    store = dataset(steps=23)
    whole = compute_statistics([segment(store)])
    reads: list[int] = []
    original = module.read_block

    def stops(segment, variable, start, *rest):
        reads.append(start)
        if len(reads) in stopped:
            raise KeyboardInterrupt
        return original(segment, variable, start, *rest)

    monkeypatch.setattr(module, "read_block", stops)
    stopped = (4, 9)  # in the first variable, and in the second
    for _ in stopped:
        with pytest.raises(KeyboardInterrupt):
            load_or_compute([segment(store)], tmp_path)
    again = load_or_compute([segment(store)], tmp_path)
    for key in ("mean", "std", "step_std", "minimum", "maximum", "missing"):
        np.testing.assert_array_equal(getattr(again, key), getattr(whole, key))
    assert reads[3:5] == [14, 14] and reads[8:10] == [9, 9]  # blocks that were not finished
    assert len(reads) == 5 + 5 + 2
    assert [path.suffix for path in tmp_path.iterdir()] == [".json"]


def test_a_large_mean_costs_no_precision(monkeypatch) -> None:
    """Values of 1e6 with departures of 1, in blocks, against float64 in two passes."""
    monkeypatch.setattr(module, "_BLOCK_BYTES", 8 * 3 * 8 * 16 * 2)
    store = dataset(steps=30)
    store = store.assign({name: store[name].astype(np.float64) + 1e6 for name in NAMES})
    store["temperature"].attrs["units"] = "K"
    statistics = compute_statistics([segment(store)])
    weight = segment(store).grid.weights[:, None]
    for row, name in enumerate(NAMES):
        values = store[name].values.astype(np.float32).astype(np.float64)
        wide = np.broadcast_to(weight, values[:, 0].shape)
        for column in range(3):
            mean = np.average(values[:, column], weights=wide)
            variance = np.average((values[:, column] - mean) ** 2, weights=wide)
            assert statistics.std[row, column] == pytest.approx(variance**0.5, rel=1e-12)
            assert statistics.minimum[row, column] == values[:, column].min()
            assert statistics.maximum[row, column] == values[:, column].max()


def cut(text: str) -> str:
    return text[: len(text) // 2]


def one_digit(text: str) -> str:
    """Another digit in the first number that has a fraction."""
    place = text.index(".") + 1
    return text[:place] + ("7" if text[place] != "7" else "3") + text[place + 1 :]


DAMAGE = [
    lambda _: "", cut, one_digit, lambda _: "{}", lambda _: "[1]", lambda _: "null",
    lambda text: text.replace('"mean"', '"mead"', 1), lambda _: '{"variables": 3}',
    lambda text: "\0" * len(text),
    lambda _: '{"variables": ["temperature"], "levels": [], "period": "", "fingerprint": ""}',
]  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("sealed", [True, False], ids=["sealed", "of an older version"])
def test_a_damaged_file_is_computed_anew_with_a_note(
    damage, sealed: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    segments = [segment(dataset(steps=6))]
    expected = load_or_compute(segments, folder=tmp_path / "cache").to_dict()
    (path,) = (tmp_path / "cache").iterdir()
    if not sealed:
        if damage is one_digit:
            pytest.skip("older files cannot tell")
        path.write_text(json.dumps(expected))
    path.write_text(damage(path.read_text()))
    assert load_or_compute(segments, folder=tmp_path / "cache").to_dict() == expected
    assert [str(path) in record.getMessage() for record in caplog.records] == [True]
    caplog.clear()
    assert load_or_compute(segments, folder=tmp_path / "cache").to_dict() == expected
    assert caplog.records == []


def test_a_folder_that_cannot_hold_the_statistics_is_named_before_the_pass(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=f"{tmp_path}/file/cache: Not a dir.*set ATMOSSL_CACHE"):
        load_or_compute(
            [segment(dataset(steps=6))],
            folder=tmp_path / "file" / "cache",
            progress=lambda _: pytest.fail("read too early"),
        )


def compute_and_note(cache: Path) -> None:
    """In a process of its own: note a line for every variable of which statistics are computed."""
    compute = module.segment_sums

    def noted(*arguments: Any) -> Any:
        time.sleep(0.1)
        with (cache / "computed").open("a") as file:
            file.write("x")
        return compute(*arguments)

    module.segment_sums = noted
    found = load_or_compute([segment(dataset())], cache)
    (cache / f"{os.getpid()}.json").write_text(json.dumps(found.to_dict()))


def test_one_of_several_processes_computes_and_all_have_the_same(tmp_path: Path) -> None:
    processes = [CONTEXT.Process(target=compute_and_note, args=(tmp_path,)) for _ in range(3)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS_AFTER_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    variables = segment(dataset()).variables
    assert (tmp_path / "computed").read_text() == "x" * len(variables)
    one, *others = [path.read_text() for path in tmp_path.glob("[0-9]*.json")]
    assert others == [one, one]
    assert list(tmp_path.glob(".*.lock")) == []

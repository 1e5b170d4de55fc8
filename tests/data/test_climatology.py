"""Climatologies against float64 in two passes over the whole record."""

import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr

from atmossl.cli import main
from atmossl.data.chunks import Access
from atmossl.data.climatology import Kind, read_monthly, write_climatology
from atmossl.data.segment import Segment
from atmossl.data.store import open_segment
from atmossl.evaluation.baselines import climatology_at
from atmossl.evaluation.climate import Climate
from tests.synthetic import catalog, dataset

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 850)
AXES = {
    "global": (),
    "month": ("month",),
    "cell_month": ("month",),
    "cell_day_hour": ("dayofyear", "hour"),
}


def segment(store: xr.Dataset) -> Segment:
    return open_segment(
        "waves", store, "memory", variables=NAMES, levels=LEVELS, may_miss=["temperature"]
    )


def records() -> list[xr.Dataset]:
    """Two winters, the second with a 29th of February; a large mean, missing values."""
    made = []
    for seed, start in enumerate(("2003-02-20", "2004-02-20")):
        store = dataset(steps=60, start=start, seed=seed, num_lat=4, num_lon=8)
        store["temperature"] += 1e4
        store["temperature"][3:9, :, 1, 2:5] = np.nan
        store["temperature"][:, :, 0, 0] = np.nan  # never observed
        made.append(store)
    return made


def made(tmp_path, kind: Kind, memory_bytes: int = 2**30, **changes) -> xr.Dataset:
    output = tmp_path / f"{kind}.zarr"
    assert write_climatology(
        [segment(s) for s in records()], kind, output, memory_bytes=memory_bytes, **changes
    )
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
    return xr.open_dataset(output, engine="zarr", consolidated=False)


@pytest.mark.parametrize(
    ("kind", "memory_bytes"),
    [
        ("global", 1),
        ("month", 40_000),
        ("cell_month", 1),
        ("cell_month", 2**30),
        ("cell_day_hour", 200_000),
        ("cell_day_hour", 2**30),
    ],
)
def test_slots_have_the_moments_of_their_values(tmp_path, kind: Kind, memory_bytes: int) -> None:
    """Cut into any pieces and blocks."""
    found = made(tmp_path, kind, memory_bytes)
    joined = xr.concat(records(), "time").sel(level=list(LEVELS)).astype(np.float64)
    cells = kind.startswith("cell")
    over = ["time"] if cells else ["time", "latitude", "longitude"]
    weights = np.cos(np.deg2rad(joined["latitude"]))
    ones = xr.ones_like(weights) if cells else weights
    for name in NAMES:
        keys = [getattr(joined["time"].dt, axis) for axis in AXES[kind]]
        groups = [((), joined[name])]
        if keys:
            stacked = np.stack([key.values for key in keys], axis=1)
            groups = [
                (tuple(slot), joined[name].isel(time=(stacked == slot).all(1)))
                for slot in np.unique(stacked, axis=0)
            ]
        for slot, values in groups[::9]:
            mean = values.weighted(ones).mean(over)
            std = np.sqrt(((values - mean) ** 2).weighted(ones).mean(over))
            own = found.sel(dict(zip(AXES[kind], slot, strict=True)))
            rtol = 1e-7 if cells else 1e-12  # kept as float32
            np.testing.assert_allclose(own[name], mean, rtol=rtol)
            np.testing.assert_allclose(own[f"{name}_std"], std, rtol=max(rtol, 1e-9), atol=1e-9)
            np.testing.assert_array_equal(own[f"{name}_count"], values.notnull().sum(over))
        counted = int(joined[name].notnull().sum())
        assert int(found[f"{name}_count"].sum()) == counted  # nothing in any other slot
        assert found[name].attrs["units"] == joined[name].attrs["units"]


def test_a_stopped_run_goes_on_with_what_is_missing(tmp_path, monkeypatch) -> None:
    read: list[tuple] = []
    stop_at = [10**9]
    original = Segment.read

    def counts(self, variable, levels, start, *rest):
        if len(read) == stop_at[0]:
            raise KeyboardInterrupt
        read.append((variable, levels, self.times[0], start))
        return original(self, variable, levels, start, *rest)

    monkeypatch.setattr(Segment, "read", counts)
    whole = made(tmp_path / "whole", "cell_month", 300_000).load()
    expected = list(read)
    stop_at[0] = len(expected) + len(expected) * 2 // 3
    with pytest.raises(KeyboardInterrupt):
        made(tmp_path / "cut", "cell_month", 300_000)
    before = set(read[len(expected) :])
    stop_at[0] = 10**9
    read.clear()
    xr.testing.assert_identical(made(tmp_path / "cut", "cell_month", 300_000).load(), whole)
    assert before | set(read) == set(expected)
    repeated = before & set(read)
    assert 0 < len(repeated) < len(before)  # of the piece that was open alone
    assert len({variable for variable, *_ in repeated}) == 1


def test_another_state_of_the_store_is_refused(tmp_path) -> None:
    made(tmp_path, "month")
    segments = [segment(s) for s in records()]
    output = tmp_path / "month.zarr"
    assert not write_climatology(segments, "month", output, memory_bytes=2**20)
    changed = records()
    changed[0]["temperature"][30] += 1.0  # in the middle
    segments = [segment(s) for s in changed]
    with pytest.raises(ValueError, match="month.zarr was computed from another state of memory"):
        write_climatology(segments, "month", output, memory_bytes=2**20)
    assert write_climatology(segments, "month", output, memory_bytes=2**20, force=True)
    (tmp_path / "notes.zarr").mkdir()
    with pytest.raises(ValueError, match="is not a climatology"):
        write_climatology(segments, "month", tmp_path / "notes.zarr", memory_bytes=2**20)


def at_times(climatology: xr.Dataset, times: xr.DataArray) -> xr.Dataset:
    """The values of a climatology at the given times, by the calendar date alone."""
    axes = [axis for axis in ("month", "dayofyear", "hour") if axis in climatology.dims]
    chosen = {axis: getattr(times.dt, axis) for axis in axes}
    return climatology.sel(chosen).drop_vars(axes)


def test_evaluation_works_out_the_same_climate(tmp_path) -> None:
    """And what a date gets hangs on its place in the year alone."""
    found = made(tmp_path, "cell_month").drop_vars(["month"])
    off = Access(input_limits="off")  # one cell is far too warm
    selected = [replace(segment(s), access=off).to_dataset() for s in records()]
    winters = [s.sel(time=s["time"].dt.month == 2) for s in selected]
    theirs = Climate.of(winters, quantiles=[0.5]).mean
    for name in NAMES:
        np.testing.assert_allclose(
            found[name][1], theirs[name].sel(month=2), rtol=1e-6, err_msg=name
        )
    days = xr.DataArray(
        np.array(["1999-02-25T06", "2031-02-25T06"], "datetime64[ns]"), dims="init_time"
    )
    by_month = at_times(made(tmp_path / "more", "cell_month"), days)
    np.testing.assert_array_equal(by_month["temperature"][0], by_month["temperature"][1])
    np.testing.assert_allclose(
        by_month["temperature"], climatology_at(theirs, days)["temperature"], rtol=1e-6
    )
    by_day = at_times(made(tmp_path / "days", "cell_day_hour"), days)["u_component_of_wind"]
    values = [s["u_component_of_wind"].sel(time=f"{y}-02-25T06") for s, y in _with_years()]
    mean = np.mean([v.sel(level=list(LEVELS)).values for v in values], axis=0)
    np.testing.assert_allclose(by_day[0].transpose("level", ...), mean, rtol=1e-6)
    np.testing.assert_array_equal(by_day[0], by_day[1])


def _with_years() -> list[tuple[xr.Dataset, int]]:
    return list(zip(records(), (2003, 2004), strict=True))


def test_memory_is_bounded(tmp_path) -> None:
    store = dataset(steps=160, num_lat=32, num_lon=64, levels=LEVELS, step_hours=24)
    encoding = {name: {"chunks": (8, 1, 32, 64)} for name in NAMES}
    store.to_zarr(tmp_path / "waves.zarr", encoding=encoding, consolidated=False)
    lazy = xr.open_dataset(tmp_path / "waves.zarr", engine="zarr", consolidated=False)
    one, limit = segment(lazy), 2**20
    assert sum(store[name].nbytes for name in NAMES) > 2 * limit
    tracemalloc.start()
    try:
        write_climatology([one], "cell_day_hour", tmp_path / "out.zarr", memory_bytes=limit)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 2 * limit


@pytest.mark.e2e
def test_the_command_writes_and_refuses(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "80")
    path = catalog(tmp_path, train=dataset(seed=1), validation=dataset(seed=2))
    keys = [
        f"data.catalog={path}",
        "data.name=waves",
        "data.window={time: 5, lat: 8, lon: 16}",
        "data.in_memory=false",
        "stream=dynamics_humidity",
        "~stream.humidity",
        "stream.dynamics.variables=[temperature,u_component_of_wind]",
        f"output={tmp_path}/climate",
    ]
    wanted = "climatologies=[global,cell_day_hour]"
    assert main(["data", "stats", *keys, wanted]) == 0
    printed = capsys.readouterr().out
    assert "cell_day_hour.zarr, written" in "".join(printed.split("\n"))
    assert f"{float(dataset(seed=1)['temperature'].max()):.4g}" in printed and "…" not in printed
    store = dataset(seed=1)
    store["temperature"][12] += 1.0
    store.to_zarr(tmp_path / "train.zarr", mode="w", consolidated=False)
    assert main(["data", "stats", *keys, wanted]) == 2
    refused = capsys.readouterr().err
    assert "statistics-" in refused and "train.zarr" in refused and "--force" in refused
    assert len(refused.strip().splitlines()) == 1
    assert main(["data", "stats", *keys, wanted, "--force"]) == 0
    assert main(["data", "stats", *keys, "climatologies=[yearly]"]) == 2
    assert "climatologies" in capsys.readouterr().err


def test_evaluation_reads_what_stats_left(tmp_path, monkeypatch) -> None:
    """The same as worked out from the record; another store, levels or kind are named."""
    year = dataset(steps=80, step_hours=120, num_lat=4, num_lon=8, levels=LEVELS)
    used, path = [segment(year)], tmp_path / "cell_month.zarr"
    write_climatology(used, "cell_month", path, memory_bytes=2**30)
    history = [used[0].to_dataset()]
    computed = Climate.of(history, quantiles=(0.1, 0.9))
    mean = read_monthly(path, used)
    monkeypatch.setattr("atmossl.evaluation.climate.climatology", None)  # not called again
    read = Climate.of(history, quantiles=(0.1, 0.9), mean=mean)
    for name in NAMES:
        assert read.mean[name].dims == computed.mean[name].dims
        np.testing.assert_allclose(read.mean[name], computed.mean[name], rtol=1e-6, atol=1e-6)
    winter = [segment(year.isel(time=slice(0, 10)))]
    write_climatology(winter, "cell_month", tmp_path / "winter.zarr", memory_bytes=2**30)
    of_february = read_monthly(tmp_path / "winter.zarr", winter, [2])["temperature"].sel(month=2)
    assert bool(of_february.notnull().all())
    changed = year.copy(deep=True)
    changed["temperature"][40] += 1.0
    other = open_segment("waves", year, "memory", variables=NAMES, levels=LEVELS[:1])
    write_climatology(used, "month", tmp_path / "month.zarr", memory_bytes=2**30)
    seasons = [segment(store) for store in records()]
    write_climatology(seasons, "cell_month", tmp_path / "short.zarr", memory_bytes=2**30)
    for file, segments, message in (
        (path, [segment(changed)], "another state of memory"),
        (path, [other], r"has levels 300, 850; needed: 300"),
        (tmp_path / "month.zarr", used, "no climatology by cell and month"),
        (tmp_path / "nothing.zarr", used, "no such store"),
        (tmp_path / "short.zarr", seasons, r"no values in months 1, 4, 5"),
    ):
        with pytest.raises(ValueError, match=message):
            read_monthly(file, segments)


@pytest.mark.parametrize("kind", ["global", "month", "cell_month", "cell_day_hour"])
def test_a_variable_without_levels_has_every_climatology(tmp_path, kind: Kind) -> None:
    store = dataset(steps=40, num_lat=4, num_lon=8).isel(level=0, drop=True)
    record = open_segment("waves", store, "memory", variables=NAMES, levels=[])
    write_climatology([record], kind, tmp_path / "out.zarr", memory_bytes=2**30)
    found = xr.open_dataset(tmp_path / "out.zarr", engine="zarr", consolidated=False)
    weights = np.cos(np.deg2rad(store["latitude"]))
    for name in NAMES:
        mean = found[name].mean(
            [dim for dim in ("month", "dayofyear", "hour") if dim in found.dims]
        )
        if kind.startswith("cell"):
            mean = mean.weighted(weights).mean()
            assert found[name].dims[-2:] == ("latitude", "longitude")
        else:
            assert found[name].dims == tuple(AXES[kind])
        if kind == "global":
            expected = store[name].astype(np.float64).weighted(weights).mean().item()
            assert mean.item() == pytest.approx(expected, abs=1e-6)
        assert found[name + "_count"].sum() == store[name].size

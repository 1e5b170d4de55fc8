"""What is written: readable by others, described as CF asks, and resumed where it stopped."""

import errno
import json
from dataclasses import replace
from operator import attrgetter
from pathlib import Path

import numpy as np
import pytest
import scores
import xarray as xr
import xskillscore
import zarr
from compliance_checker.runner import CheckSuite, ComplianceChecker

from atmossl.evaluation.alignment import case_times, truth_for
from atmossl.evaluation.baselines import climatology_at
from atmossl.evaluation.climate import Climate
from atmossl.evaluation.forecasts import canonical_forecast
from atmossl.evaluation.scores import AnomalyCorrelation, Crps, Rmse
from atmossl.evaluation.verify import verify
from atmossl.inference.plan import Plan
from atmossl.inference.tiles import BlendedPart, predict_parts
from atmossl.inference.writer import OutputLayout, _begun, _request, partial_of, write
from atmossl.masking.places import CrossVariable
from atmossl.masking.tasks import Forecast, Hindcast, Task, TemporalInterpolation
from tests.inference.oracle_models import NAMES, STORE, Known, predictor
from tests.synthetic import dataset, spec

OFFSETS = (-1.0, 0.25, 1.5)
HOUR = np.timedelta64(1, "h")


def forecaster(task: Task = Forecast(12), **changes) -> Plan:  # noqa: B008 (frozen)
    return predictor(task, Known(attrgetter("guess"), OFFSETS), **changes)


def times_of(used: Plan, steps: slice = slice(4, 8)) -> np.ndarray:
    return used.segment.times[steps]


def opened(path: Path) -> xr.Dataset:
    if path.is_dir():
        return xr.open_zarr(path, consolidated=False, decode_timedelta=True).load()
    return xr.load_dataset(path, decode_timedelta=True)


class Stopped(Exception):
    pass


def stop_after(count: int):
    """An `advance` that stops the run once so many parts are written."""
    seen = []

    def advance(share: float) -> None:
        seen.append(share)
        if len(seen) > count:  # the first call tells what was there before
            raise Stopped

    return advance


@pytest.mark.parametrize(
    ("task", "count"), [(Forecast(12), 1), (Forecast(24, 12), 3), (TemporalInterpolation(6), 3)]
)
def test_a_resumed_output_is_that_of_one_run(task: Task, count: int, tmp_path: Path) -> None:
    used = forecaster(task, window=(5, 4, 8))
    write(used, times_of(used), tmp_path / "whole.zarr")
    output = tmp_path / "parts.zarr"
    with pytest.raises(Stopped):
        write(used, times_of(used), output, advance=stop_after(count))
    assert not output.exists()
    readable = opened(partial_of(output))["temperature"]
    assert np.isfinite(readable).any() and not np.isfinite(readable).all()
    with pytest.raises(ValueError, match="resume=true"):
        write(used, times_of(used), output)
    with pytest.raises(ValueError, match="begun with seed=0, now it is 1"):
        write(
            replace(used, options=replace(used.options, seed=1)),
            times_of(used),
            output,
            resume=True,
        )
    with pytest.raises(ValueError, match="begun with missing=keep, now it is fill"):
        filled = replace(used.options, fill_missing=True)
        write(replace(used, options=filled), times_of(used), output, resume=True)
    other = times_of(used).copy()
    other[1] = times_of(used)[1] - 3 * HOUR  # as many dates, with the same ends
    with pytest.raises(ValueError, match="begun with init_time="):
        _begun(partial_of(output), _request(used, other, "cf"))
    shares = []
    write(used, times_of(used), output, resume=True, advance=shares.append)
    assert sum(shares) == pytest.approx(len(times_of(used)))
    xr.testing.assert_identical(opened(output), opened(tmp_path / "whole.zarr"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["parts.zarr", "whole.zarr"]


def test_a_full_disk_leaves_what_is_written(tmp_path: Path, monkeypatch) -> None:
    used, output = forecaster(), tmp_path / "out.zarr"
    put, calls = zarr.Array.__setitem__, []

    def full(self, key, value) -> None:
        calls.extend([key] if self.ndim == 6 else [])
        if len(calls) > 14:  # two variables in three bands: within the third case
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, key, value)

    with monkeypatch.context() as patch:
        patch.setattr(zarr.Array, "__setitem__", full)
        with pytest.raises(OSError, match=r"No space left .* after 2 of 4 times.*resume=true"):
            write(used, times_of(used), output)
    left = opened(partial_of(output))["temperature"]
    assert np.isfinite(left.isel(init_time=slice(0, 2))).all()
    write(used, times_of(used), output, resume=True)
    write(used, times_of(used), tmp_path / "whole.zarr")
    xr.testing.assert_identical(opened(output), opened(tmp_path / "whole.zarr"))


def test_a_disk_that_is_full_at_the_end_leaves_what_is_written(tmp_path: Path, monkeypatch) -> None:
    """HDF5 tells it as a RuntimeError."""
    used, output = forecaster(), tmp_path / "out.nc"

    def full(*_args, **_kwargs) -> None:
        raise RuntimeError("NetCDF: HDF error")

    with monkeypatch.context() as patch:
        patch.setattr(xr.Dataset, "to_netcdf", full)
        with pytest.raises(OSError, match=r"HDF error, as on a full disk after 1 of 1 times"):
            write(used, times_of(used)[:1], output)
    write(used, times_of(used)[:1], output, resume=True)
    assert np.isfinite(opened(output)["temperature"]).all()


@pytest.mark.filterwarnings("ignore")  # of the checker and its plugins, about each other
@pytest.mark.parametrize("task", [Forecast(12), Hindcast(12), TemporalInterpolation(6)])
def test_output_complies_with_cf(task: Task, tmp_path: Path) -> None:
    used = forecaster(task)
    path, report = tmp_path / "out.nc", tmp_path / "report.json"
    write(used, times_of(used), path)
    CheckSuite.load_all_available_checkers()
    ComplianceChecker.run_checker(
        str(path), ["cf:1.11"], verbose=0, criteria="strict",
        output_filename=str(report), output_format="json",
    )  # fmt: skip
    found = json.loads(report.read_text())["cf:1.11"]
    checks = [check for key in ("high_priorities", "medium_priorities") for check in found[key]]
    assert len(checks) > 20
    faults = {c["name"]: c["msgs"] for c in checks if c["value"][0] < c["value"][1]}
    # Recommended is that nothing stands between time and level; ours are lead time and member,
    # where WeatherBench has them.
    faults.pop("\u00a72.4 Dimensions", None)
    assert faults == {}


def test_weatherbench2_layout_has_its_names(tmp_path: Path) -> None:
    used = forecaster(Forecast(24, 12))
    write(used, times_of(used), tmp_path / "wb.zarr", names="weatherbench2")
    write(used, times_of(used), tmp_path / "cf.zarr")
    theirs, ours = opened(tmp_path / "wb.zarr"), opened(tmp_path / "cf.zarr")
    assert set(theirs["temperature"].dims) == {
        "time", "prediction_timedelta", "number", "level", "latitude", "longitude",
    }  # fmt: skip
    np.testing.assert_array_equal(theirs["time"], times_of(used))
    np.testing.assert_array_equal(theirs["prediction_timedelta"] / HOUR, [6, 12, 18, 24])
    renamed = ours.rename(init_time="time", lead_time="prediction_timedelta", member="number")
    np.testing.assert_array_equal(theirs["temperature"], renamed["temperature"])


def test_cfgrib_reads_what_is_written_as_grib(tmp_path: Path) -> None:
    cfgrib = pytest.importorskip("cfgrib")
    used = forecaster()
    write(used, times_of(used), tmp_path / "out.grib2")
    write(used, times_of(used), tmp_path / "out.zarr")
    expected = opened(tmp_path / "out.zarr")
    read = cfgrib.open_dataset(tmp_path / "out.grib2", backend_kwargs={"indexpath": ""})
    read = read.rename(time="init_time", step="lead_time", number="member", isobaricInhPa="level")
    np.testing.assert_array_equal(read["init_time"], times_of(used))
    np.testing.assert_array_equal(read["lead_time"] / HOUR, [6, 12])
    for ours, theirs, units in zip(NAMES, ("t", "u"), ("K", "m s**-1"), strict=True):
        there = read[theirs].sel(level=expected.level, latitude=expected.latitude)
        there = there.transpose(*expected[ours].dims)
        scale = float(expected[ours].max() - expected[ours].min())
        np.testing.assert_allclose(there, expected[ours], atol=scale * 2**-22)
        assert read[theirs].attrs["units"] == units
        assert "ECMWF" not in str({**read.attrs, **read[theirs].attrs, "history": ""}).upper()
    assert read.attrs["GRIB_centre"] == "65535"  # missing
    with pytest.raises(ValueError, match="lead times below 0"):
        write(forecaster(Hindcast(12)), times_of(used), tmp_path / "past.grib2")


@pytest.mark.parametrize("suffix", [".zarr", ".nc", ".grib2"])
def test_libraries_score_the_written_file_as_we_do(tmp_path: Path, suffix: str) -> None:
    """RMSE, ACC and CRPS of our table against two libraries, all from the file. The CRPS is fair if
    members may be draws: GRIB does not say that they are those of a tail."""
    is_tail = suffix != ".grib2"
    method = "ecdf" if is_tail else "fair"
    used, path = forecaster(Forecast(12)), tmp_path / f"out{suffix}"
    write(used, times_of(used), path)
    raw = opened(path) if suffix != ".grib2" else opened_grib(path)
    forecast = canonical_forecast(raw, path.name).astype(float)
    climate = Climate.of([STORE], quantiles=(0.05, 0.95))
    scored = (Rmse(), AnomalyCorrelation(), Crps())
    rng = np.random.default_rng(0)
    table = verify(forecast, STORE, {}, climate, task="forecast", rng=rng, scores=scored)
    keys = ["variable", "level", "lead_hours", "score"]
    ours = table.set_index(keys)["value"].to_xarray()
    for name in NAMES:
        field = forecast[name]
        cells, cases = ["latitude", "longitude"], {"preserve_dims": ["level", "lead_time"]}
        truth = truth_for(forecast, STORE)[name].astype(float).transpose(
            *(dim for dim in field.dims if dim != "member")
        )  # fmt: skip
        weights = xr.DataArray(used.grid.weights, coords={"latitude": forecast.latitude})
        mean, case = field.mean("member"), truth.isel(level=0, lead_time=0, drop=True)
        whole = weights * xr.ones_like(case)  # [init_time latitude longitude]
        ensemble = scores.probability.crps_for_ensemble(
            field, truth, "member", method=method, weights=weights, **cases
        )
        one = {"dim": ["init_time", *cells], "weights": whole}
        away = xskillscore.mae(field, truth.broadcast_like(field), **one).mean("member")
        crude = xskillscore.crps_ensemble(truth, field, dim=[]).weighted(weights)
        crude = crude.mean(one["dim"])  # members also against themselves
        count = field.sizes["member"]
        correction = 1.0 if is_tail else count / (count - 1)
        normal = climatology_at(climate.mean[[name]], case_times(forecast))[name]
        one_case = {"dim": cells, "weights": whole.isel(init_time=0, drop=True)}
        correlation = xskillscore.pearson_r(mean - normal, truth - normal, **one_case)
        found = {
            "rmse": (
                scores.continuous.rmse(mean, truth, weights=weights, **cases),
                xskillscore.rmse(mean, truth, **one),
            ),
            "crps": (ensemble, away - (away - crude) * correction),
            "acc": (correlation.mean("init_time"),),
        }
        for score, by_library in found.items():
            expected = ours.sel(variable=name, score=score, drop=True)
            for theirs in by_library:
                theirs = theirs.transpose("level", "lead_time").sortby("level")
                np.testing.assert_allclose(theirs, expected, rtol=1e-6, err_msg=score)


def opened_grib(path: Path) -> xr.Dataset:
    cfgrib = pytest.importorskip("cfgrib")
    read = cfgrib.open_dataset(path, backend_kwargs={"indexpath": ""})
    return read.rename(t="temperature", u="u_component_of_wind").load()


def test_streams_on_other_levels_share_a_level_axis(tmp_path: Path) -> None:
    specs = (
        spec("t", variables=NAMES[:1], levels=(500, 850), token=(1, 2, 2)),
        spec("u", variables=NAMES[1:], token=(1, 2, 2)),
    )
    used = forecaster(CrossVariable(variables=NAMES[1:]), specs=specs)
    write(used, times_of(used), tmp_path / "out.zarr")
    found = opened(tmp_path / "out.zarr")
    assert np.isnan(found["temperature"].sel(level=300)).all()
    truth = STORE["temperature"].sel(level=[500, 850]).values[4:8]
    given = found["temperature"].sel(level=[500, 850]).isel(member=1)
    np.testing.assert_allclose(given.transpose("time", "level", ...), truth, atol=2e-5)


def test_valid_times_that_would_come_twice_are_refused(tmp_path: Path) -> None:
    used = forecaster(TemporalInterpolation(12))
    np.testing.assert_array_equal(np.diff(used.possible_times()) / HOUR, 12)
    with pytest.raises(ValueError, match="twice or out of order"):
        write(used, times_of(used), tmp_path / "out.zarr")
    write(used, used.possible_times(), tmp_path / "out.zarr")
    assert (np.diff(opened(tmp_path / "out.zarr")["time"]) / HOUR == 6).all()


def test_memory_holds_one_band_of_one_case(tmp_path: Path, monkeypatch) -> None:
    """However many cases and rows there are, a part is a band of one case."""
    store = dataset(num_lat=32, steps=16, variables=NAMES)
    used = forecaster(Forecast(6), store=store, statistics=store, window=(5, 8, 8))
    sizes = []
    put = OutputLayout.place

    def place(self, name: str, values: np.ndarray) -> np.ndarray:
        sizes.append(values.size)
        return put(self, name, values)

    monkeypatch.setattr(OutputLayout, "place", place)
    write(used, used.possible_times(), tmp_path / "out.zarr")
    assert len(sizes) >= 2 * 3 * len(used.possible_times())
    assert max(sizes) <= 3 * 3 * (8 + used.row_chunk) * 16  # member level rows lon
    assert isinstance(next(predict_parts(used, used.possible_times()[:1])), BlendedPart)


def test_what_cannot_be_written_is_named(tmp_path: Path) -> None:
    used = forecaster()
    with pytest.raises(ValueError, match=r"\.zarr, \.nc, \.grib2"):
        write(used, times_of(used), tmp_path / "out.csv")
    (tmp_path / "there.nc").touch()
    with pytest.raises(ValueError, match="exists"):
        write(used, times_of(used), tmp_path / "there.nc")

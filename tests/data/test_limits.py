"""Values that no atmosphere has are refused, told or let through, wherever windows are read."""

import warnings
from dataclasses import replace

import numpy as np
import pytest
import xarray as xr
from hypothesis import given, settings
from hypothesis import strategies as st

import atmossl
from atmossl import cli
from atmossl.batch import PRIMARY, StreamSpec, TokenSize
from atmossl.data.chunks import Access
from atmossl.data.segment import Segment
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.variables import VARIABLES, InputWarning, physical_range
from atmossl.data.windows import Normaliser, read_window
from tests.synthetic import dataset

LEVELS = (300, 500, 850)
GRAVITY = 9.80665
# Extremes of the Earth's atmosphere at some levels, from records and ERA5, in the variable's units
OBSERVED = {
    ("temperature", 850): (225.0, 318.0),
    ("temperature", 10): (170.0, 295.0),
    ("temperature", 1): (185.0, 305.0),
    ("u_component_of_wind", 250): (-80.0, 125.0),
    ("u_component_of_wind", 1): (-120.0, 210.0),
    ("v_component_of_wind", 250): (-110.0, 110.0),
    ("geopotential", 1000): (-1.1e4, 6.5e3),
    ("geopotential", 850): (2.0e3, 1.72e4),
    ("geopotential", 500): (4.4e4, 5.95e4),
    ("geopotential", 50): (1.75e5, 2.1e5),
    ("geopotential", 1): (4.1e5, 4.95e5),
    ("specific_humidity", 850): (-1e-4, 0.025),
    ("vertical_velocity", 500): (-60.0, 40.0),
    ("vorticity", 850): (-5e-3, 1e-2),
    ("divergence", 850): (-5e-3, 5e-3),
    ("2m_temperature", 0): (178.0, 330.0),
    ("mean_sea_level_pressure", 0): (8.6e4, 1.094e5),
    ("10m_u_component_of_wind", 0): (-90.0, 90.0),
    ("10m_v_component_of_wind", 0): (-90.0, 90.0),
    ("surface_pressure", 0): (4.5e4, 1.09e5),
    ("sea_surface_temperature", 0): (270.0, 311.0),
    ("sea_ice_cover", 0): (-1e-6, 1.0 + 1e-6),
    ("specific_cloud_liquid_water_content", 850): (-1e-6, 5e-3),
    ("specific_cloud_ice_water_content", 300): (-1e-6, 3e-3),
    ("total_precipitation", 0): (-1e-6, 1.8),
    ("geopotential_at_surface", 0): (-4e3, 8.7e4),
    ("land_sea_mask", 0): (0.0, 1.0),
    ("toa_incident_solar_radiation", 0): (0.0, 5.1e6),
}


def test_every_variable_has_limits_that_hold_what_was_observed() -> None:
    assert {name for name, _ in OBSERVED} == set(VARIABLES)
    for (name, level), (low, high) in OBSERVED.items():
        limits = physical_range(name, level)
        assert limits[0] < low < high < limits[1], f"{name} at {level} hPa: {limits}"
        assert np.isfinite(limits).all()
        whole = physical_range(name)
        assert whole[0] <= limits[0] and limits[1] <= whole[1], name
    assert physical_range("ozone") == (-np.inf, np.inf)


@given(level=st.integers(1, 1050), surface=st.floats(8.7e4, 1.09e5), kelvin=st.floats(190, 310))
def test_geopotential_of_an_isothermal_column_is_within_limits(level, surface, kelvin) -> None:
    geopotential = 287.0 * kelvin * np.log(surface / (100 * level))
    low, high = physical_range("geopotential", level)
    assert low < geopotential < high


def air(**values: np.ndarray | float) -> xr.Dataset:
    """A record of realistic fields, with some variables changed in one cell or as a whole."""
    rng = np.random.default_rng(0)
    store = dataset(steps=8)
    shape = store["temperature"].shape
    means = {
        "geopotential": np.array([9.0e4, 5.5e4, 1.4e4])[:, None, None],
        "specific_humidity": 3e-3,
        "mean_sea_level_pressure": 1e5,
    }
    scales = {"geopotential": 500.0, "specific_humidity": 5e-4, "mean_sea_level_pressure": 800.0}
    for name, mean in means.items():
        fields = mean + scales[name] * rng.standard_normal(shape)
        store[name] = (store["temperature"].dims, fields.astype(np.float32))
    for name, value in values.items():
        store[name] = store[name].copy(data=np.broadcast_to(value, shape).astype(np.float32))
    return store


def spoilt(name: str, value: float) -> xr.Dataset:
    """A record with one value in the last step that is read."""
    store = air()
    store[name][5, 1, 3, 4] = value
    return store


# What reaches windows under the right units: by the variable that is wrong
WRONG = {
    "fill -9999": ("temperature", spoilt("temperature", -9999.0)),
    "fill 1e20": ("u_component_of_wind", spoilt("u_component_of_wind", 1e20)),
    "fill of netCDF": ("specific_humidity", spoilt("specific_humidity", 9.96921e36)),
    "zeros of a chunk": ("temperature", spoilt("temperature", 0.0)),
    "degrees Celsius": ("temperature", air(temperature=air()["temperature"].values - 273.15)),
    "anomalies": ("temperature", air(temperature=air()["temperature"].values - 250.0)),
    "twice converted": ("temperature", air(temperature=air()["temperature"].values + 273.15)),
    "g/kg": ("specific_humidity", air(specific_humidity=1e3 * air()["specific_humidity"].values)),
    "heights": ("geopotential", air(geopotential=air()["geopotential"].values / GRAVITY)),
    "departures": (
        "geopotential",
        air(geopotential=air()["geopotential"].values - air()["geopotential"].values.mean(0)),
    ),
    "hPa": (
        "mean_sea_level_pressure",
        air(mean_sea_level_pressure=air()["mean_sea_level_pressure"].values / 100),
    ),
}
NAMES = tuple(air().data_vars)
SPEC = StreamSpec("air", NAMES, LEVELS, TokenSize(1, 2, 4))


def opened(store: xr.Dataset, mode: str = "refuse", **more) -> Segment:
    access = Access(input_limits=mode)
    return open_segment(
        "air", store, "the store", variables=NAMES, levels=LEVELS, access=access, **more
    )


NORMALISER = Normaliser({PRIMARY: compute_statistics([opened(air())])})


def read(segment: Segment, spec: StreamSpec = SPEC):
    (window,) = read_window(segment, (spec,), NORMALISER, 2, 4, segment.whole())
    return window


@pytest.mark.parametrize("kind", WRONG)
def test_windows_with_values_that_cannot_be_are_refused_told_or_let_through(kind: str) -> None:
    name, store = WRONG[kind]
    with pytest.raises(ValueError, match=rf"the store between 2001-01-01T12 and .*: {name} at"):
        read(opened(store))
    masked = replace(SPEC, missing="mask")
    with pytest.raises(ValueError, match=rf"{name} at .*input_limits=warn"):
        read(opened(store, may_miss=NAMES), masked)
    told = opened(store, "warn")
    with pytest.warns(InputWarning, match=f"{name} at") as caught:
        windows = [read(told, masked) for _ in range(3)]
    assert len(caught) == 1, "once for a variable"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        silent = read(opened(store, "off"), masked)
    np.testing.assert_array_equal(silent.fields, windows[0].fields)
    with pytest.raises(ValueError, match=name):
        opened(store).to_dataset()  # what predictions are scored against


def test_values_beside_missing_ones_are_looked_at() -> None:
    store = spoilt("temperature", 0.0)
    store["temperature"][5, 1, :, :3] = np.nan
    with pytest.raises(ValueError, match=r"temperature at 500 hPa goes from 0 to"):
        read(opened(store, may_miss=NAMES), replace(SPEC, missing="mask"))


@settings(max_examples=40)
@given(data=st.data())
def test_values_that_are_observed_pass(data) -> None:
    name = data.draw(st.sampled_from(["temperature", "u_component_of_wind", "specific_humidity"]))
    level = {"temperature": 850, "u_component_of_wind": 250, "specific_humidity": 850}[name]
    value = data.draw(st.floats(*OBSERVED[name, level]))
    read(opened(spoilt(name, value)))


def test_levels_that_are_no_pressures_have_the_limits_of_all() -> None:
    store = air(geopotential=2e3)  # near the ground, on a level of a model
    with pytest.raises(ValueError, match="geopotential at 300 hPa"):
        read(opened(store))
    read(replace(opened(store), pressure_levels=False))


@pytest.fixture(scope="module")
def sample() -> xr.Dataset:
    return atmossl.open_data("sample").isel(time=slice(0, 12)).load()


def test_python_refuses_or_warns(sample) -> None:
    celsius = sample.assign(
        temperature=(sample["temperature"] - 273.15).assign_attrs(sample["temperature"].attrs)
    )
    model, time = atmossl.load("default", device="cpu"), sample["time"].values[4]
    with pytest.raises(ValueError, match=r"temperature at .*input_limits=warn"):
        model.predict("forecast", celsius, time)
    with (
        pytest.warns(InputWarning, match="temperature at"),
        pytest.warns(UserWarning, match="not trained for temperature at"),
    ):
        model.predict("forecast", celsius, time, overlap=0.0, tilings=1, input_limits="warn")
    with pytest.raises(ValueError, match="input_limits='all'; valid"):
        model.predict("forecast", sample, time, input_limits="all")


COMMANDS = {
    "predict": ["predict", "output=out.zarr"],
    "evaluate": ["evaluate", "output=report"],
    "train": ["train", "paths.output=run", "data.name=spoilt", "data.catalog=catalog.yaml"],
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_refuse_in_one_line(tmp_path, monkeypatch, capsys, sample, command) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ATMOSSL_CACHE", str(tmp_path / "cache"))
    bad = sample.copy(deep=True)
    bad["temperature"][5, 1, 3, 4] = 1e20
    for array in bad.variables.values():
        array.encoding = {}
    bad.to_zarr(tmp_path / "bad.zarr", consolidated=False)
    splits = ", ".join(f"{split}: [{{segment: a}}]" for split in ("train", "validation", "test"))
    names = ", ".join(f"{name}: {name}" for name in bad.data_vars)
    (tmp_path / "catalog.yaml").write_text(
        f"spoilt: {{description: x, licence: x, citation: x, variables: {{{names}}}, "
        f"levels: [300, 500, 850], segments: {{a: {{location: {tmp_path / 'bad.zarr'}}}}}, "
        f"splits: {{{splits}}}}}"
    )
    given = [] if command == "train" else ["data=spoilt", "data.catalog=catalog.yaml"]
    assert cli.main([*COMMANDS[command], *given]) == 2
    told = capsys.readouterr().err
    assert "temperature" in told and "1e+20 K" in told and "input_limits=warn" in told
    assert len(told.strip().splitlines()) == 1 and not (tmp_path / "out.zarr").exists()

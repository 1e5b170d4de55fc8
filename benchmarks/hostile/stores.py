"""Inputs made here, whose values are known everywhere: smooth waves in the units of the atmosphere.

Reference values come from the arrays that were written, never from the program.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

DIMS = ("time", "level", "latitude", "longitude")
# name: mean, amplitude, units
WAVES = {
    "temperature": (250.0, 20.0, "K"),
    "u_component_of_wind": (5.0, 15.0, "m s-1"),
    "v_component_of_wind": (0.0, 10.0, "m s-1"),
    "geopotential": (50000.0, 2000.0, "m2 s-2"),
    "specific_humidity": (3e-3, 2e-3, "kg kg-1"),
    "2m_temperature": (280.0, 20.0, "K"),
    "mean_sea_level_pressure": (101000.0, 1500.0, "Pa"),
    "total_precipitation": (2e-3, 1e-3, "m"),
}


def wave(name: str, steps: int, num_levels: int, lat: np.ndarray, lon: np.ndarray) -> np.ndarray:
    """Values [time, level, lat, lon] of a travelling wave with noise that is the same each time."""
    mean, amplitude, _ = WAVES[name]
    phase = np.deg2rad(lon) - 0.2 * np.arange(steps)[:, None, None, None]
    values = np.cos(np.deg2rad(lat))[:, None] * np.sin(phase)
    values = values + 0.3 * np.arange(num_levels)[:, None, None]
    noise = np.random.default_rng(len(name)).random(values.shape)
    return (mean + amplitude * (values + 0.05 * noise) / 2).astype(np.float32)


def dataset(
    variables: Sequence[str] = ("temperature", "u_component_of_wind"),
    *,
    levels: Sequence[Any] = (500, 850),
    num_lat: int = 8,
    num_lon: int = 16,
    steps: int = 24,
    start: str = "2001-01-01",
    step_minutes: int = 360,
    lat: np.ndarray | None = None,
    lon: np.ndarray | None = None,
) -> xr.Dataset:
    """A record (time, level, latitude, longitude), float32; without levels no such dimension."""
    spacing = 180 / num_lat
    lat = -90 + spacing * (np.arange(num_lat) + 0.5) if lat is None else lat
    lon = np.arange(num_lon) * 360 / num_lon if lon is None else lon
    times = np.datetime64(start, "ns") + np.arange(steps) * np.timedelta64(step_minutes, "m")
    fields = {}
    for name in variables:
        values = wave(name, steps, max(1, len(levels)), lat, lon)
        dims = DIMS if len(levels) else ("time", "latitude", "longitude")
        values = values if len(levels) else values[:, 0]
        fields[name] = (dims, values, {"units": WAVES[name][2]})
    coords = {"time": times, "latitude": lat, "longitude": lon}
    return xr.Dataset(fields, coords | ({"level": list(levels)} if len(levels) else {}))


def write_catalog(
    folder: Path,
    locations: Mapping[str, str],
    variables: Mapping[str, str],
    levels: Sequence[int] = (),
    *,
    name: str = "waves",
    file: str = "catalog.yaml",
    **more: Any,
) -> Path:
    """A catalog of one entry. locations: of `train`, `validation` and `test`, or of `all`."""
    segments = {key: {"location": location} for key, location in locations.items()}
    splits = {
        split: [{"segment": split if split in locations else "all"}]
        for split in ("train", "validation", "test")
    }
    entry = {
        "description": "waves", "segments": segments, "splits": splits,
        "variables": dict(variables), "levels": list(levels), "licence": "none",
        "citation": "none", **more,
    }  # fmt: skip
    path = folder / file
    path.write_text(yaml.safe_dump({name: entry}))
    return path


def write_stores(folder: Path) -> None:
    """`train.zarr`, `validation.zarr`, `test.zarr` and their catalog."""
    starts = {"train": "2001-01-01", "validation": "2001-03-01", "test": "2001-05-01"}
    for name, start in starts.items():
        dataset(start=start).to_zarr(folder / f"{name}.zarr", consolidated=False)
    names = {name: name for name in ("temperature", "u_component_of_wind")}
    locations = {name: str(folder / f"{name}.zarr") for name in starts}
    write_catalog(folder, locations, names, (500, 850))


def stream(name: str, variables: Sequence[str], levels: Sequence[int] = (500, 850)) -> str:
    depth = max(1, len(levels))
    return (
        f"+stream.{name}={{variables: [{', '.join(variables)}], levels: {list(levels)}, "
        f"token_size: {{time: 1, lat: 2, lon: 4, level: {depth}}}, role: predict}}"
    )


AIR = stream("air", ("temperature", "u_component_of_wind"))


def training(fixtures: Path, output: str, *more: str, streams: Sequence[str] = (AIR,)) -> list[str]:
    """Arguments of a run of a second on these stores."""
    return [
        "train", "experiment=quickstart", "model=tiny", "model.dim=16", "model.num_layers=1",
        "optimizer=adamw", "~stream.atmosphere", *streams, "data.name=waves",
        f"data.catalog={fixtures / 'catalog.yaml'}", "data.window={time: 5, lat: 8, lon: 16}",
        "data.batch_size=2", "data.num_workers=0", "optimizer.warmup_steps=1",
        "trainer.max_steps=6", "trainer.checkpoint_interval=2", "trainer.validation_interval=3",
        "trainer.validation_batches=1", "trainer.log_interval=1", "trainer.accelerator=cpu",
        "trainer.pictures=false", "logger.tensorboard=false", f"paths.output={output}", *more,
    ]  # fmt: skip


def predicting(fixtures: Path, output: str, *more: str) -> list[str]:
    """Arguments of a short prediction with the tiny checkpoint."""
    return [
        "predict", f"checkpoint={fixtures / 'tiny.ckpt'}", "data=waves",
        f"data.catalog={fixtures / 'catalog.yaml'}", "accelerator=cpu", "tilings=1", "overlap=0",
        f"output={output}", *more,
    ]  # fmt: skip


def evaluating(fixtures: Path, output: str, *more: str) -> list[str]:
    return [
        "evaluate", f"checkpoint={fixtures / 'tiny.ckpt'}", "data=waves",
        f"data.catalog={fixtures / 'catalog.yaml'}", "accelerator=cpu", "tilings=1", "overlap=0",
        "tasks=[forecast]", "ridge=false", "bootstrap=5", "regions=[]", "every=6",
        f"output={output}", *more,
    ]  # fmt: skip

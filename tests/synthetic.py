"""Stores made in the test itself: smooth travelling waves, whose values are known everywhere and
within what an atmosphere can have."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
import xarray as xr

from atmossl.batch import StreamSpec, StreamWindow, TokenSize

UNITS = {"temperature": "K", "u_component_of_wind": "m s-1", "specific_humidity": "kg kg-1"}
MEANS = {"temperature": 250.0}
SCALES = {"specific_humidity": 1e-3}


def dataset(
    *,
    variables: Sequence[str] = ("temperature", "u_component_of_wind"),
    levels: Sequence[int] = (300, 500, 850),
    num_lat: int = 8,
    num_lon: int = 16,
    steps: int = 24,
    start: str = "2001-01-01",
    step_hours: int = 6,
    seed: int = 0,
) -> xr.Dataset:
    """A record with dims (time, level, latitude, longitude), float32."""
    rng = np.random.default_rng(seed)
    spacing = 180 / num_lat
    latitude = -90 + spacing * (np.arange(num_lat) + 0.5)
    longitude = np.arange(num_lon) * 360 / num_lon
    times = np.datetime64(start, "ns") + np.arange(steps) * np.timedelta64(step_hours, "h")
    phase = np.deg2rad(longitude) - 0.2 * np.arange(steps)[:, None, None, None]
    shape = (steps, len(levels), num_lat, num_lon)
    fields = {}
    for number, name in enumerate(variables):
        wave = (1 + number) * np.cos(np.deg2rad(latitude))[:, None] * np.sin(phase)
        values = wave + np.arange(len(levels))[:, None, None] + 0.1 * rng.standard_normal(shape)
        values = MEANS.get(name, 0.0) + SCALES.get(name, 1.0) * values
        dims = ("time", "level", "latitude", "longitude")
        fields[name] = (dims, values.astype(np.float32), {"units": UNITS[name]})
    coords = {"time": times, "level": list(levels), "latitude": latitude, "longitude": longitude}
    return xr.Dataset(fields, coords)


def catalog(folder: Path, **stores: xr.Dataset) -> Path:
    """Zarr stores `train`, `validation`, `test` and a catalog file with one entry, `waves`."""
    lines = ["waves:", "  description: travelling waves", "  licence: none", "  citation: none"]
    first = next(iter(stores.values()))
    lines.append("  variables: {" + ", ".join(f"{v}: {v}" for v in first.data_vars) + "}")
    lines.append(f"  levels: {first['level'].values.tolist()}")
    segments, splits = [], []
    for name, store in stores.items():
        path = folder / f"{name}.zarr"
        store.to_zarr(path, consolidated=False)
        segments.append(f"    {name}: {{location: {path}}}")
        splits.append(f"    {name}: [{{segment: {name}}}]")
    path = folder / "catalog.yaml"
    path.write_text("\n".join([*lines, "  segments:", *segments, "  splits:", *splits, ""]))
    return path


def spec(
    name: str = "air",
    *,
    variables: Sequence[str] = ("temperature", "u_component_of_wind"),
    levels: Sequence[int] = (300, 500, 850),
    token: tuple[int, int, int] = (1, 2, 4),
    role: str = "predict",
) -> StreamSpec:
    return StreamSpec(name, tuple(variables), tuple(levels), TokenSize(*token), role)


def window(
    stream: StreamSpec, *, time: int = 4, lat: int = 8, lon: int = 16, seed: int = 0
) -> StreamWindow:
    """Random normalised fields on a global grid."""
    rng = np.random.default_rng(seed)
    shape = (len(stream.variables), stream.num_levels, time, lat, lon)
    latitude = -90 + 180 / lat * (torch.arange(lat) + 0.5)
    weight = torch.cos(torch.deg2rad(latitude))
    return StreamWindow(
        spec=stream,
        fields=torch.from_numpy(rng.standard_normal(shape, dtype=np.float32)),
        time_hours=torch.arange(time, dtype=torch.float64) * 6,
        level_hpa=torch.tensor(stream.level_values, dtype=torch.float32),
        lat=latitude,
        lon=torch.arange(lon) * 360.0 / lon,
        weight=weight / weight.mean(),
    )

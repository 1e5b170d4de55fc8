"""The labels that probes predict: properties of atmospheric states, each a pure function of fields.

A field has dims (case, level, latitude, longitude), latitudes ascending in degrees, CF units. A
label is either one number per case and sector of longitude, worked out from the columns of that
sector alone, or one per case and cell; cells are averaged over tokens later.
A label that is computed from the state `lead_hours` after the encoded one is a prediction.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import xarray as xr

from atmossl.geometry import EARTH_RADIUS_KM
from atmossl.value_faults import as_written

EARTH_RADIUS_M = 1e3 * EARTH_RADIUS_KM
GRAVITY = 9.80665
NUM_BELTS = 6
Kind = Literal["number", "class", "extreme"]


class LabelError(ValueError):
    """A label cannot be computed from a store's fields; says why."""


@dataclass(frozen=True)
class Blind:
    """What a probe's encoder is not shown, since the label would follow from it without learning.

    position: latitude, longitude, date and hour, as far as the network is told them. variables: the
    encoder sees their training mean, and the baselines of raw values lack them.
    """

    position: bool = False
    variables: tuple[str, ...] = ()

    def within(self, seen: "Blind") -> "Blind":
        """The part of this that a network sees, and that can be kept from it."""
        variables = tuple(name for name in self.variables if name in seen.variables)
        return Blind(self.position and seen.position, variables)


@dataclass(frozen=True)
class Label:
    """One label: what one probe predicts.

    of: label of (state, state one day before), dims (case) for the longitudes that the state has,
        or (case, latitude, longitude); the
        label of an angle has a last dim `part`.
    kind: a number; a class, counted from 0; or `extreme`, whether a number is above its 95th
        percentile over the training dates.
    needs: variables and levels in hPa that `of` reads.
    lead_hours: from the encoded state to the one that the label is computed from.
    persists: the label of one day earlier is a baseline.
    local: one label per place, from the latents there; else one per sector of longitude, from
        latents that are averaged over its bands of latitude.
    blind: what the encoder is not shown.
    """

    of: Callable[[xr.Dataset, xr.Dataset], xr.DataArray]
    kind: Kind
    needs: tuple[tuple[str, int], ...] = ()
    lead_hours: int = 0
    persists: bool = False
    local: bool = False
    blind: Blind = Blind()

    def check(self, name: str, levels: Mapping[str, Sequence[int]]) -> None:
        """Raise ValueError if a checkpoint lacks the variables and levels that the label needs."""
        lacking = [
            f"{v} at {level} hPa" for v, level in self.needs if level not in levels.get(v, ())
        ]
        if lacking:
            have = ", ".join(f"{v} {as_written([*present])}" for v, present in levels.items())
            raise ValueError(
                f"probes: {name} needs {' and '.join(lacking)}; the checkpoint has {have}"
            )


def jet_latitude(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """The latitude in degrees of the strongest westerly wind at 850 hPa between 15 and 75 degrees
    north, of the mean over longitudes, refined by a parabola through the maximum and its two
    neighbours (after Woollings et al. 2010, QJRMS 136, for the sector of the North Atlantic)."""
    del before
    wind = now["u_component_of_wind"].sel(level=850).mean("longitude")
    wind = wind.sel(latitude=slice(15, 75)).transpose("case", "latitude")
    latitude, values = wind["latitude"].to_numpy(), wind.to_numpy()
    if len(latitude) < 3:
        raise LabelError("it needs 3 rows between 15 and 75 degrees north")
    top = values[:, 1:-1].argmax(axis=1) + 1
    rows = np.arange(len(values))
    south, middle, north = (values[rows, top + shift] for shift in (-1, 0, 1))
    curvature = south - 2 * middle + north
    shift = np.divide(
        (south - north) / 2, curvature, out=np.zeros_like(south), where=curvature < 0
    ).clip(-0.5, 0.5)
    found = latitude[top] + shift * np.gradient(latitude)[top]
    return xr.DataArray(np.where(np.isnan(values).any(axis=1), np.nan, found), dims="case")


def blocking(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """Mean over longitudes of the southern gradient of 500 hPa height, in metres per degree: height
    at 60 minus height at 40 degrees north, over 20 degrees. A longitude is blocked where it is
    positive (Tibaldi and Molteni 1990, Tellus 42A, GHGS); the gradient itself is the label, for at
    a coarse resolution few longitudes are."""
    del before
    height = now["geopotential"].sel(level=500) / GRAVITY
    north, south = height.interp(latitude=60.0), height.interp(latitude=40.0)
    return ((north - south) / 20.0).mean("longitude")


def storm_track(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """Logarithm of the mean square of one day's change of 500 hPa height (m2) between 30 and 70
    degrees north: the 24-hour difference filter for synoptic variance (Wallace, Lim and Blackmon
    1988, JAS 45), of one day."""
    change = (now["geopotential"] - before["geopotential"]).sel(level=500) / GRAVITY
    change = change.sel(latitude=slice(30, 70))
    latitude = change["latitude"]
    weight = latitude.copy(data=np.cos(np.deg2rad(latitude.to_numpy())))
    mean_square = (change**2).weighted(weight).mean(("latitude", "longitude"))
    return mean_square.copy(data=np.log(mean_square.to_numpy() + 1e-6))


def cyclonic_vorticity(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """Relative vorticity at 850 hPa in s-1, counted positive where it turns as the earth does:
    (dv/dlon - d(u cos lat)/dlat) / (a cos lat), times the sign of latitude; centred differences,
    periodic in longitude (Holton 2004, An Introduction to Dynamic Meteorology, section 4.2)."""
    del before
    dims = ("case", "latitude", "longitude")
    wind = now[["u_component_of_wind", "v_component_of_wind"]].sel(level=850)
    u, v = (wind[name].transpose(*dims) for name in wind.data_vars)
    latitude = np.deg2rad(wind["latitude"].to_numpy())
    spacing = np.deg2rad(float(wind["longitude"][1] - wind["longitude"][0]))
    cosine = np.cos(latitude)[:, None].clip(1e-3)
    values = v.to_numpy()
    dv = (np.roll(values, -1, axis=2) - np.roll(values, 1, axis=2)) / (2 * spacing)
    du = np.gradient(u.to_numpy() * cosine, latitude, axis=1)
    turned = np.sign(latitude)[:, None] * (dv - du) / (EARTH_RADIUS_M * cosine)
    return u.copy(data=turned)


def height_500(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """Geopotential height at 500 hPa in metres; scored as an anomaly from every place's mean."""
    del before
    return now["geopotential"].sel(level=500) / GRAVITY


def humidity_850(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """Specific humidity at 850 hPa in g kg-1; scored as an anomaly from every place's mean."""
    del before
    return 1000.0 * now["specific_humidity"].sel(level=850)


def _everywhere(now: xr.Dataset, values: np.ndarray) -> xr.DataArray:
    """Values [case latitude longitude ...], broadcast, on the cells of a dataset."""
    shape = (now.sizes["case"], now.sizes["latitude"], now.sizes["longitude"])
    dims = ("case", "latitude", "longitude", "part")[: values.ndim]
    full = np.broadcast_to(values, (*shape, *values.shape[3:]))
    coords = {name: now[name] for name in ("latitude", "longitude")}
    return xr.DataArray(full, coords, dims)


def latitude_belt(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """The belt of a place: which of six belts of 30 degrees it lies in, 0 the southernmost."""
    del before
    belt = np.floor((now["latitude"].to_numpy() + 90.0) / (180.0 / NUM_BELTS)).clip(
        0, NUM_BELTS - 1
    )
    return _everywhere(now, belt[None, :, None])


def local_hour(now: xr.Dataset, before: xr.Dataset) -> xr.DataArray:
    """Sine and cosine of the mean solar hour of a place, from UTC and longitude."""
    del before
    day_fraction = (now["time"] - now["time"].dt.floor("D")) / np.timedelta64(1, "D")
    turn = day_fraction.to_numpy()[:, None] + now["longitude"].to_numpy() / 360.0
    angle = 2 * np.pi * turn[:, None]
    return _everywhere(now, np.stack([np.sin(angle), np.cos(angle)], axis=-1))


_HEIGHT = (("geopotential", 500),)
LABELS: Mapping[str, Label] = {
    "jet_latitude": Label(jet_latitude, "number", (("u_component_of_wind", 850),), persists=True),
    "blocking": Label(blocking, "number", _HEIGHT, persists=True),
    "storm_track": Label(storm_track, "number", _HEIGHT),
    "anomaly_24h": Label(height_500, "number", _HEIGHT, 24, persists=True, local=True),
    "vorticity_extreme": Label(
        cyclonic_vorticity, "extreme",
        (("u_component_of_wind", 850), ("v_component_of_wind", 850)), persists=True, local=True,
    ),
    "humidity": Label(
        humidity_850, "number", (("specific_humidity", 850),), persists=True, local=True,
        blind=Blind(variables=("specific_humidity",)),
    ),
    "latitude_belt": Label(latitude_belt, "class", local=True, blind=Blind(position=True)),
    "local_hour": Label(local_hour, "number", local=True, blind=Blind(position=True)),
}  # fmt: skip
DISTANCE = "temporal_distance"  # of pairs of dates, not of a state
PROBES = (*LABELS, DISTANCE)


def blind_of(probe: str) -> Blind:
    """What the encoder is not shown where a probe of this name is asked."""
    return Blind(position=True) if probe == DISTANCE else LABELS[probe].blind


def check_probes(names: Sequence[str], levels: Mapping[str, Sequence[int]]) -> None:
    """Raise ValueError for a probe that does not exist or that a checkpoint's fields do not allow.

    levels: of every variable of the checkpoint, hPa.
    """
    unknown = [name for name in names if name not in PROBES]
    if unknown:
        valid = ", ".join(PROBES)
        raise ValueError(f"probes={','.join(unknown)}: unknown; valid: {valid}")
    for name in names:
        if name in LABELS:
            LABELS[name].check(name, levels)


def date_pairs(
    times: np.ndarray, runs: np.ndarray, *, shortest_hours: float = 6, longest_hours: float = 96
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Numbers of the earlier and the later of all pairs of dates of one run whose distance lies
    within bounds, and that distance in hours."""
    gap = (times[None, :] - times[:, None]) / np.timedelta64(1, "h")
    near = (gap >= shortest_hours) & (gap <= longest_hours) & (runs[None, :] == runs[:, None])
    first, second = np.nonzero(near)
    return first, second, gap[first, second]

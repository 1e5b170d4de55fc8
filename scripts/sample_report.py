"""Measure the embedded sample and write docs/sample.md and its pictures.

    python scripts/sample_report.py

Reads the packed files only. Drift: area means, variances and zonal spectra per variable, level and
day. Twins: RMS differences between the held-out runs and every training run, compared with those
between unrelated states.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import xarray as xr
import zarr
from make_sample import NUM_RUNS, PACKING, SPIN_UP_DAYS, STEP_HOURS, VARIABLES

STEPS_PER_DAY = 24 // STEP_HOURS
TRAIN, HELD_OUT = (0, 1, 2, 3), (4, 5)
UNRELATED_DAYS = 5  # states of different runs at least this far apart in date
WAVE_BANDS = {"1-3": slice(1, 4), "4-8": slice(4, 9), "9-31": slice(9, 32)}
SHORT = dict(zip(VARIABLES, ("T", "u", "v", "Φ", "q"), strict=True))
# factor and unit in which a person reads the numbers
READABLE = {"geopotential": (1 / 9.80665, "gpm"), "specific_humidity": (1e3, "g kg-1")}

PAGE = """# The embedded sample

Written by `python scripts/sample_report.py`, which measures the packed files.

**What it is: model output started from ERA5, not reanalysis.** The public package `neuralgcm`
(1.2.2) carries one ERA5 state, 1959-01-02T00, and a stochastic TL63 checkpoint of NeuralGCM
(Kochkov et al. 2024, Nature 632, 1060-1066). Six runs of it, 6-hourly, are kept from {first} to
{last}: {days} days or {num_times} states each, on 300, 500 and 850 hPa, regridded conservatively
from the model's 128 x 64 Gaussian grid to 64 x 32 (5.625 degrees). Runs 0 to 3 train, run 4
validates, run 5 tests, so no split shares a trajectory with another. {size:.1f} MB in all.

| variable | unit |
| --- | --- |
| temperature | K |
| u_component_of_wind, v_component_of_wind | m s-1 |
| geopotential | m2 s-2 |
| specific_humidity | kg kg-1 |

![First and last states](pictures/sample_maps.png)

## No near twins

All runs have only one ERA5 state to start from, and stochastic physics alone lets them drift apart
slowly. So every run starts from that state *rotated in longitude* by its own multiple of 60
degrees (a rotation keeps zonal means and geostrophic balance, but puts every weather system over
other ground) with its own noise seed, and the first {spin_up} days are dropped. Below are RMS
differences between held-out and training runs, in units of the RMS difference of unrelated states
(other run, dates at least five days apart): at the same date over all days (mean and smallest over
variables and levels), over the first three days, the smallest pair of runs, and the nearest of all
pairs of states of any date. 1 is unrelated. `turned back` undoes the rotations first, which lays
the common start's systems onto each other: the hardest test.

| runs | same date | same date, smallest field | first 3 days | smallest pair | nearest two states |
| --- | --- | --- | --- | --- | --- |
{twin_rows}

## Drift

Sea-surface temperature and sea ice stay at the start date's values, so the climate wanders. Means
over all runs of the first and the last five days: area mean, its change in units of the spatial
standard deviation, and the last five days' variance and zonal power by wavenumber over the first's.

| variable | hPa | mean, first | mean, last | change / std | variance | k 1-3 | k 4-8 | k 9-31 |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{drift_rows}

![Drift per day; bands are the range of the six runs](pictures/sample_drift.png)
![Zonal spectra](pictures/sample_spectra.png)

## Packing

16-bit integers, value = offset + scale x integer; the error beside the RMS change of the field in
six hours, which is what a model has to predict. Specific humidity is slightly negative in places:
the spectral core undershoots in dry air, and nothing is clipped.

| variable | hPa | scale | offset | RMS error | RMS 6 h change | share | min | max |
| --- | --- | --- | --- | --- | --- | --- | --- | --- |
{packing_rows}

## Licences

The NeuralGCM weights are CC BY-SA 4.0 (Google), and so is this output of theirs. Contains modified
Copernicus Climate Change Service information 1959 (ERA5, Hersbach et al. 2020); neither the
European Commission nor ECMWF is responsible for any use of it.
"""


def open_runs(folder: Path) -> xr.Dataset:
    """All runs along a dimension `run`, in memory."""
    runs = []
    for run in range(NUM_RUNS):
        store = zarr.storage.ZipStore(folder / f"run_{run}.zarr.zip", mode="r")
        runs.append(xr.open_zarr(store, consolidated=False).load())
        store.close()
    return xr.concat(runs, "run", combine_attrs="override")


def fields(runs: xr.Dataset):
    """Every variable and level with its values [run time latitude longitude]."""
    for name in VARIABLES:
        for level in runs["level"].values:
            yield name, int(level), runs[name].sel(level=level).values.astype(np.float64)


def latitude_weights(runs: xr.Dataset) -> np.ndarray:
    weights = np.cos(np.deg2rad(runs["latitude"].values))
    return weights / weights.sum()


def by_day(series: np.ndarray) -> np.ndarray:
    """Daily means along the last axis."""
    num_days = series.shape[-1] // STEPS_PER_DAY
    whole = series[..., : num_days * STEPS_PER_DAY]
    return whole.reshape(*series.shape[:-1], num_days, STEPS_PER_DAY).mean(-1)


def drift(values: np.ndarray, weights: np.ndarray) -> dict[str, np.ndarray]:
    """Daily figures [run day] of one field [run time latitude longitude]."""
    mean = np.einsum("rtyx,y->rt", values, weights) / values.shape[-1]
    square = np.einsum("rtyx,y->rt", values**2, weights) / values.shape[-1]
    waves = np.abs(np.fft.rfft(values, axis=-1, norm="forward")) ** 2  # [run time latitude wave]
    power = 2 * np.einsum("rtyk,y->rtk", waves, weights)
    change = np.diff(values, axis=1, prepend=values[:, :1])
    change = np.einsum("rtyx,y->rt", change**2, weights) / values.shape[-1]
    change[:, 0] = change[:, 1]
    figures = {"mean": by_day(mean), "variance": by_day(square - mean**2)}
    figures["change"] = by_day(change)
    for band, waves_of_band in WAVE_BANDS.items():
        figures[band] = by_day(power[..., waves_of_band].sum(-1))
    return figures


def rotate(values: np.ndarray, degrees_east: float) -> np.ndarray:
    waves = np.fft.rfft(values, axis=-1)
    turn = np.exp(-1j * np.arange(waves.shape[-1]) * np.deg2rad(degrees_east))
    return np.fft.irfft(waves * turn, n=values.shape[-1], axis=-1)


def anomalies(values: np.ndarray, weights: np.ndarray, unrotate: bool) -> np.ndarray:
    """Vectors [run time point] whose dot product is the area mean of the product.

    `unrotate` turns every run back by the angle its start was turned, which lays those weather
    systems onto each other that the runs had in common at their start.
    """
    if unrotate:
        turns = [2.8125 * (run * 128 // NUM_RUNS) for run in range(NUM_RUNS)]
        values = np.stack([rotate(v, -turn) for v, turn in zip(values, turns, strict=True)])
    scaled = (values - values.mean((0, 1))) * np.sqrt(weights / values.shape[-1])[:, None]
    return scaled.reshape(*scaled.shape[:2], -1)


def square_differences(vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean square differences [held-out train time time] and those expected of unrelated states.

    What is expected is the two states' own variances less twice the mean product of states at
    least five days apart in date, so that a quiet spell does not look like a twin.
    """
    num_times = vectors.shape[1]
    square = (vectors**2).sum(-1)
    product = np.stack(
        [np.stack([vectors[held] @ vectors[run].T for run in TRAIN]) for held in HELD_OUT]
    )
    total = square[list(HELD_OUT)][:, None, :, None] + square[list(TRAIN)][None, :, None, :]
    lag = np.abs(np.subtract.outer(np.arange(num_times), np.arange(num_times)))
    unrelated = product[..., lag >= UNRELATED_DAYS * STEPS_PER_DAY].mean()
    return total - 2 * product, total - 2 * unrelated


def twin_ratios(runs: xr.Dataset, unrotate: bool) -> dict[str, np.ndarray]:
    """RMS difference over that of unrelated states: [field held-out train day], and the nearest."""
    weights = latitude_weights(runs)
    same_date, plain, nearest = [], [], 0.0
    lag = np.abs(np.subtract.outer(*[np.arange(runs.sizes["time"])] * 2))
    far = lag >= UNRELATED_DAYS * STEPS_PER_DAY
    for _, _, values in fields(runs):
        found, expected = square_differences(anomalies(values, weights, unrotate))
        diagonal = np.diagonal(found, axis1=2, axis2=3)
        same_date.append(
            np.sqrt(by_day(diagonal) / by_day(np.diagonal(expected, axis1=2, axis2=3)))
        )
        plain.append(np.sqrt(diagonal.mean() / found[..., far].mean()))
        nearest = nearest + found / expected / (3 * len(VARIABLES))
    return {
        "same_date": np.array(same_date),
        "plain": np.array(plain),
        "nearest": np.sqrt(nearest.min()),
    }


def readable(name: str) -> tuple[float, str]:
    return READABLE.get(name, (1.0, PACKING[name][0]))


def drift_rows(runs: xr.Dataset) -> list[str]:
    """First and last five days of every field as rows of a Markdown table."""
    weights = latitude_weights(runs)
    rows = []
    for name, level, values in fields(runs):
        figures = {key: daily.mean(0) for key, daily in drift(values, weights).items()}
        first = {key: daily[:5].mean() for key, daily in figures.items()}
        last = {key: daily[-5:].mean() for key, daily in figures.items()}
        factor, unit = readable(name)
        spread = np.sqrt(first["variance"])
        ratios = " | ".join(f"{last[b] / first[b]:.2f}" for b in ("variance", *WAVE_BANDS))
        rows.append(
            f"| {name} | {level} | {factor * first['mean']:.4g} | {factor * last['mean']:.4g} "
            f"{unit} | {(last['mean'] - first['mean']) / spread:+.3f} | {ratios} |"
        )
    return rows


def packing_rows(runs: xr.Dataset) -> list[str]:
    """Packing error of every field beside its RMS change in six hours."""
    weights = latitude_weights(runs)
    rows = []
    for name, level, values in fields(runs):
        index = runs["level"].values.tolist().index(level)
        error = runs[name].attrs["packing_rms_error"][index]
        change = np.sqrt(drift(values, weights)["change"].mean())
        _, _, scale, offset = PACKING[name]
        rows.append(
            f"| {name} | {level} | {scale:.4g} | {offset:.6g} | {error:.2g} | {change:.3g} "
            f"| {100 * error / change:.2f} % | {values.min():.4g} | {values.max():.4g} |"
        )
    return rows


def plot_drift(runs: xr.Dataset, path: Path) -> None:
    """Per day: change of the area mean, spatial and eddy standard deviation, RMS 6-hour change."""
    weights = latitude_weights(runs)
    figure, axes = plt.subplots(3, 5, figsize=(13, 6.5), sharex=True, layout="constrained")
    for column, name in enumerate(VARIABLES):
        factor, unit = readable(name)
        for level in runs["level"].values:
            daily = drift(runs[name].sel(level=level).values.astype(np.float64), weights)
            day = SPIN_UP_DAYS + 0.5 + np.arange(daily["mean"].shape[1])
            eddy = sum(daily[band] for band in WAVE_BANDS)
            shown = (
                factor * (daily["mean"] - daily["mean"][:, :1].mean()),
                np.sqrt(eddy / eddy[:, :5].mean()),
                np.sqrt(daily["change"] / daily["change"][:, :5].mean()),
            )
            for axis, lines in zip(axes[:, column], shown, strict=True):
                (line,) = axis.plot(day, lines.mean(0), label=f"{level} hPa")
                axis.fill_between(
                    day, lines.min(0), lines.max(0), color=line.get_color(), alpha=0.15
                )
        axes[0, column].set_title(f"{name.replace('_component_of', '')} [{unit}]", fontsize=9)
        axes[2, column].set_xlabel("days since start")
    for axis, label in zip(
        axes[:, 0], ("area mean, change", "eddy std, relative", "6 h change, relative"), strict=True
    ):
        axis.set_ylabel(label)
    axes[0, 0].legend(fontsize=7)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def plot_maps(runs: xr.Dataset, path: Path) -> None:
    """The test run's first and last state and a training run's last, one level per variable."""
    figure, axes = plt.subplots(5, 3, figsize=(12, 11.5), layout="constrained")
    shown = dict(zip(VARIABLES, (850, 300, 500, 500, 850), strict=True))
    for row, (name, level) in enumerate(shown.items()):
        factor, unit = readable(name)
        field = runs[name].sel(level=level) * factor
        low, high = np.quantile(field, [0.001, 0.999])
        if name.endswith("wind"):
            low, high = -max(-low, high), max(-low, high)
        for column, (run, time) in enumerate(((5, 0), (5, -1), (0, -1))):
            state = field.isel(run=run, time=time)
            style = {"vmin": low, "vmax": high, "cmap": "RdBu_r" if low == -high else "viridis"}
            mesh = axes[row, column].pcolormesh(
                state["longitude"], state["latitude"], state, rasterized=True, **style
            )
            date = np.datetime_as_string(state["time"].values, unit="h")
            axes[row, column].set_title(f"{SHORT[name]} {level} hPa, run {run}, {date}", fontsize=9)
        figure.colorbar(mesh, ax=axes[row], label=unit)
    figure.savefig(path, dpi=60)
    plt.close(figure)


def plot_spectra(runs: xr.Dataset, path: Path) -> None:
    """Zonal spectra of the first, middle and last five days, all runs together."""
    weights = latitude_weights(runs)
    figure, axes = plt.subplots(1, 5, figsize=(14, 3.2), layout="constrained")
    num_times = runs.sizes["time"]
    width = 5 * STEPS_PER_DAY
    for axis, name in zip(axes, VARIABLES, strict=True):
        values = runs[name].sel(level=500).values.astype(np.float64)
        for label, start in (("first", 0), ("middle", num_times // 2 - width // 2)):
            _spectrum(axis, values[:, start : start + width], weights, f"{label} 5 days")
        _spectrum(axis, values[:, -width:], weights, "last 5 days")
        axis.set(title=f"{SHORT[name]} 500 hPa", xlabel="zonal wavenumber")
    axes[0].set_ylabel("power")
    axes[0].legend(fontsize=7)
    figure.savefig(path, dpi=75)
    plt.close(figure)


def _spectrum(axis, values: np.ndarray, weights: np.ndarray, label: str) -> None:
    waves = np.abs(np.fft.rfft(values, axis=-1, norm="forward")) ** 2
    power = np.einsum("rtyk,y->k", waves, weights) / (values.shape[0] * values.shape[1])
    axis.loglog(np.arange(1, 32), power[1:32], label=label)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sample", type=Path, default=Path("atmossl/assets/sample"))
    parser.add_argument("--docs", type=Path, default=Path("docs"))
    arguments = parser.parse_args()
    runs = open_runs(arguments.sample)
    pictures = arguments.docs / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    plot_maps(runs, pictures / "sample_maps.png")
    plot_drift(runs, pictures / "sample_drift.png")
    plot_spectra(runs, pictures / "sample_spectra.png")
    size = sum(path.stat().st_size for path in arguments.sample.glob("*.zarr.zip"))
    twins, turned = twin_ratios(runs, unrotate=False), twin_ratios(runs, unrotate=True)
    text = PAGE.format(
        size=size / 1e6,
        days=runs.sizes["time"] // STEPS_PER_DAY,
        num_times=runs.sizes["time"],
        spin_up=SPIN_UP_DAYS,
        first=np.datetime_as_string(runs["time"].values[0], "h"),
        last=np.datetime_as_string(runs["time"].values[-1], "h"),
        twin_rows="\n".join(
            f"| {label} | {found['plain'].mean():.3f} | {found['plain'].min():.3f} "
            f"| {found['same_date'].mean(0)[..., :3].mean():.3f} "
            f"| {found['same_date'].mean(0).mean(-1).min():.3f} | {found['nearest']:.3f} |"
            for label, found in (("as they are", twins), ("turned back", turned))
        ),
        drift_rows="\n".join(drift_rows(runs)),
        packing_rows="\n".join(packing_rows(runs)),
    )
    (arguments.docs / "sample.md").write_text(text)


if __name__ == "__main__":
    main()

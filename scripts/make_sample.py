"""Make the embedded sample: six runs of a stochastic NeuralGCM started from one ERA5 state.

    python scripts/make_sample.py simulate --work DIR --runs 0 1 2 --days 48   # hours of CPU
    python scripts/make_sample.py pack --work DIR                              # -> package assets
    python scripts/sample_report.py                                            # -> docs/sample.md

`simulate` keeps a raw float32 file per block of days and the model's state after it, so that a
killed run goes on where it stopped. Each run starts from the ERA5 state of 1959-01-02T00 rotated
in longitude by its own angle, with its own noise seed. A rotation keeps the zonal mean and the
geostrophic balance, but puts every weather system elsewhere, so no two runs are ever near twins.
StoreRequest the extra `sample` (neuralgcm, jax); users of the sample need neither.
"""

import argparse
import os
import pickle
import sys
import zipfile
from pathlib import Path

import numpy as np

VARIABLES = (
    "temperature",
    "u_component_of_wind",
    "v_component_of_wind",
    "geopotential",
    "specific_humidity",
)
LEVELS_HPA = (300, 500, 850)
NUM_RUNS = 6
CELLS_BETWEEN = 5  # a sixth of the circle has 21 cells: four runs fit before two would coincide
STEP_HOURS = 6
BLOCK_DAYS = 2
START = np.datetime64("1959-01-02T00", "ns")
# Rotated back onto each other, two runs differ like unrelated states only after some eight days.
SPIN_UP_DAYS = 8
SAMPLE_DAYS = 40
# Units, standard name, scale and offset of the packed 16-bit integers. The scales are powers of
# two, so that unpacking is exact in float32; they never change, so that repacking adds no error.
PACKING = {
    "temperature": ("K", "air_temperature", 2.0**-6, 250.0),
    "u_component_of_wind": ("m s-1", "eastward_wind", 2.0**-5, 0.0),
    "v_component_of_wind": ("m s-1", "northward_wind", 2.0**-5, 0.0),
    "geopotential": ("m2 s-2", "geopotential", 4.0, 50000.0),
    "specific_humidity": ("kg kg-1", "specific_humidity", 2.0**-20, 2.0**-6),
}


def load_model():
    """The TL63 stochastic demo model and its ERA5 state, from the neuralgcm package alone."""
    import jax._src.array as jax_array
    import neuralgcm
    from neuralgcm import demo

    reconstruct = jax_array._reconstruct_array

    def without_named_shape(fun, args, arr_state, aval_state):  # pickled by an older jax
        kept = {key: value for key, value in aval_state.items() if key != "named_shape"}
        return reconstruct(fun, args, arr_state, kept)

    jax_array._reconstruct_array = without_named_shape
    use_matrix_products_for_column_convolutions()
    model = neuralgcm.PressureLevelModel.from_checkpoint(demo.load_checkpoint_tl63_stochastic())
    return model, demo.load_data(model.data_coords)


def use_matrix_products_for_column_convolutions() -> None:
    """Write neuralgcm's vertical convolutions as matrix products: the same sums, faster on CPUs."""
    import haiku as hk
    import jax.numpy as jnp
    from neuralgcm.legacy import layers

    class ConvLevel(layers.ConvLevel):
        def __call__(self, inputs):  # [channel level], one column
            (size,), (rate,) = self.kernel_shape, self.kernel_dilation
            weights = hk.get_parameter("w", (size, inputs.shape[0], self.output_channels))
            before = (size - 1) * rate // 2
            padded = jnp.pad(inputs, [(0, 0), (before, (size - 1) * rate - before)])
            taps = [padded[:, n * rate : n * rate + inputs.shape[1]] for n in range(size)]
            product = jnp.einsum("kio,kil->ol", weights, jnp.stack(taps))
            return product + hk.get_parameter("b", (self.output_channels, 1))

    layers.ConvLevel = ConvLevel


def rotation_cells(run: int) -> int:
    """Rotation of a run's start in cells of the model's grid, 128 around the circle.

    Runs beyond those of the sample (`--runs 6 7 ...`, more weather to train on) start between them.
    """
    return run % NUM_RUNS * 128 // NUM_RUNS + run // NUM_RUNS * CELLS_BETWEEN


def start_state(model, era5, run: int):
    """Model state of `run`: the ERA5 state rotated by `rotation_cells`, forcing unrotated."""
    import jax

    rotated = era5.isel(time=0).roll(longitude=rotation_cells(run), roll_coords=False)
    inputs = model.inputs_from_xarray(rotated)
    forcings = model.forcings_from_xarray(era5.isel(time=0))
    return model.encode(inputs, forcings, jax.random.key(run))


def write_atomically(path: Path, write) -> None:
    partial = path.with_suffix(path.suffix + f".{os.getpid()}")
    with partial.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    partial.rename(path)


def save_state(path: Path, state) -> None:
    """Pickle the model state; typed random keys are stored as their raw words."""
    import jax

    def raw(leaf):
        if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return ("key", np.asarray(jax.random.key_data(leaf)))
        return ("array", np.asarray(leaf))

    leaves = [raw(leaf) for leaf in jax.tree.leaves(state)]
    write_atomically(path, lambda file: pickle.dump(leaves, file))


def load_state(path: Path, like):
    import jax

    def back(kind, value):
        return jax.random.wrap_key_data(value) if kind == "key" else jax.numpy.asarray(value)

    leaves = [back(*leaf) for leaf in pickle.loads(path.read_bytes())]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def block_path(work: Path, run: int, block: int) -> Path:
    return work / f"run_{run}" / f"block_{block:03d}.npz"


def simulate_block(model, unroll, state, work: Path, run: int, block: int):
    """Advance one block, keep the chosen levels [time, variable, level, lon, lat]."""
    state, outputs = unroll(state)
    levels = np.asarray(model.data_coords.vertical.centers)
    index = [int(np.flatnonzero(levels == level)[0]) for level in LEVELS_HPA]
    fields = {name: np.asarray(outputs[name][:, index], np.float32) for name in VARIABLES}
    for name, values in fields.items():
        if not np.isfinite(values).all():
            raise SystemExit(f"run {run}, block {block}: {name} is not finite any more")
    save_state(work / f"run_{run}" / f"state_{block:03d}.pkl", state)
    write_atomically(block_path(work, run, block), lambda file: np.savez(file, **fields))
    return state


def simulate(work: Path, runs: list[int], days: int) -> None:
    """Integrate every run to `days`, round robin in blocks, so that all runs grow together."""
    model, era5 = load_model()
    forcings = model.forcings_from_xarray(era5.isel(time=[0]))
    steps = BLOCK_DAYS * 24 // STEP_HOURS
    delta = np.timedelta64(STEP_HOURS, "h")

    def unroll(state):
        return model.unroll(state, forcings, steps=steps, timedelta=delta)

    states = {}
    for run in runs:
        (work / f"run_{run}").mkdir(parents=True, exist_ok=True)
    for block in range(days // BLOCK_DAYS):
        for run in runs:
            if block_path(work, run, block).exists():
                continue
            if run not in states:
                states[run] = start_state(model, era5, run)
                if block > 0:
                    previous = work / f"run_{run}" / f"state_{block - 1:03d}.pkl"
                    states[run] = load_state(previous, like=states[run])
            states[run] = simulate_block(model, unroll, states[run], work, run, block)
            sys.stderr.write(f"run {run}: day {(block + 1) * BLOCK_DAYS} of {days}\n")


def read_run(work: Path, run: int, num_blocks: int, spin_up_days: int):
    """One run after its spin-up as a dataset on the model's own grid, float32."""
    import xarray as xr

    steps_per_block = BLOCK_DAYS * 24 // STEP_HOURS
    first = spin_up_days // BLOCK_DAYS
    blocks = [np.load(block_path(work, run, number)) for number in range(first, num_blocks)]
    dims = ("time", "level", "longitude", "latitude")
    step = np.timedelta64(STEP_HOURS, "h")
    start = START + (first * steps_per_block + 1) * step
    fields = {name: (dims, np.concatenate([block[name] for block in blocks])) for name in VARIABLES}
    times = start + np.arange(len(fields[VARIABLES[0]][1])) * step
    return xr.Dataset(fields, {"time": times, "level": np.array(LEVELS_HPA, np.int32)})


def regridder():
    """Conservative, from the TL63 Gaussian grid to 64 x 32 cells of 5.625 degrees."""
    from dinosaur import horizontal_interpolation, spherical_harmonic

    target = spherical_harmonic.Grid(
        longitude_nodes=64, latitude_nodes=32, latitude_spacing="equiangular"
    )
    return horizontal_interpolation.ConservativeRegridder(spherical_harmonic.Grid.TL63(), target)


def regrid(dataset, regrid_field):
    """A run on the sample's grid, dims (time, level, latitude, longitude)."""
    import xarray as xr

    fields = {}
    for name in VARIABLES:
        values = np.asarray(regrid_field(dataset[name].values))  # [time level longitude latitude]
        dims = ("time", "level", "longitude", "latitude")
        fields[name] = xr.DataArray(values.astype(np.float32), dims=dims)
    grid = regrid_field.target_grid
    coords = {
        "time": dataset["time"],
        "level": dataset["level"],
        "latitude": np.round(np.rad2deg(grid.latitudes), 4),
        "longitude": np.round(np.rad2deg(grid.longitudes), 4),
    }
    return xr.Dataset(fields).assign_coords(coords).transpose("time", "level", "latitude", ...)


def check_area_means(raw, regridded) -> None:
    """Assert that regridding kept every area mean, to float32's rounding."""
    sine = np.polynomial.legendre.leggauss(raw.sizes["latitude"])[0]  # of the model's latitudes
    latitude = np.deg2rad(regridded["latitude"].values)
    for name in VARIABLES:
        zonal = raw[name].mean("longitude", dtype=np.float64).values
        before = area_mean(zonal, np.arcsin(sine))
        after = area_mean(regridded[name].mean("longitude", dtype=np.float64).values, latitude)
        error = np.abs(after - before).max() / raw[name].values.std()
        assert error < 1e-5, f"{name}: area means differ by {error} standard deviations"


def area_mean(zonal_mean: np.ndarray, latitude: np.ndarray) -> np.ndarray:
    """Mean over latitude in radians (last axis), cells ending halfway between the nodes."""
    middles = (latitude[1:] + latitude[:-1]) / 2
    areas = np.diff(np.sin(np.concatenate([[-np.pi / 2], middles, [np.pi / 2]])))
    return zonal_mean @ areas / areas.sum()


def packing_error(values: np.ndarray, scale: float, offset: float) -> list[float]:
    """RMS error of packing per level [time level latitude longitude]; raises on overflow."""
    packed = np.rint((values.astype(np.float64) - offset) / scale)
    limits = np.iinfo(np.int16)
    if packed.min() <= limits.min or packed.max() > limits.max:  # the minimum marks missing values
        raise SystemExit(f"values {values.min()} to {values.max()} do not fit the packing")
    return np.sqrt(np.mean((packed * scale + offset - values) ** 2, axis=(0, 2, 3))).tolist()


def with_attributes(dataset, run: int, spin_up_days: int):
    """CF attributes of variables and coordinates, provenance and licence of the whole."""
    for name, (units, standard_name, scale, offset) in PACKING.items():
        dataset[name].attrs = {
            "units": units,
            "standard_name": standard_name,
            "long_name": name.replace("_", " "),
            "packing_rms_error": packing_error(dataset[name].values, scale, offset),
        }
        dataset[name].encoding = {
            "dtype": "int16",
            "scale_factor": scale,
            "add_offset": offset,
            "_FillValue": np.int16(np.iinfo(np.int16).min),
        }
    dataset["level"].attrs = {"units": "hPa", "standard_name": "air_pressure", "positive": "down"}
    dataset["latitude"].attrs = {"units": "degrees_north", "standard_name": "latitude"}
    dataset["longitude"].attrs = {"units": "degrees_east", "standard_name": "longitude"}
    dataset["time"].encoding = {"units": "hours since 1959-01-01", "dtype": "int64"}
    role = "train" if run < 4 else ("validation", "test")[run - 4]
    dataset.attrs = {
        "Conventions": "CF-1.11",
        "title": "atmossl sample: stochastic NeuralGCM started from ERA5",
        "comment": "Model output started from one ERA5 state. This is not reanalysis.",
        "source": "NeuralGCM 1.2.2, TL63 stochastic demo checkpoint, ERA5 state 1959-01-02T00",
        "references": "Kochkov et al. (2024), doi:10.1038/s41586-024-07744-y; "
        "Hersbach et al. (2020), doi:10.1002/qj.3803",
        "license": "CC BY-SA 4.0 (derived from NeuralGCM weights, CC BY-SA 4.0). Contains modified "
        "Copernicus Climate Change Service information (ERA5).",
        "history": f"scripts/make_sample.py: run {run}",
        "noise_seed": run,
        "start_rotation_degrees": 2.8125 * rotation_cells(run),
        "spin_up_days_dropped": spin_up_days,
        "split": role,
    }
    return dataset


def write_zip(dataset, path: Path) -> None:
    """One zarr v3 store in a zip file, which appears under its name when complete.

    Times go last and bytes are shuffled before zstd: the smallest of the layouts tried. The same
    data always give the same bytes.
    """
    import zarr
    from zarr.codecs import BloscCodec, TransposeCodec

    for name in VARIABLES:
        dataset[name].encoding |= {
            "chunks": (16, len(LEVELS_HPA), 32, 64),
            "filters": [TransposeCodec(order=(1, 2, 3, 0))],
            "compressors": BloscCodec(cname="zstd", clevel=9, shuffle="shuffle"),
        }
    contents: dict = {}
    dataset.to_zarr(zarr.storage.MemoryStore(contents), consolidated=False, zarr_format=3)
    path.parent.mkdir(parents=True, exist_ok=True)

    def write(file) -> None:
        with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
            for name in sorted(contents):
                archive.writestr(zipfile.ZipInfo(name), contents[name].to_bytes())

    write_atomically(path, write)


def num_blocks_done(work: Path, run: int) -> int:
    """Blocks of a run without a gap from the start."""
    return next(n for n in range(10_000) if not block_path(work, run, n).exists())


def pack(work: Path, output: Path, spin_up_days: int) -> None:
    """Regrid, quantise and pack what every run has so far, all runs to the same length."""
    longest = (spin_up_days + SAMPLE_DAYS) // BLOCK_DAYS
    num_blocks = min(longest, *(num_blocks_done(work, run) for run in range(NUM_RUNS)))
    if num_blocks * BLOCK_DAYS <= spin_up_days:
        raise SystemExit(f"{num_blocks * BLOCK_DAYS} days of every run: the spin-up is not over")
    regrid_field = regridder()
    for run in range(NUM_RUNS):
        raw = read_run(work, run, num_blocks, spin_up_days)
        dataset = regrid(raw, regrid_field)
        check_area_means(raw, dataset)
        write_zip(with_attributes(dataset, run, spin_up_days), output / f"run_{run}.zarr.zip")
        sys.stderr.write(f"run {run}: {dataset.sizes['time']} steps packed\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("simulate")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--runs", type=int, nargs="+", default=list(range(NUM_RUNS)))
    command.add_argument("--days", type=int, default=SPIN_UP_DAYS + SAMPLE_DAYS)
    command = commands.add_parser("pack")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--output", type=Path, default=Path("atmossl/assets/sample"))
    command.add_argument("--spin-up-days", type=int, default=SPIN_UP_DAYS)
    arguments = parser.parse_args()
    if arguments.command == "simulate":
        simulate(arguments.work, arguments.runs, arguments.days)
    else:
        pack(arguments.work, arguments.output, arguments.spin_up_days)


if __name__ == "__main__":
    main()

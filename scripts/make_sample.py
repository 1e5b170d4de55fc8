"""Make the embedded sample: six runs of a stochastic NeuralGCM started from one ERA5 state.

    python scripts/make_sample.py simulate --work DIR --runs 0 1 2 --days 46   # hours of CPU
    python scripts/make_sample.py pack --work DIR                              # -> package assets

`simulate` keeps a raw float32 file per block of days and the model's state after it, so that a
killed run goes on where it stopped. Each run starts from the ERA5 state of 1959-01-02T00 rotated
in longitude by its own angle, with its own noise seed. A rotation keeps the zonal mean and the
geostrophic balance, but puts every weather system elsewhere, so no two runs are ever near twins.
Needs the extra `sample` (neuralgcm, jax); users of the sample need neither.
"""

import argparse
import os
import pickle
import sys
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
STEP_HOURS = 6
BLOCK_DAYS = 2
START = np.datetime64("1959-01-02T00", "ns")


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
    model = neuralgcm.PressureLevelModel.from_checkpoint(demo.load_checkpoint_tl63_stochastic())
    return model, demo.load_data(model.data_coords)


def start_state(model, era5, run: int):
    """Model state of `run`: the ERA5 state rotated by run/6 of the circle, forcing unrotated."""
    import jax

    shift = run * era5.sizes["longitude"] // NUM_RUNS
    rotated = era5.isel(time=0).roll(longitude=shift, roll_coords=False)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("simulate")
    command.add_argument("--work", type=Path, required=True)
    command.add_argument("--runs", type=int, nargs="+", default=list(range(NUM_RUNS)))
    command.add_argument("--days", type=int, default=46)
    arguments = parser.parse_args()
    simulate(arguments.work, arguments.runs, arguments.days)


if __name__ == "__main__":
    main()

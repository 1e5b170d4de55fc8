"""Error of a fine-tuned model against the number of samples, and of one from scratch.

    python -m benchmarks.finetune --runs FOLDER                       # an hour on two cores
    python -m benchmarks.finetune --targets climate --fractions 0.1 1 --steps 50 --pretrain 100

A tiny network is pretrained with the mixture of masks on two runs of the sample, then tuned to a
forecast of 6 h on a fraction of two others, in unbroken blocks of time, until validation (run 4)
no longer improves; what is in --runs already is not done again. Targets: `climate`, the other runs
as they are, which another seed of the model made; `resolution`, means over 2 x 2 cells of them;
`variable`, those with specific humidity, which pretraining lacked and which alone is scored. Each
is tuned whole (`full`) and, but for the new variable, whose layers would stay as they are, by thin
matrices (`low_rank`, LoRA of rank 4), and trained from random weights (`scratch`), with the same
steps, batches, learning rate and patience.

Scored is the held-out run 5: RMSE over that of persistence, root of the mean over variables, levels
and dates of area-weighted squares, and its interval (block bootstrap over dates). `over_scratch`:
ratio to `scratch` with all samples, paired by date. `fine_tuned_10pct_over_scratch_100pct`: that of
`full` with a tenth of them, mean over targets.
"""

import argparse
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import xarray as xr
import yaml

import atmossl
from atmossl.cli import main as command
from atmossl.data.catalog import catalog_entry
from atmossl.data.fraction import blocks_of_time
from atmossl.data.store import open_split
from atmossl.evaluation.bootstrap import BlockBootstrap
from benchmarks.report import finish

TARGETS = ("climate", "resolution", "variable")
KINDS = {
    "full": (), "low_rank": ("warm_start.low_rank.rank=4",),
    "scratch": ("warm_start.checkpoints=[]",),
}  # fmt: skip
UNSEEN = "specific_humidity"
WINDOW_STEPS = 3
RUN_STEPS = 160  # of one run of the sample
_DATES = slice(WINDOW_STEPS, RUN_STEPS - 1, 6)
_BOOTSTRAP = BlockBootstrap(block_length=3, num_resamples=500)


def written_catalog(folder: Path) -> Path:
    """Entries `before` (runs 0 and 1), `climate`, `variable` (2 and 3), `resolution` (of means)."""
    path = folder / "catalog.yaml"
    if path.exists():
        return path
    whole = catalog_entry("sample").model_dump(mode="json", exclude_defaults=True)
    entries = {}
    for name, runs in (("before", (0, 1)), *((target, (2, 3)) for target in TARGETS)):
        splits = {"train": runs, "validation": (4,), "test": (5,)}
        of_split = {
            key: [{"segment": f"run_{n}"} for n in numbers] for key, numbers in splits.items()
        }
        entries[name] = {**whole, "splits": of_split}
    coarse = {}
    for split in ("train", "validation", "test"):
        for name, dataset in fields_of(split).items():
            coarse[name] = {"location": str((folder / f"{name}.zarr").absolute())}
            means = dataset.coarsen(latitude=2, longitude=2).mean()
            means.to_zarr(folder / f"{name}.zarr", consolidated=False, mode="w")
    entries["resolution"]["segments"] = coarse
    path.write_text(yaml.safe_dump(entries))
    return path


def fields_of(
    split: str, name: str = "sample", catalog: Path | None = None
) -> dict[str, xr.Dataset]:
    """All fields of a split in memory, by the segment's name."""
    entry = catalog_entry(name, catalog)
    segments = open_split(entry, split, variables=list(entry.variables), levels=entry.levels)  # pyright: ignore[reportArgumentType]
    datasets = {}
    for segment in segments:
        dims = ("level", "time", "latitude", "longitude")
        datasets[segment.name] = xr.Dataset(
            {
                variable: (dims, segment.read(variable, segment.levels, 0, len(segment.times),
                                              segment.whole()))
                for variable in segment.variables
            },
            {"level": list(segment.levels), "time": segment.times.astype("datetime64[ns]"),
             "latitude": segment.grid.latitude, "longitude": segment.grid.longitude},
        )  # fmt: skip
    return datasets


def trained(output: Path, data: str, catalog: Path, steps: int, *more: str) -> Path:
    """The best checkpoint of a run, unless it is there already."""
    best = output / "checkpoints" / "best.ckpt"
    if not (output / "curves").exists():  # drawn at the end
        variables = [v for v in catalog_entry("sample").variables if v != UNSEEN]
        variables += [UNSEEN] if data == "variable" else []
        words = [
            "train", "experiment=finetune", f"data.name={data}", f"data.catalog={catalog}",
            f"stream.atmosphere.variables=[{','.join(variables)}]", "model=tiny",
            f"data.window={{time: {WINDOW_STEPS}, lat: 0, lon: 0}}", "warm_start.network=false",
            "tasks=[forecast]", "tasks.0.lead_time=6h", "optimizer.learning_rate=1e-3",
            "optimizer.warmup_steps=5", f"trainer.max_steps={steps}", "trainer.pictures=false",
            f"trainer.validation_interval={max(1, steps // 10)}", "trainer.validation_batches=4",
            f"paths.output={output}", "resume=auto", *more,
        ]  # fmt: skip
        if code := command(words):
            raise SystemExit(f"a training ended with code {code}: atmossl {' '.join(words)}")
    return best


def losses(checkpoint: Path, truth: xr.Dataset, variables: Sequence[str]) -> np.ndarray:
    """Mean square error of forecasts over that of persistence, for every date: the mean over
    variables and levels, each of these in units of its mean over the dates for persistence."""
    times = truth["time"].to_numpy()[_DATES]
    model = atmossl.load(checkpoint, device="cpu")
    shown = truth[[name for spec in model.trained.specs for name in spec.variables]]
    forecast = model.predict("forecast", shown, times.astype(str).tolist(), lead_time="6h")
    valid = truth[list(variables)].sel(time=times + np.timedelta64(6, "h"))
    predicted = forecast[list(variables)].mean("member").isel(lead_time=0, drop=True)
    of_model = square_error(
        predicted.rename(init_time="time").assign_coords(time=valid.time), valid
    )
    before = truth[list(variables)].sel(time=times).assign_coords(time=valid.time)
    persistence = square_error(before, valid)
    ratio = (of_model / persistence.mean("time")).to_dataarray("variable")
    return ratio.mean(("variable", "level")).transpose("time").to_numpy()


def square_error(first: xr.Dataset, second: xr.Dataset) -> xr.Dataset:
    """Area-weighted mean over the sphere of the squared difference."""
    latitude = second["latitude"]
    weight = latitude.copy(data=np.cos(np.deg2rad(latitude.to_numpy())))
    return ((first - second) ** 2).weighted(weight).mean(("latitude", "longitude"))


def ratio(loss: np.ndarray, over: np.ndarray) -> dict[str, Any]:
    """Root of the ratio of mean losses, and its interval over the same draws of dates."""
    counts = _BOOTSTRAP.draw([len(loss)], np.random.default_rng(0))
    low, high = np.quantile(np.sqrt((counts @ loss) / (counts @ over)), [0.025, 0.975])
    value = np.sqrt(loss.mean() / over.mean())
    return {"value": round(float(value), 4), "interval": [round(float(x), 4) for x in (low, high)]}


def num_samples(fraction: float) -> int:
    """Windows in a fraction of two runs."""
    blocks = blocks_of_time([RUN_STEPS, RUN_STEPS], fraction, seed=0)
    return sum(max(0, len(block) - WINDOW_STEPS + 1) for block in blocks.values())


def of_target(
    target: str, fractions: Sequence[float], steps: int, start: Path, catalog: Path
) -> dict[str, Any]:
    """Errors of every kind and fraction."""
    folder, (truth,) = catalog.parent, fields_of("test", target, catalog).values()
    names = [UNSEEN] if target == "variable" else [v for v in truth.data_vars if v != UNSEEN]
    errors: dict[tuple[float, str], np.ndarray] = {}
    for fraction in sorted({*fractions, 1.0}):
        for kind, words in KINDS.items():
            if (target, kind) == ("variable", "low_rank"):
                continue
            settings = (f"data.fraction={fraction:g}", f"warm_start.checkpoints=[{start}]", *words,
                    "masking=causal", "masking.hidden_steps=[1,1]")  # fmt: skip
            output = folder / f"{target}_{kind}_{fraction:g}"
            best = trained(output, target, catalog, steps, *settings)
            errors[fraction, kind] = losses(best, truth, [str(name) for name in names])
    scratch, table = errors[1.0, "scratch"], {}
    for (fraction, kind), loss in errors.items():
        row = table.setdefault(f"{fraction:g}", {"samples": num_samples(fraction)})
        row[kind] = {
            "rmse_over_persistence": ratio(loss, np.ones_like(loss)),
            "over_scratch": ratio(loss, scratch),
        }
    return table


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", nargs="*", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--fractions", nargs="*", type=float, default=[0.01, 0.1, 1.0])
    parser.add_argument("--pretrain", type=int, default=300)
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--runs", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        runs = (arguments.runs or Path(scratch)).absolute()
        runs.mkdir(parents=True, exist_ok=True)
        catalog, first = written_catalog(runs), "warm_start.checkpoints=[]"
        words = (first, "trainer.patience=0", "data.fraction=1.0", "masking=mixture")
        start = trained(runs / "before", "before", catalog, arguments.pretrain, *words)
        tables = {
            target: of_target(target, arguments.fractions, arguments.steps, start, catalog)
            for target in arguments.targets
        }
    figures: dict[str, Any] = {
        "pretraining_steps": arguments.pretrain, "steps": arguments.steps, "errors": tables,
    }  # fmt: skip
    if 0.1 in arguments.fractions:
        tenths = [table["0.1"]["full"]["over_scratch"]["value"] for table in tables.values()]
        figures["fine_tuned_10pct_over_scratch_100pct"] = round(float(np.mean(tenths)), 4)
    finish("finetune", figures)


if __name__ == "__main__":
    main()

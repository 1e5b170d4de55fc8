"""`python -m benchmarks.first_day`: the first day of a user, as a script.

From NetCDF files of somebody else's making to a scored forecast with one's own checkpoint: how many
commands, how many keys to type. Then forty mistakes: the CPU seconds until each is answered, and
how many answers name what was wrong and what is valid.

Two commands more, `git clone` and `bash scripts/quickstart.sh` or `pip install`, come before these.
What only makes this benchmark short (`SHORTER`) is not counted: without it the run is longer.
"""

import os
import re
import resource
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import xarray as xr

from benchmarks.report import finish, take_no_options

SHORTER = (
    "model=tiny", "trainer.max_steps=20", "optimizer.warmup_steps=2", "trainer.pictures=false",
    "trainer.accelerator=cpu", "trainer.validation_batches=1",
)  # fmt: skip
WALK = (
    (("data", "add", "era5/*.nc"), ()),
    (("train", "data=era5", "paths.output=runs/era5"), SHORTER),
    (("predict", "task=forecast", "checkpoint=runs/era5", "init_time=2001-02-16T00",
      "output=forecast.zarr"), ()),
    (("evaluate", "checkpoint=runs/era5", "output=report"), ("bootstrap=20",)),
)  # fmt: skip
INSTALLING = 2  # commands before those
PREDICT = ("predict", "task=forecast", "checkpoint=runs/era5", "output=o.zarr")


class Mistake(NamedTuple):
    """A command with one thing wrong, and patterns of its name and of what would be right."""

    words: tuple[str, ...]
    wrong: str
    right: str


def _of(command: str, wrong: str, right: str) -> Mistake:
    return Mistake(tuple(command.split()), wrong, right)


MISTAKES = (
    _of("train data=erra5", r"data\.name", "era5"),
    _of("train data=era5/nothing.zarr", r"nothing\.zarr", "valid|needed"),
    _of("train model.dmi=64", r"model\.dmi", r"model\.dim"),
    _of("train modle=tiny", "modle", "model"),
    _of("train model=tinny", "model=tinny", "tiny"),
    _of("train model.dim=many", r"model\.dim", "integer|number"),
    _of("train model.dim=30", r"model\.dim", "multiple"),
    _of("train trainer.max_steps=-1", r"trainer\.max_steps", "above 0"),
    _of("train data=era5 data.window.lat=7", r"data\.window\.lat", "valid"),
    _of("train data=era5 stream.atmosphere.levels=[300,400,500]", r"levels=\[400\]", "valid"),
    _of("train data=era5 stream.atmosphere.variables=[temprature]", "temprature", "valid"),
    _of("train data=era5 stream.atmosphere.token_size.lat=3", r"token_size\.lat", "valid"),
    _of("train masking=brt", "masking=brt", "bert"),
    _of("train logger=wandbb", "wandbb", "wandb"),
    _of("train optimizer=sgd", "optimizer=sgd", "adamw"),
    _of("train objective=mae", "objective=mae", "masked"),
    _of("train resume=yes paths.output=runs/new", "resume=yes", "auto"),
    _of("train data=era5 paths.output=runs/era5", r"paths\.output", "resume=auto"),
    _of("train warm_start.checkpoints=[no.ckpt]", r"no\.ckpt", "path|default"),
    _of("train trainer.precision=fp16", r"trainer\.precision", "16-mixed"),
    _of("train trainer.accelerator=gpu", "accelerator=gpu", "cpu"),
    _of("train paths.output=runs/era5 resume=auto model.dim=64", r"model\.dim=32", "warm_start"),
    _of("predict task=forcast output=o.zarr", "forcast", "forecast"),
    _of("predict task=forecast", "output", "output="),
    _of("predict task=forecast checkpoint=no.ckpt output=o.zarr", r"no\.ckpt", "default"),
    Mistake((*PREDICT, "init_time=1800-01-01"), "init_time=1800", "valid|covers"),
    Mistake((*PREDICT, "init_time=yesterday"), "init_time", "ISO"),
    Mistake((*PREDICT, "init_time=2001-02-15/2001-02-16/6"), "init_time", "12h"),
    Mistake((*PREDICT, "task.lead_time=12"), r"task\.lead_time", "12h"),
    Mistake((*PREDICT[:-1], "output=o.txt"), r"o\.txt", r"\.zarr"),
    Mistake((*PREDICT, "data=sampel"), "sampel", "sample'"),
    Mistake((*PREDICT, "split=tset"), "split", "'test'"),
    Mistake((*PREDICT, "task.leadtime=12h"), r"task\.leadtime", "lead_time"),
    _of("evaluate checkpoint=runs/era5 output=r tasks=[forcast]", "forcast", "forecast"),
    _of("evaluate checkpoint=runs/era5 output=report", "output=report", "another"),
    _of("evaluate checkpoint=runs/era5 output=r regions=[tropic]", "regions", "tropics"),
    _of("data add era5/*.nc name=sample", "name=sample", "another name"),
    _of("data inspct era5", "inspct", "inspect"),
    _of("data inspect erra5", r"data\.name=erra5", "era5"),
    _of("embed checkpoint=runs/era5 layer=99 output=l.zarr", "layer=99", "valid"),
)


def make_files(folder: Path) -> None:
    """Fifty days of six-hourly fields at 11.25 degrees in four files, with others' short names, the
    north first, and pressure in Pa."""
    rng = np.random.default_rng(0)
    times = np.datetime64("2001-01-01", "ns") + np.arange(200) * np.timedelta64(6, "h")
    latitude, longitude = np.linspace(84.375, -84.375, 16), np.arange(32) * 11.25
    phase = np.deg2rad(longitude) - 0.2 * np.arange(200)[:, None, None, None]
    wave = np.cos(np.deg2rad(latitude))[:, None] * np.sin(phase)
    wave = wave + 0.1 * rng.standard_normal((200, 3, 16, 32))
    dims = ("valid_time", "plev", "lat", "lon")
    levels = ("plev", [30000.0, 50000.0, 85000.0], {"units": "Pa"})
    coords = {"valid_time": times, "plev": levels, "lat": latitude, "lon": longitude}
    fields = {
        "t": (dims, 250 + 10 * wave, {"units": "K"}),
        "u": (dims, 10 * wave, {"units": "m s**-1"}),
        "t2m": (("valid_time", "lat", "lon"), 280 + 10 * wave[:, 2], {"units": "K"}),
    }
    whole = xr.Dataset(fields, coords).astype(np.float32)
    folder.mkdir()
    for number in range(4):
        part = whole.isel(valid_time=slice(50 * number, 50 * number + 50))
        part.to_netcdf(folder / f"part_{number}.nc")


def answer(words: tuple[str, ...], folder: Path) -> tuple[int, float, str]:
    """Exit code, CPU seconds and all that one command says, in a folder of the user."""
    program = "import sys; from atmossl.cli import main; sys.exit(main(sys.argv[1:]))"
    environment = {"OMP_NUM_THREADS": "1", "COLUMNS": "300", "ATMOSSL_CACHE": f"{folder}/cache"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    finished = subprocess.run(
        [sys.executable, "-c", program, *words],
        cwd=folder, capture_output=True, text=True, env={**os.environ, **environment},
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return finished.returncode, seconds, finished.stdout + finished.stderr


def walk(folder: Path) -> dict[str, object]:
    """The commands in turn; the benchmark ends where one of them does not work."""
    seconds = {}
    for words, shorter in WALK:
        code, duration, output = answer((*words, *shorter), folder)
        print(f"{' '.join(words):100} {duration:6.1f} s")
        if code:
            raise SystemExit(f"{' '.join(words)}: exit code {code}\n{output}")
        seconds[" ".join(words[:2]) if words[0] == "data" else words[0]] = round(duration, 1)
    keys = [word for words, _ in WALK for word in words if "=" in word]
    return {"commands": INSTALLING + len(WALK), "keys": len(keys), "seconds_walk": seconds}


def main() -> None:
    take_no_options(__doc__)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_files(folder / "era5")
        figures = walk(folder)
        all_seconds, unclear = {}, {}
        for mistake in MISTAKES:
            code, duration, output = answer(mistake.words, folder)
            command = " ".join(mistake.words)
            clear = code == 2 and "Traceback" not in output
            clear = clear and all(re.search(text, output) for text in mistake[1:])
            print(f"{command:90} {duration:5.1f} s  {'' if clear else 'UNCLEAR: ' + output[-300:]}")
            all_seconds[command] = round(duration, 2)
            if not clear:
                unclear[command] = " ".join(output.split())[-200:]
    figures |= {
        "mistakes": len(MISTAKES),
        "clear": len(MISTAKES) - len(unclear),
        "unclear": unclear,
        "seconds_median": float(np.median([*all_seconds.values()])),
        "seconds_most": max(all_seconds.values()),
        "seconds": all_seconds,
    }
    finish("first_day", figures)


if __name__ == "__main__":
    main()

"""What many rows need: stores, their catalog, a tiny checkpoint, made once."""

import os
import shutil
from pathlib import Path

from benchmarks.hostile.processes import call, run
from benchmarks.hostile.stores import training, write_stores


def make(folder: Path) -> Path:
    """`train.zarr`, `validation.zarr`, `test.zarr`, `catalog.yaml` and `tiny.ckpt` in a folder
    that is returned. Every command finds its cache beside them unless a row says otherwise."""
    fixtures = folder / "fixtures"
    fixtures.mkdir(parents=True)
    os.environ["ATMOSSL_CACHE"] = str(fixtures / "cache")
    call(write_stores, fixtures)
    ended = run(training(fixtures, "run"), fixtures)
    if ended.code != 0:
        raise RuntimeError(f"the tiny run ended with {ended.code}: {ended.stderr[-2000:]}")
    shutil.copy(fixtures / "run" / "checkpoints" / "last.ckpt", fixtures / "tiny.ckpt")
    return fixtures

"""What a command left, as texts that are equal only where every bit is: read with torch, zarr and
xarray alone, never with the program. Called in processes of their own."""

import csv
import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np


def digest_of(value: Any) -> str:
    """SHA-256 over nested mappings, sequences, tensors and plain values."""
    digest = hashlib.sha256()
    _feed(digest, value)
    return digest.hexdigest()


def _feed(digest: Any, value: Any) -> None:
    import torch

    if isinstance(value, torch.Tensor):
        array = value.detach().cpu().contiguous()
        digest.update(f"{array.dtype}{tuple(array.shape)}".encode())
        digest.update(array.reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        digest.update(f"mapping {len(value)}".encode())
        for key in sorted(value, key=repr):
            digest.update(repr(key).encode())
            _feed(digest, value[key])
    elif isinstance(value, list | tuple):
        digest.update(f"sequence {len(value)}".encode())
        for item in value:
            _feed(digest, item)
    else:
        digest.update(repr(value).encode())


def read_checkpoint(path: Path) -> Any:
    """A file or a folder of shards, by torch alone."""
    import torch

    if path.is_dir():
        from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

        whole = path.with_name(f"{path.name}.whole")
        dcp_to_torch_save(path, whole)
        tensors = torch.load(whole, weights_only=False)
        whole.unlink()
        return {**torch.load(path / "meta.pt", weights_only=True), **tensors}
    return torch.load(path, weights_only=True)


def contents_of(path: str) -> str:
    """All that a checkpoint holds."""
    return digest_of(read_checkpoint(Path(path)))


def state_of(run: str) -> dict[str, str]:
    """What a training ends with: weights, their averages, optimiser states, logged losses."""
    checkpoint = read_checkpoint(Path(run) / "checkpoints" / "last.ckpt")
    digests = {"step": repr(checkpoint.get("global_step"))}
    for key in sorted(checkpoint):
        if key == "state_dict" or key.startswith(("optimizer", "lr_scheduler")):
            digests[key] = digest_of(checkpoint[key])
    return digests | _losses(Path(run))


def _losses(run: Path) -> dict[str, str]:
    """Every logged loss and ratio by step; of a step that was done twice the later one counts.
    Logs of runs that were broken off are `metrics-N.csv`."""
    earlier = sorted(run.glob("metrics-*.csv"), key=lambda path: int(path.stem[8:]))
    losses: dict[str, str] = {}
    last = run / "metrics.csv"  # not there where nothing was left to train
    for path in (*earlier, *([last] if last.exists() else [])):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                for name, value in row.items():
                    if value and ("loss" in name or "ratio" in name):
                        losses[f"{name} at {row['step']}"] = value
    return losses


def store_of(path: str) -> dict[str, str]:
    """Values, attributes and coordinates of a zarr or NetCDF store; global attributes, which tell
    of its making, are left out."""
    import xarray as xr

    if path.endswith(".nc"):
        opened = xr.open_dataset(path, decode_cf=False, engine="netcdf4")
    else:
        opened = xr.open_zarr(path, consolidated=False, decode_cf=False)
    with opened as dataset:
        return {
            str(name): digest_of(
                [
                    array.dims,
                    str(array.dtype),
                    hashlib.sha256(np.ascontiguousarray(array.values).tobytes()).hexdigest(),
                    {str(k): repr(v) for k, v in array.attrs.items()},
                ]
            )
            for name, array in dataset.variables.items()
        }


def stores_in(folder: str) -> dict[str, str]:
    return {
        f"{path.name}/{name}": text
        for path in sorted(Path(folder).glob("*.zarr"))
        for name, text in store_of(str(path)).items()
    }


def statistics_of(cache: str) -> dict[str, str]:
    return {p.name: digest_of(json.loads(p.read_text())) for p in Path(cache).glob("*.json")}


def scores_of(report: str) -> dict[str, str]:
    return {
        name: hashlib.sha256((Path(report) / name).read_bytes()).hexdigest()
        for name in ("scores.csv", "figures.json")
    }


def differences(one: dict[str, str], two: dict[str, str]) -> str:
    """Names of what differs."""
    names = sorted(set(one) | set(two))
    return ", ".join(name for name in names if one.get(name) != two.get(name))[:200]

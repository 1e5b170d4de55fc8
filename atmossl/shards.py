"""Folders of shards, each written by the device that held it, read as a whole."""

import pickle
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from atmossl.checkpoint_files import METADATA, UnsoundError, in_one_line

_INDEX = ".metadata"  # torch's name for the index of a folder, a pickle
_INDEX_MODULES = ("torch.distributed.checkpoint.metadata",)
_INDEX_NAMES = {
    ("collections", "OrderedDict"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),  # of Python 3.13
    ("torch", "Size"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    ("torch.serialization", "_get_layout"),
}


class SafePlanner(DefaultLoadPlanner):
    """Values that are no tensors are unpickled as weights only."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class _WholePlanner(SafePlanner, _EmptyStateDictLoadPlanner):
    """Loads everything that is there, without a template."""


class _IndexUnpickler(pickle.Unpickler):
    """Makes nothing but what torch's index consists of, so that no foreign code can run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        is_dtype = module_name == "torch" and isinstance(
            getattr(torch, global_name, None), torch.dtype
        )
        allowed = is_dtype or (module_name, global_name) in _INDEX_NAMES
        if not allowed and (module_name not in _INDEX_MODULES or "." in global_name):
            raise UnsoundError(f"is unsafe: its index asks for {module_name}.{global_name}")
        return super().find_class(module_name, global_name)


class ShardReader(FileSystemReader):
    """Torch's reader of a folder, whose index is read by `_IndexUnpickler`."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        del args, kwargs
        with (Path(self.path) / _INDEX).open("rb") as file:
            try:
                index = _IndexUnpickler(file).load()
            except MemoryError as error:  # a flipped bit asks for a string of any length
                raise UnsoundError(f"is damaged: its {_INDEX} is no index of torch") from error
        if not isinstance(index, Metadata):
            raise UnsoundError(f"is damaged: its {_INDEX} is no index of torch")
        index.storage_meta = index.storage_meta or StorageMeta()
        index.storage_meta.load_id = self.load_id
        return index


def read_shards(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """The contents of a folder of shards: values that are no tensors of model or optimiser, and
    those tensors.

    Raises:
        UnsoundError: a part is missing or damaged; torch's own exception is no `Exception`.
    """
    contents = torch.load(path / METADATA, map_location="cpu", weights_only=True)
    tensors: dict[str, Any] = {}
    reader = ShardReader(path)
    reader.read_metadata()  # torch would print a traceback of an index that cannot be read
    with as_unsound():
        _load_state_dict(tensors, storage_reader=reader, planner=_WholePlanner(), no_dist=True)
    return contents, tensors


@contextmanager
def as_unsound() -> Generator[None]:
    """Tell in one line what torch could not read on some rank."""
    try:
        yield
    except CheckpointException as error:
        rank, (reason, _) = next(iter(error.failures.items()))
        if isinstance(reason, UnsoundError):
            raise reason from error
        words = f"{type(reason).__name__}: {in_one_line(reason)}"
        raise UnsoundError(f"is damaged or incomplete, as rank {rank} found ({words})") from error


def by_index(state: dict[str, Any]) -> dict[str, Any]:
    """The state of an optimiser by the position of its parameters instead of their names, as
    `torch.optim.Optimizer.load_state_dict` wants it."""
    names = [name for group in state["param_groups"] for name in group["params"]]
    index = {name: position for position, name in enumerate(names)}
    return _with_keys(state, index)


def by_name(state: dict[str, Any], names: list[str]) -> dict[str, Any]:
    """The state of an optimiser by names of parameters; the inverse of `by_index`. names: in the
    optimiser's order."""
    return _with_keys(state, names)


def _with_keys(state: dict[str, Any], new: Any) -> dict[str, Any]:
    """The state with another key, `new[key]`, for every parameter."""
    groups = [
        {**group, "params": [new[key] for key in group["params"]]}
        for group in state["param_groups"]
    ]
    return {"state": {new[k]: v for k, v in state["state"].items()}, "param_groups": groups}

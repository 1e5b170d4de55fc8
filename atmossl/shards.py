"""Folders of shards, each written by the device that held it, read as a whole."""

from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint._traverse import set_element
from torch.distributed.checkpoint.default_planner import (
    DefaultLoadPlanner,
    _EmptyStateDictLoadPlanner,
)
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from atmossl.checkpoint_files import METADATA


class SafePlanner(DefaultLoadPlanner):
    """Values that are no tensors are unpickled as weights only."""

    def load_bytes(self, read_item: Any, value: Any) -> None:
        path = self.mappings[read_item.dest_index.fqn]
        set_element(self.original_state_dict, path, torch.load(value, weights_only=True))


class _WholePlanner(SafePlanner, _EmptyStateDictLoadPlanner):
    """Loads everything that is there, without a template."""


def read_shards(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What is no tensor of model or optimiser, and what is.

    The folder's index (torch's `.metadata`) is a pickle: open only folders that you trust.
    """
    contents = torch.load(path / METADATA, map_location="cpu", weights_only=True)
    tensors: dict[str, Any] = {}
    _load_state_dict(
        tensors, storage_reader=FileSystemReader(path), planner=_WholePlanner(), no_dist=True
    )
    return contents, tensors

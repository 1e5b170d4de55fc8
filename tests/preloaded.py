"""What every process of a test would otherwise import and work out for itself.

The server imports this module before it forks the first process. It starts no thread, which a fork
would lose.
"""

import importlib
import importlib.util

import pytest  # noqa: F401  the main module of a process is that of its parent

from atmossl.cli import compose_config
from atmossl.schema import TrainConfig, parse
from tests.lean import lean_runs

for _name in ("train", "predict", "evaluate", "info"):
    importlib.import_module(f"atmossl.commands.{_name}")
for _name in ("s3fs", "torch.profiler", "torch.utils.serialization.config"):  # Lightning asks for
    if importlib.util.find_spec(_name.partition(".")[0]):
        importlib.import_module(_name)
parse(TrainConfig, compose_config("train", ["experiment=quickstart", "objective=dino"]))
lean_runs()

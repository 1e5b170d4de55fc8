"""Ends processes with those that started them, and tells which rank a process is."""

import ctypes
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Mapping, MutableMapping
from datetime import datetime
from multiprocessing.connection import wait
from threading import Thread

_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "RANK")  # others than Lightning
_RANKS = ("RANK", "LOCAL_RANK", "SLURM_PROCID", "JSM_NAMESPACE_RANK")  # as Lightning reads them
_RUN_NAME = "ATMOSSL_RUN_NAME"  # by which the first rank tells those that it starts
_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Let the kernel kill this process when its parent ends, however it does; on Linux only.

    A parent that is killed cannot tell anyone. What loads data for it or computes beside it would
    hold memory, and a GPU, until it noticed.
    """
    if sys.platform != "linux":
        return
    parent = os.getppid()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it was faster
        os._exit(1)


def end_with_creator() -> None:
    """End this process of `multiprocessing` when the process that asked for it ends. Its parent
    may be a server that forks for several processes and outlives them."""
    creator = multiprocessing.parent_process()
    if creator is not None:
        Thread(target=_exit_after, args=(creator.sentinel,), daemon=True).start()


def _exit_after(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def is_started_by_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether Lightning started this rank from the first one. It does so where no launcher
    (torchrun, srun, mpirun) has started all ranks."""
    further = environment.get("LOCAL_RANK", "0") != "0"
    return further and not any(key in environment for key in _LAUNCHERS)


def run_name(environment: MutableMapping[str, str], now: datetime) -> str:
    """The name of a run without one: its start and a number, the same on all ranks."""
    if is_started_by_first_rank(environment) and _RUN_NAME in environment:
        return environment[_RUN_NAME]
    number = str(os.getppid() if "TORCHELASTIC_RUN_ID" in environment else os.getpid())
    if "SLURM_PROCID" in environment:
        number = environment.get("SLURM_JOB_ID", number)
    environment[_RUN_NAME] = f"{now:%Y-%m-%d_%H-%M-%S}-{number}"
    return environment[_RUN_NAME]


def is_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether this is the first process of a training run, or the only one."""
    ranks = [environment[key] for key in _RANKS if key in environment]
    return not ranks or ranks[0] == "0"


_LOST = re.compile(
    r"gloo.*(closed by peer|reset by peer|timed out|no error|broken pipe|refused)"
    r"|(closed|reset) by peer|NCCL|TCPStore|recvValue|Broken pipe",
    re.IGNORECASE | re.DOTALL,
)


def lost_another_process(error: RuntimeError) -> bool:
    """Whether a collective of torch failed because another process of the run is gone."""
    distributed = sys.modules.get("torch.distributed")
    if distributed is None:
        return False
    return isinstance(error, getattr(distributed, "DistError", ())) or bool(
        _LOST.search(str(error))
    )

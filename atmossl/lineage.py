"""Processes that must not outlive the one that started them."""

import ctypes
import os
import signal
import sys
from collections.abc import Mapping

_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID", "RANK")  # others than Lightning
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


def is_started_by_first_rank(environment: Mapping[str, str]) -> bool:
    """Whether this is a further rank that Lightning started from the first one, as it does where no
    launcher (torchrun, srun, mpirun) has started them all."""
    further = environment.get("LOCAL_RANK", "0") != "0"
    return further and not any(key in environment for key in _LAUNCHERS)

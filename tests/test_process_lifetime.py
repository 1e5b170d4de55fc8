"""Children end with the process that started them."""

import os
import signal
import subprocess
import sys

import pytest

from atmossl.process_lifetime import is_started_by_first_rank, lost_another_process
from tests.processes import all_end, is_alive

CHILD = "from atmossl.process_lifetime import end_with_parent; end_with_parent(); "
CHILD += "print(1, flush=True); "
CHILD += "import time; time.sleep(60)"
PARENT = f"""
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
time.sleep(60)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="asks the Linux kernel")
def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_alive(child)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert all_end([child], within_seconds=20)


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"LOCAL_RANK": "0"}, False),
        ({"LOCAL_RANK": "1", "NODE_RANK": "0", "WORLD_SIZE": "2"}, True),
        ({"LOCAL_RANK": "1", "RANK": "1", "TORCHELASTIC_RUN_ID": "none"}, False),
        ({"LOCAL_RANK": "1", "SLURM_PROCID": "1"}, False),
    ],
)
def test_only_a_rank_that_lightning_started_ends_with_the_first(environment, expected) -> None:
    """The parent of others is their launcher, or a shell that may well end before them."""
    assert is_started_by_first_rank(environment) is expected


@pytest.mark.parametrize(
    ("text", "lost"),
    [
        ("[pair.cc:534] Connection closed by peer [127.0.0.1]:5", True),
        (
            "[third_party/gloo/gloo/transport/tcp/pair.cc:547] Connection reset by peer",
            True,
        ),
        ("NCCL error in: ProcessGroupNCCL.cpp:2251, remote process exited", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_fails_since_another_rank_is_gone_is_known(text: str, lost: bool) -> None:
    import torch.distributed  # noqa: F401

    assert lost_another_process(RuntimeError(text)) == lost

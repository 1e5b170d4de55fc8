"""Signals that ask a command to end: Ctrl-C (SIGINT), a closed terminal (SIGHUP) and SIGTERM.

A command answers in one line and with exit code 128 + number. While it only starts (imports,
reads its configuration) it leaves at once. Once it may have something to keep (`keeping`), the
signal is raised as `Stopped`, so that every context on the way out tidies up. A second Ctrl-C
leaves at once in any case. Training saves first; see `atmossl.training.preemption`.

Processes that load data leave all this to the process that started them (`leave_to_creator`).
"""

import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import forkserver
from types import FrameType
from typing import Any

from atmossl.locks import release_all

NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL = (signal.SIGINT, signal.SIGHUP)
_OF_GROUPS = {*NUMBERS, signal.SIGUSR1, signal.SIGUSR2}  # what launchers send to all processes
_SAME_SECONDS = 0.3  # a terminal and a launcher may both pass on one Ctrl-C


class Stopped(BaseException):
    """A signal asked to end. No `Exception`, so that no library takes it for a fault of its own.

    remains: what stays of the work, and how to go on.
    """

    def __init__(self, number: int, remains: str = "") -> None:
        super().__init__(number, remains)
        self.number = number
        self.remains = remains

    def __str__(self) -> str:
        name = signal.Signals(self.number).name
        return f"stopped by {name}{f'; {self.remains}' if self.remains else ''}"


class _Answer:
    """How this process answers. command: for the line that it leaves with."""

    def __init__(self) -> None:
        self.command = "atmossl"
        self.num_keeping = 0
        self.first: tuple[int, float] | None = None

    def __call__(self, number: int, frame: FrameType | None) -> None:
        del frame
        if self.first is not None:
            if is_repeated(self.first, number):
                leave(number)
            return
        self.first = (number, time.monotonic())
        if not self.num_keeping:
            leave(number)
        raise Stopped(number)


_answer = _Answer()


def is_repeated(first: tuple[int, float], number: int) -> bool:
    """Whether a signal is a second Ctrl-C. first: number and time (monotonic) of the first one."""
    return number == signal.SIGINT and time.monotonic() - first[1] > _SAME_SECONDS


def leave(number: int, remains: str = "") -> None:
    """End this process now, with one line."""
    release_all()
    os.write(2, f"\n{_answer.command}: {Stopped(number, remains)}\n".encode())
    os._exit(128 + number)


def listen(handler: Any, numbers: tuple[int, ...] = NUMBERS) -> dict[int, Any]:
    """Let `handler` answer signals, but not SIGHUP where it is ignored, as `nohup` has it; returns
    the handlers until now."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    before = {number: signal.getsignal(number) for number in numbers}
    if before.get(signal.SIGHUP) == signal.SIG_IGN:
        del before[signal.SIGHUP]
    for number in before:
        signal.signal(number, handler)
    return before


def answer_from_the_start() -> None:
    """Answer in one line as soon as the package is imported, where it runs as the command."""
    if os.path.basename(sys.argv[0]) == "atmossl":  # noqa: PTH119  # pathlib takes its time
        listen(_answer)


@contextmanager
def answering(command: str) -> Iterator[None]:
    """Answer signals for a command, and leave them as they were."""
    _answer.command, _answer.first, _answer.num_keeping = f"atmossl {command}", None, 0
    before = listen(_answer)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextmanager
def keeping(remains: str = "") -> Iterator[None]:
    """Raise signals as `Stopped` from here on. remains: what stays of the work if a signal comes,
    unless an inner context has said it."""
    _answer.num_keeping += 1
    try:
        yield
    except Stopped as stop:
        stop.remains = stop.remains or remains
        raise
    finally:
        _answer.num_keeping -= 1


def start_worker_server() -> None:
    """Start the server that forks the loading processes; signals to all processes of a terminal or
    of a Slurm step do not reach it, nor what it forks."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUPS)
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def leave_to_creator() -> None:
    """Let a loading process ignore the signals that end a command, except SIGTERM from the
    process that asked for it."""
    signal.pthread_sigmask(signal.SIG_BLOCK, _OF_GROUPS)
    creator = multiprocessing.parent_process()
    if creator is not None:
        threading.Thread(target=_exit_when_told, args=(creator.pid,), daemon=True).start()


def _exit_when_told(creator: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != creator:
        pass
    os._exit(0)

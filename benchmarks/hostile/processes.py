"""Commands in processes of their own, without the seconds that importing torch takes.

The benchmark imports everything once and forks a child for every command. A process that is forked
must have no threads, so the benchmark itself never opens a store: whatever touches zarr, NetCDF or
GRIB runs in a child, too (`call`).
"""

import atexit
import json
import multiprocessing
import os
import select
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import import_module
from multiprocessing import forkserver, util
from pathlib import Path
from typing import Any

HANGS_AFTER_S = 120.0  # on a machine that does nothing else
_PRELOADED = (
    "atmossl.cli", "atmossl.commands.train", "atmossl.commands.predict", "atmossl.shards",
    "atmossl.commands.evaluate", "atmossl.commands.info", "atmossl.data_commands", "atmossl.api",
    "cfgrib", "eccodes", "netCDF4", "cartopy.crs", "matplotlib.pyplot", "zarr", "dask.array",
    "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo",
    "lightning.pytorch.loggers",
)  # fmt: skip
_LOADER = ["atmossl.data.loader", "atmossl.data.windows"]


@dataclass(frozen=True)
class Ended:
    """What a command left. code: exit code, or minus the signal that ended it; None if it hung.
    cpu_s: processor time of the command and of all that it waited for."""

    code: int | None
    stdout: str
    stderr: str
    cpu_s: float
    wall_s: float

    @property
    def has_traceback(self) -> bool:
        return "Traceback (most recent call last)" in self.stdout + self.stderr


def prepare() -> None:
    """Import what commands need, and start the server that forks the workers of all loaders."""
    os.environ["OMP_NUM_THREADS"] = "1"
    multiprocessing.get_context("forkserver").set_forkserver_preload(_LOADER)
    forkserver.ensure_running()
    for name in _PRELOADED:
        import_module(name)
    import torch

    torch.set_num_threads(1)


class Started:
    """A command that runs: wait for it, or send it a signal."""

    def __init__(self, process: int, folder: Path) -> None:
        self.process = process
        self._folder = folder
        self._begin = time.monotonic()
        self._handle = os.pidfd_open(process)

    def is_over(self, within_s: float) -> bool:
        poll = select.poll()
        poll.register(self._handle, select.POLLIN)
        return bool(poll.poll(max(0.0, within_s) * 1000))

    def send(self, number: int, to_all: bool = False) -> None:
        """A signal to the process, or `to_all` of its group, as a terminal does."""
        with suppress(ProcessLookupError):
            if to_all:
                os.killpg(self.process, number)
            else:
                signal.pidfd_send_signal(self._handle, number)

    def wait(self) -> Ended:
        busy = os.getloadavg()[0] / (os.cpu_count() or 1)
        hangs = not self.is_over(HANGS_AFTER_S * max(1.0, busy))
        if hangs:
            self.send(signal.SIGKILL)
        _, status, usage = os.wait4(self.process, 0)
        os.close(self._handle)
        self.send_rest()
        texts = [(self._folder / name).read_text(errors="replace") for name in ("1", "2")]
        code = None if hangs else os.waitstatus_to_exitcode(status)
        cpu_s = usage.ru_utime + usage.ru_stime
        return Ended(code, texts[0], texts[1], cpu_s, time.monotonic() - self._begin)

    def send_rest(self) -> None:
        """End what the process has left behind in its group."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process, signal.SIGKILL)


def start(
    arguments: Sequence[str],
    folder: Path,
    *,
    environment: Mapping[str, str | None] | None = None,
    before: Callable[[], object] | None = None,
    own_server: bool = False,
    main: Callable[[Sequence[str]], int] | None = None,
) -> Started:
    """Start `atmossl ARGUMENTS` in a folder.

    environment: to set, or with None to remove. before: called in the process before the command.
    own_server: workers are started by the process itself, as outside of the benchmark.
    main: the program, for tests.
    """
    streams = Path(tempfile.mkdtemp(prefix="streams-", dir=folder))
    for name in ("1", "2"):
        (streams / name).touch()
    process = os.fork()
    if process:
        return Started(process, streams)
    code = 1
    try:
        _enter(folder, streams, environment or {}, own_server)
        if before is not None:
            before()
        code = (main or _main())(list(arguments))
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)
    raise AssertionError("a child does not return")


def run(arguments: Sequence[str], folder: Path, **options: Any) -> Ended:
    """Like `start`, until it ends."""
    return start(arguments, folder, **options).wait()


def call(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function returns in a process of its own, as JSON can hold it.

    Raises:
        RuntimeError: the function raised; with its traceback.
    """
    read, write = os.pipe()
    process = os.fork()
    if not process:
        os.close(read)
        warnings.simplefilter("ignore")  # libraries about each other, on making odd files
        try:
            answer = {"value": function(*arguments)}
        except BaseException:
            answer = {"error": traceback.format_exc()}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe, default=str)
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        text = pipe.read()
    os.waitpid(process, 0)
    answer = json.loads(text) if text else {"error": "the process ended without an answer"}
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer["value"]


def in_turns(work: Callable[[int], Any], count: int, processes: int) -> list[Any]:
    """`work(0)`, ..., `work(count - 1)` by several processes that take turns; what they return."""
    read, write = os.pipe()
    os.write(write, b"".join(number.to_bytes(4, "big") for number in range(count)))
    os.close(write)
    with temporary_folder() as folder:
        runners = []
        for _ in range(processes):
            process = os.fork()
            if not process:
                _take_turns(work, read, folder)
            runners.append(process)
        os.close(read)
        for process in runners:
            os.waitpid(process, 0)
        files = [folder / str(number) for number in range(count)]
        return [json.loads(f.read_text()) if f.exists() else None for f in files]


@contextmanager
def temporary_folder() -> Iterator[Path]:
    """As `tempfile.TemporaryDirectory`, which a child would remove at its own end."""
    folder = Path(tempfile.mkdtemp(prefix="hostile-"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _take_turns(work: Callable[[int], Any], read: int, folder: Path) -> None:
    while number := os.read(read, 4):
        index = int.from_bytes(number, "big")
        try:
            answer = work(index)
        except BaseException:
            answer = {"error": traceback.format_exc()}
        (folder / str(index)).write_text(json.dumps(answer, default=str))
    os._exit(0)


def _main() -> Callable[[Sequence[str]], int]:
    from atmossl.cli import main

    return main


def _enter(
    folder: Path, streams: Path, environment: Mapping[str, str | None], own_server: bool
) -> None:
    """Become a process that looks like a command just started."""
    os.setpgid(0, 0)
    util._finalizer_registry.clear()  # pyright: ignore[reportAttributeAccessIssue]
    os.chdir(folder)
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background of a shell
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    for name, value in {"COLUMNS": "300", "TERM": "dumb", **environment}.items():
        if value is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = value
    for number in (1, 2):
        handle = os.open(streams / str(number), os.O_WRONLY | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: PTH123, SIM115
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: PTH123, SIM115
    server: Any = forkserver._forkserver  # pyright: ignore[reportAttributeAccessIssue]
    if own_server:
        server._forkserver_pid = server._forkserver_address = server._forkserver_alive_fd = None
    else:
        server.ensure_running = lambda: None  # the benchmark's own runs
        forkserver.ensure_running = server.ensure_running


def _leave(code: int) -> None:
    """What an interpreter does at its end."""
    try:
        threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)

"""A command at work: the outputs that it owns, and the signals that ask it to end.

A second process that wants to write the same output is refused. The owner is named by a small
file, `.NAME.lock` beside an output or `.lock` inside a folder. It is created by a hard link, which
is atomic on shared file systems, too. An owner that ended without removing its file is recognised:
on the same machine by the process and its start time, on another machine by the file's age, which
the owner renews every few seconds. A Slurm job that was requeued follows its earlier self on any
machine. Whoever owns a place has shown that it can be written, and errors of the file system below
it name the key of the configuration.

The signals are Ctrl-C (SIGINT), a closed terminal (SIGHUP) and SIGTERM. A command answers in one
line and with exit code 128 + number. While it only starts (imports, reads its configuration) it
leaves at once. Once it may have something to keep (`keeping`), the signal is raised as `Stopped`,
so that every context on the way out tidies up; if a module is just being imported, after that. A
second Ctrl-C leaves at once in any case. Training saves first; see `atmossl.training.preemption`.
Processes that load data leave all this to the process that started them (`leave_to_creator`).
"""

import errno
import fcntl
import json
import multiprocessing
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from datetime import datetime
from multiprocessing import forkserver
from pathlib import Path
from types import FrameType
from typing import Any
from uuid import uuid4

BEAT_SECONDS = 10.0
SILENT_SECONDS = 120.0  # an owner elsewhere whose file is older than this is taken to be gone
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.ENOSYS, errno.EOPNOTSUPP)
_TURN_SECONDS = 0.5
_ATTEMPTS = 100  # against others who come, end and are gone meanwhile
_OF_WRITING = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_held: dict[Path, str] = {}  # lock files of this process and their tokens


class OwnedError(ValueError):
    """Another process owns the output."""


@contextmanager
def owned(path: Path, key: str, *, inside: bool = False) -> Iterator[None]:
    """Own an output while it is written. The folder that holds it is made, and removed again if
    nothing was written there.

    key: of the configuration that names the output. inside: the output is a folder that may exist
        and holds its own lock, so that its parent need not be writable.

    Raises:
        ValueError: another process owns it, or it cannot be written; names the key.
        OSError: what went wrong with the file system below it, with the key and the file.
    """
    lock = path / ".lock" if inside else path.with_name(f".{path.name}.lock")
    named = f"{key}={path}"
    made = _acquire(lock, named)
    stop = threading.Event()
    threading.Thread(target=_beat, args=(lock, _held[lock], named, stop), daemon=True).start()
    try:
        with naming_errors(path, key):
            yield
    finally:
        stop.set()
        _release(lock)
        _remove_empty(made)


def check_is_free(path: Path, key: str = "output", *, is_folder: bool = True) -> None:
    """Raise ValueError, before any work, if something lies where an output shall be.

    is_folder: the output is a folder, which takes the place of an empty one.
    """
    if not path.exists() or (is_folder and path.is_dir() and not any(path.iterdir())):
        return
    raise ValueError(f"{key}={path} exists; choose another path or remove it")


@contextmanager
def owned_in_turn(path: Path, key: str, waits: Callable[[], object]) -> Iterator[None]:
    """Like `owned`, but wait while another process owns the output; `waits` is called once then."""
    has_said = False
    with ExitStack() as stack:
        while True:
            try:
                stack.enter_context(owned(path, key))
                break
            except OwnedError:
                if not has_said:
                    waits()
                has_said = True
                time.sleep(_TURN_SECONDS)
        yield


@contextmanager
def naming_errors(path: Path, key: str) -> Iterator[None]:
    """Errors of writing name the key or variable that chose the place."""
    try:
        yield
    except OSError as error:
        named = _naming(error, f"{key}={path}", path)
        if named is error:
            raise
        raise named from error


def release_all() -> None:
    """Give up all that this process owns, before it leaves at once."""
    for lock in list(_held):
        _release(lock)


def _acquire(lock: Path, named: str) -> list[Path]:
    """Create the lock file; returns the folders that were made for it, innermost first."""
    owner = _this_process()
    made: list[Path] = []
    try:
        for attempt in range(_ATTEMPTS):
            made = _make_folders(lock.parent) or made
            try:
                now = _propose(lock, owner)
            except FileNotFoundError:  # who made the folder may have just removed it
                if attempt == _ATTEMPTS - 1:
                    raise
                continue
            if _held.get(lock) == owner["token"]:
                _remove_old_proposals(lock, now)
                return made
            _remove_if_stale(lock, owner, now, named)
        raise OSError(errno.EAGAIN, "its owner changes all the time")
    except (OSError, ValueError) as error:
        _remove_empty(made)
        if isinstance(error, ValueError):
            raise
        raise ValueError(f"{named} cannot be written: {error.strerror or error}") from error


def _propose(lock: Path, owner: Mapping[str, Any]) -> float:
    """Try to make the lock file ours, once; returns the time by the clock of the file system."""
    proposal = lock.with_name(f"{lock.name}.{owner['token']}")
    try:
        _write(proposal, owner)
        if _create(lock, proposal, owner):
            _held[lock] = owner["token"]
        return proposal.stat().st_mtime
    finally:
        with suppress(OSError):
            proposal.unlink()


def _remove_empty(folders: Sequence[Path]) -> None:
    with suppress(OSError):  # something was written there
        for folder in folders:
            folder.rmdir()


def _make_folders(folder: Path) -> list[Path]:
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except FileExistsError as error:
        raise NotADirectoryError(errno.ENOTDIR, "Not a directory") from error
    return missing


def _write(path: Path, owner: Mapping[str, Any]) -> None:
    with path.open("w") as file:
        file.write(json.dumps(owner))
        file.flush()
        os.fsync(file.fileno())  # some file systems tell only now that they are full


def _create(lock: Path, proposal: Path, owner: Mapping[str, Any]) -> bool:
    """Whether the lock file is ours now; False if there is one."""
    try:
        os.link(proposal, lock)
    except FileExistsError:
        return proposal.stat().st_nlink == 2  # NFS may repeat a request that was served
    except OSError as error:
        if error.errno not in _NO_LINKS:
            raise
        try:
            os.close(os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            return False
        try:
            _write(lock, owner)
        except OSError:
            lock.unlink()
            raise
    return True


def _remove_old_proposals(lock: Path, now: float) -> None:
    """Remove the files of processes that were killed between two system calls."""
    for path in lock.parent.glob(f"{lock.name}.*"):
        with suppress(OSError):
            if now - path.stat().st_mtime > SILENT_SECONDS:
                path.unlink()


def _remove_if_stale(lock: Path, newcomer: Mapping[str, Any], now: float, named: str) -> None:
    """Remove a lock file whose owner is gone, or raise ValueError that names the owner.

    Of several newcomers one at a time may judge and remove: each holds the file that it removes by
    `flock`, where the file system has it.
    """
    try:
        file = lock.open()
    except FileNotFoundError:
        return  # the owner has just finished
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        status = os.fstat(file.fileno())
        try:
            if lock.stat().st_ino != status.st_ino:
                return
        except FileNotFoundError:
            return
        age = now - status.st_mtime
        owner = _parsed(file.read())
        if not _is_gone(owner, newcomer, age):
            raise OwnedError(_refusal(lock, owner, newcomer, age, named))
        lock.unlink()


def _parsed(text: str) -> dict[str, Any]:
    """The owner's entries in a lock file; empty if the file is damaged or just being written."""
    try:
        owner = json.loads(text)
    except ValueError:
        return {}
    return owner if isinstance(owner, dict) else {}


def _is_gone(owner: Mapping[str, Any], newcomer: Mapping[str, Any], age: float) -> bool:
    job, restart = owner.get("slurm_job"), owner.get("slurm_restart")
    if job and job == newcomer["slurm_job"] and restart != newcomer["slurm_restart"]:
        return True  # Slurm ends a job before it starts it again
    if _same_machine(owner, newcomer):
        return _start_of(owner["process"]) != owner["process_start"]
    return age > SILENT_SECONDS


def _same_machine(owner: Mapping[str, Any], newcomer: Mapping[str, Any]) -> bool:
    """Whether the numbers of both processes are those of one system; containers number their
    processes apart."""
    keys = ("host", "boot", "process_namespace")
    is_recorded = isinstance(owner.get("process"), int) and "process_start" in owner
    return is_recorded and all(owner.get(key) == newcomer[key] for key in keys)


def _refusal(
    lock: Path, owner: Mapping[str, Any], newcomer: Mapping[str, Any], age: float, named: str
) -> str:
    who = f"process {owner.get('process', '?')} on {owner.get('host', 'an unknown host')}"
    since = f", {owner.get('command', 'atmossl')} since {owner.get('since', '?')}"
    message = f"{named} is being written by {who}{since}; wait for it, or choose another place"
    if _same_machine(owner, newcomer):
        return message
    return (
        f"{message}. If that process is gone (its last sign of life is {max(age, 0.0):.0f} s old), "
        f"start again after {SILENT_SECONDS:.0f} s without one, or remove {lock}"
    )


def _release(lock: Path) -> None:
    token = _held.pop(lock, None)
    with suppress(OSError):
        if token is not None and _parsed(lock.read_text()).get("token") == token:
            lock.unlink()


def _beat(lock: Path, token: str, named: str, stop: threading.Event) -> None:
    """Renew the file's time, by which other machines know that this process lives. A process that
    lost the place, since it was stopped for minutes, ends before it writes there again."""
    while not stop.wait(BEAT_SECONDS):
        try:
            owner = _parsed(lock.read_text())
            if owner.get("token") == token:
                os.utime(lock)
        except OSError:
            continue
        if owner and owner.get("token") != token and not stop.is_set():
            text = f"atmossl: {named} was taken over by process {owner.get('process')} on "
            text += f"{owner.get('host')}, since this one gave no sign of life; it ends here\n"
            os.write(2, text.encode())
            os._exit(1)


def _this_process() -> dict[str, Any]:
    process = os.getpid()
    return {
        "host": socket.gethostname(),
        "process": process,
        "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        "command": " ".join(["atmossl", *sys.argv[1:2]]),
        "process_start": _start_of(process),
        "process_namespace": _process_namespace(),
        "boot": _boot(),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "slurm_restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
        "token": uuid4().hex,
    }


def _start_of(process: int) -> str | None:
    """The start of a process in ticks since the machine's start. `unknown` where the system does
    not tell; None if there is no such process, or only its parent's memory of it."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # another user's
    try:
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "unknown"
    return None if fields[0] in "ZX" else fields[19]


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def _process_namespace() -> str:
    try:
        return str(Path("/proc/self/ns/pid").readlink())
    except OSError:
        return ""


def _naming(error: OSError, named: str, path: Path) -> OSError:
    """The error with the key of the output, if it is one of writing there."""
    file = "" if error.filename is None else os.fsdecode(error.filename)
    below = bool(file) and _is_of(Path(file), path)
    if error.errno is None or not (error.errno in _OF_WRITING or below):
        return error
    if named in str(error.strerror):
        return error
    where = f" ({file})" if file and Path(file) != path else ""
    return OSError(error.errno, f"{named}: {error.strerror}{where}")


def _is_of(file: Path, path: Path) -> bool:
    """Whether a file belongs to an output: below it, or a hidden neighbour with its name."""
    file, path = file.absolute(), path.absolute()
    if file.is_relative_to(path):
        return True
    neighbours = [part.name for part in (file, *file.parents) if part.parent == path.parent]
    return any(path.name in name for name in neighbours)


NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
TERMINAL = (signal.SIGINT, signal.SIGHUP)
_OF_GROUPS = {*NUMBERS, signal.SIGUSR1, signal.SIGUSR2}  # what launchers send to all processes
_LATER_SECONDS = 0.05  # after which a signal is sent again that came in an import
_IMPORT_SYSTEM = "<frozen importlib._bootstrap"  # the file of its functions
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
        self.sent_again = False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        sent_again, self.sent_again = self.sent_again, False
        if self.first is not None and not sent_again:
            if is_repeated(self.first, number):
                leave(number)
            return
        self.first = self.first or (number, time.monotonic())
        if not self.num_keeping:
            leave(number)
        if _would_be_lost(frame):
            timer = threading.Timer(_LATER_SECONDS, self._send_again, (number,))
            timer.daemon = True
            timer.start()
            return
        raise Stopped(number)

    def _send_again(self, number: int) -> None:
        """Send a signal again that came where no exception may be raised."""
        self.sent_again = True
        os.kill(os.getpid(), number)


def _would_be_lost(frame: FrameType | None) -> bool:
    """Whether an exception that is raised here may be printed with its traceback, and forgotten:
    while a module is imported, of which libraries catch any error, or an object is deleted, of
    which Python ignores it."""
    while frame is not None:
        code = frame.f_code
        if code.co_filename.startswith(_IMPORT_SYSTEM) or code.co_name == "__del__":
            return True
        frame = frame.f_back
    return False


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


def answer_signals() -> None:
    """Answer signals in one line, from the import of the package on."""
    listen(_answer)


@contextmanager
def answering(command: str) -> Iterator[None]:
    """Answer signals for a command, and leave them as they were."""
    _answer.command, _answer.first, _answer.num_keeping = f"atmossl {command}", None, 0
    _answer.sent_again = False
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

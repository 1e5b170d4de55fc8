"""Training in processes of its own: started fast, killed for real, several ranks together."""

import json
import multiprocessing
import os
import resource
import signal
import socket
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

CONTEXT = multiprocessing.get_context("forkserver")
HANGS_AFTER_SECONDS = 900.0  # far above any test, however busy the machine


def start_server() -> None:
    """A server that has imported everything forks every process: no second is lost on imports.

    There is one in a process, so this comes before a loader starts one that knows less.
    """
    CONTEXT.set_forkserver_preload(["tests.preloaded"])
    forkserver.ensure_running()


def training(output: Path, *more: str) -> list[str]:
    """Arguments of a tiny run on the shipped sample."""
    return [
        "train", "experiment=quickstart", "model=tiny", f"paths.output={output}",
        "optimizer=adamw", "optimizer.warmup_steps=2", "trainer.max_steps=8",
        "trainer.checkpoint_interval=100", "trainer.validation_interval=100",
        "trainer.validation_batches=1", "trainer.log_interval=1", "data.num_workers=0",
        "data.batch_size=2", "trainer.accelerator=cpu",
        "stream.atmosphere.variables=[temperature]", "trainer.pictures=false",
        "logger.tensorboard=false",
        "data.window={time: 5, lat: 8, lon: 16}", *more,
    ]  # fmt: skip


def stub(folder: Path, name: str, script: str) -> None:
    """An executable that stands for a command of a cluster, in a folder for the front of PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def kill_at_batch(number: int, children: Path | None = None) -> None:
    """SIGKILL this process in its training batch of that number, before its backward pass.

    children: where to note the ids of the processes that it has started by then.
    """
    signal_at_batch(number, signal.SIGKILL, children)


def all_end(processes: Sequence[int], within_seconds: float = 60.0) -> bool:
    """Whether none of them is left, once they have had the time; kills those that are."""
    limit = time.monotonic() + within_seconds
    while any(map(is_alive, processes)) and time.monotonic() < limit:
        time.sleep(0.01)
    left = [process for process in processes if is_alive(process)]
    for process in left:
        os.kill(process, signal.SIGKILL)
    return not left


def is_alive(process: int) -> bool:
    """Whether there is such a process that is more than its parent's memory of it."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def kill_at_commit(number: int) -> None:
    """SIGKILL this process when its n-th sharded checkpoint is written, but has no name yet."""
    from atmossl.training import strategies

    publish, count = strategies.publish, 0

    def counted(partial: Path, path: Path) -> None:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)
        publish(partial, path)

    strategies.publish = counted


def kill_after_save(number: int) -> None:
    """SIGKILL this process when its n-th checkpoint is on the disk, before its step is logged."""
    from atmossl.training.checkpoint import KeepCheckpoints

    save, count = KeepCheckpoints.save, 0

    def counted(self: KeepCheckpoints, trainer: Any) -> None:
        nonlocal count
        save(self, trainer)
        count += 1
        if count == number:
            os.kill(os.getpid(), signal.SIGKILL)

    KeepCheckpoints.save = counted  # type: ignore[method-assign]


def full_disk(size: int) -> None:
    """No file of this process can grow beyond `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


def signal_at_batch(number: int, sent: int, children: Path | None = None) -> None:
    from atmossl.training.module import TrainingModule

    step, count = TrainingModule.training_step, 0

    def counted(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal count
        count += 1
        if count == number:
            if children is not None:
                started = [process.pid for process in multiprocessing.active_children()]
                children.write_text(json.dumps(started))
            os.kill(os.getpid(), sent)
        return step(self, batch, batch_idx)

    TrainingModule.training_step = counted  # type: ignore[method-assign]


def signal_in_validation(sent: int, record: Path) -> None:
    """Send a signal to this process in the first batch of its first validation. record: gets a
    letter for every validation batch."""
    from atmossl.training.module import TrainingModule

    step = TrainingModule.validation_step

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        with record.open("a") as file:
            file.write("v")
        if record.read_text() == "v":
            os.kill(os.getpid(), sent)
        return step(self, *args, **kwargs)

    TrainingModule.validation_step = counted  # type: ignore[method-assign]


def _main(
    arguments: Sequence[str], environment: dict[str, str], before: tuple[Callable, tuple] | None
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    for number, file in (
        (1, environment.get("OUTPUT", os.devnull)),
        (2, environment.get("ERRORS")),
    ):
        if file is not None:
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), number)
    from atmossl.cli import main

    if before is not None:
        before[0](*before[1])
    raise SystemExit(main(arguments))


def start(
    arguments: Sequence[str], *, cache: Path, before: Any = None, **environment: str
) -> multiprocessing.process.BaseProcess:
    values = {"ATMOSSL_CACHE": str(cache), "OMP_NUM_THREADS": "1", **environment}
    process = CONTEXT.Process(target=_main, args=(list(arguments), values, before))
    process.start()
    return process


def run(arguments: Sequence[str], *, cache: Path, before: Any = None, **environment: str) -> int:
    """The exit code of one process; minus the signal that killed it."""
    process = start(arguments, cache=cache, before=before, **environment)
    process.join(HANGS_AFTER_SECONDS)
    process.kill()
    process.join()
    assert process.exitcode is not None
    return process.exitcode


@dataclass(frozen=True)
class Ended:
    """What a process left: its exit code and what it said."""

    returncode: int
    stdout: str
    stderr: str


def command(*arguments: str, cache: Path) -> Ended:
    """What a user sees of one command, on a wide terminal."""
    with tempfile.TemporaryDirectory() as folder:
        output, errors = Path(folder) / "output", Path(folder) / "errors"
        streams = {"OUTPUT": str(output), "ERRORS": str(errors)}
        code = run(arguments, cache=cache, COLUMNS="300", **streams)
        return Ended(code, output.read_text(), errors.read_text())


def run_ranks(
    arguments: Sequence[str], ranks: int, *, cache: Path, before: Any = None, **environment: str
) -> list[int]:
    """Exit codes of several ranks that train together over gloo, as torchrun would start them.

    before: what only rank 0 calls. What rank N says of errors goes to `errors-N` in the cache.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        start(
            [*arguments, f"trainer.devices={ranks}"],
            cache=cache,
            before=before if rank == 0 else None,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            ERRORS=str(cache / f"errors-{rank}"),
            WORLD_SIZE=str(ranks),
            GROUP_RANK="0",
            LOCAL_WORLD_SIZE=str(ranks),
            MASTER_ADDR="127.0.0.1",
            MASTER_PORT=str(port),
            TORCHELASTIC_RUN_ID="test",
            **environment,
        )  # fmt: skip
        for rank in range(ranks)
    ]
    for process in processes:
        process.join(HANGS_AFTER_SECONDS)
        process.kill()
        process.join()
    return [process.exitcode for process in processes if process.exitcode is not None]

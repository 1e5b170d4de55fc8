"""Training in processes of its own: started fast, killed for real, several ranks together."""

import multiprocessing
import os
import signal
import socket
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# A server that has imported everything forks every process: no second is lost on imports.
CONTEXT = multiprocessing.get_context("forkserver")
HANGS_AFTER_SECONDS = 900.0  # far above any test, however busy the machine
CONTEXT.set_forkserver_preload(["atmossl.build", "atmossl.commands", "atmossl.cli"])


def training(output: Path, *more: str) -> list[str]:
    """Arguments of a tiny run on the shipped sample."""
    return [
        "train", "experiment=quickstart", "model=tiny", f"paths.output={output}",
        "optimizer=adamw", "optimizer.warmup_steps=2", "trainer.max_steps=8",
        "trainer.checkpoint_interval=100", "trainer.validation_interval=100",
        "trainer.validation_batches=1", "trainer.log_interval=1", "data.num_workers=0",
        "data.batch_size=2", "trainer.accelerator=cpu",
        "stream.atmosphere.variables=[temperature]", "trainer.pictures=false", *more,
    ]  # fmt: skip


def stub(folder: Path, name: str, script: str) -> None:
    """An executable that stands for a command of a cluster, in a folder for the front of PATH."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{script}\n")
    (folder / name).chmod(0o755)


def kill_at_batch(number: int) -> None:
    """SIGKILL this process in its training batch of that number, before its backward pass."""
    signal_at_batch(number, signal.SIGKILL)


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


def signal_at_batch(number: int, sent: int) -> None:
    from atmossl.training.module import TrainingModule

    step, count = TrainingModule.training_step, 0

    def counted(self: Any, batch: Any, batch_idx: int) -> Any:
        nonlocal count
        count += 1
        if count == number:
            os.kill(os.getpid(), sent)
        return step(self, batch, batch_idx)

    TrainingModule.training_step = counted  # type: ignore[method-assign]


def _main(
    arguments: Sequence[str], environment: dict[str, str], before: tuple[Callable, tuple] | None
) -> None:
    import torch

    os.environ.update(environment)
    torch.set_num_threads(1)
    with open(os.devnull, "w") as nowhere:  # noqa: PTH123
        os.dup2(nowhere.fileno(), 1)
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


def run_ranks(
    arguments: Sequence[str], ranks: int, *, cache: Path, before: Any = None, **environment: str
) -> list[int]:
    """Exit codes of several ranks that train together over gloo, as torchrun would start them.

    before: what only rank 0 calls.
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

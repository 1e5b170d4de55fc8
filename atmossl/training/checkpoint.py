"""Saves checkpoints during training. Which checkpoints stay is decided in
`atmossl.training.keeping`."""

import logging
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.plugins.io import CheckpointIO
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor
from torch.utils import _pytree as pytree

from atmossl.atomic_files import remove, write_atomically
from atmossl.checkpoint_files import read_contents, save_contents
from atmossl.objectives.base import Monitor
from atmossl.plain_values import check_plain
from atmossl.progress import note
from atmossl.training.distributed import failing_together
from atmossl.training.keeping import BEST, leave_branch, tidy
from atmossl.training.strategies import ShardedStrategy
from atmossl.value_faults import listed

_LOGGER = logging.getLogger(__name__)
note_once = rank_zero_only(note)  # by the first rank alone


class AtomicCheckpointIO(CheckpointIO):
    """Writes each checkpoint as one file, atomically. It also reads sharded folders, so that a run
    of many devices can continue on one.

    asynchronous: copy the tensors to the host, then write while training goes on; the next save
        waits for the one before.
    Only the first rank saves, so what goes wrong is raised by `wait` alone, where all ranks can be
    told of it.
    """

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous
        self._pool = ThreadPoolExecutor(1) if asynchronous else None
        self._pending: Future | None = None

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        self.wait()
        if self._pool is None:
            self._pending = _done(lambda: _write(checkpoint, Path(path)))
            return
        copied = pytree.tree_map_only(Tensor, lambda x: x.detach().to("cpu", copy=True), checkpoint)
        self._pending = self._pool.submit(_write, copied, Path(path))

    def wait(self) -> None:
        """Wait until everything is written; raises errors of writing."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = True
    ) -> dict[str, Any]:
        self.wait()
        return read_contents(Path(path))

    def remove_checkpoint(self, path: Any) -> None:
        remove(Path(path))

    def teardown(self) -> None:
        self.wait()
        if self._pool is not None:
            self._pool.shutdown()


def _write(contents: dict[str, Any], path: Path) -> None:
    write_atomically(path, lambda partial: save_contents(contents, partial))


def _done(work: Callable[[], None]) -> Future:
    """The result of finished work, or the error with which it failed."""
    future: Future = Future()
    try:
        future.set_result(work())
    except (OSError, ValueError) as error:
        future.set_exception(error)
    return future


class KeepCheckpoints(L.Callback):
    """Saves every `interval` optimiser steps, keeps the newest `keep` and the best by the
    objective's `monitor`.

    healthy: whether the state is worth keeping; while it is not, nothing is saved or removed.
    An older checkpoint goes only once newer ones are on the disk. A resumed run moves the branch
    that it leaves aside. Where a validation is due at the same step, the save comes after it, so
    that a resumed run has the same log. Lightning logs a step only after the save, so a checkpoint
    carries what is not yet logged, and a resumed run logs that first.
    """

    def __init__(
        self,
        folder: Path,
        *,
        interval: int,
        keep: int,
        monitor: Monitor,
        healthy: Callable[[], bool] = lambda: True,
    ) -> None:
        self.folder = folder
        self.interval = interval
        self.keep = keep
        self.monitor = monitor
        self.healthy = healthy
        self._saved = -1
        self._start: tuple[int, str] | None = None  # step and name of what training went on from
        self.best: float | None = None
        self._unlogged: dict[str, float] = {}  # of the step of the checkpoint
        self._has_told = False  # that the monitor is not logged

    def state_dict(self) -> dict[str, Any]:
        return {"best": self.best, "unlogged": self._unlogged}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.best = state_dict["best"]
        self._unlogged = state_dict.get("unlogged", {})  # earlier versions lack it

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        check_states(trainer, pl_module)
        self._saved = trainer.global_step
        if trainer.ckpt_path is None:
            return
        with failing_together(f"going on in {self.folder}"):
            has_best = trainer.is_global_zero and self._leave_branch(trainer)
        if not trainer.strategy.broadcast(has_best):
            self.best = None  # the next validation writes a new one
        for logger in trainer.loggers if self._unlogged else ():
            logger.log_metrics(self._unlogged, step=trainer.global_step - 1)
        self._unlogged = {}

    def _leave_branch(self, trainer: L.Trainer) -> bool:
        """Prepare the folder for the line of checkpoints that continues; returns whether that
        line has a `best.ckpt`."""
        assert trainer.ckpt_path is not None
        departure = leave_branch(self.folder, Path(trainer.ckpt_path), trainer.global_step)
        self._start = departure.start
        if departure.aside:
            names = ", ".join(departure.aside)
            text = "training goes on from step %d; %s moved aside to %s"
            _LOGGER.warning(text, trainer.global_step, names, departure.into)
        tidy(self.folder, self._start, self.keep)
        return (self.folder / BEST).exists()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        stepped = (idx + 1) % trainer.accumulate_grad_batches == 0
        if stepped and trainer.global_step % self.interval == 0 and not validates_now(trainer):
            self.save(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        score = trainer.callback_metrics.get(self.monitor.key)
        if score is None and not self._has_told:
            logged = [name for name in trainer.callback_metrics if not name.startswith("train/")]
            note_once(
                f"the monitor of the objective, {self.monitor.key}, was not logged in validation, "
                f"so no {BEST} is saved; logged were {listed(sorted(logged))}"
            )
            self._has_told = True
        if score is not None and self.monitor.is_better(float(score), self.best):
            self.best = float(score)
            if self.healthy():
                self._write(trainer, self.folder / BEST)
        if trainer.global_step % self.interval == 0:
            self.save(trainer)

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.save(trainer)
        self.settle(trainer)

    def save(self, trainer: L.Trainer) -> None:
        """Save the present state once, and remove what is older than the newest `keep`."""
        if trainer.global_step == self._saved or not self.healthy():
            return
        self._write(trainer, self.folder / f"step-{trainer.global_step}.ckpt")
        self._saved = trainer.global_step

    def _write(self, trainer: L.Trainer, path: Path) -> None:
        """Save, once the previous checkpoint is on the disk. All ranks fail if one of them does."""
        self.settle(trainer)
        self._unlogged = unlogged(trainer)
        trainer.save_checkpoint(path, weights_only=False)
        io = trainer.strategy.checkpoint_io
        if not (isinstance(io, AtomicCheckpointIO) and io.asynchronous):
            self.settle(trainer)

    def settle(self, trainer: L.Trainer) -> None:
        """Wait on all ranks until the last checkpoint is on the disk."""
        strategy, io = trainer.strategy, trainer.strategy.checkpoint_io
        if isinstance(strategy, ShardedStrategy):
            strategy.wait_for_checkpoint()
        with failing_together(f"saving in {self.folder}"):
            if isinstance(io, AtomicCheckpointIO):
                io.wait()
            if trainer.is_global_zero:
                tidy(self.folder, self._start, self.keep)


def check_states(trainer: Any, pl_module: Any) -> None:
    """Raise ValueError, before the first step, if a state of callbacks, network or objective could
    not be read from a checkpoint."""
    named = [(f"the state_dict of callback {type(part).__qualname__}", part)
             for part in trainer.callbacks]  # fmt: skip
    named += [(f"the state of {type(part).__qualname__}", part)
              for part in (pl_module.objective, pl_module.model)]  # fmt: skip
    for holder, part in named:
        try:
            state = part.state_dict()
        except Exception:  # it may need what the first step brings; the first save looks again
            continue
        check_plain(state, holder)


def unlogged(trainer: L.Trainer) -> dict[str, float]:
    """The values that Lightning will log for the present batch once its callbacks are done;
    empty after that, and at steps that are not logged."""
    batches: Any = trainer.fit_loop.epoch_loop.batch_progress.current
    # Lightning has no public name for the values of this very step: `logged_metrics` also holds
    # those of earlier steps and validations, which a resumed run would log again. This is the only
    # place that reads Lightning's private connector; the test of an exact resume sees a change.
    connector = trainer._logger_connector
    if batches.processed == batches.completed or not connector.should_update_logs:
        return {}
    values = {name: float(value) for name, value in connector.metrics["log"].items()}
    return values | {"epoch": trainer.current_epoch}


def validates_now(trainer: L.Trainer) -> bool:
    """Whether a validation follows directly after the present batch."""
    every = trainer.val_check_batch
    return bool(every) and (trainer.fit_loop.total_batch_idx + 1) % int(every) == 0

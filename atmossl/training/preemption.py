"""Ends a run well at a signal: the step is finished, a checkpoint saved, and the job put back
into the queue."""

import os
import signal
import subprocess
import time
from types import FrameType
from typing import Any

import lightning as L
import torch
import torch.distributed as dist

from atmossl.at_work import NUMBERS, is_repeated, leave, listen
from atmossl.training.checkpoint import KeepCheckpoints

_NEAR_LIMIT_SECONDS = 1800.0
_OUT_OF_TIME = (signal.SIGUSR1, signal.SIGUSR2)


class Interrupted(InterruptedError):
    """A signal ended the run after a checkpoint. `exit_code` is what the process should return."""

    def __init__(self, message: str, number: int, exit_code: int) -> None:
        super().__init__(message)
        self.number = number
        self.exit_code = exit_code


class SaveOnSignal(L.Callback):
    """At SIGINT, SIGHUP, SIGTERM, SIGUSR1 or SIGUSR2: finishes the optimiser step, or the batch of
    a validation, saves, and leaves; under Slurm it requeues the job.

    SIGUSR1 is what scripts/slurm/train.sbatch asks for before the time limit, SIGUSR2 what
    submitit does. SIGTERM may also mean that the user cancelled the job, or that Slurm preempts
    and requeues it by itself, so it requeues only within half an hour of the limit
    (SLURM_JOB_END_TIME).
    All ranks leave after the same step, whichever of them got the signal first. A second Ctrl-C
    leaves at once, without saving.
    """

    def __init__(self, checkpoints: KeepCheckpoints) -> None:
        self.checkpoints = checkpoints
        self._received = 0
        self._since = 0.0
        self._group: Any = None

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        listen(self._note, (*_OUT_OF_TIME, *NUMBERS))  # Lightning's were set before; it resets them
        if trainer.world_size > 1:
            self._group = dist.new_group(backend="gloo")
            # Lightning asks all devices twice per batch whether one saw SIGTERM, and waits.
            trainer.fit_loop.epoch_loop._broadcast_sigterm_tensor = lambda: None

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received and is_repeated((self._received, self._since), number):
            leave(number, f"the checkpoints in {self.checkpoints.folder} stay as they were")
        if not self._received:
            name = signal.Signals(number).name
            os.write(2, f"\n{name}: finishing the step and saving\n".encode())
            self._received, self._since = number, time.monotonic()

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, idx: int
    ) -> None:
        if (idx + 1) % trainer.accumulate_grad_batches:
            return  # half an accumulated step cannot be saved
        if number := self._signal_to_obey(trainer):
            self._leave(trainer, number)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any,
        batch_idx: int, dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        """A validation that a signal meets is left. The weights are those of the step before it,
        and all ranks validate as many batches, so that they agree here as after a step."""
        if number := self._signal_to_obey(trainer):
            # or the run that goes on would finish the half validation with other batches
            trainer.fit_loop.epoch_loop.val_loop.batch_progress.reset()
            self._leave(trainer, number)

    def _signal_to_obey(self, trainer: L.Trainer) -> int:
        """The signal that any rank received, or 0, as in a run whose last step is done: it ends by
        itself, with its last validation."""
        number = self._agreed()
        return number if trainer.global_step < trainer.max_steps else 0

    def _leave(self, trainer: L.Trainer, number: int) -> None:
        self.checkpoints.save(trainer)
        self.checkpoints.settle(trainer)
        trainer.strategy.barrier()
        name = signal.Signals(number).name
        message = f"{name} at step {trainer.global_step}; saved in {self.checkpoints.folder}"
        if not wants_requeue(number, os.environ, time.time()):
            raise Interrupted(f"{message}; resume=auto goes on from there", number, 128 + number)
        raise Interrupted(f"{message}; {requeue(trainer)}", number, 0)

    def _agreed(self) -> int:
        """The signal that any rank received, or 0. The exchange is on the host, so that the
        device is not waited for."""
        if self._group is None:
            return self._received
        number = torch.tensor(self._received)
        dist.all_reduce(number, dist.ReduceOp.MAX, group=self._group)
        return int(number)


def wants_requeue(number: int, environment: Any, now: float) -> bool:
    """Whether a signal means that a Slurm job ran out of time."""
    if "SLURM_JOB_ID" not in environment:
        return False
    if number in _OUT_OF_TIME:
        return True
    end = environment.get("SLURM_JOB_END_TIME")
    return end is not None and float(end) - now < _NEAR_LIMIT_SECONDS


def requeue(trainer: L.Trainer) -> str:
    """Put the job back into the queue, by the first process alone, and report how that went."""
    job = os.environ["SLURM_JOB_ID"]
    if not trainer.is_global_zero:
        return f"job {job} is requeued by the first process"
    if "SLURM_ARRAY_JOB_ID" in os.environ:
        job = f"{os.environ['SLURM_ARRAY_JOB_ID']}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    done = subprocess.run(["scontrol", "requeue", job], capture_output=True, text=True, check=False)
    if done.returncode:
        return f"job {job} could not be requeued: {done.stderr.strip()}"
    return f"job {job} is requeued"

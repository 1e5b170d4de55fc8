"""Callbacks: throughput, early failure on non-finite losses, pictures of the curves at the end."""

import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch

from atmossl.batch import Batch
from atmossl.training.curves import plot_curves


class Throughput(L.Callback):
    """Logs samples and tokens per second since the last log, over all devices."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._start = 0.0
        self._samples = self._tokens = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del trainer, pl_module
        self._start, self._samples, self._tokens = time.perf_counter(), 0, 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, idx: int
    ) -> None:
        del outputs
        ranks = trainer.world_size
        self._samples += len(batch.sample_id) * ranks
        streams = [stream for view in batch.views for stream in view.streams]
        self._tokens += sum(stream.corruption.numel() for stream in streams) * ranks
        if (idx + 1) % self.every:
            return
        elapsed = time.perf_counter() - self._start
        pl_module.log("samples_per_s", self._samples / elapsed, prog_bar=True)
        pl_module.log("tokens_per_s", self._tokens / elapsed)
        self._start, self._samples, self._tokens = time.perf_counter(), 0, 0

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.on_train_start(trainer, pl_module)  # validation is no training time


class StopOnNonFinite(L.Callback):
    """Stops the run after `limit` batches in a row with a NaN or infinite loss.

    Raises:
        FloatingPointError: names the step and the samples of the last such batch.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self._count = 0

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Batch, idx: int
    ) -> None:
        del pl_module, idx
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        self._count = 0 if math.isfinite(float(loss.detach())) else self._count + 1
        if self._count >= self.limit:
            datamodule: Any = trainer.datamodule  # type: ignore[attr-defined]
            raise FloatingPointError(
                f"the loss was not finite {self._count} times in a row, last at step "
                f"{trainer.global_step} on {datamodule.identity(batch.sample_id.tolist())}; "
                "lower optimizer.learning_rate, or go on from the last checkpoint"
            )


class CurvesAtEnd(L.Callback):
    """Draws losses, skill against the first guess and learning rate from the CSV log."""

    def __init__(self, metrics: Path, folder: Path) -> None:
        self.metrics = metrics
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        del pl_module
        if trainer.is_global_zero and self.metrics.exists():
            plot_curves(self.metrics, self.folder)


class LearningRate(L.Callback):
    """Logs the learning rate and the gradient norm before clipping."""

    def __init__(self, every: int) -> None:
        self.every = every

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if trainer.global_step % self.every:
            return
        gradients = [p.grad for p in pl_module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        pl_module.log("gradient_norm", norm)
        pl_module.log("learning_rate", optimizer.param_groups[0]["lr"])

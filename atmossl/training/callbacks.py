"""Callbacks: early failure on non-finite losses, metrics, learning rate, curves at the end."""

import json
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning as L
import numpy as np
import torch
from torch import Tensor

from atmossl.atomic_files import write_atomically
from atmossl.batch import Batch
from atmossl.masking.views import ViewSpec
from atmossl.training.checkpoint import note_once
from atmossl.training.curves import plot_curves


@dataclass(frozen=True)
class _Watched:
    """A training step whose result is on its way to the host."""

    step: int
    batch: Batch
    finite: Tensor
    arrived: Any  # a CUDA event, or None where the value is there at once


class StopOnNonFinite(L.Callback):
    """Stops the run after `limit` steps in a row with a NaN or infinite loss or gradient, and
    writes the samples of these steps to `nonfinite.json`.

    Results are copied to the host beside the computation and looked at when they have arrived, a
    step or two later, so that no step waits. The gradients of such a step count as 0
    (`clip_gradients`), which keeps the weights sound.
    Raises:
        FloatingPointError: names the step and the samples of the last such batch.
    """

    def __init__(self, limit: int, folder: Path) -> None:
        self.limit = limit
        self.folder = folder
        self._pending: deque[_Watched] = deque()
        self._bad: list[_Watched] = []

    def healthy(self) -> bool:
        """Whether the last step was finite, once its result is known."""
        while self._pending:
            self._look(self._pending.popleft())
        return not self._bad

    def _look(self, watched: _Watched) -> None:
        if watched.arrived is not None:
            watched.arrived.synchronize()
        self._bad = [] if bool(watched.finite) else [*self._bad, watched]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, idx: int
    ) -> None:
        loss = outputs["loss"] if isinstance(outputs, dict) else outputs
        finite = torch.isfinite(loss.detach())
        if trainer.precision != "16-mixed" and pl_module.gradient_norm is not None:
            finite = finite & torch.isfinite(pl_module.gradient_norm)  # fp16 looks for its scale
        self._pending.append(_watch(trainer.global_step, batch, finite))
        while self._pending and _has_arrived(self._pending[0]):
            self._look(self._pending.popleft())
        if len(self._bad) >= self.limit:
            self._stop(trainer)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """A run that ends at such a step saves nothing of it: it fails if it has no checkpoint."""
        del pl_module
        if self.healthy():
            return
        last = self.folder / "checkpoints" / "last.ckpt"
        if not last.exists():
            self._stop(trainer)
        note_once(
            f"the last {len(self._bad)} steps were not finite and are not saved; {last} is older"
        )

    def _stop(self, trainer: Any) -> None:
        identity = trainer.datamodule.identity
        last = self._bad[-1]
        named = identity(last.batch.sample_id.tolist())
        record = [
            {"step": w.step, "samples": identity(w.batch.sample_id.tolist()), "windows": _places(w)}
            for w in self._bad
        ]
        path = self.folder / f"nonfinite-rank{trainer.global_rank}.json"
        write_atomically(path, lambda partial: partial.write_text(json.dumps(record, indent=1)))
        has_saved = (self.folder / "checkpoints" / "last.ckpt").exists()
        further = ", or go on from the last checkpoint with resume=auto" if has_saved else ""
        raise FloatingPointError(
            f"the loss or gradient was not finite {len(self._bad)} times in a row, last at step "
            f"{last.step} on {named} (see {path}); lower optimizer.learning_rate{further}"
        )


def _watch(step: int, batch: Batch, finite: Tensor) -> _Watched:
    if finite.device.type != "cuda":
        return _Watched(step, batch, finite, None)
    host = torch.empty((), dtype=torch.bool, pin_memory=True)
    host.copy_(finite, non_blocking=True)
    event = torch.cuda.Event()
    event.record()
    return _Watched(step, batch, host, event)


def _has_arrived(watched: _Watched) -> bool:
    return watched.arrived is None or watched.arrived.query()


def _places(watched: _Watched) -> list[dict[str, Any]]:
    """The first and last token centre of every sample: time in UTC, degrees north and east."""
    grid = watched.batch.views[0].streams[0].grid
    places = []
    for hours, lat, lon in zip(grid.time_hours, grid.lat, grid.lon, strict=True):
        times = np.datetime64(0, "s") + (hours[[0, -1]].double().cpu().numpy() * 3600).astype(int)
        places.append(
            {
                "time": [str(time) for time in times],
                "lat": [round(float(x), 4) for x in lat[[0, -1]]],
                "lon": [round(float(x), 4) for x in lon[[0, -1]]],
            }
        )
    return places


class CurvesAtEnd(L.Callback):
    """Draws losses, skill against the first guess, and learning rate from the CSV log when
    training ends."""

    def __init__(self, metrics: Path, folder: Path) -> None:
        self.metrics = metrics
        self.folder = folder

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero and self.metrics.exists():
            plot_curves(self.metrics, self.folder)


class LogMetrics(L.Callback):
    """Logs the metrics of the objective over the batches of all ranks: in training for the batch
    before a log, in validation for every task."""

    def __init__(self) -> None:
        self._sums: dict[str, dict[str, list[Tensor]]] = {}  # of every validation batch, by task

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, idx: int
    ) -> None:
        if outputs.get("sums"):
            sums = {"": _over_ranks(trainer, outputs["sums"])}
            common = {"batch_size": len(batch.sample_id), "rank_zero_only": True}
            pl_module.log_dict(pl_module.objective.metrics["train"].values(sums), **common)

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        metric = pl_module.objective.metrics.get("validation")
        if metric is not None:
            task = self._sums.setdefault(pl_module.task_names[dataloader_idx], {})
            for name, value in metric.sums(batch, outputs).items():
                task.setdefault(name, []).append(value)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        sums = {
            task: _over_ranks(trainer, {n: torch.stack(v).sum(dim=0) for n, v in names.items()})
            for task, names in self._sums.items()
        }
        self._sums = {}
        if sums:
            for key, value in pl_module.objective.metrics["validation"].values(sums).items():
                # they are the same on all ranks; Lightning would warn otherwise
                pl_module.log(key, value, prog_bar=key.count("/") == 1, sync_dist=True)


class LossByMask(L.Callback):
    """Logs `train/mask_loss/KIND`, the loss under every kind of mask of a mixture, over all samples
    of all ranks since the last log. It is NaN for a kind that was not drawn. Losses of whole fields
    are left out, since they do not tell samples apart.

    kinds: names of the samplers of the mixture.
    every: batches from log to log.
    """

    def __init__(self, kinds: Sequence[str], every: int) -> None:
        self.kinds = tuple(kinds)
        self.every = every
        self._trainer: Any = None
        self._sums: Tensor | None = None  # [kind term two], weighted losses and weights

    def state_dict(self) -> dict[str, Any]:
        """The sums of all ranks that are not yet logged; every rank must call this."""
        if self._sums is None or self._trainer is None:
            return {}
        sums = _over_ranks(self._trainer, {"sums": self._sums})["sums"]
        return {"kinds": list(self.kinds), "sums": sums.cpu()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict.get("kinds") == list(self.kinds):
            self._sums = state_dict["sums"]

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._trainer = trainer
        if self._sums is not None:  # the first rank alone holds those of all
            self._sums = self._sums.to(pl_module.device) * float(trainer.is_global_zero)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, idx: int
    ) -> None:
        by_sample, kind = outputs["by_sample"], batch.views[0].mask_kind
        if by_sample is None or kind is None:
            return
        sums = self._sums
        if sums is None:
            sums = by_sample.new_zeros(len(self.kinds), *by_sample.shape[1:]).double()
        sums = sums.index_add(0, kind, by_sample.double())
        self._sums = sums if (idx + 1) % self.every else None
        if self._sums is not None:
            return
        sums = _over_ranks(trainer, {"sums": sums})["sums"]
        values = _means_over_terms(sums, outputs["factors"]).float().unbind()
        logged = {f"train/mask_loss/{n}": v for n, v in zip(self.kinds, values, strict=True)}
        pl_module.log_dict(logged, batch_size=len(batch.sample_id), rank_zero_only=True)


def _means_over_terms(sums: Tensor, factors: Sequence[float]) -> Tensor:
    """The loss of every kind from its sums [kind term two]; NaN for a kind that hid nothing. A
    term in which a kind hides nothing is left out of that kind's mean."""
    losses, weights = sums.unbind(-1)
    shares = torch.tensor(factors, dtype=sums.dtype, device=sums.device) * (weights > 0)
    tiny = torch.finfo(sums.dtype).tiny
    means = losses / weights.clamp_min(tiny)
    return (shares * means).sum(1) / shares.sum(1)


def _over_ranks(trainer: L.Trainer, sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """Sums over all ranks, in one exchange."""
    flat = torch.cat([value.flatten() for value in sums.values()])
    total: Any = trainer.strategy.reduce(flat, reduce_op="sum")
    parts = total.split([value.numel() for value in sums.values()])
    shaped = zip(sums.items(), parts, strict=True)
    return {name: part.view_as(value) for (name, value), part in shaped}


class NothingHidden(L.Callback):
    """Tells in one line if the first batch hides nothing from the network, or all batches of a task
    in the first validation: losses of hidden values are then 0, and nothing is learned.

    sampler: of the run. views: of the objective; those that have a sampler of their own are left
    out.
    """

    def __init__(self, sampler: Any, views: Sequence[ViewSpec]) -> None:
        self.sampler = type(sampler).__qualname__
        self.masked = [number for number, view in enumerate(views) if view.masking is None]
        self._is_first_batch = bool(self.masked)
        self._hides: dict[str, bool] | None = {}  # whether a task hides something; None: told

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, idx: int
    ) -> None:
        del trainer, pl_module, outputs, idx
        if self._is_first_batch and not self._hides_something(batch):
            note_once(
                f"masking={self.sampler} hid nothing in the first batch, so that its loss has no "
                "hidden value"
            )
        self._is_first_batch = False

    def on_validation_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        del trainer, outputs, batch_idx
        if self._hides is not None and self.masked:
            task = pl_module.task_names[dataloader_idx]
            self._hides[task] = self._hides.get(task, False) or self._hides_something(batch)

    def on_validation_epoch_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        del trainer, pl_module
        for task, hides in (self._hides or {}).items():
            if not hides:
                note_once(
                    f"the task {task} hid nothing in validation, so that its loss has no hidden "
                    "value"
                )
        self._hides = None

    def _hides_something(self, batch: Batch) -> bool:
        streams = [stream for number in self.masked for stream in batch.views[number].streams]
        return any(bool(s.hidden.any()) for s in streams if s.spec.role == "predict")


class LearningRate(L.Callback):
    """Logs the learning rate and the gradient norm before clipping."""

    def __init__(self, every: int) -> None:
        self.every = every
        self._rate = 0.0

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._rate = optimizer.param_groups[0]["lr"]

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, idx: int
    ) -> None:
        if (idx + 1) % self.every:
            return
        pl_module.log("gradient_norm", pl_module.gradient_norm)
        pl_module.log("learning_rate", self._rate)

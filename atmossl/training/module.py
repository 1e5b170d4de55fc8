"""The LightningModule: it delegates to model, objective, schedule and the averaged weights."""

from dataclasses import dataclass
from typing import Any, Literal

import lightning as L
import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from atmossl.batch import Batch, Losses, Prediction, StreamSpec
from atmossl.objectives.base import Objective
from atmossl.objectives.masked import hidden_values, predicted_streams
from atmossl.training.muon import Muon
from atmossl.training.schedule import Schedule, learning_rate_factor


@dataclass(frozen=True)
class OptimizerSettings:
    algorithm: Literal["adamw", "muon"]
    learning_rate: float
    weight_decay: float
    betas: tuple[float, float]
    schedule: Schedule
    warmup_steps: int
    final_fraction: float
    decay_every: int
    ema_decay: float
    max_steps: int


def moving_average(decay: float) -> Any:
    """Exponential moving average that forgets its start: the decay after n updates is at most
    (1 + n) / (10 + n), as in TensorFlow's ExponentialMovingAverage."""

    @torch.no_grad()
    def update(averaged: Any, current: Any, num_averaged: Tensor | int) -> None:
        count = int(num_averaged)
        share = 1 - min(decay, (1 + count) / (10 + count))
        for one, other in zip(averaged, current, strict=True):
            one.lerp_(other, share)

    return update


class TrainingModule(L.LightningModule):
    """record: what a checkpoint must carry so that inference needs nothing else."""

    def __init__(
        self,
        *,
        model: nn.Module,
        objective: Objective,
        optimizer: OptimizerSettings,
        record: dict[str, Any],
        task_names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.settings = optimizer
        self.record = record
        self.task_names = task_names
        self.ema = AveragedModel(
            model, multi_avg_fn=moving_average(optimizer.ema_decay), use_buffers=False
        )
        self.ema.requires_grad_(False)  # DDP waits for every parameter that wants a gradient
        self._ema_step = 0
        self._squares: dict[str, list[Tensor]] = {}

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        del batch_idx
        losses = self.objective(self.model, batch)
        self._log_losses("train", losses, batch, prog_bar=True)
        return losses.total

    def on_train_batch_end(self, outputs: Any, batch: Batch, batch_idx: int) -> None:
        del outputs, batch, batch_idx
        self.update_ema()

    def update_ema(self) -> None:
        """Fold the weights into their moving average, once per optimiser step."""
        if self.global_step > self._ema_step:
            self.ema.update_parameters(self.model)
            self._ema_step = self.global_step

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        del batch_idx
        task = self.task_names[dataloader_idx]
        losses = self.objective(self.ema, batch)
        self._log_losses(f"validation/{task}", losses, batch)
        if losses.prediction is not None:
            self._gather_errors(task, batch, losses.prediction)

    def _gather_errors(self, task: str, batch: Batch, prediction: Prediction) -> None:
        """Squared errors of the ensemble mean and of the first guess, per variable."""
        (view,) = batch.views
        for stream, predicted in zip(predicted_streams(view), prediction.streams, strict=True):
            target, weight, _ = hidden_values(stream)
            weight = weight * predicted.queries.valid[..., None]
            index = predicted.queries.index[..., None].expand_as(target)
            guess = stream.guess.flatten(1, 4).gather(1, index)
            for number, name in enumerate(stream.spec.variables):
                errors = [
                    (_of_variable(weight * (x - target) ** 2, stream.spec, number)).sum()
                    for x in (predicted.members.mean(dim=2), guess)
                ]
                self._squares.setdefault(f"{task}/{name}", []).append(torch.stack(errors))

    def on_validation_epoch_end(self) -> None:
        """Log RMSE over the first guess's RMSE: below 1 the model knows more than its guess."""
        ratios: dict[str, list[Tensor]] = {}
        for key, squares in self._squares.items():
            total = self.trainer.strategy.reduce(torch.stack(squares).sum(dim=0), reduce_op="sum")
            assert isinstance(total, Tensor)
            ratio = (total[0] / total[1]).sqrt()
            ratios.setdefault(key.split("/")[0], []).append(ratio)
            self.log(f"ratio/{key}", ratio, rank_zero_only=True)
        for task, values in ratios.items():
            self.log(f"ratio/{task}", torch.stack(values).mean(), prog_bar=True)
        if ratios:
            mean = torch.stack([torch.stack(values).mean() for values in ratios.values()]).mean()
            self.log("ratio/mean", mean)
        self._squares.clear()

    def _log_losses(self, stage: str, losses: Losses, batch: Batch, **kwargs: Any) -> None:
        common = {
            "batch_size": len(batch.sample_id),
            "add_dataloader_idx": False,
            "sync_dist": stage != "train",
        }
        self.log(f"{stage}/loss", losses.total.detach(), **common, **kwargs)
        for name, value in losses.parts:
            self.log(f"{stage}/loss_{name}", value.detach(), **common)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        optimizer = self._optimizer()
        factor = learning_rate_factor(
            settings.schedule,
            warmup_steps=settings.warmup_steps,
            max_steps=settings.max_steps,
            final_fraction=settings.final_fraction,
            decay_every=settings.decay_every,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def _optimizer(self) -> torch.optim.Optimizer:
        settings = self.settings
        named = list(self.model.named_parameters())
        if settings.algorithm == "muon":  # the last layer has no square geometry: AdamW
            chosen = [p for name, p in named if p.ndim > 1 and not name.startswith("tail.")]
        else:
            chosen = [p for _, p in named if p.ndim > 1]
        identities = {id(parameter) for parameter in chosen}
        others = [parameter for _, parameter in named if id(parameter) not in identities]
        common: dict[str, Any] = {
            "lr": settings.learning_rate,
            "betas": settings.betas,
            "weight_decay": settings.weight_decay,
        }
        plain = {"params": others, "weight_decay": 0.0}
        if settings.algorithm == "muon":
            return Muon([{"params": chosen, "muon": True}, plain], **common)
        fused = self.trainer.precision == "32-true"  # else Lightning cannot clip gradients
        return torch.optim.AdamW([{"params": chosen}, plain], fused=fused, **common)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.update_ema()  # callbacks save before this module's own end-of-batch hook
        checkpoint["state_dict"] = self.state_dict()
        checkpoint["atmossl"] = {
            **self.record,
            "step": self.global_step,
            "rng": torch.get_rng_state(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._ema_step = int(checkpoint["atmossl"]["step"])
        torch.set_rng_state(checkpoint["atmossl"]["rng"].cpu())


def _of_variable(values: Tensor, spec: StreamSpec, number: int) -> Tensor:
    """The share of a patch axis that belongs to one variable of the stream."""
    return values.unflatten(-1, (len(spec.variables), -1))[..., number, :]

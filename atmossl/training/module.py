"""The LightningModule: it delegates to model, objective, schedule and the averaged weights."""

from collections.abc import Sequence
from typing import Any

import lightning as L
import torch
from einops import rearrange, reduce
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from atmossl.batch import (
    Batch,
    Prediction,
    StreamPrediction,
    StreamSpec,
    StreamTokens,
)
from atmossl.objectives.base import Objective
from atmossl.objectives.masked import hidden_values, predicted_streams
from atmossl.training.distributed import clip_gradients, random_states, set_random_state
from atmossl.training.optimizer import OptimizerSettings, freeze, make_optimizer
from atmossl.training.resume import regroup_batches
from atmossl.training.schedule import learning_rate_factor
from atmossl.training.strategies import ShardedStrategy


def average_share(decay: float, count: int) -> float:
    """Share of the new weights in an exponential moving average after `count` updates. It forgets
    its start: the decay is at most (1 + n) / (10 + n), as in TensorFlow's
    ExponentialMovingAverage; the first update copies."""
    return 1.0 - min(decay, (1 + count) / (10 + count)) if count else 1.0


_HYPERPARAMETERS = ("weight_decay", "betas")


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
        freeze(model, optimizer.freeze, only=optimizer.only)
        self.task_names = task_names
        self.ema = AveragedModel(model, use_buffers=False)
        self.ema.requires_grad_(False)  # DDP waits for every parameter that wants a gradient
        self._squares: dict[str, list[Tensor]] = {}
        self._step_losses: list[Tensor] = []  # of the batches that the step has accumulated
        self.gradient_norm: Tensor | None = None
        self._restored: list[dict[str, Tensor]] | None = None
        self._configured: list[dict[str, Any]] = []  # rates of every group of parameters

    def configure_model(self) -> None:
        """Let a strategy that shards parameters do so, before the optimiser sees them."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            strategy.shard((self.model, self.ema.module))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        losses = self.objective(self.model, batch)
        self._step_losses.append(losses.values())
        trainer: Any = self.trainer
        if (batch_idx + 1) % trainer.accumulate_grad_batches:
            return losses.total
        # other steps log nothing, so that they wait neither for the device nor for other ranks
        if (batch_idx + 1) % (trainer.log_every_n_steps * trainer.accumulate_grad_batches) == 0:
            means = torch.stack(self._step_losses).mean(dim=0)
            self._log_losses("train", losses.names, means, batch, prog_bar=True)
            if losses.prediction is not None:
                with torch.no_grad():
                    self._log_levels(batch, losses.prediction)
        self._step_losses.clear()
        return losses.total

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        del optimizer, gradient_clip_algorithm
        assert gradient_clip_val is not None
        self.gradient_norm = clip_gradients(self.model.parameters(), float(gradient_clip_val))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.update_ema(self.global_step + 1)  # Lightning counts the step after this

    def update_ema(self, step: int) -> None:
        """Fold the weights after an optimiser step into their moving average. Updates are counted
        on the host: torch's own method waits for the device at every step."""
        share = average_share(self.settings.ema_decay, step - 1)
        with torch.no_grad():
            pairs = zip(self.ema.module.parameters(), self.model.parameters(), strict=True)
            for averaged, current in pairs:
                averaged.lerp_(current, share)
            self.ema.n_averaged += 1

    def validation_step(
        self, batch: Batch, batch_idx: int, dataloader_idx: int = 0
    ) -> Prediction | None:
        del batch_idx
        task = self.task_names[dataloader_idx]
        losses = self.objective(self.ema, batch)
        self._log_losses(f"validation/{task}", losses.names, losses.values(), batch)
        if losses.prediction is not None:
            self._gather_errors(task, batch, losses.prediction)
        return losses.prediction

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
                key = f"{stream.spec.name}_{name}" if stream.spec.data else name
                self._squares.setdefault(f"{task}/{key}", []).append(torch.stack(errors))

    def on_validation_epoch_end(self) -> None:
        """Log RMSE over the first guess's RMSE: below 1 the model knows more than its guess."""
        ratios: dict[str, list[Tensor]] = {}
        alike: dict[str, Any] = {"sync_dist": True}  # they are; Lightning would warn otherwise
        for key, squares in self._squares.items():
            total = self.trainer.strategy.reduce(torch.stack(squares).sum(dim=0), reduce_op="sum")
            assert isinstance(total, Tensor)
            if not total[1] > 0:  # the task gives this stream as it is
                continue
            ratio = (total[0] / total[1]).sqrt()
            ratios.setdefault(key.split("/")[0], []).append(ratio)
            self.log(f"ratio/{key}", ratio, **alike)
        for task, values in ratios.items():
            self.log(f"ratio/{task}", torch.stack(values).mean(), prog_bar=True, **alike)
        if ratios:
            mean = torch.stack([torch.stack(values).mean() for values in ratios.values()]).mean()
            self.log("ratio/mean", mean, **alike)
        self._squares.clear()

    def _log_losses(
        self, stage: str, names: Sequence[str], values: Tensor, batch: Batch, **kwargs: Any
    ) -> None:
        common = {
            "batch_size": len(batch.sample_id),
            "add_dataloader_idx": False,
            "sync_dist": True,
        }
        self.log(f"{stage}/loss", values[0], **common, **kwargs)
        for name, value in zip(names, values[1:], strict=True):
            self.log(f"{stage}/loss_{name}", value, **common)

    def _log_levels(self, batch: Batch, prediction: Prediction) -> None:
        """RMSE of the ensemble mean by stream and level, in standard deviations, of all ranks."""
        (view,) = batch.views
        for stream, predicted in zip(predicted_streams(view), prediction.streams, strict=True):
            total = self.trainer.strategy.reduce(level_sums(stream, predicted), reduce_op="sum")
            assert isinstance(total, Tensor)
            errors = (total[0] / total[1]).sqrt()
            for level, error in zip(stream.spec.level_values, errors, strict=True):
                name = f"train/rmse_{stream.spec.name}_{level}"
                self.log(name, error, batch_size=len(batch.sample_id), rank_zero_only=True)

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # a fused step unscales fp16 gradients by itself, after they should have been clipped
        fused = self.trainer.precision != "16-mixed"
        optimizer = make_optimizer(self.model, settings, fused=fused)
        factor = learning_rate_factor(
            settings.schedule,
            warmup_steps=settings.warmup_steps,
            max_steps=settings.max_steps,
            final_fraction=settings.final_fraction,
            decay_every=settings.decay_every,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, factor)
        self._configured = [
            {key: group[key] for key in ("initial_lr", *_HYPERPARAMETERS)}
            for group in optimizer.param_groups
        ]
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": scheduler, "interval": "step"},
        }

    def on_train_start(self) -> None:
        """A resumed optimiser brings its old rates; those of the configuration count."""
        scheduler: Any = self.lr_schedulers()
        groups = scheduler.optimizer.param_groups
        for number, (group, wanted) in enumerate(zip(groups, self._configured, strict=True)):
            if group["initial_lr"] != wanted["initial_lr"]:
                group["lr"] *= wanted["initial_lr"] / group["initial_lr"]
                scheduler.base_lrs[number] = wanted["initial_lr"]
            group.update(wanted)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer: Any = self.trainer
        checkpoint["atmossl"] = {
            **self.record,
            "step": self.global_step,
            "samples": trainer.datamodule.samples_at(self.global_step),
            "rng": random_states(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["atmossl"]["rng"]
        regroup_batches(checkpoint, self.trainer.accumulate_grad_batches)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        del batch, batch_idx
        if self._restored is not None:  # only now, for loaders draw a seed when they start
            set_random_state(self._restored)
            self._restored = None


def _of_variable(values: Tensor, spec: StreamSpec, number: int) -> Tensor:
    """The share of a patch axis that belongs to one variable of the stream."""
    return values.unflatten(-1, (len(spec.variables), -1))[..., number, :]


def level_sums(
    stream: StreamTokens, predicted: StreamPrediction
) -> Float[Tensor, "two num_levels"]:
    """Weighted squared errors of the ensemble mean, and weights, summed by level."""
    spec = stream.spec
    target, weight, token_level = hidden_values(stream)
    weight = weight * predicted.queries.valid[..., None]
    squared = weight * (predicted.members.float().mean(dim=2) - target) ** 2
    inside = spec.token_size.level
    values = torch.stack([squared, weight.expand_as(squared)])
    values = reduce(
        values, "kind batch query (variable level point) -> (batch query) (kind level)", "sum",
        variable=len(spec.variables), level=inside,
    )  # fmt: skip
    sums = values.new_zeros(spec.num_levels // inside, values.shape[-1])
    sums.index_add_(0, token_level.flatten(), values)
    return rearrange(sums, "token (kind level) -> kind (token level)", kind=2)

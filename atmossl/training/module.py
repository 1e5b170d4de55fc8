"""The LightningModule: the training loop around a network and an objective, about which it knows
nothing.

It delegates the loss to the objective, and does what all objectives share: the mean of the loss
over ranks and accumulated batches, clipping, the optimiser and its schedule, the averaged weights,
and what a checkpoint holds.
"""

from collections import deque
from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from atmossl.batch import Batch
from atmossl.latent_losses import is_distributed
from atmossl.losses import Losses
from atmossl.model.network import Network
from atmossl.objectives.base import Objective, check_losses
from atmossl.training.distributed import clip_gradients, random_states, set_random_state
from atmossl.training.optimizer import (
    OptimizerSettings,
    freeze,
    learning_rate_factor,
    make_optimizer,
    named_parameters,
)
from atmossl.training.resume import regroup_batches
from atmossl.training.strategies import ShardedStrategy


def average_share(decay: float, count: int) -> float:
    """Share of the new weights in an exponential moving average after `count` updates. It forgets
    its start: the decay is at most (1 + n) / (10 + n), as in TensorFlow's
    ExponentialMovingAverage; the first update copies."""
    return 1.0 - min(decay, (1 + count) / (10 + count)) if count else 1.0


_HYPERPARAMETERS = ("weight_decay", "betas")


class TrainingModule(L.LightningModule):
    """The training loop of one network and one objective. checkpoint_record: what a checkpoint must
    carry so that inference needs nothing else."""

    def __init__(
        self,
        *,
        model: Network,
        objective: Objective,
        optimizer: OptimizerSettings,
        checkpoint_record: dict[str, Any],
        task_names: tuple[str, ...],
    ) -> None:
        super().__init__()
        self.model = model
        self.objective = objective
        self.settings = optimizer
        self.checkpoint_record = checkpoint_record
        freeze(self.trained, optimizer.freeze, only=optimizer.only)
        self.task_names = task_names
        self.ema = AveragedModel(model, use_buffers=False)
        # an objective without weights of its own is its own average, and adds nothing to a file
        learns = any(parameter.requires_grad for parameter in objective.parameters())
        self.averaged_objective = deepcopy(objective) if learns else None
        for averaged in (self.ema, self.averaged_objective):
            if averaged is not None:  # DDP waits for every parameter that wants a gradient
                averaged.requires_grad_(False)
        self._step_losses: list[Tensor] = []  # of the batches that the step has accumulated
        self._expected: deque[Tensor | None] = deque()  # mean weights of the coming steps' batches
        self._mean_weights: Tensor | None = None  # of the batches of the present step
        self.gradient_norm: Tensor | None = None
        self._restored: list[dict[str, Tensor]] | None = None
        self._configured: list[dict[str, Any]] = []  # rates of every group of parameters

    def configure_model(self) -> None:
        """Let a strategy shard the parameters, if it does, before the optimiser gets them."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ShardedStrategy):
            averaged: Any = self.ema.module
            parts = (self.model, averaged, self.objective, self.averaged_objective)
            strategy.shard([part for part in parts if part is not None])

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        """The parameters of network and objective by name."""
        return named_parameters(self.model, self.objective)

    def expect(self, batches: Sequence[Batch]) -> None:
        """Note, on the host, what the batches of one coming optimiser step count together. The
        loader calls it before it delivers the first of several batches that are accumulated."""
        weights = [self.objective.weights(batch) for batch in batches]
        actual_weights = [weight for weight in weights if weight is not None]
        self._expected.append(torch.stack(actual_weights).mean(dim=0) if actual_weights else None)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Any]:
        accumulate = self.trainer.accumulate_grad_batches
        if accumulate > 1 and batch_idx % accumulate == 0:
            mean = self._expected.popleft()
            self._mean_weights = mean if mean is None else _mean_over_ranks(mean.to(self.device))
        losses = self.objective(self.model, batch)
        check_losses(losses, self.objective, trains=True)
        losses = self._normalised(losses, batch, self._mean_weights)
        self._step_losses.append(losses.values())
        outputs: dict[str, Any] = {
            "loss": losses.total,
            "by_sample": losses.by_sample,
            "factors": losses.factors,
        }
        if (batch_idx + 1) % accumulate:
            return outputs
        sums: dict[str, Tensor] = {}
        # other steps log nothing, so that they wait neither for the device nor for other ranks
        if (batch_idx + 1) % (self.trainer.log_every_n_steps * accumulate) == 0:  # type: ignore[attr-defined]
            means = torch.stack(self._step_losses).mean(dim=0)
            self._log_losses("train", losses.names, means, batch, prog_bar=True)
            metric = self.objective.metrics.get("train")
            with torch.no_grad():
                sums = {} if metric is None else metric.sums(batch, losses)
        self._step_losses.clear()
        return {**outputs, "sums": sums}

    def _normalised(self, losses: Losses, batch: Batch, mean: Tensor | None) -> Losses:
        """The losses with every term times the weight of this batch over the mean weight of all
        batches of the step, on all ranks and in all accumulated batches. Gradients are averaged
        over these batches, so the result equals that of one batch that holds all samples, however
        unequal the batches are.

        mean: the mean weights, where batches are accumulated.
        """
        if mean is None and not is_distributed():
            return losses
        with torch.no_grad():
            counts = self.objective.weights(batch)
            if counts is None:
                return losses
            mean = _mean_over_ranks(counts) if mean is None else mean
            shares = counts / mean.clamp_min(torch.finfo(mean.dtype).tiny)
        return losses.scaled(shares)

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        assert gradient_clip_val is not None
        self.gradient_norm = clip_gradients(self.trained.values(), float(gradient_clip_val))

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        step = self.global_step + 1  # Lightning counts the step after this
        with torch.no_grad():
            self.objective.after_step(self.model, step)
        self.update_ema(step)

    def update_ema(self, step: int) -> None:
        """Update the moving average with the weights after an optimiser step. Updates are
        counted on the host: torch's own method waits for the device at every step."""
        share = average_share(self.settings.ema_decay, step - 1)
        with torch.no_grad():
            pairs = zip(self.ema.module.parameters(), self.model.parameters(), strict=True)
            for averaged, current in pairs:
                averaged.lerp_(current, share)
            if self.averaged_objective is not None:
                _average_objective(self.averaged_objective, self.objective, share)
            self.ema.n_averaged += 1

    def validation_step(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> Losses:
        task = self.task_names[dataloader_idx]
        objective = self.objective if self.averaged_objective is None else self.averaged_objective
        losses = objective(self.ema.module, batch)
        check_losses(losses, objective, trains=False)
        normalised = self._normalised(losses, batch, None)
        self._log_losses(f"validation/{task}", losses.names, normalised.values(), batch)
        return losses

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

    def configure_optimizers(self) -> Any:
        settings = self.settings
        # a fused step unscales fp16 gradients by itself, after they should have been clipped
        fused = self.trainer.precision != "16-mixed"
        optimizer = make_optimizer(self.model, self.objective, settings, fused=fused)
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
        """Set the learning rates of the configuration, since a resumed optimiser brings its old
        ones."""
        scheduler: Any = self.lr_schedulers()
        groups = scheduler.optimizer.param_groups
        for number, (group, configured) in enumerate(zip(groups, self._configured, strict=True)):
            if group["initial_lr"] != configured["initial_lr"]:
                group["lr"] *= configured["initial_lr"] / group["initial_lr"]
                scheduler.base_lrs[number] = configured["initial_lr"]
            group.update(configured)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        trainer: Any = self.trainer
        checkpoint["atmossl"] = {
            **self.checkpoint_record,
            "step": self.global_step,
            "samples": trainer.datamodule.samples_at(self.global_step),
            "rng": random_states(),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self._restored = checkpoint["atmossl"]["rng"]
        regroup_batches(checkpoint, self.trainer.accumulate_grad_batches)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        if self._restored is not None:  # only now, for loaders draw a seed when they start
            set_random_state(self._restored)
            self._restored = None


def _average_objective(averaged: Objective, current: Objective, share: float) -> None:
    """Average the trained parameters of the objective as those of the network; take teachers and
    buffers as they are."""
    for mean, new in zip(averaged.parameters(), current.parameters(), strict=True):
        mean.lerp_(new, share if new.requires_grad else 1.0)
    for mean, new in zip(averaged.buffers(), current.buffers(), strict=True):
        mean.copy_(new)


def _mean_over_ranks(values: Float[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
    if not is_distributed():
        return values
    mean = values / dist.get_world_size()
    dist.all_reduce(mean)
    return mean

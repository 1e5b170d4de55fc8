"""Watches whether latents collapse, that is, no longer tell one state from another.

After every validation the encoder's last latents of whole windows are looked at as *anomalies*,
departures from the mean of all latents at the same position: latents that tell the position and
nothing else would otherwise pass for rich ones. A run whose anomalies fill fewer dimensions than a
bound says so in one line, or stops.
"""

import logging
from dataclasses import replace
from typing import Any, Literal

import lightning as L
import torch
import torch.distributed as dist
from jaxtyping import Float, Int
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from atmossl.batch import Batch, TokenIndex, View
from atmossl.latent_losses import alignment, is_distributed, lidar, rankme, uniformity
from atmossl.model.network import Network
from atmossl.objectives.position_means import position_bins
from atmossl.training.checkpoint import KeepCheckpoints
from atmossl.training.distributed import whole

_LOGGER = logging.getLogger(__name__)
_NUM_TOKENS = 16  # of every state, at the same positions if windows overlap
_NUM_STATES = 512  # of every rank
_NOTHING = 1e-4  # anomalies of less than this share of the latents' size are rounding
_MANY = 4  # anomalies for each dimension of the bound that their rank is held to

Rows = tuple[Float[Tensor, "state token feature"], Int[Tensor, "state token"]]


def measures(
    latents: Float[Tensor, "state token feature"], bins: Int[Tensor, "state token"]
) -> dict[str, float]:
    """Measures of collapse, from the anomalies of latents about the mean of their position.

    bins: a number that tokens at the same position share; those seen once are left out. Empty if
        every position is seen once: then nothing can be told.

    rank_tokens, rank_pooled: RankMe of tokens, and of the means over the tokens of every state; 0
        where there are no anomalies. lidar_tokens: LiDAR, the tokens of a state being its views;
        lidar_pooled: two halves of its tokens being its views. std_mean, std_min: over features,
        of the anomalies' standard deviation in units of the latents' RMS. alignment, uniformity: of
        the directions of the halves' means, and of all tokens' means.
    """
    latents = latents.double()
    anomalies, twice = position_anomalies(latents, bins)
    size = latents.square().mean().sqrt()
    deviations = (anomalies.square().sum(dim=(0, 1)) / twice.sum().clamp_min(1)).sqrt()
    if not bool(twice.any()):
        return {}
    if float(deviations.square().mean().sqrt()) <= _NOTHING * float(size):
        names = ("rank_tokens", "rank_pooled", "lidar_tokens", "lidar_pooled", "std_mean")
        return dict.fromkeys((*names, "std_min", "uniformity"), 0.0)
    unit = anomalies / deviations.square().mean().sqrt()
    pooled = unit.mean(dim=1)
    halves = torch.stack([unit[:, ::2].mean(dim=1), unit[:, 1::2].mean(dim=1)], dim=1)
    values = {
        "rank_tokens": rankme(unit[twice]),
        "rank_pooled": rankme(pooled),
        "lidar_tokens": lidar(unit),
        "lidar_pooled": lidar(halves),
        "std_mean": deviations.mean() / size,
        "std_min": deviations.min() / size,
        "alignment": alignment(halves[:, 0], halves[:, 1]),
        "uniformity": uniformity(pooled) if len(pooled) > 1 else torch.zeros(()),
    }
    return {name: float(value) for name, value in values.items()}


def position_anomalies(
    latents: Float[Tensor, "state token feature"], bins: Int[Tensor, "state token"]
) -> tuple[Float[Tensor, "state token feature"], Tensor]:
    """Departures of latents from the mean of their position, 0 at positions that occur once; and
    where a position occurs several times."""
    _, place = bins.flatten().unique(return_inverse=True)
    flat = latents.flatten(0, 1)
    sums = flat.new_zeros(int(place.max()) + 1, flat.shape[-1]).index_add_(0, place, flat)
    counts = torch.bincount(place)
    repeated = (counts[place] > 1).view(bins.shape)
    anomalies = (flat - sums[place] / counts[place, None]).view_as(latents)
    return torch.where(repeated[..., None], anomalies, 0.0), repeated


def num_free(bins: Int[Tensor, "state token"]) -> int:
    """How many anomalies are free: those of n tokens at one position add up to 0, so n - 1 are."""
    return int(bins.numel() - bins.unique().numel())


def shown(view: View) -> View:
    """The view with nothing hidden."""
    streams = []
    for stream in view.streams:
        valid = stream.valid
        source = stream.target if valid is None else stream.target.where(valid, stream.source)
        visible = torch.zeros_like(stream.corruption)
        tokens = TokenIndex.whole(stream.corruption)
        streams.append(replace(stream, source=source, corruption=visible, encoder_tokens=tokens))
    return replace(view, streams=tuple(streams))


@torch.no_grad()
def latent_rows(network: Network, view: View) -> dict[str, Rows]:
    """The last latents of some tokens at the window's middle step, by stream. A fixed hash of
    positions chooses the tokens, so that overlapping windows have some in common."""
    rows = {}
    for name, latents in network.encode(shown(view)).items():
        shape = latents.grid.shape
        bins = position_bins(latents.grid, latents.chosen)
        middle = torch.zeros(shape, dtype=torch.bool, device=bins.device)
        middle[:, shape[1] // 2] = True
        order = (bins * 7919 % 1031).float().masked_fill(~middle.flatten(), torch.inf)
        count = min(_NUM_TOKENS, int(middle.numel() // shape[1]))
        index = order.topk(count, largest=False, sorted=True).indices
        features = latents.last.gather(1, index[..., None].expand(-1, -1, latents.last.shape[-1]))
        rows[name] = (features.float().cpu(), bins.gather(1, index).cpu())
    return rows


def teacher_distance(objective: Any, network: Network) -> float | None:
    """The RMS distance of the teacher's weights from the network's, over the RMS of the
    network's. None: the objective has no teacher. Every rank has to call this."""
    for part in objective.modules():
        teacher = getattr(part, "teacher", None)
        if isinstance(teacher, Network):
            apart, size = 0.0, 0.0
            # one of a pair may be sharded while the other is not: what was just used is gathered
            for ours, theirs in zip(network.parameters(), teacher.parameters(), strict=True):
                weight = whole(ours.detach())
                apart += float((whole(theirs.detach()) - weight).square().sum())
                size += float(weight.square().sum())
            return (apart / max(size, 1e-30)) ** 0.5
    return None


class CollapseWatch(L.Callback):
    """Logs `measures` as `collapse/NAME`, means over streams, after every validation, from the
    windows of its first task; and the distance of a teacher.

    below: the bound of the rank; 0: none. Too few states, or states that share too few positions,
    are not held to it. action: what happens below it. checkpoints: saves before the run stops.
    Raises:
        FloatingPointError: the rank is below the bound, and the action is to stop.
    """

    def __init__(
        self, below: float, action: Literal["warn", "stop"], checkpoints: KeepCheckpoints
    ) -> None:
        self.below, self.action, self.checkpoints = below, action, checkpoints
        self._rows: dict[str, list[Rows]] = {}
        self._end: str | None = None  # why the run stops at the end of this validation

    def on_validation_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:  # fmt: skip
        if dataloader_idx or batch_idx * len(batch.sample_id) >= _NUM_STATES:
            return
        with trainer.precision_plugin.forward_context():
            rows = latent_rows(pl_module.ema.module, batch.views[0])
        for name, stream_rows in rows.items():
            self._rows.setdefault(name, []).append(stream_rows)

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        rows, self._rows = self._rows, {}
        if not rows:
            return
        all_rows = [_over_ranks(stream_rows) for stream_rows in rows.values()]
        by_stream = [measures(*stream_rows) for stream_rows in all_rows]
        names = {name for measured in by_stream for name in measured}
        values = {
            name: sum(of_name) / len(of_name)
            for name in sorted(names)
            for of_name in [[measured[name] for measured in by_stream if name in measured]]
        }
        distance = teacher_distance(pl_module.objective, pl_module.model)
        if distance is not None:
            values["teacher_distance"] = distance
        for name, value in values.items():
            pl_module.log(f"collapse/{name}", value, sync_dist=True)
        counts = {
            "rank_tokens": min(num_free(bins) for _, bins in all_rows),
            "rank_pooled": min(len(bins) for _, bins in all_rows),
        }
        self._judge(values, counts, trainer.global_step)

    def on_validation_end(self, trainer: Any, pl_module: Any) -> None:
        if self._end is not None:
            self.checkpoints.on_train_end(trainer, pl_module)
            raise FloatingPointError(f"{self._end}; the last checkpoint is of this step")

    def _judge(self, values: dict[str, float], counts: dict[str, int], step: int) -> None:
        """Compare the ranks with the bound. counts: of what each rank is computed from."""
        held = [name for name, count in counts.items() if count >= _MANY * self.below]
        low = {name: values[name] for name in held if values.get(name, self.below) < self.below}
        if not low:
            return
        readings = " and ".join(f"collapse/{name}={value:.2f}" for name, value in low.items())
        line = (
            f"latents hardly tell states apart at step {step}: {readings}, below "
            f"trainer.collapse_below={self.below:g}; lower optimizer.learning_rate, or choose "
            "another objective or more of its regularisation"
        )
        if self.action == "stop":
            self._end = line
        else:
            _warn(line)


@rank_zero_only
def _warn(line: str) -> None:
    _LOGGER.warning("note: %s", line)


def _over_ranks(rows: list[Rows]) -> Rows:
    """The rows of all batches of all ranks, whose numbers may differ."""
    rank_rows = tuple(torch.cat(parts) for parts in zip(*rows, strict=True))
    if not is_distributed():
        return rank_rows  # type: ignore[return-value]
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, rank_rows)
    latents, bins = (torch.cat(parts) for parts in zip(*gathered, strict=True))
    return latents, bins

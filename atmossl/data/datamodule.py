"""Loaders for training and for the validation of every task."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice

import lightning as L
from torch.utils.data import DataLoader

from atmossl.batch import Batch, StreamSpec, collate_views
from atmossl.data.statistics import Normaliser
from atmossl.data.store import Segment
from atmossl.data.windows import SampleOrder, WindowDataset, WindowSize
from atmossl.masking.base import MaskingSampler


def _collate(samples: list) -> Batch:
    views, ids = zip(*samples, strict=True)
    return collate_views(list(views), list(ids))


@dataclass(frozen=True)
class LoaderSettings:
    """batch_size is per device; windows_per_time windows are cut at every start time."""

    batch_size: int
    num_workers: int
    windows_per_time: int
    first_guess: bool
    seed: int


class WindowDataModule(L.LightningDataModule):
    """Training windows under the pretraining masks, validation windows under each task's mask.

    num_batches: batches of the whole run on one device. validation_batches: per task.
    A restarted run goes on with the batch after the last optimiser step.
    """

    def __init__(
        self,
        *,
        train: Sequence[Segment],
        validation: Sequence[Segment],
        specs: Sequence[StreamSpec],
        normaliser: Normaliser,
        window: WindowSize,
        sampler: MaskingSampler,
        tasks: Mapping[str, MaskingSampler],
        settings: LoaderSettings,
        num_batches: int,
        validation_batches: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.num_batches = num_batches
        self.validation_batches = validation_batches
        self.task_names = tuple(tasks)
        common = {
            "specs": specs,
            "normaliser": normaliser,
            "window": window,
            "seed": settings.seed,
            "first_guess": settings.first_guess,
        }
        self.train_set = WindowDataset(
            segments=train, sampler=sampler, windows_per_time=settings.windows_per_time, **common
        )
        self.validation_sets = [
            WindowDataset(segments=validation, sampler=task, **common) for task in tasks.values()
        ]
        self._check_masks()

    def _check_masks(self) -> None:
        """Draw one sample of each mask, so that a misfit is refused early."""
        for dataset in (self.train_set, *self.validation_sets):
            order = SampleOrder(num_samples=len(dataset), batch_size=1, num_batches=1, seed=0)
            for (key,) in islice(order, 1):
                dataset[key]

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        order = SampleOrder(
            num_samples=len(self.train_set),
            batch_size=self.settings.batch_size,
            num_batches=self.num_batches,
            seed=self.settings.seed,
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
            first_batch=trainer.global_step * trainer.accumulate_grad_batches,
        )
        return self._loader(self.train_set, order)

    def val_dataloader(self) -> list[DataLoader]:
        trainer = self.trainer
        assert trainer is not None
        return [
            self._loader(
                dataset,
                SampleOrder(
                    num_samples=len(dataset),
                    batch_size=self.settings.batch_size,
                    num_batches=self.validation_batches,
                    seed=0,
                    rank=trainer.global_rank,
                    num_ranks=trainer.world_size,
                ),
            )
            for dataset in self.validation_sets
        ]

    def _loader(self, dataset: WindowDataset, order: SampleOrder) -> DataLoader:
        workers = self.settings.num_workers
        return DataLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            collate_fn=_collate,
            multiprocessing_context="forkserver" if workers else None,
            persistent_workers=bool(workers),
        )

    def identity(self, sample_ids: Sequence[int]) -> str:
        """Segment and start time of training samples, for messages about a bad batch."""
        return ", ".join(self.train_set.identity(int(sample_id)) for sample_id in sample_ids)

    def transfer_batch_to_device(self, batch: Batch, device, dataloader_idx: int) -> Batch:
        del dataloader_idx
        return batch.to(device)

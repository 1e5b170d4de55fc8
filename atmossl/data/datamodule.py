"""The Lightning datamodule: loaders for training under the pretraining masks, and for the
validation of every task under that task's mask."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any

import lightning as L
import numpy as np
from torch.utils.data import DataLoader

from atmossl.batch import Batch, StreamSpec
from atmossl.data.loader import (
    Collate,
    LoaderSettings,
    SampleOrder,
    WindowDataset,
    WindowLoader,
    worker_context,
)
from atmossl.data.segment import Segment, UnreadableChunk
from atmossl.data.windows import Normaliser, Statistics, WindowSize
from atmossl.masking.base import MaskingSampler, TokenLayout, check_masks
from atmossl.masking.views import ViewSpec

_LOGGER = logging.getLogger(__name__)
_NUM_DRAWS = 40


def check_samples(
    records: Sequence[tuple[Sequence[Segment], MaskingSampler]],
    specs: Sequence[StreamSpec],
    window: WindowSize,
    views: Sequence[ViewSpec] = (ViewSpec(),),
) -> None:
    """Read one sample of every record under its mask, before statistics are computed.

    Raises:
        ValueError: streams, windows and masks that do not fit the records, or each other.
    """
    for segments, sampler in records:
        sources = segments[0].sources.items()
        normaliser = Normaliser({data: Statistics.neutral(s.segment) for data, s in sources})
        dataset = WindowDataset(
            segments=segments, specs=specs, normaliser=normaliser, window=window, sampler=sampler,
            seed=0, views=views,
        )  # fmt: skip
        order = SampleOrder(num_samples=len(dataset), batch_size=1, num_batches=1, seed=0)
        with suppress(UnreadableChunk):  # the loader's matter, which `data.unreadable` decides
            for (key,) in islice(order, 1):
                (view, *_), _ = dataset[key]
                layouts = tuple(TokenLayout(stream.spec, stream.grid) for stream in view.streams)
                for number in range(_NUM_DRAWS):  # of a mixture, so that each part has its turn
                    masks = sampler(layouts, np.random.default_rng(number))
                    check_masks(sampler, masks, layouts)


class WindowDataModule(L.LightningDataModule):
    """Training windows under the pretraining masks, validation windows under each task's mask.

    num_batches: batches of the whole run on one device. validation_batches: per task. views: of
    every sample, see `WindowDataset`.
    A run that goes on (`go_on`) reads the sample after the last one that its checkpoint has learned
    from, whatever the batch size, the accumulation and the number of ranks are now.
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
        seed: int,
        num_batches: int,
        validation_batches: int,
        views: Sequence[ViewSpec] = (ViewSpec(),),
    ) -> None:
        super().__init__()
        self.settings = settings
        self.seed = seed
        self.num_batches = num_batches
        self.validation_batches = validation_batches
        self.task_names = tuple(tasks)
        common = {
            "specs": specs,
            "normaliser": normaliser,
            "window": window,
            "seed": seed,
            "first_guess": settings.first_guess,
            "views": views,
        }
        self.num_skipped = 0
        self._start = (0, 0)  # optimiser steps and samples that the run has behind it
        self.step_hours = train[0].step_hours
        self.train_set = WindowDataset(
            segments=train,
            sampler=sampler,
            windows_per_time=settings.windows_per_time,
            skip_unreadable=settings.unreadable == "skip",
            mirror=settings.mirror,
            **common,
        )
        self.validation_sets = [
            WindowDataset(segments=validation, sampler=task, **common) for task in tasks.values()
        ]
        for dataset in (self.train_set, *self.validation_sets):
            dataset.tell_short_segments()

    def go_on(self, *, step: int, samples: int) -> None:
        """Start training after `step` optimiser steps, which have learned from `samples`
        samples."""
        self._start = (step, samples)

    def samples_at(self, step: int) -> int:
        """How many samples of the run's sequence lie before its optimiser step `step`."""
        trainer = self.trainer
        assert trainer is not None
        first_step, first_sample = self._start
        ranks, accumulate = trainer.world_size, trainer.accumulate_grad_batches
        per_step = self.settings.batch_size * accumulate * ranks
        return first_sample + (step - first_step) * per_step

    def train_dataloader(self) -> DataLoader:
        trainer = self.trainer
        assert trainer is not None
        order = SampleOrder(
            num_samples=len(self.train_set),
            batch_size=self.settings.batch_size,
            num_batches=self.num_batches,
            seed=self.seed,
            rank=trainer.global_rank,
            num_ranks=trainer.world_size,
            first_batch=trainer.global_step * trainer.accumulate_grad_batches,
            first_sample=self.samples_at(trainer.global_step),
            group=self.settings.windows_per_read,
        )
        accumulate = trainer.accumulate_grad_batches
        if accumulate == 1:
            return self._loader(self.train_set, order)
        look_ahead = trainer.lightning_module.expect  # of `atmossl.training.module`
        return self._loader(self.train_set, order, accumulate=accumulate, look_ahead=look_ahead)

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

    def _loader(self, dataset: WindowDataset, order: SampleOrder, **more: Any) -> DataLoader:
        workers = self.settings.num_workers

        def describe(number: int) -> str:
            (keys,) = islice(order, number, number + 1)
            return ", ".join(dataset.identity(key.sample_id) for key in keys)

        return WindowLoader(
            dataset,
            batch_sampler=order,
            num_workers=workers,
            prefetch_factor=self.settings.prefetch if workers else None,
            collate_fn=Collate(self.settings.batch_size),
            multiprocessing_context=worker_context() if workers else None,
            persistent_workers=bool(workers),
            describe=describe,
            **more,
        )

    def identity(self, sample_ids: Sequence[int]) -> str:
        """The segment and start time of training samples, for messages about a bad batch."""
        return ", ".join(self.train_set.identity(int(sample_id)) for sample_id in sample_ids)

    def transfer_batch_to_device(self, batch: Batch, device, dataloader_idx: int) -> Batch:
        del dataloader_idx
        if batch.num_skipped:
            self.num_skipped += batch.num_skipped
            _LOGGER.warning("%d unreadable samples skipped so far", self.num_skipped)
        return batch.to(device)

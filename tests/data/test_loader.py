"""Exactly once, through real worker processes; and a worker that dies is told of."""

import os
from itertools import islice

import numpy as np
import pytest
from torch.utils.data import Dataset

from atmossl.data.datamodule import WindowLoader, WorkerDied, worker_context
from atmossl.data.windows import SampleKey, SampleOrder


class Echo(Dataset):
    """Samples that are their own keys; a process that is given `fatal` ends."""

    def __init__(self, fatal: int = -1) -> None:
        self.fatal = fatal

    def __getitems__(self, keys: list[SampleKey]) -> list[SampleKey]:
        if any(key.sample_id == self.fatal for key in keys):
            os._exit(1)
        return keys


def as_list(keys: list[SampleKey]) -> list[tuple[int, int]]:
    return [tuple(key) for key in keys]


def loader(order: SampleOrder, workers: int, dataset: Dataset) -> WindowLoader:
    return WindowLoader(
        dataset,
        batch_sampler=order,
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        multiprocessing_context=worker_context() if workers else None,
        collate_fn=as_list,
        describe=lambda number: f"batch {number}",
    )


@pytest.mark.distributed
def test_ranks_workers_and_restarts_deliver_every_sample_once_in_order() -> None:
    """A run of several ranks, stopped and gone on with other numbers of workers, delivers what
    one rank of one process would."""
    seed, num_ranks = 5, 2
    rng = np.random.default_rng(seed)
    batch_size = int(rng.integers(1, 4))
    group = int(rng.integers(1, 3))
    num_samples = group * int(rng.integers(5, 12))
    num_batches = 2 * num_samples // (num_ranks * batch_size) + 1
    common = {"num_samples": num_samples, "seed": seed, "group": group}
    delivered: list[list[list[tuple[int, int]]]] = []
    for rank in range(num_ranks):
        stop, workers = int(rng.integers(0, num_batches + 1)), rank
        ranked = {**common, "batch_size": batch_size, "num_batches": num_batches, "rank": rank}
        first = SampleOrder(**ranked, num_ranks=num_ranks)
        rest = SampleOrder(**ranked, num_ranks=num_ranks, first_batch=stop)
        before = list(islice(loader(first, workers, Echo()), stop))
        after = list(loader(rest, 1 - workers, Echo()))
        delivered.append(before + after)
    together = [key for batches in zip(*delivered, strict=True) for b in batches for key in b]
    single = SampleOrder(**common, batch_size=1, num_batches=len(together))
    assert together == [tuple(key) for (key,) in single]
    assert len(set(together)) == len(together)
    for epoch in range(2):
        ids = [sample_id for e, sample_id in together if e == epoch]
        assert sorted(ids) == list(range(num_samples))


@pytest.mark.distributed
def test_a_dead_worker_is_told_of_with_what_it_read() -> None:
    order = SampleOrder(num_samples=20, batch_size=2, num_batches=10, seed=0)
    fatal = list(order)[3][0].sample_id
    batches = iter(loader(order, 1, Echo(fatal)))
    with pytest.raises(WorkerDied, match="batch [0-3].*data.num_workers"):
        list(batches)


def test_groups_stay_together_and_still_every_sample_comes_once() -> None:
    order = SampleOrder(num_samples=24, batch_size=6, num_batches=4, seed=1, group=3)
    ids = [key.sample_id for batch in order for key in batch]
    assert sorted(ids) == list(range(24)) and ids != sorted(ids)
    assert all(ids[n : n + 3] == list(range(ids[n], ids[n] + 3)) for n in range(0, 24, 3))
    assert all(ids[n] % 3 == 0 for n in range(0, 24, 3))

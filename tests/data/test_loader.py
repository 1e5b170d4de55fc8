"""Exactly once, through real worker processes; and a worker that dies is told of."""

import os
from collections.abc import Callable, Iterator
from itertools import islice

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import Dataset

from atmossl.data.loader import SampleKey, SampleOrder, WindowLoader, WorkerDied, worker_context


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


class Replaceable:
    """A batch sampler that another takes the place of while worker processes live on."""

    order: SampleOrder

    def __iter__(self) -> Iterator[list[SampleKey]]:
        return iter(self.order)


def loader(order: SampleOrder | Replaceable, workers: int, dataset: Dataset) -> WindowLoader:
    return WindowLoader(
        dataset,
        batch_sampler=order,  # pyright: ignore[reportArgumentType]
        num_workers=workers,
        prefetch_factor=2 if workers else None,
        persistent_workers=bool(workers),
        multiprocessing_context=worker_context() if workers else None,
        collate_fn=as_list,
        describe=lambda number: f"batch {number}",
    )


@pytest.fixture(scope="module")
def delivered_by() -> Callable[[SampleOrder, int], Iterator[list[tuple[int, int]]]]:
    """Batches of an order through 0, 1 or 2 worker processes, which are started once."""
    samplers = [Replaceable() for _ in range(3)]
    loaders = [loader(sampler, workers, Echo()) for workers, sampler in enumerate(samplers)]

    def batches(order: SampleOrder, workers: int) -> Iterator[list[tuple[int, int]]]:
        samplers[workers].order = order
        return iter(loaders[workers])

    return batches


@pytest.mark.distributed
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_ranks_workers_and_restarts_deliver_every_sample_once_in_order(
    delivered_by: Callable, data: st.DataObject
) -> None:
    """A run that is stopped anywhere and goes on with other numbers of ranks, workers and samples
    per batch delivers what one rank of one process would."""
    draw = data.draw
    group = draw(st.integers(1, 3))
    num_samples = group * draw(st.integers(4, 8))
    common = {"num_samples": num_samples, "seed": draw(st.integers(0, 99)), "group": group}
    together: list[tuple[int, int]] = []
    while len(together) < 2 * num_samples:
        num_ranks, batch_size = draw(st.integers(1, 3)), draw(st.integers(1, 4))
        stop = draw(st.integers(1, 8))  # batches of each rank until the run ends or is stopped
        first_batch = draw(st.integers(0, 8))
        ranks = [
            SampleOrder(
                **common, batch_size=batch_size, rank=rank, num_ranks=num_ranks,
                num_batches=first_batch + 8, first_batch=first_batch, first_sample=len(together),
            )
            for rank in range(num_ranks)
        ]  # fmt: skip
        batches = [list(islice(delivered_by(r, draw(st.integers(0, 2))), stop)) for r in ranks]
        together += [key for step in zip(*batches, strict=True) for batch in step for key in batch]
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

"""Samples are delivered exactly once, in an order that no process state changes."""

from hypothesis import given, settings
from hypothesis import strategies as st

from atmossl.data.loader import SampleOrder, sample_rng


def order(**settings) -> list[list]:
    return list(SampleOrder(seed=3, **settings))


@settings(max_examples=80, deadline=None)
@given(
    num_samples=st.integers(1, 40),
    batch_size=st.integers(1, 7),
    num_ranks=st.integers(1, 4),
    num_batches=st.integers(1, 20),
    data=st.data(),
)
def test_ranks_share_out_every_epoch_exactly_once(
    num_samples: int, batch_size: int, num_ranks: int, num_batches: int, data: st.DataObject
) -> None:
    common = {"num_samples": num_samples, "batch_size": batch_size, "num_batches": num_batches}
    ranks = [order(**common, rank=rank, num_ranks=num_ranks) for rank in range(num_ranks)]
    delivered = [key for batches in zip(*ranks, strict=True) for b in batches for key in b]
    assert len(set(delivered)) == len(delivered) == num_batches * batch_size * num_ranks
    for epoch in range(delivered[-1].epoch):  # every epoch but the last, which is cut
        assert sorted(k.sample_id for k in delivered if k.epoch == epoch) == list(
            range(num_samples)
        )
    stop = data.draw(st.integers(0, num_batches))
    for rank, batches in enumerate(ranks):
        rest = order(**common, rank=rank, num_ranks=num_ranks, first_batch=stop)
        assert rest == batches[stop:]


def test_epochs_differ_and_seeds_matter() -> None:
    keys = [key for batch in order(num_samples=30, batch_size=1, num_batches=60) for key in batch]
    first, second = ([k.sample_id for k in keys[n : n + 30]] for n in (0, 30))
    assert first != second and sorted(first) == sorted(second)
    draws = {tuple(sample_rng(*key).random(2)) for key in [(0, 0, 1), (0, 1, 0), (1, 0, 0)]}
    assert len(draws) == 3

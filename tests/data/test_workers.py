"""Batches out of worker processes are those of one process, in one piece of shared memory; what a
worker cannot read is told in its own words, and its memory does not grow."""

import multiprocessing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import Dataset

from atmossl.batch import PRIMARY, Batch, Movable, collate
from atmossl.data import loader as loading
from atmossl.data.backends import open_store
from atmossl.data.catalog import SegmentEntry
from atmossl.data.chunks import Access
from atmossl.data.loader import (
    Arena,
    Collate,
    Packed,
    SampleKey,
    SampleOrder,
    WindowDataset,
    WindowLoader,
    worker_context,
)
from atmossl.data.segment import UnreadableChunk
from atmossl.data.statistics import compute_statistics
from atmossl.data.store import open_segment
from atmossl.data.windows import Normaliser, Pool, WindowSize
from atmossl.masking.random import RandomMasking
from tests.synthetic import dataset, spec

NAMES = ("temperature", "u_component_of_wind")
LEVELS = (300, 500, 850)


def windows(folder: Path, *, damage: bool = False, **changes: Any) -> WindowDataset:
    """Of a zarr store in chunks of 8 steps; damaged, the temperatures of steps 8 to 15 are lost."""
    path = folder / "waves.zarr"
    record = dataset(steps=40)
    if not path.exists():
        encoding = dict.fromkeys(NAMES, {"chunks": (8, 1, 8, 16)})
        record.to_zarr(path, encoding=encoding, consolidated=False)
    if damage:
        (path / "temperature" / "c" / "1" / "2" / "0" / "0").write_bytes(b"lost")
    arguments: dict[str, Any] = {"variables": NAMES, "levels": LEVELS, "access": Access(threads=2)}
    segment = open_segment(
        "waves", open_store(SegmentEntry(location=str(path))), str(path), **arguments
    )
    memory = open_segment("waves", record, "memory", variables=NAMES, levels=LEVELS)
    return WindowDataset(
        segments=[segment],
        specs=[spec(name, variables=(name,)) for name in NAMES],
        normaliser=Normaliser({PRIMARY: compute_statistics([memory])}),
        window=WindowSize(4, 8, 8),
        sampler=RandomMasking(),
        seed=0,
        **changes,
    )


def loader(
    samples: Dataset, context: Any, num_batches: int = 6, shuffle: bool = True
) -> WindowLoader:
    order = SampleOrder(
        num_samples=36, batch_size=3, num_batches=num_batches, seed=0, shuffle=shuffle
    )
    return WindowLoader(
        samples,
        batch_sampler=order,
        num_workers=1 if context else 0,
        prefetch_factor=2 if context else None,
        multiprocessing_context=context,
        collate_fn=Collate(3),
        describe=str,
    )


def tensors(batch: Movable) -> list[Tensor]:
    found: list[Tensor] = []
    batch._map(lambda tensor: found.append(tensor) or tensor)
    return found


@pytest.mark.distributed
@pytest.mark.parametrize("start", ["forkserver", "spawn"])
def test_workers_deliver_the_batches_of_one_process(tmp_path, start: str) -> None:
    samples = windows(tmp_path)
    context = worker_context() if start == "forkserver" else multiprocessing.get_context("spawn")
    alone, worked = list(loader(samples, None, 3)), list(loader(samples, context, 3))
    assert len(alone) == len(worked) == 3
    for one, other in zip(alone, worked, strict=True):
        pairs = list(zip(tensors(one), tensors(other), strict=True))
        assert all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)
        assert one.views[0].names() == other.views[0].names()
        assert len({b.untyped_storage().data_ptr() for _, b in pairs}) == 1


@dataclass(frozen=True)
class Mixed(Movable):
    flags: Tensor
    numbers: Tensor
    hours: Tensor
    nothing: Tensor
    scalar: Tensor
    parts: tuple[Tensor, ...]
    missing: Tensor | None = None
    name: str = "mixed"


def test_packing_keeps_every_type_shape_and_value() -> None:
    rng = np.random.default_rng(0)
    mixed = Mixed(
        flags=torch.from_numpy(rng.random((3, 5)) < 0.5),
        numbers=torch.from_numpy(rng.integers(-9, 9, 7)),
        hours=torch.from_numpy(rng.random((2, 3))).T,  # strided
        nothing=torch.empty(0, 4),
        scalar=torch.tensor(2.5),
        parts=(torch.ones(1, dtype=torch.float16), torch.zeros(3)),
    )
    packed = Packed.of(mixed)
    assert packed.memory.is_shared() and all(t.is_meta for t in tensors(packed.form))
    back = packed.unpack()
    assert back.missing is None and back.name == "mixed"
    for before, after in zip(tensors(mixed), tensors(back), strict=True):
        assert before.dtype == after.dtype and torch.equal(before, after)


def test_packing_copies_only_what_lies_elsewhere() -> None:
    rng = np.random.default_rng(1)
    samples = [Mixed(*(torch.from_numpy(rng.random(n)) for n in (3, 4, 5, 0, 1)), ()) for _ in "ab"]
    for spare, kept in ((400, True), (-64, False)):
        arena = Arena(2 * 64 * 5 + spare)
        batch = collate(samples, arena.empty)
        packed = Packed.of(batch, arena)
        same = packed.memory.data_ptr() == arena.segment.data_ptr()
        assert same or not kept
        for before, after in zip(tensors(batch), tensors(packed.unpack()), strict=True):
            assert torch.equal(before, after)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 5)), max_size=40))
def test_memory_is_used_again_but_never_while_somebody_views_it(steps: list) -> None:
    """Up to six holders, each of a view of a view, as an array or a tensor."""
    pool, held = Pool(), {}
    for number, (size, holder) in enumerate(steps):
        memory = pool.take(8 * size).view(np.int64)
        memory[:] = number
        view = memory.reshape(-1, size)[:, size // 2 :]
        held[holder] = (number, torch.from_numpy(view).flatten()[:5] if holder % 2 else view[:5])
        del memory, view
        assert all((values == of).all() for of, values in held.values())
    held.clear()
    address = pool.take(1000).ctypes.data
    assert pool.take(800).ctypes.data == address


@pytest.mark.distributed
def test_a_batch_that_is_kept_stays_as_it_is(tmp_path) -> None:
    samples = windows(tmp_path)
    alone, kept = list(loader(samples, None, 12)), []
    for number, batch in enumerate(loader(samples, worker_context(), 12)):
        if number % 3 == 0:
            kept.append(batch)
    for one, other in zip(alone[::3], kept, strict=True):
        assert all(map(torch.equal, tensors(one), tensors(other)))


@pytest.mark.distributed
def test_a_worker_tells_of_an_unreadable_chunk_in_one_line(tmp_path) -> None:
    samples = windows(tmp_path, damage=True)
    with pytest.raises(UnreadableChunk) as caught:
        list(loader(samples, worker_context()))
    message = str(caught.value)
    assert message.startswith(f"{tmp_path / 'waves.zarr'}: cannot read temperature between 2001-")
    assert "level 2, latitude 0" in message and "\n" not in message


@pytest.mark.distributed
def test_workers_skip_and_count_what_is_unreadable(tmp_path) -> None:
    samples = windows(tmp_path, damage=True, skip_unreadable=True)
    batches = list(loader(samples, worker_context(), 2, shuffle=False))
    assert [batch.sample_id.tolist() for batch in batches] == [[0, 1, 2], [3, 4]]
    assert [batch.num_skipped for batch in batches] == [0, 1]


class WithMemory(Dataset):
    """Batches, and the MiB of memory that the process that made them holds. Pages of files are not
    among them: they come whenever a part of a library is first touched."""

    def __init__(self, samples: WindowDataset) -> None:
        self.samples = samples

    def __getitems__(self, keys: list[SampleKey]) -> tuple[list, float]:
        made = self.samples.__getitems__(keys)
        lines = Path("/proc/self/status").read_text().splitlines()
        kib = [int(line.split()[1]) for line in lines if line.startswith(("RssAnon", "RssShmem"))]
        return made, sum(kib) / 1024


@dataclass(frozen=True)
class CollateWithMemory:
    collate: Collate

    def __call__(self, samples: tuple[list, float]) -> tuple[Packed[Batch], float, int]:
        packed = self.collate(samples[0])
        assert isinstance(packed, Packed)
        return packed, samples[1], len(loading._segments._owned)


@pytest.mark.distributed
def test_a_worker_does_not_grow_over_epochs(tmp_path) -> None:
    """Batches of some 60 kB, if kept, would make 6 MiB in a hundred. The least of 50 batches is
    what stays: what an allocator takes and gives back lies above it."""
    order = SampleOrder(num_samples=36, batch_size=3, num_batches=200, seed=0)
    batches = WindowLoader(
        WithMemory(windows(tmp_path)),
        batch_sampler=order,
        num_workers=1,
        multiprocessing_context=worker_context(),
        collate_fn=CollateWithMemory(Collate(3)),
        describe=str,
    )
    memory, segments = zip(*(made[1:] for made in batches), strict=True)
    assert min(memory[150:]) < min(memory[50:100]) + 2
    assert max(segments) <= 2 + 3  # those prefetched, on their way, here, and being made

"""Several ranks over gloo learn what one rank learns from the same global batch, and what any of
them saves, any number of them loads."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from atmossl.checkpoint_files import read_contents
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.training.curves import read_metrics
from tests.processes import CONTEXT, HANGS_AFTER_SECONDS, run, run_ranks, training

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
GLOBAL_BATCH = 4
RANKS = {
    "ddp": ("trainer.strategy=ddp", 2),
    "ddp-4": ("trainer.strategy=ddp", 4),
    "fsdp": ("trainer.strategy=fsdp", 2),
}


def arguments(output: Path, ranks: int, *more: str) -> list[str]:
    """Tokens are hidden at random between 30 and 90 %, so that no two ranks hide as many."""
    changed = ("trainer.max_steps=5", "masking=bert", f"data.batch_size={GLOBAL_BATCH // ranks}")
    return training(output, *changed, *more)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def alone(cache: Path) -> Path:
    """One rank with the whole batch."""
    assert run(arguments(cache / "alone", 1), cache=cache) == 0
    return cache / "alone"


def column(run_folder: Path, name: str) -> np.ndarray:
    table: pd.DataFrame = read_metrics(run_folder / "metrics.csv")
    return table[name].dropna().to_numpy()


@pytest.mark.parametrize("kind", RANKS)
def test_ranks_learn_what_one_rank_learns(kind: str, alone: Path, cache: Path) -> None:
    strategy, ranks = RANKS[kind]
    together = cache / kind
    assert run_ranks(arguments(together, ranks, strategy), ranks, cache=cache) == [0] * ranks
    # of float32: sums in another order; a mean of the ranks' means is off by some percent
    np.testing.assert_allclose(
        column(together, "gradient_norm"), column(alone, "gradient_norm"), rtol=2e-4
    )
    np.testing.assert_allclose(
        column(together, "train/loss"), column(alone, "train/loss"), rtol=2e-5
    )
    one, two = (read_contents(f / "checkpoints" / "last.ckpt") for f in (alone, together))
    for name, expected in one["state_dict"].items():
        torch.testing.assert_close(two["state_dict"][name], expected, rtol=1e-3, atol=2e-5)


def test_what_two_sharded_ranks_saved_goes_on_on_one_and_back(cache: Path) -> None:
    """2 sharded ranks -> 1 rank -> 2 sharded ranks ends as one rank that never changed."""
    common = ("resume=auto", "optimizer.schedule=constant", "optimizer.warmup_steps=1")
    shards = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded", *common)
    whole, moved = cache / "whole", cache / "moved"
    assert run(arguments(whole, 1, *common, "trainer.max_steps=6"), cache=cache) == 0

    parts = arguments(moved, 2, *shards, "trainer.max_steps=2")
    assert run_ranks(parts, 2, cache=cache) == [0, 0]
    assert (moved / "checkpoints" / "step-2.ckpt").is_dir()
    assert load_checkpoint(str(moved / "checkpoints" / "last.ckpt")).record["step"] == 2
    assert run(arguments(moved, 1, *common, "trainer.max_steps=4"), cache=cache) == 0
    assert (moved / "checkpoints" / "step-4.ckpt").is_file()
    parts = arguments(moved, 2, *shards, "trainer.max_steps=6")
    assert run_ranks(parts, 2, cache=cache) == [0, 0]

    one, two = (read_contents(f / "checkpoints" / "last.ckpt") for f in (whole, moved))
    for name, expected in one["state_dict"].items():
        # Adam divides by small gradients' size; one lost state would cost a whole step, 2e-3
        torch.testing.assert_close(two["state_dict"][name], expected, rtol=1e-3, atol=5e-4)
    np.testing.assert_allclose(column(moved, "train/loss"), column(whole, "train/loss"), rtol=1e-4)


def muon_steps(folder: Path, rank: int, ranks: int) -> None:
    """Four steps of Muon on a matrix and a vector, in double precision, where it iterates exactly;
    every rank sees the same gradients."""
    from torch.distributed.fsdp import fully_shard

    from atmossl.training.distributed import clip_gradients, whole
    from atmossl.training.muon import Muon

    torch.manual_seed(0)
    layer = torch.nn.Linear(6, 9, dtype=torch.float64)
    if ranks > 1:
        store = f"file://{folder}/store"
        torch.distributed.init_process_group("gloo", store, rank=rank, world_size=ranks)
        fully_shard(layer)
    weight, bias = layer.weight, layer.bias
    groups = [{"params": [weight], "muon": True}, {"params": [bias]}]
    optimizer = Muon(groups, lr=0.1, betas=(0.9, 0.95), weight_decay=0.1)
    for number in range(4):
        torch.manual_seed(number)
        layer(torch.randn(5, 6, dtype=torch.float64)).square().sum().backward()
        clip_gradients(layer.parameters(), 0.5)
        optimizer.step()
        optimizer.zero_grad()
    found = {"weight": whole(weight).detach(), "bias": whole(bias).detach()}
    if rank == 0:
        torch.save(found, folder / f"{ranks}.pt")


def test_muon_and_clipping_take_the_same_steps_on_shards(tmp_path: Path) -> None:
    starters = [(0, 1), (0, 2), (1, 2)]
    processes = [CONTEXT.Process(target=muon_steps, args=(tmp_path, *one)) for one in starters]
    for process in processes:
        process.start()
    for process in processes:
        process.join(HANGS_AFTER_SECONDS)
    assert [process.exitcode for process in processes] == [0, 0, 0]
    one, two = (torch.load(tmp_path / f"{ranks}.pt", weights_only=True) for ranks in (1, 2))
    for name in ("weight", "bias"):
        torch.testing.assert_close(two[name], one[name], rtol=1e-10, atol=1e-12)

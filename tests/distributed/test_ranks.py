"""Several ranks over gloo learn what one rank learns from the same global batch, and what any of
them saves, any number of them loads."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

from atmossl.checkpoint_files import read_contents
from atmossl.inference.checkpoint import load_checkpoint
from atmossl.training.curves import read_metrics
from atmossl.training.keeping import checkpoints_in
from tests.processes import CONTEXT, HANGS_AFTER_SECONDS, full_disk, run, run_ranks, training

pytestmark = [pytest.mark.e2e, pytest.mark.distributed]
GLOBAL_BATCH = 4
RANKS = {  # changes, ranks, batches of a step one after the other
    "one": ((), 1, 2),
    "ddp": (("trainer.strategy=ddp",), 2, 2),
    "fsdp": (("trainer.strategy=fsdp", "trainer.cpu_offload=true"), 2, 2),
    "fsdp-4": (("trainer.strategy=fsdp",), 4, 1),
}
TRACE = ("trainer.profiler=torch", "trainer.profile_steps=[2,2]")  # one step of two batches


def arguments(output: Path, parts: int, *more: str) -> list[str]:
    """Tokens are hidden at random between 30 and 90 %, so that no two batches hide as many."""
    changed = ("trainer.max_steps=4", "masking=bert", f"data.batch_size={GLOBAL_BATCH // parts}")
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
    changes, ranks, accumulate = RANKS[kind]
    together = cache / kind
    more = (*changes, f"trainer.accumulate={accumulate}", *(TRACE if accumulate > 1 else ()))
    started = arguments(together, ranks * accumulate, *more)
    if ranks == 1:
        assert run(started, cache=cache) == 0
    else:
        assert run_ranks(started, ranks, cache=cache) == [0] * ranks
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
    if accumulate > 1 and ranks > 1:
        assert exchanges(together, one["state_dict"]) == 1


@pytest.mark.parametrize(("strategy", "accumulate"), [("ddp", 1), ("fsdp", 2)])
def test_ranks_learn_an_objective_with_a_teacher_as_one_rank_does(
    strategy: str, accumulate: int, cache: Path
) -> None:
    """Latents are predicted without the network's forward pass, and the tail gets no gradient."""
    alone, together = cache / "jepa", cache / f"jepa-{strategy}"
    more = ("objective=jepa", "trainer.validation_interval=2")
    if not alone.exists():
        assert run(arguments(alone, 1, *more), cache=cache) == 0
    how = (f"trainer.strategy={strategy}", f"trainer.accumulate={accumulate}")
    assert run_ranks(arguments(together, 2 * accumulate, *more, *how), 2, cache=cache) == [0, 0]
    assert len(column(together, "latent_ratio/mean")) == 2
    for name in ("train/loss", "gradient_norm"):
        np.testing.assert_allclose(column(together, name), column(alone, name), rtol=5e-4)
    one, two = (read_contents(f / "checkpoints" / "last.ckpt") for f in (alone, together))
    for name, expected in one["state_dict"].items():
        # Adam divides by the size of gradients: single weights may differ by more
        off = (two["state_dict"][name] - expected).double().square().mean().sqrt()
        assert float(off) < 2e-5, name


COMPARING = {
    "contrastive": ("objective=contrastive",),
    "dino": ("objective=dino", "objective.num_prototypes=16", "objective.koleo_weight=0.1",
             "objective.patch_weight=0.5", "objective.num_local=1"),
    "lejepa": ("objective=jepa", "objective.anti_collapse=sigreg"),
}  # fmt: skip


@pytest.mark.parametrize("name", COMPARING)
def test_sharded_ranks_compare_the_samples_of_all_as_one_rank_does(name: str, cache: Path) -> None:
    """Losses over the samples of all ranks, and objectives with heads, teacher and centre."""
    alone, together = cache / name, cache / f"{name}-fsdp"
    more = (*COMPARING[name], "trainer.validation_interval=2")
    assert run(arguments(alone, 1, *more), cache=cache) == 0
    parts = arguments(together, 2, *more, "trainer.strategy=fsdp")
    assert run_ranks(parts, 2, cache=cache) == [0, 0]
    for key in ("train/loss", "gradient_norm", "collapse/rank_tokens"):
        np.testing.assert_allclose(column(together, key), column(alone, key), rtol=5e-4)
    one, two = (read_contents(f / "checkpoints" / "last.ckpt") for f in (alone, together))
    for key, expected in one["state_dict"].items():
        # a wrong gradient moves most of a tensor by some 1e-3; single weights may differ, see below
        off = (two["state_dict"][key] - expected).double().square().mean().sqrt()
        assert float(off) < 1e-4, key


def exchanges(run_folder: Path, weights: dict[str, torch.Tensor]) -> float:
    """How often every gradient went through a collective in the traced step."""
    trace = json.loads((run_folder / "profile" / "trace-rank0.json").read_text())
    names = Counter(event.get("name", "") for event in trace["traceEvents"])
    if "DistributedDataParallel.forward" in names:
        trained = [n for n in weights if n.startswith("model.") and not n.endswith("scale")]
        return names["torch::distributed::reducer::mul_out"] / len(trained)  # into a bucket
    counts = {n for name, n in names.items() if name.startswith("FSDP::post_backward_reduce")}
    (count,) = counts
    return count


def test_what_two_sharded_ranks_saved_goes_on_on_one_and_back(cache: Path) -> None:
    """2 sharded ranks -> 1 rank -> 2 sharded ranks ends as one rank that never changed."""
    common = ("resume=auto", "optimizer.schedule=constant", "optimizer.warmup_steps=1",
              "masking=mixture")  # fmt: skip
    shards = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded",
              "trainer.async_checkpoint=true", *common)  # fmt: skip
    whole, moved = cache / "whole", cache / "moved"
    assert run(arguments(whole, 1, *common, "trainer.max_steps=6"), cache=cache) == 0

    parts = arguments(moved, 2, *shards, "trainer.max_steps=2")
    assert run_ranks(parts, 2, cache=cache) == [0, 0]
    assert (moved / "checkpoints" / "step-2.ckpt").is_dir()
    assert load_checkpoint(str(moved / "checkpoints" / "last.ckpt")).checkpoint_record["step"] == 2
    assert run(arguments(moved, 1, *common, "trainer.max_steps=4"), cache=cache) == 0
    assert (moved / "checkpoints" / "step-4.ckpt").is_file()
    parts = arguments(moved, 2, *shards, "trainer.max_steps=6")
    assert run_ranks(parts, 2, cache=cache) == [0, 0]

    one, two = (read_contents(f / "checkpoints" / "last.ckpt") for f in (whole, moved))
    for name, expected in one["state_dict"].items():
        # Adam divides by the size of gradients, so that single weights may differ by a good part
        # of a step; a lost state would move most of a tensor by some 1e-3
        off = (two["state_dict"][name] - expected).double().square().mean().sqrt()
        assert float(off) < 1e-4, name
    kinds = [name for name in read_metrics(whole / "metrics.csv") if "mask_loss/" in name]
    assert len(kinds) > 2
    for name in ("train/loss", *kinds):
        np.testing.assert_allclose(column(moved, name), column(whole, name), rtol=1e-4)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_full_disk_on_one_rank_ends_all_of_them_with_its_words(
    kind: str, cache: Path, tmp_path: Path
) -> None:
    """Rank 0 alone cannot write the first checkpoint; the other one must not wait for it."""
    sharded = ("trainer.checkpoint_format=sharded",) if kind == "fsdp" else ()
    folder = cache / f"full-{kind}"
    started = arguments(
        folder, 2, f"trainer.strategy={kind}", *sharded, "trainer.checkpoint_interval=1",
        "trainer.max_steps=3",
    )  # fmt: skip
    store = {"ATMOSSL_CACHE": str(cache)}
    codes = run_ranks(started, 2, cache=tmp_path, before=(full_disk, (50_000,)), **store)
    assert codes == [1, 1]
    one, two = ((tmp_path / f"errors-{rank}").read_text().splitlines()[-1] for rank in (0, 1))
    assert one == two and one.startswith("atmossl train: ") and "rank 0" in one
    assert ("File too large" if kind == "ddp" else "disk full") in one
    assert checkpoints_in(folder / "checkpoints") == []


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

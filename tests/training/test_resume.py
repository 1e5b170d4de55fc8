"""A run that is killed and resumed again and again ends as the unbroken one, bit for bit."""

import json
import random
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from atmossl.checkpoint_files import read_contents
from atmossl.training.curves import read_metrics
from atmossl.training.keeping import checkpoints_in
from atmossl.training.resume import regroup_batches, samples_seen
from tests.processes import (
    Ended,
    all_end,
    command,
    kill_after_save,
    kill_at_batch,
    kill_at_commit,
    run,
    signal_at_batch,
    training,
)

pytestmark = pytest.mark.e2e
STEPS, ACCUMULATE, INTERVAL = 9, 2, 2


def arguments(output: Path, *more: str) -> list[str]:
    changed = (
        f"trainer.max_steps={STEPS}", f"trainer.accumulate={ACCUMULATE}",
        f"trainer.checkpoint_interval={INTERVAL}", f"trainer.validation_interval={2 * INTERVAL}",
        "optimizer.ema_decay=0.9", "optimizer.schedule=cosine",
    )  # fmt: skip
    return training(output, *changed, *more)


def differing(one: Any, two: Any) -> list[str]:
    """Paths of all leaves that are not equal, bit for bit."""
    first, second = (dict(pytree.tree_flatten_with_path(tree)[0]) for tree in (one, two))
    assert first.keys() == second.keys()

    def equal(a: Any, b: Any) -> bool:
        return torch.equal(a, b) if isinstance(a, Tensor) else a == b

    return [pytree.keystr(key) for key in first if not equal(first[key], second[key])]


def tear(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def test_a_run_killed_at_random_steps_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    """Three times SIGKILL mid-epoch and mid-accumulation, one of them with a torn newest
    checkpoint and one in a run whose loader has a worker."""
    assert run(arguments(tmp_path / "whole"), cache=tmp_path) == 0
    broken = tmp_path / "broken"
    rng = random.Random(0)  # within [one checkpoint further, before the end]
    for number, more in enumerate(([], ["resume=auto"], ["resume=auto", "data.num_workers=1"])):
        at = rng.randint(INTERVAL * ACCUMULATE + 1, (INTERVAL + 1) * ACCUMULATE)
        before = (kill_at_batch, (at, tmp_path / "children"))
        code = run(arguments(broken, *more), cache=tmp_path, before=before)
        assert code == -signal.SIGKILL
        workers = json.loads((tmp_path / "children").read_text())
        assert len(workers) == (number == 2)
        assert all_end(workers)  # though the server that forked them, which is ours, lives on
        newest = checkpoints_in(broken / "checkpoints")[0]
        assert newest.name == f"step-{(number + 1) * INTERVAL}.ckpt"
        if number == 1:
            tear(newest)  # the run goes back to the one before, which was kept
            (broken / "checkpoints" / ".partial-step-5.ckpt").write_bytes(b"half")
            assert run(arguments(broken, "resume=auto"), cache=tmp_path, before=before) < 0
    assert run(arguments(broken, "resume=auto"), cache=tmp_path) == 0

    assert_same_end(tmp_path / "whole", broken)


def test_a_run_killed_while_shards_are_written_ends_as_the_unbroken_one(tmp_path: Path) -> None:
    """SIGKILL between the last byte of the checkpoint of step 4, written beside training, and its
    name; the first two are those of step 2 and of the validation."""
    beside = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded",
              "trainer.async_checkpoint=true", f"trainer.max_steps={2 * INTERVAL + 1}")  # fmt: skip
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    assert run(arguments(whole, *beside), cache=tmp_path) == 0
    before = (kill_at_commit, (3,))
    assert run(arguments(broken, *beside), cache=tmp_path, before=before) == -signal.SIGKILL
    folder = broken / "checkpoints"
    assert [p.name for p in checkpoints_in(folder)] == [f"step-{INTERVAL}.ckpt", "best.ckpt"]
    assert (folder / f".partial-step-{2 * INTERVAL}.ckpt").exists()
    assert run(arguments(broken, *beside, "resume=auto"), cache=tmp_path) == 0
    assert_same_end(whole, broken)


@pytest.mark.parametrize(
    ("before", "code"),
    [((kill_after_save, (1,)), -signal.SIGKILL),
     ((signal_at_batch, (7, signal.SIGTERM)), 128 + signal.SIGTERM)],
    ids=["killed", "stopped"],
)  # fmt: skip
def test_a_run_that_ends_between_a_save_and_its_log_has_the_whole_log(
    before: Any, code: int, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    steps = ("trainer.max_steps=7", "trainer.validation_interval=6")  # after it goes on
    assert run(arguments(whole, *steps), cache=tmp_path) == 0
    assert run(arguments(broken, *steps), cache=tmp_path, before=before) == code
    saved = read_contents(checkpoints_in(broken / "checkpoints")[0])["global_step"]
    assert read_metrics(broken / "metrics.csv")["step"].max() == saved - 2  # steps count from 0
    assert run(arguments(broken, *steps, "resume=auto"), cache=tmp_path) == 0
    assert_same_end(whole, broken)


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_is_torn_or_left_moves_aside_and_nothing_good_goes(tmp_path: Path) -> None:
    """A torn newest checkpoint, a start from an older one, then all torn."""

    def go_on(*more: str) -> Ended:
        common = ("trainer.checkpoint_interval=2", "trainer.keep_checkpoints=2")
        return command(*training(tmp_path / "run", *common, *more), cache=tmp_path)

    folder = tmp_path / "run" / "checkpoints"
    assert go_on("trainer.max_steps=4").returncode == 0
    tear(folder / "step-4.ckpt")
    done = go_on("trainer.max_steps=6", "resume=auto")
    assert done.returncode == 0
    told = [line for line in done.stderr.splitlines() if "step-4.ckpt is" in line]
    assert len(told) == 1 and "resume=auto goes on from" in told[0] and "step-2.ckpt" in told[0]
    kept = ["abandoned-step-4-1", "last.ckpt", "step-4.ckpt", "step-6.ckpt"]
    assert names_in(folder) == kept
    assert go_on("trainer.max_steps=6", f"resume={folder / 'step-4.ckpt'}").returncode == 0
    assert names_in(folder) == [*kept[:1], "abandoned-step-6-1", *kept[1:]]
    paths = [folder / "abandoned-step-6-1" / "step-6.ckpt", folder / "last.ckpt"]
    left, last = (read_contents(path) for path in paths)
    assert differing(left["state_dict"], last["state_dict"]) == []  # the same steps once more
    for path in folder.glob("step-*.ckpt"):
        tear(path)
    refused = go_on("trainer.max_steps=8", "resume=auto")
    (line,) = refused.stderr.splitlines()
    assert refused.returncode == 2 and "step-6.ckpt is" in line and "resume=PATH" in line
    assert names_in(folder) == [*kept[:1], "abandoned-step-6-1", *kept[1:]]


def test_a_folder_that_lacks_a_shard_is_passed_over(tmp_path: Path) -> None:
    def go_on(*more: str) -> Ended:
        common = ("trainer.strategy=fsdp", "trainer.checkpoint_format=sharded",
                  "trainer.checkpoint_interval=2", "trainer.keep_checkpoints=2")  # fmt: skip
        return command(*training(tmp_path / "run", *common, *more), cache=tmp_path)

    folder = tmp_path / "run" / "checkpoints"
    assert go_on("trainer.max_steps=4").returncode == 0
    (shard,) = (folder / "step-4.ckpt").glob("*.distcp")
    shard.unlink()
    done = go_on("trainer.max_steps=6", "resume=auto")
    assert done.returncode == 0 and f"{shard.name} is missing" in done.stderr
    assert names_in(folder) == ["abandoned-step-4-1", "last.ckpt", "step-4.ckpt", "step-6.ckpt"]
    assert read_contents(folder / "last.ckpt")["atmossl"]["step"] == 6


def test_steps_of_as_many_samples_are_the_same_however_they_are_grouped(tmp_path: Path) -> None:
    """2 x 2 samples for 3 steps, 4 x 1 for 2, which does not divide the batches so far, then 1 x 4;
    against 2 x 2 throughout. Sums come in another order."""
    common = ("optimizer.schedule=constant", "masking=bert", "resume=auto",
              "trainer.validation_interval=2", "trainer.checkpoint_interval=4")  # fmt: skip
    whole, grouped = tmp_path / "whole", tmp_path / "grouped"
    assert run(arguments(whole, *common, "trainer.max_steps=8"), cache=tmp_path) == 0
    for steps, accumulate, batch_size in ((3, 2, 2), (5, 4, 1), (8, 1, 4)):
        changed = (f"trainer.max_steps={steps}", f"trainer.accumulate={accumulate}",
                   f"data.batch_size={batch_size}")  # fmt: skip
        assert run(arguments(grouped, *common, *changed), cache=tmp_path) == 0
    one, two = (read_metrics(folder / "metrics.csv") for folder in (whole, grouped))
    for column in ("train/loss", "gradient_norm", "learning_rate", "rmse_ratio/mean"):
        first, second = (log[["step", column]].dropna().to_numpy() for log in (one, two))
        assert first[:, 0].tolist() == second[:, 0].tolist(), column
        if column != "rmse_ratio/mean":  # validations take as many batches, hence other samples
            np.testing.assert_allclose(second[:, 1], first[:, 1], rtol=5e-4, err_msg=column)
    records = [read_contents(f / "checkpoints" / "last.ckpt")["atmossl"] for f in (whole, grouped)]
    assert [record["samples"] for record in records] == [32, 32]


@pytest.mark.parametrize("accumulate", [1, 2, 3, 8])
def test_batches_are_counted_as_if_grouped_so_from_the_start(accumulate: int) -> None:
    """A checkpoint of step 3, saved at the end of its sixth batch, before that is complete."""
    counts = {"ready": 6, "started": 6, "processed": 6, "completed": 5}
    progress = {"total": dict(counts), "current": dict(counts), "is_last_batch": False}
    loops = {"fit_loop": {"epoch_loop.batch_progress": progress}}
    regroup_batches({"global_step": 3, "loops": loops}, accumulate)
    batches = 3 * accumulate
    expected = {"ready": batches, "started": batches, "processed": batches}
    assert progress["total"] == progress["current"] == {**expected, "completed": batches - 1}


def test_older_records_count_their_samples_by_their_configuration() -> None:
    config = {"data": {"batch_size": 2}, "trainer": {"accumulate": 3}}
    record = {"step": 5, "config": config, "rng": [{}, {}]}  # of two ranks
    assert samples_seen(record) == 60
    assert samples_seen({**record, "samples": 7}) == 7


def assert_same_end(*runs: Path) -> None:
    one, two = (read_contents(folder / "checkpoints" / "last.ckpt") for folder in runs)
    for key in ("state_dict", "optimizer_states", "lr_schedulers", "loops", "global_step"):
        assert differing(one[key], two[key]) == [], key
    assert differing(one["atmossl"]["rng"], two["atmossl"]["rng"]) == []
    logs = [read_metrics(folder / "metrics.csv") for folder in runs]
    for column in ("train/loss", "gradient_norm", "learning_rate", "rmse_ratio/mean"):
        first, second = (log[["step", column]].dropna().to_numpy().tolist() for log in logs)
        assert first == second, column

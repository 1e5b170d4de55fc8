"""Checkpoints are old or new, never torn, and the last good one is never removed."""

import errno
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from atmossl.atomic_files import write_atomically
from atmossl.checkpoint_files import read_contents
from atmossl.objectives.base import Monitor
from atmossl.shards import by_index, by_name
from atmossl.training.checkpoint import AtomicCheckpointIO, KeepCheckpoints
from atmossl.training.keeping import checkpoints_in


def contents(step: int) -> dict:
    return {"atmossl": {"step": step}, "state_dict": {"w": torch.full((1000,), float(step))}}


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "step-1.ckpt"
    write_atomically(path, lambda partial: torch.save(contents(1), partial))

    def torn(partial: Path) -> None:
        partial.write_bytes(path.read_bytes()[:100])
        raise OSError(errno.ENOSPC, "disk full")

    with pytest.raises(OSError, match="disk full") as raised:
        write_atomically(path, torn)
    assert raised.value.filename == str(path)
    assert read_contents(path)["atmossl"]["step"] == 1
    assert list(tmp_path.iterdir()) == [path]  # the torn one does not keep a full disk full


def test_what_is_written_beside_training_is_the_state_at_the_call(tmp_path: Path) -> None:
    io = AtomicCheckpointIO(asynchronous=True)
    state = contents(1)
    io.save_checkpoint(state, tmp_path / "step-1.ckpt")
    state["state_dict"]["w"].zero_()  # the next step of the training
    io.save_checkpoint(contents(2), tmp_path / "step-2.ckpt")
    io.teardown()
    one, two = (read_contents(tmp_path / f"step-{n}.ckpt") for n in (1, 2))
    assert (one["state_dict"]["w"] == 1).all() and (two["state_dict"]["w"] == 2).all()


def test_an_error_beside_training_is_raised_at_the_next_call(tmp_path: Path) -> None:
    io = AtomicCheckpointIO(asynchronous=True)
    (tmp_path / "file").write_text("no folder")
    io.save_checkpoint(contents(1), tmp_path / "file" / "step-1.ckpt")
    with pytest.raises(OSError, match="file"):
        io.wait()


def test_the_newest_good_ones_stay_while_the_loss_is_not_finite(tmp_path: Path) -> None:
    healthy = True
    monitor = Monitor("m")
    keep = KeepCheckpoints(tmp_path, interval=1, keep=2, monitor=monitor, healthy=lambda: healthy)

    def save(path: Path, *, weights_only: bool) -> None:
        assert not weights_only
        write_atomically(path, lambda partial: torch.save(contents(trainer.global_step), partial))

    progress = SimpleNamespace(current=SimpleNamespace(processed=1, completed=1))
    trainer = SimpleNamespace(
        fit_loop=SimpleNamespace(epoch_loop=SimpleNamespace(batch_progress=progress)),
        _logger_connector=None,
        global_step=0,
        is_global_zero=True,
        save_checkpoint=save,
        strategy=SimpleNamespace(checkpoint_io=None),
    )
    for step in range(1, 7):
        trainer.global_step, healthy = step, step < 5
        keep.save(trainer)
        keep.save(trainer)  # once per step
    assert [path.name for path in checkpoints_in(tmp_path)] == ["step-4.ckpt", "step-3.ckpt"]
    assert read_contents(tmp_path / "last.ckpt")["atmossl"]["step"] == 4


def test_optimiser_states_by_name_and_by_position_are_inverse() -> None:
    names = ["b", "a", "c"]
    state = {
        "state": {0: {"step": 1}, 2: {"step": 3}},
        "param_groups": [{"params": [0, 2]}, {"params": [1]}],
    }
    named = by_name(state, names)
    assert named["state"] == {"b": {"step": 1}, "c": {"step": 3}}
    order = [name for group in named["param_groups"] for name in group["params"]]
    back = by_index(named)
    assert {order[k]: v for k, v in back["state"].items()} == named["state"]

"""Averaged weights, the resumed state and the early stop."""

import json
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from atmossl.batch import TokenGrid
from atmossl.training.callbacks import StopOnNonFinite
from atmossl.training.distributed import clip_gradients
from atmossl.training.module import TrainingModule
from atmossl.training.optimizer import OptimizerSettings

SETTINGS = OptimizerSettings(
    algorithm="adamw",
    learning_rate=1e-3,
    weight_decay=0.0,
    betas=(0.9, 0.95),
    schedule="constant",
    warmup_steps=1,
    final_fraction=1.0,
    decay_every=1,
    ema_decay=0.9,
    max_steps=10,
)


def module(steps: list[int]) -> TrainingModule:
    class Counted(TrainingModule):
        @property
        def global_step(self) -> int:  # pyright: ignore
            return steps[0]

    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    return Counted(
        model=model, objective=lambda *_: None, optimizer=SETTINGS, record={}, task_names=()
    )  # pyright: ignore


def test_the_average_forgets_its_start() -> None:
    """Weights 1, 2, 3 after the steps."""
    tested = module([0])
    expected = 0.0
    for step in (1, 2, 3):
        nn.init.constant_(tested.model.weight, float(step))
        decay = min(0.9, step / (9 + step))  # the first update copies
        expected = step if step == 1 else decay * expected + (1 - decay) * step
        tested.update_ema(step)
    assert float(tested.ema.module.weight) == pytest.approx(expected)
    assert int(tested.ema.n_averaged) == 3


def test_a_checkpoint_brings_back_the_random_state() -> None:
    tested = module([4])
    contents: dict = {"state_dict": {}}
    tested.on_save_checkpoint(contents)
    expected = torch.rand(3)
    tested.on_load_checkpoint(contents)
    torch.rand(1)  # what loaders draw when they start
    tested.on_train_batch_start(None, 0)
    assert torch.equal(torch.rand(3), expected)
    assert contents["atmossl"]["step"] == 4


def test_losses_that_are_not_finite_stop_the_run_by_name(tmp_path) -> None:
    callback = StopOnNonFinite(limit=2, folder=tmp_path)
    trainer = SimpleNamespace(
        global_step=7,
        global_rank=0,
        precision="32-true",
        datamodule=SimpleNamespace(identity=lambda ids: f"samples {ids}"),
    )
    grid = TokenGrid(*(torch.tensor([[0.0, 6.0]]),) * 4, *(torch.tensor([6.0]),) * 3)
    view = SimpleNamespace(streams=[SimpleNamespace(grid=grid)])
    batch = SimpleNamespace(sample_id=torch.tensor([5]), views=[view])

    def step(loss: float, norm: float = 1.0) -> None:
        pl_module = SimpleNamespace(gradient_norm=torch.tensor(norm))
        callback.on_train_batch_end(trainer, pl_module, {"loss": torch.tensor(loss)}, batch, 0)

    for loss in (float("nan"), 1.0, float("inf")):  # a finite one in between starts anew
        step(loss)
    assert not callback.healthy()
    with pytest.raises(FloatingPointError, match=r"step 7 on samples \[5\]"):
        step(1.0, norm=float("nan"))
    record = json.loads((tmp_path / "nonfinite-rank0.json").read_text())
    assert [entry["step"] for entry in record] == [7, 7]
    window = {"time": ["1970-01-01T00:00:00", "1970-01-01T06:00:00"], "lat": [0, 6], "lon": [0, 6]}
    assert record[0]["windows"] == [window]


def test_a_gradient_that_is_not_finite_counts_as_zero() -> None:
    one, two = (nn.Parameter(torch.zeros(2)) for _ in range(2))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(clip_gradients([one, two], 1.0)) == 5.0
    torch.testing.assert_close(torch.cat([one.grad, two.grad]), torch.tensor([0.6, 0, 0, 0.8]))
    one.grad = torch.tensor([float("nan"), 1.0])
    assert not clip_gradients([one, two], 1.0).isfinite()
    assert not one.grad.any() and not two.grad.any()

"""Averaged weights, the resumed state and the early stop."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from atmossl.training.callbacks import StopOnNonFinite
from atmossl.training.module import OptimizerSettings, TrainingModule

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


def test_the_average_is_taken_once_per_optimiser_step() -> None:
    """Weights 1, 2, 3 after the steps; accumulation calls the hook more often than it steps."""
    steps = [0]
    tested = module(steps)
    expected = 0.0
    for step in (1, 2, 3):
        steps[0] = step
        nn.init.constant_(tested.model.weight, float(step))
        decay = min(0.9, step / (9 + step))  # AveragedModel copies at the first update
        expected = step if step == 1 else decay * expected + (1 - decay) * step
        for _ in range(3):
            tested.update_ema()
    assert float(tested.ema.module.weight) == pytest.approx(expected)


def test_a_checkpoint_brings_back_the_random_state() -> None:
    steps = [4]
    tested = module(steps)
    contents: dict = {"state_dict": {}}
    tested.on_save_checkpoint(contents)
    expected = torch.rand(3)
    tested.on_load_checkpoint(contents)
    assert torch.equal(torch.rand(3), expected)
    assert contents["atmossl"]["step"] == 4


def test_losses_that_are_not_finite_stop_the_run_by_name() -> None:
    callback = StopOnNonFinite(limit=2)
    trainer = SimpleNamespace(
        global_step=7, datamodule=SimpleNamespace(identity=lambda ids: f"samples {ids}")
    )
    batch = SimpleNamespace(sample_id=torch.tensor([5]))

    def step(loss: float) -> None:
        callback.on_train_batch_end(trainer, None, {"loss": torch.tensor(loss)}, batch, 0)

    for loss in (float("nan"), 1.0, float("inf")):  # a finite one in between starts anew
        step(loss)
    with pytest.raises(FloatingPointError, match=r"step 7 on samples \[5\]"):
        step(float("nan"))

"""What a run and other long work tell on a terminal and in a log file."""

import io
import re
from types import SimpleNamespace
from typing import Any

import pytest
from rich.console import Console

from atmossl import progress
from atmossl.progress import Pace, duration_text, telling
from atmossl.training.progress import RunProgress, validation_text


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"), (99, "99 s"), (100, "2 min"), (3599, "1 h 00 min"), (11_100, "3 h 05 min"),
        (187_200, "2 d 04 h"),
    ],
)  # fmt: skip
def test_durations_are_read_at_a_glance(seconds: float, text: str) -> None:
    assert duration_text(seconds) == text


def test_the_time_left_is_that_of_the_units_left_at_the_pace_since_the_start() -> None:
    clock = Clock()
    pace = Pace(clock)
    clock.now = 100.0
    pace.start(10)
    assert pace.seconds_left(10, 50) is None
    clock.now = 130.0
    assert pace.seconds_left(20, 50) == pytest.approx(90.0)


def trainer(step: int, **metrics: float) -> Any:
    return SimpleNamespace(
        is_global_zero=True, global_step=step, max_steps=8, accumulate_grad_batches=2,
        callback_metrics={"train/loss": 0.5, "learning_rate": 1e-3, "samples_per_s": 12.0},
        progress_bar_metrics=metrics,
    )  # fmt: skip


def told(console: Console) -> str:
    """What a run of three of eight steps tells, that logs every other step of two batches."""
    callback, module = RunProgress(every=4, console=console), SimpleNamespace()
    callback.on_train_start(trainer(0), module)
    for idx in range(6):
        callback.on_train_batch_end(trainer((idx + 1) // 2), module, None, None, idx)
    found = {"rmse_ratio/forecast": 0.9, "rmse_ratio/mean": 0.95, "train/loss": 0.5}
    callback.on_validation_end(trainer(3, **found), module)
    callback.on_train_end(trainer(3), module)
    assert isinstance(console.file, io.StringIO)
    return console.file.getvalue()


def test_a_log_file_gets_one_plain_line_a_log() -> None:
    lines = told(Console(file=io.StringIO(), width=40, soft_wrap=True)).splitlines()
    log, validation = lines
    assert log.startswith("step 2/8, loss 0.5, learning rate 1.00e-03, 12 samples/s, ")
    assert log.endswith(" left")
    assert validation == "step 3/8, validation: rmse_ratio forecast 0.9, mean 0.95"


def test_a_log_file_learns_of_slow_steps_and_of_a_long_validation() -> None:
    """One line after some seconds, and one each half a minute, though a log is far away."""
    clock = Clock()
    console = Console(file=io.StringIO(), width=40, soft_wrap=True)
    callback, module = RunProgress(every=100, console=console, clock=clock), SimpleNamespace()
    callback.on_train_start(trainer(0), module)
    for idx in (1, 3, 5):
        clock.now += 20.0
        callback.on_train_batch_end(trainer((idx + 1) // 2), module, None, None, idx)
    validating = trainer(3)
    validating.num_val_batches = [2, 1]
    callback.on_validation_start(validating, module)
    for number, task in ((0, 0), (1, 0), (0, 1)):
        clock.now += 15.0
        callback.on_validation_batch_end(validating, module, None, None, number, task)
    clock.now += 20.0
    callback.on_train_batch_end(trainer(3), module, None, None, 6)
    assert isinstance(console.file, io.StringIO)
    assert console.file.getvalue().splitlines() == [
        "step 1/8",
        "step 3/8, 2 min left",
        "step 3/8, validation, batch 2 of 3",
        "step 3/8, batch 1 of 2 of the next step",
    ]


@pytest.mark.parametrize("width", [60, 80, 200])
def test_a_terminal_gets_one_line_with_a_bar(width: int) -> None:
    console = Console(file=io.StringIO(), width=width, force_terminal=True, color_system=None)
    shown = told(console)
    lines = re.sub(r"\x1b\[[?0-9;]*[A-Za-z]|\r", "\n", shown).split("\n")
    last = [line for line in lines if line.strip()][-1]
    assert last.startswith("step 3/8") and "━" in last and len(last) <= width
    assert "loss 0.5" in last and "12 samples/s" in last and " left" in last
    assert "\x1b[1A" not in shown.split("validation")[0]  # no line above is drawn anew
    assert "step 3/8, validation: rmse_ratio forecast 0.9, mean 0.95" in shown


def test_a_further_rank_tells_nothing() -> None:
    console = Console(file=io.StringIO())
    callback, other = RunProgress(every=1, console=console), trainer(1)
    other.is_global_zero = False
    callback.on_train_start(other, SimpleNamespace())
    callback.on_train_batch_end(other, SimpleNamespace(), None, None, 1)
    callback.on_validation_end(other, SimpleNamespace())
    assert isinstance(console.file, io.StringIO) and console.file.getvalue() == ""


def test_validations_are_told_by_kind_of_value() -> None:
    values = {"latent_ratio/a": 1.0, "rank/mean": 3.0, "latent_ratio/mean": 2.0, "loss": 1.0}
    assert validation_text(values) == "latent_ratio a 1, mean 2; rank mean 3"


def test_long_work_tells_a_log_file_its_share_and_what_is_left(monkeypatch, capsys) -> None:
    clock = Clock()
    monkeypatch.setattr(progress, "Pace", lambda: Pace(clock))
    with telling("statistics of sample", 1000) as advance:
        for seconds in (4.0, 8.0, 20.0, 40.0):
            clock.now = seconds
            advance(100)
    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "statistics of sample: 20% in 8 s, 32 s left",
        "statistics of sample: 40% in 40 s, 60 s left",
    ]
